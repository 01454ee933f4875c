"""Evaluate a detector with both cameras and with each alone, or the detections of somebody else's.

    python -m macl.evaluate --checkpoint runs/NAME/best.pt                            # new synthetic scenes
    python -m macl.evaluate --checkpoint best.pt --dataset llvip --data-root LLVIP    # LLVIP's test split
    python -m macl.evaluate --checkpoint best.pt --dataset kaist --data-root KAIST --annotations TEST.json
    python -m macl.evaluate --dataset kaist --detections FILE.txt --annotations TEST.json      # no model
    python -m macl.evaluate --checkpoint best.pt --misalign 2 4 8                     # infrared moved to the right

Average precision, and where occlusion and daytime are known (kaist, synthetic) the log-average miss rate.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset

from macl import data, evaluation
from macl.build import load_detector, read_checkpoint
from macl.metrics import could_count_from_zero, read_detections, write_detections
from macl.plots import miss_rate_plot
from trainkit import distributed
from trainkit.arguments import fraction, make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import InputError, one_sentence
from trainkit.files import write_json
from trainkit.tables import aligned

PEOPLE = ("person",)  # what a file of detections holds
DOMAINS = {"night": data.NIGHT, "day-and-night": data.DAY_AND_NIGHT}
NEEDS = [  # a flag, and another without which it has no effect
    ("--split", "--dataset llvip"), ("--image-set", "--dataset kaist"), ("--image-set", "--data-root"),
    ("--annotations", "--dataset kaist"), ("--detections", "--dataset kaist"), ("--domain", "--dataset synthetic"),
    ("--weights", "--checkpoint"), ("--modality", "--checkpoint"), ("--score-threshold", "--checkpoint"),
    ("--misalign", "--checkpoint"), ("--misalign-modality", "--misalign"), ("--first-id", "--detections"),
]  # fmt: skip
OUTPUTS = {"--save-detections": (".txt", ".json"), "--save-curve": (".json",), "--plot": (".png", ".pdf", ".svg")}
OUTPUTS["--output"] = None  # suffixes: any


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
    add("--score-threshold", type=fraction, metavar="X", help=f"lowest score (default: {evaluation.SCORE_THRESHOLD})")
    add("--max-detections", type=positive_int, metavar="N",
        help="most detections per image, also for AP (default: 100; kaist: 1000, as its miss rate)")
    add("--misalign", type=int, nargs="+", metavar="PX", help="also with one modality moved to the right")
    add("--misalign-modality", choices=("visible", "infrared"), help="which one (default: infrared)")
    add("--batch-size", type=positive_int, default=4, metavar="N", help="images at once")
    add("--workers", type=non_negative_int, default=2, metavar="N", help="loading processes")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the forward pass")
    add = parser.add_argument_group("what to write").add_argument
    add("--output", metavar="FILE", help="all metrics as json")
    add("--save-detections", metavar="FILE", help=".txt or .json; of each camera alone in FILE-visible.txt, ...")
    add("--save-curve", metavar="FILE.json", help="miss rate over false positives per image")
    add("--plot", metavar="FILE.png", help="the same as a picture (.png, .pdf, .svg); needs the viz extra")
# fmt: on


def check_flags(args: argparse.Namespace) -> None:
    """Refuses what would have no effect, and places that cannot be written, before the long part."""
    given = {"--" + name.replace("_", "-"): value for name, value in vars(args).items() if value is not None}
    known = {*given, f"--dataset {args.dataset}"}
    if ("--checkpoint" in given) == ("--detections" in given):
        raise InputError("expected either --checkpoint PATH or --detections FILE")
    for flag, needed in NEEDS:
        if flag in given and needed not in known:
            raise InputError(f"{flag} needs {needed}: it does nothing without")
    if args.dataset == "synthetic" and args.data_root is not None:
        raise InputError("--data-root needs --dataset llvip or kaist")
    if args.dataset != "synthetic" and args.data_root is None and not {"--detections", "--annotations"} <= known:
        also = ", or --annotations FILE.json alone" if "--detections" in given else ""
        raise InputError(f"--dataset {args.dataset} needs --data-root, the data set's own root{also}")
    for flag in filter(given.get, OUTPUTS):
        path, suffixes = Path(given[flag]), OUTPUTS[flag]
        if suffixes and path.suffix not in suffixes:
            raise InputError(f"{flag} {path}: expected a name that ends in {' or '.join(suffixes)}")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{flag} {path}: the folder {path.parent} does not exist")
        if flag in ("--save-curve", "--plot") and args.dataset == "llvip":
            raise InputError(f"{flag}: LLVIP's annotations do not know occlusion, so there is no miss rate")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which the viz extra brings: pip install -e '.[viz]'")


def open_dataset(args: argparse.Namespace, classes: tuple[str, ...], script: str | None = None) -> Dataset:
    """The data set with a detector's classes, one of which occurs in it. script: which one trained the detector."""
    if args.dataset == "synthetic":
        domain = args.domain or ("day-and-night" if script == "stage2" else "night")
        dataset = data.SyntheticPairs(args.count, args.seed, domain=DOMAINS[domain], classes=classes)
    elif args.dataset == "llvip":
        dataset = data.LLVIP(args.data_root, args.split or "test", classes=classes)
    else:
        dataset = data.KAIST(args.data_root, args.image_set or "test-all-20", args.annotations, classes=classes)
    data.refuse_absent_classes(dataset, every=False)
    return dataset


def read_results(args: argparse.Namespace) -> tuple[list[dict], str]:
    """The file of --detections beside the ground truth, as `predict` gives its results, and what was read."""
    if args.data_root is None:
        frames, source = data.read_ground_truth(args.annotations)
    else:
        dataset = open_dataset(args, PEOPLE)
        frames, source = dataset.ground_truth(), dataset.source
    outputs = read_detections(args.detections, len(frames), first_id=args.first_id)
    categories = sorted({int(label) for frame in outputs for label in frame["labels"].unique()})
    if len(categories) > 1:
        raise InputError(f"{args.detections} holds the categories {categories}; expected detections of people alone")
    source += f"\ndetections of {args.detections}: {sum(len(frame['scores']) for frame in outputs)}"
    if args.first_id is None and could_count_from_zero(args.detections, len(frames)):
        source += "; its image ids are taken to count from 1 but would fit 0 as well: --first-id settles it"
    results = []
    for frame, detections in zip(frames, outputs, strict=True):
        detections = {Path(args.detections).stem: detections | {"labels": torch.ones_like(detections["labels"])}}
        results.append({"size": frame["size"], "classes": PEOPLE, "detections": detections, "ground_truth": frame})
    return results, source


def detect(args: argparse.Namespace, device: torch.device, max_detections: int) -> tuple[list[dict], str, list[dict]]:
    """The results of the checkpoint, what was read, and the metrics for --misalign (none: empty)."""
    checkpoint = read_checkpoint(args.checkpoint)
    detector = load_detector(args.checkpoint, weights=args.weights or "ema", checkpoint=checkpoint).to(device)
    detector.roi_head.max_detections = max_detections
    classes, modes = detector.kwargs["classes"], detector.modes
    if len(classes) > 1 and str(args.save_detections).endswith(".txt"):
        raise InputError(f"--save-detections {args.save_detections}: lines know no class, this detector has several")
    if args.modality not in (None, "all"):
        if args.modality not in modes:
            raise InputError(f"--modality {args.modality}: this detector can only see with {', '.join(modes)}")
        modes = {args.modality: modes[args.modality]}
    if args.misalign is not None and "both" not in modes:
        raise InputError(f"--misalign needs detections with both modalities, not with {', '.join(modes)} alone")
    dataset = open_dataset(args, classes, checkpoint.get("script"))
    options = {name: getattr(args, name) for name in ("batch_size", "workers", "amp")} | {"device": device}
    if args.score_threshold is not None:
        options["score_threshold"] = args.score_threshold
    results = evaluation.predict(detector, dataset, modes=modes, **options)
    misaligned = []
    if args.misalign is not None:
        moved = args.misalign_modality or "infrared"
        other = "infrared" if moved == "visible" else "visible"
        misaligned.append(misalignment_row("0 pixels", 0, results, "both", max_detections))
        for pixels in args.misalign:
            shifted = data.MisalignedDataset(dataset, modality=moved, pixels=pixels)
            outputs = evaluation.predict(detector, shifted, modes={"both": modes["both"]}, **options)
            misaligned.append(misalignment_row(f"{pixels} pixels", pixels, outputs, "both", max_detections))
        if other in modes:  # what a fusion has to beat
            misaligned.append(misalignment_row(f"{other} alone", None, results, other, max_detections))
    return results, dataset.source, misaligned


def misalignment_row(name: str, pixels: int | None, results: list[dict], mode: str, max_detections: int) -> dict:
    """AP50 (fraction) and, where it is known, the miss rate of reasonable (percent) of one mode."""
    results = [result | {"detections": {mode: result["detections"][mode]}} for result in results]
    ap50 = evaluation.detection_metrics(results, max_detections)[mode]["ap50"]
    rates = evaluation.miss_rate_metrics(results)
    row = {"name": name, "pixels": pixels, "ap50": ap50}
    return row | {"miss_rate": rates[mode]["reasonable all"]} if rates else row


def misalignment_text(rows: list[dict], modality: str) -> str:
    lines = [[f"{modality} moved right by", "AP50", "log-average miss rate"]]
    for row in rows:
        ap50 = None if row["ap50"] is None else 100 * row["ap50"]
        lines.append([row["name"], cell(ap50), cell(row.get("miss_rate"))])
    return aligned(lines if "miss_rate" in rows[0] else [line[:2] for line in lines])


def miss_rate_text(tables: dict[str, dict[str, dict]]) -> str:
    """The `miss_rate_tables` as text, one of the ten rows per line, each miss rate with the final recall beside it."""
    titles = [title for mode in tables for title in (mode, "recall")]
    lines = [["log-average miss rate, %", *titles, "people", "frames"]]
    for row, counts in next(iter(tables.values())).items():
        cells = [cell(rows[row][key]) for rows in tables.values() for key in ("miss_rate", "recall")]
        lines.append([row, *cells, str(counts["boxes"]), str(counts["frames"])])
    return aligned(lines)


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_files(args: argparse.Namespace, results: list[dict], metrics: dict) -> None:
    """The files that the flags ask for."""
    if args.output:
        write_json(args.output, metrics, indent=2)
    for count, mode in enumerate(results[0]["detections"] if args.save_detections else ()):
        path = Path(args.save_detections)
        path = path if count == 0 else path.with_stem(f"{path.stem}-{mode}")
        write_detections(path, [result["detections"][mode] for result in results])
        print(f"detections with {mode}: {path}")
    curves = evaluation.miss_rate_curves(results) if args.save_curve or args.plot else {}
    if args.save_curve:
        write_json(args.save_curve, curves)
    if args.plot:
        drawn = {mode: rows["reasonable all"] for mode, rows in curves.items()}
        if len(curves) == 1:
            drawn = {f"{mode}, {row}": curve for mode, rows in curves.items() for row, curve in rows.items()}
        miss_rate_plot(args.plot, drawn, title="reasonable")


def main(arguments: list[str] | None = None) -> None:
    """`python -m macl.evaluate`: print a detector's metrics; `arguments` without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    check_flags(args)
    device = distributed.start(args.device)
    limit = args.max_detections or (1000 if args.dataset == "kaist" else 100)
    if args.detections is None:
        results, source, misaligned = detect(args, device, limit)
    else:
        (results, source), misaligned = read_results(args), []
    if distributed.is_main():
        detection, agreement = evaluation.detection_metrics(results, limit), evaluation.alignment_metrics(results)
        miss_rates = evaluation.miss_rate_tables(results)
        print(source + evaluation.validation_text(detection | {"alignment": agreement}))
        print(f"(AP, recall: of the best {limit} detections per image and class)")
        if miss_rates:
            print(f"\n{miss_rate_text(miss_rates)}")
        if misaligned:
            print(f"\n{misalignment_text(misaligned, args.misalign_modality or 'infrared')}")
        metrics = {"data": source, "detection": detection, "max_detections": limit, "alignment": agreement}
        write_files(args, results, metrics | {"miss_rate": miss_rates, "misalign": misaligned})
    distributed.stop()


if __name__ == "__main__":
    with one_sentence():
        main()
