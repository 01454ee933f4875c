"""Boxes from PASCAL VOC XML files, whose pixel coordinates start at 1 and include the last pixel."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from macl.errors import InputError


@dataclass(frozen=True)
class Annotation:
    """What an annotation file says of an image: its size, the objects kept, and how many were changed or left out."""

    size: tuple[int, int]  # width, height in pixels
    boxes: Tensor  # (N, 4) float32, x1 y1 x2 y2, clipped to the image
    labels: Tensor  # (N,) int64, 1 + position in classes
    ignore: Tensor  # (N,) bool, VOC's "difficult"
    clipped: int  # boxes that reached out of the image
    dropped: int  # boxes of no area within the image, left out
    other_classes: int  # objects of other classes, left out


def read_voc(path: str | Path, *, classes: Sequence[str]) -> Annotation:
    """Reads a VOC annotation; x1 - 1, y1 - 1, x2, y2 are the edges of the 1-based inclusive box.

    Raises InputError for a missing file, one that is not XML, and one that is not VOC (no <annotation>, <size>, <name>
    or <bndbox> where it belongs, or a coordinate that is not a finite number).
    """
    root, (width, height) = parse_voc(path)
    boxes, labels, ignore = [], [], []
    clipped = dropped = other_classes = 0
    for item in root.iterfind("object"):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{path} has an <object> without a <name>; expected a VOC annotation")
        if name not in classes:
            other_classes += 1
            continue
        x1, y1, x2, y2 = (number(item, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax"))
        box = (x1 - 1, y1 - 1, x2, y2)
        inside = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            dropped += 1
            continue
        clipped += inside != box
        boxes.append(inside)
        labels.append(1 + classes.index(name))
        ignore.append((item.findtext("difficult") or "0").strip() == "1")
    return Annotation(
        size=(width, height),
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
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a VOC annotation") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: an unknown encoding
        raise InputError(f"{path} is not XML ({error}); expected a VOC annotation") from error
    if root.tag != "annotation":
        raise InputError(f"{path} starts with <{root.tag}>; expected the <annotation> of a VOC file")
    width, height = (number(root, f"size/{side}", path) for side in ("width", "height"))
    if width < 1 or height < 1:
        raise InputError(f"{path} gives a size of {width:g} x {height:g}; expected the image's width and height")
    return root, (int(width), int(height))


def number(element: ElementTree.Element, name: str, path: str | Path) -> float:
    """The finite number of pixels that stands in a descendant of an element of a VOC file."""
    text = element.findtext(name)
    if text is None:
        raise InputError(f"{path} has no <{name.replace('/', '><')}> where VOC has one; expected a VOC annotation")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path} has {text.strip()!r} in <{name.replace('/', '><')}>; expected a number of pixels")
    return value
