"""Modal-aware contrastive learning (MACL): the two modalities' embeddings of the same thing attract each other.

Hard negatives (DHN) are the rows of a memory bank that are most similar to a query.
"""

import copy
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
HARD_MODES = ("denominator", "softplus")
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


def embed(projector: nn.Module, features: Tensor) -> Tensor:
    """(N, in_dim) -> (N, out_dim) in float32 at least, rows of length 1 (a zero row stays zero)."""
    return F.normalize(at_least_float32(projector(features)), dim=1)


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
    """Mean softplus(similarity / temperature) over the pairs of all processes that exist; connected where none does."""
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
        sums = {"masked": same_scene.sum(), "in_use": in_use.sum() * len(query), "with_negatives": exists[:, 0].sum()}
        sums["hardest"] = (similarity[:, 0].detach() * exists[:, 0]).sum()
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


class MACLHead(nn.Module):
    """A projector shared by both modalities and the InfoNCE loss between them (van den Oord et al., 2018, equation 4).

    Row i of both inputs shows the same thing. The other rows, of all processes, are the negatives.

    in_dim, hidden_dims, out_dim, norm, norm_groups, dropout: see `projector`.
    direction: "both" averages the losses of visible -> infrared and infrared -> visible, as CLIP does.
    temperature: initial value. It is learned through its logarithm and held in TEMPERATURES.
    bank_size: rows per memory bank; 0 for no hard negatives.
    hard_k, hard_mode, hard_momentum: see `HardNegatives`.
    """

    def __init__(
        self, in_dim: int, hidden_dims: tuple[int, ...] = (128, 64), out_dim: int = 128, norm: str = "layer",
        norm_groups: int = 32, dropout: float = 0.0, direction: str = "both", temperature: float = 0.07,
        bank_size: int = 0, hard_k: int = 64, hard_mode: str = "denominator", hard_momentum: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise ValueError(f"temperature {temperature} is outside {TEMPERATURES}")
        self.projector = projector(in_dim, hidden_dims, out_dim, norm=norm, norm_groups=norm_groups, dropout=dropout)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.directions = DIRECTIONS[direction]
        self.hard = None
        if bank_size:
            self.hard = HardNegatives(
                self.projector, size=bank_size, dim=out_dim, k=hard_k, mode=hard_mode, momentum=hard_momentum,
                modalities=[key for _, key in self.directions],
            )  # fmt: skip

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def embed(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (N, out_dim), rows of length 1 (a zero row stays zero)."""
        return embed(self.projector, features)

    def forward(self, visible: Tensor, infrared: Tensor, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """loss_macl and the metrics of `compare`."""
        losses, metrics, _ = self.compare(visible, infrared, ids)
        return losses["loss_macl"], metrics

    def compare(self, visible: Tensor, infrared: Tensor, ids: Tensor | None = None) -> tuple[dict, dict, dict]:
        """Losses, metrics and embeddings. In training the embeddings then enter the banks.

        visible, infrared: (N, in_dim). N may differ between processes and be 0.
        ids: (N,) int64, the scene of each row, -1 for not known. Hard negatives need it: a query gets none of its own
            scene, which may show the same thing.

        -> losses (): loss_macl, a mean over the queries of all processes, exactly 0 but connected for one or none;
            loss_dhn of hard_mode "softplus".
        -> metrics (): macl_candidates, keys per query; macl_relative, loss / ln(candidates), 1 for chance; macl_recall,
            share of queries with the positive first; temperature; with hard negatives dhn_fill, filled share of the
            banks, dhn_hardest, mean similarity of the hardest, dhn_masked, masked share.
        -> embeddings: modality -> (N, out_dim) of this process.
        """
        if self.hard is not None and ids is None:
            raise ValueError("hard negatives need the scene of every row")
        with torch.no_grad():  # in place, so that a temperature at a bound can come back from it
            self.log_temperature.clamp_(*map(math.log, TEMPERATURES))
        features = {"visible": visible, "infrared": infrared}
        embeddings = {name: self.embed(rows) for name, rows in features.items()}
        gathered = {key: distributed.gather_and_place(embeddings[key]) for _, key in self.directions}
        results = [self._one_direction(embeddings[query], *gathered[key], key, ids) for query, key in self.directions]
        losses = {name: torch.stack([terms[name] for terms, _ in results]).mean() for name in results[0][0]}
        keys = {name: rows for name, (rows, _) in gathered.items()}
        metrics = self._metrics([sums for _, sums in results], len(next(iter(keys.values()))))
        if self.hard is not None and self.training:
            self.hard.enqueue(self.projector, features, keys, ids)
        return losses, metrics, embeddings

    def _one_direction(self, query: Tensor, keys: Tensor, first: int, modality: str, ids: Tensor | None):
        """Losses of this process's queries, and sums for the metrics. The positive of query i is keys[first + i]."""
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
        terms = {}
        if self.hard is not None:
            similarity, exists, of_bank = self.hard.choose(query, modality, ids)
            sums |= of_bank
            if self.hard.mode == "softplus":
                terms["loss_dhn"] = softplus_loss(similarity, exists, self.temperature)
            elif len(query):
                losses = in_denominator(losses, positive, similarity, self.temperature)
        terms["loss_macl"] = distributed.global_mean(losses.sum(), len(query))
        return terms, sums

    @torch.no_grad()
    def _metrics(self, sums: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
        """Metrics of `compare`, over all processes and directions. count: keys per query."""
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
