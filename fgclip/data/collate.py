"""Samples to batches: every distinct text is tokenised once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fgclip.data.dataset import Sample
from fgclip.losses import caption_ids
from fgclip.tokenizer import Tokenizer
from trainkit.errors import InputError


class Texts:
    """Distinct texts in the order of their first use."""

    def __init__(self):
        self.rows: dict[str, int] = {}

    def index(self, texts: Iterable[str]) -> Tensor:
        """The row of every text (n,) int64."""
        return torch.tensor([self.rows.setdefault(text, len(self.rows)) for text in texts], dtype=torch.int64)

    def tokens(self, tokenizer: Tokenizer, context_length: int) -> tuple[Tensor, Tensor]:
        """Tokens (U, L), cut to the longest of the texts, and their `caption_ids` (U,)."""
        tokens = tokenizer(list(self.rows), context_length)
        longest = max((tokens == tokenizer.eos_id).int().argmax(dim=1).tolist(), default=0) + 1
        return tokens[:, :longest], caption_ids(tokens, tokenizer.eos_id)


class Collate:
    """A list of samples to the dict that `FGCLIP.forward` and the losses take.

    Beside what forward takes it holds
        short_ids (U,) and long_ids (V,), the `caption_ids`;
        labels (B,) and region_labels (R,), the classes;
        hard_regions (K,), rows of the regions with hard negatives; hard_counts (K,), their texts in `hard`;
        truncated, how many distinct texts were cut; sources, what names each image;
        damaged, what is wrong with the samples that were left out, of `ShardDataset`.
    regions, hard: whether the batch has them. long_context_length: None leaves out the long texts.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, context_length: int = 77, long_context_length: int | None = 248,
        regions: bool = True, hard: bool = True,
    ):  # fmt: skip
        self.tokenizer, self.regions, self.hard = tokenizer, regions, hard
        self.context_length, self.long_context_length = context_length, long_context_length

    def __call__(self, samples: Sequence[Sample | InputError]) -> dict:
        damaged = [str(sample) for sample in samples if isinstance(sample, InputError)]
        samples = [sample for sample in samples if not isinstance(sample, InputError)]
        if not samples:
            raise InputError(f"not one sample of a batch can be read, and the first because: {damaged[0]}")
        truncated, short, long = self.tokenizer.truncated, Texts(), Texts()
        batch = dict(
            pixels=torch.stack([s.pixels for s in samples]),  # (B, 3, S, S)
            labels=torch.tensor([s.record.label for s in samples]),
            sources=[s.record.source for s in samples],
        )
        batch["short"] = short.index(s.short for s in samples)
        if self.regions:
            groups = [group if self.hard else [] for s in samples for group in s.hard]
            kept = [i for i, group in enumerate(groups) if group]
            batch |= dict(
                boxes=[s.boxes for s in samples],
                region=short.index(phrase for s in samples for phrase in s.phrases),
                region_labels=torch.tensor([s.record.label for s in samples for _ in s.phrases], dtype=torch.int64),
                hard=short.index(text for i in kept for text in groups[i]),
                hard_regions=torch.tensor(kept, dtype=torch.int64),
                hard_counts=torch.tensor([len(groups[i]) for i in kept], dtype=torch.int64),
            )
        batch["short_texts"], batch["short_ids"] = short.tokens(self.tokenizer, self.context_length)
        if self.long_context_length is not None:
            batch["long"] = long.index(s.record.long for s in samples)
            batch["long_texts"], batch["long_ids"] = long.tokens(self.tokenizer, self.long_context_length)
        return batch | dict(truncated=self.tokenizer.truncated - truncated, damaged=damaged)
