"""Detectors out of plain values, and out of checkpoints."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from macl.backbone import Backbone
from macl.boxes import AnchorGenerator
from macl.contrast import MACLHead
from macl.detector import PairedFasterRCNN
from macl.domain import DomainAlignment
from macl.fpn import FPN
from macl.fusion import Fusion
from macl.msp import MSPReweight
from macl.roi_head import RoIHead
from macl.rpn import RPN, RPNHead
from macl.weights import load_torchvision_weights, read_state
from trainkit.errors import InputError
from trainkit.files import check_like, number, shown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MACL_LEVELS = ("roi", "image", "none")
POOLED_LEVELS = 4  # RoIs are pooled from P2 to P5 at most
# What a detector may have beside a checkpoint, or a checkpoint beside it.
ADDED_PARTS = re.compile(r"(macl\.hard\.banks\.\w+|macl\.hard\.key_projector|alignment\.classifier)\.")


def build_detector(
    *,
    backbone: str = "resnet50",
    classes: tuple[str, ...] = ("person",),
    fusion: str = "mean",
    norm: str = "frozen_batch",
    norm_eps: float = 1e-5,
    frozen_stages: int = 0,
    fpn_channels: int = 256,
    fpn_levels: int = 5,
    msp: bool = False,
    msp_hidden: int | None = None,
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    rpn_pre_nms: tuple[int, int] = (2000, 1000),
    rpn_post_nms: tuple[int, int] = (2000, 1000),
    rpn_samples: int = 256,
    rpn_positive_fraction: float = 0.5,
    head_width: int = 1024,
    roi_samples: int = 512,
    roi_positive_fraction: float = 0.25,
    box_loss: str = "smooth_l1",
    box_beta: float = 1 / 9,
    label_smoothing: float = 0.0,
    score_threshold: float = 0.05,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    macl_level: str = "roi",
    macl_hidden: tuple[int, ...] = (128, 64),
    macl_dim: int = 128,
    macl_norm: str = "layer",
    macl_norm_groups: int = 32,
    macl_dropout: float = 0.0,
    macl_direction: str = "both",
    macl_temperature: float = 0.07,
    macl_roi_size: int = 4,
    dhn_size: int = 0,
    dhn_k: int = 64,
    dhn_mode: str = "denominator",
    dhn_momentum: float = 0.0,
    mmd_level: str = "none",
    mmd_sigmas: tuple[float, ...] | None = None,
    mmd_unbiased: bool = True,
    adversary: str = "none",
    domains: int = 1,
    modality_dropout: tuple[float, float] = (0.0, 0.0),
    visible_mean: tuple[float, ...] = IMAGENET_MEAN,
    visible_std: tuple[float, ...] = IMAGENET_STD,
    infrared_mean: tuple[float, ...] = IMAGENET_MEAN,
    infrared_std: tuple[float, ...] = IMAGENET_STD,
    min_size: int | tuple[int, ...] | None = None,
    max_size: int | None = None,
) -> PairedFasterRCNN:
    """The detector out of plain values, which every checkpoint stores and `load_detector` reads back.

    A keyword is described where it is used, without its prefix: `Backbone` (backbone, norm, frozen), `Fusion`, `FPN`,
    `MSPReweight`, `AnchorGenerator`, `RPN`, `RoIHead` (head, roi, box, detections), `MACLHead` (macl, dhn),
    `DomainAlignment` (mmd, adversary, domains), `PairedFasterRCNN` (the rest). Raises ValueError for values that do not
    fit together.

    classes: names of labels 1, 2, ...
    fpn_levels: pyramid maps from P2 on, 3 to 6; up to 4 come from the backbone, the rest are subsampled.
    anchor_sizes: a level without one gets twice that of the level before.
    macl_level: "none" leaves the contrastive head out.
    """
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in locals().items()}
    if not 3 <= fpn_levels <= 6:
        raise ValueError(f"fpn_levels is {fpn_levels}, must be 3 to 6")
    values = SimpleNamespace(**kwargs, stages=min(fpn_levels, POOLED_LEVELS))
    body, neck = build_pyramid(values)
    return PairedFasterRCNN(
        backbone=body,
        neck=neck,
        macl=build_contrast(values),
        fusion=Fusion(fusion, channels=fpn_channels, dropout=modality_dropout),
        rpn=build_rpn(values),
        roi_head=build_roi_head(values),
        alignment=build_alignment(values),  # the last to draw first weights, so that it leaves the others' as they are
        macl_level=macl_level,
        macl_roi_size=macl_roi_size,
        statistics={"visible": (visible_mean, visible_std), "infrared": (infrared_mean, infrared_std)},
        min_size=min_size,
        max_size=max_size,
        kwargs=kwargs,
    )


def build_pyramid(values: SimpleNamespace) -> tuple[Backbone, FPN]:
    norm = dict(norm=values.norm, norm_eps=values.norm_eps)
    body = Backbone(values.backbone, **norm, stages=values.stages, frozen_stages=values.frozen_stages)
    msp = MSPReweight(values.fpn_channels, hidden=values.msp_hidden) if values.msp else None
    channels = dict(in_channels=body.out_channels, out_channels=values.fpn_channels)
    return body, FPN(**channels, out_levels=values.fpn_levels, msp=msp)


def build_rpn(values: SimpleNamespace) -> RPN:
    sizes = values.anchor_sizes[: values.fpn_levels]
    sizes = [*sizes, *(sizes[-1] * 2**i for i in range(1, 1 + values.fpn_levels - len(sizes)))]
    anchors = AnchorGenerator(sizes=sizes, aspect_ratios=values.aspect_ratios)
    head = RPNHead(values.fpn_channels, len(values.aspect_ratios))
    nms = dict(pre_nms=values.rpn_pre_nms, post_nms=values.rpn_post_nms)
    sampling = dict(samples=values.rpn_samples, positive_fraction=values.rpn_positive_fraction)
    return RPN(head=head, anchors=anchors, **nms, **sampling)


def build_roi_head(values: SimpleNamespace) -> RoIHead:
    scales = tuple(0.25 / 2**level for level in range(values.stages))
    sizes = dict(channels=values.fpn_channels, classes=len(values.classes), width=values.head_width)
    sampling = dict(samples=values.roi_samples, positive_fraction=values.roi_positive_fraction)
    loss = dict(box_loss=values.box_loss, box_beta=values.box_beta, label_smoothing=values.label_smoothing)
    nms = dict(score_threshold=values.score_threshold, nms_iou=values.nms_iou, max_detections=values.max_detections)
    return RoIHead(scales=scales, **sizes, **sampling, **loss, **nms)


def build_contrast(values: SimpleNamespace) -> MACLHead | None:
    """None for macl_level "none"."""
    if values.macl_level not in MACL_LEVELS:
        raise ValueError(f"macl_level {values.macl_level!r} is none of {', '.join(MACL_LEVELS)}")
    if values.macl_level == "none":
        if values.dhn_size or values.mmd_level == "embedding":
            raise ValueError("dhn_size and mmd_level 'embedding' need the contrastive head, and macl_level is 'none'")
        return None
    in_dim = values.fpn_channels * (values.macl_roi_size**2 if values.macl_level == "roi" else 1)
    norm = dict(norm=values.macl_norm, norm_groups=values.macl_norm_groups, dropout=values.macl_dropout)
    loss = dict(direction=values.macl_direction, temperature=values.macl_temperature)
    bank = dict(bank_size=values.dhn_size, hard_k=values.dhn_k)
    hard = dict(hard_mode=values.dhn_mode, hard_momentum=values.dhn_momentum)
    return MACLHead(in_dim, values.macl_hidden, values.macl_dim, **norm, **loss, **bank, **hard)


def build_alignment(values: SimpleNamespace) -> DomainAlignment | None:
    """None where it would have nothing to do; its values are checked all the same."""
    mmd = dict(mmd_level=values.mmd_level, mmd_sigmas=values.mmd_sigmas, mmd_unbiased=values.mmd_unbiased)
    pooled_dim = values.fpn_channels * values.fpn_levels
    alignment = DomainAlignment(**mmd, adversary=values.adversary, domains=values.domains, pooled_dim=pooled_dim)
    return None if (values.mmd_level, values.adversary) == ("none", "none") else alignment


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of a run or published weights, as `read_state` reads them. Raises InputError.

    A checkpoint's keywords build a detector with the very tensors that it holds; this is tried without memory for them,
    so that a damaged file cannot ask for more than its own size.
    """
    source = read_state(path)
    if "model_kwargs" in source:
        with torch.device("meta"):
            own = _build(source["model_kwargs"], path).state_dict()
        for key in ("model", "ema"):
            if key == "model" or source.get(key) is not None:
                check_like(source.get(key), own, f"{path}, {key}")
    return source


def _build(kwargs, path: str | Path) -> PairedFasterRCNN:
    """The detector of the model_kwargs in a file; whatever is wrong with them is an InputError with its path."""
    known = build_detector.__kwdefaults__
    if not isinstance(kwargs, dict) or kwargs.keys() - known.keys():
        raise InputError(f"{path} was written by another version of the detector; its keywords are {shown(kwargs)}")
    for name, value in kwargs.items():
        _check_kind(value, known[name], f"{path}, model_kwargs: {name}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of parts without a single number
            return build_detector(**kwargs)
    except Exception as error:  # values that do not fit together meet whatever uses them first
        raise InputError(f"{path}: its model_kwargs build no detector: {first_difference(error)}") from error


def _check_kind(value, default, place: str) -> None:
    """InputError unless a value is of the kind of its default; with None that is numbers or nothing."""
    values, likes = (x if isinstance(x, list | tuple) else [x] for x in (value, default))
    if default is not None and (values is value) != (likes is default):
        raise InputError(f"{place}: expected {shown(default)} or the like, got {shown(value)}")
    for item in values:
        if isinstance(likes[0], bool | str):
            check_like(item, likes[0], place)
        elif value is not None or default is not None:
            number(None if isinstance(item, str) else item, place, 0, 2**20, whole=isinstance(default, int))


def load_detector(path: str | Path, *, weights: str = "ema", checkpoint: dict | None = None) -> PairedFasterRCNN:
    """Rebuild a detector, architecture and weights, from a training checkpoint alone.

    weights: "ema" takes the averaged weights where the checkpoint has them, "raw" the trained ones. checkpoint: what
    `read_checkpoint(path)` gave, where it was read before. Raises InputError for a file that is no checkpoint of a
    detector, and for weights that are not finite.
    """
    checkpoint = checkpoint or read_checkpoint(path)
    if "model_kwargs" not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of this project's detector: it has no model_kwargs")
    detector = _build(checkpoint["model_kwargs"], path)
    averaged = weights == "ema" and checkpoint.get("ema") is not None
    detector.load_state_dict(checkpoint["ema" if averaged else "model"])
    return detector.eval()


def load_initial_weights(detector: PairedFasterRCNN, path: str | Path) -> str:
    """Start a detector from a training checkpoint, which must fit whole, or from published weights, where they fit.

    They are told apart by their keys; a checkpoint's averaged weights are taken where it has them. Memory banks, their
    key projector and the domain classifier may be absent from either side or of another size: then banks start empty,
    the key projector as the projector, the classifier as initialised. -> what was loaded, for people. Raises InputError
    for a checkpoint of another architecture.
    """
    source = read_checkpoint(path)
    if "model_kwargs" not in source:
        return str(load_torchvision_weights(detector, source))
    averaged = source.get("ema") is not None
    own, state = detector.state_dict(), dict(source["ema" if averaged else "model"])
    new, notes = {}, []
    for part in sorted({found[1] for key in [*own, *state] if (found := ADDED_PARTS.match(key))}):
        ours, theirs = ({k: t for k, t in tensors.items() if k.startswith(f"{part}.")} for tensors in (own, state))
        if {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}:
            continue
        state = {key: tensor for key, tensor in state.items() if key not in theirs}
        new |= {key: state.get(key.replace("hard.key_projector", "projector"), tensor) for key, tensor in ours.items()}
        notes.append(f"newly made: {part}" if ours else f"left out: {part}")
    try:
        detector.load_state_dict(state | new)
    except RuntimeError as error:
        raise InputError(f"{path} is a checkpoint of another detector: {first_difference(error)}") from error
    return "; ".join([f"all {len(state)} tensors loaded" + ", the averaged ones" * averaged, *notes])


def first_difference(error: Exception) -> str:
    """The first of the differences that `load_state_dict` lists over many lines."""
    lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
