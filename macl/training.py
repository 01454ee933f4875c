"""What stages 1 and 2 share: flags, loss weights, loader, validation, --check; and --register, of all commands."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from macl.backbone import MODALITIES, ModalityBatchNorm2d
from macl.data import AugmentedDataset, Onto, PairedAugmentation, PairedDataset, Pairs, collate, hold_out
from macl.data.folders import open_root
from macl.data.layouts import ALL
from macl.data.onto import read_onto
from macl.data.sample import BOXES
from macl.detector import PairedFasterRCNN
from macl.evaluation import alignment_metrics, detection_metrics, predict
from macl.registration import MOST, correction, rig_shift
from trainkit.arguments import fraction, non_negative_float, non_negative_int, positive_int
from trainkit.device import to_device
from trainkit.errors import InputError
from trainkit.files import deep_values, numbers, shown
from trainkit.loader import make_loader
from trainkit.sampler import ResumableSampler
from trainkit.step import TrainStep, print_step

READING = ("infrared_to_visible", "infrared_range", "boxes")  # flags that a checkpoint keeps
LEVELS = (0.1, 99.9)  # percentiles of infrared's values that become black and white
AGREEING = 0.5  # least share of the pairs that makes a rig
VALIDATION_SEED = 10_000  # of the drawn validation scenes, plus --seed: never a training scene


# fmt: off
def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of both stages. Those of the augmentation are named like the fields of `PairedAugmentation`."""
    add = parser.add_argument_group("augmentation: geometry is the same for both images").add_argument
    add("--flip", type=fraction, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--crop", type=fraction, default=0.0, metavar="P", help="probability of a crop")
    add("--crop-scale", type=fraction, nargs=2, default=[0.6, 1.0], metavar=("LOW", "HIGH"), help="sides of a crop")
    add("--brightness", type=fraction, default=0.2, metavar="X", help="jitter of visible")
    add("--contrast", type=fraction, default=0.2, metavar="X", help="jitter of visible")
    add("--saturation", type=fraction, default=0.2, metavar="X", help="jitter of visible")
    add("--hue", type=fraction, default=0.0, metavar="X", help="jitter of visible, at most 0.5")
    add("--gain", type=fraction, default=0.2, metavar="X", help="infrared times 1 +- X")
    add("--offset", type=fraction, default=0.05, metavar="X", help="infrared plus +- X, of 0..1")
    add("--noise", type=fraction, default=0.02, metavar="X", help="largest standard deviation of noise on infrared")
    add("--decode-at", type=non_negative_int, default=0, metavar="PX",
        help="decode training's JPEGs at 1/2, 1/4 or 1/8 while the short side has so many pixels; 0: whole")
    add_registration_flags(parser.add_argument_group("registration").add_argument)
    add = parser.add_argument_group("hard negatives of MACL (DHN), with keys of the averaged detector").add_argument
    add("--dhn-size", type=non_negative_int, default=0, metavar="N", help="bank rows per modality; 0 for none")
    add("--dhn-k", type=positive_int, default=8, metavar="N", help="hardest rows per query")
    add = parser.add_argument_group("loss weights").add_argument
    add("--rpn-weight", type=non_negative_float, default=1.0, metavar="X", help="both losses of the RPN")
    add("--class-weight", type=non_negative_float, default=1.0, metavar="X", help="classification")
    add("--box-weight", type=non_negative_float, default=1.0, metavar="X", help="box regression")
    add("--macl-weight", type=non_negative_float, default=0.1, metavar="X", help="contrast, MACL; 0 for none")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone and the neck")


def add_reading_flags(add: Callable) -> None:
    """How images are paired and read: the flags of READING but for --boxes. add: the `add_argument` of a group."""
    add("--suffixes", nargs=2, metavar=("VISIBLE", "INFRARED"), help="what ends the names of images in one folder")
    add("--infrared-to-visible", metavar="none|resize|FILE",
        help="how infrared becomes as large as visible: resized, or by the 3 x 3 homography in a .json or .npy file")
    add("--infrared-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="values of more than 8 bits that become black and white (default: percentiles of the training pairs)")


def add_registration_flags(add: Callable) -> None:
    """add: the `add_argument` of a group."""
    add("--register", choices=("none", "rig", "each"), default="none",
        help="move infrared onto visible: by one shift for all pairs (rig), or by one for each")
    add("--register-most", type=non_negative_int, nargs=2, default=MOST, metavar=("X", "Y"), help="pixels at most")
# fmt: on


# fmt: off
def add_pair_flags(add: Callable) -> None:
    """The flags that name pairs beside --data-root. add: the `add_argument` of a group."""
    add("--visible", metavar="DIR", help="instead of --data-root: the visible images, ...")
    add("--infrared", metavar="DIR", help="... the infrared images of the same names (one of both for one camera), ...")
    add("--labels", metavar="PATH", help="... and their labels: a folder of .txt or .xml files, or a COCO json")
    add("--labels-infrared", metavar="PATH", help="labels of infrared, where --labels are those of visible alone")
    add("--label-form", choices=("voc", "yolo", "coco"), help="VOC's .xml, YOLO's .txt, COCO's json (default: what is "
        "there)")
    add("--boxes", choices=BOXES, help="what is detected where each camera has boxes of its own (default: visible)")
    add_reading_flags(add)


def add_split_flags(add: Callable) -> None:
    add("--split", metavar="NAME|FILE", help="training pairs: a split, or a list of names (default: train, or all)")
    add("--val-split", metavar="NAME|FILE", help="validation pairs, held-out for a part of training's (default: val, "
        "or held-out)")
# fmt: on


def has_pairs(args: argparse.Namespace) -> bool:
    """Whether pairs are named, rather than drawn. Raises InputError where they are named in part or twice."""
    images, labels = args.visible or args.infrared, args.labels
    if (images or labels) and (args.data_root is not None or None in (images, labels)):
        raise InputError("expected --data-root ROOT, or --labels PATH with --visible DIR, --infrared DIR or both")
    for name in (*READING, "labels_infrared", "suffixes", "label_form", "split", "val_split", "decode_at"):
        if getattr(args, name, None) not in (None, 0) and args.data_root is None and not labels:
            raise InputError(f"--{name.replace('_', '-')} needs --data-root, or --visible, --infrared and --labels")
    return args.data_root is not None or labels is not None


def open_pairs(args: argparse.Namespace, *splits: str, classes: Sequence[str] | None) -> Pairs | None:
    """The first of the splits that the named pairs have, see `open_root`; None without any. classes: None for all."""
    options = {"form": args.label_form, "suffixes": args.suffixes, "labels_infrared": args.labels_infrared}
    options = {name: value for name, value in options.items() if value is not None} | {"classes": classes}
    if args.data_root is not None:
        return open_root(args.data_root, *splits, **options)
    split = next((split for split in splits if split == ALL or Path(split).is_file()), None)
    named = {} if split == ALL else dict(listed=Path(split or ""), split=Path(split or "").stem)
    return split and Pairs(args.visible, args.infrared, args.labels, **options | named)


def choose_reading(
    args: argparse.Namespace, dataset: PairedDataset | None, trained: Mapping | None = None
) -> tuple[dict, list[str]]:
    """READING by name as plain values: as the flags say, or the detector was trained; and sentences about it.

    trained: what a checkpoint holds of it. Where nothing tells a range, it is between percentiles of the data's values.
    """
    trained, reading, messages = trained if isinstance(trained, Mapping) else {}, {}, []
    for name in READING:
        given, kept, flag = getattr(args, name), trained.get(name), f"--{name.replace('_', '-')}"
        reading[name] = kept if given is None else given
        if name == "infrared_to_visible" and given is not None:
            onto = read_onto(given)
            reading[name] = "resize" if onto.resize else None if onto.homography is None else onto.homography.tolist()
        if trained and reading[name] != kept:
            messages.append(
                f"Warning: the detector was trained with {flag} {shown(kept)}, this is {shown(reading[name])}"
            )
        elif kept is not None:
            messages.append(f"as in training: {flag} {shown(kept)}")
    if dataset is None:
        return reading, messages
    if dataset.resize and args.infrared_to_visible is None and reading["infrared_to_visible"] is None:
        reading["infrared_to_visible"] = "resize"
        messages.append("--infrared-to-visible resize: the cameras of this layout differ in size")
    if not dataset.own_boxes and args.boxes in ("infrared", "both"):
        raise InputError(f"--boxes {args.boxes}: both cameras share the boxes of {dataset.source}")
    paths = [pair.infrared for pair in dataset.pairs[:: max(1, len(dataset) // 64)] if pair.infrared is not None]
    if reading["infrared_range"] is None and paths and deep_values(paths[0]) is not None:
        values = [values[::4, ::4].ravel() for values in map(deep_values, paths) if values is not None]
        low, high = np.percentile(np.concatenate(values), LEVELS).tolist()
        reading["infrared_range"] = low, high = [low, max(high, low + 1e-3)]
        messages.append(
            f"--infrared-range {low:g} {high:g}: percentiles {LEVELS[0]} and {LEVELS[1]} of {len(paths)} images"
        )
    return reading, messages


def onto_of(reading: Mapping) -> Onto:
    """What `choose_reading` says of infrared. Raises InputError for what no flag could say, out of a checkpoint."""
    levels = reading["infrared_range"]
    if reading["boxes"] not in (None, *BOXES):
        raise InputError(f"the checkpoint's boxes are {shown(reading['boxes'])}; expected {', '.join(BOXES)}")
    return read_onto(reading["infrared_to_visible"], levels and numbers(levels, "the checkpoint's infrared_range", 2))


def read_as(reading: Mapping, *datasets: PairedDataset) -> list[PairedDataset]:
    """The data sets, read as `choose_reading` says."""
    onto = onto_of(reading)  # one, whose grids are kept
    return [dataset.with_onto(onto, reading["boxes"]) for dataset in datasets]


def check_cameras(detector: PairedFasterRCNN, *datasets: PairedDataset) -> None:
    """Raises InputError where the detector cannot work with the only camera of a data set."""
    for alone in (dataset.modalities[0] for dataset in datasets if len(dataset.modalities) == 1):
        if detector.fusion.kind not in ("mean", alone) or (detector.macl and detector.macl_level == "image"):
            raise InputError(f"the data are {alone} images alone, and the detector needs those of the other camera")


def open_training(args: argparse.Namespace, split: str | None, held: str | None, classes: Sequence[str] | None):
    """Training pairs, validation pairs, and a sentence about the latter.

    split: None for the first of train, all, val, test
    held: the split to validate on, "held-out" for a part of the training pairs; None: val, or a part where it is absent
    """
    train = open_pairs(args, *([split] if split else ["train", ALL, "val", "test"]), classes=classes)
    if train is None:
        raise InputError(f"--split {split}: the data have none; expected train, val, test, all, or a list of names")
    validation = None if held == "held-out" else open_pairs(args, held or "val", classes=train.classes)
    if validation is None and held not in (None, "held-out"):
        raise InputError(f"--val-split {held}: the data have none; expected val, test, held-out, or a list of names")
    if validation is not None and [pair[:2] for pair in validation.pairs] == [pair[:2] for pair in train.pairs]:
        validation = None
    test = open_pairs(args, "test", classes=train.classes) if train.split == ALL else None
    known = {pair[:2] for other in (validation, test) if other is not None for pair in other.pairs}
    kept = [index for index, pair in enumerate(train.pairs) if pair[:2] not in known]
    train = train if len(kept) == len(train) else train.subset(kept, "in no other split")
    if validation is None:
        return hold_out(train)
    return train, validation, f"validating on {validation.source}"


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for values of `add_flags` that are outside their range or cannot work together."""
    if args.hue > 0.5:
        raise InputError(f"--hue {args.hue}: expected at most 0.5, half of the colour circle")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise InputError(f"--crop-scale {args.crop_scale}: expected two numbers above 0, the smaller one first")
    if args.max_size is not None and args.min_size is None:
        raise InputError(f"--max-size {args.max_size} is the most that resizing to --min-size may give: give both")
    if args.dhn_size and args.macl_weight == 0:
        raise InputError("--dhn-size: hard negatives are negatives of MACL; raise --macl-weight, or give --dhn-size 0")


def choose_move(
    args: argparse.Namespace, dataset, trained: str | None = None, *, read: Callable = dict
) -> tuple[tuple[int, int] | Callable, str, list[str]]:
    """The move of infrared that --register asks for, see `macl.data.moved`; its name, and sentences about it.

    dataset, read: see `rig_shift`
    trained: the name of the move that the detector was trained with, if any

    Raises InputError where a rig is asked for and the pairs do not agree on a shift.
    """
    move, name, messages, most = (0, 0), args.register, [], tuple(args.register_most)
    if name != "none" and len(getattr(dataset, "modalities", "ab")) < 2:
        raise InputError(f"--register {name} needs images of both cameras")
    if args.register == "each":
        move = functools.partial(correction, most=most)
        messages.append("infrared is registered pair by pair")
    elif args.register == "rig":
        (x, y), share = rig_shift(dataset, most=most, read=read)
        found = f"the shift ({x}, {y}), in pixels to the right and down, holds for {share:.0%} of the pairs"
        if share < AGREEING:
            raise InputError(f"--register rig: {found}, so the cameras are no rig; each may do")
        move, name = (-x, -y), f"rig {x} {y}"
        messages.append(f"infrared is registered: {found}, and is undone")
    if trained not in (None, name):
        messages.append(f"Warning: the detector was trained with --register {shown(trained)}, this is {name}")
    return move, name, messages


def detection_weights(args: argparse.Namespace, detector: PairedFasterRCNN) -> dict[str, float]:
    """The weights of the losses of detection and of MACL, which `TrainStep` applies."""
    weights = {
        "loss_objectness": args.rpn_weight,
        "loss_rpn_box_reg": args.rpn_weight,
        "loss_classifier": args.class_weight,
        "loss_box_reg": args.box_weight,
    }
    if detector.macl is not None:
        weights["loss_macl"] = args.macl_weight
    return weights


def freeze_unreached(
    detector: PairedFasterRCNN, weights: dict[str, float], cameras: Sequence[str] = MODALITIES
) -> None:  # fmt: skip
    """Freeze what no loss of a weight above 0 reaches; DistributedDataParallel waits for the gradient of all else."""
    for norm in (one for one in detector.modules() if isinstance(one, ModalityBatchNorm2d)):
        for camera in set(MODALITIES) - set(cameras):
            getattr(norm, camera).requires_grad_(False)
    enabled = {name for name, weight in weights.items() if weight}
    proposing, detecting = {"loss_objectness", "loss_rpn_box_reg"}, {"loss_classifier", "loss_box_reg"}
    all_maps = proposing | detecting | ({"loss_macl"} if detector.macl_level != "crop" else set())  # of crops P3 alone
    inner, outer = detector.neck.inner, detector.neck.outer
    for part, losses in (
        *((part, all_maps) for part in (inner[0], outer[0], *outer[2:])),
        (detector.rpn, proposing),
        (detector.roi_head, detecting),
        (detector.roi_head.cls_score, {"loss_classifier"}),
        (detector.roi_head.bbox_pred, {"loss_box_reg"}),
        (detector.macl, {"loss_macl"}),
    ):
        if part is not None and not losses & enabled:
            part.requires_grad_(False)


def augmented_loader(args: argparse.Namespace, data, sampler: ResumableSampler, device: torch.device):
    """Batches of `data`, augmented as the flags say, in the sampler's order."""
    names = [field.name for field in dataclasses.fields(PairedAugmentation)]
    augmentation = PairedAugmentation(**{name: getattr(args, name) for name in names})
    if args.decode_at:
        data = data.decoded_at(args.decode_at)
    dataset = AugmentedDataset(data, augmentation, seed=args.seed)
    return make_loader(dataset, sampler, collate, workers=args.workers, device=device)


def forward_losses(
    model: torch.nn.Module, batch: dict, teachers: Sequence[Callable] = (), cameras: Sequence[str] = MODALITIES
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The unweighted losses of a collated batch, and the metrics to log.

    model: the detector, wrapped in DDP or not
    teachers: fill in the targets, one after the other, see `macl.teacher`
    cameras: whose images the detector gets
    """
    device = next(model.parameters()).device
    inputs = to_device({name: batch[name] for name in (*cameras, "targets")}, device)
    for teacher in teachers:
        inputs["targets"] = teacher(**inputs)
    return model(**inputs, with_metrics=True)


def validate(
    detector: PairedFasterRCNN, data, args: argparse.Namespace, device: torch.device, between: Callable[[], None],
    modes: Mapping | None = None,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Metrics by mode and, under "alignment", of the embeddings; and the results of `predict` they come from.

    between, modes: see `predict`; modes None: all of the detector's.
    """
    modes = detector.modes if modes is None else modes
    options = {name: getattr(args, name) for name in ("batch_size", "workers", "amp")}
    results = predict(detector, data, modes=modes, device=device, between=between, **options)
    return {**detection_metrics(results), "alignment": alignment_metrics(results)}, results


def best_metric(metrics: dict, by: str) -> tuple[float, float]:
    """The metric `by` ("ap50", "ap" or "r1") of the first mode, and its AP50:95, which breaks ties; -inf if unknown."""
    first = next(iter(metrics.values()))
    values = (metrics["alignment"] or {}).get("r1") if by == "r1" else first[by], first["ap"]
    return tuple(-float("inf") if value is None else value for value in values)


def check(messages: list[str], data: dict, train_step: TrainStep, loader, detector: PairedFasterRCNN) -> None:
    """--check: what the data holds, one step, and whether a gradient reaches every part."""
    print("\n".join(messages))
    for name, pairs in data.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in pairs.statistics().items()))
    print_step(train_step, [next(iter(loader))], detector)
