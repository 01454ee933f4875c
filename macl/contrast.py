"""Modal-aware contrastive learning (MACL): the two modalities' embeddings of the same thing attract each other."""

import math

import torch
from torch import Tensor, nn

import kernels
import trainkit.distributed as distributed
from macl.hard_negatives import HardNegatives, hard_negative_loss, hard_negatives, in_denominator, softplus_loss
from macl.projector import PROJECTOR_NORMS, embed, projector

__all__ = ["DIRECTIONS", "PROJECTOR_NORMS", "MACLHead", "hard_negative_loss", "hard_negatives"]

DIRECTIONS = {  # queries -> keys
    "both": [("visible", "infrared"), ("infrared", "visible")],
    "visible_to_infrared": [("visible", "infrared")],
}
TEMPERATURES = (0.01, 1.0)


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
