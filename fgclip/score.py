"""Score captions against one image, or against boxes in it.

python -m fgclip.score --checkpoint WEIGHTS --image cat.jpg --text "a photo of a cat" --text "a photo of a dog"
python -m fgclip.score --checkpoint WEIGHTS --image street.jpg --text-file captions.txt --box 34,50,120,310 --json

WEIGHTS as in fgclip.evaluate. Prints the cosine of each caption, and the probability that it is the one among those
given: the softmax at the scale that the model learned, for images or for boxes.
"""

import argparse
import json

import torch
from PIL import Image
from torch import Tensor

from fgclip.embedding import Embedder
from fgclip.evaluate import add_model_flags, open_model
from fgclip.images import preprocess
from fgclip.model import l2_normalize
from fgclip.regions import usable_boxes
from trainkit import distributed
from trainkit.arguments import make_parser
from trainkit.errors import InputError, one_sentence
from trainkit.files import numbers, open_image, read_lines


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add = parser.add_argument_group("what to score").add_argument
    add("--image", required=True, metavar="FILE", help="the image; it is squashed to the square that the model reads")
    add("--text", action="append", default=[], metavar="CAPTION", help="a caption; may be given several times")
    add("--text-file", metavar="FILE", help="captions, one per line")
    add("--box", action="append", default=[], metavar="X1,Y1,X2,Y2",
        help="score this box, in pixels of the image as it is shown, instead of the whole; may be given several times")
    add("--json", action="store_true", help="print json instead of a table")
# fmt: on


def fractions(boxes: list[tuple[float, ...]], image: Image.Image) -> Tensor:
    """Boxes (n, 4) of pixels in fractions of the image, clipped to it."""
    kept, usable = usable_boxes(torch.tensor(boxes, dtype=torch.float64) / torch.tensor(image.size * 2))
    for sides, fits in zip(boxes, usable.tolist(), strict=True):
        if not fits or max(map(abs, sides)) <= 1:
            size = f"{image.width}x{image.height}"
            expected = f"expected x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2, overlapping the image of {size}"
            raise InputError(f"--box {name_of(sides)}: {expected}")
    return kept.float()


def name_of(sides: tuple[float, ...]) -> str:
    return ",".join(f"{side:g}" for side in sides)


@torch.inference_mode()
def score(
    embedder: Embedder, image: Image.Image, texts: list[str], boxes: list[tuple[float, ...]], image_size: int
) -> dict:
    """Cosines and probabilities of the texts for the image or, where given, for each of its boxes (xyxy in pixels).

    image_size: side of the square that the image is squashed to.
    Returns scale, the multiplier of the cosines; texts; long, which of them took the long path; truncated, how many
    were cut; regions, one dict per box of box (None for the image), cosine and probability, one float per text.
    """
    model, tower = embedder.model, embedder.model.text_model
    pixels = preprocess(image, image_size).unsqueeze(0).to(embedder.device)  # (1, 3, S, S)
    if boxes:
        features, scale = model.encode_regions(pixels, [fractions(boxes, image)]), model.logit_scales()["region"]
    else:
        features, scale = model.encode_image(pixels), model.logit_scales()["global"]
    lengths = [len(embedder.tokenizer.encode(text)) + 2 for text in texts]
    long = [tower.long_context_length is not None and length > tower.context_length for length in lengths]
    text = torch.empty(len(texts), features.shape[1])  # (M, D)
    for path in set(long):
        rows = [i for i, which in enumerate(long) if which == path]
        text[rows] = embedder.texts([texts[i] for i in rows], path)
    cosines = l2_normalize(features).cpu() @ text.T  # (R, M)
    probabilities = (scale.cpu() * cosines).softmax(dim=1)
    rows = zip(boxes or [None], cosines.tolist(), probabilities.tolist(), strict=True)
    regions = [dict(box=sides, cosine=cosine, probability=probability) for sides, cosine, probability in rows]
    return dict(scale=scale.item(), texts=texts, long=long, truncated=embedder.truncated, regions=regions)


def as_text(result: dict) -> str:
    """A table for the image or for each box."""
    lines, texts = [], list(zip(result["texts"], result["long"], strict=True))
    for region in result["regions"]:
        lines.append("image" if region["box"] is None else f"box {name_of(region['box'])}")
        lines.append("cosine  probability  caption")
        for (text, long), *values in zip(texts, region["cosine"], region["probability"], strict=True):
            lines.append("{:6.3f}  {:11.4f}  {}".format(*values, text) + (" (as a long text)" if long else ""))
    if result["truncated"]:
        lines.append(f"{result['truncated']} captions were longer than the model reads, and were cut")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the scores of texts. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    lines = read_lines(args.text_file, "captions, one per line") if args.text_file else []
    texts = [text.strip() for text in [*args.text, *lines] if text.strip()]
    if not texts:
        raise InputError("give captions with --text or --text-file")
    boxes = [numbers(text.split(","), f"--box {text}") for text in args.box]
    image, device = open_image(args.image), distributed.start(args.device)
    embedder = Embedder(*open_model(args), device=device)
    result = score(embedder, image, texts, boxes, args.image_size)
    tokenizer = embedder.tokenizer.description
    if args.json:
        print(json.dumps(dict(image=args.image, tokenizer=tokenizer, **result), indent=2))
    else:
        print(f"{args.checkpoint}, scale {result['scale']:.1f}; {tokenizer}")
        print(as_text(result))


if __name__ == "__main__":
    with one_sentence():
        main()
