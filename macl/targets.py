"""What a training image is to show: checked, scaled as the image was, and picked apart for the losses."""

import torch
from torch import Tensor

from macl.boxes import Size

PER_IMAGE = ("scene", "domain")  # of a target, () int64 each


def rescale(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Boxes of an image of size `old` in one of size `new`."""
    if old == new:
        return boxes
    ratio_y, ratio_x = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def contrast_boxes(targets: list[dict[str, Tensor]]) -> list[Tensor]:
    """The boxes (n_i, 4) of each prepared target that, as far as is known, can be seen in both modalities."""
    seen = [target.get("visible_in") for target in targets]
    return [t["boxes"] if s is None else t["boxes"][s.all(dim=1)] for t, s in zip(targets, seen, strict=True)]


def stack_labels(targets: list[dict[str, Tensor]], key: str) -> Tensor:
    """One label per image, (B,) int64. Raises ValueError where a target has none."""
    if not all(key in target for target in targets):
        raise ValueError(f"every target needs {key!r}, a 0-d int64 tensor, for the losses of this detector")
    return torch.stack([target[key] for target in targets])


def prepare_target(target: dict[str, Tensor], old: Size, new: Size) -> dict[str, Tensor]:
    """The target in pixels of the resized image, its ignored boxes set apart under `ignored` (K, 4)."""
    boxes = target["boxes"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"target boxes must be (N, 4) with x1 < x2 and y1 < y2, got {boxes.tolist()}")
    boxes = rescale(boxes, old, new)
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    if "ignore" in target:
        keep = ~target["ignore"]
    prepared = {"boxes": boxes[keep], "labels": target["labels"][keep], "ignored": boxes[~keep]}
    if "visible_in" in target:
        prepared["visible_in"] = target["visible_in"][keep]
    return prepared | {key: target[key] for key in PER_IMAGE if key in target}
