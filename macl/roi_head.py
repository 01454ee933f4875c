"""The detection head over regions of interest (Girshick, 2015; two fully connected layers as in FPN)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

import kernels
from macl.boxes import BoxCoder, box_regression_loss, match, sample
from macl.precision import check_finite
from trainkit.device import at_least_float32

SMALLEST_SIDE = 1e-2  # pixels; detections below it are dropped


def with_image_index(boxes: list[Tensor]) -> Tensor:
    """Boxes (n_i, 4) an image -> (sum n_i, 5), the image's index in the batch first."""
    index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
    return torch.cat([index, torch.cat(boxes)], dim=1)


class RoIHead(nn.Module):
    """Pools every proposal, classifies it and refines its box.

    classes: number of classes without the background (class 0). scales: feature pixels an image pixel, for the levels
    that are pooled from. width: of the two hidden layers. box_loss, box_beta: see `boxes.box_regression_loss`.
    score_threshold, nms_iou, max_detections: of the detections.
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        scales: tuple[float, ...],
        width: int = 1024,
        output_size: int = 7,
        foreground: float = 0.5,
        background: float = 0.5,
        samples: int = 512,
        positive_fraction: float = 0.25,
        box_loss: str = "smooth_l1",
        box_beta: float = 1 / 9,
        label_smoothing: float = 0.0,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        max_detections: int = 100,
    ):
        super().__init__()
        self.fc6 = nn.Linear(channels * output_size**2, width)
        self.fc7 = nn.Linear(width, width)
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * (classes + 1))
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.scales, self.output_size = scales, output_size
        self.foreground, self.background = foreground, background
        self.samples, self.positive_fraction = samples, positive_fraction
        self.box_loss, self.box_beta, self.label_smoothing = box_loss, box_beta, label_smoothing
        self.score_threshold, self.nms_iou, self.max_detections = score_threshold, nms_iou, max_detections

    def losses(
        self, features: list[Tensor], proposals: list[Tensor], targets: list[dict]
    ) -> dict[str, tuple[Tensor, int]]:
        """features: (B, C, H_l, W_l); proposals: (n_i, 4) an image.

        -> loss_classifier and loss_box_reg, each as (sum, number of terms).
        """
        proposals, labels, boxes = self.choose(proposals, targets)
        logits, offsets = self.predict(features, proposals)
        proposals, labels, boxes = torch.cat(proposals), torch.cat(labels), torch.cat(boxes)
        positive = torch.where(labels > 0)[0]
        own = offsets[positive, labels[positive]]
        classification = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        regression = box_regression_loss(
            self.box_loss, own, boxes[positive], proposals[positive], self.coder, self.box_beta
        )
        count = labels.numel()
        return {
            "loss_classifier": (classification, count),
            "loss_box_reg": (regression + offsets.sum() * 0, count),
        }

    def detect(
        self,
        features: list[Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        *,
        score_threshold: float | None = None,
    ) -> list[dict]:
        """-> dict(boxes (n, 4), labels (n,), scores (n,)) an image, best score first. Raises InputError for NaN."""
        threshold = self.score_threshold if score_threshold is None else score_threshold
        logits, offsets = self.predict(features, proposals)
        check_finite((logits, offsets), "the detector's scores and boxes")
        rows = [len(boxes) for boxes in proposals]
        scores = logits.softmax(dim=1)[:, 1:].split(rows)  # (n_i, classes)
        boxes = self.coder.decode(offsets, torch.cat(proposals))[:, 1:].split(rows)  # (n_i, classes, 4)
        detections = []
        for image_scores, image_boxes, size in zip(scores, boxes, image_sizes, strict=True):
            image_boxes = ops.clip_boxes_to_image(image_boxes, size)
            row, column = torch.where(image_scores > threshold)
            box, score, label = image_boxes[row, column], image_scores[row, column], column + 1
            large = ops.remove_small_boxes(box, SMALLEST_SIDE)
            keep = large[ops.batched_nms(box[large], score[large], label[large], self.nms_iou)[: self.max_detections]]
            detections.append({"boxes": box[keep], "labels": label[keep], "scores": score[keep]})
        return detections

    def predict(self, features: list[Tensor], proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> class logits (R, 1 + classes), background first, and offsets (R, 1 + classes, 4), float32."""
        hidden = kernels.roi_align_project(
            features[: len(self.scales)],
            with_image_index(proposals),
            self.fc6.weight,
            self.fc6.bias,
            scales=self.scales,
            output_size=self.output_size,
        )
        hidden = F.relu(self.fc7(F.relu(hidden)))
        return at_least_float32(self.cls_score(hidden)), at_least_float32(self.bbox_pred(hidden)).unflatten(1, (-1, 4))

    @torch.no_grad()
    def choose(self, proposals: list[Tensor], targets: list[dict]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The sampled proposals (the targets' own boxes among them), their labels (0 = background) and target boxes."""
        chosen, labels, boxes = [], [], []
        for candidates, target in zip(proposals, targets, strict=True):
            candidates = torch.cat([candidates, target["boxes"]])
            matched = match(
                candidates,
                target["boxes"],
                foreground=self.foreground,
                background=self.background,
                keep_best=False,
                ignore=target.get("ignored"),
            )
            positive, negative = sample(matched, count=self.samples, positive_fraction=self.positive_fraction)
            # Ascending order, as torchvision's masks give it: the same rows feed the same dropout and reductions.
            index = torch.cat([positive, negative]).sort().values
            chosen.append(candidates[index])
            which = matched[index]
            own = which >= 0
            label, box = torch.zeros_like(which), candidates[index].clone()
            label[own] = target["labels"][which[own]]
            box[own] = target["boxes"][which[own]]
            labels.append(label)
            boxes.append(box)
        return chosen, labels, boxes
