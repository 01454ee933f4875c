"""The losses of FG-CLIP (Xie et al. 2025), gathered across ranks, and the memory bank of region negatives.

All take unit vectors, and the scale itself, not its logarithm; logits are float32. Of several ranks each scores its own
rows against everybody's, and the mean of what the ranks return is the loss of the whole batch.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgclip.model import unit
from kernels import MemoryBank, contrastive_loss
from trainkit.distributed import gather, gather_and_place, global_mean


class Negatives(NamedTuple):
    """Rows of a memory bank as `kernels.contrastive_loss` takes them: (K, D), (K, D), (K,), and how many are in use."""

    images: Tensor
    texts: Tensor
    ids: Tensor
    valid: Tensor | int


class PairBank(nn.Module):
    """The last `size` pairs of unit vectors, images (or regions) and their texts, as negatives of later batches.

    With two classes (normal and abnormal scenes) each has half of the places, so that the rarer is not driven out.
    Every rank holds the same rows. The state dict carries them; a bank is no part of the model that DDP wraps.
    """

    def __init__(self, size: int, dim: int, *, classes: int = 1, device: torch.device | str | None = None):
        super().__init__()
        if size < 1 or size % classes:
            raise ValueError(f"a bank of {size} places does not divide among {classes} classes")
        self.images = nn.ModuleList(MemoryBank(size // classes, dim, device=device) for _ in range(classes))
        self.texts = nn.ModuleList(MemoryBank(size // classes, dim, device=device) for _ in range(classes))

    def __len__(self) -> int:
        return sum(len(bank) for bank in self.images)

    def negatives(self) -> Negatives:
        """What is in the bank now. With one class the fixed buffers, so that a GPU need not be waited for."""
        if len(self.images) == 1:
            images, texts = self.images[0], self.texts[0]
            return Negatives(images.buffer, texts.buffer, images.id_buffer, images.valid)
        images, texts = (torch.cat([bank.features for bank in side]) for side in (self.images, self.texts))
        return Negatives(images, texts, torch.cat([bank.ids for bank in self.images]), len(self))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Stores every rank's pairs (n, D) in rank order; to be called after the loss, on all ranks.

        ids (n,) int64 as in `symmetric_loss`. labels (n,): the class of each pair; other values are left out.
        """
        if ids is None:
            ids = torch.full((len(image),), -1, dtype=torch.int64, device=image.device)
        image, text, ids = gather(image), gather(text), gather(ids)
        if len(self.images) > 1:
            if labels is None:
                raise ValueError("a bank of several classes needs labels")
            labels = gather(labels)
        for label, banks in enumerate(zip(self.images, self.texts, strict=True)):
            rows = slice(None) if len(self.images) == 1 else labels == label
            for bank, features in zip(banks, (image, text), strict=True):
                bank.enqueue(features[rows], ids[rows])


def caption_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """A 64-bit hash (N,) int64 of every text (N, L), the same for any padding, process and machine; never -1."""
    rows = tokens.tolist()
    ends = (tokens == eos_id).int().argmax(dim=1).tolist()
    digests = (
        hashlib.blake2b(b"".join(token.to_bytes(4, "little") for token in row[:end]), digest_size=8).digest()
        for row, end in zip(rows, ends, strict=True)
    )
    ids = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)
    return ids.where(ids != -1, 0)


def symmetric_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    bank: PairBank | None = None,
    reduction: str = "mean",
    with_stats: bool = False,
):
    """Half the cross-entropy of every image (or region) among all texts, half that of every text among all images.

    image, text (N, D): pair i is row i; N may be 0 and differ between ranks. logit_scale: 0-d, the multiplier.
    ids (N,) int64: pairs that carry the same one, for example `caption_ids`, are no negatives of each other; -1: none.
    bank: further negatives for both directions, without gradient (He et al., MoCo, equation 1).
    reduction: "mean" over the pairs of all ranks, or the "sum" over this rank's. A lone pair without bank has loss 0.
    with_stats: return (loss, statistics), a dict of 0-d sums over this rank's rows of both directions: rows, loss,
        loss_over_chance (loss / ln of the row's candidates), top1 (rows whose pair scores above every other),
        candidates, positive and largest_negative (logits, the latter over rows_with_negatives only).
    """
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} are not pairs")
    all_ids = None if ids is None else gather(ids)
    queued = None if bank is None else bank.negatives()
    total, rows = 0.0, []
    for query, key, side in ((image, text, "texts"), (text, image, "images")):
        keys, first = gather_and_place(key)
        negatives = {}
        if queued is not None:
            negatives = dict(bank=getattr(queued, side), bank_valid=queued.valid, bank_ids=queued.ids)
        part = contrastive_loss(
            query,
            keys,
            logit_scale,
            target=first + torch.arange(len(query), device=query.device),
            query_ids=ids,
            key_ids=all_ids,
            reduction="sum",
            with_stats=with_stats,
            **negatives,
        )
        if with_stats:
            part, stats = part
            rows.append(stats)
        total = total + part / 2
    loss = _reduce(total, len(image), reduction)
    return (loss, _statistics(*map(torch.cat, zip(*rows, strict=True)))) if with_stats else loss


global_loss = symmetric_loss  # images and their captions
region_loss = symmetric_loss  # regions and their phrases


def hard_negative_loss(
    region: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    counts: Tensor | None = None,
    ids: Tensor | None = None,
    reduction: str = "mean",
    with_stats: bool = False,
):
    """Cross-entropy of each region's own phrase among alterations of it (FG-CLIP, hard fine-grained negatives).

    region (K, D); text (H, D), region after region, its own phrase first; counts (K,) int64: phrases of each region, at
    least 1, by default H / K. ids (H,) int64: an alteration with the id of the region's own phrase is left out.
    reduction, with_stats as in `symmetric_loss`. Regions are scored against their own phrases only, so nothing is
    gathered but the mean.
    """
    if counts is None:
        if len(text) % max(len(region), 1):
            raise ValueError(f"{len(text)} phrases do not divide among {len(region)} regions; counts is needed")
        counts = torch.full((len(region),), len(text) // max(len(region), 1), device=region.device)
    # One look at a GPU's numbers instead of one a question.
    fewest, width, whole = torch.stack([*counts.aminmax(), counts.sum()]).tolist() if len(counts) else (1, 1, 0)
    if len(counts) != len(region) or whole != len(text) or fewest < 1:
        raise ValueError(f"counts {counts.tolist()} are not those of {len(region)} regions and {len(text)} phrases")
    owner = torch.repeat_interleave(counts, output_size=len(text))  # (H,)
    own = counts.cumsum(0) - counts  # (K,), where each region's own phrase stands
    column = torch.arange(len(text), device=text.device) - own[owner]
    with torch.autocast(region.device.type, enabled=False):
        scores = logit_scale * (F.embedding(owner, region) * text).sum(-1)  # (H,); repeats add up in one order
    if ids is not None:
        same = (ids == ids[own][owner]) & (column > 0) & (ids != -1)
        scores = scores.masked_fill(same, -torch.inf)
    table = scores.new_full((len(region), width), -torch.inf).index_put((owner, column), scores)  # (K, most phrases)
    total = F.cross_entropy(table, torch.zeros_like(counts), reduction="sum")
    loss = _reduce(total, len(region), reduction)
    if not with_stats:
        return loss
    table = table.detach()
    negative = F.pad(table[:, 1:], (0, 1), value=-torch.inf).amax(dim=1)
    return loss, _statistics(table.logsumexp(1), table[:, 0], negative, table.isfinite().sum(1))


def _reduce(total: Tensor, count: int, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither mean nor sum")
    return global_mean(total, count) if reduction == "mean" else total


def _statistics(logsumexp: Tensor, positive: Tensor, negative: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """Sums over rows. A row without negatives counts as neither hit nor part of the means that need one."""
    loss = logsumexp - positive
    contested = candidates > 1
    chance = candidates.clamp(min=2).log()
    return dict(
        rows=torch.full((), float(len(loss)), device=loss.device),
        rows_with_negatives=contested.sum().to(loss.dtype),
        loss=loss.sum(),
        loss_over_chance=(loss / chance).sum(),
        top1=(contested & (positive > negative)).sum().to(loss.dtype),
        candidates=candidates.sum().to(loss.dtype),
        positive=positive.sum(),
        largest_negative=negative.where(contested, 0.0).sum(),
    )


class Pairs(NamedTuple):
    """What `symmetric_loss` and `PairBank.enqueue` take for one named loss."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    ids: Tensor | None
    labels: Tensor | None


def contrast_pairs(features: dict[str, Tensor], batch: dict, mask_same_caption: bool = True) -> dict[str, Pairs]:
    """The pairs of the losses long, short and region, as far as the batch has them.

    features: what FGCLIP.forward returned for the batch, which holds beside its inputs short_ids (U,) and long_ids
    (V,), the `caption_ids` of its texts, and for banks of two classes labels (B,) and region_labels (R,).
    """

    def ids(name: str, index: str) -> Tensor | None:
        return batch[name][batch[index]] if mask_same_caption else None

    pairs, image, scale = {}, unit(features["image"]), features["scale_global"]
    for name in ("long", "short"):
        if name in features:
            pairs[name] = Pairs(image, unit(features[name]), scale, ids(f"{name}_ids", name), batch.get("labels"))
    if "regions" in features:
        region, phrase = unit(features["regions"]), unit(features["region_texts"])
        labels = batch.get("region_labels")
        pairs["region"] = Pairs(region, phrase, features["scale_region"], ids("short_ids", "region"), labels)
    return pairs
