"""Evaluate a detector with both cameras and with each alone.

python -m macl.evaluate --checkpoint runs/NAME/best.pt                            # new synthetic scenes
python -m macl.evaluate --checkpoint best.pt --dataset llvip --data-root LLVIP    # LLVIP's test split
python -m macl.evaluate --checkpoint best.pt --dataset llvip --data-root LLVIP --modality infrared
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import Dataset

from macl.build import load_detector
from macl.data import LLVIP, SyntheticPairs
from macl.detector import PairedFasterRCNN
from macl.errors import InputError
from macl.validation import AUTOCAST, SCORE_THRESHOLD, alignment_figures, detection_figures, predict, table
from training import distributed
from training.arguments import fraction, make_parser, non_negative_int, positive_int
from training.errors import one_sentence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    weights = "averaged (EMA) weights where there are any, or the raw ones"
    model.add_argument("--weights", choices=("ema", "raw"), default="ema", help=weights)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=("llvip", "synthetic"), default="synthetic", help="which data set")
    data.add_argument("--data-root", metavar="PATH", help="the data set's own root (llvip)")
    data.add_argument("--split", choices=("train", "test"), default="test", help="llvip: which split")
    data.add_argument("--count", type=positive_int, default=200, metavar="N", help="synthetic: number of scenes")
    data.add_argument(
        "--seed", type=non_negative_int, default=20_000, metavar="N", help="synthetic: seed of the scenes"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--modality", choices=("all", "both", "visible", "infrared"), default="all", help="what to detect with"
    )
    run.add_argument("--score-threshold", type=fraction, default=SCORE_THRESHOLD, metavar="X", help="lowest score kept")
    run.add_argument("--max-detections", type=positive_int, default=100, metavar="N", help="most detections an image")
    run.add_argument("--batch-size", type=positive_int, default=4, metavar="N", help="images at once")
    run.add_argument("--workers", type=non_negative_int, default=2, metavar="N", help="loading processes")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the forward pass")
    run.add_argument("--output", metavar="FILE", help="also write the figures to this json file")


def open_dataset(args: argparse.Namespace) -> Dataset:
    if args.dataset == "synthetic":
        return SyntheticPairs(args.count, args.seed)
    if args.data_root is None:
        raise InputError(f"--dataset {args.dataset} needs --data-root, the data set's own root")
    return LLVIP(args.data_root, args.split)


def chosen_modes(detector: PairedFasterRCNN, modality: str) -> dict[str, tuple[str, ...]]:
    if modality != "all" and modality not in detector.modes:
        raise InputError(f"--modality {modality}: this detector can only see with {', '.join(detector.modes)}")
    return detector.modes if modality == "all" else {modality: detector.modes[modality]}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    device = distributed.start(args.device)
    detector = load_detector(args.checkpoint, weights=args.weights).to(device)
    detector.roi_head.max_detections = args.max_detections
    dataset = open_dataset(args)
    results = predict(
        detector,
        dataset,
        modes=chosen_modes(detector, args.modality),
        device=device,
        batch_size=args.batch_size,
        workers=args.workers,
        amp=args.amp,
        score_threshold=args.score_threshold,
    )
    figures, agreement = detection_figures(results), alignment_figures(results)
    if distributed.is_main():
        print(dataset.source)
        print(table(figures))
        if agreement is not None and agreement["r1"] is not None:
            print(f"cross-modal retrieval R@1 {agreement['r1']:.3f} among {agreement['gallery']} boxes seen in both")
        if args.output:
            Path(args.output).write_text(
                json.dumps({"data": dataset.source, "detection": figures, "alignment": agreement}, indent=2) + "\n",
                encoding="utf-8",
            )
    distributed.stop()


if __name__ == "__main__":
    with one_sentence(InputError):
        main()
