"""Checkpoints: written whole or not at all, read without running code, found again by --resume."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainkit import distributed
from trainkit.errors import InputError
from trainkit.files import read_torch, whole_file
from trainkit.run_files import read_record

RUNS = Path("runs")  # where runs without --output go
_PLAIN = (bool, int, float, str, type(None))


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors and plain Python only) from rank 0; the other ranks return at once.

    What interrupts the writing leaves the previous file as it was. Raises TypeError for anything that
    `torch.load(weights_only=True)` may refuse, naming its place in `state`, and InputError where the disk is full.
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
    elif type(value) not in (*_PLAIN, torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{place} is a {type(value).__name__}; a checkpoint holds tensors and plain Python only.")


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without running any code in it.

    Raises InputError where the file is missing, is no checkpoint, or is cut short.
    """
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
        raise InputError(error if str(error).startswith(str(path)) else f"{path}: {error}") from error
    except Exception as error:  # keys that are missing, values of another kind
        lines = str(error).splitlines() or [""]
        raise InputError(f"{path} cannot be resumed: {type(error).__name__}: {' '.join(lines[:2])}") from error


def rng_state() -> dict:
    """This process's random states, as tensors and plain Python: of `random`, numpy, torch, and every GPU.

    They differ between ranks; a checkpoint holds `distributed.gather_objects(rng_state())`, called on all ranks.
    """
    name, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, key.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` gave: each rank its own, `set_rng_state(checkpoint["rng"][rank()])`.

    The states of GPUs that this machine lacks are left out: a run continues on the CPU, only not with the same numbers.
    """
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)


def find_resume(value: str | None, output: str | Path | None, script: str) -> Path | None:
    """The checkpoint file that `--resume value` means, the same on every rank, or None to start fresh.

    A file is itself, a run's folder its last.pt. "auto" is the last.pt of `output` or, without `output`, of the run
    runs/SCRIPT-* that was written to last. Raises InputError where `value` is neither, or a run of another script.
    """
    return distributed.run_on_main(lambda: _find_resume(value, output, script))


def _find_resume(value: str | None, output: str | Path | None, script: str) -> Path | None:
    if value is None:
        return None
    if value != "auto":
        path = Path(value) / "last.pt" if Path(value).is_dir() else Path(value)
        if not path.is_file():
            raise InputError(f"--resume {value}: expected a checkpoint, or the folder of a run that has a last.pt.")
    else:
        places = [Path(output)] if output is not None else RUNS.glob(f"{script}-*")
        found = [place / "last.pt" for place in places if (place / "last.pt").is_file()]
        path = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    if path is not None:
        read_record(path.parent, script)
    return path
