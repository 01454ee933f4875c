"""Stage 2 as a person runs it: from a stage-1 checkpoint, with freezing, ramps, hard negatives and two domains.

Run as a script, it is one of two processes that fine-tune together.
"""

import itertools
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import macl
import train_stage1
import train_stage2
from macl import validation
from trainkit.errors import one_sentence
from trainkit.gradients import _leaves

STAGE_1 = (
    "--synthetic-train 8 --synthetic-val 2 --batch-size 2 --epochs 1 --workers 0 --device cpu --fpn-channels 16 "
    "--head-width 16 --macl-dim 8 --macl-hidden 16 --min-size 64"
).split()
STAGE_2 = (
    "--synthetic-train 6 --synthetic-val 2 --batch-size 4 --epochs 3 --workers 0 --device cpu --old-share 0.5 "
    "--dhn-size 40 --dhn-k 4,8 --dhn-active 20,40 --dhn-milestones 1 --freeze-stages 2,0 --warmup-steps 1 "
    "--ramp-steps 4 --ema-decay 0.9"
).split()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """best.pt of a stage-1 run."""
    folder = tmp_path_factory.mktemp("stage1") / "run"
    torch.set_num_threads(1)
    train_stage1.main([*STAGE_1, "--output", str(folder)])
    return folder / "best.pt"


def tune(begun, output, *flags):
    train_stage2.main([*STAGE_2, "--init-from", str(begun), "--output", str(output), *map(str, flags)])


@pytest.fixture(scope="module")
def run(begun, tmp_path_factory):
    """A finished run of nine steps, with everything on."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    tune(begun, folder, *EVERYTHING, "--gradient-report", 4, "--save-every", 2, "--keep-every", 1)
    return folder


EVERYTHING = "--dhn-mode softplus --dhn-momentum 0.5 --adversary dataset --mmd-level pyramid --macl-ramp progressive"
EVERYTHING = EVERYTHING.split()


def metrics(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def load(path):
    return torch.load(path, weights_only=True)


def test_what_is_optimised_is_what_is_logged_and_weights_really_ramp(run):
    steps = metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 10))
    names = {f"loss_{name}" for name in ("dhn", "macl", "mmd", "mmd_domains", "adversary")}
    for line in steps:
        losses = {name: value for name, value in line.items() if name.startswith("loss_")}
        assert names <= losses.keys()
        assert line["loss"] == pytest.approx(sum(line["weights"][name] * value for name, value in losses.items()))
    assert [line["weights"]["loss_mmd"] for line in steps[:5]] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    macl = [line["weights"]["loss_macl"] for line in steps]
    assert macl[0] == pytest.approx(0.2 / 2.25) and macl[-1] == 0.2
    assert all(line["weights"]["loss_dhn"] == 0.1 for line in steps)
    assert steps[0]["dhn_fill"] == 0 < steps[1]["dhn_fill"] <= steps[-1]["dhn_fill"]
    assert steps[0]["loss_dhn"] == 0 < steps[-1]["loss_dhn"]


def test_both_domains_are_validated_before_and_after(run):
    validations = metrics(run, "validation")
    assert [line["step"] for line in validations] == [0, 3, 6, 9]
    for line in validations:
        assert {"both", "visible", "infrared", "alignment", "miss_rate", "old"} <= line.keys()
        assert {"both", "visible", "infrared"} <= line["old"].keys()
        assert "reasonable all" in line["miss_rate"]["both"]
    assert {"best.pt", "last.pt", "epoch-1.pt", "pictures"} <= {path.name for path in run.iterdir()}


def test_frozen_stages_stand_still_and_are_trained_afterwards(begun, run):
    states = [load(begun)["ema"], load(run / "epoch-1.pt")["model"], load(run / "last.pt")["model"]]
    frozen = [name for name in states[0] if name.startswith(("backbone.conv1", "backbone.layer1", "backbone.layer2"))]
    assert len(frozen) > 10
    for name in frozen:
        assert torch.equal(states[0][name], states[1][name]), name
    assert not torch.equal(states[1]["backbone.conv1.weight"], states[2]["backbone.conv1.weight"])
    assert not torch.equal(states[0]["backbone.layer3.0.conv1.weight"], states[1]["backbone.layer3.0.conv1.weight"])


def test_every_loss_pulls_at_backbone_and_neck(run):
    reported = metrics(run, "gradients")
    assert [line["step"] for line in reported] == [4, 8]
    for part in ("backbone", "neck"):
        norms = reported[1][part]["norm"]
        assert all(norms[name] > 0 for name in norms), norms
        assert -1 <= reported[1][part]["cosine"]["loss_classifier"]["loss_box_reg"] <= 1


def test_a_resumed_run_equals_one_that_was_never_stopped(begun, run, tmp_path):
    """Memory banks, key projector and the place in two data sets among the rest."""
    extra = [*EVERYTHING, "--gradient-report", 4, "--save-every", 2, "--keep-every", 1]
    tune(begun, tmp_path / "halves", *extra, "--max-steps", 2)
    train_stage2.main([*STAGE_2, *map(str, extra), "--output", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = load(run / "last.pt"), load(tmp_path / "halves" / "last.pt")
    for part in ("model", "ema"):
        assert whole[part].keys() == halves[part].keys()
        assert all(torch.equal(whole[part][name], halves[part][name]) for name in whole[part])
    assert whole["model"]["macl.hard.banks.visible.valid"] > 0
    timing = {"images_per_second", "memory_gib"}
    # The first part ended with a validation that an uninterrupted run does not make.
    for one, other in zip(metrics(run), metrics(tmp_path / "halves"), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_a_signal_gives_up_a_validation_and_the_run_goes_on_with_it(begun, run, tmp_path, monkeypatch):
    """Between the two domains, in the first validation and in a later one: no line is lost, and none comes twice."""
    extra = [*STAGE_2, *map(str, [*EVERYTHING, "--gradient-report", 4, "--save-every", 2, "--keep-every", 1])]
    calls, embed = itertools.count(1), validation.embed

    def told_to_end(*args):
        if next(calls) in (1, 4):  # a batch for each domain
            signal.raise_signal(signal.SIGINT)
        return embed(*args)

    monkeypatch.setattr(validation, "embed", told_to_end)
    for start in (["--init-from", str(begun)], ["--resume", "auto"]):
        with pytest.raises(SystemExit) as stop:
            train_stage2.main([*extra, *start, "--output", str(tmp_path / "run")])
        assert stop.value.code == 130
    train_stage2.main([*extra, "--output", str(tmp_path / "run"), "--resume", "auto"])
    for name in ("last.pt", "best.pt", "epoch-1.pt"):
        whole, parts = load(run / name), load(tmp_path / "run" / name)
        assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())
        assert (whole["best"], whole["stale"], whole["stepper"]) == (parts["best"], parts["stale"], parts["stepper"])
    assert metrics(run, "validation") == metrics(tmp_path / "run", "validation")


def test_stage_1_starts_from_a_run_of_stage_2(run, tmp_path, capsys):
    """With the detector, without what stage 2 added to it."""
    flags = "--synthetic-train 4 --synthetic-val 2 --batch-size 2 --epochs 1 --workers 0 --device cpu --max-steps 1"
    train_stage1.main([*flags.split(), "--init-from", str(run / "best.pt"), "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "left out: alignment.classifier; left out: macl.hard.banks.infrared" in said
    assert {name for name in metrics(tmp_path / "run")[0] if name.startswith("loss_")} == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_macl"
    }  # fmt: skip


def test_without_flags_the_newest_run_is_tuned_and_without_one_it_says_so(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop, one_sentence():
        train_stage2.main([])
    assert stop.value.code == 2 and "run train_stage1.py first" in capsys.readouterr().err
    for name in ("stage1-a", "stage1-b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pt").write_bytes(begun.read_bytes())
    train_stage2.main(["--synthetic-train", "2", "--synthetic-val", "2", "--workers", "0", "--check"])
    said = capsys.readouterr().out
    assert "weights of runs/stage1-b/best.pt: all" in said and "newly made: macl.hard.banks.visible" in said
    assert "gradient norm of macl.projector" in said and len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_gets_no_better_is_stopped(begun, tmp_path, capsys):
    tune(begun, tmp_path / "run", "--patience", 1, "--lr", 1e-12, "--epochs", 20)
    assert "stopped after epoch 1" in capsys.readouterr().out
    assert load(tmp_path / "run" / "last.pt")["stepper"]["steps"] == 3


def test_each_part_can_be_left_out(begun, tmp_path):
    options = [
        "--old-share 0 --dhn-size 0 --mmd-level none --macl-weight 0",
        "--from-scratch --adversary modality --mmd-sigmas 0.5,1 --no-mmd-unbiased --adversary-ramp exponential",
        "--old-share 0 --lr-scale backbone=0.1 neck=0.5 --modality-dropout 0.5 0.5 --amp bf16 --accumulate 2 "
        "--best-by miss-rate --optimizer sgd --min-size 48 --max-size 80 --synthetic-val 1",
    ]
    for number, flags in enumerate(options):
        tune(begun, tmp_path / str(number), *flags.split(), "--max-steps", 1)
        assert len(metrics(tmp_path / str(number))) == 1
    bare = metrics(tmp_path / "0")[0]
    assert bare["weights"]["loss_macl"] == 0 and "loss_mmd" not in bare and "dhn_fill" not in bare
    assert "loss_adversary" in metrics(tmp_path / "1")[0]


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
            train_stage1.freeze_unreached(detector, {name: tied.get(name, name) in enabled for name in losses})
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


def test_wrong_flags_end_in_one_sentence(begun, run, tmp_path, capsys):
    def say(*flags):
        with pytest.raises(SystemExit) as stop, one_sentence():
            tune(begun, tmp_path / "run", *flags)
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "--llvip-root goes with --data-root" in say("--llvip-root", tmp_path)
    assert "--old-share 1" in say("--old-share", 1)
    assert "--freeze-stages" in say("--freeze-stages", 5)
    assert "--dhn-size 0" in say("--macl-weight", 0)
    assert "--dhn-k" in say("--dhn-k", "")
    assert "--mosaic" in say("--mosaic", 0.5)
    assert "--compile" in say("--gradient-report", 5, "--compile")
    assert "expected NAME=FACTOR" in say("--lr-scale", "backbone")
    assert "parts are backbone, neck" in say("--lr-scale", "bakbone=0.1")
    headless = tmp_path / "headless.pt"
    before = load(begun)
    bare = {k: {n: t for n, t in before[k].items() if not n.startswith("macl.")} for k in ("model", "ema")}
    torch.save(before | bare | {"model_kwargs": before["model_kwargs"] | {"macl_level": "none"}}, headless)
    without = "--dhn-size 0 --mmd-level none --old-share 0".split()
    assert "--best-by r1 needs" in say("--best-by", "r1", *without, "--init-from", headless)
    assert "fit together" in say("--adversary", "dataset", "--old-share", 0)
    assert "does not exist" in say("--data-root", tmp_path / "nothing")
    assert "missing.pt does not exist" in say("--init-from", tmp_path / "missing.pt")
    assert "was not written by torch.save" in say("--init-from", run / "args.json")
    assert "is [2], but the run" in say("--resume", run, *EVERYTHING, "--init-from", "", "--dhn-k", "2")
    assert not (tmp_path / "run").exists()


def test_real_frames_of_kaist_and_llvip(begun, shared, tmp_path, capsys):
    data = shared / "data"
    flags = "--image-set train --val-image-set test --epochs 1 --batch-size 2 --min-size 96 --max-size 128".split()
    for root in ("kaist-rgbt", "KAIST_processed"):
        roots = ["--data-root", data / "kaist" / root, "--llvip-root", data / "llvip256"]
        tune(begun, tmp_path / root, *roots, *flags)
        steps = metrics(tmp_path / root)
        assert len(steps) == 3 and "loss_mmd_domains" in steps[0]  # 3 frames of KAIST and 3 of LLVIP, two a step
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


WITHOUT = {  # losses of weight 0; DistributedDataParallel says in its second step what it waits for
    "stage1": "--rpn-weight 0 --fusion gated --macl-weight 0 --epochs 2 --max-steps 2",
    "stage2": "--box-weight 0 --adversary modality --adversary-weight 0 --mmd-weight 0 --batch-size 2 --max-steps 2",
}


def main_of_a_rank(folder: Path) -> None:
    held = {}
    build = train_stage2.build_model

    def build_and_hold(*args, **kwargs):
        held["detector"], said = build(*args, **kwargs)
        return held["detector"], said

    train_stage2.build_model = build_and_hold
    train_stage2.distributed.stop = lambda: None
    tune(folder / "begun.pt", folder / "run", "--batch-size", 2, "--epochs", 2, "--freeze-stages", "2,0")
    torch.save(held["detector"].state_dict(), folder / f"rank{train_stage2.distributed.rank()}.pt")
    train_stage2.distributed.start = torch.device  # there is a process group already
    train_stage1.main([*STAGE_1, *WITHOUT["stage1"].split(), "--output", str(folder / "stage1")])
    tune(folder / "begun.pt", folder / "stage2", *WITHOUT["stage2"].split())


if __name__ == "__main__":
    main_of_a_rank(Path(sys.argv[1]))


def test_hard_negatives_grow_from_stage_to_stage():
    args = train_stage2.parse_arguments("--dhn-k 4,8,16 --dhn-active 32,64 --dhn-milestones 1,3".split())
    hard = SimpleNamespace()
    detector, seen = SimpleNamespace(macl=SimpleNamespace(hard=hard)), []
    for epoch in (1, 2, 3, 4):
        train_stage2.apply_schedules(args, detector, {}, step=epoch, total=4, epoch=epoch)
        seen.append((hard.k, hard.active))
    assert seen == [(4, 32), (8, 64), (8, 64), (16, 64)]  # one epoch, two, and the rest
