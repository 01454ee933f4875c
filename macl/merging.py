"""Detections of several views of one image as one list."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

SAME = 0.5  # IoU above which two views mean the same thing
AGREEMENT = 0.25  # weight of what the views say on average, beside what the surest says
FLOOR = 1e-3  # the smallest score that counts, 1 minus it the largest


def merge_views(views: list[dict[str, Tensor]], *, score_threshold: float, limit: int) -> dict[str, Tensor]:
    """Merge the detections of several views, each without duplicates of its own.

    The best-scored box takes all of its class that overlap it by more than SAME. With p_v the best score of view v
    among them, FLOOR where it has none, the score becomes sigmoid(max_v logit p_v + AGREEMENT mean_v logit p_v). The
    box stays. This is late fusion in logits as ProbEn (Chen et al., 2022, section 3), with the maximum in the place of
    the sum: a camera that sees nothing is little evidence against the one that sees.

    views: dicts of boxes (n, 4), labels (n,) and scores (n,).
    -> a dict of the same keys, best first, at most `limit` rows of at least `score_threshold`.
    """
    boxes, labels, scores = (torch.cat([view[name] for view in views]) for name in ("boxes", "labels", "scores"))
    best = batched_nms(boxes, scores, labels, SAME)  # (L,)
    overlaps = (box_iou(boxes[best], boxes) > SAME) & (labels[best, None] == labels)  # (L, n)
    overlaps &= overlaps.cumsum(0) == 1  # the first that claims a box has it
    by_view, start = [], 0
    for view in views:
        columns = slice(start, start + len(view["scores"]))
        claimed = scores[columns] * overlaps[:, columns]
        by_view.append(torch.cat([claimed, claimed.new_zeros(len(best), 1)], dim=1).amax(1))
        start = columns.stop
    logits = torch.stack(by_view).logit(FLOOR)  # (V, L)
    merged, order = (logits.amax(0) + AGREEMENT * logits.mean(0)).sigmoid().sort(descending=True, stable=True)
    best, merged = best[order][:limit], merged[:limit]
    kept = merged >= score_threshold
    return {"boxes": boxes[best][kept], "labels": labels[best][kept], "scores": merged[kept]}
