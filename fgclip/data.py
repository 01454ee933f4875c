"""Annotation files, one record an image: FineHARD, COCO captions with instances, and FG-OVD."""

import os
import re
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

import trainkit.files as files
from fgclip.images import read_image
from fgclip.regions import from_xywh
from trainkit.errors import InputError

# Up to a brace outside of strings. Possessive throughout, so that a damaged file costs one pass and no more.
TO_NEXT_BRACE = re.compile(rb'[^{}"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^{}"]*+)*+([{}])', re.DOTALL)
FINEHARD_PREFIX = "grit-20m/data-12m/"  # the published annotations begin every path with it
SHORT_PROMPT = "a photo of "  # FG-CLIP puts it before FineHARD's short captions
FAR = 1.5  # a box that reaches so far is none of fractions, and one that does not is none of pixels


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

    label is the class for memory banks of two classes (1: abnormal). source names the record in messages. size is the
    image's width and height in pixels, where boxes were scaled by it. found: the path comes from the folder itself.
    """

    image: str
    short: tuple[str, ...]
    long: str
    regions: tuple[Region, ...] = ()
    label: int = 0
    source: str = ""
    size: tuple[int, int] | None = None
    found: bool = False

    def picture(self, root: Path) -> Image.Image:
        """The image as RGB. Raises InputError where it cannot be read, or is of another size than was written."""
        path = root / self.image if self.found else files.inside(root, self.image, self.source)
        image = read_image(path, self.source)
        if self.size not in (None, image.size):
            found, written = ("{} x {}".format(*size) for size in (image.size, self.size))
            raise InputError(f"{path} is {found} pixels, but its boxes are for {written} ({self.source})")
        return image


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
        item = files.parse_json(content, source)
        if not isinstance(item, dict):
            raise InputError(f"{source}: expected a JSON object")
        return item, source


def index_file(path: Path) -> np.ndarray:
    """Offset and length in bytes (n, 2) int64 of every object in a JSON list or a JSON-lines file."""
    try:
        with files.regular_file(path, "annotations").open("rb") as file:
            first = file.read(2**16).removeprefix(BOM_UTF8).lstrip()[:1]
            file.seek(0)
            if first == b"[":
                with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                    spans = list(_list_spans(content, path))
            elif first == b"{":
                spans = list(_line_spans(file))
            else:
                raise InputError(f"{path}: expected a JSON list of objects, or one object a line")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({files.reason(error)})") from error
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
    if os.path.isdir(path):
        return files_in(path, ".json", ".jsonl")
    if path.suffix != ".txt":
        return [path]
    listed = [files.inside(path.parent, name, str(path)) for name in files.read_lines(path)]
    if not listed:
        raise InputError(f"{path} names no .json or .jsonl file")
    return listed


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder with one of the endings, those that macOS leaves beside each (._name) left out."""
    found = sorted(f for f in folder.iterdir() if f.suffix in suffixes and not f.name.startswith("."))
    if not found:
        raise InputError(f"{folder} holds no {' or '.join(suffixes)} file")
    return found


def field(item: dict, key: str, kind: type, source: str):
    """item[key], a str, whole int, list or dict. Raises InputError naming source and key."""
    value, place = item.get(key), f"{source}, {key}"
    if kind is str:
        return files.plain_text(value, place)
    if kind is int:
        return files.number(value, place, -files.MAX_ID, files.MAX_ID, whole=True)
    if not isinstance(value, kind):
        raise InputError(f"{place}: expected a {kind.__name__}, got {files.shown(value)}")
    return value


def objects(item: dict, key: str, source: str) -> list[tuple[dict, str]]:
    """The objects in the list under a key, with what names each in messages."""
    found = [(entry, f"{source}, {key}[{i}]") for i, entry in enumerate(field(item, key, list, source))]
    for entry, place in found:
        if not isinstance(entry, dict):
            raise InputError(f"{place}: expected an object, got {files.shown(entry)}")
    return found


def box_of(item: dict, source: str) -> tuple[float, float, float, float]:
    """The first four numbers under the key bbox."""
    return files.numbers(field(item, "bbox", list, source)[:4], f"{source}, bbox")


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
        infos = objects(item, "bbox_info", source) if item.get("bbox_info") else []
        return Record(
            image=self.path(item, source),
            short=(SHORT_PROMPT + field(item, "short_caption", str, source),),
            long=field(item, "caption", str, source),
            regions=tuple(self.region(*info) for info in infos),
            label=field(item, "label", int, source) if "label" in item else 0,
            source=source,
        )

    def image(self, index: int) -> str:
        """The path of the image of a record, in a third of the record's time."""
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
            negatives = field(info, "short_expr_negs", dict, source)
            negatives = tuple(field(negatives, key, str, f"{source}, short_expr_negs") for key in negatives)
        return Region(box, tuple(dict.fromkeys(phrases)), negatives)


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
        positive, negatives = (
            tuple(files.plain_text(text, f"{source}, {key}") for text in field(item, key, list, source))
            for key in ("pos_expression", "neg_expression")
        )
        if len(positive) != 1 or not negatives:
            raise InputError(f"{source}: expected one text under pos_expression and some under neg_expression")
        box, size = box_of(item, source), size_of(item, source)
        refuse_fractions([box], source)
        regions = scaled([(box, positive)], size, negatives)
        return Record(field(item, "img_path", str, source), (), "", regions, source=source, size=size)


def size_of(item: dict, source: str) -> tuple[int, int]:
    """Width and height in pixels, as they stand beside a box."""
    return files.image_size(item.get("width"), item.get("height"), source)


def refuse_fractions(boxes: Sequence[tuple], source: str) -> None:
    """Raises InputError where most boxes that should be xywh in pixels lie within the first of them."""
    within = [(x, y, w, h) for x, y, w, h in boxes if max(x + w, y + h) <= FAR]
    if 2 * len(within) > len(boxes):
        raise InputError(f"{source}: the box {files.shown(within[0])} looks like fractions; expected xywh in pixels")


def scaled(boxes: Sequence[tuple[tuple, tuple]], size: tuple[int, int], negatives: tuple = ()) -> tuple[Region, ...]:
    """Regions of boxes, xywh in pixels of an image of that width and height, each with its phrases."""
    corners = from_xywh(torch.tensor([box for box, _ in boxes], dtype=torch.float64).view(-1, 4), *size)
    return tuple(Region(tuple(b), texts, negatives) for b, (_, texts) in zip(corners.tolist(), boxes, strict=True))


def read_coco(path: Path, *keys: str) -> list[list[tuple[dict, str]]]:
    """Of a COCO file the objects in the list under each key, with what names each. Raises InputError.

    Their ids become whole numbers; no two of a list have the same.
    """
    content = files.read_json(path, "a COCO file", dict)
    found = [objects(content, key, str(path)) for key in keys]
    for entries in found:
        seen = {}
        for entry, place in entries:
            if "id" in entry:
                entry["id"] = own = field(entry, "id", int, place)
                if seen.setdefault(own, place) != place:
                    raise InputError(f"{place}: the id {own} occurs twice, first in {seen[own]}")
    return found


def read_instances(path: Path) -> tuple[tuple[str, ...], dict[int, list[tuple[tuple, str]]]]:
    """Of an instances_*.json: the categories' names, and by image id the (box xywh in pixels, name) of each instance.

    Crowds are left out.
    """
    annotations, categories = read_coco(path, "annotations", "categories")
    names = {field(entry, "id", int, place): field(entry, "name", str, place) for entry, place in categories}
    found, boxes = {}, []
    for entry, place in annotations:
        if entry.get("iscrowd"):
            continue
        category = field(entry, "category_id", int, place)
        if category not in names:
            raise InputError(f"{place}: category_id {category} is not among the categories")
        boxes.append(box_of(entry, place))
        found.setdefault(field(entry, "image_id", int, place), []).append((boxes[-1], names[category]))
    refuse_fractions(boxes, str(path))
    return tuple(names.values()), found


class COCO(Sequence):
    """Records of COCO's captions, with the boxes of its instances where their file is given or lies beside.

    captions: captions_*.json; instances: instances_*.json, by default the one named like it in the same folder. The
    short captions are the image's own, the long one is all of them together, a region's phrase is its category's name.
    Crowds are left out, and so are images without a caption.
    """

    def __init__(self, captions: str | Path, instances: str | Path | None = None, *, most_captions: int | None = None):
        path = Path(captions)
        images, annotations = read_coco(path, "images", "annotations")
        self.captions: dict[int, list[str]] = {}
        for entry, place in annotations:
            texts = self.captions.setdefault(field(entry, "image_id", int, place), [])
            texts.append(field(entry, "caption", str, place).strip())
        self.captions = {k: texts[:most_captions] for k, texts in self.captions.items()}
        self.images = [(entry, place) for entry, place in images if field(entry, "id", int, place) in self.captions]
        beside = path.with_name(path.name.replace("captions", "instances"))
        self.categories: tuple[str, ...] = ()
        self.regions: dict[int, list[tuple[tuple, str]]] = {}
        if instances is not None or (beside != path and beside.is_file()):
            self.categories, self.regions = read_instances(Path(instances or beside))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        image, source = self.images[index]
        texts = self.captions[image["id"]]
        boxes = [(box, (f"a {name}",)) for box, name in self.regions.get(image["id"], ())]
        size = size_of(image, source) if boxes else None
        regions = scaled(boxes, size) if boxes else ()
        return Record(field(image, "file_name", str, source), tuple(texts), " ".join(texts), regions, 0, source, size)
