"""The sample that every data set, the augmentation and inference share, its batches, and the readers of its images.

A sample is a dict:

    visible     (3, H, W) uint8 from a data set, float32 in 0..1 once prepared for the model
    infrared    (3, H, W) like visible, registered with it as far as the cameras are; three equal channels
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
    """An image file as (3, H, W) uint8 RGB, grey repeated three times; refused is what `files.open_image` refuses."""
    pixels = np.array(open_image(path))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W), channels last in memory, which resizes fastest


def read_pair(visible: str | Path | None, infrared: str | Path | None) -> dict[str, Tensor | None]:
    """The images of a sample. One path may be None, and so is its image then; raises InputError if sizes differ."""
    pair = {"visible": visible, "infrared": infrared}
    pair = {modality: None if path is None else read_image(path) for modality, path in pair.items()}
    sizes = [f"{image.shape[2]} x {image.shape[1]}" for image in pair.values() if image is not None]
    if len(set(sizes)) > 1:
        raise InputError(
            f"{visible} is {sizes[0]} but {infrared} is {sizes[1]}; expected a registered pair of one size"
        )
    return pair


def find_pairs(visible: str | Path | None, infrared: str | Path | None) -> list[tuple[Path | None, Path | None]]:
    """The (visible, infrared) image paths of two folders, matched by file name without suffix, in name order.

    One argument may be None (a single modality), or both may be an image file each, of any names. Raises InputError for
    a missing path, a folder without images, an image without partner, and pictures that are their own partners.
    """
    both = [None if path is None else Path(path) for path in (visible, infrared)]
    given = [path for path in both if path is not None]
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


def collate(samples: list[dict]) -> dict:
    """A batch of samples: a dict of lists, as images may differ in size until the model pads them.

    visible, infrared: (3, H_i, W_i) float32 images, what a detector takes as keywords of these names
    targets: dicts of what the samples know of PER_BOX, and as () int64 the scene and, if any, the domain
    image_id, path, scene, daytime: as in the samples; daytime is None where it is not known
    """
    batch = {key: [sample[key] for sample in samples] for key in ("visible", "infrared", "image_id", "path", "scene")}
    batch["daytime"] = [sample.get("daytime") for sample in samples]
    batch["targets"] = [
        {key: sample[key] for key in PER_BOX if key in sample}
        | {key: torch.tensor(sample[key]) for key in ("scene", "domain") if key in sample}
        for sample in samples
    ]
    return batch
