"""Image files to pixels, as CLIP wants them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fgclip.model import PIXEL_MEAN, PIXEL_STD
from trainkit.files import MAX_PIXELS, inside, open_image

__all__ = ["inside", "normalise", "preprocess", "read_image"]


def read_image(path: str | Path, source: str = "") -> Image.Image:
    """An RGB image; `source` says what named it. Raises InputError as `trainkit.files.open_image` does."""
    return open_image(path, source)


def preprocess(image: Image.Image, size: int, crop: bool = False) -> Tensor:
    """Normalised pixels (3, size, size), float32.

    The image is squashed to a square as in FG-CLIP, so that boxes need no change, or with `crop` its short side is
    scaled to size and the centre kept as in CLIP. Bicubic.
    """
    if crop:
        short, long = sorted(image.size)
        other = int(size * long / short)
        width, height = (size, other) if image.width <= image.height else (other, size)
        left, top = round((width - size) / 2), round((height - size) / 2)  # halves to the even side, as in torchvision
        box = (left, top, left + size, top + size)
        if width * height <= MAX_PIXELS:
            image = image.resize((width, height), Image.Resampling.BICUBIC).crop(box)
        else:  # so long a strip that only its centre is made, off by rounding from what the whole would give
            across, down = image.width / width, image.height / height
            box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, S, S)
    return normalise(pixels)


def normalise(pixels: Tensor) -> Tensor:
    """Colours (..., 3, H, W) in 0..1 to what the model reads."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std
