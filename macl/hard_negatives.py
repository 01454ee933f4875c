"""Hard negatives (DHN): the rows of a memory bank of the other modality that come closest to a query."""

import copy
import math
from typing import NamedTuple

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
    """The rows of a bank that are most similar to each query.

    query: (N, D); bank: (K, D); k: at least 1; mask: bool, (N, K) or broadcastable to it, True for rows that a query
    must not get. -> (N, min(k, K)) int64, the hardest (largest inner product) first; -1 where no further row is left.
    Raises ValueError for a k below 1.
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


class Chosen(NamedTuple):
    """The negatives that each query got: `similarity` (N, k) with a path to the query, NO_NEGATIVE where there is none,
    and `found` (N, k) bool, where there is one."""

    similarity: Tensor
    found: Tensor


def choose(query: Tensor, bank: Tensor, k: int, mask: Tensor | None = None) -> Chosen:
    """`hard_negatives` with their similarity. The bank gets no gradient and may be overwritten before the backward."""
    query = at_least_float32(query)
    indices = hard_negatives(query, bank, k, mask)
    rows = bank.detach()[indices.clamp(min=0)].to(query.dtype)  # (N, k, D), a copy
    similarity = (query[:, None] * rows).sum(dim=2)  # (N, k)
    return Chosen(similarity.masked_fill(indices < 0, NO_NEGATIVE), indices >= 0)


def hard_negative_loss(
    query: Tensor, bank: Tensor, k: int, temperature: Tensor | float, mask: Tensor | None = None
) -> Tensor:
    """The separate term: mean of softplus(similarity / temperature) = -log(1 - sigmoid(similarity / temperature)) over
    the k hardest rows of the bank of every query.

    Arguments as for `hard_negatives`; query and temperature take a gradient. -> (), a mean over the pairs of all
    processes; exactly 0, but connected, where there is none.
    """
    return softplus(choose(query, bank, k, mask), temperature)


def softplus(chosen: Chosen, temperature: Tensor | float) -> Tensor:
    """`hard_negative_loss` of negatives already chosen."""
    losses = F.softplus(chosen.similarity / temperature)  # 0 where there is none
    return distributed.global_mean(losses.sum(), chosen.found.sum())


def in_denominator(losses: Tensor, positive: Tensor, chosen: Chosen, temperature: Tensor) -> Tensor:
    """InfoNCE losses (N,) whose denominator also holds the chosen negatives, exactly, without the logits of the others.

    With l = log(sum_j exp(s_j)) - p over the columns so far, p = `positive` (N,) the positive's logit and h the
    logsumexp of the new ones, the loss over both is log(exp(l + p) + exp(h)) - p = logaddexp(l, h - p).
    """
    hard = (chosen.similarity / temperature).logsumexp(dim=1)
    return torch.logaddexp(losses, hard - positive)


class HardNegatives(nn.Module):
    """Memory banks of the embeddings of each modality that serves as key, and the choice of the hardest of their rows.

    projector: of the head; size, dim: of each bank. k: rows a query gets. mode: "denominator" puts them into that of
    InfoNCE, "softplus" makes a loss of their own of them. momentum: 0 stores the very embeddings of the loss; above it
    what an exponential moving average of the projector makes of the features, so that old and new rows are of one kind
    (He et al., MoCo, 2020, equation 2); that average is frozen, and refreshed whenever rows are stored. modalities: of
    the keys.

    `k` and `active`, how many of the newest rows take part, may be changed at any time.
    """

    def __init__(
        self,
        projector: nn.Module,
        *,
        size: int,
        dim: int,
        k: int = 64,
        mode: str = "denominator",
        momentum: float = 0.0,
        modalities: tuple[str, ...] = ("visible", "infrared"),
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
        self.key_projector = copy.deepcopy(projector).requires_grad_(False).eval() if momentum else None

    def train(self, mode: bool = True) -> "HardNegatives":
        """The key projector stays in evaluation: without dropout, and with the running statistics of a batch norm."""
        super().train(mode)
        if self.key_projector is not None:
            self.key_projector.eval()
        return self

    def choose(self, query: Tensor, modality: str, ids: Tensor) -> tuple[Chosen, dict[str, Tensor]]:
        """The hardest rows of that modality's bank for query (N, D) of scenes ids (N,), and sums for the log."""
        bank = self.banks[modality]
        size = len(bank.buffer)
        age = (bank.position - 1 - torch.arange(size, device=query.device)) % size  # 0 is the newest row
        in_use = age < bank.valid.clamp(max=self.active)
        same_scene = (ids[:, None] == bank.id_buffer) & (ids >= 0)[:, None] & in_use  # (N, K)
        chosen = choose(query, bank.buffer, self.k, same_scene | ~in_use)
        with torch.no_grad():
            some = chosen.found[:, 0]
            sums = {
                "masked": same_scene.sum(),
                "in_use": in_use.sum() * len(query),
                "hardest": (chosen.similarity[:, 0] * some).sum(),
                "with_negatives": some.sum(),
            }
        return chosen, sums

    @torch.no_grad()
    def enqueue(self, projector: nn.Module, features: dict[str, Tensor], keys: dict[str, Tensor], ids: Tensor) -> None:
        """Store this step's rows, the same in rank order on every process.

        features: modality -> (n, in_dim) and ids (n,) of this process; keys: modality -> (N, dim) embeddings of all.
        """
        if self.key_projector is not None:
            self.follow(projector)
        ids = distributed.gather(ids)
        for name, bank in self.banks.items():
            if self.key_projector is None:
                bank.enqueue(keys[name].detach(), ids)
            else:
                bank.enqueue(distributed.gather(embed(self.key_projector, features[name])), ids)

    def follow(self, projector: nn.Module) -> None:
        """Parameters follow those of the projector slowly; buffers, such as running statistics, are copied."""
        for own, live in zip(self.key_projector.parameters(), projector.parameters(), strict=True):
            own.lerp_(live.detach(), 1 - self.momentum)
        for own, live in zip(self.key_projector.buffers(), projector.buffers(), strict=True):
            own.copy_(live)
