"""Stage 1: train the paired visible + infrared detector, on pairs of your own or on scenes that it draws itself.

    python train_stage1.py --batch-size 4                                   # drawn scenes, minutes on two CPU cores
    python train_stage1.py --data-root LLVIP --init-from fasterrcnn_resnet50_fpn_coco.pth
    torchrun --nproc-per-node 4 train_stage1.py --data-root LLVIP --init-from WEIGHTS --amp bf16
    python train_stage1.py --resume auto                                    # go on after Ctrl-C
    python train_stage1.py --data-root ROOT --check                         # look before a long run, docs/data.md

Without --data-root the defaults are those of the drawn scenes: small images and a small network. With it, or with
--init-from a checkpoint, they are others; add --help to see the defaults of just that command.
"""

import trainkit.process_setup  # noqa: F401, I001  before torch

import argparse
import functools
import math

import torch

import macl
from macl import training
from macl.backbone import BACKBONES, NORMS
from macl.build import MACL_LEVELS, MERGES, load_initial_weights, read_checkpoint
from macl.contrast import DIRECTIONS, PROJECTOR_NORMS
from macl.data import SyntheticPairs, refuse_absent_classes, to_float
from macl.fusion import FUSIONS
from macl.evaluation import validation_text
from macl.plots import draw_validation
from macl.teacher import KeyEncoder
from macl.weights import has_old_names
from trainkit import distributed
from trainkit.arguments import (
    add_recipe_flags,
    float_list,
    fraction,
    int_list,
    make_parser,
    non_negative_float,
    parse_with_resume,
    peek_flags,
    positive_float,
    positive_int,
)
from trainkit.errors import InputError, one_sentence
from trainkit.optimizer import build_optimisation, ema
from trainkit.run import Run
from trainkit.sampler import ResumableSampler
from trainkit.step import TrainStep

SCRIPT = "stage1"

# The recipe for LLVIP: the defaults of the flags, and what differs for the drawn scenes.
LLVIP_RECIPE = dict(
    epochs=12, batch_size=4, optimizer="sgd", lr=0.005, lr_base_batch=4, weight_decay=1e-4,
    schedule="multistep", milestones=[8, 11], warmup_steps=500, clip_norm=10.0, ema_decay=0.999,
    min_size=[480, 544, 512], max_size=704,
)  # fmt: skip
SYNTHETIC_RECIPE = dict(
    epochs=3, workers=1, optimizer="adamw", lr=1e-3, lr_base_batch=None, weight_decay=1e-4, schedule="cosine",
    warmup_steps=50, ema_decay=0.99, statistics="measured", backbone="resnet18", norm="group", fpn_channels=64,
    fpn_levels=3, anchor_sizes=[12, 24, 48], aspect_ratios=[2.0, 3.0], min_size=None, max_size=None,
    rpn_pre_nms=[300, 150], rpn_post_nms=[150, 75], head_width=256, roi_samples=64, modality_dropout=[0.2, 0.2],
    macl_roi_size=7, macl_temperature=0.2,
)  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the data set, the checkpoint or the resumed run that they name."""
    parser = make_parser(__doc__)
    add_recipe_flags(parser, SCRIPT)
    add_data_flags(parser)
    add_model_flags(parser)
    training.add_flags(parser)
    given = peek_flags(arguments, "--data-root", "--labels", "--init-from")
    defaults = LLVIP_RECIPE | (SYNTHETIC_RECIPE if given.data_root is given.labels is None else {})
    if given.init_from is not None:
        source = read_checkpoint(given.init_from)
        if "model_kwargs" in source:
            defaults |= source["model_kwargs"] | dict(statistics="given")
            if given.data_root or given.labels:
                defaults.pop("classes", None)  # those that occur
        else:
            defaults |= dict(norm="frozen_batch", frozen_stages=1, statistics="imagenet")
            defaults |= dict(norm_eps=0.0 if has_old_names(source) else 1e-5)
    return parse_with_resume(parser, arguments, SCRIPT, defaults)


# fmt: off
def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which pairs, and validation on them").add_argument
    training.add_pair_flags(add)
    training.add_split_flags(add)
    add("--synthetic-train", type=positive_int, default=1000, metavar="N", help="drawn training pairs")
    add("--synthetic-val", type=positive_int, default=200, metavar="N", help="drawn validation pairs")
    add("--statistics", choices=("imagenet", "measured", "given"), default="imagenet",
        help="mean and std of each modality: ImageNet's, measured on 64 training pairs, or the checkpoint's")
    add("--best-by", choices=("ap50", "ap", "r1"), default="ap50", help="metric of validation that chooses best.pt")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag here is the keyword of `macl.build_detector` of the same name."""
    add = parser.add_argument_group("detector").add_argument
    add("--classes", nargs="+", metavar="NAME", help="what to detect (default: all that occur; drawn: person)")
    add("--backbone", choices=tuple(BACKBONES), default="resnet50", help="depth of the ResNet")
    add("--norm", choices=NORMS, default="group", help="norm layers; frozen_batch with published weights")
    add("--norm-eps", type=non_negative_float, default=1e-5, metavar="X", help="0 with torchvision's COCO file of 2019")
    add("--frozen-stages", type=int, choices=range(5), default=0, help="stages never trained, the stem with the first")
    add("--fpn-channels", type=positive_int, default=256, metavar="N", help="width of neck and RPN")
    add("--fpn-levels", type=int, choices=(3, 4, 5, 6), default=5, help="pyramid maps, from P2 on")
    add("--msp", action=argparse.BooleanOptionalAction, default=False, help="multi-scale pyramid reweighting")
    add("--msp-hidden", type=positive_int, metavar="N", help="hidden width of MSP's attention")
    add("--fusion", choices=FUSIONS, default="mean", help="how two pyramids become one")
    add("--merge", choices=MERGES, default="logit", help="logit: boxes of both cameras and of each alone are merged")
    add("--modality-dropout", type=fraction, nargs=2, default=[0.1, 0.1], metavar=("VISIBLE", "INFRARED"),
        help="probability that a modality of a training image is masked")
    add("--min-size", type=int_list, metavar="PIXELS",
        help="short side; of several a random one per training batch, the last in evaluation")
    add("--max-size", type=positive_int, metavar="PIXELS", help="longest side after resizing")
    add("--anchor-sizes", type=int_list, default="32,64,128,256,512", metavar="PIXELS", help="one per pyramid map")
    add("--aspect-ratios", type=float_list, default="0.5,1,2", metavar="X,X", help="height / width of the anchors")
    add = parser.add_argument_group("region proposals: of two numbers the second is for evaluation").add_argument
    add("--rpn-pre-nms", type=positive_int, nargs=2, default=[2000, 1000], metavar="N", help="per map before NMS")
    add("--rpn-post-nms", type=positive_int, nargs=2, default=[2000, 1000], metavar="N", help="per image after NMS")
    add("--rpn-samples", type=positive_int, default=256, metavar="N", help="anchors per image in the loss")
    add("--rpn-positive-fraction", type=fraction, default=0.5, metavar="X", help="largest share of positives")
    add = parser.add_argument_group("detection head").add_argument
    add("--head-width", type=positive_int, default=1024, metavar="N", help="width of its two hidden layers")
    add("--roi-samples", type=positive_int, default=512, metavar="N", help="proposals per image in the loss")
    add("--roi-positive-fraction", type=fraction, default=0.25, metavar="X", help="largest share of positives")
    add("--box-loss", choices=("smooth_l1", "l1", "giou"), default="smooth_l1", help="loss of the refined boxes")
    add("--box-beta", type=positive_float, default=1 / 9, metavar="X", help="beta of smooth_l1")
    add("--label-smoothing", type=fraction, default=0.0, metavar="X", help="in the loss of the classes")
    add = parser.add_argument_group("contrast between the modalities (MACL)").add_argument
    add("--macl-level", choices=MACL_LEVELS, default="roi",
        help="what is embedded: each box as the maps have it, cut out of its surroundings, each image, or nothing")
    add("--macl-hidden", type=int_list, default="256", metavar="N,N", help="hidden widths of the projector")
    add("--macl-dim", type=positive_int, default=128, metavar="N", help="size of the embedding")
    add("--macl-norm", choices=PROJECTOR_NORMS, default="layer", help="norm of the projector")
    add("--macl-norm-groups", type=positive_int, default=32, metavar="N", help="groups of norm group")
    add("--macl-dropout", type=fraction, default=0.0, metavar="P", help="dropout of the projector")
    add("--macl-direction", choices=DIRECTIONS, default="both", help="queries of both modalities, or of one")
    add("--macl-temperature", type=positive_float, default=0.07, metavar="X", help="initial, 0.01 to 1; learned")
    add("--macl-roi-size", type=positive_int, default=4, metavar="N", help="boxes are pooled to N x N")
# fmt: on


def open_data(args: argparse.Namespace):
    """Training and validation data, how they are read and registered, and sentences about them."""
    if training.has_pairs(args):
        train, validation, sentence = training.open_training(args, args.split, args.val_split, args.classes)
        reading, about = training.choose_reading(args, train)
        train, validation = training.read_as(reading, train, validation)
        messages, splits = [f"training on {train.source}", sentence, *about], [args.split, args.val_split]
    else:
        classes, reading, splits = dict(classes=args.classes or ["person"]), None, None
        train = SyntheticPairs(args.synthetic_train, args.seed, **classes)
        validation = SyntheticPairs(args.synthetic_val, training.VALIDATION_SEED + args.seed, **classes)
        messages = [f"training on {train.source} (no --data-root was given)", f"validating on {validation.source}"]
    refuse_absent_classes(train, every=args.classes is not None)
    refuse_absent_classes(validation, every=False)
    move, registered, about = training.choose_move(args, train)
    kept = {"register": registered, "reading": reading, "splits": splits}
    return train.moved(move), validation.moved(move), kept, messages + about


def measure_statistics(dataset, count: int = 64) -> dict[str, list[float]]:
    """Mean and std of each modality over evenly spaced pairs, as the detector's keywords."""
    samples = [dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // count))]
    statistics = {}
    for modality in dataset.modalities:
        pixels = torch.cat([to_float(sample[modality]).flatten(1) for sample in samples], dim=1)
        statistics |= {f"{modality}_mean": pixels.mean(1).tolist(), f"{modality}_std": pixels.std(1).tolist()}
    return statistics


def build_model(args: argparse.Namespace, train_data) -> tuple[macl.PairedFasterRCNN, list[str]]:
    """The detector, with the weights of --init-from, and what there is to say about it."""
    names = [name for name in macl.build_detector.__kwdefaults__ if hasattr(args, name)]
    kwargs = {name: getattr(args, name) for name in names} | {"classes": list(train_data.classes)}
    alone = train_data.modalities if len(train_data.modalities) == 1 else ()
    if args.macl_weight == 0 or alone:  # one camera has nothing to be contrasted with
        kwargs["macl_level"] = "none"
    if args.statistics == "measured":
        kwargs |= measure_statistics(train_data)
    elif args.statistics == "imagenet":  # which are the detector's own defaults
        kwargs = {name: value for name, value in kwargs.items() if not name.endswith(("_mean", "_std"))}
    try:
        detector = macl.build_detector(**kwargs)
    except (TypeError, ValueError) as error:  # TypeError: what a damaged args.json says beside the flags
        raise InputError(f"the detector's flags do not fit together: {error}") from error
    training.check_cameras(detector, train_data)
    count = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    messages = [
        f"{args.backbone}, {args.norm} norm, {args.fpn_levels} levels of {args.fpn_channels} channels, "
        f"fusion {args.fusion}: {count / 1e6:.1f} M trainable parameters"
    ]
    if alone:
        messages.append(f"{alone[0]} images alone, without MACL")
    if args.init_from is not None:
        messages.append(f"weights of {args.init_from}: {load_initial_weights(detector, args.init_from)}")
    elif training.has_pairs(args) and not args.resume:
        messages.append("training from random weights; --init-from takes torchvision's COCO or ImageNet files")
    return detector, messages


def validate_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other."""
    training.check_flags(args)
    world = distributed.world_size()
    if args.macl_weight and args.macl_level == "image" and args.batch_size * world == 1:
        raise InputError(
            "--macl-level image with one image a step never has a negative: raise --batch-size, or use --macl-level roi"
        )
    if args.statistics == "given" and not hasattr(args, "visible_mean"):
        raise InputError("--statistics given takes them from a checkpoint of a run: name one with --init-from")
    if args.norm == "sync_batch" and world > 1 and args.device == "cpu":
        raise InputError("--norm sync_batch over several processes needs --device cuda")
    if args.best_by == "r1" and (args.macl_weight == 0 or args.macl_level == "none"):
        raise InputError("--best-by r1 needs the contrastive head: --macl-weight above 0 and --macl-level roi or image")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = distributed.start(args.device)
    validate_args(args)
    train_data, val_data, kept, messages = open_data(args)
    torch.manual_seed(args.seed)
    detector, about_model = build_model(args, train_data)
    messages += about_model
    detector = detector.to(device)
    if args.compile:
        detector.backbone.compile()
        detector.neck.compile()
    average = ema(detector, args.ema_decay) if args.ema_decay else None
    keys = KeyEncoder(detector) if args.dhn_size else None
    cameras = train_data.modalities
    forward = functools.partial(training.forward_losses, teachers=[] if keys is None else [keys], cameras=cameras)
    weights = training.detection_weights(args, detector)
    training.freeze_unreached(detector, weights, cameras)

    sampler = ResumableSampler(len(train_data), args.batch_size, seed=args.seed)
    loader = training.augmented_loader(args, train_data, sampler, device)
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / args.accumulate)
    optimizer, schedule = build_optimisation(args, detector, steps_per_epoch)
    train_step = TrainStep(
        distributed.parallel(detector), optimizer, forward=forward, weights=weights,
        describe=lambda batch: batch["path"], device=device, schedule=schedule, average=average, amp=args.amp,
        clip_norm=args.clip_norm,
    )  # fmt: skip
    torch.manual_seed(args.seed * 1000 + distributed.rank())  # each process samples its own RoIs
    if args.check:
        training.check(messages, {"training": train_data, "validation": val_data}, train_step, loader, detector)
        return

    run = Run(
        args, SCRIPT, train_step, sampler, total_steps=args.epochs * steps_per_epoch,
        constants={"model_kwargs": detector.kwargs} | kept, values={"untrained": None},
        parts={} if keys is None else {"keys": keys},
        validate_first=detector.macl is not None,
    )  # fmt: skip
    run.say(*messages)
    with run:
        for epoch in run.epochs():
            for batches in run.batches(loader):
                result = train_step(batches)
                if keys is not None and not result.skipped:
                    keys.update(detector)
                run.log_step(result, images=sum(len(batch["path"]) for batch in batches) * distributed.world_size())
            if not run.validation_due():
                continue
            if epoch == 0:  # R@1 of the untrained head, for comparison
                metrics, _ = training.validate(detector, val_data, args, device, run.leave_if_asked, modes={})
                r1 = run.values["untrained"] = metrics["alignment"]["r1"]
                run.log_validation(metrics, "" if r1 is None else f"cross-modal retrieval R@1 {r1:.3f}")
                continue
            model = detector if average is None else average.module
            metrics, results = training.validate(model, val_data, args, device, run.leave_if_asked)
            run.log_validation(metrics, validation_text(metrics, run.values["untrained"]))
            if distributed.is_main():
                draw_validation(run.folder, epoch, val_data, results)
            run.keep_best(training.best_metric(metrics, args.best_by), args.best_by)


if __name__ == "__main__":
    with one_sentence():
        main()
