"""The network that maps pooled features to the embeddings of the contrastive losses."""

import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.device import at_least_float32

PROJECTOR_NORMS = ("none", "layer", "group", "batch")


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
    norms = {"layer": nn.LayerNorm, "batch": ProjectorBatchNorm}
    norms["group"] = lambda width: nn.GroupNorm(norm_groups, width)
    layers: list[nn.Module] = []
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
