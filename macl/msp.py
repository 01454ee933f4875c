"""Multi-scale pyramid reweighting (MSP): a learned spatial attention on every pyramid map."""

import torch
from torch import Tensor, nn


class MSPReweight(nn.Module):
    """out = x * (1 + gate * sigmoid(attention(x))), shared by all levels and both modalities.

    The gate is one learned scalar that starts at 0, so a network with MSP starts as the one without.

    hidden: width of a ReLU layer in the attention; None for a single 1x1 convolution.
    """

    def __init__(self, channels: int, *, hidden: int | None = None):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        if hidden is None:
            self.attention = nn.Conv2d(channels, 1, 1)
        else:
            self.attention = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 1, 1))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps: (B, channels, H_l, W_l). -> the same shapes."""
        return [x * (1 + self.gate * torch.sigmoid(self.attention(x))) for x in maps]
