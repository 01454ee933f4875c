"""Stage 2 as a person runs it: from a stage-1 checkpoint, with freezing, hard negatives and two domains.

Run as a script, it is one of two processes that fine-tune together.
"""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from scripts import STAGE_1, STAGE_2, equal, load, metrics, refused, run

import macl
import train_stage1
import train_stage2
from macl.data import DAY_AND_NIGHT, NIGHT, SyntheticPairs
from macl.training import freeze_unreached


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """best.pt of a stage-1 run."""
    few = ("--synthetic-train", 8, "--epochs", 1)
    return run(train_stage1, STAGE_1, tmp_path_factory.mktemp("runs") / "stage1", *few) / "best.pt"


@pytest.fixture(scope="module")
def tuned(begun, tmp_path_factory):
    """A finished run of 24 steps with everything on."""
    return tune(begun, tmp_path_factory.mktemp("runs") / "stage2")


def tune(begun: Path, folder: Path, *flags) -> Path:
    return run(train_stage2, [*STAGE_2, "--init-from", begun], folder, *flags)


def test_both_domains_are_validated_before_and_after(tuned):
    validations = metrics(tuned, "validation")
    assert [line["step"] for line in validations] == [0, 8, 16, 24]
    for line in validations:
        assert {"both", "visible", "infrared", "alignment", "miss_rate", "old"} <= line.keys()
        assert {"both", "visible", "infrared"} <= line["old"].keys()
        assert "reasonable all" in line["miss_rate"]["both"]
    assert {"best.pt", "last.pt", "epoch-1.pt", "pictures"} <= {path.name for path in tuned.iterdir()}


def test_frozen_stages_stand_still_and_are_trained_afterwards(begun, tuned):
    states = [load(begun.parent, "best.pt")["ema"], load(tuned, "epoch-1.pt")["model"], load(tuned)["model"]]
    frozen = [name for name in states[0] if name.startswith(("backbone.conv1", "backbone.layer1", "backbone.layer2"))]
    assert len(frozen) > 10
    for name in frozen:
        assert torch.equal(states[0][name], states[1][name]), name
    assert not torch.equal(states[1]["backbone.conv1.weight"], states[2]["backbone.conv1.weight"])
    assert not torch.equal(states[0]["backbone.layer3.0.conv1.weight"], states[1]["backbone.layer3.0.conv1.weight"])


def test_stage_1_starts_from_a_run_of_stage_2(tuned, tmp_path, capsys):
    """With the detector, without what stage 2 added to it."""
    flags = "--synthetic-train 4 --synthetic-val 2 --batch-size 2 --epochs 1 --workers 0 --device cpu --dhn-size 0"
    train_stage1.main([*flags.split(), "--init-from", str(tuned / "best.pt"), "--output", str(tmp_path / "run")])
    assert "the averaged ones; left out: macl.hard\n" in capsys.readouterr().out
    assert "dhn_fill" not in metrics(tmp_path / "run")[0]


def test_without_flags_the_newest_run_is_tuned_and_without_one_it_says_so(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "run train_stage1.py first" in refused(capsys, train_stage2.main)
    for name in ("stage1-a", "stage1-b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pt").write_bytes(begun.read_bytes())
    train_stage2.main(["--synthetic-train", "2", "--synthetic-val", "2", "--workers", "0", "--check"])
    output = capsys.readouterr().out
    assert re.search(r"weights of runs/stage1-b/best.pt: \d+ tensors, the averaged ones\n", output)
    assert "gradient norm of macl.projector" in output and len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_gets_no_better_is_stopped(begun, tmp_path, capsys):
    tune(begun, tmp_path / "run", "--patience", 1, "--lr", 1e-12, "--epochs", 20)
    assert "no better miss-rate in 1 validations" in capsys.readouterr().out.replace("ap50", "miss-rate")
    assert load(tmp_path / "run")["stepper"]["steps"] == 8


@pytest.mark.parametrize(
    "flags",
    [
        "--old-share 0 --dhn-size 0 --macl-weight 0 --ema-decay 0",
        "--target-labels none --register each",
        "--old-share 0 --lr-scale backbone=0.1 neck=0.5 --modality-dropout 0.5 0.5 --amp bf16 --accumulate 2 "
        "--best-by miss-rate --optimizer sgd --min-size 48 --max-size 80 --synthetic-val 1",
    ],
)
def test_each_part_can_be_left_out(begun, tmp_path, flags):
    (step,) = metrics(tune(begun, tmp_path / "run", *flags.split(), "--max-steps", 1))
    assert ("dhn_fill" in step) == ("--dhn-size" not in flags)


def test_labels_of_a_domain_without_any_are_never_looked_at(begun, tmp_path, monkeypatch):
    """Whatever they say: training is the same bit for bit. Those of the old domain count."""
    flags, getitem = ["--target-labels", "none", "--self-threshold", 0.3, "--epochs", 1], SyntheticPairs.__getitem__
    folders = []
    for domain in (None, DAY_AND_NIGHT, NIGHT):

        def changed(self, index, domain=domain):
            sample = getitem(self, index)
            if self.domains == (tuple(domain) if isinstance(domain, list | tuple) else (domain,)):
                sample["boxes"] = sample["boxes"].flip(0) * 0.5
            return sample

        monkeypatch.setattr(SyntheticPairs, "__getitem__", changed)
        folders.append(tune(begun, tmp_path / str(len(folders)), *flags))
    states = [load(folder)["model"] for folder in folders]
    assert equal(states[0], states[1]) and not equal(states[0], states[2])
    assert any(line["loss_box_reg"] > 0 for line in metrics(folders[0]))


@pytest.mark.parametrize(
    "kwargs",
    [dict(dhn_size=8, dhn_k=2), dict(fusion="visible", macl_level="image", fpn_levels=5), dict(macl_level="crop")]
    + [dict(macl_level="none"), dict(macl_level="none", norm="modality_batch", cameras=("infrared",))],
)
def test_what_is_trained_is_what_losses_with_a_weight_reach(kwargs, backward_nodes):
    """For every choice of weights of 0; DistributedDataParallel would wait for the gradient of what is not reached."""
    torch.manual_seed(0)
    cameras = (kwargs := dict(kwargs)).pop("cameras", ("visible", "infrared"))
    small = dict(backbone="resnet18", norm="group", fpn_channels=8, fpn_levels=3, head_width=8, macl_hidden=(8,))
    detector = macl.build_detector(**small | dict(macl_dim=8, msp=True) | kwargs)
    images, boxes = [torch.rand(3, 64, 64)] * 2, torch.tensor([[5.0, 5, 25, 50], [30, 10, 50, 55]])
    target = {"boxes": boxes, "labels": torch.ones(2).long(), "scene": torch.tensor(0), "keys": torch.rand(2, 2, 8)}
    losses = detector(**dict.fromkeys(cameras, images), targets=[target] * 2)
    nodes = {name: backward_nodes(loss) for name, loss in losses.items()}
    reached = {name: {id(node.variable) for node in all_ if hasattr(node, "variable")} for name, all_ in nodes.items()}
    tied = {"loss_rpn_box_reg": "loss_objectness"}  # one flag
    choices = [name for name in losses if name not in tied]
    for count in range(1, len(choices) + 1):
        for enabled in itertools.combinations(choices, count):
            detector.requires_grad_(True)
            freeze_unreached(detector, {name: tied.get(name, name) in enabled for name in losses}, cameras)
            trained = {id(parameter) for parameter in detector.parameters() if parameter.requires_grad}
            wanted = set().union(*(reached[name] for name in losses if tied.get(name, name) in enabled))
            assert trained == wanted, enabled


def test_wrong_flags_end_in_one_sentence(begun, tuned, tmp_path, capsys):
    def say(*flags):
        output = ("--output", tmp_path / "run")
        return refused(capsys, train_stage2.main, *STAGE_2, "--init-from", begun, *output, *flags)

    assert "--llvip-root, goes with --data-root" in say("--llvip-root", tmp_path)
    assert "--val-split needs --data-root, or --visible" in say("--val-split", "val")
    assert "--old-share: expected a number of at least 0 and below 1" in say("--old-share", 1)
    assert "--freeze-stages" in say("--freeze-stages", 5)
    assert "--dhn-size 0" in say("--macl-weight", 0)
    assert "a bank of 40 rows" in say("--dhn-k", 41)
    assert "the old domain's labels" in say("--target-labels", "none", "--old-share", 0)
    assert "the old domain's labels" in say("--target-labels", "none", "--data-root", tmp_path)
    assert "the old domain's labels" in say("--target-labels", "none", "--ema-decay", 0, "--dhn-size", 0)
    assert "expected NAME=FACTOR" in say("--lr-scale", "backbone")
    assert "parts are backbone, neck" in say("--lr-scale", "bakbone=0.1")
    headless = tmp_path / "headless.pt"
    before = load(begun.parent, "best.pt")
    bare = {k: {n: t for n, t in before[k].items() if not n.startswith("macl.")} for k in ("model", "ema")}
    torch.save(before | bare | {"model_kwargs": before["model_kwargs"] | {"macl_level": "none"}}, headless)
    assert "fit together: dhn_size" in say("--init-from", headless)
    assert "--best-by r1 needs" in say("--best-by", "r1", "--dhn-size", 0, "--init-from", headless)
    assert "nothing holds no pairs in a known layout" in say("--data-root", tmp_path / "nothing")
    assert "was not written by torch.save" in say("--init-from", tuned / "args.json")
    assert not (tmp_path / "run").exists()


def test_real_frames_of_kaist_and_llvip(begun, shared, tmp_path, capsys):
    data = shared / "data"
    flags = "--image-set train --val-image-set test --epochs 1 --batch-size 2 --min-size 96 --max-size 128".split()
    for root in ("kaist-rgbt", "KAIST_processed"):
        roots = ["--data-root", data / "kaist" / root, "--llvip-root", data / "llvip256"]
        tune(begun, tmp_path / root, *roots, *flags)
        assert len(metrics(tmp_path / root)) == 3  # 3 frames of KAIST and 3 of LLVIP, two a step
        assert {"miss_rate", "old"} <= metrics(tmp_path / root, "validation")[-1].keys()
    assert "old domain: " in capsys.readouterr().out


def test_two_processes_fine_tune_together(begun, tmp_path, two_ranks):
    """Freezing that changes between epochs, banks that are the same on both, one run folder."""
    (tmp_path / "begun.pt").write_bytes(begun.read_bytes())
    first, second = two_ranks(__file__, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["macl.hard.banks.visible.valid"] > 0
    assert len(metrics(tmp_path / "run")) == 6
    assert all(len(metrics(tmp_path / script)) == 2 for script in WITHOUT)


SMALL = ("--synthetic-train", 6)
WITHOUT = {  # losses of weight 0; DistributedDataParallel says in its second step what it waits for
    "stage1": "--rpn-weight 0 --macl-weight 0 --epochs 2 --max-steps 2",
    "stage2": "--box-weight 0 --target-labels none --batch-size 2 --max-steps 2",
}


def main_of_a_rank(folder: Path) -> None:
    held = {}
    build = train_stage2.build_model

    def build_and_hold(*args, **kwargs):
        held["detector"], messages = build(*args, **kwargs)
        return held["detector"], messages

    train_stage2.build_model = build_and_hold
    train_stage2.distributed.stop = lambda: None
    tune(folder / "begun.pt", folder / "run", "--batch-size", 2, "--epochs", 2, *SMALL)
    torch.save(held["detector"].state_dict(), folder / f"rank{train_stage2.distributed.rank()}.pt")
    train_stage2.distributed.start = torch.device  # there is a process group already
    run(train_stage1, STAGE_1, folder / "stage1", *WITHOUT["stage1"].split())
    tune(folder / "begun.pt", folder / "stage2", *WITHOUT["stage2"].split())


if __name__ == "__main__":
    main_of_a_rank(Path(sys.argv[1]))
