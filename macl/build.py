"""Detectors out of plain values, and out of checkpoints."""

import warnings
from pathlib import Path

import torch

from macl.backbone import BACKBONES, NORMS, Backbone
from macl.boxes import BOX_LOSSES, AnchorGenerator
from macl.contrast import DIRECTIONS, PROJECTOR_NORMS, MACLHead
from macl.detector import CROP, PairedFasterRCNN
from macl.fpn import FPN
from macl.fusion import FUSIONS, Fusion
from macl.msp import MSPReweight
from macl.roi_head import RoIHead
from macl.rpn import RPN, RPNHead
from macl.weights import class_rows, load_torchvision_weights, read_state
from trainkit.errors import InputError
from trainkit.files import check_like, reason, shown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MACL_LEVELS = ("roi", "crop", "image", "none")
MERGES = ("logit", "none")
POOLED_LEVELS = 4  # RoIs are pooled from P2 to P5 at most
CHOICES = {
    "backbone": BACKBONES, "norm": NORMS, "fusion": FUSIONS, "box_loss": BOX_LOSSES, "macl_level": MACL_LEVELS,
    "macl_norm": PROJECTOR_NORMS, "macl_direction": DIRECTIONS, "merge": MERGES,
}  # fmt: skip
# Parts that a checkpoint may lack, or have beside those of the detector, or in another form.
ADDED_PARTS = ("neck.msp", "macl.hard", "macl", "rpn.head.cls_logits", "rpn.head.bbox_pred")
# Of earlier versions: keywords, and the parts that they built.
DROPPED_KEYWORDS = ("dhn_mode", "dhn_momentum", "mmd_level", "mmd_sigmas", "mmd_unbiased", "adversary", "domains")
DROPPED_PARTS = ("alignment.", "macl.hard.key_projector.")


def build_detector(
    *, backbone: str = "resnet50", classes: tuple[str, ...] = ("person",), fusion: str = "mean",
    norm: str = "frozen_batch", norm_eps: float = 1e-5, frozen_stages: int = 0,
    fpn_channels: int = 256, fpn_levels: int = 5, msp: bool = False, msp_hidden: int | None = None,
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0),
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    rpn_pre_nms: tuple[int, int] = (2000, 1000), rpn_post_nms: tuple[int, int] = (2000, 1000),
    rpn_samples: int = 256, rpn_positive_fraction: float = 0.5,
    head_width: int = 1024, roi_samples: int = 512, roi_positive_fraction: float = 0.25,
    box_loss: str = "smooth_l1", box_beta: float = 1 / 9, label_smoothing: float = 0.0,
    score_threshold: float = 0.05, nms_iou: float = 0.5, max_detections: int = 100,
    macl_level: str = "roi", macl_hidden: tuple[int, ...] = (128, 64), macl_dim: int = 128,
    macl_norm: str = "layer", macl_norm_groups: int = 32, macl_dropout: float = 0.0,
    macl_direction: str = "both", macl_temperature: float = 0.07, macl_roi_size: int = 4,
    dhn_size: int = 0, dhn_k: int = 8, merge: str = "none", modality_dropout: tuple[float, float] = (0.0, 0.0),
    visible_mean: tuple[float, ...] = IMAGENET_MEAN, visible_std: tuple[float, ...] = IMAGENET_STD,
    infrared_mean: tuple[float, ...] = IMAGENET_MEAN, infrared_std: tuple[float, ...] = IMAGENET_STD,
    min_size: int | tuple[int, ...] | None = None, max_size: int | None = None,
) -> PairedFasterRCNN:  # fmt: skip
    """The detector of plain values. Checkpoints store them, and `load_detector` builds it from them again.

    Keywords are described where they are used, without their prefix: `Backbone` (backbone, norm, frozen), `Fusion`,
    `FPN`, `MSPReweight`, `AnchorGenerator`, `RPN`, `RoIHead` (head, roi, box, detections), `MACLHead` (macl, dhn),
    `PairedFasterRCNN` (the rest).
    Raises ValueError for values that do not fit together.

    classes: names of labels 1, 2, ...
    fpn_levels: pyramid maps from P2 on, 3 to 6; up to 4 come from the backbone, the rest are subsampled.
    anchor_sizes: a level without one gets twice that of the level before.
    macl_level: "none" leaves the contrastive head out.
    """
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in locals().items()}
    for name, options in CHOICES.items():
        if kwargs[name] not in options:
            raise ValueError(f"{name} {kwargs[name]!r} is none of {', '.join(options)}")
    if not 3 <= fpn_levels <= 6:
        raise ValueError(f"fpn_levels is {fpn_levels}, must be 3 to 6")
    for name, sizes in (("anchor_sizes", anchor_sizes), ("min_size", min_size)):
        if isinstance(sizes, list | tuple) and not (sizes and min(sizes) > 0):
            raise ValueError(f"{name} {list(sizes)}: expected at least one number, all above 0")
    if dhn_size and macl_level not in ("roi", "crop"):
        raise ValueError(f"dhn_size needs the embeddings of boxes, and macl_level is {macl_level!r}")

    stages = min(fpn_levels, POOLED_LEVELS)
    body = Backbone(backbone, norm=norm, norm_eps=norm_eps, stages=stages, frozen_stages=frozen_stages)
    neck = FPN(in_channels=body.out_channels, out_channels=fpn_channels, out_levels=fpn_levels)
    fuse = Fusion(fusion, dropout=modality_dropout)
    sizes = [*anchor_sizes[:fpn_levels]]
    while len(sizes) < fpn_levels:
        sizes.append(sizes[-1] * 2)
    rpn = RPN(
        head=RPNHead(fpn_channels, len(aspect_ratios)),
        anchors=AnchorGenerator(sizes=sizes, aspect_ratios=aspect_ratios),
        pre_nms=rpn_pre_nms, post_nms=rpn_post_nms, samples=rpn_samples, positive_fraction=rpn_positive_fraction,
    )  # fmt: skip
    roi_head = RoIHead(
        channels=fpn_channels, classes=len(classes), scales=tuple(0.25 / 2**level for level in range(stages)),
        width=head_width, samples=roi_samples, positive_fraction=roi_positive_fraction, box_loss=box_loss,
        box_beta=box_beta, label_smoothing=label_smoothing, score_threshold=score_threshold, nms_iou=nms_iou,
        max_detections=max_detections,
    )  # fmt: skip
    # What may be left out comes last, so that all else begins with the same random weights with it and without.
    if msp:
        neck.msp = MSPReweight(fpn_channels, hidden=msp_hidden)
    macl, cells = None, {"roi": macl_roi_size**2, "crop": CROP[0] * CROP[1] // 64, "image": 1}  # P3: 8 pixels a cell
    if macl_level != "none":
        macl = MACLHead(
            fpn_channels * cells[macl_level], macl_hidden, macl_dim, norm=macl_norm, norm_groups=macl_norm_groups,
            dropout=macl_dropout, direction=macl_direction, temperature=macl_temperature, bank_size=dhn_size,
            hard_k=dhn_k,
        )  # fmt: skip
    return PairedFasterRCNN(
        backbone=body, neck=neck, fusion=fuse, rpn=rpn, roi_head=roi_head, macl=macl, macl_level=macl_level,
        macl_roi_size=macl_roi_size, merge=merge, min_size=min_size, max_size=max_size, kwargs=kwargs,
        statistics={"visible": (visible_mean, visible_std), "infrared": (infrared_mean, infrared_std)},
    )  # fmt: skip


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of a run or published weights, as `read_state` reads them. Raises InputError.

    A checkpoint's tensors must be those of the detector that its keywords build. This is tried without memory for
    them, so that a damaged file cannot ask for more than its own size.
    """
    source = read_state(path)
    if isinstance(source.get("model_kwargs"), dict):
        source["model_kwargs"] = {k: v for k, v in source["model_kwargs"].items() if k not in DROPPED_KEYWORDS}
        states = [one for one in (source.get("model"), source.get("ema")) if isinstance(one, dict)]
        for state, key in [(one, key) for one in states for key in one if str(key).startswith(DROPPED_PARTS)]:
            del state[key]
    if "model_kwargs" in source:
        with torch.device("meta"):
            own = _build(source["model_kwargs"], path).state_dict()
        check_like(source.get("model"), own, f"{path}, model")
        if source.get("ema") is not None:
            check_like(source["ema"], own, f"{path}, ema")
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
        raise InputError(f"{path}: its model_kwargs build no detector: {reason(error).splitlines()[0]}") from error


def _check_kind(value, default, place: str) -> None:
    """InputError unless a value is of the kind of its default, of any length; with None numbers or nothing."""
    several = isinstance(value, list | tuple)
    if default is None and value is not None:
        default = (0.0,) if several else 0.0
    if several != isinstance(default, tuple):
        raise InputError(f"{place}: expected {shown(default)} or the like, got {shown(value)}")
    check_like(value, default[:1] * len(value) if several else default, place)


def load_detector(path: str | Path, *, weights: str = "ema", checkpoint: dict | None = None) -> PairedFasterRCNN:
    """Rebuild a detector, architecture and weights, from a training checkpoint alone.

    weights: "ema", the averaged ones where the checkpoint has them, or "raw", the trained ones.
    checkpoint: what `read_checkpoint(path)` returned, where it was read before.

    Raises InputError for a file that is no checkpoint of a detector, and for weights that are not finite.
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

    The two differ by their keys. Of a checkpoint the averaged weights are taken where it has them. ADDED_PARTS may be
    absent from either side or of another form; the detector's then stay as they are made, and so do the rows of
    classes that the checkpoint does not know.
    -> what was loaded, for the log. Raises InputError for another architecture.
    """
    source = read_checkpoint(path)
    if "model_kwargs" not in source:
        return str(load_torchvision_weights(detector, source))
    averaged = source.get("ema") is not None
    own, state = dict(detector.state_dict()), dict(source["ema" if averaged else "model"])
    parts, notes = {}, []
    for part in ADDED_PARTS:
        ours, theirs = ({k: tensors.pop(k) for k in [*tensors] if k.startswith(f"{part}.")} for tensors in (own, state))
        fits = {k: tensor.shape for k, tensor in ours.items()} == {k: tensor.shape for k, tensor in theirs.items()}
        parts |= theirs if fits else ours
        if part == "macl" and not fits:  # what another projector made is no key
            parts |= {key: tensor for key, tensor in detector.state_dict().items() if key.startswith("macl.hard.")}
        if not fits:
            notes.append(f"newly made: {part}" if ours else f"left out: {part}")
    before, classes = source["model_kwargs"].get("classes", ["person"]), detector.kwargs["classes"]
    new = [name for name in classes if name not in before]
    for key in own if before != classes else ():
        if key.startswith(("roi_head.cls_score.", "roi_head.bbox_pred.")):
            state[key] = class_rows(state[key], before, own[key], classes)
    gone = [name for name in before if name not in classes]
    for about, names in (("newly made", new), ("left out", gone)):
        notes += [f"{about}: the rows of {', '.join(names)}"] if names else []
    try:
        detector.load_state_dict(state | parts)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} is a checkpoint of another detector: {difference}") from error
    return "; ".join([f"{len(state | parts)} tensors" + ", the averaged ones" * averaged, *notes])
