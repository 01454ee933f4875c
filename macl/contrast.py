"""Modal-aware contrastive learning (MACL): the two modalities' embeddings of the same thing attract each other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import training.distributed as distributed
from macl.precision import at_least_float32

PROJECTOR_NORMS = ("none", "layer", "group", "batch")
DIRECTIONS = ("both", "visible_to_infrared")


class ProjectorBatchNorm(nn.BatchNorm1d):
    """BatchNorm that falls back to its running statistics where a batch has fewer than two rows to take them from."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def projector(
    in_dim: int, hidden_dims: tuple[int, ...], out_dim: int, *, norm: str, norm_groups: int, dropout: float
) -> nn.Sequential:
    """Linear, norm, ReLU and dropout for every hidden width, then a Linear to `out_dim`."""
    norms = {
        "none": lambda width: None,
        "layer": nn.LayerNorm,
        "group": lambda width: nn.GroupNorm(norm_groups, width),
        "batch": ProjectorBatchNorm,
    }
    if norm not in norms:
        raise ValueError(f"projector norm {norm!r} is none of {', '.join(PROJECTOR_NORMS)}")
    layers: list[nn.Module | None] = []
    for width in hidden_dims:
        layers += [nn.Linear(in_dim, width), norms[norm](width), nn.ReLU(), nn.Dropout(dropout) if dropout else None]
        in_dim = width
    return nn.Sequential(*(layer for layer in layers if layer is not None), nn.Linear(in_dim, out_dim))


class MACLHead(nn.Module):
    """A projector shared by both modalities and the InfoNCE loss between them (van den Oord et al., 2018, equation 4).

    Row i of both inputs shows the same thing; the other rows (of all processes) are the negatives.

    in_dim, hidden_dims, out_dim: of the projector. norm: "none", "layer", "group" (`norm_groups` groups; with one or
    two values a group it
    forgets its input) or "batch". direction: "both" averages visible -> infrared and infrared -> visible, as CLIP
    does; "visible_to_infrared" is one half of it. temperature: the initial one; it is learned through its logarithm and
    held in [0.01, 1].
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

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def embed(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (N, out_dim), rows of length 1 (a zero row stays zero)."""
        return F.normalize(at_least_float32(self.projector(features)), dim=1)

    def forward(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """visible, infrared: (N, in_dim) features, N may differ between processes and be 0.

        -> the loss, a mean over the queries of all processes (exactly 0 but still connected where there are none, or
        a single one), and for the log: macl_candidates, the number of keys a query chooses from, macl_relative, the
        loss divided by
        ln(candidates) (1 is chance), macl_recall, the share of queries whose positive scores highest, and temperature.
        """
        with torch.no_grad():  # in place, so that a temperature at a bound can come back from it
            self.log_temperature.clamp_(*map(math.log, self.TEMPERATURES))
        visible, infrared = self.embed(visible), self.embed(infrared)
        pairs = [(visible, infrared), (infrared, visible)][: 2 if self.direction == "both" else 1]
        results = [self._one_direction(query, key) for query, key in pairs]
        loss = torch.stack([loss for loss, _ in results]).mean()
        statistics = {name: torch.stack([found[name] for _, found in results]).mean() for name in results[0][1]}
        return loss, statistics | {"temperature": self.temperature.detach()}

    def _one_direction(self, query: Tensor, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = distributed.gather_objects(len(query))
        first = sum(rows[: distributed.rank()])
        keys = distributed.gather_with_gradient(key)
        if len(query) == 0:
            losses = (query.sum() + keys.sum()) * 0 * self.temperature
            recalled = losses.detach()
        else:
            losses, found = kernels.contrastive_loss(
                query,
                keys,
                1 / self.temperature,
                target=first + torch.arange(len(query), device=query.device),
                reduction="none",
                with_stats=True,
            )
            recalled = (found.positive > found.largest_negative).sum()
        loss = distributed.global_mean(losses.sum(), len(query))
        with torch.no_grad():
            total = distributed.sum_across(torch.stack([losses.detach().sum(), recalled.to(losses.dtype)]))
            candidates = loss.new_tensor(float(sum(rows)))
            mean, recall = total / candidates.clamp(min=1)
            relative = mean / candidates.log() if sum(rows) > 1 else torch.zeros_like(mean)
        return loss, {"macl_candidates": candidates, "macl_relative": relative, "macl_recall": recall}
