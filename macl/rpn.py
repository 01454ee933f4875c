"""Region proposal network (Ren et al., 2015), with torchvision's names, sampling and rounding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from macl.boxes import AnchorGenerator, BoxCoder, box_regression_loss, match, sample
from macl.precision import check_finite
from trainkit.device import at_least_float32

SMALLEST_SIDE = 1e-3  # pixels; proposals below it are dropped


class RPNHead(nn.Module):
    """A 3x3 convolution, then objectness logits and box offsets for every anchor."""

    def __init__(self, channels: int, anchors: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(channels, anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """features: (B, C, H_l, W_l). -> objectness (B, H_l * W_l * A) and offsets (B, H_l * W_l * A, 4) a level,
        float32.
        """
        objectness, offsets = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            objectness.append(at_least_float32(self.cls_logits(hidden).permute(0, 2, 3, 1).flatten(1)))
            offsets.append(at_least_float32(self.bbox_pred(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4)))
        return objectness, offsets

    def at(self, features: list[Tensor], image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` says of single anchors, with gradients that cost no more than these anchors.

        image, anchor (n,): which image, in ascending order, and which row of the anchors of all levels one after the
        other.
        -> objectness (n,) and offsets (n, 4), float32.
        """
        anchors = self.cls_logits.out_channels
        ends = torch.tensor([level.shape[2] * level.shape[3] * anchors for level in features]).cumsum(0).tolist()
        windows = features[0].new_zeros(len(anchor), 9, features[0].shape[1])
        for feature, start, end in zip(features, [0, *ends], ends, strict=False):
            (here,) = torch.where((anchor >= start) & (anchor < end))
            seen = windows_of_three(feature, image[here], (anchor[here] - start) // anchors)
            windows = windows.index_copy(0, here, seen)
        hidden = F.relu(F.linear(windows.transpose(1, 2).flatten(1), self.conv.weight.flatten(1), self.conv.bias))
        shape = anchor % anchors  # every level has a multiple of `anchors`
        objectness, offsets = (
            F.linear(hidden, layer.weight.flatten(1), layer.bias).unflatten(1, (anchors, -1))
            for layer in (self.cls_logits, self.bbox_pred)
        )
        row = torch.arange(len(anchor), device=anchor.device)
        return at_least_float32(objectness[row, shape, 0]), at_least_float32(offsets[row, shape])


def windows_of_three(feature: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """What a 3x3 convolution sees of a map (B, C, H, W) at n pixels, row * W + column: (n, 9, C), zeros outside.

    image, pixel (n,); the images in ascending order.
    """
    channels, height, width = feature.shape[1:]
    step = torch.arange(-1, 2, device=pixel.device)
    y = (pixel // width)[:, None] + step.repeat_interleave(3)  # (n, 9)
    x = (pixel % width)[:, None] + step.repeat(3)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    if not feature.is_cpu:
        return feature[image[:, None], :, y, x] * inside[..., None]
    # The gradient of that indexing adds up in whatever order a CPU's threads come; that of `gather` does not.
    counts = torch.bincount(image, minlength=len(feature)).tolist()
    windows = [
        pixels.flatten(1).gather(1, own.reshape(1, -1).expand(channels, -1)).T.reshape(len(own), 9, channels)
        for pixels, own in zip(feature, (y * width + x).split(counts), strict=True)
    ]
    return torch.cat(windows) * inside[..., None]


class RPN(nn.Module):
    """Anchors, head, proposals and losses.

    pre_nms, post_nms: proposals kept before (a level) and after NMS (an image), as (training, evaluation).
    foreground, background: IoU thresholds of a positive and a negative anchor. samples, positive_fraction: anchors an
    image in the loss. beta: of the smooth L1 loss.
    """

    def __init__(
        self,
        *,
        head: RPNHead,
        anchors: AnchorGenerator,
        pre_nms: tuple[int, int] = (2000, 1000),
        post_nms: tuple[int, int] = (2000, 1000),
        nms_iou: float = 0.7,
        foreground: float = 0.7,
        background: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.5,
        beta: float = 1 / 9,
    ):
        super().__init__()
        self.head, self.anchors = head, anchors
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.pre_nms, self.post_nms, self.nms_iou = pre_nms, post_nms, nms_iou
        self.foreground, self.background = foreground, background
        self.samples, self.positive_fraction, self.beta = samples, positive_fraction, beta

    def forward(
        self,
        features: list[Tensor],
        image_sizes: list[tuple[int, int]],
        batch_size: tuple[int, int],
        targets: list[dict] | None,
    ) -> tuple[list[Tensor], dict[str, tuple[Tensor, int]]]:
        """features: (B, C, H_l, W_l); image_sizes: (height, width) of each image without padding; batch_size: with it.

        -> proposals (n_i, 4) an image, and when there are targets the losses loss_objectness and loss_rpn_box_reg, each
        as (sum, number of terms).
        """
        anchors = self.anchors(features, batch_size)
        # The losses look at few anchors: they run the head again there, so that its backward is theirs alone.
        with torch.no_grad():
            proposals = self.propose(*self.head(features), anchors, image_sizes)
        if targets is None:
            return proposals, {}
        return proposals, self.losses(features, torch.cat(anchors), targets)

    def propose(
        self, objectness: list[Tensor], offsets: list[Tensor], anchors: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Proposals (n_i, 4) an image, best first: decoded, clipped to their image, NMS within each level."""
        if not self.training:
            check_finite((*objectness, *offsets), "the region proposals")
        pre_nms, post_nms = (pair[0 if self.training else 1] for pair in (self.pre_nms, self.post_nms))
        scores, boxes, levels = [], [], []
        for level, (logits, deltas, references) in enumerate(zip(objectness, offsets, anchors, strict=True)):
            logits, index = logits.topk(min(pre_nms, logits.shape[1]), dim=1)  # (B, n)
            deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(self.coder.decode(deltas.flatten(0, 1), references[index].flatten(0, 1)).view_as(deltas))
            scores.append(logits.sigmoid())
            levels.append(torch.full_like(index[0], level))
        scores, boxes, levels = torch.cat(scores, 1), torch.cat(boxes, 1), torch.cat(levels)
        proposals = []
        for image_boxes, image_scores, size in zip(boxes, scores, image_sizes, strict=True):
            image_boxes = ops.clip_boxes_to_image(image_boxes, size)
            large = ops.remove_small_boxes(image_boxes, SMALLEST_SIDE)
            keep = ops.batched_nms(image_boxes[large], image_scores[large], levels[large], self.nms_iou)[:post_nms]
            proposals.append(image_boxes[large][keep])
        return proposals

    def losses(self, features: list[Tensor], anchors: Tensor, targets: list[dict]) -> dict[str, tuple[Tensor, int]]:
        """features: (B, C, H_l, W_l); anchors: (N, 4), of all levels. -> the losses, as `forward` gives them."""
        image, anchor, labels, boxes = [], [], [], []
        for number, target in enumerate(targets):
            matched = match(
                anchors,
                target["boxes"],
                foreground=self.foreground,
                background=self.background,
                keep_best=True,
                ignore=target.get("ignored"),
            )
            chosen = torch.cat(sample(matched, count=self.samples, positive_fraction=self.positive_fraction))
            matched = matched[chosen]
            image.append(torch.full_like(chosen, number))
            anchor.append(chosen)
            labels.append(matched >= 0)
            boxes.append(target["boxes"][matched[matched >= 0]])
        image, anchor, labels, boxes = (torch.cat(part) for part in (image, anchor, labels, boxes))
        logits, deltas = self.head.at(features, image, anchor)
        sums = {
            "loss_objectness": F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum"),
            "loss_rpn_box_reg": box_regression_loss(
                "smooth_l1", deltas[labels], boxes, anchors[anchor[labels]], self.coder, self.beta
            ),
        }
        return {name: (total, len(labels)) for name, total in sums.items()}
