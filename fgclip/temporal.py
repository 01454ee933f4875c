"""One feature for the frames of a video, out of a feature for each."""

import torch
from torch import Tensor, nn

from fgclip.model import unit

EXCLUDED = -1e9  # a score that the softmax makes 0, finite so that a video without frames stays finite


class TemporalPool(nn.Module):
    """Attention pooling over frames, for image features of `encode_image`; no script trains it.

    Two post-norm transformer layers (Vaswani et al. 2017) let the frames see each other; a softmax over a score for
    each frame weighs their sum. dim: width D of the features, divisible by `heads`.
    """

    def __init__(self, dim: int, *, heads: int = 8, layers: int = 2, dropout: float = 0.1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, "gelu", batch_first=True)
        self.temporal_transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.temporal_attention = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, 1))

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """frames: (B, T, D), un-normalised; mask: (B, T) bool, True for real frames. -> (B, D), rows of length 1."""
        padding = None if mask is None else ~mask
        seen = self.temporal_transformer(frames, src_key_padding_mask=padding)  # (B, T, D)
        scores = self.temporal_attention(seen).squeeze(-1)  # (B, T)
        if padding is not None:
            scores = scores.masked_fill(padding, EXCLUDED)
            seen = torch.where(padding[..., None], 0, seen)
        return unit((scores.softmax(dim=1)[..., None] * seen).sum(dim=1))
