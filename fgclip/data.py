"""Annotation files, one record an image: FineHARD, COCO captions with instances, and FG-OVD."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from fgclip.errors import InputError
from fgclip.images import inside
from fgclip.regions import from_xywh

# Up to a brace outside of strings. Possessive throughout, so that a damaged file costs one pass and no more.
TO_NEXT_BRACE = re.compile(rb'[^{}"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^{}"]*+)*+([{}])', re.DOTALL)
FINEHARD_PREFIX = "grit-20m/data-12m/"  # the published annotations begin every path with it
SHORT_PROMPT = "a photo of "  # FG-CLIP puts it before FineHARD's short captions


@dataclass(frozen=True)
class Region:
    """A box, xyxy in fractions of the image (unchecked), the phrases that describe it, and alterations that do not.

    The first phrase is the one that the alterations belong to.
    """

    box: tuple[float, float, float, float]
    phrases: tuple[str, ...]
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One image: its path below the image root, short captions (any of them will do), a long one, and its regions.

    label is the class for memory banks of two classes (1: abnormal). source names the record in messages.
    """

    image: str
    short: tuple[str, ...]
    long: str
    regions: tuple[Region, ...] = ()
    label: int = 0
    source: str = ""


class JsonItems(Sequence):
    """The objects of JSON lists and JSON-lines files by number. Only where each begins and ends is kept in memory."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.spans = [index_file(path) for path in self.paths]
        self.ends = list(accumulate(map(len, self.spans)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, index: int) -> tuple[Path, int, np.ndarray]:
        """The file of an object, its number there, and its (offset, length) in bytes."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect_right(self.ends, index)
        within = index - (self.ends[file - 1] if file else 0)
        return self.paths[file], within, self.spans[file][within]

    def __getitem__(self, index: int) -> tuple[dict, str]:
        """The object and, for messages, where it stands. Raises InputError where it is damaged."""
        path, within, (offset, length) = self.locate(index)
        source = f"{path}, item {within}"
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        try:
            item = json.loads(content)
        except ValueError as error:
            raise InputError(f"{source} is not valid JSON ({error})") from error
        if not isinstance(item, dict):
            raise InputError(f"{source}: expected a JSON object")
        return item, source


def index_file(path: Path) -> np.ndarray:
    """Offset and length in bytes (n, 2) int64 of every object in a JSON list or a JSON-lines file."""
    try:
        with path.open("rb") as file:
            first = next((byte for line in file if (byte := line.strip()[:1])), b"")
            file.seek(0)
            if first == b"[":
                with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                    spans = list(_list_spans(content, path))
            elif first == b"{":
                spans = list(_line_spans(file))
            else:
                raise InputError(f"{path}: expected a JSON list of objects, or one object a line")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    offset = 0
    for line in file:
        if line.strip():
            yield offset, len(line)
        offset += len(line)


def _list_spans(content: mmap, path: Path) -> Iterator[tuple[int, int]]:
    """The outermost objects. What is inside them is looked at when they are read."""
    place = depth = start = 0
    while match := TO_NEXT_BRACE.match(content, place):
        place = match.end()
        if match[1] == b"{":
            start = start if depth else place - 1
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                yield start, place - start
        if depth < 0:
            break
    if depth or content[place:].strip() != b"]":
        raise InputError(f"{path} is damaged after byte {place}; expected the end of a JSON list of objects")


def annotation_files(path: str | Path) -> list[Path]:
    """The JSON files that a path stands for: itself, those of a directory, or those that a .txt lists, one a line.

    Listed paths are relative to the list and stay below its folder. Raises InputError where there are none.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl"))
    elif path.suffix == ".txt":
        names = read_text(path).split("\n")
        files = [inside(path.parent, name.strip(), str(path)) for name in names if name.strip()]
    else:
        files = [path]
    if not files:
        raise InputError(f"{path} names no .json or .jsonl file")
    if absent := [f for f in files if not f.is_file()]:
        raise InputError(f"{absent[0]} is not a file of annotations")
    return files


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from error


def field(item: dict, key: str, kind: type | tuple[type, ...], source: str):
    """item[key], of the given type. Raises InputError naming source and key."""
    value = item.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{source}: expected {names} under the key {key}, got {type(value).__name__}")
    return value


def box_of(item: dict, source: str) -> tuple[float, float, float, float]:
    """The first four numbers under the key bbox."""
    box = field(item, "bbox", list, source)[:4]
    if len(box) < 4 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in box):
        raise InputError(f"{source}: expected four numbers under the key bbox")
    return tuple(float(x) for x in box)


class FineHARD(Sequence):
    """Records of FineHARD's annotations (FG-CLIP, section 3.3): a JSON list, JSON lines, a directory, or a .txt list.

    An item holds f_path, caption, short_caption and bbox_info, a list of bbox (xyxy in fractions of the image, further
    numbers ignored), short_expr, long_expr and, where flag_short_neg is 1, the values of short_expr_negs as negatives.
    bbox_info may be missing, and so may long_expr. An integer label is the class for banks of two classes.
    """

    def __init__(self, path: str | Path):
        self.items = JsonItems(annotation_files(path))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        item, source = self.items[index]
        infos = item.get("bbox_info") or []
        if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
            raise InputError(f"{source}: expected a list of objects under the key bbox_info")
        return Record(
            image=field(item, "f_path", str, source).removeprefix(FINEHARD_PREFIX),
            short=(SHORT_PROMPT + field(item, "short_caption", str, source),),
            long=field(item, "caption", str, source),
            regions=tuple(self.region(info, f"{source}, bbox_info[{i}]") for i, info in enumerate(infos)),
            label=field(item, "label", int, source) if "label" in item else 0,
            source=source,
        )

    @staticmethod
    def region(info: dict, source: str) -> Region:
        phrases = [field(info, key, str, source) for key in ("short_expr", "long_expr") if key in info]
        negatives = ()
        if info.get("flag_short_neg") == 1:
            negatives = field(info, "short_expr_negs", dict, source)
            negatives = tuple(field(negatives, key, str, f"{source}, short_expr_negs") for key in negatives)
        if "short_expr" not in info:
            raise InputError(f"{source}: expected str under the key short_expr")
        return Region(box_of(info, source), tuple(dict.fromkeys(phrases)), negatives)


class FGOVD(Sequence):
    """Records of an FG-OVD benchmark file (Bianchi et al. 2024) in JSON lines: one region each, without captions.

    A line holds img_path, bbox (xywh in pixels), width, height, pos_expression with one phrase, and neg_expression.
    """

    def __init__(self, path: str | Path):
        self.items = JsonItems(annotation_files(path))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        item, source = self.items[index]
        positive, negatives = (field(item, key, list, source) for key in ("pos_expression", "neg_expression"))
        if len(positive) != 1 or not negatives or not all(isinstance(text, str) for text in positive + negatives):
            raise InputError(f"{source}: expected one text under pos_expression and some under neg_expression")
        size = [field(item, key, (int, float), source) for key in ("width", "height")]
        region = Region(scale_box(box_of(item, source), *size, source), tuple(positive), tuple(negatives))
        return Record(field(item, "img_path", str, source), (), "", (region,), source=source)


def scale_box(box: tuple, width: float, height: float, source: str) -> tuple[float, float, float, float]:
    """xywh in pixels to xyxy in fractions."""
    if width <= 0 or height <= 0:
        raise InputError(f"{source}: expected a positive width and height")
    return tuple(from_xywh(torch.tensor([box], dtype=torch.float64), width, height)[0].tolist())


def read_coco(path: Path, *keys: str) -> dict:
    """The JSON object of a COCO file, which holds lists of objects under the keys. Raises InputError."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: expected a COCO file with a list under the key {key}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise InputError(f"{path}: expected objects in the list under the key {key}")
    return content


def read_instances(path: Path) -> tuple[tuple[str, ...], dict[int, list[tuple[tuple, str]]]]:
    """Of an instances_*.json: the categories' names, and by image id the (box xywh in pixels, name) of each instance.

    Crowds are left out.
    """
    content = read_coco(path, "annotations", "categories")
    names, found = {}, {}
    for i, category in enumerate(content["categories"]):
        source = f"{path}, categories[{i}]"
        names[field(category, "id", int, source)] = field(category, "name", str, source)
    for i, annotation in enumerate(content["annotations"]):
        if annotation.get("iscrowd"):
            continue
        source = f"{path}, annotations[{i}]"
        category = field(annotation, "category_id", int, source)
        if category not in names:
            raise InputError(f"{source}: category_id {category} is not among the categories")
        image_id = field(annotation, "image_id", int, source)
        found.setdefault(image_id, []).append((box_of(annotation, source), names[category]))
    return tuple(names.values()), found


class COCO(Sequence):
    """Records of COCO's captions, with the boxes of its instances where their file is given or lies beside.

    captions: captions_*.json; instances: instances_*.json, by default the one named like it in the same folder. The
    short captions are the image's own, the long one is all of them together, a region's phrase is its category's name.
    Crowds are left out, and so are images without a caption.
    """

    def __init__(self, captions: str | Path, instances: str | Path | None = None, *, most_captions: int | None = None):
        path = Path(captions)
        content = read_coco(path, "images", "annotations")
        self.path = path
        self.captions: dict[int, list[str]] = {}
        for i, annotation in enumerate(content["annotations"]):
            source = f"{path}, annotations[{i}]"
            image_id = field(annotation, "image_id", int, source)
            self.captions.setdefault(image_id, []).append(field(annotation, "caption", str, source).strip())
        self.captions = {k: texts[:most_captions] for k, texts in self.captions.items()}
        images = enumerate(content["images"])
        self.images = [
            (i, image) for i, image in images if field(image, "id", int, f"{path}, images[{i}]") in self.captions
        ]
        beside = path.with_name(path.name.replace("captions", "instances"))
        self.categories: tuple[str, ...] = ()
        self.regions: dict[int, list[tuple[tuple, str]]] = {}
        if instances is not None or (beside != path and beside.is_file()):
            self.categories, self.regions = read_instances(Path(instances or beside))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        i, image = self.images[index]
        source = f"{self.path}, images[{i}]"
        size = [field(image, key, int, source) for key in ("width", "height")]
        texts = self.captions[image["id"]]
        regions = tuple(
            Region(scale_box(box, *size, source), (f"a {name}",)) for box, name in self.regions.get(image["id"], [])
        )
        return Record(field(image, "file_name", str, source), tuple(texts), " ".join(texts), regions, source=source)
