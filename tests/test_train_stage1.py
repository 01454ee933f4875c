"""Stage 1 as a person runs it: its options, LLVIP's layout, and what evaluates and predicts with its checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pairs import llvip
from scripts import ROOT, STAGE_1, load, metrics, refused, run

import train_stage1
from macl import evaluate, predict


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A finished run of three steps."""
    return run(train_stage1, STAGE_1, tmp_path_factory.mktemp("runs") / "stage1", "--max-steps", 3)


@pytest.mark.parametrize(
    "flags",
    [
        "--norm batch --frozen-stages 1 --fusion infrared --fpn-levels 5 --msp-hidden 8 --box-loss giou",
        "--norm modality_batch --macl-level image --macl-norm batch --macl-dropout 0.1 --optimizer sgd --amp bf16 "
        "--min-size 48 --synthetic-val 1",  # a processor takes long for half precision
        "--fusion visible --no-msp --macl-weight 0 --schedule constant --ema-decay 0 --min-size 96,128 --max-size 200",
        "--macl-level crop --dhn-size 16 --dhn-k 2 --merge none",
        "--crop 1 --register each --hue 0.1 --accumulate 2 --clip-norm 1",
        "--amp fp16 --min-size 48 --synthetic-val 1",
        "--macl-direction visible_to_infrared --macl-norm group --macl-norm-groups 4 --label-smoothing 0.1 "
        "--schedule multistep --milestones 1 --lr-base-batch 8 --statistics imagenet --best-by ap",
    ],
)
def test_every_option_of_the_model_trains_a_step(tmp_path, flags):
    few = ["--synthetic-train", 12, "--batch-size", 2, *flags.split(), "--max-steps", 1]
    folder = run(train_stage1, STAGE_1, tmp_path / "run", *few)
    saved = load(folder)
    assert len(metrics(folder)) == 1 and saved["register"] == ("each" if "each" in flags else "none")
    assert saved.get("keys", {}).get("average.n_averaged") == (1 if "--dhn-size" in flags else None)


def test_wrong_flags_end_in_one_sentence(stage1, tmp_path, capsys):
    def say(*flags):
        return refused(capsys, train_stage1.main, *STAGE_1, *flags)

    assert "--fusion" in say("--fusion", "maximum")
    assert "never has a negative" in say("--macl-level", "image", "--batch-size", "1")
    assert "--statistics given" in say("--statistics", "given")
    assert "--hue 0.7" in say("--hue", "0.7")
    assert "--min-size may" in refused(capsys, train_stage1.main, "--device", "cpu", "--max-size", 100)
    assert "--crop-scale" in say("--crop-scale", "0.9", "0.5")
    assert "fit together: dhn_size" in say("--dhn-size", 8, "--macl-level", "none")
    assert "--best-by r1" in say("--best-by", "r1", "--macl-weight", "0")
    assert "nothing" in say("--data-root", tmp_path / "nothing")
    assert "fit together" in say("--modality-dropout", "0.8", "0.7")
    for flag in ("anchor_sizes", "min_size"):
        for value in ("", "32,0"):
            assert f"fit together: {flag} [" in say(f"--{flag.replace('_', '-')}", value)
    assert "another detector" in say("--init-from", stage1 / "best.pt", "--head-width", "24")


def two_cameras(root: Path, count=6) -> Path:
    places = [f"train/{camera:02d}{number:04d}" for camera in (1, 2) for number in range(count // 2)]
    return llvip(root, "person", places=places)


SMALL_LLVIP = (
    "--backbone resnet18 --fpn-channels 16 --fpn-levels 3 --anchor-sizes 16,32,64 --head-width 16 --min-size 48 "
    "--max-size 64 --batch-size 2 --epochs 1 --workers 1 --device cpu --macl-dim 8 --macl-hidden 8"
).split()


def test_llvip_trains_and_is_evaluated(tmp_path, capsys):
    root = two_cameras(tmp_path / "LLVIP")
    train_stage1.main([*SMALL_LLVIP, "--data-root", str(root), "--output", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert "Held out for validation: 3 of the 6 pairs" in output
    evaluate.main(
        ["--checkpoint", str(tmp_path / "run" / "best.pt"), "--dataset", "llvip", "--data-root", str(root)]
        + ["--split", "train", "--device", "cpu", "--workers", "0", "--output", str(tmp_path / "metrics.json")]
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["detection"]["both"]["ap50"] is not None


def test_an_image_that_breaks_off_in_the_middle_of_training_is_named(tmp_path):
    """In a process of its own, which has to end although its loading process still lives."""
    root = two_cameras(tmp_path / "LLVIP")
    broken = root / "infrared" / "train" / "010001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    flags = [*SMALL_LLVIP, "--batch-size", "1", "--data-root", str(root), "--output", str(tmp_path / "run")]
    command = [sys.executable, "train_stage1.py", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "010001.jpg cannot be decoded" in ended.stderr and "Traceback" not in ended.stderr


def test_evaluation_and_prediction_of_a_run(stage1, tmp_path, capsys):
    common = ["--checkpoint", str(stage1 / "best.pt"), "--device", "cpu"]
    evaluate.main([*common, "--count", "3", "--workers", "0", "--modality", "infrared"])
    output = capsys.readouterr().out
    assert "\ninfrared" in output and "\nvisible" not in output
    root = two_cameras(tmp_path / "LLVIP", count=2)
    folders = {name: root / name / "train" for name in ("visible", "infrared")}
    for given in (("visible", "infrared"), ("visible",), ("infrared",)):
        output = tmp_path / "-".join(given)
        flags = [part for name in given for part in (f"--{name}", str(folders[name]))]
        predict.main([*common, *flags, "--output", str(output), "--min-score", "0"])
        found = json.loads((output / "detections.json").read_text())
        names = {path.name for path in output.iterdir()}
        assert len(found) == 2 and names == {"010000.png", "020000.png", "detections.json"}
    assert "--visible, --infrared or both" in refused(capsys, predict.main, *common, "--output", tmp_path / "x")
    missing = ["--visible", tmp_path / "none", "--output", tmp_path / "x"]
    assert "none is no folder of images" in refused(capsys, predict.main, *common, *missing)
    assert "was not written by torch.save" in refused(capsys, evaluate.main, "--checkpoint", stage1 / "args.json")


def test_a_checkpoint_starts_the_next_run(stage1, tmp_path, capsys):
    """The architecture comes from the checkpoint: no model flag is repeated."""
    root = two_cameras(tmp_path / "LLVIP")
    flags = ["--data-root", root, "--init-from", stage1 / "best.pt", "--batch-size", 2, "--workers", 0, "--epochs", 1]
    train_stage1.main([str(flag) for flag in [*flags, "--device", "cpu", "--output", tmp_path / "run"]])
    assert "tensors, the averaged ones\n" in capsys.readouterr().out
    kwargs = [load(folder)["model_kwargs"] for folder in (stage1, tmp_path / "run")]
    assert kwargs[0] == kwargs[1]
