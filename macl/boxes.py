"""Anchors, matching, sampling and coding of boxes, with the conventions of torchvision's Faster R-CNN.

Boxes are (N, 4) float32, x1, y1, x2, y2 in pixels. Sources: Ren et al., Faster R-CNN (2015), section 3.1.2 for the
anchors and the box parametrisation; Girshick, Fast R-CNN (2015), section 2.3 for the sampling.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

BELOW, BETWEEN = -1, -2  # what `match` says of a box that matched nothing
MAX_LOG_RATIO = math.log(1000.0 / 16)  # a decoded side grows by at most this factor


class AnchorGenerator(nn.Module):
    """Anchors of every level, rounded as torchvision rounds them.

    sizes: one tuple of side lengths in pixels a level; aspect_ratios: height / width, the same on every level.
    """

    def __init__(self, *, sizes: tuple[tuple[float, ...], ...], aspect_ratios: tuple[float, ...]):
        super().__init__()
        self.sizes, self.aspect_ratios = sizes, aspect_ratios
        for level, scales in enumerate(sizes):
            self.register_buffer(f"cell_{level}", self._cell(scales), persistent=False)

    @property
    def per_location(self) -> int:
        return len(self.sizes[0]) * len(self.aspect_ratios)

    def _cell(self, scales: tuple[float, ...]) -> Tensor:
        heights = torch.sqrt(torch.tensor(self.aspect_ratios, dtype=torch.float32))
        sides = torch.tensor(scales, dtype=torch.float32)
        h = (heights[:, None] * sides).flatten()
        w = ((1 / heights)[:, None] * sides).flatten()
        return (torch.stack([-w, -h, w, h], dim=1) / 2).round()  # (A, 4)

    def forward(self, features: list[Tensor], image_size: tuple[int, int]) -> list[Tensor]:
        """features: (B, C, H_l, W_l) a level; image_size: height and width of the padded batch. -> (H_l * W_l * A, 4)
        a level.
        """
        if len(features) != len(self.sizes):
            raise ValueError(f"{len(features)} feature levels but anchor sizes for {len(self.sizes)}")
        levels = []
        for level, feature in enumerate(features):
            height, width = feature.shape[-2:]
            cell = getattr(self, f"cell_{level}")
            ys = torch.arange(height, device=cell.device) * (image_size[0] // height)
            xs = torch.arange(width, device=cell.device) * (image_size[1] // width)
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((shifts + cell).reshape(-1, 4))
        return levels


class BoxCoder:
    """Boxes as offsets from reference boxes: (dx, dy, dw, dh) of Faster R-CNN's equation 2, times `weights`."""

    def __init__(self, weights: tuple[float, float, float, float]):
        self.weights = weights

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        """(N, 4), (N, 4) -> offsets (N, 4) that `decode` turns back into `boxes`."""
        scale = boxes.new_tensor(self.weights)
        size, reference_size = boxes[:, 2:] - boxes[:, :2], references[:, 2:] - references[:, :2]
        centre, reference_centre = boxes[:, :2] + 0.5 * size, references[:, :2] + 0.5 * reference_size
        shift = (centre - reference_centre) / reference_size
        return scale * torch.cat([shift, torch.log(size / reference_size)], dim=1)

    def decode(self, offsets: Tensor, references: Tensor) -> Tensor:
        """offsets (N, ..., 4), references (N, 4) -> boxes of the shape of `offsets`."""
        offsets = offsets / offsets.new_tensor(self.weights)
        references = references.to(offsets.dtype).view(-1, *[1] * (offsets.dim() - 2), 4)
        size = references[..., 2:] - references[..., :2]
        centre = references[..., :2] + 0.5 * size + offsets[..., :2] * size
        half = 0.5 * size * torch.exp(offsets[..., 2:].clamp(max=MAX_LOG_RATIO))
        return torch.cat([centre - half, centre + half], dim=-1)


def match(
    boxes: Tensor,
    targets: Tensor,
    *,
    foreground: float,
    background: float,
    keep_best: bool,
    ignore: Tensor | None = None,
) -> Tensor:
    """Which target each box stands for.

    boxes (N, 4), targets (G, 4). A box takes its target of highest IoU when that is at least `foreground`; below
    `background` it is `BELOW` (negative), in between `BETWEEN` (left out). With `keep_best` every target also keeps
    the boxes that overlap it most, however little. Boxes that are not positive and lie with at least half of their
    area in one of the `ignore` (K, 4) boxes are left out too. -> (N,) int64.
    """
    if targets.shape[0]:
        overlap = ops.box_iou(targets, boxes)  # (G, N)
        best, matched = overlap.max(dim=0)
        result = torch.where(best >= foreground, matched, torch.where(best < background, BELOW, BETWEEN))
        if keep_best:
            most = overlap.max(dim=1, keepdim=True).values
            kept = (overlap == most).any(dim=0)
            result = torch.where(kept, matched, result)
    else:
        result = torch.full((boxes.shape[0],), BELOW, dtype=torch.int64, device=boxes.device)
    if ignore is not None and ignore.shape[0]:
        covered = _intersection(boxes, ignore).max(dim=1).values >= 0.5 * ops.box_area(boxes)
        result = torch.where((result == BELOW) & covered, BETWEEN, result)
    return result


def _intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """(N, 4), (K, 4) -> (N, K) areas."""
    top_left = torch.maximum(boxes[:, None, :2], others[:, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    return (bottom_right - top_left).clamp(min=0).prod(dim=-1)


def sample(
    matched: Tensor, *, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """At most `count` boxes, at most `positive_fraction` of them positive, the rest negative. -> indices of both.

    Draws permutations in torchvision's order, so that the same generator state gives its samples.
    """
    positive, negative = torch.where(matched >= 0)[0], torch.where(matched == BELOW)[0]
    positives = min(positive.numel(), int(count * positive_fraction))
    negatives = min(negative.numel(), count - positives)

    def draw(indices: Tensor, number: int) -> Tensor:
        order = torch.randperm(indices.numel(), device=indices.device, generator=generator)
        return indices[order[:number]]

    return draw(positive, positives), draw(negative, negatives)


def box_regression_loss(
    kind: str, offsets: Tensor, targets: Tensor, references: Tensor, coder: BoxCoder, beta: float
) -> Tensor:
    """Summed loss of predicted offsets (P, 4) against target boxes (P, 4) of reference boxes (P, 4).

    kind: "smooth_l1" (`beta` as torch's, on the offsets), "l1", or "giou" (on the decoded boxes; Rezatofighi 2019).
    """
    if kind == "giou":
        return ops.generalized_box_iou_loss(coder.decode(offsets, references), targets, reduction="sum")
    encoded = coder.encode(targets, references)
    if kind == "l1":
        return F.l1_loss(offsets, encoded, reduction="sum")
    if kind == "smooth_l1":
        return F.smooth_l1_loss(offsets, encoded, beta=beta, reduction="sum")
    raise ValueError(f"box loss {kind!r} is none of smooth_l1, l1, giou")
