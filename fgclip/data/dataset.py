"""Records to samples, which records are held out, and what all records hold."""

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fgclip.data.records import Record, Region
from fgclip.images import preprocess
from fgclip.regions import BoxStatistics, usable_boxes
from trainkit.errors import InputError


@dataclass
class Sample:
    """One image with the texts drawn for it.

    boxes: (n, 4), xyxy in fractions. phrases: one per box.
    hard: per box the phrase that was altered and its alterations, empty where there are none.
    short: None without captions. pixels: (3, S, S), None where the sample is only described.
    """

    record: Record
    short: str | None
    boxes: Tensor
    phrases: list[str]
    hard: list[list[str]]
    pixels: Tensor | None = None


def usable_regions(
    record: Record, most: int | None = None, statistics: BoxStatistics | None = None
) -> tuple[Tensor, list[Region]]:
    """The boxes (n, 4) of the first `most` usable regions, clipped, and these regions."""
    boxes = torch.tensor([region.box for region in record.regions], dtype=torch.float32).view(-1, 4)
    boxes, kept = usable_boxes(boxes, statistics)
    regions = [region for region, keep in zip(record.regions, kept.tolist(), strict=True) if keep]
    return boxes[:most], regions[:most]


def draw_sample(record: Record, draw: random.Random, max_regions: int | None = None) -> Sample:
    """A sample without pixels; of several short captions, and of several phrases of a region, one is drawn."""
    boxes, regions = usable_regions(record, max_regions)
    short = draw.choice(record.short) if record.short else None
    phrases = [draw.choice(region.phrases) for region in regions]
    hard = [[region.phrases[0], *region.negatives] if region.negatives else [] for region in regions]
    return Sample(record, short, boxes, phrases, hard)


class RegionDataset(Dataset):
    """Samples of records whose images lie below a folder.

    Keys are indices, or pairs (epoch, index) as `trainkit.sampler` makes them. Draws depend on (seed, epoch, index).
    image_size: side of the square in pixels.
    max_regions: take the first so many usable boxes of an image.
    crop: as in `preprocess`; goes with max_regions=0.
    """

    def __init__(
        self, records: Sequence[Record], image_root: str | Path, *, image_size: int, max_regions: int | None = 4,
        seed: int = 0, crop: bool = False,
    ):  # fmt: skip
        self.records, self.image_root, self.image_size = records, Path(image_root), image_size
        self.max_regions, self.seed, self.crop = max_regions, seed, crop

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> Record:
        """Captions, boxes and phrases of an image, without reading it."""
        return self.records[index]

    def describe(self, key: int | tuple[int, int]) -> Sample:
        """The sample without pixels."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return draw_sample(self.record(index), random.Random(f"{self.seed} {epoch} {index}"), self.max_regions)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        sample = self.describe(key)
        return replace(sample, pixels=preprocess(sample.record.picture(self.image_root), self.image_size, self.crop))


def evenly(records: Sequence, most: int) -> Sequence:
    """At most so many of the records, evenly spaced over all."""
    if len(records) <= most:
        return records
    return Subset(records, np.linspace(0, len(records) - 1, most).round().astype(np.int64))


def image_ids(records: Sequence[Record], image_root: str | Path = "") -> np.ndarray:
    """A number (n,) int64 per record, the same for the same image below the folder, however its path is spelt."""
    root, image = os.path.realpath(image_root), getattr(records, "image", lambda index: records[index].image)
    paths = (os.path.normpath(os.path.join(root, image(i))) for i in range(len(records)))
    return np.fromiter(map(hash, paths), dtype=np.int64, count=len(records))


def hold_out(records: Sequence[Record], share: float, most: int) -> tuple[Sequence, Sequence]:
    """Training and validation records, without an image in common; validation takes at most so many images."""
    _, first, image = np.unique(image_ids(records), return_index=True, return_inverse=True)
    count = min(most, max(1, round(share * len(first))))
    if count >= len(first):
        raise InputError(f"{len(first)} annotated images are too few to train on and hold {count} out")
    held_out = np.sort(first)[np.linspace(0, len(first) - 1, count).round().astype(np.int64)]
    rest = np.flatnonzero(~np.isin(image, image[held_out]))
    return Subset(records, rest), Subset(records, held_out)


@dataclass
class DataStatistics:
    images: int = 0
    regions: int = 0
    images_without_regions: int = 0
    regions_with_negatives: int = 0
    negatives: int = 0
    abnormal: int = 0
    phrases: set[str] = field(default_factory=set)
    captions: set[str] = field(default_factory=set)
    boxes: BoxStatistics = field(default_factory=BoxStatistics)

    def __str__(self) -> str:
        return (
            f"{self.images} images with {len(self.captions)} distinct captions, {self.abnormal} of them abnormal\n"
            f"{self.regions} usable regions with {len(self.phrases)} distinct phrases; "
            f"{self.images_without_regions} images have none\n"
            f"{self.regions_with_negatives} regions with hard negatives, {self.negatives} negatives in all\n"
            f"{self.boxes}"
        )


def data_statistics(records: Iterable[Record]) -> DataStatistics:
    """Reads every record given, and so finds the first that does not follow its schema."""
    counts = DataStatistics()
    for record in records:
        _, regions = usable_regions(record, statistics=counts.boxes)
        counts.images += 1
        counts.abnormal += record.label == 1
        counts.regions += len(regions)
        counts.images_without_regions += not regions
        counts.captions.update(record.short)
        for region in regions:
            counts.phrases.update(region.phrases)
            counts.regions_with_negatives += bool(region.negatives)
            counts.negatives += len(region.negatives)
    return counts
