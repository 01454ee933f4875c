"""One feature pyramid out of two."""

import torch
from torch import Tensor, nn

FUSIONS = ("mean", "gated", "visible", "infrared")


class Fusion(nn.Module):
    """Fuses the pyramids of the two modalities, level by level, over the modalities that are present in each image.

    kind: "mean"; "gated", a learned weight per position and channel; or "visible" / "infrared", that pyramid alone.
    dropout: probabilities that the visible, or the infrared, maps of a training image are masked; never both.
    """

    def __init__(self, kind: str, *, channels: int, dropout: tuple[float, float] = (0.0, 0.0)):
        super().__init__()
        if sum(dropout) > 1 or min(dropout) < 0:
            raise ValueError(f"modality_dropout {dropout}: expected two probabilities, their sum at most 1")
        self.kind, self.dropout = kind, dropout
        self.gate = nn.Conv2d(2 * channels, channels, 1) if kind == "gated" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)  # an even mean at the start
            nn.init.zeros_(self.gate.bias)

    def forward(self, pyramids: dict[str, list[Tensor]]) -> list[Tensor]:
        """pyramids: maps (B, C, H_l, W_l) of "visible", "infrared" or both. -> (B, C, H_l, W_l)."""
        finest, *_ = next(iter(pyramids.values()))
        present = self.sample_modality_mask(len(finest)) if self.training and len(pyramids) == 2 else None
        if self.kind in ("visible", "infrared"):
            if self.kind not in pyramids:
                raise ValueError(f"this model detects in {self.kind} images alone, and none was given")
            return pyramids[self.kind]
        if len(pyramids) == 1:
            return next(iter(pyramids.values()))
        levels = zip(pyramids["visible"], pyramids["infrared"], strict=True)
        return [self.fuse(visible, infrared, present) for visible, infrared in levels]

    def sample_modality_mask(self, count: int) -> Tensor | None:
        """(count, 2) bool: the modalities that are present in each training image; None where all are."""
        drop_visible, drop_infrared = self.dropout
        if drop_visible + drop_infrared == 0:
            return None
        draw = torch.rand(count)
        return torch.stack([draw >= drop_visible, draw < 1 - drop_infrared], dim=1)

    def fuse(self, visible: Tensor, infrared: Tensor, present: Tensor | None) -> Tensor:
        """Maps (B, C, H, W) of both, and (B, 2) bool -> (B, C, H, W)."""
        if self.gate is None and present is None:
            return (visible + infrared) / 2
        weight = visible.new_tensor(0.5)
        if self.gate is not None:
            weight = torch.sigmoid(self.gate(torch.cat([visible, infrared], dim=1)))  # (B, C, H, W)
        if present is not None:
            sees_visible, sees_infrared = present.to(visible)[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
            # Both present: the learned weight; one present: all of that one.
            weight = torch.where((sees_visible * sees_infrared).bool(), weight, sees_visible)
        return torch.lerp(infrared, visible, weight.to(visible.dtype))
