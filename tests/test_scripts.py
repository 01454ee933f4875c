"""The scripts as a person runs them: a short run, resume, a stop signal, wrong flags, broken data."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_stage1
from macl import evaluate, evaluation, predict
from trainkit.errors import one_sentence

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--synthetic-train 12 --synthetic-val 4 --batch-size 2 --epochs 2 --workers 0 --device cpu --fpn-channels 16 "
    "--head-width 16 --macl-dim 8 --macl-hidden 16 --macl-weight 0.3 --warmup-steps 2 --min-size 64"
).split()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(output, *flags, tiny=TINY):
    train_stage1.main([*tiny, "--output", str(output), *map(str, flags)])


def refused(capsys, command, *flags) -> str:
    """The one sentence with which a command ends that has bad input, and its exit status is 2."""
    with pytest.raises(SystemExit) as stop, one_sentence():
        command([str(flag) for flag in flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of twelve steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    train(folder)
    return folder


def metrics(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_leaves_what_it_should(run):
    assert {"args.json", "metrics.jsonl", "last.pt", "best.pt", "pictures"} <= {path.name for path in run.iterdir()}
    steps = metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 13))
    weights = {"loss_macl": 0.3}
    for line in steps:
        losses = {name: value for name, value in line.items() if name.startswith("loss_")}
        assert len(losses) == 5
        assert line["loss"] == pytest.approx(sum(weights.get(name, 1) * value for name, value in losses.items()))
        assert {"lr", "grad_norm", "images_per_second", "memory_gib", "macl_relative"} <= line.keys()
    validations = metrics(run, "validation")
    assert [line["step"] for line in validations] == [0, 6, 12]
    for line in validations[1:]:
        assert {"both", "visible", "infrared", "alignment"} <= line.keys()


def test_a_resumed_run_equals_one_that_was_never_stopped(run, tmp_path):
    """Stopped in the middle of an epoch and of the data order; parameters, EMA, optimizer, schedule, random states."""
    train(tmp_path / "halves", "--max-steps", 4)
    train(tmp_path / "halves", "--resume", "auto", "--max-steps", 9)
    train(tmp_path / "halves", "--resume", tmp_path / "halves")
    whole, halves = (torch.load(folder / "last.pt", weights_only=True) for folder in (run, tmp_path / "halves"))
    assert whole["stepper"]["steps"] == 12
    for part in ("model", "ema", "optimizer", "schedule", "stepper", "sampler", "rng"):
        assert equal(whole[part], halves[part]), part
    timing = {"images_per_second", "memory_gib"}
    for one, other in zip(metrics(run), metrics(tmp_path / "halves"), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_a_signal_gives_up_a_validation_and_the_run_goes_on_with_it(run, tmp_path, monkeypatch):
    """In the first one and at the end of another: no line is lost, and none comes twice."""
    calls, embed = itertools.count(1), evaluation.embed

    def told_to_end(*args):
        if next(calls) in (1, 5):  # two batches a validation
            signal.raise_signal(signal.SIGTERM)
        return embed(*args)

    monkeypatch.setattr(evaluation, "embed", told_to_end)
    for validated in (-1, 0):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "run", "--resume", "auto")
        assert stop.value.code == 143
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["stepper"]["validated"] == validated
    train(tmp_path / "run", "--resume", "auto")
    whole, parts = (torch.load(folder / "last.pt", weights_only=True) for folder in (run, tmp_path / "run"))
    for part in ("model", "ema", "optimizer", "schedule", "stepper", "sampler", "rng", "best", "untrained"):
        assert equal(whole[part], parts[part]), part
    assert metrics(run, "validation") == metrics(tmp_path / "run", "validation")
    assert len(metrics(tmp_path / "run")) == 12


def test_workers_do_not_change_the_numbers(run, tmp_path):
    train(tmp_path / "workers", "--workers", 2, "--max-steps", 3)
    assert [line["loss"] for line in metrics(tmp_path / "workers")] == [line["loss"] for line in metrics(run)[:3]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_leaves_a_checkpoint_to_go_on_from(tmp_path, number):
    command = [sys.executable, "train_stage1.py", *TINY, "--epochs", "50", "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and '"train"' in path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the loading process is told, too
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert "--resume" in said and "Traceback" not in said
    stopped = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    steps = stopped["stepper"]["steps"]
    assert 1 <= steps == len(metrics(tmp_path / "run"))
    tiny = [*TINY, "--epochs", "50", "--workers", "1"]
    train(tmp_path / "run", "--resume", "auto", "--max-steps", steps + 1, tiny=tiny)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, steps + 2))


def test_a_signal_before_the_first_step_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_stage1, "open_data", lambda args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop, one_sentence():
        train(tmp_path / "run")
    assert stop.value.code == 143 and capsys.readouterr().err == "terminated\n"


def test_figures_of_a_step_are_those_of_all_its_micro_batches(run, tmp_path):
    """At a rate of 0 the two batches of a step say what they say as steps of their own."""
    flags = ["--epochs", 1, "--lr", 1e-30, "--max-steps"]
    train(tmp_path / "one", *flags, 4)
    train(tmp_path / "two", *flags, 2, "--accumulate", 2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss_macl", "macl_recall", "macl_relative", "macl_candidates"):
        for i in range(2):
            mean = (one[2 * i][name] + one[2 * i + 1][name]) / 2
            assert two[i][name] == pytest.approx(mean, rel=1e-5), name
    assert len({line["macl_candidates"] for line in one}) > 1


def test_check_reports_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_stage1.main([*TINY, "--check"])
    said = capsys.readouterr().out
    assert "training: pairs 12" in said and "gradient norm of backbone.layer1" in said and "no gradient" not in said
    assert not list(tmp_path.iterdir())


def test_every_option_of_the_model_trains_a_step(tmp_path):
    options = [
        "--norm batch --frozen-stages 1 --fusion gated --fpn-levels 5 --msp-hidden 8 --box-loss giou",
        "--norm modality_batch --macl-level image --macl-norm batch --macl-dropout 0.1 --optimizer sgd --amp bf16 "
        "--min-size 48 --synthetic-val 1",  # a processor takes long for half precision
        "--fusion visible --no-msp --macl-weight 0 --schedule one-cycle --ema-decay 0 --min-size 96,128 --max-size 200",
        "--crop 1 --mosaic 0.5 --erase-visible 1 --erase-infrared 1 --hue 0.1 --accumulate 2 --clip-norm 1",
        "--amp fp16 --min-size 48 --synthetic-val 1",
        "--macl-direction visible_to_infrared --macl-norm group --macl-norm-groups 4 --label-smoothing 0.1 "
        "--schedule multistep --milestones 1 --lr-base-batch 8 --statistics imagenet --best-by ap",
    ]
    for number, flags in enumerate(options):
        train(tmp_path / str(number), *flags.split(), "--max-steps", 1)
        assert len(metrics(tmp_path / str(number))) == 1


def test_wrong_flags_end_in_one_sentence(run, tmp_path, capsys):
    def say(*flags):
        return refused(capsys, train_stage1.main, *TINY, *flags)

    assert "--batch-size" in say("--batch-size", "0")
    assert "--fusion" in say("--fusion", "maximum")
    assert "unrecognized" in say("--bathc-size", "4")
    assert "already holds files" in say("--output", run)
    assert "never has a negative" in say("--macl-level", "image", "--batch-size", "1")
    assert "--statistics given" in say("--statistics", "given")
    assert "--hue 0.7" in say("--hue", "0.7")
    assert "--crop-scale" in say("--crop-scale", "0.9", "0.5")
    assert "--best-by r1" in say("--best-by", "r1", "--macl-weight", "0")
    assert "nothing" in say("--data-root", tmp_path / "nothing")
    assert "--resume" in say("--resume", tmp_path / "nothing")
    assert "missing.pt does not exist" in say("--init-from", tmp_path / "missing.pt")
    assert "fit together" in say("--modality-dropout", "0.8", "0.7")
    assert "another detector" in say("--init-from", run / "best.pt", "--head-width", "24")
    assert "is 24, but the run" in say("--resume", run, "--head-width", "24")
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_and_names_its_images(tmp_path, capsys, monkeypatch):
    def broken(self, *args):
        return batch(self, *args) * float("nan")

    batch = train_stage1.macl.PairedFasterRCNN.batch
    monkeypatch.setattr(train_stage1.macl.PairedFasterRCNN, "batch", broken)
    flags = [*TINY, "--output", tmp_path / "run", "--macl-weight", "0"]
    said = refused(capsys, train_stage1.main, *flags)
    assert "not a finite number" in said and "synthetic/0/" in said


def llvip(root: Path, count=6, size=(64, 48)) -> Path:
    """A data set in LLVIP's layout: two cameras, a bright person in every pair."""
    for camera in (1, 2):
        for number in range(count // 2):
            name = f"{camera:02d}{number:04d}"
            for modality in ("visible", "infrared"):
                path = root / modality / "train" / f"{name}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", size, (30, 30, 30))
                image.paste((220, 220, 220), (10, 5, 22, 40))
                image.save(path)
            xml = root / "Annotations" / f"{name}.xml"
            xml.parent.mkdir(exist_ok=True)
            box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>22</xmax><ymax>40</ymax></bndbox>"
            xml.write_text(
                f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
                f"<object><name>person</name>{box}</object></annotation>"
            )
    return root


SMALL_LLVIP = (
    "--backbone resnet18 --fpn-channels 16 --fpn-levels 3 --anchor-sizes 16,32,64 --head-width 16 --min-size 48 "
    "--max-size 64 --batch-size 2 --epochs 1 --workers 1 --device cpu --macl-dim 8 --macl-hidden 8"
).split()


def test_llvip_trains_and_is_evaluated(tmp_path, capsys):
    root = llvip(tmp_path / "LLVIP")
    train_stage1.main([*SMALL_LLVIP, "--data-root", str(root), "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "Held out for validation: 3 of the 6 pairs" in said
    evaluate.main(
        ["--checkpoint", str(tmp_path / "run" / "best.pt"), "--dataset", "llvip", "--data-root", str(root)]
        + ["--split", "train", "--device", "cpu", "--workers", "0", "--output", str(tmp_path / "figures.json")]
    )
    assert json.loads((tmp_path / "figures.json").read_text())["detection"]["both"]["ap50"] is not None


def test_an_image_that_breaks_off_in_the_middle_of_training_is_named(tmp_path):
    """In a process of its own, which has to end although its loading process still lives."""
    root = llvip(tmp_path / "LLVIP")
    broken = root / "infrared" / "train" / "010001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    flags = [*SMALL_LLVIP, "--batch-size", "1", "--data-root", str(root), "--output", str(tmp_path / "run")]
    command = [sys.executable, "train_stage1.py", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "010001.jpg cannot be decoded" in ended.stderr and "Traceback" not in ended.stderr


def test_evaluation_and_prediction_of_a_run(run, tmp_path, capsys):
    common = ["--checkpoint", str(run / "best.pt"), "--device", "cpu"]
    evaluate.main([*common, "--count", "3", "--workers", "0", "--modality", "infrared"])
    said = capsys.readouterr().out
    assert "\ninfrared" in said and "\nvisible" not in said
    root = llvip(tmp_path / "LLVIP", count=2)
    folders = {name: root / name / "train" for name in ("visible", "infrared")}
    for given in (("visible", "infrared"), ("visible",), ("infrared",)):
        output = tmp_path / "-".join(given)
        flags = [part for name in given for part in (f"--{name}", str(folders[name]))]
        predict.main([*common, *flags, "--output", str(output), "--min-score", "0"])
        found = json.loads((output / "detections.json").read_text())
        assert len(found) == 2 and {path.name for path in output.iterdir()} == {
            "010000.png", "020000.png", "detections.json"
        }  # fmt: skip
    assert "--visible, --infrared or both" in refused(capsys, predict.main, *common, "--output", tmp_path / "x")
    missing = ["--visible", tmp_path / "none", "--output", tmp_path / "x"]
    assert "does not exist" in refused(capsys, predict.main, *common, *missing)
    assert "was not written by torch.save" in refused(capsys, evaluate.main, "--checkpoint", run / "args.json")


def test_a_checkpoint_starts_the_next_run(run, tmp_path, capsys):
    """The architecture comes from the checkpoint: no model flag is repeated."""
    root = llvip(tmp_path / "LLVIP")
    flags = ["--data-root", root, "--init-from", run / "best.pt", "--batch-size", 2, "--workers", 0, "--epochs", 1]
    train_stage1.main([str(flag) for flag in [*flags, "--device", "cpu", "--output", tmp_path / "run"]])
    assert "tensors loaded, the averaged ones" in capsys.readouterr().out
    kwargs = [torch.load(folder / "last.pt", weights_only=True)["model_kwargs"] for folder in (run, tmp_path / "run")]
    assert kwargs[0] == kwargs[1]
