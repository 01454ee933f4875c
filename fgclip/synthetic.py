"""Scenes of coloured, textured shapes with captions, drawn from a seed."""

import random
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fgclip.data import Record, Region, Sample, draw_sample
from fgclip.images import normalise
from fgclip.tokenizer import learn_merges

COLOURS = dict(red=(0.9, 0.1, 0.1), green=(0.1, 0.7, 0.1), blue=(0.1, 0.2, 0.9), yellow=(0.95, 0.9, 0.1))
COLOURS |= dict(purple=(0.6, 0.1, 0.7), orange=(1.0, 0.55, 0.0), white=(1.0, 1.0, 1.0), cyan=(0.1, 0.85, 0.9))
TEXTURES = ("plain", "striped", "dotted", "checked")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
ATTRIBUTES = (tuple(COLOURS), TEXTURES, SHAPES)
NEGATIVES = 10


def phrase(kind: tuple[str, str, str]) -> str:
    """The words of a (colour, texture, shape)."""
    return ("an " if kind[0][0] in "aeiou" else "a ") + " ".join(kind)


KINDS = tuple(product(*ATTRIBUTES))
PHRASES = tuple(phrase(kind) for kind in KINDS)


def alterations(kind: tuple[str, str, str]) -> list[str]:
    """The phrases that differ from this one in exactly one attribute."""
    changes = [(i, value) for i, values in enumerate(ATTRIBUTES) for value in values if value != kind[i]]
    return [phrase(kind[:i] + (value,) + kind[i + 1 :]) for i, value in changes]


def shape_mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the shape is, u to the right and v downwards in -1..1 over its box."""
    radius = np.hypot(u, v)
    return {
        "circle": radius <= 1,
        "square": np.maximum(abs(u), abs(v)) <= 1,
        "triangle": abs(u) <= (v + 1) / 2,
        "diamond": abs(u) + abs(v) <= 1,
        "cross": np.minimum(abs(u), abs(v)) <= 0.35,
        "ring": (radius <= 1) & (radius >= 0.55),
    }[shape]


def texture_mask(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the texture darkens the colour."""
    column, row = np.floor(3 * u).astype(int), np.floor(3 * v).astype(int)
    return {
        "plain": np.zeros_like(u, dtype=bool),
        "striped": row % 2 == 0,
        "dotted": np.hypot(3 * u - column - 0.5, 3 * v - row - 0.5) <= 0.33,
        "checked": (row + column) % 2 == 0,
    }[texture]


def paint(image: np.ndarray, box: np.ndarray, shape: str, texture: str, colour: np.ndarray) -> None:
    """Draw a shape into a picture (S, S, 3) in 0..1. box: (4,), xyxy in fractions. colour: (3,) in 0..1."""
    centres = (np.arange(len(image)) + 0.5) / len(image)
    columns, rows = (slice(*np.searchsorted(centres, (box[i], box[i + 2]))) for i in range(2))
    u = 2 * (centres[columns] - box[0]) / (box[2] - box[0]) - 1
    v = 2 * (centres[rows] - box[1]) / (box[3] - box[1]) - 1
    u, v = np.meshgrid(u, v)  # (h, w)
    shade = np.where(texture_mask(texture, u, v), 0.3, 1.0)[..., None]
    inside = shape_mask(shape, u, v)
    image[rows, columns][inside] = (shade * colour)[inside]


def grid_boxes(rng: np.random.Generator) -> np.ndarray:
    """Four boxes (4, 4) xyxy in fractions, one in each quarter."""
    corners = np.array([(x, y) for y in (0, 0.5) for x in (0, 0.5)])
    return np.concatenate([corners + 0.03, corners + 0.47], axis=1)


def free_boxes(rng: np.random.Generator) -> np.ndarray:
    """Two to four boxes (n, 4) of a quarter to half the side, anywhere but on each other."""
    boxes, wanted = [], rng.integers(2, 5)
    while len(boxes) < wanted:
        boxes = []
        for _ in range(40):
            side = rng.uniform(0.25, 0.5)
            x, y = rng.uniform(0, 1 - side, size=2)
            if all(x >= b[2] or y >= b[3] or x + side <= b[0] or y + side <= b[1] for b in boxes):
                boxes.append((x, y, x + side, y + side))
            if len(boxes) == wanted:
                break
    return np.array(boxes)


PLACEMENTS = {"grid": grid_boxes, "free": free_boxes}


def quarter(box: np.ndarray) -> str:
    """The quarter that holds the middle of a box."""
    return f"{'bottom' if box[1] + box[3] > 1 else 'top'} {'right' if box[0] + box[2] > 1 else 'left'}"


class SyntheticRegions(Dataset):
    """`count` scenes of a seed. Keys and samples as of `RegionDataset`.

    Every object has a colour, a texture and a shape (192 phrases). Its 10 hard negatives differ in one of them. Scenes
    with a red object have label 1.
    placement: "grid" puts one object in each quarter, "free" two to four anywhere, in any size.
    max_regions: regions per sample, drawn anew for every visit; all objects are in the picture.
    """

    def __init__(
        self, count: int, *, seed: int, image_size: int = 64, placement: str = "grid", max_regions: int | None = None
    ):
        self.count, self.seed, self.image_size, self.max_regions = count, seed, image_size, max_regions
        self.boxes_of = PLACEMENTS[placement]

    def __len__(self) -> int:
        return self.count

    def plan(self, index: int) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
        """Boxes (n, 4) and what is in them, all different."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index, 0))
        boxes = self.boxes_of(rng)
        return boxes, [KINDS[i] for i in rng.choice(len(KINDS), len(boxes), replace=False)]

    def record(self, index: int) -> Record:
        """Captions, boxes and phrases of a scene, without drawing it."""
        boxes, kinds = self.plan(index)
        draw = random.Random(f"negatives {self.seed} {index}")
        short = ", ".join(f"{colour} {shape}" for colour, _, shape in kinds)
        long = " ".join(f"{quarter(box)}: {phrase(kind)}." for box, kind in zip(boxes, kinds, strict=True))
        regions = tuple(Region(tuple(box), (phrase(kind),), tuple(draw.sample(alterations(kind), NEGATIVES)))
                        for box, kind in zip(boxes.tolist(), kinds, strict=True))  # fmt: skip
        red, source = any(kind[0] == "red" for kind in kinds), f"synthetic scene {index} of seed {self.seed}"
        return Record(f"scene-{self.seed}-{index}", (short,), long, regions, label=int(red), source=source)

    def describe(self, key: int | tuple[int, int]) -> Sample:
        """The sample without pixels."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        draw, record = random.Random(f"{self.seed} {epoch} {index}"), self.record(index)
        if self.max_regions is not None and self.max_regions < len(record.regions):
            record = replace(record, regions=tuple(draw.sample(record.regions, self.max_regions)))
        return draw_sample(record, draw)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        return replace(self.describe(key), pixels=normalise(self.picture(key[1] if isinstance(key, tuple) else key)))

    def picture(self, index: int) -> Tensor:
        """The scene (3, S, S) in 0..1."""
        boxes, kinds = self.plan(index)
        rng = np.random.default_rng((self.seed, index, 1))
        size = self.image_size
        image = rng.uniform(0.3, 0.6) + 0.03 * rng.standard_normal((size, size, 3), dtype=np.float32)  # (S, S, 3)
        for box, (colour, texture, shape) in zip(boxes, kinds, strict=True):
            paint(image, box, shape, texture, np.array(COLOURS[colour]))
        return torch.from_numpy(image.clip(0, 1)).permute(2, 0, 1).float()


def vocabulary() -> list[tuple[str, str]]:
    """Merges that make one token of every word of the scenes."""
    records = map(SyntheticRegions(100, seed=0).record, range(100))
    return learn_merges([*PHRASES, *(text for record in records for text in (record.long, *record.short))])
