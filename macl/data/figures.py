"""Shapes of people and of things of their size, built of capsules, and their rasters.

A shape is a list of capsules: x0, y0, x1, y1 (a segment), r0, r1 (the radius at either end) and the material, in units
of the shape's height, x from its centre line, y up from the ground. Arithmetic is correctly rounded (no sin, no exp, no
sums of changing order): the same draws give the same pixels everywhere.
"""

import math

import numpy as np

HEAD, TORSO, ARMS, LEGS = range(4)  # materials: parts that share a tone
MATERIALS = 4
DISTRACTORS = ("bin", "trunk", "bollard", "trestle")


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high); unlike Generator.uniform it never contracts multiplication and addition."""
    return low + (high - low) * rng.random()


def person(rng: np.random.Generator) -> list[tuple]:
    """A person standing or walking, seen from the front or from the side."""
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
    return parts


def distractor(rng: np.random.Generator, kind: str) -> list[tuple]:
    """One of DISTRACTORS, as wide as a person."""
    if kind == "bin":  # a bin, boiler or heater under a wider lid
        half, lid = uniform(rng, 0.14, 0.21), uniform(rng, 0.05, 0.08)
        body = (0, half, 0, 1 - 2 * lid - half, half, half, TORSO)
        return [body, (-0.15, 1 - lid, 0.15, 1 - lid, lid, lid, HEAD)]
    if kind == "trunk":  # a tree trunk or pipe that forks upwards
        fork, spread = uniform(rng, 0.4, 0.6), uniform(rng, 0.1, 0.2)
        stem = (0, 0.09, 0, fork, uniform(rng, 0.06, 0.1), 0.06, TORSO)
        right = (0, fork, spread, uniform(rng, 0.75, 0.97), 0.055, 0.035, ARMS)
        return [stem, (0, fork, -spread, 0.95, 0.055, 0.035, ARMS), right]
    if kind == "bollard":  # a thick post with a ball on top: a head without limbs
        radius, ball = uniform(rng, 0.09, 0.14), uniform(rng, 0.08, 0.11)
        top = 1 - 2 * ball - 0.6 * radius
        return [(0, 1.3 * radius, 0, top, 1.3 * radius, radius, TORSO), (0, 1 - ball, 0, 1 - ball, ball, ball, HEAD)]
    # A trestle, two legs that meet at the top, with a bar across: limbs without a head.
    spread, bar = uniform(rng, 0.12, 0.2), uniform(rng, 0.25, 0.6)
    half = spread * (1 - bar)
    legs = [(foot, 0.04, 0, 0.96, 0.04, 0.04, LEGS) for foot in (-spread, spread)]
    return [*legs, (-half, bar, half, bar, 0.035, 0.035, ARMS)]


def occluder(rng: np.random.Generator, low: bool) -> list[tuple]:
    """A hedge, wider than high, or a thin straight post."""
    if low:
        half = uniform(rng, 0.3, 0.5)
        return [(-uniform(rng, 0.2, 0.8), half, uniform(rng, 0.2, 0.8), half, half, half, TORSO)]
    radius = uniform(rng, 0.02, 0.04)
    return [(0, radius, 0, 1 - radius, radius, radius, TORSO)]


def rasterise(shape: list[tuple], *, foot: tuple[float, float], height: float, canvas: tuple[int, int]):
    """Draws a shape that stands at foot = (x, y), `height` pixels tall, on a canvas of (H, W) pixels.

    -> rows and columns of the patch as slices, its coverage (h, w) float32 in 0..1, and the material per pixel (h, w).
    """
    x0, y0, x1, y1, r0, r1, materials = np.array(shape).T[:, :, None, None]  # each (K, 1, 1)
    columns = _span(np.minimum(x0 - r0, x1 - r1).min(), np.maximum(x0 + r0, x1 + r1).max(), foot[0], height, canvas[1])
    rows = _span(-np.maximum(y0 + r0, y1 + r1).max(), -np.minimum(y0 - r0, y1 - r1).min(), foot[1], height, canvas[0])
    x = (np.arange(columns.start, columns.stop) + (0.5 - foot[0])) / height
    y = (np.arange(rows.start, rows.stop) + (0.5 - foot[1])) / -height

    # Distance to the nearest point of each capsule's segment, against the radius there.
    along_x, along_y = x1 - x0, y1 - y0
    squared = np.maximum(along_x * along_x + along_y * along_y, 1e-6)
    table = (x0, y0, along_x, along_y, along_x / squared, along_y / squared, r0, r1 - r0)
    x0, y0, along_x, along_y, towards_x, towards_y, radius, widening = (value.astype(np.float32) for value in table)
    from_x, from_y = x.astype(np.float32) - x0, y.astype(np.float32)[:, None] - y0  # (K, 1, w), (K, h, 1)
    position = np.minimum(np.maximum(from_x * towards_x + from_y * towards_y, 0), 1)  # (K, h, w), 1 at the other end
    across, down = from_x - position * along_x, from_y - position * along_y
    depth = position * widening + radius - np.sqrt(across * across + down * down)  # below the outline, in heights
    coverage = np.minimum(np.maximum(depth.max(axis=0) * np.float32(height) + np.float32(0.5), 0), 1)
    return rows, columns, coverage, materials[:, 0, 0].astype(np.intp)[depth.argmax(axis=0)]


def _span(low: float, high: float, foot: float, height: float, size: int) -> slice:
    """The pixels from low to high and one more on either side, within 0..size."""
    start = min(max(math.floor(foot + low * height) - 1, 0), size)
    return slice(start, max(start, min(math.ceil(foot + high * height) + 1, size)))
