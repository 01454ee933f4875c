"""Pictures with boxes and words on them, or under a map of numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, TEXT = (24, 26, 30), (232, 232, 232)
MIN_SIDE = 384  # smaller images are enlarged by a whole factor until their shorter side reaches it, ...
MAX_SIDE = 4096  # ... or their longer side this
DIVIDER = 4  # pixels between two images
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # from the least to the most
Colour = tuple[int, int, int]


class Mark(NamedTuple):
    """A box to draw."""

    box: Sequence[float]  # x1, y1, x2, y2 in pixels of the image
    kind: str  # a key of the colours
    text: str = ""
    below: bool = False  # whether the text stands below the box, or above


def draw_marks(
    images: Mapping[str, Image.Image], marks: Sequence[Mark], colours: Mapping[str, Colour],
    legend: Mapping[str, str] | None = None,
) -> Image.Image:  # fmt: skip
    """Images of one size side by side, with the same boxes on each, the later on top, and a legend below.

    images: RGB, by the name that is drawn on each. legend: kind -> what it is called below, its own name by default.
    """
    width, height = next(iter(images.values())).size
    factor = max(1, min(math.ceil(MIN_SIDE / min(width, height)), MAX_SIDE // max(width, height)))
    width, height = width * factor, height * factor
    font = ImageFont.load_default(size=6 + min(width, height) // 50)
    picture = Image.new("RGB", (len(images) * (width + DIVIDER) - DIVIDER, height + 2 * int(font.size)), BACKGROUND)
    for index, (name, image) in enumerate(images.items()):
        panel = image.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else image.copy()
        draw = ImageDraw.Draw(panel)
        for mark in marks:
            box = [side * factor for side in mark.box]
            draw.rectangle(box, outline=colours[mark.kind], width=2 + min(width, height) // 400)
            if mark.text:
                draw_label(draw, box[0], box[3] if mark.below else box[1] - 1.2 * font.size, mark.text,
                           colours[mark.kind], font)  # fmt: skip
        draw_label(draw, 0, 0, name, TEXT, font)
        picture.paste(panel, (index * (width + DIVIDER), 0))
    draw, x = ImageDraw.Draw(picture), font.size // 2
    for kind in dict.fromkeys(mark.kind for mark in marks):
        text = (legend or {}).get(kind, kind)
        draw.text((x, height + font.size // 2), text, fill=colours[kind], font=font)
        x += draw.textlength(text, font=font) + 2 * font.size
    return picture


def draw_label(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: Colour, font) -> None:
    """Text on a coloured ground, moved where it would leave the picture."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    x = max(0, min(x, draw.im.size[0] - width))
    y = max(0, min(y, draw.im.size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x, y), text, fill=BACKGROUND, font=font)


def heat(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image in grey under values (h, w) that span it, in colours from the least of them to the largest."""
    values = (values - values.min()) / max(np.ptp(values), 1e-9)
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC))
    channels = [np.interp(values, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)]
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(np.stack(channels, 2).astype(np.uint8)), 0.6)
