"""What a pass over the annotations finds, images unread."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

from fgclip.data.dataset import usable_regions
from fgclip.data.records import Record
from fgclip.regions import BoxStatistics
from fgclip.tokenizer import Tokenizer


@dataclass
class DataStatistics:
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
        return (
            f"{self.images} images with {len(self.captions)} distinct captions, {self.abnormal} of them abnormal\n"
            f"{self.regions} usable regions with {len(self.phrases)} distinct phrases; "
            f"{self.images_without_regions} images have none\n"
            f"{self.regions_with_negatives} regions with hard negatives, {self.negatives} negatives in all\n"
            f"{self.boxes}\n"
            f"cut to the text length: {self.truncated_short} short texts, {self.truncated_long} long captions"
        )


def data_statistics(
    records: Iterable[Record],
    tokenizer: Tokenizer | None,
    *,
    context_length: int = 77,
    long_context_length: int | None = 248,
) -> DataStatistics:
    """Reads every record given, which also finds the first that does not follow its schema (InputError).

    Without a tokenizer the length of the texts is left out.
    """
    found, length = DataStatistics(), functools.cache(lambda text: len(tokenizer.encode(text)) + 2)
    for record in records:
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
        if tokenizer is not None:
            texts = [*record.short, *(text for r in regions for text in (*r.phrases, *r.negatives))]
            found.truncated_short += sum(length(text) > context_length for text in texts)
            found.truncated_long += long_context_length is not None and length(record.long) > long_context_length
    return found
