"""The folder of a run: named, locked, and with its args.json."""

import argparse
import contextlib
import fcntl
import importlib.metadata
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch

from trainkit import checkpoint, distributed
from trainkit.checkpoint import RUNS
from trainkit.errors import InputError
from trainkit.files import shown, write_json
from trainkit.run_files import read_record

# Half of a recipe comes out of the checkpoint (learning rate, weight decay, data order): any other flag, changed on
# resume, would be ignored or make a run that nobody can repeat.
MAY_CHANGE = ("output", "resume", "init_from", "data_root", "device", "workers", "check")
MAY_CHANGE += ("epochs", "max_steps", "save_every", "keep_every", "log_every", "validate_every", "best_by")
_LOCK = ".lock"  # held by the process that writes into the folder, and free again when that is gone
_locks: dict[Path, IO] = {}  # POSIX drops the lock of a file when the process closes it anywhere


def prepare_run(args: argparse.Namespace, script: str, *, may_change: Iterable[str] = ()) -> Path:
    """Resolve --resume and --output, make the run's folder, write its args.json, and return the folder, on every rank.

    Without --output the folder is that of the resumed checkpoint, else runs/SCRIPT-TIME. `args.resume` becomes the path
    of the checkpoint to read or None, `args.output` the folder. With --resume auto a run that ended before its first
    checkpoint starts again in its --output.

    Raises InputError where another run uses the folder, and where a flag that is neither in `MAY_CHANGE` nor in
    `may_change` differs from the resumed run's.
    """
    resumed = checkpoint.find_resume(args.resume, args.output, script)
    again = args.resume == "auto"
    if again and resumed is None and distributed.is_main():
        where = args.output if args.output is not None else f"{RUNS}/{script}-*"
        print(f"--resume auto: no last.pt in {where}, starting fresh", flush=True)
    if args.init_from and args.resume and not again:
        raise InputError("--init-from: a resumed run has its weights from --resume; give one of the two.")
    distributed.run_on_main(lambda: _check_flags(args, script, resumed, {*MAY_CHANGE, *may_change}))
    folder = distributed.run_on_main(lambda: _open_folder(args.output, script, resumed, again))
    args.resume, args.output = str(resumed) if resumed else None, str(folder)
    distributed.run_on_main(lambda: _record(args, script, folder, resumed))
    return folder


def _open_folder(output: str | None, script: str, resumed: Path | None, again: bool) -> Path:
    """The folder of the run, made where it is new, and ours alone from here on."""
    if output is None and resumed is None:
        folder = _new_folder(f"{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    else:
        folder = Path(output) if output is not None else resumed.parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: expected a folder, found a file.")
    own = folder.resolve() == resumed.parent.resolve() if resumed else again and read_record(folder, script) is not None
    if folder.is_dir() and not own and any(path.name != _LOCK for path in folder.iterdir()):
        raise InputError(f"--output {folder}: already holds files; choose another folder, or continue with --resume.")
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    return folder


def _new_folder(name: str) -> Path:
    """Makes runs/name, or name-2, name-3, ... where other runs that started in the same second took it."""
    RUNS.mkdir(parents=True, exist_ok=True)
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (RUNS / (name + suffix)).mkdir()
            return RUNS / (name + suffix)


def _lock(folder: Path) -> None:
    """Refuse a folder into which another process writes; this process keeps it as long as it lives.

    A POSIX lock: loading processes do not inherit it, and none is left behind by a run that was killed.
    """
    place = folder.resolve()
    if place not in _locks:
        _locks[place] = (folder / _LOCK).open("a")
    try:
        fcntl.lockf(_locks[place], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"--output {folder}: another run is writing there; wait for its end or stop it.") from error
    except OSError as error:  # some file systems of clusters have no locks
        print(f"{folder} cannot be locked ({error.strerror}): see to it that no second run writes there", flush=True)


def _check_flags(args: argparse.Namespace, script: str, resumed: Path | None, may_change: set[str]) -> None:
    """Refuse a flag that differs from the resumed run's, before a folder is made."""
    arguments, record = _plain(args), read_record(resumed.parent, script) if resumed else None
    for name, value in (record["arguments"] if record else {}).items():
        if name in arguments and arguments[name] != value and name not in may_change:
            raise InputError(
                f"--{name.replace('_', '-')} is {shown(arguments[name])}, but the run in {resumed.parent} began "
                f"with {shown(value)}; resume with the same, or begin a new run with --init-from."
            )


def _plain(args: argparse.Namespace) -> dict:
    return json.loads(json.dumps(vars(args), default=str))


def _record(args: argparse.Namespace, script: str, folder: Path, resumed: Path | None) -> None:
    """Write args.json: how the run was started, and after that how it was resumed."""
    start = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [script, *sys.argv[1:]],
        "commit": _commit(),
        "world_size": distributed.world_size(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    record = read_record(resumed.parent, script) if resumed else None
    if record is None:
        record = {"script": script, "arguments": _plain(args), **start, "resumed": []}
    else:
        record["resumed"].append({"from": str(resumed), **start})
    write_json(folder / "args.json", record, indent=2)


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}  # names the CUDA it is built for, as the package does not
    for name in ("macl-fgclip", "torchvision", "triton", "numpy", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # triton is not everywhere
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit() -> str | None:
    """The commit that this code is at, with "-dirty" where files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True)
    except FileNotFoundError:  # git itself is not installed
        return None
    return answer.stdout.strip() or None
