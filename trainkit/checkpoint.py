"""Checkpoints: written whole or not at all, read without running code."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainkit import distributed
from trainkit.errors import InputError
from trainkit.files import read_torch, whole_file

_PLAIN = (bool, int, float, str, type(None), torch.Tensor, torch.nn.Parameter)


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors and plain Python only) from rank 0; the other ranks return at once.

    An interruption leaves the previous file as it was. Raises TypeError for what `torch.load(weights_only=True)` may
    refuse, and InputError where the disk is full.
    """
    if not distributed.is_main():
        return
    check_plain(state)
    with whole_file(path) as file:
        torch.save(state, file)


def check_plain(value, place: str = "state") -> None:
    """Raise TypeError unless `value` is tensors, numbers, strings, None, and dicts, lists and tuples of these."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{place} has the key {key!r}; a checkpoint has str and int keys only.")
            check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{place}[{i}]")
    elif type(value) not in _PLAIN:
        raise TypeError(f"{place} is a {type(value).__name__}; a checkpoint holds tensors and plain Python only.")


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Raises InputError where the file is missing, no checkpoint, or cut short."""
    state = read_torch(path, "a checkpoint")
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a checkpoint; expected a dictionary, found a {type(state).__name__}")
    return state


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is put back becomes one InputError that begins with its path."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # keys that are missing, values of another kind
        text = " ".join(str(error).splitlines()[:2])
        raise InputError(f"{path} cannot be resumed: {type(error).__name__}: {text}") from error


def rng_state() -> dict:
    """This process's random states of `random`, numpy, torch, and every GPU, as tensors and plain Python."""
    name, key, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numbers = [name, key.tolist(), *rest]
    return dict(python=random.getstate(), numpy=numbers, torch=torch.get_rng_state(), cuda=cuda)


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` gave; states of GPUs that this machine lacks are left out."""
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)
