"""Hard negatives (DHN): the rows of a memory bank of the other modality that come closest to a query."""

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
    """Indices of the rows of a bank that are most similar to each query, the largest inner product first.

    query: (N, D). bank: (K, D). k: at least 1, else ValueError.
    mask: bool, broadcastable to (N, K), True for rows that a query must not get.
    -> (N, min(k, K)) int64; -1 where no further row is left.
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
    """Similarity (N, k) of the `hard_negatives`, NO_NEGATIVE where there is none, and (N, k) bool, where there is one.

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
    """Mean of softplus(similarity / temperature) over the k hardest rows of every query, as a loss of its own.

    Arguments as for `hard_negatives`; query and temperature take a gradient. -> (), a mean over the pairs of all
    processes; exactly 0, but connected, where there is none.
    """
    return softplus_loss(*choose(query, bank, k, mask), temperature)


def softplus_loss(similarity: Tensor, found: Tensor, temperature: Tensor | float) -> Tensor:
    """`hard_negative_loss` of what `choose` returned."""
    losses = F.softplus(similarity / temperature)  # 0 where there is none
    return distributed.global_mean(losses.sum(), found.sum())


def in_denominator(losses: Tensor, positive: Tensor, similarity: Tensor, temperature: Tensor) -> Tensor:
    """InfoNCE losses (N,) whose denominator also holds negatives of that similarity (N, k). positive: logits (N,).

    With l = log(sum_j exp(s_j)) - p so far and h the logsumexp of the new columns, the loss over both is
    log(exp(l + p) + exp(h)) - p = logaddexp(l, h - p).
    """
    hard = (similarity / temperature).logsumexp(dim=1)
    return torch.logaddexp(losses, hard - positive)


class HardNegatives(nn.Module):
    """Memory banks of the embeddings of each modality that serves as key, and the choice of the hardest of their rows.

    size, dim: of each bank.
    k: rows per query. It and `active`, how many of the newest rows take part, may change at any time.
    mode: "denominator" puts them into that of InfoNCE, "softplus" makes a loss of their own of them.
    momentum: 0 stores the embeddings of the loss; above 0 those of a moving average of the projector, so that old and
        new rows are of one kind (He et al., MoCo, 2020, equation 2).
    modalities: of the keys.
    """

    def __init__(
        self, projector: nn.Module, *, size: int, dim: int, k: int, mode: str, momentum: float, modalities: list[str]
    ):
        super().__init__()
        if mode not in HARD_MODES:
            raise ValueError(f"hard negative mode {mode!r} is none of {', '.join(HARD_MODES)}")
        if not 1 <= k <= size:
            raise ValueError(f"{k} hard negatives from a bank of {size} rows: expected at least 1 and at most all rows")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} of the key projector: expected at least 0 and below 1")
        self.k, self.active, self.mode, self.momentum = k, size, mode, momentum
        self.banks = nn.ModuleDict({name: kernels.MemoryBank(size, dim) for name in modalities})
        self.key_projector = copy.deepcopy(projector).requires_grad_(False) if momentum else None

    def choose(self, query: Tensor, modality: str, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`choose` from that modality's bank for query (N, D) of scenes ids (N,), and sums for the log."""
        bank = self.banks[modality]
        size = len(bank.buffer)
        age = (bank.position - 1 - torch.arange(size, device=query.device)) % size  # 0 is the newest row
        in_use = age < bank.valid.clamp(max=self.active)
        same_scene = (ids[:, None] == bank.id_buffer) & (ids >= 0)[:, None] & in_use  # (N, K)
        similarity, found = choose(query, bank.buffer, self.k, same_scene | ~in_use)
        with_negatives = found[:, 0]
        sums = {
            "masked": same_scene.sum(),
            "in_use": in_use.sum() * len(query),
            "hardest": (similarity[:, 0].detach() * with_negatives).sum(),
            "with_negatives": with_negatives.sum(),
        }
        return similarity, found, sums

    @torch.no_grad()
    def enqueue(self, projector: nn.Module, features: dict[str, Tensor], keys: dict[str, Tensor], ids: Tensor) -> None:
        """Store this step's rows, the same in rank order on every process.

        features: modality -> (n, in_dim), and ids (n,), the scenes, of this process.
        keys: modality -> (N, dim) embeddings of all processes.
        """
        if self.key_projector is not None:
            self.update_momentum_projector(projector)
            keys = {name: distributed.gather(embed(self.key_projector, features[name])) for name in self.banks}
        ids = distributed.gather(ids)
        for name, bank in self.banks.items():
            bank.enqueue(keys[name].detach(), ids)

    def update_momentum_projector(self, projector: nn.Module) -> None:
        """Parameters follow those of the projector slowly; buffers, such as running statistics, are copied."""
        self.key_projector.eval()  # without dropout
        for average, live in zip(self.key_projector.parameters(), projector.parameters(), strict=True):
            average.lerp_(live.detach(), 1 - self.momentum)
        for average, live in zip(self.key_projector.buffers(), projector.buffers(), strict=True):
            average.copy_(live)
