"""Hard negatives (DHN): the rows of a memory bank that are most similar to a query."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import trainkit.distributed as distributed
from macl.projector import embed
from trainkit.device import at_least_float32

HARD_MODES = ("denominator", "softplus")
NO_NEGATIVE = -1e30  # the similarity that stands for "none": finite, so that its gradient is 0 and not NaN


@torch.no_grad()
def hard_negatives(query: Tensor, bank: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Indices of the rows of largest inner product with each query, the largest first.

    query: (N, D). bank: (K, D). k: at least 1, else ValueError.
    mask: bool, broadcastable to (N, K), True for rows that are left out.
    -> (N, min(k, K)) int64, -1 where no row is left.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    with torch.autocast(query.device.type, enabled=False):
        query = at_least_float32(query)
        similarity = query @ bank.to(query.dtype).T  # (N, K)
    if mask is not None:
        similarity = similarity.masked_fill(mask, -math.inf)
    similarity, indices = similarity.topk(min(k, len(bank)), dim=1)
    return indices.masked_fill(similarity == -math.inf, -1)


def choose(query: Tensor, bank: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Similarities (N, k) of the `hard_negatives`, NO_NEGATIVE for none, and (N, k) bool, whether there is one.

    The bank gets no gradient and may be overwritten before the backward.
    """
    query = at_least_float32(query)
    indices = hard_negatives(query, bank, k, mask)
    rows = bank.detach()[indices.clamp(min=0)].to(query.dtype)  # (N, k, D), a copy
    similarity = (query[:, None] * rows).sum(dim=2)  # (N, k)
    return similarity.masked_fill(indices < 0, NO_NEGATIVE), indices >= 0


def hard_negative_loss(
    query: Tensor, bank: Tensor, k: int, temperature: Tensor | float, mask: Tensor | None = None
) -> Tensor:
    """`softplus_loss` of the `hard_negatives`; query and temperature take a gradient."""
    return softplus_loss(*choose(query, bank, k, mask), temperature)


def softplus_loss(similarity: Tensor, exists: Tensor, temperature: Tensor | float) -> Tensor:
    """Mean of softplus(similarity / temperature) over the pairs of all processes, of what `choose` returned.

    -> (), exactly 0 but connected where there is no pair.
    """
    losses = F.softplus(similarity / temperature)  # 0 where there is none
    return distributed.global_mean(losses.sum(), exists.sum())


def in_denominator(losses: Tensor, positive: Tensor, similarity: Tensor, temperature: Tensor) -> Tensor:
    """InfoNCE losses (N,) with further negatives of `similarity` (N, k) in the denominator. positive: logits (N,).

    With l = log(sum_j exp(s_j)) - p so far and h the logsumexp of the further ones, the loss over both is
    log(exp(l + p) + exp(h)) - p = logaddexp(l, h - p).
    """
    hard = (similarity / temperature).logsumexp(dim=1)
    return torch.logaddexp(losses, hard - positive)


class HardNegatives(nn.Module):
    """One memory bank of embeddings per key modality.

    size, dim: of each bank.
    k: rows per query. It may change at any time, as may `active`, the number of newest rows to choose from.
    mode: "denominator", negatives of InfoNCE; "softplus", a loss of their own.
    momentum: 0 stores the embeddings of the loss; above 0 those of a moving average of the projector, so that old and
        new rows are of one kind (He et al., MoCo, 2020, equation 2).
    modalities: of the keys.
    """

    def __init__(
        self, projector: nn.Module, *, size: int, dim: int, k: int, mode: str, momentum: float, modalities: list[str]
    ):
        super().__init__()
        if not 1 <= k <= size:
            raise ValueError(f"{k} hard negatives from a bank of {size} rows: expected at least 1 and at most all rows")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} of the key projector: expected at least 0 and below 1")
        self.k, self.active, self.mode, self.momentum = k, size, mode, momentum
        self.banks = nn.ModuleDict({name: kernels.MemoryBank(size, dim) for name in modalities})
        self.key_projector = copy.deepcopy(projector).requires_grad_(False) if momentum else None

    def choose(self, query: Tensor, modality: str, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`choose` from one modality's bank, and sums for the metrics. query: (N, D). ids: (N,), scenes."""
        bank = self.banks[modality]
        size = len(bank.buffer)
        age = (bank.position - 1 - torch.arange(size, device=query.device)) % size  # 0 is the newest row
        in_use = age < bank.valid.clamp(max=self.active)
        same_scene = (ids[:, None] == bank.id_buffer) & (ids >= 0)[:, None] & in_use  # (N, K)
        similarity, exists = choose(query, bank.buffer, self.k, same_scene | ~in_use)
        with_negatives = exists[:, 0]
        sums = {
            "masked": same_scene.sum(),
            "in_use": in_use.sum() * len(query),
            "hardest": (similarity[:, 0].detach() * with_negatives).sum(),
            "with_negatives": with_negatives.sum(),
        }
        return similarity, exists, sums

    @torch.no_grad()
    def enqueue(self, projector: nn.Module, features: dict[str, Tensor], keys: dict[str, Tensor], ids: Tensor) -> None:
        """Store the rows of this step, the same on every process.

        features: modality -> (n, in_dim) of this process.
        keys: modality -> (N, dim) embeddings of all processes.
        ids: (n,), scenes of this process's rows.
        """
        if self.key_projector is not None:
            self.key_projector.eval()  # without dropout
            for average, live in zip(self.key_projector.parameters(), projector.parameters(), strict=True):
                average.lerp_(live, 1 - self.momentum)
            for average, live in zip(self.key_projector.buffers(), projector.buffers(), strict=True):
                average.copy_(live)  # such as running statistics
            keys = {name: distributed.gather(embed(self.key_projector, features[name])) for name in self.banks}
        ids = distributed.gather(ids)
        for name, bank in self.banks.items():
            bank.enqueue(keys[name].detach(), ids)
