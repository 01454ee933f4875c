"""Region proposal network (Ren et al., 2015), with torchvision's names, sampling and rounding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from macl.boxes import AnchorGenerator, BoxCoder, Size, box_regression_loss, check_finite, match, sample
from trainkit.device import at_least_float32

FOREGROUND, BACKGROUND = 0.7, 0.3  # IoU of positive anchors at least, of negative ones less
NMS_IOU = 0.7
BETA = 1 / 9  # of the smooth L1 loss
MIN_SIDE = 1e-3  # pixels; proposals below it are dropped


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
        """features: (B, C, H_l, W_l). -> per level objectness (B, N_l) and offsets (B, N_l, 4), float32."""
        objectness, offsets = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            objectness.append(at_least_float32(self.cls_logits(hidden).permute(0, 2, 3, 1).flatten(1)))
            deltas = self.bbox_pred(hidden).permute(0, 2, 3, 1).flatten(1)  # unlike len(), it exports
            offsets.append(at_least_float32(deltas.unflatten(1, (-1, 4))))
        return objectness, offsets

    def at(self, features: list[Tensor], image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` at n single anchors, at the cost of these alone: objectness (n,) and offsets (n, 4).

        image: (n,), in ascending order. anchor: (n,), index into the anchors of all levels in order.
        """
        anchors = self.cls_logits.out_channels
        ends = torch.tensor([level.shape[2] * level.shape[3] * anchors for level in features]).cumsum(0).tolist()
        windows = features[0].new_zeros(len(anchor), 9, features[0].shape[1])
        for feature, start, end in zip(features, [0, *ends], ends, strict=False):
            (here,) = torch.where((anchor >= start) & (anchor < end))
            values = windows_of_three(feature, image[here], (anchor[here] - start) // anchors)
            windows = windows.index_copy(0, here, values)
        hidden = F.relu(F.linear(windows.transpose(1, 2).flatten(1), self.conv.weight.flatten(1), self.conv.bias))
        shape = anchor % anchors  # every level has a multiple of `anchors`
        row = torch.arange(len(anchor), device=anchor.device)
        objectness, offsets = (
            F.linear(hidden, layer.weight.flatten(1), layer.bias).unflatten(1, (anchors, -1))[row, shape]
            for layer in (self.cls_logits, self.bbox_pred)
        )  # (n, 1) and (n, 4)
        return at_least_float32(objectness[:, 0]), at_least_float32(offsets)


def windows_of_three(feature: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """Input of a 3x3 convolution over a map (B, C, H, W) at n pixels: (n, 9, C), zeros outside.

    image: (n,), in ascending order. pixel: (n,), row * W + column.
    """
    channels, _, width = feature.shape[1:]
    corner = pixel // width * (width + 2) + pixel % width  # in the padded map, (n,)
    step = torch.arange(3, device=pixel.device)
    index = corner[:, None] + (step[:, None] * (width + 2) + step).flatten()  # (n, 9)
    padded = F.pad(feature, (1, 1, 1, 1)).flatten(2)  # (B, C, (H + 2) * (W + 2))
    counts = torch.bincount(image, minlength=len(feature)).tolist()
    # `gather`, for the gradient of indexing adds up in the order in which a CPU's threads come.
    windows = [
        one.gather(1, rows.reshape(1, -1).expand(channels, -1)).T.reshape(len(rows), 9, channels)
        for one, rows in zip(padded, index.split(counts), strict=True)
    ]
    return torch.cat(windows)


class RPN(nn.Module):
    """Anchors, head, proposals and losses.

    pre_nms: proposals per level before NMS, in training and in evaluation.
    post_nms: proposals per image after NMS, in training and in evaluation.
    samples: anchors per image in the loss, at most a share of `positive_fraction` of them positive.
    """

    def __init__(
        self, *, head: RPNHead, anchors: AnchorGenerator, pre_nms: tuple[int, int], post_nms: tuple[int, int],
        samples: int, positive_fraction: float,
    ):  # fmt: skip
        super().__init__()
        self.head, self.anchors = head, anchors
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.pre_nms, self.post_nms = pre_nms, post_nms
        self.samples, self.positive_fraction = samples, positive_fraction

    def forward(
        self, features: list[Tensor], sizes: list[Size], batch_size: Size, targets: list[dict] | None
    ) -> tuple[list[Tensor], dict]:
        """Proposals (n_i, 4) per image, and loss_objectness and loss_rpn_box_reg, each as (sum, number of terms).

        features: (B, C, H_l, W_l).
        sizes, batch_size: of the images without and with padding.
        targets: from `prepare_target`; None for no losses.
        """
        anchors = self.anchors(features, batch_size)
        with torch.no_grad():  # the losses run the head again at the few sampled anchors, whose backward is cheap
            proposals = self.propose(*self.head(features), anchors, sizes)
        return proposals, {} if targets is None else self.losses(features, torch.cat(anchors), targets)

    def propose(
        self, objectness: list[Tensor], offsets: list[Tensor], anchors: list[Tensor], sizes: list[Size]
    ) -> list[Tensor]:
        """Proposals (n_i, 4) per image, best first: decoded, clipped to their image, NMS within each level."""
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
        for image_boxes, image_scores, size in zip(boxes, scores, sizes, strict=True):
            image_boxes = ops.clip_boxes_to_image(image_boxes, size)
            large = ops.remove_small_boxes(image_boxes, MIN_SIDE)
            keep = ops.batched_nms(image_boxes[large], image_scores[large], levels[large], NMS_IOU)[:post_nms]
            proposals.append(image_boxes[large][keep])
        return proposals

    def losses(self, features: list[Tensor], anchors: Tensor, targets: list[dict]) -> dict:
        """The losses of `forward`. features: (B, C, H_l, W_l). anchors: (N, 4), of all levels in order."""
        rows, iou = [], dict(foreground=FOREGROUND, background=BACKGROUND)
        for image, target in enumerate(targets):
            matched = match(anchors, target["boxes"], **iou, keep_best=True, ignore=target["ignored"])
            anchor = torch.cat(sample(matched, count=self.samples, positive_fraction=self.positive_fraction))
            which = matched[anchor]
            rows.append((torch.full_like(anchor, image), anchor, which >= 0, target["boxes"][which[which >= 0]]))
        image, anchor, positive, boxes = map(torch.cat, zip(*rows, strict=True))
        logits, deltas = self.head.at(features, image, anchor)
        classification = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="sum")
        references = anchors[anchor[positive]]
        regression = box_regression_loss("smooth_l1", deltas[positive], boxes, references, self.coder, BETA)
        return {"loss_objectness": (classification, len(anchor)), "loss_rpn_box_reg": (regression, len(anchor))}
