"""Detect objects in pairs of images or videos, or with one camera alone, and draw them.

    python -m macl.predict --checkpoint runs/NAME/best.pt --visible v.jpg --infrared i.jpg --output out
    python -m macl.predict --checkpoint best.pt --visible VISIBLE_DIR --infrared INFRARED_DIR --output out
    python -m macl.predict --checkpoint best.pt --infrared INFRARED_DIR --output out
    python -m macl.predict --checkpoint best.pt --visible v.mp4 --infrared i.mp4 --offset 0.4 --output out

Writes one picture per pair, both modalities side by side, or annotated.mp4, and detections.json. Ctrl-C ends after the
frame at hand, and what was written is whole.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from macl.backbone import MODALITIES
from macl.build import load_detector, read_checkpoint
from macl.data import find_pairs, moved, read_pair, to_float
from macl.data.onto import Onto
from macl.explain import explain, has_reasons
from macl.plots import draw_detections
from macl.training import add_reading_flags, add_registration_flags, choose_move, choose_reading, onto_of
from macl.video import Videos
from trainkit.arguments import finite_float, fraction, make_parser, non_negative_float
from trainkit.errors import InputError, one_line, one_sentence
from trainkit.files import is_image, whole_file, write_json_rows, writing
from trainkit.signals import Signals
from trainkit.video import video_writer

RIG = (0, 200, 10)  # of the pairs of a video, those that --register rig reads: start, stop, step
VIDEO = "annotated.mp4"
NO_PAIRS = "no frame came, or none of both within --tolerance; --offset says how much later infrared began"


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m macl.predict`."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    add("--visible", metavar="FILE_OR_DIR", help="visible image or video, or a folder of images")
    add("--infrared", metavar="FILE_OR_DIR", help="infrared image or video, or a folder with the same names")
    add("--output", required=True, metavar="DIR", help="folder for the pictures and detections.json")
    add("--min-score", type=fraction, default=0.3, metavar="X", help="lowest score written and drawn")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged weights if any, or raw ones")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--offset", type=finite_float, metavar="SECONDS",
        help="videos: so much later than visible did infrared begin (0)")
    add("--tolerance", type=non_negative_float, metavar="SECONDS",
        help="videos: most time between the frames of a pair (half a frame of the faster camera)")
    add("--explain", action="store_true", help="show which camera alone finds each box, and where MSP looks")
    add_reading_flags(add)
    add_registration_flags(add)
    parser.set_defaults(boxes=None)
# fmt: on


def open_source(args: argparse.Namespace, onto: Onto) -> "Images | Videos":
    """What the flags name, infrared read by `onto`. Raises InputError for what is missing or does not go together."""
    given = {name: getattr(args, name) for name in ("visible", "infrared") if getattr(args, name) is not None}
    if not given:
        raise InputError("give --visible, --infrared or both")
    if len(given) == 1 and args.register != "none":
        raise InputError("--register needs --visible and --infrared")
    video = {name: os.path.isfile(path) and not is_image(path) for name, path in given.items()}
    if len(set(video.values())) > 1:
        names = [f"{path} is {'a video' if video[name] else 'none'}" for name, path in given.items()]
        raise InputError(f"{' and '.join(names)}; expected images from both cameras, or videos from both")
    for flag in ("offset", "tolerance"):
        if getattr(args, flag) is not None and not (all(video.values()) and len(given) == 2):
            raise InputError(f"--{flag} needs two videos, --visible and --infrared")
    if not any(video.values()):
        pairs = find_pairs(args.visible, args.infrared, args.suffixes or ("", ""))
        return Images(list(pairs.values()), onto)
    return Videos(given, onto, offset=args.offset or 0.0, tolerance=args.tolerance)


class Images:
    """Pairs of image files, with the interface of `Videos`."""

    def __init__(self, pairs: list[tuple[Path | None, Path | None]], onto: Onto):
        self.pairs, self.onto, self.total = pairs, onto, len(pairs)

    def __iter__(self) -> Iterator[tuple[dict, dict, dict]]:
        for pair in self.pairs:
            paths = {name: path for name, path in zip(MODALITIES, pair, strict=True) if path is not None}
            yield read_pair(*pair, self.onto), paths, {}


def register(args: argparse.Namespace, source: Images | Videos, trained: str):
    """What `choose_move` returns for this source; of videos the first pairs are read."""
    if isinstance(source, Images):
        return choose_move(args, source.pairs, trained, read=lambda pair: read_pair(*pair, source.onto))
    first = [sample for sample, *_ in islice(source, *RIG)] if args.register == "rig" else []
    if args.register == "rig" and not first:
        raise InputError(NO_PAIRS)
    return choose_move(args, first, trained)


def named(detections: dict, classes: Sequence[str], evidence: dict) -> list[dict]:
    """The detections of an image as json has them. evidence: see `explain`."""
    rows = [
        {"box": [round(side, 2) for side in box], "class": classes[label - 1], "score": round(score, 4)}
        for box, label, score in zip(*(detections[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
    ]
    for name, scores in evidence.items():
        for row, score in zip(rows, scores.tolist(), strict=True):
            row[f"score_{name}_alone"] = round(score, 4)
    return rows


def relative(paths: dict, output: Path, as_is: bool) -> dict:
    """Paths as seen from detections.json, of the images in whose pixels the boxes are. as_is: infrared stays."""
    fitting = {name: path for name, path in paths.items() if as_is or name == "visible" or len(paths) == 1}
    return {name: os.path.relpath(os.path.realpath(path), os.path.realpath(output)) for name, path in fitting.items()}


def detected(args, source: Images | Videos, move, detector, output: Path, signals: Signals) -> Iterator[dict]:
    """Detect and draw until the end or a signal; -> what json says of each picture."""
    video, classes = isinstance(source, Videos), detector.kwargs["classes"]
    as_is, start = not source.onto.places and move == (0, 0), None
    file = video_writer(output / VIDEO, source.rate) if video else contextlib.nullcontext()
    with file as add_frame:
        for sample, paths, stamp in tqdm(source, total=source.total, unit="frame", disable=None if video else True):
            if signals.received is not None:
                break
            sample = moved(sample, move) if len(paths) == 2 else sample
            images = {name: [to_float(image).to(args.device)] for name, image in sample.items() if image is not None}
            detections, reasons = explain(detector, images) if args.explain else (detector(**images)[0], {})
            shown = dict(detections=detections, classes=classes, min_score=args.min_score)
            picture = draw_detections(**sample, **shown, **reasons)
            path = Path(next(iter(paths.values())))
            if video:
                start = stamp["time"] if start is None else start
                add_frame(np.asarray(picture), stamp["time"] - start)
            else:
                with whole_file(output / f"{path.stem}.png") as file:
                    picture.save(file, "PNG")
                print(f"{one_line(path.stem, 80)}: {len(detections['scores'])} found")
            found = {"detections": named(detections, classes, reasons.get("evidence", {}))}
            yield {"image": str(path)} | relative(paths, output, as_is) | stamp | found
        else:
            if video and start is None:
                raise InputError(NO_PAIRS)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Detect in pictures, draw them and write detections.json. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    checkpoint = read_checkpoint(args.checkpoint)
    detector = load_detector(args.checkpoint, weights=args.weights, checkpoint=checkpoint).to(args.device)
    trained = checkpoint.get("reading")
    if None in (args.visible, args.infrared) and isinstance(trained, dict):  # one camera is put onto no other
        trained = trained | {"infrared_to_visible": None}
    reading, about = choose_reading(args, None, trained)
    source, needed = open_source(args, onto_of(reading)), detector.fusion.kind
    if needed in MODALITIES and getattr(args, needed) is None:
        raise InputError(f"this detector sees with {needed} images alone: give --{needed}")
    if args.explain and not has_reasons(detector, len([name for name in MODALITIES if getattr(args, name)])):
        raise InputError("--explain: this detector has nothing to show of one camera: no MSP, or one with a gate of 0")
    detector.roi_head.score_threshold = args.min_score
    move, _, messages = register(args, source, checkpoint.get("register", "none"))
    for message in about + messages:
        print(message)
    output = Path(args.output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Signals() as signals:
        rows = detected(args, source, move, detector, output, signals)
        count = write_json_rows(output / "detections.json", rows)
    what = f"{count} picture{'s' * (count != 1)}"
    if isinstance(source, Videos):
        print(f"{source.summary(count)}; {count / (time.perf_counter() - started):.1f} frames a second")
        what = VIDEO
    print(f"wrote {what} and detections.json to {output}")
    if signals.received is not None:
        print("interrupted; what was written is whole up to there", file=sys.stderr)
        raise SystemExit(signals.exit_status)


if __name__ == "__main__":
    with one_sentence():
        main()
