"""Sentences around class names (Radford et al. 2021, section 3.1.4)."""

from pathlib import Path

from trainkit.errors import InputError
from trainkit.files import read_lines, shown

TEMPLATES = (
    "a photo of a {}.", "a photo of one {}.", "a photo of several {}.", "a close view of a {}.",
    "a {} seen from far away.", "a small {} in a picture.", "a large {} in a picture.", "part of a {}.",
    "a blurred photo of a {}.", "a dark photo of a {}.", "a bright photo of a {}.",
    "a black and white photo of a {}.", "a drawing of a {}.", "a {} among other things.",
)  # fmt: skip


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a text file, one per line, each with one {} for the class name. Raises InputError."""
    lines = read_lines(path, "templates, one per line")
    for line in lines or [""]:
        if line.count("{}") != 1:
            raise InputError(f"{path}: expected lines such as {TEMPLATES[0]!r}, each with one {{}}, got {shown(line)}")
    return tuple(lines)
