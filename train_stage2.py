"""Stage 2: fine-tune a stage-1 detector on KAIST, on pairs of your own, or on drawn scenes of another kind.

    python train_stage2.py                                                     # the newest stage-1 run, drawn scenes
    python train_stage2.py --init-from runs/NAME/best.pt --data-root KAIST --image-set train-all-02
    python train_stage2.py --init-from runs/NAME/best.pt --data-root KAIST --old-root LLVIP --old-share 0.3
    python train_stage2.py --init-from runs/NAME/best.pt --data-root ROOT --old-root OLD    # any layout of docs/data.md
    torchrun --nproc-per-node 4 train_stage2.py --init-from runs/NAME/best.pt --data-root KAIST --amp bf16
    python train_stage2.py --resume auto                                       # go on after Ctrl-C

The architecture comes out of the checkpoint. With --target-labels none the new domain needs no labels: the averaged
detector gives them. Without --data-root the defaults are those of the drawn scenes, with it those of KAIST; add --help
to see the defaults of just that command.
"""

import trainkit.process_setup  # noqa: F401, I001  before torch

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import macl
from macl import training
from macl.build import load_initial_weights, read_checkpoint
from macl.data import DAY_AND_NIGHT, KAIST, NIGHT, JointDataset, SyntheticPairs, hold_out, refuse_absent_classes
from macl.data.kaist import TRAINING_RULES, is_kaist
from macl.evaluation import miss_rate_tables, validation_text
from macl.plots import draw_validation
from macl.teacher import KeyEncoder, Labeller
from trainkit import distributed
from trainkit.arguments import (
    add_recipe_flags,
    below_one,
    fraction,
    int_list,
    make_parser,
    non_negative_float,
    non_negative_int,
    parse_with_resume,
    peek_flags,
    positive_int,
)
from trainkit.errors import InputError, one_sentence
from trainkit.optimizer import build_optimisation, ema
from trainkit.run import Run
from trainkit.run_folder import RUNS, find_resume
from trainkit.sampler import BalancedSampler, ResumableSampler
from trainkit.step import TrainStep

SCRIPT = "stage2"
MAY_CHANGE = ("llvip_root",)
KAIST_FLAGS = ("val_image_set", "annotations", "val_annotations")
PAIR_FLAGS = "split val_split label_form labels_infrared suffixes infrared_to_visible infrared_range".split()
MISS_RATES = ("reasonable all", "reasonable day", "reasonable night", "all")  # rows of the table that are printed

# The recipe for KAIST: the defaults of the flags, and what differs for the drawn scenes.
KAIST_RECIPE = dict(
    epochs=6, batch_size=4, optimizer="adamw", lr=1e-4, weight_decay=1e-4, schedule="cosine",
    lr_scale=["backbone=0.1"], warmup_steps=500, clip_norm=10.0, ema_decay=0.999,
)  # fmt: skip
SYNTHETIC_RECIPE = dict(
    epochs=3, workers=1, lr=5e-4, warmup_steps=30, clip_norm=0.0, ema_decay=0.99, freeze_stages=[1, 0],
    lr_scale=[],
)  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the data set or the resumed run that they name."""
    parser = make_parser(__doc__)
    add_recipe_flags(parser, SCRIPT, MAY_CHANGE)
    add_data_flags(parser)
    add_model_flags(parser)
    training.add_flags(parser)
    given = peek_flags(arguments, "--data-root", "--labels")
    defaults = KAIST_RECIPE | ({} if is_kaist(given.data_root) else {"best_by": "ap50"})
    defaults |= SYNTHETIC_RECIPE if given.data_root is given.labels is None else {}
    return parse_with_resume(parser, arguments, SCRIPT, defaults)


# fmt: off
def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which pairs, and validation on them").add_argument
    training.add_pair_flags(add)
    training.add_split_flags(add)
    add("--image-set", default="train-all-02", metavar="NAME|FILE", help="KAIST: list of training frames")
    add("--val-image-set", metavar="NAME|FILE", help="KAIST: list of validation frames; without it videos are held out")
    add("--stride", type=positive_int, default=1, metavar="N", help="KAIST: every N-th training frame of a video")
    add("--annotations", metavar="PATH", help="KAIST: training boxes from here instead of from the tree")
    add("--val-annotations", metavar="PATH", help="KAIST: boxes of --val-image-set, such as the published json of test")
    add("--min-height", type=non_negative_float, default=TRAINING_RULES["min_height"], metavar="PIXELS",
        help="KAIST: smaller people are ignored in training")
    add("--max-occlusion", type=int, choices=(0, 1, 2), default=TRAINING_RULES["max_occlusion"],
        help="KAIST: people occluded more than that (1 partially, 2 heavily) are ignored in training")
    add("--old-root", "--llvip-root", dest="llvip_root", metavar="PATH",
        help="pairs of stage 1's domain, in any layout, to mix in and to validate on; read as the checkpoint's were")
    add("--old-share", type=below_one, default=0.25, metavar="X",
        help="share of each batch from the domain of stage 1; 0 mixes nothing in")
    add("--synthetic-train", type=positive_int, default=600, metavar="N", help="drawn training pairs")
    add("--synthetic-val", type=positive_int, default=100, metavar="N", help="drawn validation pairs of each domain")
    add("--best-by", choices=("ap50", "ap", "miss-rate", "r1"), default="miss-rate", help="metric that chooses best.pt")
    add("--patience", type=non_negative_int, default=0, metavar="N", help="stop after N validations with none better")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What a fine-tuning run may choose; the rest of the architecture is the checkpoint's."""
    add = parser.add_argument_group("detector: without a flag as in the checkpoint").add_argument
    add("--modality-dropout", type=fraction, nargs=2, metavar=("VISIBLE", "INFRARED"),
        help="probability that a modality of a training image is masked")
    add("--min-size", type=int_list, metavar="PIXELS", help="short side; of several training draws one per batch")
    add("--max-size", type=positive_int, metavar="PIXELS", help="longest side after resizing")
    add("--freeze-stages", type=int_list, default="2,1", metavar="N,N",
        help="backbone stages frozen in epoch 1, 2, ...; the last number holds for the rest")
    add = parser.add_argument_group("a new domain without labels: the averaged detector labels it").add_argument
    add("--target-labels", choices=("given", "none"), default="given",
        help="none: train on the labels of the old domain alone; the new one's serve validation")
    add("--self-threshold", type=fraction, default=0.7, metavar="X", help="score from which a detection is a label")
# fmt: on


def newest_stage1() -> str:
    """best.pt of the stage-1 run that was written to last."""
    found = [folder / "best.pt" for folder in RUNS.glob("stage1-*") if (folder / "best.pt").is_file()]
    if not found:
        raise InputError(
            f"there is no {RUNS}/stage1-*/best.pt to fine-tune: run train_stage1.py first, or give --init-from"
        )
    return str(max(found, key=lambda path: path.stat().st_mtime_ns))


def mixes(args: argparse.Namespace) -> bool:
    """Whether pairs of the old domain are mixed in."""
    return args.old_share > 0 and (not training.has_pairs(args) or args.llvip_root is not None)


def open_data(args: argparse.Namespace, classes: Sequence[str], old_reading: Mapping | None = None):
    """Training data, validation data of the new and of the old domain (or None), how the new one is read and
    registered, and sentences about them. Each domain has a rig of its own.

    classes: the detector's, which every data set is opened with.
    old_reading: how stage 1 read its data, see `training.choose_reading`
    """
    old = old_validation = reading = None
    kaist = is_kaist(args.data_root)
    if not training.has_pairs(args):
        seed = training.VALIDATION_SEED + args.seed
        new = SyntheticPairs(args.synthetic_train, args.seed, domain=DAY_AND_NIGHT, classes=classes)
        old = SyntheticPairs(args.synthetic_train, args.seed, domain=NIGHT, classes=classes)
        validation = SyntheticPairs(args.synthetic_val, seed, domain=DAY_AND_NIGHT, classes=classes)
        old_validation = SyntheticPairs(args.synthetic_val, seed, domain=NIGHT, classes=classes)
        messages = [f"validating on {validation.source}"]
    else:
        if kaist:
            new, validation, sentence = open_kaist(args, classes)
        else:
            new, validation, sentence = training.open_training(args, args.split, args.val_split, classes)
        reading, about = training.choose_reading(args, new)
        new, validation = training.read_as(reading, new, validation)
        messages = [sentence, *about]
        if args.llvip_root is not None:
            unset = argparse.Namespace(**dict.fromkeys((*PAIR_FLAGS, "boxes")), data_root=args.llvip_root)
            old, old_validation, sentence = training.open_training(unset, None, None, classes)
            as_before, about = training.choose_reading(unset, old, old_reading)
            old, old_validation = training.read_as(as_before, old, old_validation)
            messages += [f"old domain: {sentence}" for sentence in (sentence, *about)]
    for dataset in filter(None, (new, old, validation, old_validation)):
        refuse_absent_classes(dataset, every=False)
    move, registered, about = training.choose_move(args, new)
    new, validation = (dataset.moved(move) for dataset in (new, validation))
    messages += about
    if old is not None:
        move, _, about = training.choose_move(args, old)
        old, old_validation = (dataset.moved(move) for dataset in (old, old_validation))
        messages += [f"old domain: {sentence}" for sentence in about]
    others = [name for name in classes if name != "person"]
    if others and (kaist or not training.has_pairs(args)):
        messages.append(f"Warning: only person is sure to be in the new domain; {', '.join(others)} may be unlearnt")
    train = JointDataset(new, old) if mixes(args) else new
    source = train.source + ("" if training.has_pairs(args) else " (no --data-root was given)")
    share = f", {args.old_share:.0%} of each batch from the latter" if train is not new else ""
    kept = {"register": registered, "reading": reading, "old_reading": old_reading}
    kept["splits"] = None if reading is None else [args.split, args.val_split]
    return train, validation, old_validation, kept, [f"training on {source}{share}", *messages]


def open_kaist(args: argparse.Namespace, classes: Sequence[str]):
    """Training and validation frames of KAIST, and sentences about the latter; the rules are for training alone."""
    train = KAIST(args.data_root, args.image_set, args.annotations, args.stride, classes=classes)
    if args.val_image_set is None:
        train, validation, sentence = hold_out(train)
    else:
        validation = KAIST(args.data_root, args.val_image_set, args.val_annotations, classes=classes)
        sentence = f"validating on {validation.source}"
    return train.with_rules(min_height=args.min_height, max_occlusion=args.max_occlusion), validation, sentence


def build_model(
    args: argparse.Namespace, initial: dict, resumed: Path | None
) -> tuple[macl.PairedFasterRCNN, list[str]]:
    """The detector of the checkpoint `initial`, with what stage 2 adds to it, and what there is to say about it.

    Of a run that is resumed the architecture alone; its weights come with the rest of its state.
    """
    source = args.init_from
    if "model_kwargs" not in initial:
        raise InputError(f"--init-from {source}: expected best.pt or last.pt of a run of train_stage1.py")
    kwargs = dict(initial["model_kwargs"])
    if resumed is None:
        chosen = ("modality_dropout", "min_size", "max_size")
        kwargs |= {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
        kwargs |= dict(dhn_size=args.dhn_size, dhn_k=args.dhn_k)
    try:
        detector = macl.build_detector(**kwargs)
    except ValueError as error:
        raise InputError(f"the detector's flags do not fit together: {error}") from error
    if args.best_by == "r1" and detector.macl is None:
        raise InputError("--best-by r1 needs a contrastive head, and the checkpoint's detector has none")
    if resumed is not None:
        return detector, []
    return detector, [f"weights of {source}: {load_initial_weights(detector, source)}"]


def validate_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other."""
    training.check_flags(args)
    if args.llvip_root is not None and not training.has_pairs(args):
        raise InputError("--old-root, or --llvip-root, goes with --data-root; without it the old domain is drawn")
    kaist = is_kaist(args.data_root)
    for name in KAIST_FLAGS if not kaist else PAIR_FLAGS:
        if getattr(args, name) is not None:
            known = "KAIST's" if kaist else "not KAIST's"
            raise InputError(f"--{name.replace('_', '-')}: the layout of {args.data_root} is {known}")
    if not args.freeze_stages or max(args.freeze_stages) > 4:
        raise InputError(f"--freeze-stages {args.freeze_stages}: expected numbers from 0 to 4")
    if args.target_labels == "none" and not (mixes(args) and args.ema_decay):
        raise InputError(
            "--target-labels none trains on the old domain's labels and on those of the averaged detector: give "
            "--old-share above 0, with --data-root also --old-root, and --ema-decay above 0"
        )


def validate_both(detector, new, old, args, device, between) -> tuple[dict, list[dict]]:
    """Metrics on the new domain with its miss rates, those on the old one under "old", and the new one's results."""
    metrics, results = training.validate(detector, new, args, device, between)
    tables = miss_rate_tables(results).items()
    metrics["miss_rate"] = {mode: {row: one["miss_rate"] for row, one in rows.items()} for mode, rows in tables}
    if old is not None:
        metrics["old"], _ = training.validate(detector, old, args, device, between)
    return metrics, results


def both_text(metrics: dict) -> str:
    new = {name: value for name, value in metrics.items() if name not in ("miss_rate", "old")}
    lines = [validation_text(new)]
    for mode, rows in metrics["miss_rate"].items():
        rates = [f"{row} {'-' if rows[row] is None else f'{rows[row]:.1f}'}" for row in MISS_RATES if row in rows]
        lines.append(f"miss rate, {mode}: {'subset ' * (len(rates) == 1)}{', '.join(rates)}")
    lines += ["the domain of stage 1:" + validation_text(metrics["old"])] if "old" in metrics else []
    return "\n".join(lines)


def selection_metric(metrics: dict, by: str) -> tuple[float, float]:
    """The metric on the new domain that chooses best.pt, higher is better, and the one that breaks ties."""
    if by != "miss-rate":
        return training.best_metric(metrics, by)
    rate = next((rate for rows in metrics["miss_rate"].values() for rate in rows.values()), None)  # the first row's
    return -math.inf if rate is None else -rate, training.best_metric(metrics, "ap")[1]


def freeze(args: argparse.Namespace, detector: macl.PairedFasterRCNN, train_step: TrainStep, epoch: int) -> str:
    """Freeze the stages that are frozen in this epoch, for DDP too, and say what is trained."""
    frozen = args.freeze_stages[min(epoch, len(args.freeze_stages)) - 1]
    detector.backbone.freeze(frozen)
    train_step.model = distributed.parallel(detector)  # DDP looks at requires_grad once, when it is made
    trained = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    what = f"the stem and {frozen} of the backbone's stages frozen" if frozen else "nothing frozen"
    return f"epoch {epoch}: {what}, {trained / 1e6:.2f} M parameters trained"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = distributed.start(args.device)
    validate_args(args)
    resumed = find_resume(args.resume, args.output, SCRIPT)
    if resumed is None and args.init_from is None:
        args.init_from = newest_stage1()
    torch.manual_seed(args.seed)
    initial = read_checkpoint(resumed or args.init_from)
    detector, about_model = build_model(args, initial, resumed)
    old_reading = initial.get("old_reading" if resumed else "reading")
    train_data, val_data, old_val_data, kept, messages = open_data(args, detector.kwargs["classes"], old_reading)
    messages += about_model
    training.check_cameras(detector, *filter(None, (val_data, old_val_data)))
    detector = detector.to(device)
    if args.compile:
        detector.backbone.compile()
        detector.neck.compile()
    average = ema(detector, args.ema_decay) if args.ema_decay else None
    keys = KeyEncoder(detector) if args.dhn_size else None
    labels = Labeller(average.module, args.self_threshold) if args.target_labels == "none" else None
    forward = functools.partial(training.forward_losses, teachers=[one for one in (labels, keys) if one is not None])

    if isinstance(train_data, JointDataset):
        lengths = tuple(map(len, train_data.datasets))
        sampler = BalancedSampler(lengths, args.batch_size, share=args.old_share, seed=args.seed)
    else:
        sampler = ResumableSampler(len(train_data), args.batch_size, seed=args.seed)
    loader = training.augmented_loader(args, train_data, sampler, device)
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / args.accumulate)
    total_steps = args.epochs * steps_per_epoch
    weights = training.detection_weights(args, detector)
    training.freeze_unreached(detector, weights)
    detector.backbone.freeze(min(args.freeze_stages))  # the optimizer knows all that is ever trained
    optimizer, schedule = build_optimisation(args, detector, steps_per_epoch)
    train_step = TrainStep(
        detector, optimizer, forward=forward, weights=weights, describe=lambda batch: batch["path"], device=device,
        schedule=schedule, average=average, amp=args.amp, clip_norm=args.clip_norm,
    )  # fmt: skip
    torch.manual_seed(args.seed * 1000 + distributed.rank())  # each process samples its own RoIs
    if args.check:
        parts = getattr(train_data, "datasets", (train_data,))
        data = dict(zip(("training", "training, old domain"), parts, strict=False)) | {"validation": val_data}
        training.check(messages, data, train_step, loader, detector)
        return

    run = Run(
        args, SCRIPT, train_step, sampler, total_steps=total_steps, may_change=MAY_CHANGE,
        constants={"model_kwargs": detector.kwargs} | kept,
        parts={} if keys is None else {"keys": keys},
    )  # fmt: skip
    run.say(*messages)
    with run:
        for epoch in run.epochs():
            if args.patience and run.stale >= args.patience:
                run.say(f"no better {args.best_by} in {run.stale} validations (--patience): stopped")
                break
            run.say(freeze(args, detector, train_step, epoch) if epoch else "before fine-tuning:")
            for batches in run.batches(loader):
                result = train_step(batches)
                if keys is not None and not result.skipped:
                    keys.update(detector)
                run.log_step(result, images=sum(len(batch["path"]) for batch in batches) * distributed.world_size())
            if run.validation_due():
                model = detector if average is None or epoch == 0 else average.module
                between = run.leave_if_asked
                metrics, results = validate_both(model, val_data, old_val_data, args, device, between)
                run.log_validation(metrics, both_text(metrics))
                if distributed.is_main():
                    draw_validation(run.folder, epoch, val_data, results)
                run.keep_best(selection_metric(metrics, args.best_by), args.best_by)


if __name__ == "__main__":
    with one_sentence():
        main()
