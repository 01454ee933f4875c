"""Command-line flags that the scripts share, and argument types with one-sentence errors."""

import argparse
import contextlib
import math
import os
from pathlib import Path

import torch

from trainkit.errors import InputError
from trainkit.files import shown
from trainkit.run_folder import MAY_CHANGE, find_resume, read_record

WORKERS = min(4, len(os.sched_getaffinity(0)))  # of one process; no more than there are cores
OF_THIS_START = ("resume", "output", "init_from", "max_steps", "check", "device")  # never taken from the resumed run


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there are some, and leaves the description's lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a script whose docstring is `description`. Flags cannot be shortened."""
    usage = "%(prog)s [flags], --help lists them"
    return argparse.ArgumentParser(usage=usage, description=description, formatter_class=HelpFormatter,
                                   allow_abbrev=False)  # fmt: skip


def _number(kind: type, fits, expected: str):
    """An argument type: `kind(text)` where that `fits`, else an error that says what was `expected`."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


positive_int = _number(int, lambda n: n >= 1, "a whole number of at least 1")
non_negative_int = _number(int, lambda n: n >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda x: 0 < x < float("inf"), "a number above 0")
non_negative_float = _number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
finite_float = _number(float, math.isfinite, "a number")
fraction = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
below_one = _number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")


def int_list(text: str) -> list[int]:
    """ "16,22" -> [16, 22], whole numbers of at least 0; an empty text is an empty list."""
    return [non_negative_int(part) for part in text.split(",")] if text.strip() else []


def float_list(text: str) -> list[float]:
    """ "0.5,1" -> [0.5, 1.0], numbers above 0."""
    return [positive_float(part) for part in text.split(",")]


def name_and_factor(text: str) -> str:
    """ "backbone=0.1", checked."""
    name, _, factor = text.partition("=")
    if not name or not factor:
        raise argparse.ArgumentTypeError(f"expected NAME=FACTOR such as backbone=0.1, got {text!r}")
    positive_float(factor)
    return text


# fmt: off
def add_recipe_flags(parser: argparse.ArgumentParser, script: str, may_change: tuple[str, ...] = ()) -> None:
    """Add the flags that every script has. may_change: what else `script` lets change on resume, for the help."""
    add = parser.add_argument_group("data").add_argument
    add("--data-root", metavar="PATH", help="the data set in its own layout; without it a synthetic set")
    add("--batch-size", type=positive_int, default=4, metavar="N", help="samples per step and process (GPU)")
    add("--workers", type=non_negative_int, default=WORKERS, metavar="N", help="loading processes per process (GPU)")

    add = parser.add_argument_group("run").add_argument
    add("--output", metavar="DIR", help=f"folder of the run; without it runs/{script}-TIME")
    add("--epochs", type=positive_int, default=12, metavar="N", help="passes over the training set")
    add("--max-steps", type=positive_int, metavar="N", help="stop after N optimizer steps; the schedule stays")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="with cuda each process has one GPU")
    add("--amp", choices=("none", "fp16", "bf16"), default="none", help="number format of the forward pass (autocast)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="seed of weights, data order and augmentation")
    add("--check", action="store_true", help="data statistics, one step, every module's gradient norm, then stop")
    add("--validate-every", type=positive_int, default=1, metavar="EPOCHS", help="and after the last epoch")
    add("--log-every", type=positive_int, default=20, metavar="STEPS", help="steps between printed lines")

    add = parser.add_argument_group("checkpoints").add_argument
    free = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in {*MAY_CHANGE, *may_change} - {"resume", "check"}))
    add("--resume", metavar="PATH|auto", help="continue from a checkpoint or a run's folder; auto: from --output, else "
        f"from the newest run, else start fresh. The flags are those of the run; only these may change: {free}")
    add("--init-from", metavar="PATH", help="start with the weights of a checkpoint or of a published file")
    add("--save-every", type=positive_int, default=500, metavar="STEPS", help="write last.pt, also after each epoch")
    add("--keep-every", type=non_negative_int, default=0, metavar="EPOCHS", help="write epoch-N.pt; 0 keeps none")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=("sgd", "adamw"), default="adamw", help="kind of optimizer")
    add("--lr", type=positive_float, default=1e-3, metavar="X", help="learning rate after warm-up")
    add("--lr-base-batch", type=positive_int, metavar="N", help="--lr is per N samples (all GPUs), and is scaled")
    add("--lr-scale", type=name_and_factor, nargs="*", default=[], metavar="NAME=X",
        help="factor on --lr by beginning of a parameter's name, such as backbone=0.1 neck=0.5")
    add("--momentum", type=below_one, default=0.9, metavar="X", help="SGD's momentum, AdamW's first beta")
    add("--weight-decay", type=non_negative_float, default=1e-4, metavar="X", help="none on norm layers and biases")
    kinds = ("multistep", "cosine", "constant")
    add("--schedule", choices=kinds, default="cosine", help="course of the learning rate after warm-up")
    add("--milestones", type=int_list, default="8,11", metavar="EPOCHS", help="multistep: when --gamma multiplies")
    add("--gamma", type=fraction, default=0.1, metavar="X", help="multistep: factor at each of --milestones")
    add("--final-factor", type=fraction, default=0.0, metavar="X", help="cosine: last rate / --lr")
    add("--warmup-steps", type=non_negative_int, default=0, metavar="N", help="optimizer steps of warm-up")
    add("--warmup-factor", type=fraction, default=0.001, metavar="X", help="first rate / --lr")
    add("--accumulate", type=positive_int, default=1, metavar="N", help="batches per optimizer step and process")
    add("--clip-norm", type=non_negative_float, default=0.0, metavar="X", help="largest gradient norm; 0 does not clip")
    add("--ema-decay", type=below_one, default=0.0, metavar="X", help="moving average of the weights; 0 keeps none")
# fmt: on


def peek_flags(arguments: list[str] | None, *flags: str) -> argparse.Namespace:
    """The text given for some flags, None where a flag is not given. Scripts choose their defaults by it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)[0]


def check_needed(args: argparse.Namespace, **needed: tuple[str, ...]) -> None:
    """Refuse a flag that is given without any of those it needs: `image_root=("annotations", "data_root")`."""
    for name, others in needed.items():
        if getattr(args, name) and not any(getattr(args, other) for other in others):
            flags = [f"--{each.replace('_', '-')}" for each in (name, *others)]
            raise InputError(f"{flags[0]} needs {' or '.join(flags[1:])}")


def parse_with_resume(
    parser: argparse.ArgumentParser, arguments: list[str] | None, script: str, defaults: dict
) -> argparse.Namespace:
    """Parse the flags. Their defaults are those of the run that --resume names, else `defaults`, else the parser's."""
    given = peek_flags(arguments, "--resume", "--output")
    path = find_resume(given.resume, given.output, script)
    saved = {} if path is None else saved_flags(path.parent, parser)
    parser.set_defaults(**defaults | saved)
    return parser.parse_args(arguments)


def saved_flags(folder: Path, parser: argparse.ArgumentParser) -> dict:
    """The flags that the run in `folder` began with, except `OF_THIS_START`; {} where it left no args.json.

    Raises InputError where a value does not fit its flag; None fits where it is the parser's default.
    """
    saved = (read_record(folder) or {"arguments": {}})["arguments"]
    for action in parser._actions:
        if action.dest in saved and not _fits(action, value := saved[action.dest]):
            raise InputError(f"{folder / 'args.json'}: {action.dest}: {shown(value)} is no value of the flag")
    return {name: value for name, value in saved.items() if name not in OF_THIS_START}


def _fits(action: argparse.Action, value) -> bool:
    """Whether the flag, given as text or not given, could have this value."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    items = value if isinstance(value, list) and action.nargs else [value]
    texts = [",".join(map(str, item)) if isinstance(item, list) else str(item) for item in items]
    try:
        parsed = [(action.type or str)(text) for text in texts]
    except (argparse.ArgumentTypeError, ValueError):
        return False
    fits = parsed == items and (not isinstance(action.nargs, int) or len(items) == action.nargs)
    return fits and all(not action.choices or item in action.choices for item in parsed)
