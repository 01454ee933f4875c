"""Augmentation of a pair: geometry drawn once for both images and the boxes, photometry for each modality alone."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from macl.data.sample import PER_BOX, to_float

BOXES = ("boxes", "boxes_infrared")
MIN_SHOWN = 0.3  # a box that keeps less of its area is ignored


@dataclass(kw_only=True)
class PairedAugmentation:
    """Turns a uint8 sample into an augmented float32 sample in 0..1; draws from torch's global generator.

    A crop holds at least one box that is not ignored, whole if it fits. A box that keeps less than MIN_SHOWN of its
    area is ignored; one of less than a pixel is removed.
    """

    flip: float = 0.5  # probability of a horizontal flip
    crop: float = 0.0  # probability of a crop
    crop_scale: tuple[float, float] = (0.6, 1.0)  # range of its sides, as shares of the image's
    brightness: float = 0.0  # these four of visible, as in torchvision's ColorJitter
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gain: float = 0.0  # infrared becomes a * infrared + b + n with a in 1 +- gain, ...
    offset: float = 0.0  # ... b in +- offset, ...
    noise: float = 0.0  # ... and n normal with a standard deviation of up to noise

    def __call__(self, sample: dict) -> dict:
        pair = {modality: tv_tensors.Image(sample[modality]) for modality in ("visible", "infrared")}
        options = dict(format="XYXY", canvas_size=tuple(sample["visible"].shape[-2:]))
        pair |= {key: tv_tensors.BoundingBoxes(sample[key], **options) for key in BOXES if key in sample}
        shown = torch.ones(len(sample["boxes"]))
        if self.crop > 0 and float(torch.rand(())) < self.crop:
            before = box_area(sample["boxes"])
            window = _crop_window(sample, self.crop_scale)
            pair = {key: F.crop(value, *window) for key, value in pair.items()}
            shown = box_area(pair["boxes"].as_subclass(Tensor)) / before
        pair = {key: value.as_subclass(Tensor) for key, value in v2.RandomHorizontalFlip(self.flip)(pair).items()}
        visible = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)(to_float(pair["visible"]))
        infrared = to_float(pair["infrared"])
        if self.gain or self.offset or self.noise:
            gain, offset = 1 + _uniform(-self.gain, self.gain), _uniform(-self.offset, self.offset)
            infrared = infrared * gain + offset
            if self.noise:  # the same in the three equal channels
                infrared += _uniform(0, self.noise) * torch.randn(infrared.shape[-2:])
            infrared = infrared.clamp(0, 1)
        augmented = sample | pair | {"visible": visible, "infrared": infrared}
        augmented["ignore"] = sample["ignore"] | (shown < MIN_SHOWN)
        keep = torch.stack([pair[key][:, 2:] - pair[key][:, :2] >= 1 for key in BOXES if key in pair]).all(2).all(0)
        return augmented | {key: augmented[key][keep] for key in PER_BOX if key in augmented}


class AugmentedDataset(Dataset):
    """uint8 samples seen through a PairedAugmentation; the keys are (epoch, index).

    The draws follow from (seed, epoch, index) alone, and the caller's random state stays as it was.
    """

    def __init__(self, dataset: Dataset, transform: PairedAugmentation, *, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed[0]))  # torch.manual_seed would reach the GPUs' generators
            return self.transform(self.dataset[index])


def _crop_window(sample: dict, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """top, left, height, width of a random crop around one of the boxes that are not ignored."""
    height, width = sample["visible"].shape[-2:]
    crop_height, crop_width = (max(1, round(_uniform(*scale) * side)) for side in (height, width))
    wanted = sample["boxes"][~sample["ignore"]]
    x1, y1, x2, y2 = wanted[int(torch.randint(len(wanted), ()))].tolist() if len(wanted) else (0, 0, width, height)
    top, left = _crop_start(y1, y2, crop_height, height), _crop_start(x1, x2, crop_width, width)
    return top, left, crop_height, crop_width


def _crop_start(low: float, high: float, length: int, size: int) -> int:
    """A random start of a window of `length` in `size` that holds low..high, or lies within it when it is longer."""
    first, last = sorted((high - length, low))
    first, last = (min(max(start, 0), size - length) for start in (math.ceil(first), math.floor(last)))
    return first + int(_uniform(0, max(0, last - first) + 1))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
