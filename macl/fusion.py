"""One feature pyramid out of two."""

import torch
from torch import Tensor, nn

FUSIONS = ("mean", "gated", "visible", "infrared")


class Fusion(nn.Module):
    """Fuses the pyramids of the two modalities, level by level, over the modalities that are present in each image.

    kind: "mean"; "gated", a learned weight per position and channel; or "visible" / "infrared", that pyramid alone.
    """

    def __init__(self, kind: str, *, channels: int):
        super().__init__()
        if kind not in FUSIONS:
            raise ValueError(f"fusion {kind!r} is none of {', '.join(FUSIONS)}")
        self.kind = kind
        self.gate = nn.Conv2d(2 * channels, channels, 1) if kind == "gated" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)  # an even mean at the start
            nn.init.zeros_(self.gate.bias)

    def forward(self, pyramids: dict[str, list[Tensor]], present: Tensor | None = None) -> list[Tensor]:
        """pyramids: maps (B, C, H_l, W_l) of "visible" and / or "infrared"; present (B, 2) bool, None = all given
        ones.
        """
        if self.kind in ("visible", "infrared"):
            if self.kind not in pyramids:
                raise ValueError(f"this model detects in {self.kind} images alone, and none was given")
            return pyramids[self.kind]
        if len(pyramids) == 1:
            (alone,) = pyramids.values()
            return alone
        return [
            self._fuse(visible, infrared, present)
            for visible, infrared in zip(pyramids["visible"], pyramids["infrared"], strict=True)
        ]

    def _fuse(self, visible: Tensor, infrared: Tensor, present: Tensor | None) -> Tensor:
        if self.gate is None and present is None:
            return (visible + infrared) / 2
        weight = 0.5 if self.gate is None else torch.sigmoid(self.gate(torch.cat([visible, infrared], dim=1)))
        if present is not None:
            sees_visible, sees_infrared = present.to(visible.dtype)[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
            # Both present: the learned weight; one present: all of that one.
            weight = torch.where((sees_visible * sees_infrared).bool(), weight, sees_visible)
        return torch.lerp(infrared, visible, torch.as_tensor(weight, dtype=visible.dtype, device=visible.device))
