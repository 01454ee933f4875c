"""The console commands: `macl-predict` is `python -m macl.predict`, `macl-train-stage1` is `python train_stage1.py`."""

import importlib
import sys
from pathlib import Path

from trainkit.errors import one_sentence


def module_of(command: str) -> str:
    """macl-predict -> macl.predict, macl-train-stage1 -> train_stage1, fgclip-train -> train_fgclip."""
    package, _, rest = command.replace("-", "_").partition("_")
    if rest.startswith("train"):
        return f"train_{package}" if rest == "train" else rest
    return f"{package}.{rest}"


def main() -> None:
    """Run the module that this process is called after."""
    with one_sentence():
        importlib.import_module(module_of(Path(sys.argv[0]).stem)).main()
