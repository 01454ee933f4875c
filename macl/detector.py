"""The paired detector: Faster R-CNN over the fused pyramids of a visible and an infrared image."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import trainkit.distributed as distributed
from macl.backbone import Backbone
from macl.contrast import MACLHead
from macl.domain import DomainAlignment, pool
from macl.fpn import FPN
from macl.fusion import Fusion
from macl.roi_head import RoIHead, with_image_index
from macl.rpn import RPN
from macl.targets import contrast_boxes, prepare_target, rescale, stack_labels

MULTIPLE = 32  # padded image sides are multiples of it
MODALITIES = ("visible", "infrared")


class Extracted(NamedTuple):
    """What backbone and neck made of those images of a batch that have one padded size.

    A list of them, one a size, is what detection, embedding and losses start from. Images of several sizes stay apart
    as far as the regions of interest: padded to a common size, a norm, a border or a stride would change with the other
    images of the batch.
    """

    pyramids: dict[str, list[Tensor]]  # (B, C, H_l, W_l) a level, for each modality given
    original_sizes: list[tuple[int, int]]  # (height, width) of the images as given
    sizes: list[tuple[int, int]]  # as resized
    batch_size: tuple[int, int]  # as padded
    places: list[int]  # of the images in the batch

    def images(self) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
        """Place, original size and size of each image."""
        return zip(self.places, self.original_sizes, self.sizes, strict=True)


class PairedFasterRCNN(nn.Module):
    """Faster R-CNN with one backbone and neck for both modalities, and the contrastive heads that train them.

    modality_dropout: probabilities that the visible, or the infrared, features of a training image are masked before
    the fusion (never both). min_size, max_size: resize so that the short side is min_size (of several, a random one for
    each batch in training and the last in evaluation) unless the long one would exceed max_size; None leaves the size
    alone.
    macl_level: what the contrastive head embeds, "roi", every ground-truth box (pooled to macl_roi_size x
    macl_roi_size), or "image", the mean over all positions and levels. alignment: the losses between the modalities, or
    data sets, where there are any; `reversal_scale` scales the reversed gradient of its classifier and may be changed
    at any time, as may `macl.hard.k` and `macl.hard.active`.

    `kwargs` holds the plain values `build_detector` was called with. `monitor` holds what the last training forward
    has to say besides its losses.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: FPN,
        fusion: Fusion,
        rpn: RPN,
        roi_head: RoIHead,
        macl: MACLHead | None = None,
        macl_level: str = "roi",
        macl_roi_size: int = 4,
        alignment: DomainAlignment | None = None,
        modality_dropout: tuple[float, float] = (0.0, 0.0),
        statistics: dict[str, tuple[tuple[float, ...], tuple[float, ...]]],
        min_size: int | tuple[int, ...] | None = None,
        max_size: int | None = None,
        kwargs: dict | None = None,
    ):
        super().__init__()
        if sum(modality_dropout) > 1 or min(modality_dropout) < 0:
            raise ValueError(f"modality_dropout {modality_dropout}: two probabilities whose sum is at most 1")
        self.backbone, self.neck, self.fusion = backbone, neck, fusion
        self.rpn, self.roi_head = rpn, roi_head
        self.macl, self.macl_level, self.macl_roi_size = macl, macl_level, macl_roi_size
        self.alignment, self.reversal_scale = alignment, 1.0
        self.modality_dropout = modality_dropout
        self.min_sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size or ())
        self.max_size = max_size
        for modality, (mean, std) in statistics.items():
            # Not in the state dict: they are among the kwargs that rebuild the model.
            self.register_buffer(f"{modality}_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
            self.register_buffer(f"{modality}_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.kwargs = kwargs or {}
        self.monitor: dict[str, Tensor] = {}

    def forward(
        self,
        *,
        visible: list[Tensor] | None = None,
        infrared: list[Tensor] | None = None,
        targets: list[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation.

        visible, infrared: lists of (3, H, W) float images in 0..1, the two of a pair of equal size; either list may
        be None.
        targets, one dict an image: boxes (N, 4) float32 xyxy in pixels, labels (N,) int64 from 1, and optionally
        ignore (N,) bool (neither positive nor negative) and visible_in (N, 2) bool (in which modality a box can be
        seen). Hard negatives need scene () int64 (the same for images that may show the same people, -1: not known),
        several data sets domain () int64 (which of them, from 0).

        -> training: dict of unweighted scalar losses loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg,
        and of the parts that exist loss_macl, loss_dhn, loss_mmd, loss_mmd_domains, loss_adversary. Evaluation: per
        image dict(boxes (n, 4), labels (n,), scores (n,)) in pixels of the given image. Raises ValueError for images or
        targets of the wrong form.
        """
        images = {name: given for name, given in zip(MODALITIES, (visible, infrared), strict=True) if given is not None}
        check_inputs(images, targets, self.training)
        extracted = self.extract(images)
        return self.losses(extracted, targets) if self.training else self.detect(extracted)

    def losses(self, extracted: list[Extracted], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The unweighted losses; also refreshes `monitor`."""
        prepared, terms = [], {}
        for group in extracted:
            own = [prepare_target(targets[place], old, new) for place, old, new in group.images()]
            fused = self.fusion(group.pyramids, self.draw_present(group.pyramids))
            proposals, found = self.rpn(fused, group.sizes, group.batch_size, own)
            for name, term in (found | self.roi_head.losses(fused, proposals, own)).items():
                terms.setdefault(name, []).append(term)
            prepared += own
        losses = {name: distributed.global_mean(*map(sum, zip(*term, strict=True))) for name, term in terms.items()}
        self.monitor = {}
        for found, said in self.alignment_losses(extracted, prepared):
            losses |= found
            self.monitor |= said
        return losses

    def alignment_losses(
        self, extracted: list[Extracted], targets: list[dict]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Losses and figures of what brings the modalities together: the contrastive head, and the alignment.

        targets: prepared, in the order of `extracted`.
        """
        if self.macl is None and self.alignment is None:
            return
        if len(extracted[0].pyramids) < 2:
            raise ValueError(
                "contrast and alignment need both modalities in training; build the detector with macl_level='none', "
                "mmd_level='none' and adversary='none'"
            )
        boxes, embeddings = contrast_boxes(targets), None
        if self.macl is not None:
            scenes = None if self.macl.hard is None else self.per_row(stack_labels(targets, "scene"), boxes)
            contrast = self.macl.compare(*self.contrast_features(extracted, boxes), scenes)
            embeddings = {"visible": contrast.visible, "infrared": contrast.infrared}
            yield contrast.losses, contrast.statistics
        if self.alignment is not None:
            if self.alignment.domains > 1:
                domains = stack_labels(targets, "domain")
            else:
                domains = torch.zeros(len(targets), dtype=torch.int64, device=boxes[0].device)
            pooled = None
            if self.alignment.pools:
                pooled = {
                    name: torch.cat([pool(group.pyramids[name], group.sizes, group.batch_size) for group in extracted])
                    for name in MODALITIES
                }
            yield self.alignment(
                pooled, domains, embeddings, self.per_row(domains, boxes), reversal_scale=self.reversal_scale
            )

    def detect(
        self,
        extracted: list[Extracted],
        modalities: tuple[str, ...] = MODALITIES,
        *,
        score_threshold: float | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections from the pyramids of `modalities` alone: one extraction serves both cameras and each by itself.

        score_threshold: None takes the detector's own.
        """
        detections = {}
        for group in extracted:
            fused = self.fusion({name: group.pyramids[name] for name in modalities if name in group.pyramids})
            proposals, _ = self.rpn(fused, group.sizes, group.batch_size, None)
            found = self.roi_head.detect(fused, proposals, group.sizes, score_threshold=score_threshold)
            for (place, original, size), one in zip(group.images(), found, strict=True):
                detections[place] = one | {"boxes": rescale(one["boxes"], size, original)}
        return [detections[place] for place in sorted(detections)]

    @property
    def modes(self) -> dict[str, tuple[str, ...]]:
        """What this detector can see with, by name: "both" cameras and each alone, or the one that its fusion takes."""
        if self.fusion.kind in MODALITIES:
            return {self.fusion.kind: (self.fusion.kind,)}
        return {"both": MODALITIES, **{name: (name,) for name in MODALITIES}}

    def embed(self, extracted: list[Extracted], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The contrastive embeddings in the visible and in the infrared image, (N, out_dim) each.

        One row a given box (n_i, 4 an image); of a detector with macl_level "image" one row an image.
        """
        where = [image for group in extracted for image in group.images()]
        boxes = [rescale(boxes[place], old, new) for place, old, new in where]
        counts = [1 if self.macl_level == "image" else len(box) for box in boxes]
        order = sorted(range(len(where)), key=lambda i: where[i][0])
        embedded = (self.macl.embed(rows).split(counts) for rows in self.contrast_features(extracted, boxes))
        return tuple(torch.cat([parts[i] for i in order]) for parts in embedded)

    def extract(self, images: dict[str, list[Tensor]]) -> list[Extracted]:
        """Resize, normalise and pad the images of each modality, and run both of each size through backbone and neck as
        one batch.
        """
        original_sizes = [tuple(image.shape[-2:]) for image in next(iter(images.values()))]
        min_size = self.draw_min_size()
        images = {name: [self.resize(image, min_size) for image in given] for name, given in images.items()}
        sizes = [tuple(image.shape[-2:]) for image in next(iter(images.values()))]
        groups = {}  # padded size -> places
        for place, size in enumerate(sizes):
            groups.setdefault(tuple(math.ceil(side / MULTIPLE) * MULTIPLE for side in size), []).append(place)
        extracted = []
        for batch_size, places in groups.items():
            own = {name: [given[place] for place in places] for name, given in images.items()}
            known = ([of[place] for place in places] for of in (original_sizes, sizes))
            extracted.append(Extracted(self.pyramids(own, batch_size), *known, batch_size, places))
        if self.training and isinstance(self.backbone.bn1, nn.SyncBatchNorm):
            self.wait_for_all(extracted)
        return extracted

    def pyramids(self, images: dict[str, list[Tensor]], size: tuple[int, int]) -> dict[str, list[Tensor]]:
        """Maps (B, C, H_l, W_l) of the images of each modality, padded to `size`."""
        batch = torch.cat([self.batch(given, name, size) for name, given in images.items()])
        # The layout in which convolutions are fastest: on a CPU their backward takes half as long again channels-last.
        layout_in_memory = torch.channels_last if batch.is_cuda else torch.contiguous_format
        layout = [(name, len(given)) for name, given in images.items()]
        maps = self.neck(self.backbone(batch.contiguous(memory_format=layout_in_memory), layout))
        split = [level.chunk(len(images)) for level in maps]
        return {name: [level[i] for level in split] for i, name in enumerate(images)}

    def wait_for_all(self, extracted: list[Extracted]) -> None:
        """As many passes as the process that has most sizes makes: in each the norms wait for one another, and so do
        their gradients, for which what is empty joins the first map.
        """
        most = int(distributed.gather(torch.tensor([len(extracted)])).max())
        for pyramids in [extracted[0].pyramids] * (most - len(extracted)):
            empty = self.pyramids(dict.fromkeys(pyramids, []), (MULTIPLE, MULTIPLE))
            first = next(iter(pyramids.values()))
            first[0] = first[0] + sum(level.sum() for levels in empty.values() for level in levels)

    def draw_min_size(self) -> int | None:
        """The short side to resize a batch to: a random one of several in training, the last in evaluation."""
        if not self.min_sizes:
            return None
        which = int(torch.randint(len(self.min_sizes), ())) if self.training and len(self.min_sizes) > 1 else -1
        return self.min_sizes[which]

    def resize(self, image: Tensor, min_size: int | None) -> Tensor:
        if min_size is None:
            return image
        height, width = image.shape[-2:]
        factor = min_size / min(height, width)
        if self.max_size is not None:
            factor = min(factor, self.max_size / max(height, width))
        size = [max(1, math.floor(side * factor)) for side in (height, width)]
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]

    def batch(self, images: list[Tensor], modality: str, size: tuple[int, int]) -> Tensor:
        """Normalise and zero-pad to one size (height, width). -> (B, 3, H, W)."""
        mean, std = getattr(self, f"{modality}_mean"), getattr(self, f"{modality}_std")
        batch = mean.new_zeros(len(images), 3, *size)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = (image - mean) / std
        return batch

    def draw_present(self, pyramids: dict[str, list[Tensor]]) -> Tensor | None:
        """(B, 2) bool: which modalities the fusion may see of each training image; None where all of them."""
        drop_visible, drop_infrared = self.modality_dropout
        if len(pyramids) < 2 or drop_visible + drop_infrared == 0:
            return None
        finest = pyramids["visible"][0]
        draw = torch.rand(len(finest))
        return torch.stack([draw >= drop_visible, draw < 1 - drop_infrared], dim=1).to(finest.device)

    def contrast_features(self, extracted: list[Extracted], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the contrastive head compares: (N, in_dim) of the visible and of the infrared pyramids.

        One row for each of the boxes (n_i, 4) of the images, in the order of `extracted` and in pixels as resized; at
        image level for each image.
        """
        rows, boxes = {name: [] for name in MODALITIES}, iter(boxes)
        for group in extracted:
            own = list(itertools.islice(boxes, len(group.places)))
            for name, found in rows.items():
                levels = group.pyramids[name]
                if self.macl_level == "image":
                    found.append(torch.stack([level.mean(dim=(2, 3)) for level in levels]).mean(dim=0))
                else:
                    found.append(self.roi_features(levels, own))
        return tuple(map(torch.cat, rows.values()))

    def per_row(self, labels: Tensor, boxes: list[Tensor]) -> Tensor:
        """Labels (B,) of the images as those of the rows that `contrast_features` makes of them, (N,)."""
        if self.macl_level == "image":
            return labels
        return torch.cat([label.expand(len(box)) for label, box in zip(labels, boxes, strict=True)])

    def roi_features(self, pyramid: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """boxes: (n_i, 4) an image, in pixels of the batch. -> (sum n_i, C * macl_roi_size ** 2)."""
        scales = self.roi_head.scales
        return kernels.multiscale_roi_align(
            pyramid[: len(scales)], with_image_index(boxes), scales=scales, output_size=self.macl_roi_size
        ).flatten(1)


def check_inputs(images: dict[str, list[Tensor]], targets: list[dict] | None, training: bool) -> None:
    """Raise ValueError, in one sentence, for what the forward cannot work with."""
    if not images or not all(images.values()):
        raise ValueError("give visible= or infrared= images, or both, at least one image each")
    for name, given in images.items():
        for image in given:
            if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
                raise ValueError(
                    f"{name} images must be (3, H, W) floats in 0..1, got {tuple(image.shape)} {image.dtype}"
                )
    if len(images) == 2:
        pairs = [[tuple(image.shape) for image in given] for given in images.values()]
        if pairs[0] != pairs[1]:
            raise ValueError(f"visible and infrared images differ in number or size: {pairs[0]} and {pairs[1]}")
    if training and (targets is None or len(targets) != len(next(iter(images.values())))):
        raise ValueError("training needs targets, one for each image")
