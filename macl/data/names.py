"""Files of pairs, found by their names."""

import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from trainkit.errors import InputError
from trainkit.files import IMAGE_SUFFIXES, inside, is_image, read_lines, shown


def find_pairs(
    visible: str | Path | None, infrared: str | Path | None, suffixes: Sequence[str] = ("", ""),
    wanted: Iterable[str] | None = None,
) -> dict[str, tuple[Path | None, Path | None]]:  # fmt: skip
    """The visible and the infrared image of each name, in the folders of the cameras there are.

    visible, infrared: folders; or an image each, of any names
    suffixes: what ends the names of visible and of infrared images, which may then lie in one folder
    wanted: names, without suffix; None: all of both folders, in order

    Raises InputError for a folder without images, an image that is missing, and one that is its own partner.
    """
    both = [None if path is None else Path(path) for path in (visible, infrared)]
    given = [path for path in both if path is not None]
    if all(path.is_file() for path in given):
        pairs = {given[0].stem: tuple(both)}
    else:
        images = [path and images_by_stem(path, *suffixes[::way]) for path, way in zip(both, (1, -1), strict=True)]
        known = [found for found in images if found is not None]
        names = sorted(set(chain(*known))) if wanted is None else wanted
        pairs = {stem: tuple(found and found.get(stem) for found in images) for stem in names}
        for folder, end, found in zip(both, suffixes, images, strict=True):
            if found == {}:
                suffixes = ", ".join(end + suffix for suffix in IMAGE_SUFFIXES)
                raise InputError(f"{folder} is no folder of images ({suffixes})")
            for stem, pair in pairs.items() if found else ():
                if stem not in found:
                    partner = next(filter(None, pair), None)
                    expected = f"the partner of {partner}" if partner else f"an image of {shown(stem)}"
                    raise InputError(f"{folder / stem}{end}.jpg does not exist; expected {expected}")
    if len(given) == 2 and all(len(set(map(os.path.realpath, pair))) == 1 for pair in pairs.values()):
        problem = "are the same pictures; expected visible and infrared ones, or --suffixes that tell them apart"
        raise InputError(f"{given[0]} and {given[1]} {problem}")
    return pairs


def images_by_stem(folder: Path, end: str = "", other: str = "") -> dict[str, Path]:
    """The images in a folder by name without suffix, in order; none where it does not exist.

    end: what the names have to end with, which is cut off
    other: what they may not end with, where there is no `end`

    Raises InputError for two names that differ in the suffix alone.
    """
    images = {}
    for name in sorted(filter(is_image, os.listdir(folder) if folder.is_dir() else ())):
        stem = os.path.splitext(name)[0]
        if stem.endswith(end) and not (other and not end and stem.endswith(other)):
            before = images.setdefault(stem.removesuffix(end), folder / name)
            if before.name != name:
                raise InputError(f"{folder} holds both {before.name} and {name}; expected one per name")
    return dict(sorted(images.items()))


def find_images(wanted: Iterable[tuple[Path, str]]) -> list[Path]:
    """The images of paths without suffix, each with its name for the InputError; every folder is listed once."""
    images, listed = [], functools.cache(images_by_stem)
    for path, what in wanted:
        if path.name not in listed(path.parent):
            raise InputError(f"{path}.jpg does not exist; expected an image of {what}")
        images.append(listed(path.parent)[path.name])
    return images


def read_list(file: Path, what: str) -> list[str]:
    """The names in a list, one per line. what: a line, in words."""
    names = read_lines(file, f"{what} per line")
    if not names:
        raise InputError(f"{file} is empty; expected {what} per line")
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{file} lists {shown(name)} twice; expected every pair once")
    return names


def read_stems(file: Path, suffixes: Sequence[str]) -> list[str]:
    """The names of pairs in a list of image names, with or without their suffixes."""
    names = read_list(file, "one image name")
    for name in names:
        if inside(file.parent, name, str(file)).name != name:
            raise InputError(f"{file}: {shown(name)}; expected an image name without folders or suffix")
    return list(dict.fromkeys(bare(name, suffixes) for name in names))  # the list may name both cameras


def bare(name: str, suffixes: Sequence[str]) -> str:
    """The name of a pair: of an image, without .jpg or the like and what ends the names of a camera."""
    stem = os.path.splitext(name)[0] if is_image(name) else name
    return next((stem.removesuffix(end) for end in suffixes if end and stem.endswith(end)), stem)
