"""Detect objects in image pairs, or with one camera alone, and draw them.

    python -m macl.predict --checkpoint runs/NAME/best.pt --visible v.jpg --infrared i.jpg --output out
    python -m macl.predict --checkpoint best.pt --visible VISIBLE_DIR --infrared INFRARED_DIR --output out
    python -m macl.predict --checkpoint best.pt --infrared INFRARED_DIR --output out

Writes one picture per pair, both modalities side by side, and detections.json.
"""

from pathlib import Path

import torch

from macl.build import load_detector, read_checkpoint
from macl.data import find_pairs, moved, read_pair, to_float
from macl.plots import draw_detections
from macl.training import add_reading_flags, add_registration_flags, choose_move, choose_reading, onto_of
from trainkit.arguments import fraction, make_parser
from trainkit.errors import InputError, one_line, one_sentence
from trainkit.files import whole_file, write_json


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Detect in pictures, draw them and write detections.json. arguments: without the program's name."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    parser.add_argument("--visible", metavar="FILE_OR_DIR", help="visible image, or a folder of them")
    parser.add_argument("--infrared", metavar="FILE_OR_DIR", help="infrared image, or a folder with the same names")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures and detections.json")
    parser.add_argument("--min-score", type=fraction, default=0.3, metavar="X", help="lowest score written and drawn")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged weights if any, or raw ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_reading_flags(parser.add_argument)
    add_registration_flags(parser.add_argument)
    parser.set_defaults(boxes=None)
    args = parser.parse_args(arguments)
    given = [name for name in ("visible", "infrared") if getattr(args, name) is not None]
    if not given:
        raise InputError("give --visible, --infrared or both")
    if len(given) == 1 and args.register != "none":
        raise InputError("--register needs --visible and --infrared")
    checkpoint = read_checkpoint(args.checkpoint)
    detector = load_detector(args.checkpoint, weights=args.weights, checkpoint=checkpoint).to(args.device)
    needed = detector.fusion.kind
    if needed in ("visible", "infrared") and needed not in given:
        raise InputError(f"this detector sees with {needed} images alone: give --{needed}")
    detector.roi_head.score_threshold = args.min_score
    pairs = find_pairs(args.visible, args.infrared, args.suffixes or ("", ""))
    reading, about = choose_reading(args, None, checkpoint.get("reading"))
    onto = onto_of(reading)
    move, _, messages = choose_move(
        args, pairs, checkpoint.get("register", "none"), read=lambda pair: read_pair(*pair, onto)
    )
    for message in about + messages:
        print(message)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    classes, written = detector.kwargs["classes"], []
    for visible, infrared in pairs:
        path = visible or infrared
        sample = read_pair(visible, infrared, onto)
        sample = moved(sample, move) if len(given) == 2 else sample
        images = {name: [to_float(image).to(args.device)] for name, image in sample.items() if image is not None}
        detections = detector(**images)[0]
        picture = draw_detections(**sample, detections=detections, classes=classes, min_score=args.min_score)
        with whole_file(output / f"{path.stem}.png") as file:
            picture.save(file, "PNG")
        rows = zip(*(detections[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
        rows = [
            {"box": [round(side, 2) for side in box], "class": classes[label - 1], "score": round(score, 4)}
            for box, label, score in rows
        ]
        written.append({"image": str(path), "detections": rows})
        print(f"{one_line(path.stem, 80)}: {len(rows)} found")
    write_json(output / "detections.json", written, indent=2)
    print(f"wrote {len(pairs)} picture{'s' * (len(pairs) != 1)} and detections.json to {output}")


if __name__ == "__main__":
    with one_sentence():
        main()
