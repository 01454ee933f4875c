"""Score captions against one image, against boxes in it, or against what macl.predict found.

python -m fgclip.score --checkpoint WEIGHTS --image cat.jpg --text "a photo of a cat" --text "a photo of a dog"
python -m fgclip.score --checkpoint WEIGHTS --image street.jpg --text-file captions.txt --box 34,50,120,310 --json
python -m fgclip.score --checkpoint WEIGHTS --image street.jpg --text "a red car" --map map.png
python -m fgclip.score --checkpoint WEIGHTS --detections out/detections.json --text-file phrases.txt --output described

WEIGHTS as in fgclip.evaluate. Prints the cosine of each caption, and the probability that it is the one among those
given: the softmax at the scale that the model learned, for images or for boxes. --map draws the cosines of the image's
patches. Of --detections every one gets the captions that fit best, in detections.json and in a picture per image.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor

from fgclip.embedding import Embedder
from fgclip.evaluate import add_model_flags, open_model
from fgclip.images import preprocess
from fgclip.model import l2_normalize
from fgclip.regions import usable_boxes
from trainkit import distributed
from trainkit.arguments import make_parser, positive_int
from trainkit.drawing import Mark, draw_marks, heat
from trainkit.errors import InputError, one_line, one_sentence
from trainkit.files import numbers, open_image, read_json, read_lines, whole_file, write_json_rows, writing
from trainkit.video import decoded

CAMERAS = ("visible", "infrared")
BOX = (255, 158, 44)  # colour


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m fgclip.score`."""
    add_model_flags(parser)
    add = parser.add_argument_group("what to score").add_argument
    add("--image", metavar="FILE", help="the image; it is squashed to the square that the model reads")
    add("--text", action="append", default=[], metavar="CAPTION", help="a caption; may be given several times")
    add("--text-file", metavar="FILE", help="captions, one per line")
    add("--box", action="append", default=[], metavar="X1,Y1,X2,Y2",
        help="score this box, in pixels of the image as it is shown, instead of the whole; may be given several times")
    add("--json", action="store_true", help="print json instead of a table")
    add("--map", metavar="FILE.png", help="draw where in the image each caption fits, beside the image")
    add = parser.add_argument_group("what macl.predict found").add_argument
    add("--detections", metavar="FILE", help="its detections.json, instead of --image")
    add("--camera", choices=CAMERAS, default="visible", help="whose images the boxes are cut from")
    add("--best", type=positive_int, default=3, metavar="N", help="captions of each box in the json; one is drawn")
    add("--output", metavar="DIR", help="folder for detections.json with the captions, and for the pictures")
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
    features, scale = looked_at(embedder, image, fractions(boxes, image) if boxes else None, image_size)
    text, long = captions(embedder, texts)
    cosines = features @ text.T  # (R, M)
    probabilities = (scale * cosines).softmax(dim=1)
    rows = zip(boxes or [None], cosines.tolist(), probabilities.tolist(), strict=True)
    found = [dict(box=sides, cosine=cosine, probability=probability) for sides, cosine, probability in rows]
    return dict(scale=scale.item(), texts=texts, long=long, truncated=embedder.truncated, regions=found)


def looked_at(embedder: Embedder, image: Image.Image, boxes: Tensor | None, image_size: int) -> tuple[Tensor, Tensor]:
    """Unit features (R, D) of boxes (R, 4) in fractions of the image, or (1, D) of the image, and their scale."""
    of_boxes, pixels = boxes is not None, preprocess(image, image_size)
    features = embedder.images([SimpleNamespace(pixels=pixels, boxes=boxes)], regions=of_boxes)[of_boxes]
    return features, embedder.model.logit_scales()["region" if of_boxes else "global"].cpu()


def captions(embedder: Embedder, texts: list[str]) -> tuple[Tensor, list[bool]]:
    """Unit features (M, D) on the CPU, and which texts are too long for the short path and took the long one."""
    tower = embedder.model.text_model
    lengths = [len(embedder.tokenizer.encode(text)) + 2 for text in texts]
    long = [tower.long_context_length is not None and length > tower.context_length for length in lengths]
    features = torch.empty(len(texts), embedder.model.visual_projection.out_features)
    for path in set(long):
        rows = [i for i, which in enumerate(long) if which == path]
        features[rows] = embedder.texts([texts[i] for i in rows], path)
    return features, long


@torch.inference_mode()
def draw_map(path: str, embedder: Embedder, image: Image.Image, texts: list[str], image_size: int) -> None:
    """A picture of the image, and beside it of the cosines between its patches and each text, with their range."""
    pixels = preprocess(image, image_size).to(embedder.device)
    dense = l2_normalize(embedder.model.dense_features(pixels[None])[0].movedim(0, -1)).cpu()  # (h, w, D)
    panels = {"image": image}
    for text, cosines in zip(texts, (dense @ captions(embedder, texts)[0].T).movedim(-1, 0).numpy(), strict=True):
        panels[f"{one_line(text, 60)}: {cosines.min():.2f} to {cosines.max():.2f}"] = heat(image, cosines)
    with whole_file(path) as file:
        draw_marks(panels, [], {}).save(file, "PNG")


def pictures(rows: list[dict], source: Path, camera: str) -> Iterator[tuple[Path, Image.Image]]:
    """The path and the picture of each row of macl.predict's detections.json: an image file, or a frame of a video."""
    last, frames = None, iter(())
    for place, row in enumerate(rows):
        known = row if isinstance(row, dict) else {}
        if not isinstance(known.get(camera), str) or not isinstance(known.get("detections"), list):
            raise InputError(f"{source}: item {place} has no detections, or no {camera} image in whose pixels they are")
        path, number = source.parent / row[camera], row.get(f"{camera}_frame")
        if number is None:
            yield path, open_image(path, named_by=str(source))
            continue
        if path != last:
            last, frames = path, enumerate(decoded(path))
        picture = next((picture for index, (_, picture) in frames if index == number), None)
        if picture is None:
            raise InputError(f"{source}: item {place} is frame {number} of {path}, which does not come there")
        yield path.with_stem(f"{path.stem}-{number:06d}"), Image.fromarray(picture())


@torch.inference_mode()
def described(embedder: Embedder, args: argparse.Namespace, texts: list[str], output: Path) -> Iterator[dict]:
    """The rows of --detections, each of which gets the captions that fit best; draws them with the best one of each."""
    source, (text, _) = Path(args.detections), captions(embedder, texts)
    rows = read_json(source, "macl.predict's detections.json", list)
    for row, (path, image) in zip(rows, pictures(rows, source, args.camera), strict=True):
        place, marks = f"{source}: a box of {path}", []
        boxes = [numbers(one.get("box") if isinstance(one, dict) else one, place) for one in row["detections"]]
        sides = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) / torch.tensor(image.size * 2)
        inside, usable = usable_boxes(sides)
        if not usable.all():
            raise InputError(f"{place} lies outside of the image of {image.width}x{image.height}")
        features, scale = looked_at(embedder, image, inside.float(), args.image_size)
        cosines = features @ text.T  # (R, M)
        found = zip(row["detections"], boxes, cosines.tolist(), (scale * cosines).softmax(1).tolist(), strict=True)
        for one, box, cosine, probability in found:
            best = sorted(zip(probability, cosine, texts, strict=True), reverse=True)[: args.best]
            one["phrases"] = [dict(phrase=text, cosine=round(c, 4), probability=round(p, 4)) for p, c, text in best]
            marks.append(Mark(box, "", f"{one_line(best[0][2], 60)} {best[0][0]:.2f}"))
        with whole_file(output / f"{path.stem}.png") as file:
            draw_marks({args.camera: image}, marks, {"": BOX}).save(file, "PNG")
        row |= {name: os.path.relpath(source.parent / row[name], output) for name in CAMERAS if name in row}
        yield row


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
    if (args.image is None) == (args.detections is None):
        raise InputError("expected either --image FILE or --detections FILE")
    if (args.detections is None) != (args.output is None) or (args.detections and (args.box or args.map or args.json)):
        raise InputError("--detections needs --output DIR, and neither --box, --map nor --json")
    boxes = [numbers(text.split(","), f"--box {text}") for text in args.box]
    image, device = args.image and open_image(args.image), distributed.start(args.device)
    embedder = Embedder(*open_model(args), device=device)
    tokenizer = embedder.tokenizer.description
    if args.detections:
        output = Path(args.output)
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        count = write_json_rows(output / "detections.json", described(embedder, args, texts, output))
        print(f"{args.checkpoint}; {tokenizer}\nwrote {count} pictures and detections.json to {output}")
        return
    result = score(embedder, image, texts, boxes, args.image_size)
    if args.json:
        print(json.dumps(dict(image=args.image, tokenizer=tokenizer, **result), indent=2))
    else:
        print(f"{args.checkpoint}, scale {result['scale']:.1f}; {tokenizer}")
        print(as_text(result))
    if args.map:
        draw_map(args.map, embedder, image, texts, args.image_size)


if __name__ == "__main__":
    with one_sentence():
        main()
