"""Boxes from PASCAL VOC XML files."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from macl.data.annotation import Annotation, Labels, Object, annotate
from trainkit.errors import InputError
from trainkit.files import image_size, number, reason, regular_file, shown

_FLAGS = {"true": 1, "yes": 1, "false": 0, "no": 0, "": 0}


def read_voc(path: str | Path, *, classes: Sequence[str]) -> Annotation:
    """The objects of `classes`; those marked "difficult" are ignored. Raises InputError.

    VOC's pixels start at 1 and its boxes include the last one: edges are x1 - 1, y1 - 1, x2, y2.
    """
    size, items = parse_voc(path)
    objects = []
    for name, item in items:
        if name in classes:
            x1, y1, x2, y2 = corners(item, path)
            difficult = flag(item.findtext("difficult", ""), f"{path}, <difficult>")
            objects.append(Object(name, (x1 - 1, y1 - 1, x2, y2), difficult))
        else:
            objects.append(Object(name))
    return annotate(Labels(str(path), size, objects), classes)


def parse_voc(path: str | Path) -> tuple[tuple[int, int], list[tuple[str, ElementTree.Element]]]:
    """-> width and height in pixels, and the name and element of every <object>. Raises InputError."""
    path = regular_file(path, "a VOC annotation")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # LookupError: an unknown encoding
        raise InputError(f"{path} is not XML ({reason(error)}); expected a VOC annotation") from error
    if root.tag != "annotation":
        raise InputError(f"{path} starts with <{shown(root.tag)[1:-1]}>; expected the <annotation> of a VOC file")
    size = image_size(root.findtext("size/width"), root.findtext("size/height"), f"{path}, <size>")
    items = [(item.findtext("name", "").strip(), item) for item in root.iterfind("object")]
    if not all(name for name, _ in items):
        raise InputError(f"{path} has an <object> without a <name>; expected a VOC annotation")
    return size, items


def corners(item: ElementTree.Element, path: str | Path, sides: Sequence[str] = ("xmin", "ymin", "xmax", "ymax")):
    """The four numbers in the <bndbox> of an <object>."""
    return tuple(number(item.findtext(f"bndbox/{side}"), f"{path}, <bndbox><{side}>") for side in sides)


def flag(value, place: str) -> bool:
    """Whether an annotation marks something: true, yes or 1 to 9, rather than false, no, 0 or nothing."""
    word = str(value).strip().lower()
    return number(_FLAGS.get(word, word), place, 0, 9, whole=True) > 0
