"""Score captions against one image, or against boxes in it.

python -m fgclip.score --checkpoint WEIGHTS --image cat.jpg --text "a photo of a cat" --text "a photo of a dog"
python -m fgclip.score --checkpoint WEIGHTS --image street.jpg --text-file captions.txt --box 34,50,120,310 --json

WEIGHTS as in fgclip.evaluate. Prints the cosine of each caption, and the probability that it is the one among those
given: the softmax at the scale that the model learned, for images or for boxes.
"""

import argparse
import json
import math

import torch
from PIL import Image
from torch import Tensor

from fgclip.embedding import Embedder
from fgclip.evaluate import add_model_flags, open_model
from fgclip.images import preprocess, read_image
from fgclip.model import FGCLIP, unit
from fgclip.regions import usable_boxes
from fgclip.tokenizer import Tokenizer
from trainkit import distributed
from trainkit.arguments import make_parser
from trainkit.errors import InputError, one_sentence
from trainkit.files import read_lines


def box(text: str) -> tuple[float, ...]:
    """ "10,20,30.5,40" -> (10.0, 20.0, 30.5, 40.0)."""
    try:
        sides = tuple(float(part) for part in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 4 or not all(map(math.isfinite, sides)):
        raise argparse.ArgumentTypeError(f"expected x1,y1,x2,y2 in pixels such as 10,20,130,240, got {text!r}")
    return sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m fgclip.score`."""
    add_model_flags(parser)
    # fmt: off
    add = parser.add_argument_group("what to score").add_argument
    add("--image", required=True, metavar="FILE", help="the image; it is squashed to the square that the model reads")
    add("--text", action="append", default=[], metavar="CAPTION", help="a caption; may be given several times")
    add("--text-file", metavar="FILE", help="captions, one a line")
    add("--box", type=box, action="append", default=[], metavar="X1,Y1,X2,Y2",
        help="score this box, in pixels of the image as it is shown, instead of the whole; may be given several times")
    add("--json", action="store_true", help="print json instead of a table")
    # fmt: on


def captions(args: argparse.Namespace) -> list[str]:
    lines = read_lines(args.text_file, "captions, one a line") if args.text_file else []
    texts = [text.strip() for text in [*args.text, *lines] if text.strip()]
    if not texts:
        raise InputError("give captions with --text or --text-file")
    return texts


def text_features(embedder: Embedder, texts: list[str]) -> tuple[Tensor, list[bool]]:
    """Unit features (M, D), and which texts took the long path, because they are too long for the short one."""
    tower, tokenizer = embedder.model.text_model, embedder.tokenizer
    has_long = tower.long_context_length is not None
    long = [has_long and len(tokenizer.encode(text)) > tower.context_length - 2 for text in texts]
    features = torch.empty(len(texts), embedder.model.visual_projection.out_features)
    for path in set(long):
        rows = torch.tensor([which == path for which in long])
        features[rows] = embedder.texts([text for text, which in zip(texts, long, strict=True) if which == path], path)
    return features, long


def fractions(boxes: list[tuple[float, ...]], image: Image.Image) -> Tensor:
    """Boxes (n, 4) of pixels in fractions of the image, clipped to it."""
    kept, usable = usable_boxes(torch.tensor(boxes, dtype=torch.float64) / torch.tensor(image.size * 2))
    for sides in boxes:
        if max(map(abs, sides)) <= 1:
            raise InputError(f"--box {','.join(map(str, sides))} looks like fractions; expected x1,y1,x2,y2 in pixels")
    if not usable.all():
        wrong = ",".join(f"{side:g}" for side in boxes[usable.tolist().index(False)])
        raise InputError(
            f"--box {wrong}: expected x1,y1,x2,y2 with x1 < x2 and y1 < y2 that meets the image of "
            f"{image.width}x{image.height} pixels"
        )
    return kept.float()


@torch.inference_mode()
def score(
    model: FGCLIP,
    tokenizer: Tokenizer,
    image: Image.Image,
    texts: list[str],
    boxes: list[tuple[float, ...]] = (),
    *,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """Cosines and probabilities of the texts for the image or, where boxes (xyxy in its pixels) are given, for each.

    image_size: side of the square that the image is squashed to, by default that of the weights.
    Returns scale, the multiplier of the cosines; texts; long, which of them took the long path; truncated, how many
    were cut; and regions: one dict of box (None for the image), cosine and probability, lists as long as texts.
    Raises InputError on a box without area inside the image.
    """
    embedder = Embedder(model, tokenizer, device=device)
    pixels = preprocess(image, image_size or model.vision_model.image_size).unsqueeze(0).to(device)  # (1, 3, S, S)
    if boxes:
        seen, scale = model.encode_regions(pixels, [fractions(list(boxes), image)]), model.logit_scales()["region"]
    else:
        seen, scale = model.encode_image(pixels), model.logit_scales()["global"]
    features, long = text_features(embedder, texts)
    cosines = unit(seen).cpu() @ features.T  # (R, M)
    probabilities = (scale.cpu() * cosines).softmax(dim=1)
    rows = zip(boxes or [None], cosines.tolist(), probabilities.tolist(), strict=True)
    regions = [dict(box=where, cosine=cosine, probability=probability) for where, cosine, probability in rows]
    return dict(scale=scale.item(), texts=texts, long=long, truncated=embedder.truncated, regions=regions)


def as_text(found: dict) -> str:
    """A table for the image or for each box, the captions in the order given."""
    lines = []
    for region in found["regions"]:
        lines.append("image" if region["box"] is None else f"box {','.join(f'{side:g}' for side in region['box'])}")
        lines.append("cosine  probability  caption")
        for text, long, *figures in zip(
            found["texts"], found["long"], region["cosine"], region["probability"], strict=True
        ):
            lines.append("{:6.3f}  {:11.4f}  {}".format(*figures, text) + (" (as a long text)" if long else ""))
    if found["truncated"]:
        lines.append(f"{found['truncated']} captions were longer than the model reads, and were cut")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """`python -m fgclip.score`: print how well captions fit an image or its boxes."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    texts, image = captions(args), read_image(args.image)
    device = distributed.start(args.device)
    model, tokenizer = open_model(args)
    found = score(model, tokenizer, image, texts, args.box, image_size=args.image_size, device=device)
    if args.json:
        print(json.dumps(dict(image=args.image, tokenizer=tokenizer.description, **found), indent=2))
    else:
        print(f"{args.checkpoint}, scale {found['scale']:.1f}; {tokenizer.description}")
        print(as_text(found))


if __name__ == "__main__":
    with one_sentence():
        main()
