"""Evaluate a detector with both cameras and with each alone, or the detections of somebody else's.

    python -m macl.evaluate --checkpoint runs/NAME/best.pt                            # new synthetic scenes
    python -m macl.evaluate --checkpoint best.pt --dataset llvip --data-root LLVIP    # LLVIP's test split
    python -m macl.evaluate --checkpoint best.pt --dataset kaist --data-root KAIST --annotations TEST.json
    python -m macl.evaluate --dataset kaist --detections FILE.txt --annotations TEST.json      # no model
    python -m macl.evaluate --checkpoint best.pt --misalign 2 4 8                     # infrared moved to the right

Average precision, and where occlusion and daytime are known (kaist, synthetic) the log-average miss rate.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset

from macl.build import load_detector
from macl.data import DAY_AND_NIGHT, KAIST, LLVIP, NIGHT, SyntheticPairs, read_ground_truth, refuse_absent_classes
from macl.detector import PairedFasterRCNN
from macl.metrics import could_count_from_zero, read_detections, write_detections
from macl.misalignment import misalignment_figures, misalignment_text
from macl.plots import miss_rate_plot
from macl.validation import (
    PEOPLE,
    SCORE_THRESHOLD,
    alignment_metrics,
    detection_metrics,
    miss_rate_curves,
    miss_rate_tables,
    miss_rate_text,
    predict,
    table,
)
from macl.weights import read_state
from trainkit import distributed
from trainkit.arguments import fraction, make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import InputError, one_sentence
from trainkit.files import write_json

DOMAINS = {"night": NIGHT, "day-and-night": DAY_AND_NIGHT}
ONE_DATASET = {"split": "llvip", "image_set": "kaist", "annotations": "kaist", "detections": "kaist"}
ONE_DATASET |= {"domain": "synthetic"}
NEED_MODEL = ("weights", "modality", "score_threshold", "misalign")  # no use with --detections
SUFFIXES = {"save_detections": (".txt", ".json"), "save_curve": (".json",), "plot": (".png", ".pdf", ".svg")}


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m macl.evaluate`."""
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", metavar="PATH", help="best.pt or last.pt of a run")
    add("--weights", choices=("ema", "raw"), help="averaged (EMA) weights where there are any (default), or raw ones")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("kaist", "llvip", "synthetic"), default="synthetic", help="which data set")
    add("--data-root", metavar="PATH", help="the data set's own root (kaist, llvip)")
    add("--split", choices=("train", "test"), help="llvip: which split (default: test)")
    add("--image-set", metavar="NAME", help="kaist: a list in its imageSets, or a list's path (default: test-all-20)")
    add("--annotations", metavar="PATH", help="kaist: folder or json of annotations (default: the root's own)")
    add("--count", type=positive_int, default=200, metavar="N", help="synthetic: number of scenes")
    add("--seed", type=non_negative_int, default=20_000, metavar="N", help="synthetic: seed of the scenes")
    add("--domain", choices=tuple(DOMAINS), help="synthetic: which scenes (default: those of the checkpoint's stage)")
    add = parser.add_argument_group("somebody else's detections").add_argument
    add("--detections", metavar="FILE", help="kaist: .txt or .json, of one class, instead of a checkpoint")
    add("--first-id", type=int, choices=(0, 1), help="what its image ids count from (default: 1; json: 0 if it occurs)")
    add = parser.add_argument_group("run").add_argument
    add("--modality", choices=("all", "both", "visible", "infrared"), help="what to detect with (default: all)")
    add("--score-threshold", type=fraction, metavar="X", help=f"lowest score kept (default: {SCORE_THRESHOLD})")
    add("--max-detections", type=positive_int, metavar="N",
        help="most detections an image, and looked at by AP (default: 100; kaist: 1000, as its miss rate)")
    add("--misalign", type=int, nargs="+", metavar="PX", help="also with one modality so many pixels further right")
    add("--misalign-modality", choices=("visible", "infrared"), help="which one (default: infrared)")
    add("--batch-size", type=positive_int, default=4, metavar="N", help="images at once")
    add("--workers", type=non_negative_int, default=2, metavar="N", help="loading processes")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the forward pass")
    add = parser.add_argument_group("what to write").add_argument
    add("--output", metavar="FILE", help="all figures as json")
    add("--save-detections", metavar="FILE", help=".txt or .json; of each camera alone in FILE-visible.txt, ...")
    add("--save-curve", metavar="FILE.json", help="miss rate over false positives per image")
    add("--plot", metavar="FILE.png", help="the same as a picture (.png, .pdf, .svg); needs the viz extra")
# fmt: on


def check_flags(args: argparse.Namespace) -> None:
    """Refuses what would have no effect, and places that cannot be written, before the long part."""
    if (args.checkpoint is None) == (args.detections is None):
        raise InputError("expected either --checkpoint PATH or --detections FILE")
    for name, dataset in ONE_DATASET.items():
        if getattr(args, name) is not None and args.dataset != dataset:
            raise InputError(f"{flag(name)} is for --dataset {dataset}, not for {args.dataset}")
    if args.detections is not None:
        for name in NEED_MODEL:
            if getattr(args, name) is not None:
                raise InputError(f"{flag(name)} needs a model: it does nothing with --detections")
        if args.data_root is None and (args.annotations is None or args.image_set is not None):
            raise InputError("--detections needs --annotations FILE.json alone, or --data-root")
    elif args.dataset != "synthetic" and args.data_root is None:
        raise InputError(f"--dataset {args.dataset} needs --data-root, the data set's own root")
    if args.dataset == "synthetic" and args.data_root is not None:
        raise InputError("--data-root needs --dataset llvip or kaist")
    if args.first_id is not None and args.detections is None:
        raise InputError("--first-id is for the file of --detections")
    if args.misalign_modality is not None and args.misalign is None:
        raise InputError("--misalign-modality needs --misalign PX")
    check_outputs(args)


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError where a file that is to be written has a name or a data set that does not fit."""
    for name, suffixes in SUFFIXES.items():
        path = getattr(args, name)
        if path is not None and Path(path).suffix not in suffixes:
            raise InputError(f"{flag(name)} {path}: expected a name that ends in {' or '.join(suffixes)}")
        if path is not None and name != "save_detections" and args.dataset == "llvip":
            raise InputError(f"{flag(name)}: LLVIP's annotations do not know occlusion, so there is no miss rate")
    for name in ("output", *SUFFIXES):
        path = getattr(args, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"{flag(name)} {path}: the folder {Path(path).parent} does not exist")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which the viz extra brings: pip install -e '.[viz]'")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def open_dataset(args: argparse.Namespace, classes: Sequence[str]) -> Dataset:
    """The data set with a detector's classes, one of which occurs in it."""
    if args.dataset == "synthetic":
        domain = args.domain or ("day-and-night" if read_state(args.checkpoint).get("script") == "stage2" else "night")
        dataset = SyntheticPairs(args.count, args.seed, domain=DOMAINS[domain], classes=classes)
    elif args.dataset == "llvip":
        dataset = LLVIP(args.data_root, args.split or "test", classes=classes)
    else:
        dataset = KAIST(args.data_root, args.image_set or "test-all-20", args.annotations, classes=classes)
    refuse_absent_classes(dataset, every=False)
    return dataset


def chosen_modes(detector: PairedFasterRCNN, modality: str) -> dict[str, tuple[str, ...]]:
    if modality != "all" and modality not in detector.modes:
        raise InputError(f"--modality {modality}: this detector can only see with {', '.join(detector.modes)}")
    return detector.modes if modality == "all" else {modality: detector.modes[modality]}


def read_results(args: argparse.Namespace) -> tuple[list[dict], str]:
    """The file of --detections beside the ground truth, as `predict` gives its results, and what was read."""
    if args.data_root is None:
        truth, source = read_ground_truth(args.annotations)
    else:
        dataset = open_dataset(args, PEOPLE)
        truth, source = dataset.ground_truth(), dataset.source
    found = read_detections(args.detections, len(truth), first_id=args.first_id)
    categories = sorted({int(label) for frame in found for label in frame["labels"].unique()})
    if len(categories) > 1:
        raise InputError(f"{args.detections} holds the categories {categories}; expected detections of people alone")
    source += f"\ndetections of {args.detections}: {sum(len(frame['scores']) for frame in found)}"
    if args.first_id is None and could_count_from_zero(args.detections, len(truth)):
        source += "; its image ids are taken to count from 1 but would fit 0 as well: --first-id settles it"
    mode = Path(args.detections).stem
    results = []
    for frame, detections in zip(truth, found, strict=True):
        detections = detections | {"labels": torch.ones_like(detections["labels"])}
        results.append({"size": frame["size"], "found": {mode: detections}, "truth": frame})
    return results, source


def detect(args: argparse.Namespace, device: torch.device, most: int) -> tuple[list[dict], str, list[dict]]:
    """The results of the checkpoint, what was read, and the figures for --misalign (none: empty)."""
    detector = load_detector(args.checkpoint, weights=args.weights or "ema").to(device)
    detector.roi_head.max_detections = most
    classes = detector.kwargs["classes"]
    if len(classes) > 1 and str(args.save_detections).endswith(".txt"):
        raise InputError(f"--save-detections {args.save_detections}: lines know no class, this detector has several")
    modes = chosen_modes(detector, args.modality or "all")
    if args.misalign is not None and "both" not in modes:
        raise InputError(f"--misalign needs detections with both modalities, not with {', '.join(modes)} alone")
    dataset = open_dataset(args, classes)
    run = {name: getattr(args, name) for name in ("batch_size", "workers", "amp")} | {"device": device}
    run["score_threshold"] = SCORE_THRESHOLD if args.score_threshold is None else args.score_threshold
    results = predict(detector, dataset, modes=modes, **run)
    lines = []
    if args.misalign is not None:
        moved = args.misalign_modality or "infrared"
        run |= {"modality": moved, "pixels": args.misalign, "most": most}
        lines = misalignment_figures(detector, dataset, results, **run)
    return results, dataset.source, lines


def write_files(args: argparse.Namespace, results: list[dict], figures: dict) -> None:
    """Whatever files the flags ask for: figures, the detections of every mode, the curve of the miss rate."""
    if args.output:
        write_json(args.output, figures, indent=2)
    for count, mode in enumerate(results[0]["found"] if args.save_detections else ()):
        path = Path(args.save_detections)
        path = path if count == 0 else path.with_stem(f"{path.stem}-{mode}")
        write_detections(path, [result["found"][mode] for result in results])
        print(f"detections with {mode}: {path}")
    if args.save_curve or args.plot:
        curves = miss_rate_curves(results)
        if args.save_curve:
            write_json(args.save_curve, curves)
        if args.plot:
            drawn = {mode: rows["reasonable all"] for mode, rows in curves.items()}
            if len(curves) == 1:
                drawn = {f"{mode}, {row}": curve for mode, rows in curves.items() for row, curve in rows.items()}
            miss_rate_plot(args.plot, drawn, title="reasonable")


def main(arguments: list[str] | None = None) -> None:
    """`python -m macl.evaluate`: print a detector's figures; `arguments` without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    check_flags(args)
    device = distributed.start(args.device)
    most = args.max_detections or (1000 if args.dataset == "kaist" else 100)
    if args.detections is None:
        results, source, misaligned = detect(args, device, most)
    else:
        (results, source), misaligned = read_results(args), []
    if distributed.is_main():
        detection, agreement = detection_metrics(results, most), alignment_metrics(results)
        miss_rates = miss_rate_tables(results)
        print(source)
        print(table(detection, most))
        if agreement is not None and agreement["r1"] is not None:
            print(f"cross-modal retrieval R@1 {agreement['r1']:.3f} among {agreement['gallery']} boxes seen in both")
        if miss_rates:
            print(f"\n{miss_rate_text(miss_rates)}")
        if misaligned:
            print(f"\n{misalignment_text(misaligned, args.misalign_modality or 'infrared')}")
        figures = {"data": source, "detection": detection, "max_detections": most, "alignment": agreement}
        write_files(args, results, figures | {"miss_rate": miss_rates, "misalign": misaligned})
    distributed.stop()


if __name__ == "__main__":
    with one_sentence():
        main()
