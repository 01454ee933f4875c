"""The two pictures of README, from the best.pt of the default jobs.

python docs/pictures/draw.py --detector runs/STAGE1/best.pt --fgclip runs/FGCLIP/best.pt --output docs/pictures
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

import macl
from fgclip import load_model
from fgclip.model import PIXEL_MEAN, PIXEL_STD, l2_normalize
from fgclip.synthetic import SyntheticRegions
from macl.data import SyntheticPairs, to_float
from macl.plots import draw_detections

COLOURS = ("#e4572e", "#2e86ab", "#3a9a4c", "#8e44ad")
SEED = 10_000  # validation scenes


@torch.inference_mode()
def detection(checkpoint: str):
    """A scene, what the detector finds in it, and the ground truth."""
    detector = macl.load_detector(checkpoint)
    sample = SyntheticPairs(1, SEED)[0]
    images = {name: [to_float(sample[name])] for name in ("visible", "infrared")}
    (found,) = detector(**images)
    picture = draw_detections(sample["visible"], sample["infrared"], found, sample, classes=detector.kwargs["classes"])
    return picture.quantize(128)


@torch.inference_mode()
def regions(checkpoint: str, path: Path, count: int = 3) -> None:
    """Scenes with their boxes; each phrase has the colour of the box that the model finds nearest."""
    model, tokenizer = load_model(checkpoint)
    scenes = SyntheticRegions(count, seed=SEED, image_size=model.vision_model.image_size)
    figure, axes = pyplot.subplots(1, count, figsize=(3 * count, 3.7), dpi=80)
    for axis, index in zip(axes, range(count), strict=True):
        sample = scenes[index]
        boxes = l2_normalize(model.encode_regions(sample.pixels[None], [sample.boxes]))
        texts = l2_normalize(model.encode_text(tokenizer(sample.phrases, model.text_model.context_length)))
        cosines, nearest = (texts @ boxes.T).max(1)
        shades = torch.tensor(PIXEL_STD).view(3, 1, 1), torch.tensor(PIXEL_MEAN).view(3, 1, 1)
        axis.imshow((sample.pixels * shades[0] + shades[1]).clamp(0, 1).permute(1, 2, 0), extent=(0, 1, 1, 0))
        for (x1, y1, x2, y2), colour in zip(sample.boxes.tolist(), COLOURS, strict=False):
            axis.add_patch(pyplot.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2.5))
        for i, (text, cosine, box) in enumerate(zip(sample.phrases, cosines, nearest, strict=True)):
            axis.text(0, 1.08 + 0.09 * i, f"{text}  {cosine:.2f}", color=COLOURS[box], fontsize=10)
        axis.axis("off")
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--detector", "--fgclip", "--output"):
        parser.add_argument(flag, required=True, metavar="PATH")
    args = parser.parse_args()
    matplotlib.use("Agg")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    detection(args.detector).save(output / "detection.png", optimize=True)
    regions(args.fgclip, output / "regions.png")


if __name__ == "__main__":
    main()
