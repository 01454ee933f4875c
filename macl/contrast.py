"""Modal-aware contrastive learning (MACL): the two modalities' embeddings of the same thing attract each other."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
import trainkit.distributed as distributed
from macl.hard_negatives import HARD_MODES, HardNegatives, hard_negative_loss, hard_negatives, in_denominator, softplus
from macl.projector import PROJECTOR_NORMS, embed, projector

__all__ = [
    "DIRECTIONS",
    "HARD_MODES",
    "PROJECTOR_NORMS",
    "Contrast",
    "HardNegatives",
    "MACLHead",
    "hard_negative_loss",
    "hard_negatives",
]

DIRECTIONS = ("both", "visible_to_infrared")


class Contrast(NamedTuple):
    """What the head makes of a batch: this process's embeddings (N, out_dim), the losses, and figures for the log."""

    visible: Tensor
    infrared: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


class MACLHead(nn.Module):
    """A projector shared by both modalities and the InfoNCE loss between them (van den Oord et al., 2018, equation 4).

    Row i of both inputs shows the same thing; the other rows (of all processes) are the negatives.

    in_dim, hidden_dims, out_dim: of the projector. norm: "none", "layer", "group" (`norm_groups` groups; with one or
    two values a group it
    forgets its input) or "batch". direction: "both" averages visible -> infrared and infrared -> visible, as CLIP
    does; "visible_to_infrared" is one half of it. temperature: the initial one; it is learned through its logarithm and
    held in [0.01, 1]. bank_size: rows of the memory banks, 0 for no hard negatives; hard_k, hard_mode, hard_momentum:
    see `HardNegatives`, which is then `hard`.
    """

    TEMPERATURES = (0.01, 1.0)

    def __init__(
        self,
        in_dim: int,
        hidden_dims: tuple[int, ...] = (128, 64),
        out_dim: int = 128,
        norm: str = "layer",
        norm_groups: int = 32,
        dropout: float = 0.0,
        direction: str = "both",
        temperature: float = 0.07,
        bank_size: int = 0,
        hard_k: int = 64,
        hard_mode: str = "denominator",
        hard_momentum: float = 0.0,
    ):
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r} is none of {', '.join(DIRECTIONS)}")
        low, high = self.TEMPERATURES
        if not low <= temperature <= high:
            raise ValueError(f"temperature {temperature} is outside [{low}, {high}]")
        self.direction = direction
        self.projector = projector(
            in_dim, tuple(hidden_dims), out_dim, norm=norm, norm_groups=norm_groups, dropout=dropout
        )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.directions = [("visible", "infrared"), ("infrared", "visible")][: 2 if direction == "both" else 1]
        self.hard = None
        if bank_size:
            self.hard = HardNegatives(
                self.projector,
                size=bank_size,
                dim=out_dim,
                k=hard_k,
                mode=hard_mode,
                momentum=hard_momentum,
                modalities=tuple(key for _, key in self.directions),
            )

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def embed(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (N, out_dim), rows of length 1 (a zero row stays zero)."""
        return embed(self.projector, features)

    def forward(self, visible: Tensor, infrared: Tensor, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """`compare` for its InfoNCE loss and its figures alone."""
        found = self.compare(visible, infrared, ids)
        return found.losses["loss_macl"], found.statistics

    def compare(self, visible: Tensor, infrared: Tensor, ids: Tensor | None = None) -> Contrast:
        """visible, infrared: (N, in_dim) features, N may differ between processes and be 0. ids: (N,) int64, the scene
        of each row (-1: not known), wanted where there are hard negatives: rows of the bank of a query's own scene,
        which may show the same thing, are none of its negatives.

        -> losses: loss_macl, a mean over the queries of all processes (exactly 0 but still connected where there are
        none, or a single one), and loss_dhn with hard negatives of mode "softplus". For the log: macl_candidates, the
        number of keys of the batch, macl_relative, the InfoNCE loss over those divided by ln(candidates) (1 is
        chance), macl_recall, the share of queries whose positive scores highest among them, temperature, and with
        hard negatives dhn_fill, the filled share of the banks, dhn_hardest, the similarity of a query's hardest
        negative (mean), and dhn_masked, the share of the rows in use that were of the query's scene.

        In training the embeddings enter the banks afterwards: what a query meets there is older than this batch.
        """
        if self.hard is not None and ids is None:
            raise ValueError("hard negatives need the scene of every row, so that none of them shows the positive")
        with torch.no_grad():  # in place, so that a temperature at a bound can come back from it
            self.log_temperature.clamp_(*map(math.log, self.TEMPERATURES))
        features = {"visible": visible, "infrared": infrared}
        embeddings = {name: self.embed(rows) for name, rows in features.items()}
        gathered = {key: distributed.gather_and_place(embeddings[key]) for _, key in self.directions}
        keys = {key: rows for key, (rows, _) in gathered.items()}
        results = [self._one_direction(embeddings[query], *gathered[key], key, ids) for query, key in self.directions]
        losses = {name: torch.stack([found[0][name] for found in results]).mean() for name in results[0][0]}
        statistics = self._statistics([sums for _, sums in results], keys)
        if self.hard is not None and self.training:
            self.hard.enqueue(self.projector, features, keys, ids)
        return Contrast(**embeddings, losses=losses, statistics=statistics)

    def _one_direction(
        self, query: Tensor, keys: Tensor, first: int, modality: str, ids: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of the queries of this process, and sums over them for the log. The first one's positive is row
        `first` of the keys."""
        losses, positive, recalled = self._infonce(query, keys, first)
        sums = {"loss": losses.detach().sum(), "recalled": recalled}
        found = {}
        if self.hard is not None:
            chosen, of_bank = self.hard.choose(query, modality, ids)
            sums |= of_bank
            if self.hard.mode == "softplus":
                found["loss_dhn"] = softplus(chosen, self.temperature)
            elif len(query):
                losses = in_denominator(losses, positive, chosen, self.temperature)
        found["loss_macl"] = distributed.global_mean(losses.sum(), len(query))
        return found, sums

    def _infonce(self, query: Tensor, keys: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and positive logits, (N,) each with their graph, and the number of recalled positives."""
        if len(query) == 0:
            nothing = (query.sum() + keys.sum()) * 0 * self.temperature
            return nothing, nothing, nothing.detach()
        losses, found = kernels.contrastive_loss(
            query,
            keys,
            1 / self.temperature,
            target=first + torch.arange(len(query), device=query.device),
            reduction="none",
            with_stats=True,
        )
        positive = (query * keys[first : first + len(query)]).sum(dim=1) / self.temperature
        return losses, positive, (found.positive > found.largest_negative).sum()

    @torch.no_grad()
    def _statistics(self, sums: list[dict[str, Tensor]], keys: dict[str, Tensor]) -> dict[str, Tensor]:
        """Figures over all processes, means over the directions."""
        names = list(sums[0])
        total = distributed.all_reduce_sum(
            torch.stack([torch.stack([one[name].double() for name in names]) for one in sums])
        )
        total = dict(zip(names, total.unbind(1), strict=True))  # (directions,) each
        count = len(next(iter(keys.values())))
        chance = count * math.log(count) if count > 1 else math.inf
        found = {
            "macl_candidates": self.temperature.new_tensor(float(count)),
            "macl_relative": total["loss"].mean() / chance,
            "macl_recall": total["recalled"].mean() / max(1, count),
            "temperature": self.temperature.detach(),
        }
        if self.hard is not None:
            banks = self.hard.banks.values()
            found["dhn_fill"] = torch.stack([bank.valid / len(bank.buffer) for bank in banks]).mean()
            found["dhn_hardest"] = total["hardest"].sum() / total["with_negatives"].sum().clamp(min=1)
            found["dhn_masked"] = total["masked"].sum() / total["in_use"].sum().clamp(min=1)
        return {name: value.to(self.temperature.dtype) for name, value in found.items()}
