"""Shapes of people and of things of their size, built of capsules, and their rasters.

Coordinates of a shape are in units of its height: x from its centre line, y up from the ground. Only correctly rounded
arithmetic is used (no sin, exp or sums whose order may change), so that the same draws give the same pixels everywhere.
"""

from dataclasses import dataclass

import numpy as np

# A capsule is x0, y0, x1, y1, r0, r1 and a material, the part of the shape that shares one tone.
HEAD, TORSO, ARMS, LEGS = range(4)
MATERIALS = 4


@dataclass(frozen=True)
class Shape:
    """capsules: (K, 6) float64; materials: (K,) intp; square: the capsules' ends and sides are square, not round."""

    capsules: np.ndarray
    materials: np.ndarray
    square: bool


@dataclass(frozen=True)
class Raster:
    """A shape on the canvas: the patch rows x columns, its coverage in 0..1 and the material of each pixel."""

    rows: slice
    columns: slice
    coverage: np.ndarray  # (h, w) float32
    inside: np.ndarray  # (h, w) bool, coverage of more than one half
    material: np.ndarray  # (h, w) intp


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high); unlike Generator.uniform it never contracts multiplication and addition."""
    return low + (high - low) * rng.random()


def person(rng: np.random.Generator) -> Shape:
    """Somebody standing or walking, seen from the front or from the side: head, torso, two arms and two legs."""
    from_side = rng.random() < 0.5
    shoulder = uniform(rng, 0.03, 0.06) if from_side else uniform(rng, 0.09, 0.12)
    hip = 0.02 if from_side else uniform(rng, 0.04, 0.06)
    stride = uniform(rng, 0.03, 0.17) if from_side else uniform(rng, 0.0, 0.07)
    bend = uniform(rng, 0.0, 0.04) if from_side else 0.0
    lean = uniform(rng, -0.03, 0.03)
    build = uniform(rng, 0.85, 1.2)
    parts = [
        (1.3 * lean, 0.925, 1.3 * lean, 0.935, 0.062, 0.062, HEAD),
        (lean - shoulder, 0.79, lean + shoulder, 0.79, 0.045 * build, 0.045 * build, TORSO),
        (lean, 0.77, 0.0, 0.53, 0.095 * build, 0.08 * build, TORSO),
    ]
    if rng.random() < 0.3:  # a coat
        parts.append((0.0, 0.6, 0.0, uniform(rng, 0.3, 0.42), 0.09 * build, 0.115 * build, TORSO))
    for side in (-1, 1):
        foot = side * (hip + stride)
        knee = (side * hip + foot) / 2 + bend
        parts.append((side * hip, 0.5, knee, 0.27, 0.058 * build, 0.045, LEGS))
        parts.append((knee, 0.27, foot, 0.03, 0.045, 0.03, LEGS))
        swing = uniform(rng, -0.1, 0.1) if from_side else side * uniform(rng, 0.02, 0.1)
        elbow, hand = lean + side * shoulder + swing, side * shoulder + uniform(rng, 1.0, 1.8) * swing
        parts.append((lean + side * shoulder, 0.78, elbow, 0.63, 0.036 * build, 0.034, ARMS))
        parts.append((elbow, 0.63, hand, uniform(rng, 0.46, 0.56), 0.032, 0.026, ARMS))
    return _shape(parts, square=False)


def pillar(rng: np.random.Generator) -> Shape:
    """A round post, duct or boiler as wide as a person."""
    radius, band = uniform(rng, 0.12, 0.19), uniform(rng, 0.4, 0.8)
    return _shape(
        [(0, radius, 0, band, radius, radius, TORSO), (0, band, 0, 1 - radius, radius, radius, HEAD)], square=False
    )


def bin_with_lid(rng: np.random.Generator) -> Shape:
    """A bin, cabinet or heater: a box under a wider lid."""
    half, lid = uniform(rng, 0.14, 0.21), uniform(rng, 0.05, 0.08)
    body = (0, half, 0, 1 - 2 * lid - half, half, half, TORSO)
    return _shape([body, (-0.15, 1 - lid, 0.15, 1 - lid, lid, lid, HEAD)], square=True)


def sign(rng: np.random.Generator) -> Shape:
    """A thin post with a board."""
    post, board = uniform(rng, 0.02, 0.04), uniform(rng, 0.12, 0.18)
    return _shape(
        [(0, post, 0, 0.7, post, post, LEGS), (0, 1 - 1.6 * board, 0, 1 - board, board, board, TORSO)], square=True
    )


def trunk(rng: np.random.Generator) -> Shape:
    """A tree trunk or pipe that forks upwards."""
    fork, spread = uniform(rng, 0.4, 0.6), uniform(rng, 0.1, 0.2)
    return _shape(
        [
            (0, 0.03, 0, fork, uniform(rng, 0.06, 0.1), 0.06, TORSO),
            (0, fork, -spread, 0.95, 0.055, 0.035, ARMS),
            (0, fork, spread, uniform(rng, 0.75, 0.97), 0.055, 0.035, ARMS),
        ],
        square=False,
    )


def bollard(rng: np.random.Generator) -> Shape:
    """A thick post with a ball on top: a head without limbs."""
    radius, ball = uniform(rng, 0.09, 0.14), uniform(rng, 0.08, 0.11)
    top = 1 - 2 * ball - 0.6 * radius
    return _shape(
        [(0, radius, 0, top, 1.3 * radius, radius, TORSO), (0, 1 - ball, 0, 1 - ball, ball, ball, HEAD)], square=False
    )


def trestle(rng: np.random.Generator) -> Shape:
    """Two legs that meet at the top, with a bar across: limbs without a head."""
    spread, bar = uniform(rng, 0.12, 0.2), uniform(rng, 0.25, 0.6)
    half = spread * (1 - bar)
    return _shape(
        [
            (-spread, 0.04, 0, 0.96, 0.04, 0.04, LEGS),
            (spread, 0.04, 0, 0.96, 0.04, 0.04, LEGS),
            (-half, bar, half, bar, 0.035, 0.035, ARMS),
        ],
        square=False,
    )


def wall(rng: np.random.Generator) -> Shape:
    """A low wall or parked crate; its height is that of what it hides, so it is given wider than high."""
    half = uniform(rng, 0.3, 0.5)
    return _shape([(-uniform(rng, 0.2, 0.8), half, uniform(rng, 0.2, 0.8), half, half, half, TORSO)], square=True)


def post(rng: np.random.Generator) -> Shape:
    """A thin straight post."""
    radius = uniform(rng, 0.02, 0.04)
    return _shape([(0, radius, 0, 1 - radius, radius, radius, TORSO)], square=True)


DISTRACTORS = (pillar, bin_with_lid, sign, trunk, bollard, trestle)


def rasterise(shape: Shape, *, foot: tuple[float, float], height: float, canvas: tuple[int, int]) -> Raster:
    """Draws a shape that stands at foot = (x, y), `height` pixels tall, on a canvas of (H, W) pixels.

    Coverage falls from 1 to 0 over the pixel that the outline crosses. The patch may be empty when the shape stands
    outside the canvas.
    """
    capsules = (shape.capsules * height).astype(np.float32)
    x0, y0 = foot[0] + capsules[:, 0], foot[1] - capsules[:, 1]
    x1, y1 = foot[0] + capsules[:, 2], foot[1] - capsules[:, 3]
    r0, r1 = capsules[:, 4], capsules[:, 5]
    columns = _span(np.minimum(x0 - r0, x1 - r1), np.maximum(x0 + r0, x1 + r1), canvas[1])
    rows = _span(np.minimum(y0 - r0, y1 - r1), np.maximum(y0 + r0, y1 + r1), canvas[0])
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, None, :] + np.float32(0.5)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[None, :, None] + np.float32(0.5)

    def each(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[:, None, None]  # (K, 1, 1)

    # Distance to the nearest point of each capsule's axis, against the radius there; in place, as this is most of the
    # time of drawing a scene.
    from_x, from_y, along_x, along_y = x - each(x0), y - each(y0), each(x1 - x0), each(y1 - y0)
    inverse = 1 / np.maximum(along_x * along_x + along_y * along_y, np.float32(1e-6))
    position = from_x * (along_x * inverse) + from_y * (along_y * inverse)  # (K, h, w)
    np.maximum(position, 0, out=position)
    np.minimum(position, 1, out=position)
    across, down = position * along_x, position * along_y
    np.subtract(from_x, across, out=across)
    np.subtract(from_y, down, out=down)
    if shape.square:
        distance = np.maximum(np.abs(across, out=across), np.abs(down, out=down), out=across)
    else:
        across *= across
        down *= down
        across += down
        distance = np.sqrt(across, out=across)
    position *= each(r1 - r0)
    position += each(r0)
    position -= distance  # (K, h, w), depth below the outline
    coverage = np.clip(position.max(axis=0) + np.float32(0.5), 0, 1)  # (h, w)
    return Raster(rows, columns, coverage, coverage > 0.5, shape.materials[position.argmax(axis=0)])


def _shape(parts: list[tuple], square: bool) -> Shape:
    table = np.array(parts, dtype=np.float64)  # (K, 7)
    return Shape(table[:, :6], table[:, 6].astype(np.intp), square)


def _span(low: np.ndarray, high: np.ndarray, size: int) -> slice:
    start = min(max(int(np.floor(low.min())) - 1, 0), size)
    return slice(start, max(start, min(int(np.ceil(high.max())) + 1, size)))
