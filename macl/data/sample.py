"""The sample that every data set, the augmentation and inference share, and the readers of its two images.

A sample is a dict:

    visible     (3, H, W) uint8 from a data set, float32 in 0..1 once prepared for the model
    infrared    (3, H, W) like visible, pixel for pixel registered with it (as far as the cameras are); three equal
                channels
    boxes       (N, 4) float32, x1 y1 x2 y2 in pixels of the visible image, 0 <= x1 < x2 <= W
    labels      (N,) int64, starting at 1 (0 is the background)
    ignore      (N,) bool: neither a target in training nor a miss or a false alarm in evaluation
    image_id    int, the position in the data set
    path        str, the visible file (a name of its own for drawn images)
    scene       int, the same for pairs taken by one camera (-1: not known)

and, where the data set knows them,

    visible_in  (N, 2) bool: the object can be seen in visible light, in infrared
    occlusion   (N,) int64: 0 none, 1 partial, 2 heavy
    daytime     bool
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainkit.errors import InputError
from trainkit.files import IMAGE_SUFFIXES, is_image, open_image
from trainkit.files import MAX_PIXELS as MAX_PIXELS

PER_BOX = ("boxes", "labels", "ignore", "visible_in", "occlusion")


def read_image(path: str | Path) -> Tensor:
    """Decodes an image file of 8 bits a channel to (3, H, W) uint8 RGB; grey is repeated three times.

    Raises InputError as `trainkit.files.open_image` does.
    """
    pixels = np.array(open_image(path))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W), channels last in memory, which resizes fastest


def check_same_size(*, visible: Tensor, infrared: Tensor, visible_path: str | Path, infrared_path: str | Path) -> None:
    """Raises InputError unless both images have the same height and width."""
    if visible.shape != infrared.shape:
        sizes = [f"{image.shape[2]} x {image.shape[1]}" for image in (visible, infrared)]
        raise InputError(
            f"{visible_path} is {sizes[0]} but {infrared_path} is {sizes[1]}; expected a registered pair of one size"
        )


def read_pair(visible_path: str | Path | None, infrared_path: str | Path | None, *, image_id: int = 0) -> dict:
    """Reads one pair, or one image where the other path is None, as a sample without boxes for inference.

    The absent modality is None in the sample. Raises InputError as read_image does, and when the sizes differ.
    """
    if visible_path is None and infrared_path is None:
        raise ValueError("read_pair needs a visible or an infrared path")
    visible = None if visible_path is None else read_image(visible_path)
    infrared = None if infrared_path is None else read_image(infrared_path)
    if visible is not None and infrared is not None:
        check_same_size(visible=visible, infrared=infrared, visible_path=visible_path, infrared_path=infrared_path)
    return {
        "visible": visible,
        "infrared": infrared,
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "ignore": torch.zeros(0, dtype=torch.bool),
        "image_id": image_id,
        "path": str(infrared_path if visible_path is None else visible_path),
        "scene": -1,
    }


def find_pairs(visible: str | Path | None, infrared: str | Path | None) -> list[tuple[Path | None, Path | None]]:
    """Lists (visible, infrared) image paths of two folders, matched by file name without suffix, in name order.

    Either argument may be None (a single modality), or both may be one image file each (any names). Raises InputError
    for a missing path, a folder without images, two images of one stem, an image whose partner is missing, and where
    every picture is its own partner.
    """
    if visible is None and infrared is None:
        raise ValueError("find_pairs needs a visible or an infrared path")
    both = [None if path is None else Path(path) for path in (visible, infrared)]
    given = [path for path in both if path]
    for path in given:
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist; expected an image or a folder of images")
    if len({path.is_dir() for path in given}) == 2:
        raise InputError(f"{given[0]} and {given[1]} are a file and a folder; expected two files or two folders")
    pairs = [tuple(both)]
    if given[0].is_dir():
        images = {folder: images_by_stem(folder) for folder in given}
        for folder, other in zip(given, given[::-1], strict=True):
            if not images[folder]:
                raise InputError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            for stem, name in images[folder].items():
                if stem not in images[other]:
                    raise InputError(f"{folder / name} has no partner named {stem}.* in {other}")
        pairs = [tuple(folder and folder / images[folder][stem] for folder in both) for stem in images[given[0]]]
    if len(given) == 2 and all(os.path.samefile(*pair) for pair in pairs):  # whatever links lead there
        raise InputError(f"{given[0]} and {given[1]} are the same pictures; expected visible and infrared ones")
    return pairs


def files_in(folder: Path) -> set[str]:
    """The names of the files in a folder, through links too; none where it does not exist."""
    with os.scandir(folder) if folder.is_dir() else contextlib.nullcontext(()) as entries:
        return {one.name for one in entries if one.is_file(follow_symlinks=False) or os.path.isfile(one.path)}


def images_by_stem(folder: Path) -> dict[str, str]:
    """The images in a folder, without suffix -> their names, in order. Raises InputError for two of one stem."""
    images = {}
    for name in sorted(filter(is_image, files_in(folder))):
        other = images.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise InputError(f"{folder} holds both {other} and {name}; expected one a name")
    return dict(sorted(images.items()))
