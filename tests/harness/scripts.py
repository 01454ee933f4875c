"""Running the training scripts within the tests: tiny flags, what a run leaves, and refusals."""

import json
from pathlib import Path

import pytest
import torch

from trainkit.errors import one_sentence

ROOT = Path(__file__).resolve().parents[2]
STAGE_1 = (
    "--synthetic-train 32 --synthetic-val 4 --batch-size 4 --workers 0 --device cpu --fpn-channels 16 --head-width 16 "
    "--macl-dim 8 --macl-hidden 16 --min-size 64 --epochs 3 --lr 0.004 --warmup-steps 5 --clip-norm 3 --ema-decay 0.9"
).split()
STAGE_2 = (
    "--synthetic-train 16 --synthetic-val 2 --batch-size 4 --workers 0 --device cpu --epochs 3 --lr 0.002 "
    "--warmup-steps 4 --clip-norm 3 --ema-decay 0.9 --old-share 0.5 --dhn-size 40 --dhn-k 4 --freeze-stages 2,0 "
    "--keep-every 1"
).split()
FGCLIP = (
    "--vision-width 16 --vision-layers 2 --vision-heads 2 --text-width 16 --text-layers 2 --text-heads 2 --embed-dim 8 "
    "--image-size 32 --synthetic-train 32 --synthetic-val 12 --batch-size 4 --workers 0 --device cpu --epochs 3 "
    "--lr 0.004 --warmup-steps 5 --clip-norm 3 --ema-decay 0.9 --weight-decay 0.3 --validate-at 3"
).split()
VIDEO = (
    "--synthetic-train 32 --synthetic-val 8 --image-size 32 --batch-size 8 --workers 0 --device cpu --epochs 6 "
    "--tower-epochs 2 --validate-every 2 --lr 0.004 --warmup-steps 5 --clip-norm 3 --ema-decay 0.9 --hard-weight 0.1 "
    "--bank-size 16 --bank-classes 2 --bank-warmup-steps 3"
).split()


def run(script, flags: list, folder: Path, *more) -> Path:
    """Run a script's main; -> the run's folder."""
    script.main([str(flag) for flag in (*flags, "--output", folder, *more)])
    return folder


def metrics(folder: Path, kind: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of one kind, without what differs from run to run: speed and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gib")}
            for line in lines if line["kind"] == kind]  # fmt: skip


def load(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def refused(capsys, command, *flags) -> str:
    """The one sentence with which a command ends that has bad input; its exit status is 2."""
    with pytest.raises(SystemExit) as stop, one_sentence():
        command([str(flag) for flag in flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]
