"""Stage 2 as a person runs it: from a stage-1 checkpoint, with freezing, ramps, hard negatives and two domains.

Run as a script, it is one of two processes that fine-tune together.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "harness"))  # as a script it has no pytest to do so

from scripts import STAGE_1, STAGE_2, load, metrics, refused, run

import macl
import train_stage1
import train_stage2
from macl.training import freeze_unreached
from trainkit.gradients import _leaves


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


def test_hard_negatives_come_from_banks_that_fill(tuned):
    steps = metrics(tuned)
    assert steps[0]["dhn_fill"] == 0 < steps[1]["dhn_fill"] <= steps[-1]["dhn_fill"]
    assert steps[0]["loss_dhn"] == 0 < steps[-1]["loss_dhn"]
    assert all(line["weights"]["loss_dhn"] == 0.1 for line in steps)
    assert load(tuned)["model"]["macl.hard.banks.visible.valid"] > 0


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


def test_every_loss_pulls_at_backbone_and_neck(tuned):
    reported = metrics(tuned, "gradients")
    assert [line["step"] for line in reported] == [8, 16, 24]
    for part in ("backbone", "neck"):
        norms = reported[1][part]["norm"]
        assert all(norms[name] > 0 for name in norms), norms
        assert -1 <= reported[1][part]["cosine"]["loss_classifier"]["loss_box_reg"] <= 1


def test_stage_1_starts_from_a_run_of_stage_2(tuned, tmp_path, capsys):
    """With the detector, without what stage 2 added to it."""
    flags = "--synthetic-train 4 --synthetic-val 2 --batch-size 2 --epochs 1 --workers 0 --device cpu --max-steps 1"
    train_stage1.main([*flags.split(), "--init-from", str(tuned / "best.pt"), "--output", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert "left out: alignment.classifier; left out: macl.hard.banks.infrared" in output
    assert {name for name in metrics(tmp_path / "run")[0] if name.startswith("loss_")} == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_macl"
    }  # fmt: skip


def test_without_flags_the_newest_run_is_tuned_and_without_one_it_says_so(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "run train_stage1.py first" in refused(capsys, train_stage2.main)
    for name in ("stage1-a", "stage1-b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pt").write_bytes(begun.read_bytes())
    train_stage2.main(["--synthetic-train", "2", "--synthetic-val", "2", "--workers", "0", "--check"])
    output = capsys.readouterr().out
    assert "weights of runs/stage1-b/best.pt: all" in output and "newly made: macl.hard.banks.visible" in output
    assert "gradient norm of macl.projector" in output and len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_gets_no_better_is_stopped(begun, tmp_path, capsys):
    tune(begun, tmp_path / "run", "--patience", 1, "--lr", 1e-12, "--epochs", 20)
    assert "no better miss-rate in 1 validations" in capsys.readouterr().out.replace("ap50", "miss-rate")
    assert load(tmp_path / "run")["stepper"]["steps"] == 8


def test_each_part_can_be_left_out(begun, tmp_path):
    options = [
        "--old-share 0 --dhn-size 0 --mmd-level none --macl-weight 0 --adversary none",
        "--from-scratch --adversary modality --mmd-sigmas 0.5,1 --no-mmd-unbiased --adversary-ramp exponential "
        "--register each",
        "--old-share 0 --adversary none --lr-scale backbone=0.1 neck=0.5 --modality-dropout 0.5 0.5 --amp bf16 "
        "--accumulate 2 --best-by miss-rate --optimizer sgd --min-size 48 --max-size 80 --synthetic-val 1",
    ]
    for number, flags in enumerate(options):
        tune(begun, tmp_path / str(number), *flags.split(), "--max-steps", 1)
        assert len(metrics(tmp_path / str(number))) == 1
    bare = metrics(tmp_path / "0")[0]
    assert bare["weights"]["loss_macl"] == 0 and "loss_mmd" not in bare and "dhn_fill" not in bare
    assert "loss_adversary" in metrics(tmp_path / "1")[0] and load(tmp_path / "1")["register"] == "each"


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(mmd_level="embedding", adversary="modality", dhn_size=8, dhn_k=2, dhn_mode="softplus"),
        dict(mmd_level="pyramid", adversary="dataset", domains=2, fusion="visible", macl_level="image", fpn_levels=5),
        dict(macl_level="none", mmd_level="pyramid", fusion="mean"),
    ],
)
def test_what_is_trained_is_what_losses_with_a_weight_reach(kwargs):
    """For every choice of weights of 0; DistributedDataParallel would wait for the gradient of what is not reached."""
    torch.manual_seed(0)
    small = dict(backbone="resnet18", norm="group", fpn_channels=8, fpn_levels=3, head_width=8, macl_hidden=(8,))
    detector = macl.build_detector(**small | dict(macl_dim=8, msp=True, fusion="gated") | kwargs)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    boxes = torch.tensor([[5.0, 5, 25, 50], [30, 10, 50, 55]])
    targets = [
        {
            "boxes": boxes,
            "labels": torch.ones(2, dtype=torch.int64),
            "scene": torch.tensor(i),
            "domain": torch.tensor(i),
        }
        for i in range(2)
    ]
    losses = detector(visible=images, infrared=images, targets=targets)
    reached = {name: set(map(id, _leaves(loss))) for name, loss in losses.items()}
    tied = {"loss_rpn_box_reg": "loss_objectness", "loss_mmd_domains": "loss_mmd"}  # one flag each
    choices = [name for name in losses if name not in tied]
    for count in range(1, len(choices) + 1):
        for enabled in itertools.combinations(choices, count):
            detector.requires_grad_(True)
            freeze_unreached(detector, {name: tied.get(name, name) in enabled for name in losses})
            trained = {id(parameter) for parameter in detector.parameters() if parameter.requires_grad}
            wanted = set().union(*(reached[name] for name in losses if tied.get(name, name) in enabled))
            if detector.macl is not None and "loss_macl" not in enabled:  # the projector stands still for the others
                wanted -= set(map(id, detector.macl.parameters()))
            assert trained == wanted, enabled


def test_an_alignment_loss_that_stays_zero_stops_the_run():
    watch = train_stage2.ZeroWatch()
    for _ in range(train_stage2.MAX_ZEROS - 1):
        watch({"loss_mmd": 0.0, "loss_mmd_domains": 0.0, "loss_classifier": 0.0})
    watch({"loss_mmd": 0.1, "loss_mmd_domains": 0.1})
    for _ in range(train_stage2.MAX_ZEROS - 1):
        watch({"loss_mmd": 0.0, "loss_mmd_domains": 0.1})
    with pytest.raises(train_stage2.InputError, match="loss_mmd was exactly 0.*seen in both"):
        watch({"loss_mmd": 0.0, "loss_mmd_domains": 0.1})


def test_wrong_flags_end_in_one_sentence(begun, tuned, tmp_path, capsys):
    def say(*flags):
        output = ("--output", tmp_path / "run")
        return refused(capsys, train_stage2.main, *STAGE_2, "--init-from", begun, *output, *flags)

    assert "--llvip-root goes with --data-root" in say("--llvip-root", tmp_path)
    assert "--old-share 1" in say("--old-share", 1)
    assert "--freeze-stages" in say("--freeze-stages", 5)
    assert "--dhn-size 0" in say("--macl-weight", 0)
    assert "--dhn-k" in say("--dhn-k", "")
    assert "--compile" in say("--gradient-report", 5, "--compile")
    assert "expected NAME=FACTOR" in say("--lr-scale", "backbone")
    assert "parts are backbone, neck" in say("--lr-scale", "bakbone=0.1")
    headless = tmp_path / "headless.pt"
    before = load(begun.parent, "best.pt")
    bare = {k: {n: t for n, t in before[k].items() if not n.startswith("macl.")} for k in ("model", "ema")}
    torch.save(before | bare | {"model_kwargs": before["model_kwargs"] | {"macl_level": "none"}}, headless)
    without = "--dhn-size 0 --mmd-level none --old-share 0 --adversary none".split()
    assert "--best-by r1 needs" in say("--best-by", "r1", *without, "--init-from", headless)
    assert "fit together" in say("--adversary", "dataset", "--old-share", 0)
    assert "nothing does not hold" in say("--data-root", tmp_path / "nothing", *without)
    assert "was not written by torch.save" in say("--init-from", tuned / "args.json")
    assert not (tmp_path / "run").exists()


def test_real_frames_of_kaist_and_llvip(begun, shared, tmp_path, capsys):
    data = shared / "data"
    flags = "--image-set train --val-image-set test --epochs 1 --batch-size 2 --min-size 96 --max-size 128".split()
    for root in ("kaist-rgbt", "KAIST_processed"):
        roots = ["--data-root", data / "kaist" / root, "--llvip-root", data / "llvip256"]
        tune(begun, tmp_path / root, *roots, *flags, "--dhn-size", 0, "--dhn-mode", "denominator")
        steps = metrics(tmp_path / root)
        assert len(steps) == 3 and "loss_mmd_domains" in steps[0]  # 3 frames of KAIST and 3 of LLVIP, two a step
        assert {"miss_rate", "old"} <= metrics(tmp_path / root, "validation")[-1].keys()
    assert "old domain: " in capsys.readouterr().out


def test_hard_negatives_grow_from_stage_to_stage():
    args = train_stage2.parse_arguments("--dhn-k 4,8,16 --dhn-active 32,64 --dhn-milestones 1,3".split())
    seen, detector = [], SimpleNamespace(set_schedule=lambda **values: seen.append(values))
    for epoch in (1, 2, 3, 4):
        train_stage2.apply_schedules(args, detector, {}, step=epoch, total=4, epoch=epoch)
    stages = [(values["hard_k"], values["hard_active"]) for values in seen if "hard_k" in values]
    assert stages == [(4, 32), (8, 64), (8, 64), (16, 64)]  # one epoch, two, and the rest


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
    "stage1": "--rpn-weight 0 --fusion gated --macl-weight 0 --epochs 2 --max-steps 2",
    "stage2": "--box-weight 0 --adversary modality --adversary-weight 0 --mmd-weight 0 --batch-size 2 --max-steps 2",
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
