"""Stage 1: train the paired visible + infrared detector, on LLVIP or on scenes that it draws itself.

    python train_stage1.py --batch-size 4                                   # drawn scenes, minutes on two CPU cores
    python train_stage1.py --data-root LLVIP --init-from fasterrcnn_resnet50_fpn_coco.pth
    torchrun --nproc-per-node 4 train_stage1.py --data-root LLVIP --init-from WEIGHTS --amp bf16
    python train_stage1.py --resume auto                                    # go on after Ctrl-C
    python train_stage1.py --data-root LLVIP --check                        # look before a long run

Without --data-root the defaults are those of the drawn scenes: small images and a small network. With it, or with
--init-from a checkpoint, they are others; add --help to see the defaults of just that command.
"""

import trainkit.process_setup  # noqa: F401, I001  before torch

import argparse
import math
from collections.abc import Callable

import torch

import macl
from macl.backbone import BACKBONES, NORMS
from macl.build import IMAGENET_MEAN, IMAGENET_STD, MACL_LEVELS, load_initial_weights, read_checkpoint
from macl.contrast import DIRECTIONS, PROJECTOR_NORMS
from macl.data import (
    LLVIP,
    AugmentedDataset,
    PairedAugmentation,
    SyntheticPairs,
    collate,
    hold_out,
    refuse_absent_classes,
    to_float,
)
from macl.evaluation import alignment_metrics, detection_metrics, predict, validation_text
from macl.fusion import FUSIONS
from macl.plots import draw_validation
from macl.weights import has_old_names
from trainkit import checkpoint, distributed
from trainkit.arguments import (
    add_recipe_flags,
    float_list,
    fraction,
    int_list,
    make_parser,
    peek_flags,
    non_negative_float,
    positive_float,
    positive_int,
    prepare_run,
)
from trainkit.errors import InputError, one_sentence
from trainkit.files import number
from trainkit.device import to_device
from trainkit.loader import make_loader
from trainkit.log import RunLog, Throughput, peak_memory
from trainkit.loop import run_epochs
from trainkit.optimizer import build_optimisation, ema
from trainkit.sampler import ResumableSampler
from trainkit.state import TrainingState, best_of, restoring
from trainkit.step import TrainStep, module_gradient_norms

SCRIPT = "stage1"
VALIDATION_SEED = 10_000  # of the drawn validation scenes, plus --seed: never a training scene
STAGE_2_ADDS = ("dhn_", "mmd_", "adversary", "domains")  # to the keywords of a detector

# The recipe for LLVIP: the defaults of the flags, and what differs for the drawn scenes.
LLVIP_RECIPE = dict(
    epochs=12, batch_size=4, workers=4, optimizer="sgd", lr=0.005, lr_base_batch=4, weight_decay=1e-4,
    schedule="multistep", milestones=[8, 11], warmup_steps=500, clip_norm=10.0, ema_decay=0.999,
)  # fmt: skip
SYNTHETIC_RECIPE = dict(
    epochs=3, workers=1, optimizer="adamw", lr=1e-3, lr_base_batch=None, weight_decay=1e-4, schedule="cosine",
    warmup_steps=50, ema_decay=0.99, statistics="measured", backbone="resnet18", norm="group", fpn_channels=64,
    fpn_levels=3, anchor_sizes=[12, 24, 48], aspect_ratios=[2.0, 3.0], min_size=None, max_size=None,
    rpn_pre_nms=[300, 150], rpn_post_nms=[150, 75], head_width=256, roi_samples=64, modality_dropout=[0.2, 0.2],
    macl_weight=1.0, macl_roi_size=7, macl_temperature=0.2,
)  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the data set and of the checkpoint that they name."""
    parser = make_parser(__doc__)
    add_recipe_flags(parser, SCRIPT, LLVIP_RECIPE)
    add_data_flags(parser)
    add_augmentation_flags(parser)
    add_model_flags(parser)
    add_loss_flags(parser)

    named = peek_flags(arguments, "--data-root", "--init-from")
    if named.data_root is None:
        parser.set_defaults(**SYNTHETIC_RECIPE)
    if named.init_from is not None:
        source = read_checkpoint(named.init_from)
        if "model_kwargs" in source:
            kwargs = {k: v for k, v in source["model_kwargs"].items() if not k.startswith(STAGE_2_ADDS)}
            parser.set_defaults(**kwargs, statistics="given")
        else:
            parser.set_defaults(norm="frozen_batch", frozen_stages=1, statistics="imagenet")
            parser.set_defaults(norm_eps=0.0 if has_old_names(source) else 1e-5)
    return parser.parse_args(arguments)


# fmt: off
def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which pairs").add_argument
    add("--val-split", choices=("held-out", "test"), default="held-out", help="LLVIP: cameras of train, or test")
    add("--synthetic-train", type=positive_int, default=1000, metavar="N", help="drawn training pairs")
    add("--synthetic-val", type=positive_int, default=200, metavar="N", help="drawn validation pairs")
    add("--statistics", choices=("imagenet", "measured", "given"), default="imagenet",
        help="mean and std of each modality: ImageNet's, measured on 64 training pairs, or the checkpoint's")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag here is the keyword of `PairedAugmentation` of the same name."""
    add = parser.add_argument_group("augmentation: geometry is the same for both images").add_argument
    add("--flip", type=fraction, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--crop", type=fraction, default=0.0, metavar="P", help="probability of a crop")
    add("--crop-scale", type=fraction, nargs=2, default=[0.6, 1.0], metavar=("LOW", "HIGH"), help="sides of a crop")
    add("--mosaic", type=fraction, default=0.0, metavar="P", help="probability of four pairs in one")
    add("--brightness", type=fraction, default=0.2, metavar="X", help="jitter of visible")
    add("--contrast", type=fraction, default=0.2, metavar="X", help="jitter of visible")
    add("--saturation", type=fraction, default=0.2, metavar="X", help="jitter of visible")
    add("--hue", type=fraction, default=0.0, metavar="X", help="jitter of visible, at most 0.5")
    add("--gain", type=fraction, default=0.2, metavar="X", help="infrared times 1 +- X")
    add("--offset", type=fraction, default=0.05, metavar="X", help="infrared plus +- X, of 0..1")
    add("--noise", type=fraction, default=0.02, metavar="X", help="largest standard deviation of noise on infrared")
    add("--erase-visible", type=fraction, default=0.0, metavar="P", help="probability of a black patch on visible")
    add("--erase-infrared", type=fraction, default=0.0, metavar="P", help="probability of a black patch on infrared")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag here is the keyword of `macl.build_detector` of the same name."""
    add = parser.add_argument_group("detector").add_argument
    add("--classes", nargs="+", default=["person"], metavar="NAME", help="what to detect")
    add("--backbone", choices=tuple(BACKBONES), default="resnet50", help="depth of the ResNet")
    add("--norm", choices=NORMS, default="group", help="norm layers; frozen_batch with published weights")
    add("--norm-eps", type=non_negative_float, default=1e-5, metavar="X", help="0 with torchvision's COCO file of 2019")
    add("--frozen-stages", type=int, choices=range(5), default=0, help="stages never trained, the stem with the first")
    add("--fpn-channels", type=positive_int, default=256, metavar="N", help="width of neck and RPN")
    add("--fpn-levels", type=int, choices=(3, 4, 5, 6), default=5, help="pyramid maps, from P2 on")
    add("--msp", action=argparse.BooleanOptionalAction, default=True, help="multi-scale pyramid reweighting")
    add("--msp-hidden", type=positive_int, metavar="N", help="hidden width of its attention")
    add("--fusion", choices=FUSIONS, default="mean", help="how two pyramids become one")
    add("--modality-dropout", type=fraction, nargs=2, default=[0.1, 0.1], metavar=("VISIBLE", "INFRARED"),
        help="probability that a modality of a training image is masked")
    add("--min-size", type=int_list, default="480,544,512", metavar="PIXELS",
        help="short side; of several a random one for each training batch and the last in evaluation")
    add("--max-size", type=positive_int, default=704, metavar="PIXELS", help="longest side after resizing")
    add("--anchor-sizes", type=int_list, default="32,64,128,256,512", metavar="PIXELS", help="one a pyramid map")
    add("--aspect-ratios", type=float_list, default="0.5,1,2", metavar="X,X", help="height / width of the anchors")
    add = parser.add_argument_group("region proposals: two numbers are for training and evaluation").add_argument
    add("--rpn-pre-nms", type=positive_int, nargs=2, default=[2000, 1000], metavar="N", help="kept a map before NMS")
    add("--rpn-post-nms", type=positive_int, nargs=2, default=[2000, 1000], metavar="N", help="kept an image after it")
    add("--rpn-samples", type=positive_int, default=256, metavar="N", help="anchors an image in the loss")
    add("--rpn-positive-fraction", type=fraction, default=0.5, metavar="X", help="at most so many positive")
    add = parser.add_argument_group("detection head").add_argument
    add("--head-width", type=positive_int, default=1024, metavar="N", help="of its two hidden layers")
    add("--roi-samples", type=positive_int, default=512, metavar="N", help="proposals an image in the loss")
    add("--roi-positive-fraction", type=fraction, default=0.25, metavar="X", help="at most so many positive")
    add("--box-loss", choices=("smooth_l1", "l1", "giou"), default="smooth_l1", help="of the refined boxes")
    add("--box-beta", type=positive_float, default=1 / 9, metavar="X", help="of smooth_l1")
    add("--label-smoothing", type=fraction, default=0.0, metavar="X", help="of the classifier")
    add = parser.add_argument_group("contrast between the modalities (MACL)").add_argument
    add("--macl-level", choices=MACL_LEVELS, default="roi", help="embed each box, each image, or nothing")
    add("--macl-hidden", type=int_list, default="256", metavar="N,N", help="hidden widths of the projector")
    add("--macl-dim", type=positive_int, default=128, metavar="N", help="size of the embedding")
    add("--macl-norm", choices=PROJECTOR_NORMS, default="layer", help="norm of the projector")
    add("--macl-norm-groups", type=positive_int, default=32, metavar="N", help="groups of norm group")
    add("--macl-dropout", type=fraction, default=0.0, metavar="P", help="dropout of the projector")
    add("--macl-direction", choices=DIRECTIONS, default="both", help="which modality asks")
    add("--macl-temperature", type=positive_float, default=0.07, metavar="X", help="initial, 0.01 to 1; learned")
    add("--macl-roi-size", type=positive_int, default=4, metavar="N", help="boxes are pooled to N x N")


def add_detection_weight_flags(add) -> None:
    add("--rpn-weight", type=non_negative_float, default=1.0, metavar="X", help="both losses of the RPN")
    add("--class-weight", type=non_negative_float, default=1.0, metavar="X", help="classification")
    add("--box-weight", type=non_negative_float, default=1.0, metavar="X", help="box regression")


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss weights").add_argument
    add_detection_weight_flags(add)
    add("--macl-weight", type=non_negative_float, default=0.1, metavar="X", help="contrast; 0 builds no head for it")
    add = parser.add_argument_group("validation and speed").add_argument
    add("--best-by", choices=("ap50", "ap", "r1"), default="ap50", help="which figure chooses best.pt")
    add("--validate-every", type=positive_int, default=1, metavar="EPOCHS", help="and after the last")
    add("--log-every", type=positive_int, default=20, metavar="STEPS", help="steps between printed lines")
    add("--compile", action="store_true", help="torch.compile the backbone and the neck")
# fmt: on


def open_data(args: argparse.Namespace):
    """Training and validation data, and a sentence about each."""
    classes = dict(classes=args.classes)
    if args.data_root is None:
        train = SyntheticPairs(args.synthetic_train, args.seed, **classes)
        validation = SyntheticPairs(args.synthetic_val, VALIDATION_SEED + args.seed, **classes)
        said = [f"training on {train.source} (no --data-root was given)", f"validating on {validation.source}"]
    else:
        train = LLVIP(args.data_root, "train", **classes)
        if args.val_split == "test":
            validation = LLVIP(args.data_root, "test", **classes)
            sentence = f"validating on {validation.source}"
        else:
            train, validation, sentence = hold_out(train)
        said = [f"training on {train.source}", sentence]
    refuse_absent_classes(train, every=True)
    refuse_absent_classes(validation, every=False)
    return train, validation, said


def measure_statistics(dataset, count: int = 64) -> dict[str, list[float]]:
    """Mean and std of each modality over evenly spaced pairs, as the detector's keywords."""
    samples = [dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // count))]
    found = {}
    for modality in ("visible", "infrared"):
        pixels = torch.cat([to_float(sample[modality]).flatten(1) for sample in samples], dim=1)
        found[f"{modality}_mean"], found[f"{modality}_std"] = pixels.mean(1).tolist(), pixels.std(1).tolist()
    return found


def build_model(args: argparse.Namespace, train_data) -> tuple[macl.PairedFasterRCNN, list[str]]:
    """The detector, with the weights of --init-from, and what there is to say about it."""
    names = [name for name in macl.build_detector.__kwdefaults__ if hasattr(args, name)]
    kwargs = {name: getattr(args, name) for name in names}
    if args.macl_weight == 0:
        kwargs["macl_level"] = "none"
    if args.statistics == "measured":
        kwargs |= measure_statistics(train_data)
    elif args.statistics == "imagenet":
        kwargs |= {
            f"{m}_{k}": v for m in ("visible", "infrared") for k, v in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
        }
    try:
        detector = macl.build_detector(**kwargs)
    except ValueError as error:
        raise InputError(f"the detector's flags do not fit together: {error}") from error
    count = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    said = [
        f"{args.backbone}, {args.norm} norm, {args.fpn_levels} levels of {args.fpn_channels} channels, "
        f"fusion {args.fusion}: {count / 1e6:.1f} M trainable parameters"
    ]
    if args.init_from is not None:
        said.append(f"weights of {args.init_from}: {load_initial_weights(detector, args.init_from)}")
    elif args.data_root is not None:
        said.append("training from random weights; --init-from takes torchvision's COCO or ImageNet files")
    return detector, said


def loss_weights(args: argparse.Namespace, detector: macl.PairedFasterRCNN) -> dict[str, float]:
    """The one place where losses are weighted; `TrainStep` applies it once."""
    weights = {
        "loss_objectness": args.rpn_weight,
        "loss_rpn_box_reg": args.rpn_weight,
        "loss_classifier": args.class_weight,
        "loss_box_reg": args.box_weight,
    }
    if detector.macl is not None:
        weights["loss_macl"] = args.macl_weight
    return weights


def freeze_unreached(detector: macl.PairedFasterRCNN, weights: dict[str, float]) -> None:
    """Freeze what only losses of weight 0 have a path to; DistributedDataParallel waits for the gradient of all else.

    The contrastive head stays in place, so that the checkpoint fits and R@1 is told.
    """
    enabled = {name for name, weight in weights.items() if weight}
    proposing, detecting = {"loss_objectness", "loss_rpn_box_reg"}, {"loss_classifier", "loss_box_reg"}
    for part, losses in (
        (detector.rpn, proposing),
        (detector.fusion, proposing | detecting),
        (detector.roi_head, detecting),
        (detector.roi_head.cls_score, {"loss_classifier"}),
        (detector.roi_head.bbox_pred, {"loss_box_reg"}),
        (detector.macl, {"loss_macl"}),
        (detector.alignment, {"loss_adversary"}),
    ):
        if part is not None and not losses & enabled:
            part.requires_grad_(False)


def validate_args(args: argparse.Namespace) -> None:
    world = distributed.world_size()
    if args.macl_weight and args.macl_level == "image" and args.batch_size * world == 1:
        raise InputError(
            "--macl-level image with one image a step never has a negative: raise --batch-size, or use --macl-level roi"
        )
    if args.statistics == "given" and not hasattr(args, "visible_mean"):
        raise InputError("--statistics given takes them from a checkpoint of a run: name one with --init-from")
    refuse_augmentation(args)
    if args.norm == "sync_batch" and world > 1 and args.device == "cpu":
        raise InputError("--norm sync_batch over several processes needs --device cuda")
    if args.best_by == "r1" and (args.macl_weight == 0 or args.macl_level == "none"):
        raise InputError("--best-by r1 needs the contrastive head: --macl-weight above 0 and --macl-level roi or image")


def refuse_augmentation(args: argparse.Namespace) -> None:
    if args.hue > 0.5:
        raise InputError(f"--hue {args.hue}: expected at most 0.5, half of the colour circle")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise InputError(f"--crop-scale {args.crop_scale}: expected two numbers above 0, the smaller one first")


def validate(detector, data, args, device, between, *, modes=None) -> tuple[dict, list[dict]]:
    """Figures by mode and of the embeddings, and the results they come from; the same on every process."""
    results = predict(
        detector,
        data,
        modes=detector.modes if modes is None else modes,
        device=device,
        batch_size=args.batch_size,
        workers=args.workers,
        amp=args.amp,
        between=between,
    )
    return {**detection_metrics(results), "alignment": alignment_metrics(results)}, results


def best_metric(figures: dict, by: str) -> tuple[float, float]:
    """The figure that chooses best.pt, with both cameras where the detector has both, and AP50:95, which breaks ties.

    -1 where there is none.
    """
    shown = next(iter(figures.values()))
    values = figures["alignment"]["r1"] if by == "r1" else shown[by], shown["ap"]
    return tuple(-1.0 if value is None else value for value in values)


def build_loader(args: argparse.Namespace, data, sampler: ResumableSampler, device: torch.device):
    """AugmentedDataset batches in the sampler's order."""
    augmentation = PairedAugmentation(
        flip=args.flip, crop=args.crop, crop_scale=tuple(args.crop_scale), mosaic=args.mosaic,
        brightness=args.brightness, contrast=args.contrast, saturation=args.saturation, hue=args.hue,
        gain=args.gain, offset=args.offset, noise=args.noise,
        erase_visible=args.erase_visible, erase_infrared=args.erase_infrared,
    )  # fmt: skip
    return make_loader(
        AugmentedDataset(data, augmentation, seed=args.seed), sampler, collate,
        workers=args.workers, device=device,
    )  # fmt: skip


def detector_inputs(batch: dict, device: torch.device) -> dict:
    """The keywords of the detector's forward out of a batch."""
    return to_device({name: batch[name] for name in ("visible", "infrared", "targets")}, device)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = distributed.start(args.device)
    validate_args(args)
    train_data, val_data, said = open_data(args)
    torch.manual_seed(args.seed)
    detector, about_model = build_model(args, train_data)
    resumed = None
    if not args.check:  # the folder comes last, so that bad input leaves none behind
        folder = prepare_run(args, SCRIPT, may_change=("log_every", "validate_every", "best_by"))
        resumed = checkpoint.load(args.resume) if args.resume else None
    detector = detector.to(device)
    if args.compile:
        detector.backbone.compile()
        detector.neck.compile()
    average = ema(detector, args.ema_decay) if args.ema_decay else None
    weights = loss_weights(args, detector)
    freeze_unreached(detector, weights)
    model = distributed.parallel(detector)

    sampler = ResumableSampler(len(train_data), args.batch_size, seed=args.seed)
    loader = build_loader(args, train_data, sampler, device)
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / args.accumulate)
    total_steps = args.epochs * steps_per_epoch
    optimizer, schedule = build_optimisation(args, detector, steps_per_epoch)

    stepper = TrainStep(
        model, optimizer, losses_of=lambda batch: model(**detector_inputs(batch, device)),
        weights=weights, describe=lambda batch: batch["path"], metrics_of=lambda: detector.monitor, device=device,
        schedule=schedule, average=average, amp=args.amp, clip_norm=args.clip_norm,
    )  # fmt: skip
    torch.manual_seed(args.seed * 1000 + distributed.rank())  # each process samples its own RoIs
    best, untrained = (-math.inf, -math.inf), None

    if args.check:
        check(said + about_model, {"training": train_data, "validation": val_data}, stepper, loader, detector)
        return
    state = TrainingState(SCRIPT, detector, average, optimizer, schedule, stepper, sampler)
    if resumed is not None:
        with restoring(args.resume):
            state.load_state_dict(resumed)
            best, untrained = best_of(resumed), resumed["untrained"]
            if untrained is not None:
                number(untrained, "untrained", 0, 1)
    log = RunLog(
        folder, total_steps=total_steps, resume_step=stepper.steps if resumed else None, validated=stepper.validated,
        every=args.log_every,
    )  # fmt: skip
    for line in [*said, *about_model, f"writing to {folder}"]:
        log.say(line)
    if resumed is not None:
        log.say(f"resumed from {args.resume} at step {stepper.steps}, epoch {sampler.epoch}")

    def save(name: str) -> None:
        run = {"model_kwargs": detector.kwargs, "best": best, "untrained": untrained}
        checkpoint.save(folder / name, state.state_dict() | run)

    throughput = Throughput()

    def step(batches: list, epoch: int) -> None:
        result = stepper(batches)
        images = sum(len(batch["path"]) for batch in batches) * distributed.world_size()
        if not result.skipped:
            log.train(stepper.steps, {
                "epoch": epoch, "loss": result.total, **result.losses, "lr": result.lr,
                "grad_norm": result.grad_norm, **result.metrics,
                "images_per_second": throughput.update(images), "memory_gib": peak_memory(device),
            })  # fmt: skip

    def validate_epoch(epoch: int, between: Callable[[], None]) -> str | None:
        nonlocal best, untrained
        if epoch == 0:  # what R@1 of the trained head is held against
            if detector.macl is not None:
                before, _ = validate(detector, val_data, args, device, between, modes={})
                untrained = before["alignment"]["r1"]
                retrieval = "" if untrained is None else f"cross-modal retrieval R@1 {untrained:.3f}"
                log.validation(0, {"epoch": 0, **before}, retrieval)
            throughput.restart()
            return None
        figures, results = validate(detector if average is None else average.module, val_data, args, device, between)
        log.validation(stepper.steps, {"epoch": epoch, **figures}, validation_text(figures, untrained))
        if distributed.is_main():
            draw_validation(folder, epoch, val_data, results)
        throughput.restart()
        if best_metric(figures, args.best_by) > best:
            best = best_metric(figures, args.best_by)
            return f"best {args.best_by} so far: {best[0]:.4f}"

    run_epochs(args, loader, sampler, stepper, log, step=step, validate=validate_epoch, save=save)


def check(said: list[str], data: dict, stepper: TrainStep, loader, detector) -> None:
    """--check: what the data holds, one step, and whether a gradient reaches every part."""
    for line in said:
        print(line)
    for name, pairs in data.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in pairs.statistics().items()))
    result = stepper([next(iter(loader))], keep_gradients=True)
    print("losses: " + ", ".join(f"{name} {value:.4f}" for name, value in result.losses.items()))
    for name, norm in module_gradient_norms(detector).items():
        print(f"gradient norm of {name}: " + ("no gradient" if norm is None else f"{norm:.4g}"))


if __name__ == "__main__":
    with one_sentence():
        main()
