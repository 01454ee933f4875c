"""Sentences around class names, and one embedding a class from them (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fgclip.model import unit
from trainkit.errors import InputError
from trainkit.files import read_lines, shown

PHOTO = "a photo of a {}."
TEMPLATES = (
    PHOTO,
    "a photo of one {}.",
    "a photo of several {}.",
    "a close view of a {}.",
    "a {} seen from far away.",
    "a small {} in a picture.",
    "a large {} in a picture.",
    "part of a {}.",
    "a blurred photo of a {}.",
    "a dark photo of a {}.",
    "a bright photo of a {}.",
    "a black and white photo of a {}.",
    "a drawing of a {}.",
    "a {} among other things.",
)


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a text file, one a line, each with one {} for the class name. Raises InputError."""
    lines = read_lines(path, f"templates such as {PHOTO!r}, one a line")
    for line in lines:
        if line.count("{}") != 1:
            raise InputError(f"{path}: expected one {{}} in each line, got {shown(line)}")
    if not lines:
        raise InputError(f"{path} holds no template; expected lines such as {PHOTO!r}")
    return tuple(lines)


def class_prompts(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every class in every template, class after class; underscores in a name are read as spaces."""
    return [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]


def class_embeddings(text: Tensor, classes: int) -> Tensor:
    """Features (classes * T, D) of `class_prompts` to a unit vector a class (classes, D), the mean of unit vectors."""
    return unit(unit(text).unflatten(0, (classes, -1)).mean(dim=1))
