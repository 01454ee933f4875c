"""The detection head over regions of interest (Girshick, 2015; two fully connected layers as in FPN)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

import kernels
from macl.boxes import BoxCoder, Size, box_regression_loss, check_finite, match, sample
from trainkit.device import at_least_float32

IOU = 0.5  # of positive proposals at least, of negative ones less
OUTPUT_SIZE = 7  # bins per side of a pooled proposal
MIN_SIDE = 1e-2  # pixels; detections below it are dropped


def with_image_index(boxes: list[Tensor]) -> Tensor:
    """Boxes (n_i, 4) per image -> (sum n_i, 5), the image's index in the batch first."""
    index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
    return torch.cat([index, torch.cat(boxes)], dim=1)


class RoIHead(nn.Module):
    """Pools every proposal, classifies it and refines its box.

    channels: of the maps.
    classes: number of classes without the background (class 0).
    scales: feature pixels per image pixel, one float per pooled level.
    width: of the two hidden layers.
    samples: proposals per image in the loss, at most a share of `positive_fraction` of them positive.
    box_loss, box_beta: see `box_regression_loss`.
    score_threshold, nms_iou, max_detections: of the detections.
    """

    def __init__(
        self, *, channels: int, classes: int, scales: tuple[float, ...], width: int, samples: int,
        positive_fraction: float, box_loss: str, box_beta: float, label_smoothing: float, score_threshold: float,
        nms_iou: float, max_detections: int,
    ):  # fmt: skip
        super().__init__()
        self.fc6 = nn.Linear(channels * OUTPUT_SIZE**2, width)
        self.fc7 = nn.Linear(width, width)
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * (classes + 1))
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.scales, self.samples, self.positive_fraction = scales, samples, positive_fraction
        self.box_loss, self.box_beta, self.label_smoothing = box_loss, box_beta, label_smoothing
        self.score_threshold, self.nms_iou, self.max_detections = score_threshold, nms_iou, max_detections

    def losses(self, features: list[Tensor], proposals: list[Tensor], targets: list[dict]) -> dict:
        """loss_classifier and loss_box_reg, each as (sum, number of terms).

        features: (B, C, H_l, W_l). proposals: (n_i, 4) per image. targets: from `prepare_target`.
        """
        proposals, labels, boxes = zip(*map(self.choose, proposals, targets), strict=True)
        logits, offsets = self.predict(features, proposals)
        proposals, labels, boxes = torch.cat(proposals), torch.cat(labels), torch.cat(boxes)
        positive = torch.where(labels > 0)[0]
        classification = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        refined, references = offsets[positive, labels[positive]], proposals[positive]
        regression = box_regression_loss(self.box_loss, refined, boxes[positive], references, self.coder, self.box_beta)
        regression = regression + offsets.sum() * 0  # a path to all parameters, also without a positive
        return {"loss_classifier": (classification, len(labels)), "loss_box_reg": (regression, len(labels))}

    def detect(
        self, features: list[Tensor], proposals: list[Tensor], sizes: list[Size], score_threshold: float | None = None
    ) -> list[dict]:
        """Per image dict(boxes (n, 4), labels (n,), scores (n,)), best score first. Raises InputError for NaN."""
        threshold = self.score_threshold if score_threshold is None else score_threshold
        logits, offsets = self.predict(features, proposals)
        check_finite((logits, offsets), "the detector's scores and boxes")
        rows = [len(boxes) for boxes in proposals]
        scores = logits.softmax(dim=1)[:, 1:].split(rows)  # (n_i, classes)
        boxes = self.coder.decode(offsets, torch.cat(proposals))[:, 1:].split(rows)  # (n_i, classes, 4)
        detections = []
        for image_scores, image_boxes, size in zip(scores, boxes, sizes, strict=True):
            image_boxes = ops.clip_boxes_to_image(image_boxes, size)
            row, column = torch.where(image_scores > threshold)
            box, score, label = image_boxes[row, column], image_scores[row, column], column + 1
            large = ops.remove_small_boxes(box, MIN_SIDE)
            keep = large[ops.batched_nms(box[large], score[large], label[large], self.nms_iou)[: self.max_detections]]
            detections.append({"boxes": box[keep], "labels": label[keep], "scores": score[keep]})
        return detections

    def predict(self, features: list[Tensor], proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (R, 1 + classes), background first, and offsets (R, 1 + classes, 4), float32."""
        levels, rois = features[: len(self.scales)], with_image_index(proposals)
        weights, size = (self.fc6.weight, self.fc6.bias), dict(scales=self.scales, output_size=OUTPUT_SIZE)
        hidden = F.relu(self.fc7(F.relu(kernels.roi_align_project(levels, rois, *weights, **size))))
        return at_least_float32(self.cls_score(hidden)), at_least_float32(self.bbox_pred(hidden)).unflatten(1, (-1, 4))

    @torch.no_grad()
    def choose(self, proposals: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled proposals and target boxes (n, 4) of an image, their labels (n,), and the boxes (n, 4) they match."""
        proposals, iou = torch.cat([proposals, target["boxes"]]), dict(foreground=IOU, background=IOU)
        matched = match(proposals, target["boxes"], **iou, keep_best=False, ignore=target["ignored"])
        sampled = torch.cat(sample(matched, count=self.samples, positive_fraction=self.positive_fraction))
        sampled = sampled.sort().values  # in torchvision's order, so that sums are its sums
        proposals, which = proposals[sampled], matched[sampled]
        positive = which >= 0
        labels, boxes = torch.zeros_like(which), proposals.clone()
        labels[positive] = target["labels"][which[positive]]
        boxes[positive] = target["boxes"][which[positive]]
        return proposals, labels, boxes
