"""Boxes from PASCAL VOC XML files, whose pixel coordinates start at 1 and include the last pixel."""

import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainkit.errors import InputError
from trainkit.files import image_size, number, reason, regular_file, shown

_FLAGS = {"true": 1, "yes": 1, "false": 0, "no": 0, "": 0}


@dataclass(frozen=True)
class Annotation:
    """What an annotation file says of an image: its size, the objects kept, and how many were changed or left out."""

    size: tuple[int, int]  # width, height in pixels
    names: list[str]  # of all objects, in the file's order
    boxes: Tensor  # (N, 4) float32, x1 y1 x2 y2, clipped to the image
    labels: Tensor  # (N,) int64, 1 + position in classes
    ignore: Tensor  # (N,) bool, VOC's "difficult"
    clipped: int  # boxes that reached out of the image
    dropped: int  # boxes of no area within the image, left out
    other_classes: int  # objects of other classes, left out


def read_voc(path: str | Path, *, classes: Sequence[str]) -> Annotation:
    """Reads a VOC annotation; x1 - 1, y1 - 1, x2, y2 are the edges of the 1-based inclusive box.

    Raises InputError for a missing file, one that is not XML, and one that is not VOC (no <annotation>, <size>, <name>
    or <bndbox> where it belongs, a size or coordinate that no picture has, a <difficult> that is neither yes nor no).
    """
    root, size = parse_voc(path)
    names, boxes, labels, ignore = [], [], [], []
    clipped = dropped = other_classes = 0
    for item in root.iterfind("object"):
        names.append(object_name(item, path))
        if names[-1] not in classes:
            other_classes += 1
            continue
        x1, y1, x2, y2 = corners(item, path)
        box = (x1 - 1, y1 - 1, x2, y2)
        inside, cut = clip(box, *size)
        if inside is None:
            dropped += 1
            continue
        clipped += cut
        boxes.append(inside)
        labels.append(1 + classes.index(names[-1]))
        ignore.append(flag(item.findtext("difficult", ""), f"{path}, <difficult>"))
    return Annotation(
        size=size,
        names=names,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        ignore=torch.tensor(ignore, dtype=torch.bool),
        clipped=clipped,
        dropped=dropped,
        other_classes=other_classes,
    )


def parse_voc(path: str | Path) -> tuple[ElementTree.Element, tuple[int, int]]:
    """The <annotation> of a VOC file, and the width and height in pixels that it gives. Raises what read_voc does."""
    try:
        root = ElementTree.parse(regular_file(path, "a VOC annotation")).getroot()
    except InputError:
        raise
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # LookupError: an unknown encoding
        raise InputError(f"{path} is not XML ({reason(error)}); expected a VOC annotation") from error
    if root.tag != "annotation":
        raise InputError(f"{path} starts with <{shown(root.tag)[1:-1]}>; expected the <annotation> of a VOC file")
    return root, image_size(root.findtext("size/width"), root.findtext("size/height"), f"{path}, <size>")


def object_name(item: ElementTree.Element, path: str | Path) -> str:
    """The <name> of an <object>, without space around it."""
    name = item.findtext("name", "").strip()
    if not name:
        raise InputError(f"{path} has an <object> without a <name>; expected a VOC annotation")
    return name


def corners(item: ElementTree.Element, path: str | Path, sides: Sequence[str] = ("xmin", "ymin", "xmax", "ymax")):
    """The four numbers in the <bndbox> of an <object>."""
    return tuple(number(item.findtext(f"bndbox/{side}"), f"{path}, <bndbox><{side}>") for side in sides)


def flag(value, place: str) -> bool:
    """Whether an annotation marks something: true, yes or a number from 1; not false, no, 0 or nothing."""
    word = str(value).strip().lower() if isinstance(value, str | bool) else value
    return number(_FLAGS.get(word, word) if isinstance(word, str) else word, place, 0, 9, whole=True) > 0


def clip(box: Sequence[float], width: float, height: float, least: float = 0) -> tuple[tuple | None, bool]:
    """What of a box x1, y1, x2, y2 lies within least..width and least..height, as float32 has it, and whether that is
    less than all; None where nothing remains."""
    inside = (max(box[0], least), max(box[1], least), min(box[2], width), min(box[3], height))
    x1, y1, x2, y2 = rounded = tuple(array("f", inside))
    return (rounded if x1 < x2 and y1 < y2 else None), inside != box
