import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from trainkit import distributed
from trainkit.checkpoint import load, save
from trainkit.errors import InputError
from trainkit.loader import make_loader
from trainkit.signals import Signals


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"args": {"output": Path("runs")}}, r"state\['args'\]\['output'\] is a PosixPath"),
        ({"ap": [0.5, np.float64(0.5)]}, r"state\['ap'\]\[1\] is a float64"),
        ({"sizes": torch.zeros(2).shape}, "Size"),
        ({"ids": {(1, 2): 3}}, r"the key \(1, 2\)"),
    ],
)
def test_only_tensors_and_plain_python_are_written(tmp_path, value, place):
    with pytest.raises(TypeError, match=place):
        save(tmp_path / "last.pt", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, InputError)])
def test_an_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error, seen):
    save(tmp_path / "last.pt", {"step": 1})

    def half_written(state, file):
        file.write(b"PK\x03\x04 half")
        raise error

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(seen, match=None if seen is error else "last.pt cannot be written"):
        save(tmp_path / "last.pt", {"step": 2})
    assert load(tmp_path / "last.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_files_that_are_no_checkpoint_get_one_sentence(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(InputError, match="last.pt does not exist"):
        load(path)
    for content in (b"", b"not a checkpoint", pickle.dumps({"step": 1})):
        path.write_bytes(content)
        with pytest.raises(InputError, match="last.pt was not written by torch.save"):
            load(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="expected a dictionary, found a list"):
        load(path)
    torch.save({"path": tmp_path}, path)
    with pytest.raises(InputError, match="holds more than tensors"):
        load(path)


@pytest.mark.parametrize(
    ("number", "second", "status"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, SystemExit, 143)]
)
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(number, second, status):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert not signals.stop_requested()
        signal.raise_signal(number)
        assert signals.stop_requested() and signals.exit_status == status
        with pytest.raises(second):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


class Killed(Dataset):
    """Sends its own process the signals that a terminal sends to the whole group."""

    def __getitem__(self, key: tuple[int, int]) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return key[1]


def test_loader_workers_outlive_the_signal_so_that_the_step_can_end():
    loader = make_loader(Killed(), [[(0, i)] for i in range(3)], torch.tensor, workers=1)
    with Signals() as signals:
        assert [batch.tolist() for batch in loader] == [[0], [1], [2]]
    assert not signals.stop_requested()


def test_ranks_other_than_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    save(tmp_path / "last.pt", {"step": 1})
    assert list(tmp_path.iterdir()) == []
