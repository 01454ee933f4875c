"""Modal-aware contrastive learning (MACL): the two modalities' embeddings of the same thing attract each other.

Hard negatives (DHN) are the rows of a memory bank that are most similar to a query. They need keys of one kind, those
of an averaged detector: against rows that older weights made, a query lowers its loss by leaving their place, and the
embedding collapses.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import trainkit.distributed as distributed
from trainkit.device import at_least_float32

PROJECTOR_NORMS = ("none", "layer", "group", "batch")
DIRECTIONS = {  # queries -> keys
    "both": [("visible", "infrared"), ("infrared", "visible")],
    "visible_to_infrared": [("visible", "infrared")],
}
TEMPERATURES = (0.01, 1.0)
NO_NEGATIVE = -1e30  # a similarity for "none"; finite, so that its gradient is 0 and not NaN


class ProjectorBatchNorm(nn.BatchNorm1d):
    """BatchNorm that uses its running statistics for fewer than two rows."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def projector(
    in_dim: int, hidden_dims: tuple[int, ...], out_dim: int, *, norm: str, norm_groups: int, dropout: float
) -> nn.Sequential:
    """Linear, norm, ReLU and dropout per hidden width, then a Linear to `out_dim`."""
    norms = {"layer": nn.LayerNorm, "batch": ProjectorBatchNorm, "group": partial(nn.GroupNorm, norm_groups)}
    layers = []
    for width in hidden_dims:
        layers.append(nn.Linear(in_dim, width))
        layers += [norms[norm](width)] if norm != "none" else []
        layers.append(nn.ReLU())
        layers += [nn.Dropout(dropout)] if dropout else []
        in_dim = width
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim))


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
    """Mean softplus(similarity / temperature) over the `hard_negatives` of all processes; connected where none exists.

    query and temperature take a gradient.
    """
    similarity, exists = choose(query, bank, k, mask)
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
    """One memory bank of keys per key modality (He et al., MoCo, 2020, section 3.2).

    size, dim: of each bank.
    k: rows per query.
    modalities: of the keys.
    """

    def __init__(self, *, size: int, dim: int, k: int, modalities: list[str]):
        super().__init__()
        if not 1 <= k <= size:
            raise ValueError(f"{k} hard negatives from a bank of {size} rows: expected at least 1 and at most all rows")
        self.k = k
        self.banks = nn.ModuleDict({name: kernels.MemoryBank(size, dim) for name in modalities})

    def choose(self, query: Tensor, modality: str, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`choose` from one modality's bank, and sums for the metrics. query: (N, D). ids: (N,), scenes."""
        bank = self.banks[modality]
        in_use = torch.arange(len(bank.buffer), device=query.device) < bank.valid
        same_scene = (ids[:, None] == bank.id_buffer) & (ids >= 0)[:, None] & in_use  # (N, K)
        similarity, exists = choose(query, bank.buffer, self.k, same_scene | ~in_use)
        sums = {"masked": same_scene.sum(), "in_use": in_use.sum() * len(query), "with_negatives": exists[:, 0].sum()}
        sums["hardest"] = (similarity[:, 0].detach() * exists[:, 0]).sum()
        return similarity, exists, sums

    @torch.no_grad()
    def enqueue(self, keys: dict[str, Tensor], ids: Tensor) -> None:
        """Store the rows of this step. keys: modality -> (N, dim) of all processes. ids: (n,), scenes of this one."""
        ids = distributed.gather(ids)
        for name, bank in self.banks.items():
            bank.enqueue(keys[name].detach(), ids)


class MACLHead(nn.Module):
    """A projector shared by both modalities and the InfoNCE loss between them (van den Oord et al., 2018, equation 4).

    Row i of both inputs shows the same thing. The other rows, of all processes, are the negatives.

    in_dim, hidden_dims, out_dim, norm, norm_groups, dropout: see `projector`.
    direction: "both" averages the losses of visible -> infrared and infrared -> visible, as CLIP does.
    temperature: initial value. It is learned through its logarithm and held in TEMPERATURES.
    bank_size: rows per memory bank; 0 for no hard negatives.
    hard_k: hard negatives per query.
    """

    def __init__(
        self, in_dim: int, hidden_dims: tuple[int, ...] = (128, 64), out_dim: int = 128, norm: str = "layer",
        norm_groups: int = 32, dropout: float = 0.0, direction: str = "both", temperature: float = 0.07,
        bank_size: int = 0, hard_k: int = 8,
    ):  # fmt: skip
        super().__init__()
        if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise ValueError(f"temperature {temperature} is outside {TEMPERATURES}")
        self.projector = projector(in_dim, hidden_dims, out_dim, norm=norm, norm_groups=norm_groups, dropout=dropout)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.directions = DIRECTIONS[direction]
        self.hard = None
        if bank_size:
            names = [key for _, key in self.directions]
            self.hard = HardNegatives(size=bank_size, dim=out_dim, k=hard_k, modalities=names)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def embed(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (N, out_dim) in float32 at least, rows of length 1 (a zero row stays zero)."""
        return F.normalize(at_least_float32(self.projector(features)), dim=1)

    def forward(
        self, visible: Tensor, infrared: Tensor, ids: Tensor | None = None, keys: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """loss_macl () and metrics. In training the keys then enter the banks.

        visible, infrared: (N, in_dim). N may differ between processes and be 0.
        ids: (N,) int64, the scene of each row, -1 for not known. A query gets no hard negative of its own scene, which
            may show the same thing.
        keys: modality -> (N, out_dim), the same rows embedded by an averaged detector; None for this step's own
            embeddings. Hard negatives need ids and keys, else ValueError.

        -> loss: a mean over the queries of all processes, exactly 0 but connected for one or none.
        -> metrics (): macl_candidates, keys per query; macl_relative, loss / ln(candidates), 1 for chance; macl_recall,
            share of queries with the positive first; temperature; with hard negatives dhn_fill, filled share of the
            banks, dhn_hardest, mean similarity of the hardest, dhn_masked, masked share.
        """
        if self.hard is not None and (ids is None or (keys is None and self.training)):
            raise ValueError("hard negatives need the scene of every row, and keys of an averaged detector")
        with torch.no_grad():  # in place, so that a temperature at a bound can come back from it
            self.log_temperature.clamp_(*map(math.log, TEMPERATURES))
        queries = {"visible": self.embed(visible), "infrared": self.embed(infrared)}
        keys = queries if keys is None else keys
        gathered = {name: distributed.gather_and_place(keys[name]) for _, name in self.directions}
        results = [self._one_direction(queries[query], *gathered[key], key, ids) for query, key in self.directions]
        losses, sums = zip(*results, strict=True)
        rows = {name: rows for name, (rows, _) in gathered.items()}
        metrics = self._metrics(sums, len(next(iter(rows.values()))))
        if self.hard is not None and self.training:
            self.hard.enqueue(rows, ids)
        return torch.stack(losses).mean(), metrics

    def _one_direction(self, query: Tensor, keys: Tensor, first: int, modality: str, ids: Tensor | None):
        """Loss of this process's queries, and sums for the metrics. The positive of query i is keys[first + i]."""
        losses = positive = (query.sum() + keys.sum()) * 0 * self.temperature
        recalled = losses.detach()
        if len(query):
            target = first + torch.arange(len(query), device=query.device)
            losses, stats = kernels.contrastive_loss(
                query, keys, 1 / self.temperature, target=target, reduction="none", with_stats=True
            )  # (N,)
            positive = (query * keys[first : first + len(query)]).sum(dim=1) / self.temperature  # (N,)
            recalled = (stats.positive > stats.largest_negative).sum()
        sums = {"loss": losses.detach().sum(), "recalled": recalled}
        if self.hard is not None:
            similarity, _, of_bank = self.hard.choose(query, modality, ids)
            sums |= of_bank
            if len(query):
                losses = in_denominator(losses, positive, similarity, self.temperature)
        return distributed.global_mean(losses.sum(), len(query)), sums

    @torch.no_grad()
    def _metrics(self, sums: tuple[dict[str, Tensor], ...], count: int) -> dict[str, Tensor]:
        """Metrics of `forward`, over all processes and directions. count: keys per query."""
        total = torch.stack([torch.stack([value.double() for value in one.values()]) for one in sums])
        total = dict(zip(sums[0], distributed.all_reduce_sum(total).sum(dim=0), strict=True))
        queries = count * len(self.directions)
        chance = queries * math.log(count) if count > 1 else math.inf
        metrics = {
            "macl_candidates": self.temperature.new_tensor(float(count)),
            "macl_relative": total["loss"] / chance,
            "macl_recall": total["recalled"] / max(1, queries),
            "temperature": self.temperature.detach(),
        }
        if self.hard is not None:
            banks = self.hard.banks.values()
            metrics["dhn_fill"] = torch.stack([bank.valid / len(bank.buffer) for bank in banks]).mean()
            metrics["dhn_hardest"] = total["hardest"] / total["with_negatives"].clamp(min=1)
            metrics["dhn_masked"] = total["masked"] / total["in_use"].clamp(min=1)
        return {name: value.to(self.temperature.dtype) for name, value in metrics.items()}
