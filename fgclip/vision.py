"""The image tower: a vision transformer whose pooled output describes the image and whose tokens describe its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgclip.transformer import Encoder


def interpolate_positions(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Position table (1 + g * g, C) of a square grid to (1 + h * w, C) for size (h, w).

    The class token's row stays; the grid is resized bicubically (align_corners=False), rows first.
    """
    side = round((len(table) - 1) ** 0.5)
    if tuple(size) == (side, side):
        return table
    grid = table[1:].unflatten(0, (side, side)).permute(2, 0, 1).unsqueeze(0)  # (1, C, g, g)
    grid = F.interpolate(grid.float(), size=tuple(size), mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:1], grid[0].flatten(1).T])  # (1 + h * w, C)


class VisionEmbeddings(nn.Module):
    """Patches, a class token before them, and the position table."""

    def __init__(self, image_size: int, patch_size: int, width: int):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pixels (B, 3, H, W) to tokens (B, 1 + h * w, C) and (h, w)."""
        patch = self.patch_embedding.kernel_size[0]
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % patch or pixels.shape[3] % patch:
            raise ValueError(f"pixels {tuple(pixels.shape)} are not (B, 3, H, W) with sides that {patch} divides")
        patches = self.patch_embedding(pixels)  # (B, C, h, w)
        size = patches.shape[-2:]
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h * w, C)
        return tokens + interpolate_positions(self.position_embedding.weight, size), size


class VisionTower(nn.Module):
    """A ViT with a norm before its blocks. image_size: side of the square images that the position table is for."""

    def __init__(
        self, *, image_size: int = 224, patch_size: int = 16, width: int = 768, layers: int = 12, heads: int = 12,
        mlp_width: int = 3072, activation: str = "quick_gelu", eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.embeddings = VisionEmbeddings(image_size, patch_size, width)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)  # the published spelling
        self.encoder = Encoder(layers, width, heads, mlp_width, activation, eps)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)
        nn.init.normal_(self.embeddings.class_embedding, std=width**-0.5)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=width**-0.5)

    def penultimate(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input (B, 1 + h * w, C) of the last block, which pooled and dense features share, and (h, w)."""
        tokens, size = self.embeddings(pixels)
        return self.encoder.penultimate(self.pre_layrnorm(tokens)), size

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token (B, C) after the last block, from `penultimate`."""
        return self.post_layernorm(self.encoder.run(self.encoder.layers[-1].pool, tokens, 0))

    def dense(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The patches (B, C, h, w) after the value path of the last block, from `penultimate`."""
        patches = self.encoder.run(self.encoder.layers[-1].value_path, tokens[:, 1:])
        return self.post_layernorm(patches).transpose(1, 2).unflatten(2, size)  # (B, C, h, w)
