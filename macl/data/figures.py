"""Shapes of people and of things of their size, built of capsules, and their rasters.

Coordinates of a shape are in units of its height: x from its centre line, y up from the ground. Only correctly rounded
arithmetic is used (no sin, exp or sums whose order may change), so that the same draws give the same pixels everywhere.
"""

import math
from dataclasses import dataclass

import numpy as np

# A capsule is x0, y0, x1, y1, r0, r1 (a segment, a radius at either end) and a material: the part that shares a tone.
HEAD, TORSO, ARMS, LEGS = range(4)
MATERIALS = 4


@dataclass(frozen=True)
class Shape:
    """What rasterise needs of K capsules, in float32."""

    start: np.ndarray  # (2, K, 1, 1), x and y of one end
    along: np.ndarray  # (2, K, 1, 1), from there to the other end
    towards: np.ndarray  # (2, K, 1, 1), along divided by its squared length
    radius: np.ndarray  # (K, 1, 1), at the start
    widening: np.ndarray  # (K, 1, 1), how much larger the radius is at the other end
    materials: np.ndarray  # (K,) intp
    square: bool  # ends and sides are square instead of round
    extent: tuple[float, float, float, float]  # left, right, bottom, top


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
    """A low wall or crate, wider than high."""
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
    left, right, bottom, top = shape.extent
    columns = _span(foot[0] + left * height, foot[0] + right * height, canvas[1])
    rows = _span(foot[1] - top * height, foot[1] - bottom * height, canvas[0])
    x = (np.arange(columns.start, columns.stop) + (0.5 - foot[0])) / height
    y = (np.arange(rows.start, rows.stop) + (0.5 - foot[1])) / -height
    from_x = x.astype(np.float32) - shape.start[0]  # (K, 1, w)
    from_y = y.astype(np.float32)[:, None] - shape.start[1]  # (K, h, 1)

    # Distance to the nearest point of each capsule's axis, against the radius there; in place, as this is most of the
    # time of drawing a scene.
    position = from_x * shape.towards[0] + from_y * shape.towards[1]  # (K, h, w), 0 at the start, 1 at the other end
    np.maximum(position, 0, out=position)
    np.minimum(position, 1, out=position)
    across, down = position * shape.along[0], position * shape.along[1]
    np.subtract(from_x, across, out=across)
    np.subtract(from_y, down, out=down)
    if shape.square:
        distance = np.maximum(np.abs(across, out=across), np.abs(down, out=down), out=across)
    else:
        across *= across
        down *= down
        across += down
        distance = np.sqrt(across, out=across)
    position *= shape.widening
    position += shape.radius
    position -= distance  # (K, h, w), depth below the outline in units of height
    coverage = position.max(axis=0)  # (h, w)
    coverage *= np.float32(height)
    coverage += np.float32(0.5)
    coverage = np.minimum(np.maximum(coverage, 0), 1)
    return Raster(rows, columns, coverage, coverage > 0.5, shape.materials[position.argmax(axis=0)])


def _shape(parts: list[tuple], square: bool) -> Shape:
    table = np.array(parts).T[:, :, None, None]  # (7, K, 1, 1)
    start, along = table[:2], table[2:4] - table[:2]
    towards = along / np.maximum(along[0] * along[0] + along[1] * along[1], 1e-6)
    start, along, towards, radius, widening = (
        values.astype(np.float32) for values in (start, along, towards, table[4], table[5] - table[4])
    )
    extent = (
        min(min(x0 - r0, x1 - r1) for x0, _, x1, _, r0, r1, _ in parts),
        max(max(x0 + r0, x1 + r1) for x0, _, x1, _, r0, r1, _ in parts),
        min(min(y0 - r0, y1 - r1) for _, y0, _, y1, r0, r1, _ in parts),
        max(max(y0 + r0, y1 + r1) for _, y0, _, y1, r0, r1, _ in parts),
    )
    return Shape(start, along, towards, radius, widening, table[6, :, 0, 0].astype(np.intp), square, extent)


def _span(low: float, high: float, size: int) -> slice:
    """The pixels from low to high and one more on either side, within 0..size."""
    start = min(max(math.floor(low) - 1, 0), size)
    return slice(start, max(start, min(math.ceil(high) + 1, size)))
