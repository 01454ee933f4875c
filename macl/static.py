"""A detector's inference once more, with fixed numbers of proposals and detections, as other runtimes want it."""

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torchvision import ops

from kernels.reference import assign_levels
from macl import merging, roi_head, rpn
from macl.backbone import MODALITIES
from macl.boxes import Size
from macl.detector import MULTIPLE, PairedFasterRCNN

EDGE = 2  # copies of a map's last row and column, beyond which no sample of a box inside the image reads
SAMPLES = 2  # of a bin and axis, the operators' default
ABSENT = -1.0  # score of a row that is none


def overlaps(boxes: Tensor) -> Tensor:
    """IoU of boxes (G, N, 4) with each other: (G, N, N)."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    common, area = (high - low).clamp(min=0).prod(dim=-1), (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    return common / (area[:, :, None] + area[:, None] - common)


def survivors(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Which rows greedy non-maximum suppression keeps in each of G sets: (G, N) bool.

    boxes: (G, N, 4). scores: (G, N), below 0 for a row that is none.

    Only one set of rows lacks exactly those that overlap a better one of the set. Each round of the loop settles one
    row more, at least, so this is where it ends.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    above = (overlaps(take(boxes, order)) > iou).float().triu(1)  # (G, N, N): the row suppresses the column

    def again(kept: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        now = (kept[:, None] @ above)[:, 0].eq(0).float()
        return now, (now != kept).any()

    begin = (torch.ones_like(scores), torch.ones((), dtype=torch.bool, device=scores.device))
    kept, _ = while_loop(lambda _, changed: changed.clone(), again, begin)
    return torch.zeros_like(kept).scatter(1, order, kept).bool() & (scores >= 0)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (G, N, 4) at index (G, n): (G, n, 4)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def inside(boxes: Tensor, size: Size, smallest: float) -> tuple[Tensor, Tensor]:
    """Boxes (..., 4) clipped to an image, and which of them have sides of at least `smallest` (...) bool."""
    boxes = ops.clip_boxes_to_image(boxes, size)
    return boxes, (boxes[..., 2:] - boxes[..., :2] >= smallest).all(dim=-1)


class StaticDetector(nn.Module):
    """What a `PairedFasterRCNN` detects in images of one size, in a fixed number of rows.

    Number, height and width of the images may be symbols of torch.export. All other shapes but those of the maps are
    fixed, and no shape depends on what is found.

    detector: in evaluation mode. survivors: the function above, or one like it.
    """

    def __init__(self, detector: PairedFasterRCNN, survivors: Callable = survivors):
        super().__init__()
        self.detector, self.survivors = detector, survivors

    def forward(self, visible: Tensor | None = None, infrared: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) in 0..1, of one camera or of both.

        -> boxes (B, D, 4) in pixels, labels (B, D) int64 and scores (B, D), best first; and how many of the rows are
        detections (B,) int64, zeros behind them.
        """
        images = {name: one for name, one in zip(MODALITIES, (visible, infrared), strict=True) if one is not None}
        old, min_size = next(iter(images.values())).shape[-2:], self.detector.min_sizes[-1]
        new = old if min_size is None else self.detector.resized(old, min_size)
        padded = tuple((side + MULTIPLE - 1) // MULTIPLE * MULTIPLE for side in new)
        pyramids = self.pyramids(images, new, padded)
        groups = [tuple(images)]
        if len(images) == 2 and self.detector.merge == "logit" and self.detector.fusion.kind not in MODALITIES:
            groups += [(name,) for name in images]
        fused = [self.detector.fusion({name: pyramids[name] for name in group}) for group in groups]
        levels = [torch.cat(views) for views in zip(*fused, strict=True)]  # (V * B, C, H_l, W_l)
        threshold = self.detector.roi_head.score_threshold
        least = threshold if len(groups) == 1 else min(threshold, merging.FLOOR)
        boxes, labels, scores = self.detect(levels, *self.propose(levels, new, padded), new, least)
        if len(groups) > 1:
            views = [rows.unflatten(0, (len(groups), -1)).transpose(0, 1) for rows in (boxes, labels, scores)]
            boxes, labels, scores = self.merge(*(rows.flatten(1, 2) for rows in views), rows_of_view=boxes.shape[1])
        if min_size is not None:
            x, y = (boxes[..., axis::2] * (old[1 - axis] / new[1 - axis]) for axis in (0, 1))
            boxes = torch.stack([x, y], dim=-1).flatten(-2)
        found = scores >= 0
        return boxes * found[..., None], labels * found, scores * found, found.sum(dim=1)

    def pyramids(self, images: dict[str, Tensor], size: Size, padded: Size) -> dict[str, list[Tensor]]:
        """As `PairedFasterRCNN.pyramids`, with the resizing."""
        detector, batch = self.detector, []
        for name, image in images.items():
            if detector.min_sizes[-1] is not None:
                image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            image = (image - getattr(detector, f"{name}_mean")) / getattr(detector, f"{name}_std")
            batch.append(F.pad(image, (0, padded[1] - size[1], 0, padded[0] - size[0])))
        layout = [(name, image.shape[0]) for name, image in images.items()]
        maps = detector.neck(detector.backbone(torch.cat(batch), layout))
        split = [level.unflatten(0, (len(images), -1)) for level in maps]
        return {name: [level[i] for level in split] for i, name in enumerate(images)}

    def propose(self, levels: list[Tensor], size: Size, padded: Size) -> tuple[Tensor, Tensor]:
        """Proposals (B, P, 4), best first, and which of them are some (B, P) bool."""
        part, most, boxes, scores = self.detector.rpn, self.detector.rpn.pre_nms[1], [], []
        for logits, deltas, anchors in zip(*part.head(levels), part.anchors(levels, padded), strict=True):
            logits, index = F.pad(logits, (0, most), value=-torch.inf).topk(most)  # (B, n)
            index = index.clamp(max=anchors.shape[0] - 1)
            decoded = part.coder.decode(take(deltas, index).flatten(0, 1), anchors[index].flatten(0, 1))
            decoded, large = inside(decoded.unflatten(0, (-1, most)), size, rpn.MIN_SIDE)
            boxes.append(decoded)
            scores.append(torch.where(large & logits.isfinite(), logits.sigmoid(), ABSENT))
        boxes, scores = torch.stack(boxes, 1), torch.stack(scores, 1)  # (B, L, n, 4), (B, L, n)
        boxes, _, scores = self.best(boxes, scores, rpn.NMS_IOU, part.post_nms[1])
        return boxes, scores >= 0

    def detect(self, levels: list[Tensor], proposals: Tensor, there: Tensor, size: Size, least: float) -> tuple:
        """Boxes (B, D, 4), labels (B, D) and scores (B, D) out of proposals (B, P, 4), of which some are there.

        least: boxes of lower scores are left out.
        """
        head, count = self.detector.roi_head, proposals.shape[1]
        hidden = F.relu(head.fc7(F.relu(head.fc6(self.pool(levels, proposals).flatten(1)))))
        scores = head.cls_score(hidden).softmax(dim=1)[:, 1:].unflatten(0, (-1, count)).transpose(1, 2)  # (B, K, P)
        boxes = head.coder.decode(head.bbox_pred(hidden).unflatten(1, (-1, 4)), proposals.flatten(0, 1))[:, 1:]
        boxes, large = inside(boxes.unflatten(0, (-1, count)).transpose(1, 2), size, roi_head.MIN_SIDE)  # (B, K, P, 4)
        scores = torch.where((scores > least) & large & there[:, None], scores, ABSENT)
        boxes, index, scores = self.best(boxes, scores, head.nms_iou, head.max_detections)
        return boxes, index // count + 1, scores

    def best(self, boxes: Tensor, scores: Tensor, iou: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of boxes (B, G, n, 4) in G sets the `limit` best that survive, their index into G * n, and their scores."""
        kept = self.survivors(boxes.flatten(0, 1), scores.flatten(0, 1), iou)
        scores = torch.where(kept.view_as(scores), scores, ABSENT).flatten(1)
        scores, index = scores.topk(min(limit, scores.shape[1]))
        return take(boxes.flatten(1, 2), index), index, scores

    def pool(self, levels: list[Tensor], boxes: Tensor) -> Tensor:
        """`kernels.multiscale_roi_align` of boxes (B, P, 4) inside the image: (B * P, C, 7, 7).

        All levels lie side by side on one map, so that each box is pooled once. Their last rows and columns are
        repeated, as the operator repeats them. Samples beyond the repeated ones count as zero. They occur where a
        narrow box at the border is widened to a cell, and then all samples see the same column.
        """
        bins, scales = roi_head.OUTPUT_SIZE, self.detector.roi_head.scales
        levels = levels[: len(scales)]
        sizes = [level.shape[-2:] for level in levels]
        starts = list(accumulate((width + EDGE for _, width in sizes[:-1]), initial=0))
        below = [(0, EDGE, 0, sizes[0][0] - height + EDGE) for height, _ in sizes]
        maps = torch.cat([F.pad(one, pad, mode="replicate") for one, pad in zip(levels, below, strict=True)], dim=3)
        image = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)[:, None, None].expand(-1, boxes.shape[1], 1)
        rois = torch.cat([image, boxes], dim=-1).flatten(0, 1)  # (R, 5)
        which = assign_levels(rois, scales)[:, None] == torch.arange(len(scales), device=rois.device)  # (R, L)

        def of_level(values) -> Tensor:
            columns = [which[:, level].to(rois) * value for level, value in enumerate(values)]
            return torch.stack(columns).sum(dim=0)[:, None]  # (R, 1)

        corners = rois[:, 1:] * of_level(scales)
        low, side = corners[:, :2], (corners[:, 2:] - corners[:, :2]).clamp(min=1)  # (R, 2)
        extent = torch.cat([of_level(width for _, width in sizes), of_level(height for height, _ in sizes)], dim=1)
        steps = (torch.arange(bins * SAMPLES, device=rois.device) + 0.5) / (bins * SAMPLES)
        samples = low[..., None] + side[..., None] * steps <= extent[..., None]  # (R, 2, 14)
        across, down = samples.to(rois).unflatten(2, (bins, SAMPLES)).mean(dim=3).unbind(1)  # (R, 7) each
        start = of_level(starts)
        corners = corners + torch.cat([start, start * 0, start, start * 0], dim=1)
        pooled = ops.roi_align(maps, torch.cat([rois[:, :1], corners], dim=1), bins, 1.0, SAMPLES, False)
        return pooled * (down[:, None, :, None] * across[:, None, None])

    def merge(self, boxes: Tensor, labels: Tensor, scores: Tensor, rows_of_view: int) -> tuple[Tensor, ...]:
        """`merging.merge_views` of boxes (B, n, 4), labels (B, n) and scores (B, n), view after view: D rows."""
        classes, limit = len(self.detector.kwargs["classes"]), self.detector.roi_head.max_detections
        views = torch.arange(scores.shape[1], device=scores.device) // rows_of_view
        scores, order = scores.topk(scores.shape[1])
        boxes, labels, views = take(boxes, order), labels.gather(1, order), views[order]  # best first
        named = labels[:, None] == torch.arange(1, classes + 1, device=labels.device)[:, None]  # (B, K, n)
        apart = torch.where(named, scores[:, None], ABSENT).flatten(0, 1)
        kept = self.survivors(boxes.repeat_interleave(classes, dim=0), apart, merging.SAME)
        kept = kept.unflatten(0, (-1, classes)).any(dim=1)  # (B, n)
        claims = (overlaps(boxes) > merging.SAME) & (labels[:, :, None] == labels[:, None]) & kept[:, :, None]
        claims = claims & (claims.long().cumsum(dim=1) == 1)  # the first that claims a box has it
        claimed = torch.where(claims, scores.clamp(min=0)[:, None], 0.0)  # (B, n, n)
        number = range(scores.shape[1] // rows_of_view)
        by_view = [torch.where((views == view)[:, None], claimed, 0.0).amax(dim=2) for view in number]
        logits = torch.stack(by_view).clamp(merging.FLOOR, 1 - merging.FLOOR).logit()  # (V, B, n)
        merged = (logits.amax(0) + merging.AGREEMENT * logits.mean(0)).sigmoid()
        merged = torch.where(kept & (merged >= self.detector.roi_head.score_threshold), merged, ABSENT)
        merged, index = merged.topk(min(limit, merged.shape[1]))
        return take(boxes, index), labels.gather(1, index), merged
