"""Files: what is read is sane or refused in one sentence, what is written is whole or not there.

Every function raises InputError, which names the file or the place in it. `what`, `place` and `source` are for that
message.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainkit.errors import InputError

MAX_TEXT = 2**32  # bytes of a file of text
MAX_PIXELS = 50_000_000  # of a picture
MAX_SIDE = 65_535  # pixels, a JPEG's longest
MAX_COORDINATE = 1e6  # of a box, in pixels or fractions
MAX_WEIGHT = 1e18  # of a tensor's number; products of two are still finite in float32
MAX_ID = 2**53  # up to here json's numbers are whole in every reader
# Pillow knows more formats, one of which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs of damage reaches the terminal
_EXIF_ORIENTATION = 0x0112
_DEEP = ("I", "F")  # modes of grey pictures of more than 8 bits begin so
_TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # orientation -> Image.Transpose
# Every file that torch.save wrote starts with one of these: a zip archive, or the pickled number of the older layout.
_TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")
_STATE_KEYS = ("state_dict", "model_state_dict", "model")  # under which trainers keep a state dict
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, and Lightning's
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value) -> str:
    """`value` for a message: its repr, cut where it is long or deep."""
    return _SHORT.repr(value)


def reason(error: BaseException) -> str:
    """What an exception says, for a message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --- Text, json and what stands in them ---


def regular_file(path: str | Path, what: str = "a file") -> Path:
    """The path of a file that has an end: no folder, pipe or device."""
    try:
        if Path(path).is_file():
            return Path(path)
        problem = "is not a file" if Path(path).exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name too long or with a NUL, a folder that is closed to us
        problem = f"cannot be opened ({reason(error)})"
    raise InputError(f"{path} {problem}; expected {what}")


def read_text(path: str | Path, what: str = "a text file") -> str:
    """A file of UTF-8 without its byte-order mark."""
    path = regular_file(path, what)
    if path.stat().st_size > MAX_TEXT:
        raise InputError(f"{path} has {path.stat().st_size} bytes, more than are read; expected {what}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not UTF-8 text that can be read ({reason(error)}); expected {what}") from error


def read_lines(path: str | Path, what: str = "a text file") -> list[str]:
    """The lines of a file of text that are not blank, stripped."""
    return [line.strip() for line in read_text(path, what).split("\n") if line.strip()]


def read_span(path: str | Path, offset: int, length: int) -> bytes:
    """So many bytes of a file, or what there is of them."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def parse_json(text: str | bytes, source: str):
    """Any json. source: its name in a message."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands deep
        raise InputError(f"{source} is not valid JSON ({reason(error)})") from error


def read_json(path: str | Path, what: str = "a JSON file", kind: type = object):
    """The json in a file, a `kind` (dict, list)."""
    content = parse_json(read_text(path, what), str(path))
    if not isinstance(content, kind):
        named = "an object" if kind is dict else "a list"
        raise InputError(f"{path} holds {shown(content)}; expected {what}, {named}")
    return content


def number(value, place: str, low: float = -MAX_COORDINATE, high: float = MAX_COORDINATE, *, whole: bool = False):
    """An int (whole) or float from low to high, out of json or text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (whole and value != int(value)):
        raise InputError(f"{place}: expected a {'whole ' * whole}number from {low:g} to {high:g}, got {shown(value)}")
    return int(value) if whole else float(value)


def numbers(values, place: str, count: int = 4, low: float = -MAX_COORDINATE, high: float = MAX_COORDINATE) -> tuple:
    """So many finite floats out of a list, such as a box."""
    if not isinstance(values, list | tuple) or len(values) != count:
        raise InputError(f"{place}: expected {count} numbers, got {shown(values)}")
    return tuple(number(value, place, low, high) for value in values)


def image_size(width, height, place: str) -> tuple[int, int]:
    """Width and height in pixels, as an annotation says them."""
    sides = {"width": width, "height": height}
    return tuple(number(side, f"{place}, {name}", 1, MAX_SIDE, whole=True) for name, side in sides.items())


def plain_text(value, place: str) -> str:
    """A str out of json; halves of a character, which json can spell and UTF-8 cannot, become question marks."""
    if not isinstance(value, str):
        raise InputError(f"{place}: expected a text, got {shown(value)}")
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def objects(item: dict, key: str, place: str) -> list[tuple[dict, str]]:
    """The objects in the list under a key of json, with their places for messages."""
    entries = item.get(key)
    if not isinstance(entries, list):
        raise InputError(f"{place}, {key}: expected a list, got {shown(entries)}")
    entries = [(entry, f"{place}, {key}[{i}]") for i, entry in enumerate(entries)]
    for entry, where in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object, got {shown(entry)}")
    return entries


def inside(root: str | Path, name: str, source: str) -> Path:
    """root / name, where `name` stands in the data file `source`: relative, printable, and below the root."""
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    if not parts or name.startswith(("/", "~")) or "\\" in name or ".." in parts or max(map(len, parts)) > 255:
        raise InputError(f"{source}: the path {shown(name)} must be relative and stay below {root}")
    return Path(root) / name


def natural(name: str) -> list:
    """A key by which 34 comes before 102."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]


# --- Pictures ---


def is_image(path: str | Path) -> bool:
    """Whether a name is a picture's; the files that macOS leaves beside each (._name) are none."""
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build


@contextlib.contextmanager
def _opened(path: str | Path, name: str, content: bytes | None = None) -> Iterator[Image.Image]:
    """A picture that is decoded when it is used; whatever Pillow says of it is an InputError. name: for messages."""
    source = path if content is None else io.BytesIO(content)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(source, formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                limits = f"at most {MAX_PIXELS}, {MAX_SIDE} per side, are read"
                raise InputError(f"{name} has {width} x {height} pixels; {limits}")
            yield image
    except InputError:
        raise
    except Exception as error:  # Pillow raises what its decoders happen to raise
        problem = getattr(error, "strerror", None) or "broken or cut short"
        if isinstance(error, Image.UnidentifiedImageError):
            problem = f"none of {', '.join(_formats())}"
        if isinstance(error, Image.DecompressionBombError):
            problem = f"more than {MAX_PIXELS} pixels, the most that are read"
        raise InputError(f"{name} cannot be decoded as an image: {problem}") from error


def open_image(
    path: str | Path, named_by: str = "", *, content: bytes | None = None,
    levels: tuple[float, float] | None = None, at_least: int | None = None,
) -> Image.Image:  # fmt: skip
    """A picture of 8 bits per channel as RGB, turned as its EXIF orientation says, without its transparency.

    Refused are files that are missing, damaged or of none of FORMATS, more than MAX_PIXELS, a side above MAX_SIDE, and
    more than 8 bits per channel, unless grey and with `levels`.

    named_by: the data file that names it
    content: the picture, instead of the file's
    levels: the values of more than 8 bits that become 0 and 255
    at_least: pixels of the short side down to which a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, rounded up, in a
        part of the time; None: whole
    """
    name = f"{path} (named by {named_by})" if named_by else str(path)
    if content is None:
        regular_file(path, f"a picture, named by {named_by}; is the image root right?" if named_by else "a picture")
    with _opened(path, name, content) as image:
        deep = image.mode.startswith(_DEEP)
        if (deep and levels is None) or (not deep and image.format in ("PNG", "TIFF") and ";16" in str(image.tile)):
            advice = "scale it to 8 bits first, or of infrared by --infrared-range where a command has it"
            raise InputError(f"{name} has more than 8 bits per channel; {advice}")  # as RGB they would lose low bytes
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION))
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        if deep:
            values = (deep_values(path) - levels[0]) * (255 / (levels[1] - levels[0]))
            image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
        # A palette with transparency cannot become RGB directly.
        rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


def deep_values(path: str | Path) -> np.ndarray | None:
    """The values (H, W) float32 of a grey picture of more than 8 bits; None for any other."""
    with _opened(regular_file(path, "a picture"), str(path)) as image:
        values = np.asarray(image).astype(np.float32) if image.mode.startswith(_DEEP) else None
    return None if values is None else np.nan_to_num(values, posinf=0, neginf=0)


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as `open_image` turns it, from its first bytes."""
    with _opened(regular_file(path), str(path)) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in range(5, 9)
        return image.size[::-1] if turned else image.size


# --- Torch files ---


def read_torch(path: str | Path, what: str = "a file written by torch.save"):
    """What torch.save wrote, on the CPU: tensors and plain values. No code in it is run.

    Refused are damaged files, and those that claim more than they hold: compressed archives, tensors larger than
    their storage, on no device, sparse or complex.
    """
    path = regular_file(path, what)
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, _TORCH_STARTS)))
        if not start.startswith(_TORCH_STARTS):
            raise InputError(f"{path} was not written by torch.save; expected {what}")
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise InputError(f"{path} is a compressed archive, which torch.save does not write")
        # torchvision's training scripts keep their flags beside the weights, in a class that is nothing but names.
        known = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(action="ignore"), known:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if _bytes_of(content, path) > 4 * path.stat().st_size:
            raise InputError(f"{path} claims tensors of many times the bytes that it holds")
        return content
    except InputError:
        raise
    except Exception as error:  # the bytes of a damaged file are taken for names, numbers, indices and lengths
        problem = f"is damaged, cut short, or holds more than tensors and plain values ({type(error).__name__})"
        raise InputError(f"{path} {problem}; expected {what}") from error


def _bytes_of(content, path: Path) -> int:
    """The bytes that the tensors of `content` take when each is copied."""
    if isinstance(content, Tensor):
        size = content.numel() * content.element_size()
        plain = content.layout is torch.strided and content.device.type == "cpu" and not content.is_complex()
        if not plain or size > content.untyped_storage().nbytes():
            raise InputError(f"{path} holds a tensor that is sparse, complex, or larger than what is stored of it")
        return size
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return sum(_bytes_of(part, path) for part in parts)


def state_dict_of(content, path: str | Path) -> dict[str, Tensor]:
    """The named tensors in `content`, or in what a trainer keeps beside its optimizer, without wrappers' prefixes."""
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    items = content.items() if isinstance(content, Mapping) else ()
    if not items or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
        keys = " or ".join(_STATE_KEYS)
        raise InputError(f"{path} holds no state dict; expected named tensors, by themselves or under {keys}")
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in content)), ""):
        content = {name.removeprefix(wrapper): value for name, value in content.items()}
    return dict(content)


def check_like(value, own, place: str) -> None:
    """Refuse a `value` out of a file that is not like `own`, this program's.

    Keys (but for torch's private ones), lengths, shapes and dtypes must be the same, and whole numbers whole. Nothing
    may be below 0 unless `own` is, and everything must be finite.
    """
    if isinstance(own, list | tuple):
        own = dict(enumerate(own))
        value = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if isinstance(own, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{place}: expected {len(own)} values, got {shown(value)}")
        if differing := [key for key in own.keys() ^ value.keys() if not str(key).startswith("_")]:
            first = min(differing, key=str)
            raise InputError(f"{place}: {shown(first)} {'is missing' if first in own else 'has no place here'}")
        for key in own:
            if key in value:
                check_like(value[key], own[key], f"{place}: {key}")
    elif isinstance(own, Tensor):
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (own.shape, own.dtype):
            form = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else shown(value)
            raise InputError(f"{place}: expected {tuple(own.shape)} of {own.dtype}, got {form}")
        if value.is_floating_point() and not (value.abs() < MAX_WEIGHT).all():
            raise InputError(f"{place} holds numbers that are not finite, or beyond all reason")
    elif isinstance(own, bool | str | None):
        if type(value) is not type(own):
            raise InputError(f"{place}: expected a {type(own).__name__}, got {shown(value)}")
    else:
        value = None if isinstance(value, str) else value
        number(value, place, min(0, own), MAX_ID, whole=isinstance(own, int))


# --- Whole files out ---


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A full disk, or whatever else prevents writing, is one sentence with the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # of a full disk torch.save says RuntimeError, while an OSError is handled
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path} cannot be written ({reason(cause)})") from error


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write to that gets its name when it is complete: written beside it, flushed to the disk, renamed.

    An interruption leaves an older file as it was. Links stay; devices and pipes are written to directly.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(path.name + ".partial")
    encoding = {} if "b" in mode else dict(encoding="utf-8", errors="backslashreplace")
    if path.exists() and not path.is_file():
        with writing(path), path.open(mode, **encoding) as file:
            yield file
        return
    try:
        with writing(path):
            with partial.open(mode, **encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too, must outlive a power cut
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_json_rows(path: str | Path, rows: Iterable) -> int:
    """A file of one json list, a row per line, none of which is kept. -> their number."""
    count = 0
    with whole_file(path, "w") as file:
        for count, row in enumerate(rows, 1):
            file.write(("[" if count == 1 else ",") + "\n" + json.dumps(row))
        file.write("\n]\n" if count else "[]\n")
    return count
