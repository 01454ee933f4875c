"""Evaluate a detector with both cameras and with each alone.

python -m macl.evaluate --checkpoint runs/NAME/best.pt                            # new synthetic scenes
python -m macl.evaluate --checkpoint best.pt --dataset llvip --data-root LLVIP    # LLVIP's test split
python -m macl.evaluate --checkpoint best.pt --dataset llvip --data-root LLVIP --modality infrared
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from macl.build import load_detector
from macl.data import LLVIP, Plain, SyntheticPairs, make_loader
from macl.detector import PairedFasterRCNN
from macl.errors import InputError
from macl.metrics import alignment, average_precision, ignore_all_but, seen_in
from training import distributed
from training.arguments import fraction, make_parser, non_negative_int, positive_int
from training.errors import one_sentence

SCORE_THRESHOLD = 0.001  # for figures; below a detector's own, which is for looking at
AUTOCAST = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
SEEN = {"both": (True, True), "visible_only": (True, False), "infrared_only": (False, True)}


@torch.inference_mode()
def predict(
    detector: PairedFasterRCNN,
    dataset: Dataset,
    *,
    modes: dict[str, tuple[str, ...]],
    device: torch.device | str,
    batch_size: int = 4,
    workers: int = 0,
    amp: str = "none",
    score_threshold: float = SCORE_THRESHOLD,
) -> list[dict]:
    """What the detector finds in every image of a data set of paired samples, each image on exactly one process.

    modes: name -> modalities to detect with (see `PairedFasterRCNN.modes`); none to embed only. Features are computed
    once for all. -> on every process, one dict an image, in order: image_id, path, `found` (mode -> detections, on
    the CPU), `truth` (the
    boxes with labels, ignore and what else is known), and, of a detector with a contrastive head, `embeddings`:
    (visible, infrared), each (n, out_dim), of the boxes that are not ignored or of the image.
    """
    was_training = detector.training
    detector.eval()
    own = [[index] for index in range(distributed.rank(), len(dataset), distributed.world_size())]
    batches = [sum(own[i : i + batch_size], []) for i in range(0, len(own), batch_size)]
    dtype = AUTOCAST[amp]
    results = []
    for batch in make_loader(Plain(dataset), batches, workers=workers, device=device):
        images = {name: [image.to(device) for image in batch[name]] for name in ("visible", "infrared")}
        with torch.autocast(torch.device(device).type, dtype=dtype) if dtype else contextlib.nullcontext():
            extracted = detector.extract(images)
            found = {
                mode: [to_cpu(one) for one in detector.detect(extracted, names, score_threshold=score_threshold)]
                for mode, names in modes.items()
            }
            embeddings = embed(detector, extracted, batch["targets"]) if detector.macl is not None else None
        for i, truth in enumerate(batch["targets"]):
            result = {
                "image_id": batch["image_id"][i],
                "path": batch["path"][i],
                "found": {mode: detections[i] for mode, detections in found.items()},
                "truth": truth,
            }
            if embeddings is not None:
                result["embeddings"] = embeddings[i]
            results.append(result)
    detector.train(was_training)
    everyone = [result for part in distributed.gather_objects(results) for result in part]
    return sorted(everyone, key=lambda result: result["image_id"])


def to_cpu(detections: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in detections.items()}


def embed(detector: PairedFasterRCNN, extracted, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """The (visible, infrared) embeddings of each image's boxes that are not ignored, or of the image; on the CPU."""
    boxes = [target["boxes"][~target["ignore"]].to(extracted.pyramids["visible"][0].device) for target in targets]
    rows = [len(box) if detector.macl_level == "roi" else 1 for box in boxes]
    visible, infrared = (part.float().cpu().split(rows) for part in detector.embed(extracted, boxes))
    return list(zip(visible, infrared, strict=True))


def detection_figures(results: list[dict]) -> dict[str, dict]:
    """Mode -> ap50, ap75, ap, recall (fractions; None without boxes), and where the data set knows in which modality
    each box can be seen, ap50 of those alone: ap50_seen_in_both, ..._visible_only, ..._infrared_only."""
    truth = [result["truth"] for result in results]
    kinds = {}
    if truth and all("visible_in" in frame for frame in truth):
        for name, (visible, infrared) in SEEN.items():
            kinds[name] = ignore_all_but(truth, seen_in(truth, visible=visible, infrared=infrared))
    figures = {}
    for mode in results[0]["found"] if results else ():
        found = [result["found"][mode] for result in results]
        overall = average_precision(found, truth)
        figures[mode] = {name: overall[name] for name in ("ap50", "ap75", "ap", "recall")}
        for name, frames in kinds.items():
            figures[mode][f"ap50_seen_in_{name}"] = average_precision(found, frames)["ap50"]
    return figures


def alignment_figures(results: list[dict]) -> dict | None:
    """`metrics.alignment` of the boxes seen in both modalities, and r1, its mean R@1 of both directions.

    To be held against it, r1_seen_in_one: of the boxes seen in only one modality, in a gallery of their own, which tells
    what the registered context alone gives away. None without a contrastive head.
    """
    if not results or "embeddings" not in results[0]:
        return None
    visible, infrared = (torch.cat([result["embeddings"][i] for result in results]) for i in (0, 1))
    both = torch.cat([seen_in_both(result) for result in results])
    figures = alignment(visible[both], infrared[both])
    figures["r1"] = mean_recall(figures)
    figures["r1_seen_in_one"] = mean_recall(alignment(visible[~both], infrared[~both]))
    figures["gallery_seen_in_one"] = int((~both).sum())
    return figures


def seen_in_both(result: dict) -> Tensor:
    """(n,) bool, one a row of the result's embeddings; all True where the data set does not know."""
    rows = len(result["embeddings"][0])
    truth = result["truth"]
    known = "visible_in" in truth and rows == int((~truth["ignore"]).sum())
    return truth["visible_in"][~truth["ignore"]].all(dim=1) if known else torch.ones(rows, dtype=torch.bool)


def mean_recall(figures: dict) -> float | None:
    """Retrieval R@1, the mean of both directions; None where there is nothing to retrieve."""
    both = [figures["r1_visible_to_infrared"], figures["r1_infrared_to_visible"]]
    return None if None in both else sum(both) / 2


def table(figures: dict[str, dict]) -> str:
    """The modes' figures as aligned text, in percent, one mode a row."""
    columns = list(next(iter(figures.values())))
    titles = [name.replace("ap50_seen_in_", "AP50 seen in ").replace("_", " ").replace("ap", "AP") for name in columns]
    titles = ["AP50:95" if title == "AP" else title for title in titles]
    lines = ["  ".join(["detecting with", *titles])]
    for mode, values in figures.items():
        cells = ["-" if values[name] is None else f"{100 * values[name]:.1f}" for name in columns]
        lines.append(
            "  ".join([f"{mode:<14}", *(f"{cell:>{len(title)}}" for cell, title in zip(cells, titles, strict=True))])
        )
    return "\n".join(lines)


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
