"""The sample that data sets, augmentation and inference share, its batches, and the readers of its images.

A sample is a dict:

    visible     (3, H, W) uint8 from a data set, float32 in 0..1 for the model
    infrared    (3, H, W) like visible and registered with it; three equal channels
    boxes       (N, 4) float32, x1 y1 x2 y2 in pixels of the visible image, 0 <= x1 < x2 <= W
    labels      (N,) int64, from 1 (0 is the background)
    ignore      (N,) bool: no target in training, neither miss nor false alarm in evaluation
    image_id    int, the position in the data set
    path        str, the visible file
    scene       int, the same for pairs of one camera (-1: unknown)

and, where known,

    visible_in  (N, 2) bool: seen in visible light, in infrared
    occlusion   (N,) int64: 0 none, 1 partial, 2 heavy
    daytime     bool

where each camera has labels of its own

    boxes_infrared  (N, 4) like `boxes`, which are visible's; what one camera alone shows has its box in both
    boxes_of    "visible", "infrared" or "both": whose boxes are detected

and of one camera alone

    present     (2,) bool: which; the other image is black, and masked wherever images are fused
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from trainkit.errors import InputError
from trainkit.files import open_image

PER_BOX = ("boxes", "boxes_infrared", "labels", "ignore", "visible_in", "occlusion")
BOXES = ("visible", "infrared", "both")


def read_image(path: str | Path, levels: tuple[float, float] | None = None, at_least: int | None = None) -> Tensor:
    """An image file as (3, H, W) uint8 RGB, grey repeated three times. The rest: see `files.open_image`."""
    pixels = np.array(open_image(path, levels=levels, at_least=at_least))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W), channels last in memory, which resizes fastest


def to_float(image: Tensor) -> Tensor:
    """uint8 of 0..255 to float32 of 0..1, which stays as it is."""
    return to_dtype(image, torch.float32, scale=True)


def read_pair(
    visible: str | Path | None, infrared: str | Path | None, onto=None, at_least: int | None = None
) -> dict[str, Tensor | None]:
    """The images of a sample; that of a path of None is None. Raises InputError if sizes differ.

    onto: how infrared is read and put onto visible, see `macl.data.onto`; None: as it is
    at_least: see `files.open_image`
    """
    paths = {"visible": visible, "infrared": infrared}
    levels = {"visible": None, "infrared": onto and onto.levels}
    images = {name: path and read_image(path, levels[name], at_least) for name, path in paths.items()}
    if at_least is not None and len({image.shape for image in images.values() if image is not None}) > 1:
        return read_pair(visible, infrared, onto)  # one of them is no JPEG
    return put_together(images, paths, onto)


def put_together(images: dict[str, Tensor | None], names: dict, onto=None) -> dict[str, Tensor | None]:
    """Decoded images (3, H, W) as `read_pair` returns them. names: of the images, for the InputError."""
    if onto is not None and not any(image is None for image in images.values()):
        images = images | {"infrared": onto.image(images["infrared"], tuple(images["visible"].shape[:0:-1]))}
    sizes = [f"{image.shape[2]} x {image.shape[1]}" for image in images.values() if image is not None]
    if len(set(sizes)) > 1:
        problem = f"{names['visible']} is {sizes[0]} but {names['infrared']} is {sizes[1]}"
        raise InputError(f"{problem}; expected a registered pair, or --infrared-to-visible resize or FILE")
    return images


def moved(images: dict[str, Tensor], move: tuple[int, int] | Callable) -> dict[str, Tensor]:
    """The images (3, H, W) by modality, infrared moved by whole pixels. Its border is repeated where nothing comes in.

    move: (x, y) to the right and down, or a function of `images` that returns them
    """
    x, y = move(images) if callable(move) else move
    if x == y == 0:
        return images
    image = images["infrared"]
    rows, columns = ((torch.arange(n) - by).clamp(0, n - 1) for n, by in zip(image.shape[1:], (y, x), strict=True))
    return images | {"infrared": image[:, rows[:, None], columns]}


def collate(samples: list[dict]) -> dict:
    """A batch of samples: a dict of lists, as images may differ in size.

    visible, infrared: (3, H_i, W_i) float32 images of 0..1
    targets: dicts of the known keys of PER_BOX, see `_target`, and as tensors scene, domain, daytime and present
    image_id, path, scene: as in the samples
    """
    batch = {key: [sample[key] for sample in samples] for key in ("image_id", "path", "scene")}
    images = {name: [to_float(sample[name]) for sample in samples] for name in ("visible", "infrared")}
    return batch | images | {"targets": [_target(sample) for sample in samples]}


def _target(sample: dict) -> dict:
    """What detection learns and is scored with, as `boxes_of` says; `own_boxes` (N, 2, 4) are those of each camera."""
    target = {key: sample[key] for key in PER_BOX if key in sample and key != "boxes_infrared"}
    target |= {key: torch.as_tensor(sample[key]) for key in ("scene", "domain", "daytime", "present") if key in sample}
    if "boxes_infrared" in sample:
        target["own_boxes"] = own = torch.stack([sample["boxes"], sample["boxes_infrared"]], dim=1)
        which = BOXES.index(sample["boxes_of"])
        if which == 2:
            target["boxes"] = own.mean(dim=1)
        else:
            target |= {"boxes": own[:, which], "ignore": sample["ignore"] | ~sample["visible_in"][:, which]}
    return target
