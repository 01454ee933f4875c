"""What KAIST's annotations say of a frame: bbGt text, the two kinds of XML, and the json of the test frames.

Boxes are taken as published, x, y, width, height, with nothing added or subtracted: the benchmark's evaluation does the
same, and all four kinds give the same numbers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import trainkit.files as files
from macl.data.occurrence import label_of_people, refuse_absent
from macl.data.voc import clip, corners, flag, object_name, parse_voc
from trainkit.errors import InputError
from trainkit.files import MAX_ID, image_size, number, numbers, plain_text, read_text, shown

IGNORED_NAMES = ("people", "cyclist", "person?", "person?a", "__ignore__")
PLACES = ("campus", "road", "downtown")
NO_RULES = {"min_height": 0, "max_occlusion": 2}
BBGT = "% bbGt version=3"
BBGT_NUMBERS = 11  # after the name: x y w h occlusion, the visible part x y w h, ignore, angle
_FRAME = re.compile(r"set([0-9]{2})[/_]V([0-9]{3})[/_](?:(?:visible|lwir)[/_])?I([0-9]{5})")


class Frame(NamedTuple):
    """A moment of a video: both images and the annotation are found from these three numbers."""

    set: int
    video: int
    number: int

    @property
    def name(self) -> str:
        return f"set{self.set:02d}/V{self.video:03d}/I{self.number:05d}"

    @property
    def parts(self) -> dict[str, str]:
        """What fills {set}, {video} and {image} in a layout's paths."""
        return dict(zip(("set", "video", "image"), self.name.split("/"), strict=True))

    @property
    def scene(self) -> int:
        """Set and video as one number: 6001 for set06/V001."""
        return 1000 * self.set + self.video

    @property
    def daytime(self) -> bool:
        """Sets 00 to 02 and 06 to 08 were taken by day, 03 to 05 and 09 to 11 by night."""
        return self.set % 6 < 3

    @property
    def place(self) -> str:
        return PLACES[self.set % 3]


def parse_frame(name: str, place: str) -> Frame:
    """The frame of "set06/V000/I00019", or of "set06_V000_visible_I00019" or "..._lwir_...", which share one.

    Nothing else passes, so that no path built from it can leave a data set's root. `place` says where the name stands,
    for the InputError.
    """
    match = _FRAME.fullmatch(name)
    if match is None or int(match[1]) > 11:
        raise InputError(f"{place} names {shown(name)}; expected a frame of set00 to set11 such as set06/V000/I00019")
    return Frame(*map(int, match.groups()))


@dataclass(frozen=True)
class Labels:
    """Everything an annotation says of a frame, nothing left out."""

    place: str  # the file, and where in it, for messages
    size: tuple[int, int] | None  # width, height in pixels; None where it is not given
    names: list[str]
    boxes: list[tuple[float, float, float, float]]  # x, y, width, height
    occlusion: list[int]  # 0 none, 1 partial, 2 heavy; 0 where it is not given
    ignore: list[bool]  # as the annotation marks it, whatever the name


@dataclass(frozen=True)
class People:
    """What the rules make of a frame's labels, for a sample."""

    boxes: Tensor  # (N, 4) float32, x1 y1 x2 y2
    labels: Tensor  # (N,) int64
    ignore: Tensor  # (N,) bool
    occlusion: Tensor  # (N,) int64
    clipped: int
    dropped: int


def apply_rules(
    labels: Labels,
    *,
    classes: Sequence[str],
    min_height: float,
    max_occlusion: int,
    clip_to: tuple[int, int] | None,
) -> People:
    """Objects of `classes` are labelled 1, 2, ... in their order; IGNORED_NAMES are ignored under person's.

    Ignored are also boxes that the annotation marks so, of less than `min_height` pixels, and of more than
    `max_occlusion`. Boxes are clipped to `clip_to` (width, height), and left out when nothing remains. Raises
    InputError for any other name: the annotation is of another version than this one.
    """
    boxes, numbers, ignore, occlusion = [], [], [], []
    clipped = dropped = 0
    person = label_of_people(classes, "KAIST's annotations")
    limits = (math.inf, math.inf, -math.inf) if clip_to is None else (*clip_to, 0)
    for name, (x, y, w, h), hidden, ignored in zip(
        labels.names, labels.boxes, labels.occlusion, labels.ignore, strict=True
    ):
        if name not in classes and name not in IGNORED_NAMES:
            known = ", ".join(dict.fromkeys((*classes, *IGNORED_NAMES)))
            raise InputError(f"{labels.place} names an object {shown(name)}; expected KAIST's own: {known}")
        box = (x, y, x + w, y + h)
        inside, cut = clip(box, *limits)
        if inside is None:
            dropped += 1
            continue
        clipped += cut
        boxes.append(inside)
        numbers.append(1 + classes.index(name) if name in classes else person)
        ignore.append(ignored or name not in classes or h < min_height or hidden > max_occlusion)
        occlusion.append(hidden)
    return People(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(numbers, dtype=torch.int64),
        ignore=torch.tensor(ignore, dtype=torch.bool),
        occlusion=torch.tensor(occlusion, dtype=torch.int64),
        clipped=clipped,
        dropped=dropped,
    )


def as_truth(frame: Frame, labels: Labels, *, size: tuple[int, int], classes: Sequence[str], **rules) -> dict:
    """What `macl.metrics` compares a frame's detections with: boxes, labels, ignore, occlusion, daytime and, as results
    of `macl.evaluation` have it, size (H, W)."""
    people = apply_rules(labels, classes=classes, clip_to=None, **rules)
    return {
        "boxes": people.boxes,
        "labels": people.labels,
        "ignore": people.ignore,
        "occlusion": people.occlusion,
        "daytime": frame.daytime,
        "size": size[::-1],
    }


def read_ground_truth(path: str | Path, classes: Sequence[str] = ("person",)) -> tuple[list[dict], str]:
    """What KAIST.ground_truth gives, in the order of the image ids, from an annotation json alone; and its source."""
    if Path(path).suffix != ".json":
        raise InputError(f"{path} is not an annotation json; with a folder of annotations give the data's root as well")
    frames, version = read_json(path)
    truth = [as_truth(frame, labels, size=labels.size, classes=classes, **NO_RULES) for frame, labels in frames.items()]
    source = f"KAIST: {len(truth)} frames of {path} ({version})"
    objects = zip(frames.values(), truth, strict=True)
    objects = ((labels.names, set(one["labels"][~one["ignore"]].tolist())) for labels, one in objects)
    refuse_absent(classes, objects, source, every=False)
    return truth, source


def read_labels(folder: Path, form: str, frame: Frame) -> Labels:
    """One frame's labels from its .txt or .xml file; raises InputError for another version of either."""
    path = folder / form.format(**frame.parts)
    return _read_bbgt(path) if path.suffix == ".txt" else _read_xml(path)


def _read_bbgt(path: Path) -> Labels:
    first, *lines = read_text(path, "a bbGt annotation").split("\n")
    if first.strip() != BBGT:
        raise InputError(f"{path} starts with {shown(first.strip())}; expected {BBGT!r}, the version that is read")
    labels = Labels(place=str(path), size=None, names=[], boxes=[], occlusion=[], ignore=[])
    for count, line in enumerate(lines, 2):
        if line.strip():
            place = f"{path}, line {count} (a name and 11 numbers)"
            name, *values = line.split()
            values = numbers(values, place, BBGT_NUMBERS)
            _append(labels, name, values[:4], values[4], values[9], place)
    return labels


def _read_xml(path: Path) -> Labels:
    """The tree has <x> <y> <w> <h>, the processed layout <xmin> <ymin> <xmax> <ymax> of the same numbers."""
    root, size = parse_voc(path)
    labels = Labels(place=str(path), size=size, names=[], boxes=[], occlusion=[], ignore=[])
    for item in root.iterfind("object"):
        if item.find("bndbox/x") is not None:
            box = corners(item, path, "xywh")
        else:
            x1, y1, x2, y2 = corners(item, path)
            box = (x1, y1, x2 - x1, y2 - y1)
        hidden, difficult = item.findtext("occlusion", "0"), item.findtext("difficult", "")
        _append(labels, object_name(item, path), box, hidden, difficult, str(path))
    return labels


def read_json(path: str | Path) -> tuple[dict[Frame, Labels], str]:
    """The labels by frame, in the order of the image ids, and which version of them the file says it holds.

    The published json of the 2252 test frames: images of {"id", "im_name", "width", "height"}, annotations of
    {"image_id", "category_id", "bbox" [x, y, width, height], "occlusion", "ignore"}, and categories of {"id", "name"}.
    """
    data = files.read_json(path, "KAIST's annotations", dict)
    names = {
        _id(item, "id", place): plain_text(item.get("name"), f"{place}, name")
        for place, item in _items(data, "categories", path)
    }
    by_id = {}
    for place, item in _items(data, "images", path):
        frame = parse_frame(plain_text(item.get("im_name"), f"{place}, im_name"), place)
        size = image_size(item.get("width"), item.get("height"), place)
        by_id[_id(item, "id", place)] = (frame, Labels(f"{path}, {frame.name}", size, [], [], [], []))
    frames = {frame: labels for _, (frame, labels) in sorted(by_id.items())}
    if len(frames) < len(data["images"]):
        raise InputError(f"{path} holds an image id or an im_name twice; expected every frame once")
    if not frames:
        raise InputError(f"{path} holds no images; expected KAIST's annotations")
    annotations = _items(data, "annotations", path)
    ids = [_id(item, "id", place) for place, item in annotations if "id" in item]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path} holds an annotation id twice; expected every box once")
    for place, item in annotations:
        image, category = _id(item, "image_id", place), _id(item, "category_id", place)
        if image not in by_id or category not in names:
            raise InputError(f"{place}: no image has the id {image}, or no category the id {category}")
        box = numbers(item.get("bbox"), f"{place}, bbox (x, y, width, height)")
        _append(by_id[image][1], names[category], box, item.get("occlusion"), item.get("ignore"), place)
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


def _append(labels: Labels, name: str, box, occlusion, ignore, place: str) -> None:
    labels.names.append(name)
    labels.boxes.append(box)
    labels.occlusion.append(number(occlusion, f"{place}, occlusion (none, partial or heavy)", 0, 2, whole=True))
    labels.ignore.append(flag(ignore, f"{place}, ignore"))
