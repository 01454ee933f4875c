"""What KAIST's annotations say of a frame: bbGt text, the two kinds of XML, and the json of the test frames.

Boxes are taken as published, x, y, width, height, with nothing added or subtracted: the benchmark's evaluation does the
same, and all four kinds give the same numbers.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from macl.data.voc import number, parse_voc
from macl.errors import InputError

IGNORED_NAMES = ("people", "cyclist", "person?", "person?a", "__ignore__")
PLACES = ("campus", "road", "downtown")
NO_RULES = {"min_height": 0, "max_occlusion": 2}
BBGT = "% bbGt version=3"
BBGT_FIELDS = 12  # name x y w h occlusion, the visible part x y w h, ignore, angle
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
        raise InputError(f"{place} names {name!r}; expected a frame of set00 to set11 such as set06/V000/I00019")
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
    """Objects of `classes` are labelled 1, 2, ... in their order; IGNORED_NAMES are ignored under label 1.

    Ignored are also boxes that the annotation marks so, of less than `min_height` pixels, and of more than
    `max_occlusion`. Boxes are clipped to `clip_to` (width, height), and left out when nothing remains. Raises
    InputError for any other name: the annotation is of another version than this one.
    """
    boxes, numbers, ignore, occlusion = [], [], [], []
    clipped = dropped = 0
    limits = (math.inf, math.inf) if clip_to is None else clip_to
    lowest = -math.inf if clip_to is None else 0
    for name, (x, y, w, h), hidden, ignored in zip(
        labels.names, labels.boxes, labels.occlusion, labels.ignore, strict=True
    ):
        if name not in classes and name not in IGNORED_NAMES:
            known = ", ".join(dict.fromkeys((*classes, *IGNORED_NAMES)))
            raise InputError(f"{labels.place} names an object {name!r}; expected KAIST's own: {known}")
        box = (x, y, x + w, y + h)
        inside = (max(x, lowest), max(y, lowest), min(x + w, limits[0]), min(y + h, limits[1]))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            dropped += 1
            continue
        clipped += inside != box
        boxes.append(inside)
        numbers.append(1 + classes.index(name) if name in classes else 1)
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
    of `macl.validation` have it, size (H, W)."""
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
    for labels in frames.values():
        if min(labels.size) < 1:
            raise InputError(f"{labels.place} has a size of {labels.size}; expected width and height in pixels")
    truth = [as_truth(frame, labels, size=labels.size, classes=classes, **NO_RULES) for frame, labels in frames.items()]
    return truth, f"KAIST: {len(truth)} frames of {path} ({version})"


def read_labels(path: Path) -> Labels:
    """One frame's labels from its .txt or .xml file; raises InputError for another version of either."""
    return _read_bbgt(path) if path.suffix == ".txt" else _read_xml(path)


def _read_bbgt(path: Path) -> Labels:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a bbGt annotation") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a bbGt annotation ({error})") from error
    first = lines[0].strip() if lines else ""
    if first != BBGT:
        raise InputError(f"{path} starts with {first[:40]!r}; expected {BBGT!r}, the version that is read")
    labels = Labels(place=str(path), size=None, names=[], boxes=[], occlusion=[], ignore=[])
    for count, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        name, *values = line.split()
        numbers = _finite(values)
        if len(line.split()) != BBGT_FIELDS or numbers is None:
            raise InputError(f"{path}, line {count}: expected a name and 11 numbers, got {line[:80]!r}")
        _append(labels, name, numbers[:4], numbers[4], numbers[9], f"{path}, line {count}")
    return labels


def _read_xml(path: Path) -> Labels:
    """The tree has <x> <y> <w> <h>, the processed layout <xmin> <ymin> <xmax> <ymax> of the same numbers."""
    root, size = parse_voc(path)
    labels = Labels(place=str(path), size=size, names=[], boxes=[], occlusion=[], ignore=[])
    for item in root.iterfind("object"):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{path} has an <object> without a <name>; expected a VOC annotation")
        if item.find("bndbox/x") is not None:
            box = [number(item, f"bndbox/{side}", path) for side in "xywh"]
        else:
            x1, y1, x2, y2 = (number(item, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax"))
            box = [x1, y1, x2 - x1, y2 - y1]
        occlusion = 0 if item.find("occlusion") is None else number(item, "occlusion", path)
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        _append(labels, name, box, occlusion, difficult, str(path))
    return labels


def read_json(path: str | Path) -> tuple[dict[Frame, Labels], str]:
    """The labels by frame, in the order of the image ids, and which version of them the file says it holds.

    The published json of the 2252 test frames: images of {"id", "im_name", "width", "height"}, annotations of
    {"image_id", "category_id", "bbox" [x, y, width, height], "occlusion", "ignore"}, and categories of {"id", "name"}.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected KAIST's annotations") from None
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor json
        raise InputError(f"{path} is not json ({error}); expected KAIST's annotations") from error
    place = "the file"
    try:
        names = {category["id"]: str(category["name"]) for category in data["categories"]}
        by_id = {}
        for place, image in enumerate(data["images"]):
            place = f"image {place}"
            labels = Labels(f"{path}, {image['im_name']}", (int(image["width"]), int(image["height"])), [], [], [], [])
            by_id[int(image["id"])] = (parse_frame(str(image["im_name"]), f"{path}, {place}"), labels)
        for place, item in enumerate(data["annotations"]):
            place = f"annotation {place}"
            labels = by_id[item["image_id"]][1]
            box = _finite(item["bbox"])
            if box is None or len(box) != 4:
                raise InputError(f"{path}, {place}: expected a bbox of four numbers x, y, width, height")
            occlusion = item["occlusion"]
            _append(labels, names[item["category_id"]], box, occlusion, item["ignore"], f"{path}, {place}")
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}, {place}: {type(error).__name__} {error}; expected the json of KAIST's test annotations with "
            "images, categories and annotations of bbox, occlusion and ignore"
        ) from error
    frames = {frame: labels for _, (frame, labels) in sorted(by_id.items())}
    if len(frames) < len(data["images"]):
        raise InputError(f"{path} holds an image id or an im_name twice; expected every frame once")
    if not frames:
        raise InputError(f"{path} holds no images; expected KAIST's annotations")
    improved = isinstance(data.get("info_improved"), dict)
    return frames, "improved annotations, as the file says" if improved else "the file does not say which revision"


def _append(labels: Labels, name: str, box, occlusion, ignore, place: str) -> None:
    if occlusion not in (0, 1, 2):
        raise InputError(f"{place}: occlusion is {occlusion!r}; expected 0 none, 1 partial or 2 heavy")
    if ignore not in (0, 1):
        raise InputError(f"{place}: ignore is {ignore!r}; expected 0 or 1")
    labels.names.append(name)
    labels.boxes.append(tuple(box))
    labels.occlusion.append(int(occlusion))
    labels.ignore.append(bool(ignore))


def _finite(values: Sequence) -> list[float] | None:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
