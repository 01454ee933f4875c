"""Sentences around class names, and one embedding per class from them (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fgclip.embedding import Embedder
from fgclip.model import l2_normalize
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
    """Templates from a text file, one per line, each with one {} for the class name. Raises InputError."""
    lines = read_lines(path, f"templates such as {PHOTO!r}, one per line")
    for line in lines or [""]:
        if line.count("{}") != 1:
            raise InputError(f"{path}: expected lines such as {PHOTO!r}, each with one {{}}, got {shown(line)}")
    return tuple(lines)


def class_prompts(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every class in every template, class after class; underscores in a name are read as spaces."""
    return [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]


def class_embeddings(embedder: Embedder, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """A unit vector per class (C, D), the mean of the unit vectors of its prompts."""
    return l2_normalize(embedder.texts(class_prompts(names, templates)).unflatten(0, (len(names), -1)).mean(dim=1))
