"""Flags that the scripts share, argument types with one-sentence errors, and the folder of a run."""

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
from pathlib import Path
from typing import IO

import torch

from trainkit import checkpoint, distributed
from trainkit.errors import InputError
from trainkit.files import shown, write_json
from trainkit.run_files import read_record

# On resume every other flag must say what it said at the start: half of a recipe comes out of the checkpoint (learning
# rate, weight decay, order of the data), so that a changed flag would be ignored or make a run that nobody can repeat.
_MAY_CHANGE = {"output", "resume", "init_from", "data_root", "device", "workers", "check"}
_MAY_CHANGE |= {"epochs", "max_steps", "save_every", "keep_every"}
_LOCK = ".lock"  # in a run's folder; kept by the process that writes there, and free again when that is gone
_locks: dict[Path, IO] = {}  # for good: POSIX drops the lock of a file when the process closes it anywhere


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there are some, and leaves the description's lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a script whose docstring is `description`. Flags cannot be shortened."""
    usage = "%(prog)s [flags], --help lists them"
    return argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )


def _number(kind: type, fits, expected: str):
    """An argument type: `kind(text)` where that `fits`, else an error that says what was `expected`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive_int = _number(int, lambda n: n >= 1, "a whole number of at least 1")
non_negative_int = _number(int, lambda n: n >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda x: 0 < x < float("inf"), "a number above 0")
non_negative_float = _number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
fraction = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def int_list(text: str) -> list[int]:
    """ "16,22" -> [16, 22], whole numbers of at least 0; an empty text is an empty list."""
    try:
        numbers = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them such as 16,22, got {text!r}")
    return numbers


def float_list(text: str) -> list[float]:
    """ "0.5,1" -> [0.5, 1.0], numbers above 0."""
    return [positive_float(part) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """ "512x640" -> (512, 640), height and width in pixels; "512" -> (512, 512)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels such as 512x640, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _group(parser: argparse.ArgumentParser, title: str, defaults: dict):
    """A function that adds flags to the group `title`, with a default taken out of `defaults` where it is there."""
    group = parser.add_argument_group(title)

    def add(flag: str, **options) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if name in defaults:
            options["default"] = defaults.pop(name)
        group.add_argument(flag, **options)

    return add


def _all_used(defaults: dict) -> None:
    if defaults:
        raise TypeError(f"no flag of this group is called {', '.join(defaults)}.")


def add_shared_flags(parser: argparse.ArgumentParser, script: str, **defaults) -> None:
    """Add the flags that every script has; `defaults` replaces some of their defaults (epochs=12, batch_size=4)."""
    add = _group(parser, "data", defaults)
    add("--data-root", metavar="PATH", help="the data set in its own layout; without it a synthetic set")
    add("--batch-size", type=positive_int, default=4, metavar="N", help="samples per step, of each process (GPU)")
    add("--workers", type=non_negative_int, default=2, metavar="N", help="loading processes of each process (GPU)")

    add = _group(parser, "run", defaults)
    add("--output", metavar="DIR", help=f"folder of the run; without it runs/{script}-TIME")
    add("--epochs", type=positive_int, default=12, metavar="N", help="passes over the training set")
    add("--max-steps", type=positive_int, metavar="N", help="stop after N optimizer steps; schedule as without it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="with cuda each process has one GPU")
    add("--amp", choices=("none", "fp16", "bf16"), default="none", help="number format of the forward pass (autocast)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of weights, data order and augmentation")
    add("--check", action="store_true", help="data statistics, one step, every module's gradient norm, then stop")

    add = _group(parser, "checkpoints", defaults)
    resume = "continue from a checkpoint or a run's folder; auto: from --output, else the newest run, else start fresh"
    add("--resume", metavar="PATH|auto", help=resume)
    add("--init-from", metavar="PATH", help="start with the weights of a checkpoint or of a published file")
    add("--save-every", type=positive_int, default=500, metavar="STEPS", help="write last.pt, also after each epoch")
    add("--keep-every", type=non_negative_int, default=0, metavar="EPOCHS", help="keep a checkpoint; 0 keeps none")
    _all_used(defaults)


def add_optimisation_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add the flags of optimizer, schedule, accumulation and EMA; `defaults` replaces some of their defaults."""
    add = _group(parser, "optimisation", defaults)
    add("--optimizer", choices=("sgd", "adamw"), default="adamw", help="kind of optimizer")
    add("--lr", type=positive_float, default=1e-3, metavar="X", help="learning rate after warm-up")
    add("--lr-base-batch", type=positive_int, metavar="N", help="--lr is for N samples a step (all GPUs); scale it")
    add("--momentum", type=fraction, default=0.9, metavar="X", help="SGD's momentum, AdamW's first beta")
    add("--weight-decay", type=non_negative_float, default=1e-4, metavar="X", help="none on norm layers and biases")
    kinds = ("multistep", "cosine", "one-cycle", "constant")
    add("--schedule", choices=kinds, default="cosine", help="course of the learning rate after warm-up")
    add("--milestones", type=int_list, default="8,11", metavar="EPOCHS", help="multistep: when --gamma multiplies")
    add("--gamma", type=fraction, default=0.1, metavar="X", help="multistep: factor at each of --milestones")
    add("--final-factor", type=fraction, default=0.0, metavar="X", help="cosine, one-cycle: last rate over --lr")
    add("--warmup-steps", type=non_negative_int, default=0, metavar="N", help="optimizer steps with a rising rate")
    add("--warmup-factor", type=fraction, default=0.001, metavar="X", help="first rate over --lr")
    add("--accumulate", type=positive_int, default=1, metavar="N", help="batches per optimizer step, of each process")
    add("--clip-norm", type=non_negative_float, default=0.0, metavar="X", help="largest gradient norm; 0 does not clip")
    add("--ema-decay", type=fraction, default=0.0, metavar="X", help="moving average of the weights; 0 keeps none")
    _all_used(defaults)


def peek_flags(arguments: list[str] | None, *flags: str) -> argparse.Namespace:
    """The text given for some flags, None where a flag is not given: what a script chooses its defaults by."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)[0]


def add_recipe_flags(parser: argparse.ArgumentParser, script: str, recipe: dict) -> None:
    """The flags of `add_shared_flags` and `add_optimisation_flags`, with the defaults that `recipe` has for them."""
    shared = {name: value for name, value in recipe.items() if name in ("epochs", "batch_size", "workers")}
    add_shared_flags(parser, script, **shared)
    add_optimisation_flags(parser, **{name: value for name, value in recipe.items() if name not in shared})


def prepare_run(
    args: argparse.Namespace, script: str, *, runs_root: str | Path = "runs", may_change: tuple[str, ...] = ()
) -> Path:
    """Resolve --resume and --output, make the run's folder, write its args.json, and return the folder, on every rank.

    Without --output the folder is that of the resumed checkpoint, else `runs_root/script-TIME`. `args.resume` becomes
    the path of the checkpoint file to read or None, `args.output` the folder. Raises InputError where the folder is in
    use by another run, and where a flag differs from the resumed run's that is neither a path, a length or a device nor
    in `may_change`. With --resume auto a run that ended before its first checkpoint starts again in its --output.
    """
    resumed = checkpoint.find_resume(args.resume, args.output, script, runs_root)
    again = args.resume == "auto"
    if again and resumed is None and distributed.is_main():
        where = args.output if args.output is not None else f"{runs_root}/{script}-*"
        print(f"--resume auto: no last.pt in {where}, starting fresh", flush=True)
    if args.init_from and args.resume and not again:
        raise InputError("--init-from: a resumed run has its weights from --resume; give one of the two.")
    distributed.run_on_main(lambda: _check_flags(args, script, resumed, _MAY_CHANGE | set(may_change)))
    folder = distributed.run_on_main(lambda: _open_folder(args.output, script, resumed, Path(runs_root), again))
    args.resume, args.output = str(resumed) if resumed else None, str(folder)
    distributed.run_on_main(lambda: _record(args, script, folder, resumed))
    return folder


def saved_flags(resume: str | Path) -> dict:
    """The flags that the run of a checkpoint, or in a folder, began with; none where it left no args.json.

    Raises InputError where that is damaged.
    """
    folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    return (read_record(folder) or {"arguments": {}})["arguments"]


def _open_folder(output: str | None, script: str, resumed: Path | None, runs_root: Path, again: bool) -> Path:
    """The folder of the run, made where it is new, and ours alone from here on."""
    if output is None and resumed is None:
        folder = _new_folder(runs_root, f"{script}-{time.strftime('%Y%m%d-%H%M%S')}")
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


def _new_folder(runs_root: Path, name: str) -> Path:
    """Makes runs_root/name, or name-2, name-3, ... where other runs that started in the same second took it."""
    runs_root.mkdir(parents=True, exist_ok=True)
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (runs_root / (name + suffix)).mkdir()
            return runs_root / (name + suffix)


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
