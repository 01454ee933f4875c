"""Boxes: which of them are usable, and where they lie on a feature map."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


class BoxStatistics(Counter):
    """Numbers of boxes that `usable_boxes` met: total, inverted, empty, and clipped of those kept."""

    @property
    def invalid(self) -> int:
        return self["inverted"] + self["empty"]

    def __str__(self) -> str:
        return (
            f"{self['total']} boxes, {self.invalid} ({self.invalid / max(self['total'], 1):.2%}) dropped: "
            f"{self['inverted']} inverted, {self['empty']} without area inside the image; "
            f"{self['clipped']} kept and clipped"
        )


def usable_boxes(boxes: Tensor, statistics: BoxStatistics | None = None) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4), xyxy in 0..1, clipped to the image, without the inverted and empty ones.

    Returns the kept boxes (K, 4) and which were kept (N,) bool; counts into `statistics` where given.
    """
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    clipped = boxes.clamp(0, 1)
    kept = ~inverted & (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
    if statistics is not None:
        changed = kept & (clipped != boxes).any(dim=1)
        kinds = dict(inverted=inverted, empty=~inverted & ~kept, clipped=changed)
        statistics.update({name: int(which.sum()) for name, which in kinds.items()}, total=len(boxes))
    return clipped[kept], kept


def boxes_to_rois(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Boxes (n_i, 4) per image, xyxy in 0..1, to (R, 5): image index, xyxy in cells of an (h, w) map."""
    height, width = size
    cells = torch.cat(list(boxes)) * boxes[0].new_tensor([width, height, width, height])
    index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    return torch.cat([index, cells], dim=1)
