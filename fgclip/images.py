"""Image files to pixels, as CLIP wants them."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fgclip.errors import InputError
from fgclip.model import PIXEL_MEAN, PIXEL_STD


def inside(root: Path, name: str, source: str) -> Path:
    """root / name. Raises InputError where the name, which stands in a data file, is absolute or leaves the root."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{source}: the path {name!r} must be relative and stay below {root}")
    return root / name


def read_image(path: str | Path, source: str = "") -> Image.Image:
    """An RGB image. Raises InputError on a file that is missing, damaged or oversized; `source` says what named it."""
    named = f"{path} (named by {source})" if source else str(path)
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            # A palette with transparency cannot become RGB directly.
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{named} does not exist{'; is the image root right?' if source else ''}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{named} is too large; expected at most {Image.MAX_IMAGE_PIXELS} pixels") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise InputError(f"{named} is not a readable image ({type(error).__name__})") from error


def preprocess(image: Image.Image, size: int, crop: bool = False) -> Tensor:
    """Normalised pixels (3, size, size), float32.

    The image is squashed to a square as in FG-CLIP, so that boxes need no change, or with `crop` its short side is
    scaled to size and the centre kept as in CLIP. Bicubic.
    """
    if crop:
        short, long = sorted(image.size)
        other = int(size * long / short)
        image = image.resize((size, other) if image.width <= image.height else (other, size), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, S, S)
    return normalise(pixels)


def normalise(pixels: Tensor) -> Tensor:
    """Colours (..., 3, H, W) in 0..1 to what the model reads."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std
