"""The folder of a run: named, locked, with its args.json, and found again by --resume."""

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

from trainkit import distributed
from trainkit.errors import InputError
from trainkit.files import read_json, shown, write_json

RUNS = Path("runs")  # where runs without --output go
# Half of a recipe comes out of the checkpoint (learning rate, weight decay, data order): any other flag, changed on
# resume, would be ignored or make a run that nobody can repeat.
MAY_CHANGE = ("output", "resume", "init_from", "data_root", "device", "workers", "check")
MAY_CHANGE += ("epochs", "max_steps", "save_every", "keep_every", "log_every", "validate_every", "best_by")
_LOCK = ".lock"  # held by the process that writes into the folder, and free again when that is gone
_locks: dict[Path, IO] = {}  # POSIX drops the lock of a file when the process closes it anywhere


def prepare_run(args: argparse.Namespace, script: str, *, may_change: Iterable[str] = ()) -> Path:
    """Resolve --resume and --output, make the run's folder, write its args.json, and return the folder, on every rank.

    `args.resume` becomes the path of the checkpoint to read, or None; `args.output` the folder. Without --output it is
    the folder of the resumed checkpoint, else runs/SCRIPT-TIME. With --resume auto, a run that ended before its first
    checkpoint starts again in its --output.

    Raises InputError where another run uses the folder, and where a flag that is neither in `MAY_CHANGE` nor in
    `may_change` differs from the resumed run's.
    """
    allowed = {*MAY_CHANGE, *may_change}
    args.resume, args.output = distributed.run_on_main(lambda: _prepare(args, script, allowed))
    return Path(args.output)


def _prepare(args: argparse.Namespace, script: str, may_change: set[str]) -> tuple[str | None, str]:
    again = args.resume == "auto"
    if args.init_from and args.resume and not again:
        raise InputError("--init-from: a resumed run has its weights from --resume; give one of the two.")
    resumed = _find_resume(args.resume, args.output, script)
    if again and resumed is None:
        where = args.output if args.output is not None else f"{RUNS}/{script}-*"
        print(f"--resume auto: no last.pt in {where}, starting fresh", flush=True)
    arguments = json.loads(json.dumps(vars(args), default=str))
    record = read_record(resumed.parent) if resumed else None
    for name, value in (record["arguments"] if record else {}).items():
        if name in arguments and arguments[name] != value and name not in may_change:
            raise InputError(
                f"--{name.replace('_', '-')} is {shown(arguments[name])}, but the run in {resumed.parent} began "
                f"with {shown(value)}; resume with the same, or begin a new run with --init-from."
            )
    folder = _open_folder(args.output, script, resumed, again)
    resume, output = str(resumed) if resumed else None, str(folder)
    start = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": [script, *sys.argv[1:]], "commit": _commit()}
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    start |= {"world_size": distributed.world_size(), "device": device}
    start |= {"versions": {"python": platform.python_version(), **_versions()}}
    if record is None:
        arguments |= {"resume": resume, "output": output}
        record = {"script": script, "arguments": arguments, **start, "resumed": []}
    else:
        record["resumed"].append({"from": resume, **start})
    write_json(folder / "args.json", record, indent=2)
    return resume, output


def _open_folder(output: str | None, script: str, resumed: Path | None, again: bool) -> Path:
    """The folder of the run, made where it is new, and ours alone from here on."""
    if output is None and resumed is None:
        folder = _new_folder(f"{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    else:
        folder = Path(output) if output is not None else resumed.parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: expected a folder, found a file.")
    ours = folder.resolve() == resumed.parent.resolve() if resumed else again and read_record(folder, script)
    if folder.is_dir() and not ours and any(path.name != _LOCK for path in folder.iterdir()):
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


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}  # names the CUDA it is built for, as the package does not
    for name in ("macl-fgclip", "torchvision", "triton", "numpy", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # triton is not everywhere
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit() -> str | None:
    """The commit that this code is at, with "-dirty" where files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(FileNotFoundError):  # git itself is not installed
        if (root / ".git").exists():
            return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    return None


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
        files = [place / "last.pt" for place in places if (place / "last.pt").is_file()]
        path = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    if path is not None:
        read_record(path.parent, script)
    return path


def file_in_run(folder: Path, name: str) -> Path | None:
    """The file of that name where there is one. Raises InputError where a link leads out of the folder."""
    path = folder / name
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link that leads out of the run's folder.")
    return path


def read_record(folder: Path, script: str | None = None) -> dict | None:
    """args.json of a run's folder, with "arguments" and "resumed"; None where there is none.

    Raises InputError where it is damaged or a link that leads out, or where the run is not one of `script`.
    """
    path = file_in_run(folder, "args.json")
    if path is None:
        return None
    record = read_json(path, "what a run began with", dict)
    for key, kind in {"arguments": dict, "resumed": list}.items():
        if not isinstance(record.setdefault(key, kind()), kind):
            raise InputError(f"{path}: {key}: expected {kind.__name__}, got {shown(record[key])}")
    if script is not None and record.get("script") != script:
        raise InputError(f"{path}: the run was begun by {shown(record.get('script'))}; {script} cannot go on with it")
    return record
