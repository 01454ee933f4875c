"""The paired detector: Faster R-CNN over the fused pyramids of a visible and an infrared image."""

import functools
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
from macl.boxes import Size, own_boxes, prepare_target, rescale
from macl.contrast import MACLHead
from macl.fpn import FPN
from macl.fusion import Fusion
from macl.merging import FLOOR, merge_views
from macl.roi_head import RoIHead, with_image_index
from macl.rpn import RPN

MULTIPLE = 32  # of padded image sides
CROP = (64, 32)  # height and width of a crop, pixels
JITTER = 0.1  # of the box's sides: standard deviation of a crop's place, and of the logarithm of its size


class Features(NamedTuple):
    """Pyramids of the images of a batch that have one padded size.

    Images of other sizes stay apart: padded to a common size, norms and borders would depend on the rest of the batch.
    """

    pyramids: dict[str, list[Tensor]]  # per modality given (B, C, H_l, W_l), finest first
    images: list[tuple[int, Size, Size]]  # place in the batch, size as given, size as resized
    batch_size: Size  # as padded
    pixels: dict[str, list[Tensor]]  # per modality (3, h, w) in 0..1, as resized

    @property
    def sizes(self) -> list[Size]:
        """Sizes of the images, as resized."""
        return [size for _, _, size in self.images]


class PairedFasterRCNN(nn.Module):
    """Faster R-CNN with one backbone and neck for both modalities, and contrast between the modalities.

    macl: None for none.
    macl_level: what is embedded: "roi", each ground-truth box, pooled from the maps; "crop", each box cut out of the
        image, without its surroundings; "image", the mean of all maps.
    macl_roi_size: bins per side of a pooled box.
    merge: see `detect`.
    statistics: modality -> mean and std, three floats each.
    min_size: short side to resize images to. Of several, training draws one per batch and evaluation takes the last.
    max_size: longest side after resizing.
    kwargs: keywords of `build_detector`, for checkpoints.
    """

    def __init__(
        self, *, backbone: Backbone, neck: FPN, fusion: Fusion, rpn: RPN, roi_head: RoIHead, macl: MACLHead | None,
        macl_level: str, macl_roi_size: int, merge: str, statistics: dict[str, tuple],
        min_size: int | tuple[int, ...] | None, max_size: int | None, kwargs: dict,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.neck, self.fusion, self.rpn, self.roi_head = backbone, neck, fusion, rpn, roi_head
        self.macl, self.macl_level, self.macl_roi_size, self.merge = macl, macl_level, macl_roi_size, merge
        self.min_sizes = min_size if isinstance(min_size, list | tuple) else (min_size,)
        self.max_size, self.kwargs = max_size, kwargs
        for modality, (mean, std) in statistics.items():  # not in the state dict, for `kwargs` has them
            self.register_buffer(f"{modality}_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
            self.register_buffer(f"{modality}_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self, *, visible: list[Tensor] | None = None, infrared: list[Tensor] | None = None,
        targets: list[dict[str, Tensor]] | None = None, with_metrics: bool = False,
    ):  # fmt: skip
        """Losses in training, detections in evaluation. Raises ValueError for images or targets of the wrong form.

        visible, infrared: (3, H, W) float images in 0..1. The two of a pair have one size; either list may be None.
        targets: per training image boxes (N, 4) float32, x1, y1, x2, y2 in pixels, and labels (N,) int64, from 1;
            optionally ignore (N,) bool, neither positive nor negative, and visible_in (N, 2) bool, per modality;
            own_boxes (N, 2, 4), per modality, and present (2,) bool, which camera there is;
            for hard negatives scene () int64, equal for images that may show the same people, -1 for not known, and
            keys (N, 2, D), the boxes' embeddings by an averaged detector (`embed`), per modality.
        with_metrics: whether training returns (losses, metrics).

        -> training: unweighted losses (): loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, and with a
            contrastive head loss_macl. Metrics: detached scalars ().
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
            present = [targets[place].get("present") for place, _, _ in group.images]
            fused = self.fusion(group.pyramids, present)
            proposals, rpn_terms = self.rpn(fused, group.sizes, group.batch_size, wanted)
            terms.append(rpn_terms | self.roi_head.losses(fused, proposals, wanted))
            prepared += wanted
        losses = {}
        for name in terms[0]:
            sums, counts = zip(*(term[name] for term in terms), strict=True)
            losses[name] = distributed.global_mean(sum(sums), sum(counts))
        if self.macl is None:
            return losses, {}
        losses["loss_macl"], metrics = self.contrast(features, prepared)
        return losses, metrics

    def contrast(self, features: list[Features], targets: list[dict]) -> tuple[Tensor, dict]:
        """loss_macl and its metrics. targets: prepared, in the order of `features`."""
        if len(features[0].pyramids) < 2:
            raise ValueError("contrast needs both modalities in training; build the detector with macl_level='none'")
        # Boxes seen in one modality alone are left out, where that is known.
        seen = [target["visible_in"].all(dim=1) if "visible_in" in target else slice(None) for target in targets]
        boxes = [own_boxes(target)[rows] for target, rows in zip(targets, seen, strict=True)]
        scenes = keys = None
        if self.macl.hard is not None and all("scene" in target for target in targets):
            counts = torch.tensor(self.row_counts(boxes), device=boxes[0].device)
            scenes = torch.stack([target["scene"] for target in targets]).repeat_interleave(counts)
        if "keys" in targets[0]:
            rows = [target["keys"][one] for target, one in zip(targets, seen, strict=True)]
            keys = dict(zip(MODALITIES, torch.cat(rows).unbind(1), strict=True))
        return self.macl(*self.pooled_features(features, boxes, jitter=self.training), scenes, keys)

    def detect(
        self, features: list[Features], modalities: Sequence[str] = MODALITIES, *, score_threshold: float | None = None,
        least: float = FLOOR,
    ) -> list[dict[str, Tensor]]:  # fmt: skip
        """Detections per image, from the pyramids of `modalities` alone. score_threshold: None for the detector's.

        With both modalities and merge "logit", what the fused pyramid and each modality's own give, of scores from
        `least`, is merged (`macl.merging`): the fused one dilutes what one camera alone sees.
        """
        options = dict(score_threshold=score_threshold, least=least)
        return next(iter(self.detect_modes(features, {"": modalities}, **options).values()))

    def detect_modes(
        self, features: list[Features], modes: dict[str, Sequence[str]], *, score_threshold: float | None = None,
        least: float = FLOOR,
    ) -> dict[str, list[dict[str, Tensor]]]:  # fmt: skip
        """`detect` by mode. modes: name -> modalities; what several of them need is computed once."""
        threshold = self.roi_head.score_threshold if score_threshold is None else score_threshold
        limits = dict(score_threshold=threshold, limit=self.roi_head.max_detections)
        merges = self.merge == "logit" and self.fusion.kind not in MODALITIES
        least = min(threshold, least) if merges else threshold
        views = functools.cache(lambda *names: self.detect_view(features, names, least))
        given, detections = [name for name in MODALITIES if name in features[0].pyramids], {}
        for mode, modalities in modes.items():
            names = tuple(name for name in given if name in modalities)
            if len(names) == 2 and merges:
                images = zip(views(*names), *map(views, names), strict=True)
                detections[mode] = [merge_views(image, **limits) for image in images]
            else:
                found = [(one, one["scores"] > threshold) for one in views(*names)]
                detections[mode] = [{key: rows[shown] for key, rows in one.items()} for one, shown in found]
        return detections

    def detect_view(self, features: list[Features], modalities: tuple[str, ...], score_threshold: float | None):
        """Detections per image from the fused pyramids of `modalities`."""
        detections = {}
        for group in features:
            fused = self.fusion({name: group.pyramids[name] for name in modalities})
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

        boxes: (n_i, 4) per image, or (n_i, 2, 4), those of visible and of infrared.
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
            features.append(Features(self.pyramids(chosen, batch_size), members, batch_size, chosen))
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
        size = self.resized(image.shape[-2:], min_size)
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]

    def resized(self, size: Size, min_size: int) -> Size:
        """The size of an image of `size`, resized. In whole numbers, which fall no pixel short, and export as such."""
        short, long = torch.sym_min(*size), torch.sym_max(*size)
        sides = [side * int(min_size) // short for side in size]
        if self.max_size is not None:
            longest = [side * int(self.max_size) // long for side in size]
            sides = map(torch.sym_min, sides, longest)
        return tuple(torch.sym_max(1, side) for side in sides)

    def pooled_features(
        self, features: list[Features], boxes: list[Tensor], *, jitter: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Input (N, in_dim) of the contrastive head, of the visible and of the infrared pyramids.

        boxes: (n_i, 4) or (n_i, 2, 4) per image, in the order of `features`, in pixels as resized.
        jitter: whether the infrared crops of level "crop" are moved and scaled a little, as cameras and boxes are.
        """
        own = [box if box.dim() == 3 else box[:, None].expand(-1, 2, -1) for box in boxes]
        boxes = {name: [box[:, place] for box in own] for place, name in enumerate(MODALITIES)}
        if self.macl_level == "crop":  # of all images at once: in each pass synchronised norms wait for all processes
            moved = boxes | ({"infrared": [jittered(box) for box in boxes["infrared"]]} if jitter else {})
            pixels = {name: [image for group in features for image in group.pixels[name]] for name in MODALITIES}
            return tuple(self.crop_features(name, pixels[name], moved[name]) for name in MODALITIES)
        rows, boxes = {name: [] for name in MODALITIES}, {name: iter(given) for name, given in boxes.items()}
        for group in features:
            for name, pooled in rows.items():
                chosen = list(itertools.islice(boxes[name], len(group.images)))
                levels, scales = group.pyramids[name], self.roi_head.scales
                if self.macl_level == "image":
                    pooled.append(torch.stack([level.mean(dim=(2, 3)) for level in levels]).mean(dim=0))
                else:
                    levels, rois = levels[: len(scales)], with_image_index(chosen)
                    bins = kernels.multiscale_roi_align(levels, rois, scales=scales, output_size=self.macl_roi_size)
                    pooled.append(bins.flatten(1))
        return tuple(map(torch.cat, rows.values()))

    def crop_features(self, modality: str, pixels: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """P3 of each box cut out of its image and resized to CROP: (N, C * 8 * 4). pixels: (3, h, w) per image."""
        crops = [
            kernels.multiscale_roi_align([image[None]], with_image_index([box]), scales=[1.0], output_size=CROP)
            for image, box in zip(pixels, boxes, strict=True)
        ]  # (n_i, 3, 64, 32)
        crops = torch.cat(crops)
        mean, std = getattr(self, f"{modality}_mean"), getattr(self, f"{modality}_std")
        return self.neck(self.backbone((crops - mean) / std, [(modality, len(crops))]))[1].flatten(1)

    def row_counts(self, boxes: list[Tensor]) -> list[int]:
        """Rows of `pooled_features` per image."""
        return [1 if self.macl_level == "image" else len(box) for box in boxes]


def jittered(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) moved and scaled at random, see JITTER."""
    place, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    place = place + JITTER * torch.randn_like(size) * size
    half = size / 2 * (JITTER * torch.randn_like(size[:, :1])).exp()
    return torch.cat([place - half, place + half], dim=1)


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
