"""Detect objects in image pairs, or with one camera alone, and draw them.

    python -m macl.predict --checkpoint runs/NAME/best.pt --visible v.jpg --infrared i.jpg --output out
    python -m macl.predict --checkpoint best.pt --visible VISIBLE_DIR --infrared INFRARED_DIR --output out
    python -m macl.predict --checkpoint best.pt --infrared INFRARED_DIR --output out

Writes one picture a pair, both modalities side by side, and detections.json.
"""

from pathlib import Path

import torch

from macl.build import load_detector
from macl.data import find_pairs, read_pair, to_float
from macl.plots import draw_detections
from trainkit.arguments import fraction, make_parser
from trainkit.errors import InputError, one_line, one_sentence
from trainkit.files import whole_file, write_json


@torch.inference_mode()
def detect_pair(detector: torch.nn.Module, sample: dict, device: str) -> dict[str, torch.Tensor]:
    """Detections of one sample of `read_pair`, either image of which may be None; tensors on the CPU."""
    images = {name: [to_float(sample[name]).to(device)] for name in ("visible", "infrared") if sample[name] is not None}
    return {name: value.cpu() for name, value in detector(**images)[0].items()}


def check_modalities(detector: torch.nn.Module, given: list[str]) -> None:
    """Raises InputError where the detector sees with one modality alone and that one is not given."""
    needed = detector.fusion.kind
    if needed in ("visible", "infrared") and needed not in given:
        raise InputError(f"this detector sees with {needed} images alone: give --{needed}")


def as_json(path: str, detections: dict[str, torch.Tensor], classes: list[str]) -> dict:
    rows = zip(*(detections[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    return {
        "image": path,
        "detections": [
            {"box": [round(side, 2) for side in box], "class": classes[label - 1], "score": round(score, 4)}
            for box, label, score in rows
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    """`python -m macl.predict`: detect in pictures of one's own, draw them and write detections.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    parser.add_argument("--visible", metavar="FILE_OR_DIR", help="visible image, or a folder of them")
    parser.add_argument("--infrared", metavar="FILE_OR_DIR", help="infrared image, or a folder with the same names")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures and detections.json")
    parser.add_argument("--min-score", type=fraction, default=0.3, metavar="X", help="lowest score written and drawn")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged weights if any, or raw ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    given = [name for name in ("visible", "infrared") if getattr(args, name) is not None]
    if not given:
        raise InputError("give --visible, --infrared or both")
    detector = load_detector(args.checkpoint, weights=args.weights).to(args.device)
    check_modalities(detector, given)
    detector.roi_head.score_threshold = args.min_score
    pairs = find_pairs(args.visible, args.infrared)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    classes, found = detector.kwargs["classes"], []
    for visible, infrared in pairs:
        sample = read_pair(visible, infrared)
        detections = detect_pair(detector, sample, args.device)
        name = (visible or infrared).stem
        images = {key: None if sample[key] is None else to_float(sample[key]) for key in ("visible", "infrared")}
        picture = draw_detections(**images, detections=detections, min_score=args.min_score, classes=classes)
        with whole_file(output / f"{name}.png") as file:
            picture.save(file, "PNG")
        found.append(as_json(str(visible or infrared), detections, classes))
        print(f"{one_line(name, 80)}: {len(detections['boxes'])} found")
    write_json(output / "detections.json", found, indent=2)
    print(f"wrote {len(found)} pictures and detections.json to {output}")


if __name__ == "__main__":
    with one_sentence():
        main()
