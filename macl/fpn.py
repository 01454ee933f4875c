"""Feature pyramid network (Lin et al., 2017)."""

import torch.nn.functional as F
from torch import Tensor, nn

from macl.msp import MSPReweight


class FPN(nn.Module):
    """Top-down pyramid over the backbone's maps.

    in_channels: of each backbone map, finest first.
    out_channels: of each map returned.
    out_levels: maps returned; those beyond the backbone's are the coarsest one subsampled by 2, 4, ...
    """

    def __init__(self, *, in_channels: list[int], out_channels: int, out_levels: int, msp: MSPReweight | None = None):
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.outer = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        self.extra_levels = out_levels - len(in_channels)
        self.msp = msp
        for convolution in [*self.inner, *self.outer]:
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps: (B, C_l, H_l, W_l), finest first. -> `out_levels` maps (B, out_channels, H_l, W_l)."""
        inner = [convolution(x) for convolution, x in zip(self.inner, maps, strict=True)]
        for level in range(len(inner) - 2, -1, -1):
            inner[level] = inner[level] + F.interpolate(inner[level + 1], size=inner[level].shape[-2:], mode="nearest")
        pyramid = [convolution(x) for convolution, x in zip(self.outer, inner, strict=True)]
        for _ in range(self.extra_levels):
            pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        return pyramid if self.msp is None else self.msp(pyramid)
