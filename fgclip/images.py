"""Pictures to pixels, as CLIP wants them."""

import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from fgclip.model import PIXEL_MEAN, PIXEL_STD

MAX_RATIO = 20  # of a longer strip only the centre is scaled


def preprocess(image: Image.Image, size: int, crop: bool = False) -> Tensor:
    """Normalised pixels (3, size, size), float32, resized bicubically.

    The image is squashed to a square as in FG-CLIP, so that boxes stay valid. With `crop` its short side is scaled to
    size and the centre kept, as in CLIP.
    """
    image = image.convert("RGB")
    if crop:
        longest = MAX_RATIO * min(image.size)
        image = F.center_crop(image, [min(image.height, longest), min(image.width, longest)])
        image = F.resize(image, [size], InterpolationMode.BICUBIC)
        image = F.center_crop(image, [size, size])
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return normalise(F.pil_to_tensor(image).float() / 255)  # (3, S, S)


def normalise(pixels: Tensor) -> Tensor:
    """Colours (..., 3, H, W) in 0..1 to what the model reads."""
    return F.normalize(pixels, PIXEL_MEAN, PIXEL_STD)
