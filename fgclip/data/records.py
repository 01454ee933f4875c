"""Annotation files to one record per image: FineHARD, COCO captions with instances, and FG-OVD."""

import os
import re
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
from PIL import Image

import trainkit.files as files
from trainkit.errors import InputError

# Up to a brace outside of strings; possessive, so that a damaged file costs one pass.
TO_NEXT_BRACE = re.compile(rb'[^{}"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^{}"]*+)*+([{}])', re.DOTALL)
FINEHARD_PREFIX = "grit-20m/data-12m/"  # the published annotations begin every path with it
SHORT_PROMPT = "a photo of "  # FG-CLIP puts it before FineHARD's short captions
FAR = 1.5  # no box of fractions reaches beyond it, and every box of pixels does

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """A box, xyxy in fractions (unchecked), phrases that describe it, and alterations of the first phrase."""

    box: Box
    phrases: tuple[str, ...]
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The annotations of one image.

    image: path below the image root; a str comes from an annotation file and is checked, a Path is not.
    short: captions, of which one is drawn. long: the long caption.
    label: class for memory banks of two classes (1: abnormal), or of `ClassFolders`.
    source: names the record in messages. size: (width, height) in pixels by which boxes were scaled.
    stored: file, offset and length of the picture, where it is not a file of its own.
    image "" stands for a record that could not be read; its source says why.
    """

    image: str | Path
    short: tuple[str, ...] = ()
    long: str = ""
    regions: tuple[Region, ...] = ()
    label: int = 0
    source: str = ""
    size: tuple[int, int] | None = None
    stored: tuple[Path, int, int] | None = None

    def picture(self, root: Path) -> Image.Image:
        """The image as RGB. Raises InputError where it cannot be read, or its size is not `size`."""
        if self.image == "":
            raise InputError(self.source)
        if self.stored is None:
            path = root / self.image if isinstance(self.image, Path) else files.inside(root, self.image, self.source)
            image = files.open_image(path, self.source)
        else:
            path = self.image
            image = files.open_image(path, self.source, content=files.read_span(*self.stored))
        if self.size not in (None, image.size):
            actual, written = ("{} x {}".format(*size) for size in (image.size, self.size))
            raise InputError(f"{path} is {actual} pixels, but its boxes are for {written} ({self.source})")
        return image


class JsonItems(Sequence):
    """The objects of JSON lists and JSON-lines files, each with its place for messages. Only offsets are in memory.

    index: gives a file's `spans`, a row per object that begins with its offset and length; without it `index_file`.
    """

    def __init__(self, paths: Sequence[Path], index: Callable[[Path], np.ndarray] | None = None):
        self.paths = list(paths)
        self.spans = [(index or index_file)(path) for path in self.paths]
        self.starts = [0, *accumulate(map(len, self.spans))]

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, index: int) -> tuple[Path, np.ndarray, str]:
        """The file of an object, its row of the spans, and its place."""
        file = bisect_right(self.starts, index) - 1
        path, within = self.paths[file], index - self.starts[file]  # IndexError beyond the last
        return path, self.spans[file][within], f"{path}, item {within}"

    def __getitem__(self, index: int) -> tuple[dict, str]:
        path, (offset, length, *_), source = self.locate(index)
        return files.parse_json(files.read_span(path, offset, length), source), source


def index_file(path: Path) -> np.ndarray:
    """Offset and length in bytes (n, 2) int64 of every object in a JSON list or a JSON-lines file."""
    with files.regular_file(path, "annotations").open("rb") as file:
        content = mmap(file.fileno(), 0, access=ACCESS_READ) if file.seek(0, os.SEEK_END) else b""
    first = content[: 2**16].removeprefix(BOM_UTF8).lstrip()[:1]
    if first not in (b"[", b"{"):
        raise InputError(f"{path}: expected a JSON list of objects, or one object per line")
    listed = first == b"["
    spans, depth, start = [], 0, 0
    place = end = content.find(first) + listed
    while depth >= 0 and (match := TO_NEXT_BRACE.match(content, place)):
        place = match.end()
        if match[1] == b"{" and depth == 0:
            start = place - 1
            if content[end:start].strip() != (b"," if listed and spans else b""):
                break
        depth += 1 if match[1] == b"{" else -1
        if depth == 0:
            end = place
            spans.append((start, end - start))
    if content[end:].strip() != (b"]" if listed else b""):
        raise InputError(f"{path} is damaged after byte {end}; expected the end of a JSON list of objects")
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def annotation_files(path: str | Path) -> list[Path]:
    """The JSON files that a path stands for: itself, those of a folder, or those that a .txt lists."""
    path, paths = Path(path), [Path(path)]
    if path.suffix == ".txt":
        paths = [files.inside(path.parent, name, str(path)) for name in files.read_lines(path)]
    elif os.path.isdir(path):
        paths = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl") and not f.name.startswith("."))
    if not paths:
        raise InputError(f"{path} names or holds no .json or .jsonl file")
    return paths


def field(item: dict, key: str, kind: type, source: str):
    """item[key], a str, whole int, list or dict."""
    value, place = item.get(key), f"{source}, {key}"
    if kind is str:
        return files.plain_text(value, place)
    if kind is int:
        return files.number(value, place, -files.MAX_ID, files.MAX_ID, whole=True)
    if not isinstance(value, kind):
        raise InputError(f"{place}: expected a {kind.__name__}, got {files.shown(value)}")
    return value


def box_of(item: dict, source: str) -> Box:
    return files.numbers(field(item, "bbox", list, source)[:4], f"{source}, bbox")


def scaled(box: Box, size: tuple[int, int]) -> Box:
    """A box of left, top, width, height in pixels as xyxy in fractions of an image of (width, height)."""
    (x, y, w, h), (width, height) = box, size
    return x / width, y / height, (x + w) / width, (y + h) / height


def refuse_fractions(boxes: Sequence[Box], source: str) -> None:
    """Raises InputError where most boxes that should be xywh in pixels lie within the first of them."""
    within = [(x, y, w, h) for x, y, w, h in boxes if max(x + w, y + h) <= FAR]
    if 2 * len(within) > len(boxes):
        raise InputError(f"{source}: the box {files.shown(within[0])} looks like fractions; expected xywh in pixels")


class Records(Sequence):
    """Records of `annotation_files`, made on demand. `items` are annotations with their places for messages."""

    def __init__(self, path: str | Path):
        self.items: Sequence[tuple[dict, str]] = JsonItems(annotation_files(path))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        return self.record(*self.items[index])


class FineHARD(Records):
    """FineHARD's annotations (FG-CLIP, section 3.3), described in docs/fgclip.md."""

    def record(self, item: dict, source: str) -> Record:
        image, short = self.path(item, source), SHORT_PROMPT + field(item, "short_caption", str, source)
        long, boxes = field(item, "caption", str, source), item.get("bbox_info")
        regions = tuple(self.region(*info) for info in files.objects(item, "bbox_info", source)) if boxes else ()
        label = field(item, "label", int, source) if "label" in item else 0
        return Record(image, (short,), long, regions, label, source)

    def image(self, index: int) -> str:
        """The path of a record's image, without making the record."""
        return self.path(*self.items[index])

    @staticmethod
    def path(item: dict, source: str) -> str:
        return field(item, "f_path", str, source).removeprefix(FINEHARD_PREFIX)

    @staticmethod
    def region(info: dict, source: str) -> Region:
        box, phrases, negatives = box_of(info, source), [field(info, "short_expr", str, source)], ()
        if max(map(abs, box)) > FAR:
            raise InputError(f"{source}: the box {files.shown(box)} looks like pixels; expected fractions of the sides")
        if "long_expr" in info:
            phrases.append(field(info, "long_expr", str, source))
        if info.get("flag_short_neg") == 1:
            altered = field(info, "short_expr_negs", dict, source)
            negatives = tuple(field(altered, key, str, f"{source}, short_expr_negs") for key in altered)
        return Region(box, tuple(dict.fromkeys(phrases)), negatives)


class FGOVD(Records):
    """A benchmark file of FG-OVD (Bianchi et al. 2024) in JSON lines: one region per record, without captions."""

    def record(self, item: dict, source: str) -> Record:
        positive, negatives = (
            tuple(files.plain_text(text, f"{source}, {key}") for text in field(item, key, list, source))
            for key in ("pos_expression", "neg_expression")
        )
        if len(positive) != 1 or not negatives:
            raise InputError(f"{source}: expected one text under pos_expression and some under neg_expression")
        box, size = box_of(item, source), files.image_size(item.get("width"), item.get("height"), source)
        refuse_fractions([box], source)
        regions = (Region(scaled(box, size), positive, negatives),)
        return Record(field(item, "img_path", str, source), regions=regions, source=source, size=size)


def read_coco(path: Path, *keys: str) -> list[list[tuple[dict, str]]]:
    """The objects in a COCO file's list under each key, with their places. Ids become whole numbers, each once."""
    content = files.read_json(path, "a COCO file", dict)
    lists = [files.objects(content, key, str(path)) for key in keys]
    for entries in lists:
        seen = {}
        for entry, place in entries:
            if "id" in entry:
                entry["id"] = number = field(entry, "id", int, place)
                if seen.setdefault(number, place) != place:
                    raise InputError(f"{place}: the id {number} occurs twice, first in {seen[number]}")
    return lists


def read_instances(path: Path) -> tuple[tuple[str, ...], dict[int, list[tuple[Box, str]]]]:
    """The category names of an instances_*.json, and by image id the (box xywh in pixels, name) of each, but crowds."""
    annotations, categories = read_coco(path, "annotations", "categories")
    names = {field(entry, "id", int, place): field(entry, "name", str, place) for entry, place in categories}
    instances: dict[int, list[tuple[Box, str]]] = {}
    for entry, place in annotations:
        if entry.get("iscrowd"):
            continue
        category = field(entry, "category_id", int, place)
        if category not in names:
            raise InputError(f"{place}: category_id {category} is not among the categories")
        boxes = instances.setdefault(field(entry, "image_id", int, place), [])
        boxes.append((box_of(entry, place), names[category]))
    refuse_fractions([box for boxes in instances.values() for box, _ in boxes], str(path))
    return tuple(names.values()), instances


class COCO(Records):
    """COCO's captions_*.json, with the boxes of the instances_*.json beside it where there is one.

    The long caption is all short ones together, a region's phrase is its category's name. Left out are crowds, images
    without a caption, and captions beyond `most_captions` per image.
    """

    def __init__(self, captions: str | Path, *, most_captions: int | None = None):
        path, self.most_captions = Path(captions), most_captions
        images, annotations = read_coco(path, "images", "annotations")
        self.captions: dict[int, list[str]] = {}
        for entry, place in annotations:
            own = self.captions.setdefault(field(entry, "image_id", int, place), [])
            own.append(field(entry, "caption", str, place).strip())
        self.items = [(entry, place) for entry, place in images if field(entry, "id", int, place) in self.captions]
        beside = path.with_name(path.name.replace("captions", "instances"))
        self.instances = read_instances(beside)[1] if beside != path and beside.is_file() else {}

    def record(self, image: dict, source: str) -> Record:
        captions = self.captions[image["id"]][: self.most_captions]
        boxes = self.instances.get(image["id"], ())
        size = files.image_size(image.get("width"), image.get("height"), source) if boxes else None
        regions = tuple(Region(scaled(box, size), (f"a {name}",)) for box, name in boxes)
        name = field(image, "file_name", str, source)
        return Record(name, tuple(captions), " ".join(captions), regions, source=source, size=size)
