"""One feature pyramid out of two."""

import torch
from torch import Tensor, nn

FUSIONS = ("mean", "visible", "infrared")


class Fusion(nn.Module):
    """Fuses the pyramids of the two modalities, level by level, over the modalities that are present in each image.

    kind: "mean", or "visible" / "infrared", that pyramid alone.
    dropout: probabilities that the visible, or the infrared, maps of a training image are masked; never both.
    """

    def __init__(self, kind: str, *, dropout: tuple[float, float] = (0.0, 0.0)):
        super().__init__()
        if sum(dropout) > 1 or min(dropout) < 0:
            raise ValueError(f"modality_dropout {dropout}: expected two probabilities, their sum at most 1")
        self.kind, self.dropout = kind, dropout

    def forward(self, pyramids: dict[str, list[Tensor]], given: list[Tensor | None] | None = None) -> list[Tensor]:
        """pyramids: maps (B, C, H_l, W_l) of "visible", "infrared" or both. -> (B, C, H_l, W_l).

        given: (2,) bool per image, the cameras there are; None for both.
        """
        finest, *_ = next(iter(pyramids.values()))
        present = self.sample_modality_mask(len(finest)) if self.training and len(pyramids) == 2 else None
        if any(one is not None for one in given or ()):
            given = torch.stack([torch.ones(2, dtype=torch.bool) if one is None else one.cpu() for one in given])
            present = given if present is None else torch.where(given.all(1, keepdim=True), present, given)
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
        fused = (visible + infrared) / 2
        if present is None:
            return fused
        sees_visible, sees_infrared = present.to(visible.device)[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
        alone = torch.where(sees_visible, visible, infrared)
        return torch.where(sees_visible & sees_infrared, fused, alone)
