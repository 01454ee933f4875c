"""The losses of FG-CLIP (Xie et al. 2025), gathered across ranks, and the memory bank of negatives.

All take unit vectors and the scale itself, not its logarithm. Logits are float32. Each rank scores its own rows against
those of all ranks; the mean over the ranks is the loss of the whole batch.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import MemoryBank, contrastive_loss, sigmoid_loss
from trainkit.distributed import gather, gather_and_place, global_mean


class PairBank(nn.Module):
    """The last `size` pairs of unit vectors, images (or regions) and their texts, as negatives of later batches.

    classes: 2 gives normal and abnormal scenes half of the places each. Keep the bank outside of what DDP wraps.
    """

    def __init__(self, size: int, dim: int, *, classes: int = 1, device: torch.device | str | None = None):
        super().__init__()
        self.images = nn.ModuleList(MemoryBank(size // classes, dim, device=device) for _ in range(classes))
        self.texts = nn.ModuleList(MemoryBank(size // classes, dim, device=device) for _ in range(classes))

    def __len__(self) -> int:
        return sum(len(bank) for bank in self.images)

    def negatives(self, side: str) -> dict[str, Tensor]:
        """The stored "images" or "texts" as keywords of `kernels.contrastive_loss`."""
        banks = getattr(self, side)
        if len(banks) == 1:  # the fixed buffers, so that a GPU need not be waited for
            return dict(bank=banks[0].buffer, bank_ids=banks[0].id_buffer, bank_valid=banks[0].valid)
        return dict(bank=torch.cat([b.features for b in banks]), bank_ids=torch.cat([b.ids for b in banks]))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Stores every rank's pairs (n, D) in rank order. Call it after the loss, on all ranks.

        ids: (n,) int64, as in `symmetric_loss`.
        labels: (n,), 0 or 1 per pair, for a bank of two classes; pairs with other values are left out.
        """
        if ids is None:
            ids = torch.full((len(image),), -1, dtype=torch.int64, device=image.device)
        image, text, ids = gather(image), gather(text), gather(ids)
        labels = gather(labels) if len(self.images) > 1 else None
        for label, (images, texts) in enumerate(zip(self.images, self.texts, strict=True)):
            rows = slice(None) if labels is None else labels == label
            images.enqueue(image[rows], ids[rows])
            texts.enqueue(text[rows], ids[rows])


def caption_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """A 64-bit hash (N,) int64 of each text (N, L), the same for any padding, process and machine; never -1."""
    ends = (tokens == eos_id).int().argmax(dim=1).tolist()
    ids = []
    for row, end in zip(tokens.tolist(), ends, strict=True):
        digest = hashlib.blake2b(b"".join(token.to_bytes(4, "little") for token in row[:end]), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "little", signed=True))
    ids = torch.tensor(ids, dtype=torch.int64)
    return ids.where(ids != -1, 0)


def symmetric_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, ids: Tensor | None = None, bank: PairBank | None = None,
    bias: Tensor | None = None, reduction: str = "mean", with_stats: bool = False,
):  # fmt: skip
    """Half the cross-entropy of every image (or region) among all texts, half that of every text among all images.

    image, text: (N, D), pair i is row i; N may be 0 and differ between ranks.
    logit_scale: 0-d, the multiplier.
    ids: (N,) int64; pairs with the same id (see `caption_ids`) are no negatives of each other; -1 is nobody's id.
    bank: further negatives for both directions, without gradient (He et al., MoCo, equation 1).
    bias: 0-d; with it `sigmoid_loss` takes the place of the cross-entropy, but not in the statistics.
    reduction: "mean" over the pairs of all ranks, or "sum" over this rank's. A lone pair without bank has loss 0.
    with_stats: return (loss, `_statistics` of this rank's rows of both directions).
    """
    options = dict(query_ids=ids, key_ids=None if ids is None else gather(ids), reduction="sum")
    total, rows = 0.0, []
    for query, key, side in ((image, text, "texts"), (text, image, "images")):
        keys, first = gather_and_place(key)
        target = first + torch.arange(len(query), device=query.device)
        negatives = options | dict(target=target) | ({} if bank is None else bank.negatives(side))
        with torch.set_grad_enabled(bias is None and torch.is_grad_enabled()):
            loss, stats = contrastive_loss(query, keys, logit_scale, **negatives, with_stats=True)
        rows.append(stats)
        loss = loss if bias is None else sigmoid_loss(query, keys, logit_scale, bias, **negatives)
        total = total + loss / 2
    loss = global_mean(total, len(image)) if reduction == "mean" else total
    return (loss, _statistics(*map(torch.cat, zip(*rows, strict=True)))) if with_stats else loss


global_loss = symmetric_loss  # images and their captions
region_loss = symmetric_loss  # regions and their phrases


def hard_negative_loss(
    region: Tensor, text: Tensor, logit_scale: Tensor, *, counts: Tensor, ids: Tensor | None = None,
    reduction: str = "mean", with_stats: bool = False,
):  # fmt: skip
    """Cross-entropy of each region's own phrase among alterations of it (FG-CLIP, hard fine-grained negatives).

    region: (K, D). text: (H, D), region after region, its own phrase first.
    counts: (K,) int64, phrases per region, at least 1.
    ids: (H,) int64; an alteration with the id of the region's own phrase is left out; -1 is nobody's id.
    reduction, with_stats: as in `symmetric_loss`.
    """
    width = int(counts.max()) if len(counts) else 1
    owner = torch.repeat_interleave(counts, output_size=len(text))  # (H,)
    first = counts.cumsum(0) - counts  # (K,), where each region's own phrase stands
    column = torch.arange(len(text), device=text.device) - first[owner]
    with torch.autocast(region.device.type, enabled=False):
        scores = logit_scale * (F.embedding(owner, region) * text).sum(-1)  # (H,); repeats add up in one order
    if ids is not None:
        same = (ids == ids[first][owner]) & (column > 0) & (ids != -1)
        scores = scores.masked_fill(same, -torch.inf)
    table = scores.new_full((len(region), width), -torch.inf).index_put((owner, column), scores)  # (K, most phrases)
    loss = F.cross_entropy(table, torch.zeros_like(counts), reduction="sum")
    loss = global_mean(loss, len(region)) if reduction == "mean" else loss
    if not with_stats:
        return loss
    table = table.detach()
    negative = F.pad(table[:, 1:], (0, 1), value=-torch.inf).amax(dim=1)
    return loss, _statistics(table.logsumexp(1), table[:, 0], negative, table.isfinite().sum(1))


def _statistics(logsumexp: Tensor, positive: Tensor, negative: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """Sums over rows, 0-d. loss_over_chance: loss / ln(candidates); top1: hits, for which a row needs negatives."""
    loss = logsumexp - positive
    contested = candidates > 1
    return dict(
        rows=torch.full((), float(len(loss)), device=loss.device), rows_with_negatives=contested.sum().to(loss.dtype),
        loss=loss.sum(), loss_over_chance=(loss / candidates.clamp(min=2).log()).sum(),
        top1=(contested & (positive > negative)).sum().to(loss.dtype), candidates=candidates.sum().to(loss.dtype),
    )  # fmt: skip
