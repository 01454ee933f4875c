"""Records to samples to batches: images read, boxes checked, every distinct text tokenised once."""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fgclip.data import Record, Region
from fgclip.images import preprocess
from fgclip.losses import caption_ids
from fgclip.regions import BoxStatistics, usable_boxes
from fgclip.tokenizer import Tokenizer
from trainkit.errors import InputError


@dataclass
class Sample:
    """One image with the texts drawn for it: pixels (3, S, S), boxes (n, 4) and for each box a phrase and its hard
    group, the phrase that was altered followed by its alterations (empty where there are none)."""

    pixels: Tensor
    short: str | None
    long: str
    boxes: Tensor
    phrases: list[str]
    hard: list[list[str]]
    label: int
    source: str


def usable_regions(record: Record, most: int | None = None, statistics: BoxStatistics | None = None):
    """The boxes (n, 4) of the first `most` usable regions, clipped, and these regions."""
    boxes = torch.tensor([region.box for region in record.regions], dtype=torch.float32).view(-1, 4)
    boxes, kept = usable_boxes(boxes, statistics)
    regions = [region for region, keep in zip(record.regions, kept.tolist(), strict=True) if keep]
    return boxes[:most], regions[:most]


class RegionDataset(Dataset):
    """Samples of records whose images lie below a folder.

    Keys are indices, or pairs (epoch, index) as `trainkit.sampler` makes them: which of several captions and phrases is
    drawn depends on (seed, epoch, index) alone, so workers do not matter.
    max_regions: the first so many usable boxes of an image are taken. image_size: side in pixels of the square.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_root: str | Path,
        *,
        image_size: int,
        max_regions: int | None = 4,
        seed: int = 0,
    ):
        self.records, self.image_root, self.image_size = records, Path(image_root), image_size
        self.max_regions, self.seed = max_regions, seed

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> Record:
        """Captions, boxes and phrases of an image, without reading it."""
        return self.records[index]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.record(index)
        pixels = preprocess(record.picture(self.image_root), self.image_size)
        return make_sample(record, pixels, random.Random(f"{self.seed} {epoch} {index}"), self.max_regions)


def make_sample(record: Record, pixels: Tensor, draw: random.Random, max_regions: int | None) -> Sample:
    boxes, regions = usable_regions(record, max_regions)
    return Sample(
        pixels=pixels,
        short=draw.choice(record.short) if record.short else None,
        long=record.long,
        boxes=boxes,
        phrases=[draw.choice(region.phrases) for region in regions],
        hard=[hard_group(region) for region in regions],
        label=record.label,
        source=record.source,
    )


def hard_group(region: Region) -> list[str]:
    return [region.phrases[0], *region.negatives] if region.negatives else []


def evenly(records: Sequence, most: int) -> Sequence:
    """At most so many of the records, evenly spaced over all."""
    if len(records) <= most:
        return records
    return Subset(records, np.linspace(0, len(records) - 1, most).round().astype(np.int64))


def image_ids(records: Sequence[Record], image_root: str | Path = "") -> np.ndarray:
    """A number (n,) int64 for each record, the same for the same image below the folder, however its path is spelt."""
    root, image = os.path.realpath(image_root), getattr(records, "image", lambda index: records[index].image)
    paths = (os.path.normpath(os.path.join(root, image(i))) for i in range(len(records)))
    return np.fromiter(map(hash, paths), dtype=np.int64, count=len(records))


def hold_out(records: Sequence[Record], share: float, most: int) -> tuple[Sequence, Sequence]:
    """Training and validation records: the latter show this share of the images, evenly spaced, at least 1 and at most
    so many, each in one record; no record of the former shows one of them.

    Raises InputError where that leaves none to train on.
    """
    _, first, image = np.unique(image_ids(records), return_index=True, return_inverse=True)
    count = min(most, max(1, round(share * len(first))))
    if count >= len(first):
        raise InputError(f"{len(first)} annotated images are too few to train on and hold {count} out")
    held_out = np.sort(first)[np.linspace(0, len(first) - 1, count).round().astype(np.int64)]
    rest = np.flatnonzero(~np.isin(image, image[held_out]))
    return Subset(records, rest), Subset(records, held_out)


class Texts:
    """Distinct texts in the order of their first use."""

    def __init__(self):
        self.rows: dict[str, int] = {}

    def index(self, texts: Iterable[str]) -> Tensor:
        """The row of every text (n,) int64."""
        return torch.tensor([self.rows.setdefault(text, len(self.rows)) for text in texts], dtype=torch.int64)

    def tokens(self, tokenizer: Tokenizer, context_length: int) -> tuple[Tensor, Tensor]:
        """Tokens (U, L), cut to the longest text of the batch, and their `caption_ids` (U,)."""
        tokens = tokenizer(list(self.rows), context_length)
        longest = int((tokens == tokenizer.eos_id).int().argmax(dim=1).max()) + 1 if len(tokens) else 1
        return tokens[:, :longest], caption_ids(tokens, tokenizer.eos_id)


class Collate:
    """A list of samples to the dict that `FGCLIP.forward` and the losses take.

    Beside what forward takes it holds short_ids (U,) and long_ids (V,), the `caption_ids`; labels (B,), region_labels
    (R,); hard_regions (K,), rows of the regions with hard negatives, hard_counts (K,), texts of each in `hard`;
    truncated, how many distinct texts were cut; sources, what names each image.

    regions, hard: whether the batch has them at all; long_context_length None: it has no long texts. Without captions
    (FG-OVD) it has neither short nor long ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context_length: int = 77,
        long_context_length: int | None = 248,
        regions: bool = True,
        hard: bool = True,
    ):
        self.tokenizer, self.regions, self.hard = tokenizer, regions, hard
        self.context_length, self.long_context_length = context_length, long_context_length

    def __call__(self, samples: Sequence[Sample]) -> dict:
        truncated = self.tokenizer.truncated
        batch = dict(
            pixels=torch.stack([s.pixels for s in samples]),  # (B, 3, S, S)
            labels=torch.tensor([s.label for s in samples]),
            sources=[s.source for s in samples],
        )
        short, captioned = Texts(), all(s.short is not None for s in samples)
        if captioned:
            batch["short"] = short.index(s.short for s in samples)
        if self.regions:
            batch |= self.collate_regions(samples, short)
        batch["short_texts"], batch["short_ids"] = short.tokens(self.tokenizer, self.context_length)
        if captioned and self.long_context_length is not None:
            long = Texts()
            batch["long"] = long.index(s.long for s in samples)
            batch["long_texts"], batch["long_ids"] = long.tokens(self.tokenizer, self.long_context_length)
        return batch | dict(truncated=self.tokenizer.truncated - truncated)

    def collate_regions(self, samples: Sequence[Sample], texts: Texts) -> dict:
        groups = [group if self.hard else [] for s in samples for group in s.hard]
        kept = [i for i, group in enumerate(groups) if group]
        return dict(
            boxes=[s.boxes for s in samples],
            region=texts.index(phrase for s in samples for phrase in s.phrases),
            region_labels=torch.tensor([s.label for s in samples for _ in s.phrases], dtype=torch.int64),
            hard=texts.index(text for i in kept for text in groups[i]),
            hard_regions=torch.tensor(kept, dtype=torch.int64),
            hard_counts=torch.tensor([len(groups[i]) for i in kept], dtype=torch.int64),
        )


@dataclass
class DataStatistics:
    """What a pass over the annotations finds, images unread."""

    images: int = 0
    regions: int = 0
    images_without_regions: int = 0
    regions_with_negatives: int = 0
    negatives: int = 0
    abnormal: int = 0
    truncated_short: int = 0
    truncated_long: int = 0
    phrases: set[str] = field(default_factory=set)
    captions: set[str] = field(default_factory=set)
    boxes: BoxStatistics = field(default_factory=BoxStatistics)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.images} images with {len(self.captions)} distinct captions, {self.abnormal} of them abnormal",
                f"{self.regions} usable regions with {len(self.phrases)} distinct phrases; "
                f"{self.images_without_regions} images have none",
                f"{self.regions_with_negatives} regions with hard negatives, {self.negatives} negatives in all",
                str(self.boxes),
                f"cut to the text length: {self.truncated_short} short texts, {self.truncated_long} long captions",
            ]
        )


def data_statistics(
    records: Iterable[Record],
    tokenizer: Tokenizer | None,
    *,
    context_length: int = 77,
    long_context_length: int | None = 248,
    progress: Callable[[Iterable[Record]], Iterable[Record]] = iter,
) -> DataStatistics:
    """Reads every record given, which also finds the first that does not follow its schema (InputError).

    Without a tokenizer the length of the texts is left out.
    """
    found, lengths = DataStatistics(), {}

    def cut(text: str, limit: int) -> bool:
        if text not in lengths:
            lengths[text] = len(tokenizer.encode(text))
        return lengths[text] > limit - 2

    for record in progress(records):
        _, regions = usable_regions(record, statistics=found.boxes)
        found.images += 1
        found.abnormal += record.label == 1
        found.regions += len(regions)
        found.images_without_regions += not regions
        found.captions.update(record.short)
        for region in regions:
            found.phrases.update(region.phrases)
            found.regions_with_negatives += bool(region.negatives)
            found.negatives += len(region.negatives)
        if tokenizer is None:
            continue
        texts = [*record.short, *(text for r in regions for text in (*r.phrases, *r.negatives))]
        found.truncated_short += sum(cut(text, context_length) for text in texts)
        if long_context_length is not None:
            found.truncated_long += cut(record.long, long_context_length)
    return found
