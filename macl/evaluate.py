"""Evaluate a detector with both cameras and with each alone, or a file of detections.

    python -m macl.evaluate --checkpoint runs/NAME/best.pt                            # new synthetic scenes
    python -m macl.evaluate --checkpoint best.pt --data-root ROOT                     # LLVIP, own pairs: docs/data.md
    python -m macl.evaluate --checkpoint best.pt --dataset kaist --data-root KAIST --annotations TEST.json
    python -m macl.evaluate --dataset kaist --detections FILE.txt --annotations TEST.json      # no model
    python -m macl.evaluate --checkpoint best.pt --misalign 2 4 8                     # infrared moved to the right

Average precision, and of people the log-average miss rate; of pairs, whose occlusion is unknown, that of all of them.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset

from macl import data, evaluation, training
from macl.build import MERGES, load_detector, read_checkpoint
from macl.failures import write_failures
from macl.metrics import could_count_from_zero, read_detections, write_detections
from macl.plots import miss_rate_plot
from macl.registration import correction
from trainkit import distributed
from trainkit.arguments import fraction, make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import InputError, one_sentence
from trainkit.files import number, shown, write_json
from trainkit.tables import aligned

DOMAINS = {"night": data.NIGHT, "day-and-night": data.DAY_AND_NIGHT, "registered": data.DAY_AND_NIGHT_REGISTERED}
NEEDS = {"split": "pairs", "image_set": "kaist", "annotations": "kaist", "detections": "kaist", "domain": "synthetic"}
NEEDS |= dict.fromkeys(("infrared_to_visible", "infrared_range", "label_form", "labels_infrared", "suffixes"), "pairs")
OUTPUTS = {"save_detections": (".txt", ".json"), "plot": (".png", ".pdf", ".svg")}


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m macl.evaluate`."""
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", metavar="PATH", help="best.pt or last.pt of a run")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged (EMA) weights if any, or raw ones")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("pairs", "llvip", "kaist", "synthetic"),
        help="which data set; llvip is one of pairs (default: as the folders are, else synthetic)")
    add("--data-root", metavar="PATH", help="the data set's own root")
    training.add_pair_flags(add)
    add("--split", metavar="NAME|FILE", help="pairs: a split, a list of names, or held-out: what the run validated on "
        "(default: test, val, all or train)")
    add("--image-set", metavar="NAME", help="kaist: a list in its imageSets, or a list's path (default: test-all-20)")
    add("--annotations", metavar="PATH", help="kaist: folder or json of annotations (default: the root's own)")
    add("--count", type=positive_int, default=200, metavar="N", help="synthetic: number of scenes")
    add("--seed", type=non_negative_int, default=20_000, metavar="N", help="synthetic: seed of the scenes")
    add("--domain", choices=tuple(DOMAINS), help="synthetic: which scenes (default: those of the checkpoint's stage)")
    add = parser.add_argument_group("detections from a file").add_argument
    add("--detections", metavar="FILE", help="kaist: .txt or .json, of one class, instead of a checkpoint")
    add("--first-id", type=int, choices=(0, 1), help="what its image ids count from (default: 1; json: 0 if it occurs)")
    add = parser.add_argument_group("run").add_argument
    add("--modality", choices=("all", "both", "visible", "infrared"), default="all", help="cameras to detect with")
    add("--merge", choices=MERGES, help="boxes of both cameras and of each alone (default: the checkpoint's)")
    add("--score-threshold", type=fraction, default=evaluation.SCORE_THRESHOLD, metavar="X", help="lowest score")
    add("--max-detections", type=positive_int, metavar="N",
        help="most detections per image, also for AP (default: 100; kaist: 1000, as its miss rate)")
    training.add_registration_flags(add)
    add("--misalign", type=int, nargs="+", default=[], metavar="PX",
        help="also with infrared moved to the right, and with each such pair registered")
    add("--batch-size", type=positive_int, default=4, metavar="N", help="images at once")
    add("--workers", type=non_negative_int, default=2, metavar="N", help="loading processes")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the forward pass")
    add = parser.add_argument_group("what to write").add_argument
    add("--output", type=Path, metavar="FILE", help="all metrics as json, the curves of the miss rate among them")
    add("--save-detections", type=Path, metavar="FILE", help=".txt or .json; of each camera in FILE-visible.txt, ...")
    add("--plot", type=Path, metavar="FILE.png", help="the curves of the miss rate; needs the viz extra")
    add("--miss-rate-script", action="store_true",
        help="beside the benchmark's miss rate the one that the widespread Python script gives")
    add("--worst", nargs=2, metavar=("N", "DIR"),
        help="worst.html in DIR: the N frames with the worst misses and false alarms, and what is found; viz extra")
# fmt: on


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags of another data set, and places that cannot be written, before the long part."""
    if (args.checkpoint is None) == (args.detections is None):
        raise InputError("expected either --checkpoint PATH or --detections FILE")
    pairs = "kaist" if data.is_kaist(args.data_root) else "pairs"
    named = {None: pairs if training.has_pairs(args) else "synthetic", "llvip": "pairs"}
    args.dataset = named.get(args.dataset, args.dataset)
    if training.has_pairs(args) and args.dataset == "synthetic":
        raise InputError("--data-root and --visible need --dataset pairs or kaist")
    for name, dataset in NEEDS.items():
        if getattr(args, name) is not None and args.dataset != dataset:
            raise InputError(f"--{name.replace('_', '-')} needs --dataset {dataset}")
    if (args.misalign or args.register != "none") and args.checkpoint is None:
        raise InputError("--misalign and --register need --checkpoint")
    if args.dataset == "pairs" and not training.has_pairs(args):
        raise InputError("--dataset pairs needs --data-root, or --labels with --visible, --infrared or both")
    if args.dataset == "kaist" and args.data_root is None and None in (args.detections, args.annotations):
        raise InputError("--dataset kaist needs --data-root, or --detections and --annotations FILE.json")
    for name in ("output", *OUTPUTS):
        path, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if path is not None and path.suffix not in OUTPUTS.get(name, (path.suffix,)):
            raise InputError(f"{flag} {path}: expected a name that ends in {' or '.join(OUTPUTS[name])}")
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{flag} {path}: the folder {path.parent} does not exist")
    if args.dataset == "pairs" and args.miss_rate_script:
        raise InputError("--miss-rate-script needs occlusion, which the annotations of pairs do not know")
    if args.worst is not None:
        args.worst = number(args.worst[0], "--worst N", 1, 1e6, whole=True), Path(args.worst[1])
    if args.worst is not None and args.checkpoint is None and args.data_root is None:
        raise InputError("--worst draws pictures: it needs --data-root beside --detections")
    for flag, wanted in (("--plot", args.plot), ("--worst", args.worst)):
        if wanted is not None and find_spec("matplotlib") is None:
            raise InputError(f"{flag} needs matplotlib, which the viz extra brings: pip install -e '.[viz]'")


def open_dataset(args: argparse.Namespace, classes: Sequence[str], trained: Mapping) -> Dataset:
    """The data set with these classes, one of which occurs in it. trained: the checkpoint, if there is one."""
    if args.dataset == "synthetic":
        domain = args.domain or ("day-and-night" if trained.get("script") == "stage2" else "night")
        dataset = data.SyntheticPairs(args.count, args.seed, domain=DOMAINS[domain], classes=classes)
    elif args.split == "held-out":
        _, dataset, _ = training.open_training(args, *(trained.get("splits") or (None, None)), classes)
    elif args.dataset == "pairs":
        splits = [args.split] if args.split else ["test", "val", "all", "train"]
        dataset = training.open_pairs(args, *splits, classes=classes)
        if dataset is None:
            raise InputError(
                f"--split {args.split}: the data have none; expected train, val, test, all, held-out or a list"
            )
        if args.split is None and dataset.split in ("all", "train"):
            dataset.source += "; there is no test split, so pairs of training may be among them: see --split held-out"
    else:
        dataset = data.KAIST(args.data_root, args.image_set or "test-all-20", args.annotations, classes=classes)
    data.refuse_absent_classes(dataset, every=False)
    return dataset


def read_results(args: argparse.Namespace) -> tuple[list[dict], Dataset | None, str]:
    """The file of --detections beside the ground truth, as `predict` gives its results, and what was read.

    The data set is None without --data-root.
    """
    classes, dataset = ("person",), None
    if args.data_root is None:
        frames, source = data.read_ground_truth(args.annotations)
    else:
        dataset = open_dataset(args, classes, {})
        frames, source = dataset.ground_truth(), dataset.source
    outputs = read_detections(args.detections, len(frames), first_id=args.first_id)
    categories = sorted({label for frame in outputs for label in frame["labels"].tolist()})
    if len(categories) > 1:
        raise InputError(f"{args.detections} holds the categories {categories}; expected detections of people alone")
    source += f"\ndetections of {args.detections}: {sum(len(frame['scores']) for frame in outputs)}"
    if args.first_id is None and could_count_from_zero(args.detections, len(frames)):
        source += "; its image ids are taken to count from 1 but would fit 0 as well: --first-id settles it"
    results = []
    for frame, detections in zip(frames, outputs, strict=True):
        detections = {Path(args.detections).stem: detections | {"labels": torch.ones_like(detections["labels"])}}
        results.append({"size": frame["size"], "classes": classes, "detections": detections, "ground_truth": frame})
    return results, dataset, source


def detect(args: argparse.Namespace, device: torch.device, max_detections: int) -> tuple[list[dict], Dataset, str]:
    """The results of the checkpoint, those of --misalign as modes of their own, the data, and what was read."""
    checkpoint = read_checkpoint(args.checkpoint)
    detector = load_detector(args.checkpoint, weights=args.weights, checkpoint=checkpoint).to(device)
    detector.roi_head.max_detections = max_detections
    detector.merge = args.merge or detector.merge
    classes = detector.kwargs["classes"]
    if len(classes) > 1 and args.save_detections is not None and args.save_detections.suffix == ".txt":
        raise InputError(f"--save-detections {args.save_detections}: lines know no class, this detector has several")
    dataset, trained = open_dataset(args, classes, checkpoint), checkpoint.get("reading") or {}
    if args.dataset != "pairs":  # KAIST's images are read as they are
        trained = {"boxes": trained.get("boxes")} if dataset.own_boxes else {}
    reading, about = training.choose_reading(args, dataset, trained)
    old = checkpoint.get("old_reading") or {}
    flags = [f"--{name.replace('_', '-')} {shown(old[name])}" for name in old if old[name] != trained.get(name)]
    if flags and args.dataset == "pairs":
        about.append(f"Warning: read like the new pairs of stage 2; those of stage 1 had {', '.join(flags)}")
    (dataset,) = training.read_as(reading, dataset)
    training.check_cameras(detector, dataset)
    modes = {name: needed for name, needed in detector.modes.items() if set(needed) <= set(dataset.modalities)}
    if args.modality != "all":
        if args.modality not in modes:
            raise InputError(f"--modality {args.modality}: this detector can only see with {', '.join(modes)} here")
        modes = {args.modality: modes[args.modality]}
    if args.misalign and "both" not in modes:
        raise InputError(f"--misalign needs detections with both modalities, not with {', '.join(modes)} alone")
    move, _, messages = training.choose_move(args, dataset, checkpoint.get("register", "none"))
    dataset, messages = dataset.moved(move), about + messages
    options = {name: getattr(args, name) for name in ("batch_size", "workers", "amp", "score_threshold")}
    results = evaluation.predict(detector, dataset, modes=modes, device=device, **options)
    for pixels in args.misalign:
        name, moved = f"both,infrared{pixels:+d}px", dataset.moved((pixels, 0))
        corrected = moved.moved(partial(correction, most=args.register_most))
        for mode, pairs in {name: moved, f"{name},corrected": corrected}.items():
            outputs = evaluation.predict(detector, pairs, modes={mode: modes["both"]}, device=device, **options)
            for result, output in zip(results, outputs, strict=True):
                result["detections"] |= output["detections"]
    return results, dataset, "\n".join([dataset.source, *messages])


def miss_rate_text(tables: dict[str, dict[str, dict]]) -> str:
    """The `miss_rate_tables` as text: per row and mode the miss rate and the final recall."""
    titles = [title for mode in tables for title in (mode, "recall")]
    lines = [["log-average miss rate, %", *titles, "people", "frames"]]
    for row, counts in next(iter(tables.values())).items():
        values = [rows[row][key] for rows in tables.values() for key in ("miss_rate", "recall")]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append([row, *cells, str(counts["boxes"]), str(counts["frames"])])
    return aligned(lines)


def write_files(args: argparse.Namespace, results: list[dict], metrics: dict, ids: tuple | None) -> None:
    """The files that the flags ask for. ids: of images and of categories by name, where the data set has its own."""
    curves = evaluation.miss_rate_curves(results) if args.output or args.plot else {}
    if args.output:
        write_json(args.output, metrics | {"miss_rate_curves": curves}, indent=2)
    own = () if ids is None else (ids[0], [ids[1].get(name) for name in results[0]["classes"]])
    for count, mode in enumerate(results[0]["detections"] if args.save_detections else ()):
        path = args.save_detections
        path = path if count == 0 else path.with_stem(f"{path.stem}-{mode}")
        write_detections(path, [result["detections"][mode] for result in results], *own)
        print(f"detections with {mode}: {path}")
    if args.plot:
        first = next((row for rows in curves.values() for row in rows), "no person among the classes")
        drawn = {mode: rows[first] for mode, rows in curves.items()}
        if len(curves) == 1:
            drawn = {f"{mode}, {row}": curve for mode, rows in curves.items() for row, curve in rows.items()}
        miss_rate_plot(args.plot, drawn, title=first.removesuffix(" all"))


def main(arguments: list[str] | None = None) -> None:
    """Print a detector's metrics. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    check_flags(args)
    device = distributed.start(args.device)
    limit = args.max_detections or (1000 if args.dataset == "kaist" else 100)
    results, dataset, source = detect(args, device, limit) if args.detections is None else read_results(args)
    if distributed.is_main():
        detection, agreement = evaluation.detection_metrics(results, limit), evaluation.alignment_metrics(results)
        miss_rates = evaluation.miss_rate_tables(results)
        print(source + evaluation.validation_text(detection | {"alignment": agreement}))
        print(f"(AP, recall: of the best {limit} detections per image and class)")
        if miss_rates:
            print(f"\n{miss_rate_text(miss_rates)}")
        by_script = evaluation.miss_rates_by_script(results) if args.miss_rate_script else {}
        for mode, rates in by_script.items():
            shown = ", ".join(f"{daytime} {'-' if rate is None else f'{rate:.2f}'}" for daytime, rate in rates.items())
            print(f"reasonable by the Python script in use, %, {mode}: {shown}")
        metrics = {"data": source, "detection": detection, "max_detections": limit, "alignment": agreement}
        metrics |= {"miss_rate": miss_rates, "miss_rate_script": by_script}
        write_files(args, results, metrics, getattr(dataset, "coco_ids", None))
        if args.worst:
            drawn = write_failures(args.worst[1], results, dataset, args.worst[0], limit, source)
            print(f"{args.worst[1] / 'worst.html'}: {drawn} pictures")
    distributed.stop()


if __name__ == "__main__":
    with one_sentence():
        main()
