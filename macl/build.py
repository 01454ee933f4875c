"""Detectors out of plain values, and out of checkpoints."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels import MemoryBank
from macl.backbone import Backbone
from macl.boxes import AnchorGenerator
from macl.contrast import MACLHead
from macl.detector import PairedFasterRCNN
from macl.domain import DomainAlignment, DomainClassifier
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
ADDED_PARTS = ("macl.hard", "alignment")  # what a detector may have beside a checkpoint, or a checkpoint beside it


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

    fpn_levels: pyramid maps from P2 on; up to 4 come from the backbone (with 3 its last stage is left out), the rest
    are subsampled. anchor_sizes: one side length in pixels a level. macl_level "none" leaves the contrastive head
    out. dhn_size: rows of the memory bank of each modality, 0 for no hard negatives. domains: how many data sets the
    training images come from. The other values are described where they are used: `Backbone`, `RPN`, `RoIHead`,
    `MACLHead`, `HardNegatives` (dhn), `DomainAlignment` (mmd, adversary), `PairedFasterRCNN`. Raises ValueError for
    values that do not fit together.
    """
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in locals().items()}
    if not 3 <= fpn_levels <= 6:
        raise ValueError(f"fpn_levels is {fpn_levels}, must be 3 to 6")
    if len(anchor_sizes) < fpn_levels:
        anchor_sizes = (*anchor_sizes, *(anchor_sizes[-1] * 2**i for i in range(1, fpn_levels - len(anchor_sizes) + 1)))
    if macl_level not in MACL_LEVELS:
        raise ValueError(f"macl_level {macl_level!r} is none of {', '.join(MACL_LEVELS)}")
    stages = min(fpn_levels, POOLED_LEVELS)
    body = Backbone(backbone, norm=norm, norm_eps=norm_eps, stages=stages, frozen_stages=frozen_stages)
    neck = FPN(
        in_channels=body.out_channels,
        out_channels=fpn_channels,
        out_levels=fpn_levels,
        msp=MSPReweight(fpn_channels, hidden=msp_hidden) if msp else None,
    )
    anchors = AnchorGenerator(
        sizes=tuple((size,) for size in anchor_sizes[:fpn_levels]), aspect_ratios=tuple(aspect_ratios)
    )
    if macl_level == "none" and (dhn_size or mmd_level == "embedding"):
        wanting = f"dhn_size {dhn_size}" if dhn_size else f"mmd_level {mmd_level!r}"
        raise ValueError(f"{wanting} needs the contrastive head, and macl_level is 'none'")
    macl = None
    if macl_level != "none":
        macl = MACLHead(
            fpn_channels * (macl_roi_size**2 if macl_level == "roi" else 1),
            hidden_dims=tuple(macl_hidden),
            out_dim=macl_dim,
            norm=macl_norm,
            norm_groups=macl_norm_groups,
            dropout=macl_dropout,
            direction=macl_direction,
            temperature=macl_temperature,
            bank_size=dhn_size,
            hard_k=dhn_k,
            hard_mode=dhn_mode,
            hard_momentum=dhn_momentum,
        )
    return PairedFasterRCNN(
        backbone=body,
        neck=neck,
        fusion=Fusion(fusion, channels=fpn_channels),
        rpn=RPN(
            head=RPNHead(fpn_channels, anchors.per_location),
            anchors=anchors,
            pre_nms=tuple(rpn_pre_nms),
            post_nms=tuple(rpn_post_nms),
            samples=rpn_samples,
            positive_fraction=rpn_positive_fraction,
        ),
        roi_head=RoIHead(
            channels=fpn_channels,
            classes=len(classes),
            scales=tuple(0.25 / 2**level for level in range(stages)),
            width=head_width,
            samples=roi_samples,
            positive_fraction=roi_positive_fraction,
            box_loss=box_loss,
            box_beta=box_beta,
            label_smoothing=label_smoothing,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
        ),
        macl=macl,
        macl_level=macl_level,
        macl_roi_size=macl_roi_size,
        alignment=build_alignment(  # after all other parts, whose first weights it then leaves as they are
            mmd_level=mmd_level,
            mmd_sigmas=mmd_sigmas,
            mmd_unbiased=mmd_unbiased,
            adversary=adversary,
            domains=domains,
            pooled_dim=fpn_channels * fpn_levels,
        ),
        modality_dropout=tuple(modality_dropout),
        statistics={"visible": (visible_mean, visible_std), "infrared": (infrared_mean, infrared_std)},
        min_size=min_size,
        max_size=max_size,
        kwargs=kwargs,
    )


def build_alignment(**values) -> DomainAlignment | None:
    """`DomainAlignment`, or None where it would have nothing to do; its values are checked all the same."""
    alignment = DomainAlignment(**values)
    return alignment if alignment.mmd_level != "none" or alignment.classifier is not None else None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of a run or published weights, as `read_state` reads them.

    A checkpoint's keywords build a detector with the very tensors that it holds; this is tried without memory for them,
    so that a damaged file cannot ask for more than its own size. Raises InputError.
    """
    source = read_state(path)
    if "model_kwargs" not in source:
        return source
    _check_keywords(source["model_kwargs"], path)
    states = {key: source.get(key) for key in ("model", "ema")}
    with _building(path), torch.device("meta"):
        own = build_detector(**source["model_kwargs"]).state_dict()
    for key, state in states.items():
        if state is None and key == "ema":
            continue
        if not isinstance(state, dict) or own.keys() != state.keys():
            named = own.keys() ^ (state.keys() if isinstance(state, dict) else set())
            raise InputError(f"the weights in {path} do not fit its own model_kwargs: {shown(min(named, key=str))}")
        for name, tensor in own.items():
            check_like(state[name], tensor, f"{path}, {name}")
    return source


def _check_keywords(kwargs, path: str | Path) -> None:
    """InputError unless these are keywords of `build_detector`, each of the kind of its default."""
    known = build_detector.__kwdefaults__
    if not isinstance(kwargs, dict) or kwargs.keys() - known.keys():
        raise InputError(f"{path} was written by another version of the detector; its keywords are {shown(kwargs)}")
    for name, value in kwargs.items():
        default, place = known[name], f"{path}, model_kwargs: {name}"
        several = isinstance(value, list | tuple)
        if value is None and default is None:
            continue
        if several != isinstance(default, tuple) and default is not None:
            raise InputError(f"{place}: expected {shown(default)} or the like, got {shown(value)}")
        like = default[0] if isinstance(default, tuple) else default
        for item in value if several else [value]:
            if isinstance(like, bool | str):
                if type(item) is not type(like):
                    raise InputError(f"{place}: expected a {type(like).__name__}, got {shown(item)}")
            else:
                number(None if isinstance(item, str) else item, place, 0, 2**20, whole=isinstance(default, int))


@contextlib.contextmanager
def _building(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a detector is built of a file's values is one sentence with its path."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of parts without a single number
            yield
    except InputError:
        raise
    except Exception as error:  # values that do not fit together meet whatever uses them first
        raise InputError(f"{path}: its model_kwargs build no detector: {first_difference(error)}") from error


def load_detector(path: str | Path, *, weights: str = "ema", checkpoint: dict | None = None) -> PairedFasterRCNN:
    """Rebuild a detector, architecture and weights, from a training checkpoint alone.

    weights: "ema" takes the averaged weights where the checkpoint has them, "raw" the trained ones. checkpoint: what
    `read_checkpoint(path)` gave, where it was read before. Raises InputError for a file that is no checkpoint of a
    detector, and for weights that are not finite.
    """
    checkpoint = checkpoint or read_checkpoint(path)
    if "model_kwargs" not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of this project's detector: it has no model_kwargs")
    state = checkpoint["model"] if weights == "raw" or checkpoint.get("ema") is None else checkpoint["ema"]
    with _building(path):
        detector = build_detector(**checkpoint["model_kwargs"])
        detector.load_state_dict(state)
    return detector.eval()


def load_initial_weights(detector: PairedFasterRCNN, path: str | Path) -> str:
    """Start a detector from a training checkpoint, which must fit whole, or from published weights, where they fit.

    They are told apart by their keys; a checkpoint's averaged weights are taken where it has them. Hard negatives and
    the adversary may be new to the checkpoint or left out, and memory banks of another size. -> what was loaded, for
    people. Raises InputError for a checkpoint of another architecture.
    """
    source = read_checkpoint(path)
    if "model_kwargs" not in source:
        return str(load_torchvision_weights(detector, source))
    averaged = source.get("ema") is not None
    state = source["ema"] if averaged else source["model"]
    own = detector.state_dict().keys()
    extra = {key for key in state if key.startswith(ADDED_PARTS) and key not in own}
    state = {key: tensor for key, tensor in state.items() if key not in extra}
    new, notes = new_parts(detector, state)
    notes += [f"left out: {part}" for part in ADDED_PARTS if any(key.startswith(part) for key in extra)]
    try:
        detector.load_state_dict(state | new)
    except RuntimeError as error:
        raise InputError(f"{path} is a checkpoint of another detector: {first_difference(error)}") from error
    loaded = f"all {len(state.keys() - new.keys())} tensors loaded" + (", the averaged ones" if averaged else "")
    return "; ".join([loaded, *notes])


def new_parts(detector: PairedFasterRCNN, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors that the detector needs beside a checkpoint's, or in place of them, and what is to say about each part.

    Memory banks that the checkpoint lacks, or has with another number of rows, start empty; a key projector it lacks
    starts as its projector; a domain classifier it lacks as initialised.
    """
    new, notes = {}, []
    for name, module in detector.named_modules():
        own = {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        if isinstance(module, MemoryBank):
            rows, found = len(module.buffer), state.get(f"{name}.buffer")
            if found is None:
                new |= own
                notes.append(f"newly made: {name}, empty, {rows} rows")
            elif len(found) != rows:
                new |= own
                notes.append(f"{name} starts empty: {rows} rows where the checkpoint has {len(found)}")
        elif name == "macl.hard.key_projector" and not own.keys() & state.keys():
            new |= {key: state[source] for key in own if (source := key.replace("hard.key_", "")) in state}
            notes.append(f"newly made: {name}, a copy of macl.projector")
        elif isinstance(module, DomainClassifier) and not own.keys() & state.keys():
            new |= own
            notes.append(f"newly made: {name}")
    return new, notes


def first_difference(error: Exception) -> str:
    """The first of the differences that `load_state_dict` lists over many lines."""
    lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
