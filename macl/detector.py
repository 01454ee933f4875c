"""The paired detector: Faster R-CNN over the fused pyramids of a visible and an infrared image."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import trainkit.distributed as distributed
from macl.backbone import MODALITIES, Backbone
from macl.boxes import Size, prepare_target, rescale
from macl.contrast import MACLHead
from macl.domain import DomainAlignment
from macl.fpn import FPN
from macl.fusion import Fusion
from macl.roi_head import RoIHead, with_image_index
from macl.rpn import RPN

MULTIPLE = 32  # of padded image sides


class Features(NamedTuple):
    """Pyramids of the images of a batch that have one padded size.

    Images of other sizes stay apart: padded to a common size, norms and borders would depend on the rest of the batch.
    """

    pyramids: dict[str, list[Tensor]]  # per modality given (B, C, H_l, W_l), finest first
    images: list[tuple[int, Size, Size]]  # place in the batch, size as given, size as resized
    batch_size: Size  # as padded

    @property
    def sizes(self) -> list[Size]:
        """Sizes of the images, as resized."""
        return [size for _, _, size in self.images]


class PairedFasterRCNN(nn.Module):
    """Faster R-CNN with one backbone and neck for both modalities, contrast and domain alignment.

    macl, alignment: None for none.
    macl_level: what is embedded, "roi", each ground-truth box, or "image", the mean of all maps.
    macl_roi_size: bins per side of a pooled box.
    statistics: modality -> mean and std, three floats each.
    min_size: short side to resize images to. Of several, training draws one per batch and evaluation takes the last.
    max_size: longest side after resizing.
    kwargs: keywords of `build_detector`, for checkpoints.
    """

    def __init__(
        self, *, backbone: Backbone, neck: FPN, fusion: Fusion, rpn: RPN, roi_head: RoIHead, macl: MACLHead | None,
        alignment: DomainAlignment | None, macl_level: str, macl_roi_size: int, statistics: dict[str, tuple],
        min_size: int | tuple[int, ...] | None, max_size: int | None, kwargs: dict,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.neck, self.fusion, self.rpn, self.roi_head = backbone, neck, fusion, rpn, roi_head
        self.macl, self.macl_level, self.macl_roi_size = macl, macl_level, macl_roi_size
        self.alignment, self.reversal_scale = alignment, 1.0
        self.min_sizes = min_size if isinstance(min_size, list | tuple) else (min_size,)
        self.max_size, self.kwargs = max_size, kwargs
        for modality, (mean, std) in statistics.items():  # not in the state dict, for `kwargs` has them
            self.register_buffer(f"{modality}_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
            self.register_buffer(f"{modality}_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def set_schedule(
        self, *, reversal_scale: float | None = None, hard_k: int | None = None, hard_active: int | None = None
    ) -> None:
        """Set per-step values, see `DomainClassifier` and `HardNegatives`; None leaves one as it is."""
        if reversal_scale is not None:
            self.reversal_scale = reversal_scale
        if hard_k is not None:
            self.macl.hard.k = hard_k
        if hard_active is not None:
            self.macl.hard.active = hard_active

    def forward(
        self, *, visible: list[Tensor] | None = None, infrared: list[Tensor] | None = None,
        targets: list[dict[str, Tensor]] | None = None, with_metrics: bool = False,
    ):  # fmt: skip
        """Losses in training, detections in evaluation. Raises ValueError for images or targets of the wrong form.

        visible, infrared: (3, H, W) float images in 0..1. The two of a pair have one size; either list may be None.
        targets: per training image boxes (N, 4) float32, x1, y1, x2, y2 in pixels, and labels (N,) int64, from 1;
            optionally ignore (N,) bool, neither positive nor negative, and visible_in (N, 2) bool, per modality;
            for hard negatives scene () int64, equal for images that may show the same people, -1 for not known;
            for several data sets domain () int64, from 0.
        with_metrics: whether training returns (losses, metrics).

        -> training: unweighted losses (): loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg; with their
            parts loss_macl, loss_dhn, loss_mmd, loss_mmd_domains, loss_adversary. Metrics: detached scalars ().
        -> evaluation: per image dict(boxes (n, 4), labels (n,), scores (n,)) in pixels of the given image.
        """
        given = {"visible": visible, "infrared": infrared}
        images = {name: part for name, part in given.items() if part is not None}
        check_inputs(images, targets, self.training)
        features = self.extract(images)
        if not self.training:
            return self.detect(features)
        losses, metrics = self.losses(features, targets)
        return (losses, metrics) if with_metrics else losses

    def losses(self, features: list[Features], targets: list[dict[str, Tensor]]) -> tuple[dict, dict]:
        """Losses and metrics, as `forward` returns them."""
        prepared, terms = [], []
        for group in features:
            wanted = [prepare_target(targets[place], old, new) for place, old, new in group.images]
            fused = self.fusion(group.pyramids)
            proposals, rpn_terms = self.rpn(fused, group.sizes, group.batch_size, wanted)
            terms.append(rpn_terms | self.roi_head.losses(fused, proposals, wanted))
            prepared += wanted
        losses = {}
        for name in terms[0]:
            sums, counts = zip(*(term[name] for term in terms), strict=True)
            losses[name] = distributed.global_mean(sum(sums), sum(counts))
        more, metrics = self.alignment_losses(features, prepared)
        return losses | more, metrics

    def alignment_losses(self, features: list[Features], targets: list[dict]) -> tuple[dict, dict]:
        """Losses and metrics of contrast and alignment. targets: prepared, in the order of `features`."""
        if self.macl is None and self.alignment is None:
            return {}, {}
        if len(features[0].pyramids) < 2:
            raise ValueError("contrast and alignment need both modalities in training; build the detector without them")
        losses, metrics, embeddings = {}, {}, None
        # Boxes seen in one modality alone are left out, where that is known.
        boxes = [t["boxes"][t["visible_in"].all(dim=1)] if "visible_in" in t else t["boxes"] for t in targets]
        rows = torch.tensor(self.row_counts(boxes), device=boxes[0].device)
        if self.macl is not None:
            scenes = None if self.macl.hard is None else stack_labels(targets, "scene").repeat_interleave(rows)
            losses, metrics, embeddings = self.macl.compare(*self.pooled_features(features, boxes), scenes)
        if self.alignment is None:
            return losses, metrics
        domains = stack_labels(targets, "domain") if self.alignment.domains > 1 else torch.zeros_like(rows)
        row_domains = domains.repeat_interleave(rows)
        more, about = self.alignment(features, domains, embeddings, row_domains, self.reversal_scale)
        return losses | more, metrics | about

    def detect(
        self, features: list[Features], modalities: Sequence[str] = MODALITIES, *, score_threshold: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Detections per image, from the pyramids of `modalities` alone. score_threshold: None for the detector's."""
        detections = {}
        for group in features:
            fused = self.fusion({name: group.pyramids[name] for name in modalities if name in group.pyramids})
            proposals, _ = self.rpn(fused, group.sizes, group.batch_size, None)
            outputs = self.roi_head.detect(fused, proposals, group.sizes, score_threshold)
            for (place, original, size), output in zip(group.images, outputs, strict=True):
                detections[place] = output | {"boxes": rescale(output["boxes"], size, original)}
        return [detections[place] for place in sorted(detections)]

    @property
    def modes(self) -> dict[str, tuple[str, ...]]:
        """Name -> modalities to detect with: "both" and each alone, or the one of fusion "visible" / "infrared"."""
        if self.fusion.kind in MODALITIES:
            return {self.fusion.kind: (self.fusion.kind,)}
        return {"both": MODALITIES, **{name: (name,) for name in MODALITIES}}

    def embed(self, features: list[Features], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, out_dim) of the visible and of the infrared images, one row per box or per image.

        boxes: (n_i, 4) per image.
        """
        where = [image for group in features for image in group.images]
        boxes = [rescale(boxes[place], old, new) for place, old, new in where]
        order = sorted(range(len(where)), key=lambda i: where[i][0])
        pooled = self.pooled_features(features, boxes)
        embedded = (self.macl.embed(rows).split(self.row_counts(boxes)) for rows in pooled)
        return tuple(torch.cat([parts[i] for i in order]) for parts in embedded)

    def extract(self, images: dict[str, list[Tensor]]) -> list[Features]:
        """Resize the images, and run those of one padded size through backbone and neck."""
        several = self.training and len(self.min_sizes) > 1
        min_size = self.min_sizes[int(torch.randint(len(self.min_sizes), ())) if several else -1]
        resized = {name: [self.resize(image, min_size) for image in given] for name, given in images.items()}
        groups: dict[Size, list[tuple[int, Size, Size]]] = {}
        first = next(iter(images))
        for place, pair in enumerate(zip(images[first], resized[first], strict=True)):
            old, new = (tuple(image.shape[-2:]) for image in pair)
            padded = tuple(math.ceil(side / MULTIPLE) * MULTIPLE for side in new)
            groups.setdefault(padded, []).append((place, old, new))
        features = []
        for batch_size, members in groups.items():
            chosen = {name: [given[place] for place, _, _ in members] for name, given in resized.items()}
            features.append(Features(self.pyramids(chosen, batch_size), members, batch_size))
        if self.training and isinstance(self.backbone.bn1, nn.SyncBatchNorm):
            self.wait_for_all(features)
        return features

    def pyramids(self, images: dict[str, list[Tensor]], size: Size) -> dict[str, list[Tensor]]:
        """Maps (B, C, H_l, W_l) per modality of its images, normalised and zero-padded to `size`."""
        batches = []
        for name, given in images.items():
            mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
            batches.append(mean.new_zeros(len(given), 3, *size))
            for row, image in zip(batches[-1], given, strict=True):
                row[:, : image.shape[-2], : image.shape[-1]] = (image - mean) / std
        batch = torch.cat(batches)
        if batch.is_cuda:  # where convolutions are faster so; on a CPU their backward takes half as long again
            batch = batch.contiguous(memory_format=torch.channels_last)
        maps = self.neck(self.backbone(batch, [(name, len(given)) for name, given in images.items()]))
        split = [level.chunk(len(images)) for level in maps]
        return {name: [level[i] for level in split] for i, name in enumerate(images)}

    def wait_for_all(self, features: list[Features]) -> None:
        """Make empty passes, up to the most of any process: in each pass synchronised norms wait for all."""
        most = int(distributed.gather(torch.tensor([len(features)])).max())
        pyramids = features[0].pyramids
        for _ in range(most - len(features)):
            empty = self.pyramids(dict.fromkeys(pyramids, []), (MULTIPLE, MULTIPLE))
            first = next(iter(pyramids.values()))
            # The empty maps join the graph, for the backward waits too.
            first[0] = first[0] + sum(level.sum() for levels in empty.values() for level in levels)

    def resize(self, image: Tensor, min_size: int | None) -> Tensor:
        if min_size is None:
            return image
        height, width = image.shape[-2:]
        factor = min_size / min(height, width)
        if self.max_size is not None:
            factor = min(factor, self.max_size / max(height, width))
        size = [max(1, math.floor(side * factor)) for side in (height, width)]
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]

    def pooled_features(self, features: list[Features], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Input (N, in_dim) of the contrastive head, of the visible and of the infrared pyramids.

        boxes: (n_i, 4) per image, in the order of `features`, in pixels as resized.
        """
        rows, boxes = {name: [] for name in MODALITIES}, iter(boxes)
        for group in features:
            chosen = with_image_index(list(itertools.islice(boxes, len(group.images))))
            for name, pooled in rows.items():
                levels, scales = group.pyramids[name], self.roi_head.scales
                if self.macl_level == "image":
                    pooled.append(torch.stack([level.mean(dim=(2, 3)) for level in levels]).mean(dim=0))
                else:
                    levels = levels[: len(scales)]
                    bins = kernels.multiscale_roi_align(levels, chosen, scales=scales, output_size=self.macl_roi_size)
                    pooled.append(bins.flatten(1))
        return tuple(map(torch.cat, rows.values()))

    def row_counts(self, boxes: list[Tensor]) -> list[int]:
        """Rows of `pooled_features` per image."""
        return [1 if self.macl_level == "image" else len(box) for box in boxes]


def stack_labels(targets: list[dict[str, Tensor]], key: str) -> Tensor:
    """One label per image, (B,) int64. Raises ValueError where a target has none."""
    if not all(key in target for target in targets):
        raise ValueError(f"every target needs {key!r}, a 0-d int64 tensor, for the losses of this detector")
    return torch.stack([target[key] for target in targets])


def check_inputs(images: dict[str, list[Tensor]], targets: list[dict] | None, training: bool) -> None:
    """Raise ValueError for what `forward` cannot work with."""
    if not images or not all(images.values()):
        raise ValueError("give visible= or infrared= images, or both, at least one image each")
    for image in itertools.chain(*images.values()):
        if image.dim() != 3 or len(image) != 3 or not image.is_floating_point():
            raise ValueError(f"images must be (3, H, W) floats in 0..1, got {tuple(image.shape)} {image.dtype}")
    shapes = [[tuple(image.shape) for image in given] for given in images.values()]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"visible and infrared images differ in number or size: {shapes[0]} and {shapes[-1]}")
    if training and (targets is None or len(targets) != len(shapes[0])):
        raise ValueError("training needs targets, one for each image")
