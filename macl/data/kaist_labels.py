"""The labels of KAIST's frames: bbGt text, the two kinds of XML, and the json of the test frames.

Boxes are taken as published, nothing added or subtracted, as in the benchmark's evaluation.
"""

import re
from pathlib import Path
from typing import NamedTuple

import trainkit.files as files
from macl.data.annotation import Labels, Object
from macl.data.voc import corners, flag, parse_voc
from trainkit.errors import InputError
from trainkit.files import MAX_ID, image_size, number, numbers, plain_text, read_text, shown

IGNORED_NAMES = ("people", "cyclist", "person?", "person?a", "__ignore__")
BBGT = "% bbGt version=3"
_FRAME = re.compile(r"set([0-9]{2})[/_]V([0-9]{3})[/_](?:(?:visible|lwir)[/_])?I([0-9]{5})")


class Frame(NamedTuple):
    """The name of a frame: both images and the annotation are found by it."""

    set: int
    video: int
    number: int

    @property
    def name(self) -> str:
        return f"set{self.set:02d}/V{self.video:03d}/I{self.number:05d}"

    @property
    def scene(self) -> int:
        """Set and video as one number: 6001 for set06/V001."""
        return 1000 * self.set + self.video

    @property
    def daytime(self) -> bool:
        """Sets 00 to 02 and 06 to 08 were taken by day, 03 to 05 and 09 to 11 by night."""
        return self.set % 6 < 3

    def path(self, template: str) -> str:
        """A path in which {set}, {video} and {image} stand for the parts of the name."""
        return template.format(**dict(zip(("set", "video", "image"), self.name.split("/"), strict=True)))


def parse_frame(name: str, place: str) -> Frame:
    """The frame of "set06/V000/I00019", "set06_V000_visible_I00019" or "..._lwir_...". place: for messages.

    Nothing else passes, so that no path made of it can leave a data set's root.
    """
    match = _FRAME.fullmatch(name)
    if match is None or int(match[1]) > 11:
        raise InputError(f"{place} names {shown(name)}; expected a frame of set00 to set11 such as set06/V000/I00019")
    return Frame(*map(int, match.groups()))


def read_bbgt(path: Path) -> Labels:
    """One frame's labels: per line a name, x y w h, occlusion, x y w h of the visible part, ignore, angle."""
    first, *lines = read_text(path, "a bbGt annotation").split("\n")
    if first.strip() != BBGT:
        raise InputError(f"{path} starts with {shown(first.strip())}; expected {BBGT!r}, the version that is read")
    objects = []
    for count, line in enumerate(lines, 2):
        if line.strip():
            place = f"{path}, line {count} (a name and 11 numbers)"
            name, *values = line.split()
            values = numbers(values, place, 11)
            objects.append(_object(name, _edges(*values[:4]), values[4], values[9], place))
    return Labels(str(path), None, objects)


def read_xml(path: Path) -> Labels:
    """The tree has <x> <y> <w> <h>, the processed layout <xmin> <ymin> <xmax> <ymax> of the same numbers."""
    size, items = parse_voc(path)
    objects = []
    for name, item in items:
        tree = item.find("bndbox/x") is not None
        box = _edges(*corners(item, path, "xywh")) if tree else corners(item, path)
        occlusion, difficult = item.findtext("occlusion", "0"), item.findtext("difficult", "")
        objects.append(_object(name, box, occlusion, difficult, str(path)))
    return Labels(str(path), size, objects)


def read_json(path: str | Path) -> tuple[dict[Frame, Labels], str]:
    """The labels by frame, in the order of the image ids, and the version that the file says it holds.

    The published json of the 2252 test frames: images of {"id", "im_name", "width", "height"}, annotations of
    {"image_id", "category_id", "bbox" [x, y, width, height], "occlusion", "ignore"}, and categories of {"id", "name"}.
    """
    data = files.read_json(path, "the json of KAIST's annotations", dict)
    categories = _items(data, "categories", path)
    names = {_id(item, "id", place): plain_text(item.get("name"), f"{place}, name") for place, item in categories}
    by_id = {}
    for place, item in _items(data, "images", path):
        frame = parse_frame(plain_text(item.get("im_name"), f"{place}, im_name"), place)
        size = image_size(item.get("width"), item.get("height"), place)
        by_id[_id(item, "id", place)] = (frame, Labels(f"{path}, {frame.name}", size, []))
    frames = dict(by_id[image] for image in sorted(by_id))
    if not frames:
        raise InputError(f"{path} holds no images; expected the json of KAIST's annotations")
    annotations = _items(data, "annotations", path)
    ids = [_id(item, "id", place) for place, item in annotations if "id" in item]
    if len(frames) < len(data["images"]) or len(set(ids)) < len(ids):
        raise InputError(f"{path} holds an image id, an im_name or an annotation id twice; expected each once")
    for place, item in annotations:
        image, category = _id(item, "image_id", place), _id(item, "category_id", place)
        if image not in by_id or category not in names:
            raise InputError(f"{place}: no image has the id {image}, or no category the id {category}")
        box = _edges(*numbers(item.get("bbox"), f"{place}, bbox (x, y, width, height)"))
        _, labels = by_id[image]
        labels.objects.append(_object(names[category], box, item.get("occlusion"), item.get("ignore"), place))
    improved = isinstance(data.get("info_improved"), dict)
    return frames, "improved annotations, as the file says" if improved else "the file does not say which revision"


def _items(data: dict, key: str, path: str | Path) -> list[tuple[str, dict]]:
    """The objects under a key of the json, each with its place for a message."""
    items = data.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{path}: expected a list of objects under {key}, got {shown(items)}")
    return [(f"{path}, {key} {index}", item) for index, item in enumerate(items)]


def _id(item: dict, key: str, place: str) -> int:
    return number(item.get(key), f"{place}, {key}", -MAX_ID, MAX_ID, whole=True)


def _edges(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x, y, x + width, y + height


def _object(name: str, box: tuple, occlusion, ignore, place: str) -> Object:
    level = number(occlusion, f"{place}, occlusion (none, partial or heavy)", 0, 2, whole=True)
    return Object(name, box, flag(ignore, f"{place}, ignore"), level)
