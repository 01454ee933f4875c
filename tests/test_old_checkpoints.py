"""Checkpoints written by the first version, before the training scripts were rebuilt, still load.

fgclip.pt.gz is a tiny run's last.pt as it was. In stage2.pt.gz every tensor of the model holds one number, which
follows from the place of its name among all names in alphabetical order, so that the file is small.
"""

import gzip
import json
from pathlib import Path

import pytest
import torch
from scripts import STAGE_2, load, metrics, run

import fgclip
import macl
import train_fgclip
import train_stage2

OLD = Path(__file__).parent / "old_checkpoints"


@pytest.fixture
def unpacked(tmp_path):
    def unpack(name: str) -> Path:
        path = tmp_path / "last.pt"
        path.write_bytes(gzip.decompress((OLD / f"{name}.pt.gz").read_bytes()))
        return path

    return unpack


def test_a_detector_of_stage_2_loads_and_starts_a_run(unpacked, tmp_path):
    path = unpacked("stage2")
    state, names = macl.load_detector(path).state_dict(), sorted(load(tmp_path)["model"])
    dropped = ("alignment.", "macl.hard.key_projector.")  # which no detector has any more
    assert state.keys() == {name for name in names if not name.startswith(dropped)} != set(names)
    for i, name in enumerate(names):
        tensor = state.get(name, torch.tensor(0))
        assert not tensor.is_floating_point() or (tensor == (i % 50 + 1) / 64).all(), name
    few = ["--max-steps", 1, "--synthetic-train", 4, "--init-from", path]
    folder = run(train_stage2, [*STAGE_2, *few], tmp_path / "run")
    assert len(metrics(folder)) == 1


def test_a_model_of_fgclip_loads_and_its_run_goes_on(unpacked, tmp_path):
    model, tokenizer = fgclip.load_model(unpacked("fgclip"))
    state = load(tmp_path)
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())
    assert tokenizer.merges == state["merges"]
    flags = (
        "--synthetic-train 8 --synthetic-val 4 --batch-size 4 --workers 0 --device cpu --epochs 2 --bank-size 4 "
        "--bank-warmup-steps 1 --warmup-steps 0 --long-weight 0 --ema-decay 0 --vocab bytes --image-size 16"
    )
    arguments = vars(train_fgclip.parse_arguments(flags.split()))
    (tmp_path / "args.json").write_text(json.dumps({"script": "fgclip", "arguments": arguments}))
    train_fgclip.main(["--resume", str(tmp_path), "--device", "cpu"])
    assert [line["step"] for line in metrics(tmp_path)] == [3, 4]
