"""Anchors, matching, sampling, coding and scaling of boxes, with the conventions of torchvision's Faster R-CNN.

Boxes are (N, 4) float32, x1, y1, x2, y2 in pixels. Sources: Ren et al., Faster R-CNN (2015), section 3.1.2 for the
anchors and the box parametrisation; Girshick, Fast R-CNN (2015), section 2.3 for the sampling.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from trainkit.errors import InputError

Size = tuple[int, int]  # (height, width) in pixels

BOX_LOSSES = ("smooth_l1", "l1", "giou")
BELOW, BETWEEN = -1, -2  # for `match`: a negative box, and one that is left out
MAX_LOG_RATIO = math.log(1000.0 / 16)  # of a decoded side to its reference's, at most


class AnchorGenerator(nn.Module):
    """Anchors rounded as torchvision's. sizes: a side in pixels per level. aspect_ratios: height / width."""

    def __init__(self, *, sizes: tuple[float, ...], aspect_ratios: tuple[float, ...]):
        super().__init__()
        heights = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))
        for level, size in enumerate(sizes):
            w, h = 1 / heights * size, heights * size
            cell = (torch.stack([-w, -h, w, h], dim=1) / 2).round()  # (A, 4)
            self.register_buffer(f"cell_{level}", cell, persistent=False)

    def forward(self, features: list[Tensor], image_size: Size) -> list[Tensor]:
        """features: (B, C, H_l, W_l). image_size: of the padded batch. -> (H_l * W_l * A, 4) per level."""
        levels = []
        for cell, feature in zip(self.buffers(), features, strict=True):
            height, width = feature.shape[-2:]
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
    boxes: Tensor, targets: Tensor, *, foreground: float, background: float, keep_best: bool, ignore: Tensor
) -> Tensor:
    """Index of the target of highest IoU for each box, BELOW (negative) or BETWEEN (left out): (N,) int64.

    boxes: (N, 4). targets: (G, 4).
    foreground, background: IoU of a positive box at least, of a negative one less.
    keep_best: whether every target also keeps the boxes that overlap it most, however little.
    ignore: (K, 4). Negatives with at least half of their area in one of these are left out.
    """
    result = torch.full((len(boxes),), BELOW, dtype=torch.int64, device=boxes.device)
    if len(targets):
        overlap = ops.box_iou(targets, boxes)  # (G, N)
        best, matched = overlap.max(dim=0)
        result = torch.where(best >= foreground, matched, torch.where(best < background, BELOW, BETWEEN))
        if keep_best:
            kept = (overlap == overlap.max(dim=1, keepdim=True).values).any(dim=0)
            result = torch.where(kept, matched, result)
    if len(ignore):
        top_left = torch.maximum(boxes[:, None, :2], ignore[:, :2])  # (N, K, 2)
        bottom_right = torch.minimum(boxes[:, None, 2:], ignore[:, 2:])
        common = (bottom_right - top_left).clamp(min=0).prod(dim=-1).max(dim=1).values
        result = torch.where((result == BELOW) & (common >= 0.5 * ops.box_area(boxes)), BETWEEN, result)
    return result


def sample(matched: Tensor, *, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of at most `count` boxes: positives, at most `positive_fraction` of `count`, and negatives.

    Permutations are drawn in torchvision's order, so that the same generator state gives the same samples.
    """
    positive, negative = torch.where(matched >= 0)[0], torch.where(matched == BELOW)[0]
    positives = min(len(positive), int(count * positive_fraction))
    positive = positive[torch.randperm(len(positive), device=matched.device)[:positives]]
    negative = negative[torch.randperm(len(negative), device=matched.device)[: count - positives]]
    return positive, negative


def box_regression_loss(
    kind: str, offsets: Tensor, targets: Tensor, references: Tensor, coder: BoxCoder, beta: float
) -> Tensor:
    """Summed loss of predicted offsets (P, 4) against target boxes (P, 4) of reference boxes (P, 4).

    kind: "smooth_l1" (`beta` as torch's) or "l1" of the offsets, or "giou" of the decoded boxes (Rezatofighi, 2019).
    """
    if kind == "giou":
        return ops.generalized_box_iou_loss(coder.decode(offsets, references), targets, reduction="sum")
    encoded = coder.encode(targets, references)
    if kind == "l1":
        return F.l1_loss(offsets, encoded, reduction="sum")
    return F.smooth_l1_loss(offsets, encoded, beta=beta, reduction="sum")


def rescale(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Boxes of an image of size `old` in pixels of the same image at size `new`."""
    ratio_y, ratio_x = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def prepare_target(target: dict[str, Tensor], old: Size, new: Size) -> dict[str, Tensor]:
    """The target in pixels of the resized image, its ignored boxes set apart under `ignored` (K, 4).

    own_boxes (N, 2, 4): those of visible and of infrared, `boxes` twice where they share them.
    """
    boxes = target["boxes"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"target boxes must be (N, 4) with x1 < x2 and y1 < y2, got {boxes.tolist()}")
    boxes = rescale(boxes, old, new)
    ignore = target.get("ignore", torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device))
    kept = {key: target[key][~ignore] for key in ("labels", "visible_in", "keys") if key in target}
    whole = {key: target[key] for key in ("scene", "domain") if key in target}
    own = rescale(own_boxes(target), old, new)[~ignore]
    return {"boxes": boxes[~ignore], "own_boxes": own, "ignored": boxes[ignore], **kept, **whole}


def own_boxes(target: dict[str, Tensor]) -> Tensor:
    """(N, 2, 4): the boxes in visible and in infrared."""
    return target.get("own_boxes", target["boxes"][:, None].expand(-1, 2, -1))


def check_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raises InputError unless all values are finite; with NaN a detector would silently find nothing."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{what} are not finite; the run has diverged, or --amp fp16 is too narrow for its values")
