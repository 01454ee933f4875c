"""Paints a scene as a camera for visible light sees it and as a thermal camera does."""

import math

import numpy as np

from macl.data.figures import MATERIALS, uniform
from macl.data.scenes import INFRARED, VISIBLE, Domain, Scene, count


def paint(rng: np.random.Generator, domain: Domain, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """-> visible and infrared, (3, H, W) uint8; the three channels of infrared are equal."""
    light, thermal = rng.spawn(2)  # what one camera shows does not change the other's noise
    tint = np.array([1.0, uniform(light, 0.8, 0.95), uniform(light, 0.6, 1.0)], dtype=np.float32)[:, None, None]
    visible = tint * _visible_background(light, domain, scene)  # (3, H, W)
    _paint_figures(light, visible, scene, VISIBLE, domain.visible_contrast)
    visible += _noise(light, visible.shape, uniform(light, *domain.visible_noise))

    colder = thermal.random() < domain.colder
    heat = tuple(-strength if colder else strength for strength in domain.infrared_contrast)
    infrared = _infrared_background(thermal, domain, scene, heat)[None]  # (1, H, W)
    _paint_figures(thermal, infrared, scene, INFRARED, heat)
    infrared = _shifted(thermal, infrared, domain)
    for _ in range(domain.blur):
        infrared = _blur(infrared)
    infrared += _noise(thermal, (1, 1, scene.size[1]), domain.stripes)
    infrared += _noise(thermal, infrared.shape, uniform(thermal, *domain.infrared_noise))
    visible, infrared = (np.clip(x + np.float32(0.5), 0, 255).astype(np.uint8) for x in (visible, infrared))
    return visible, infrared.repeat(3, axis=0)


def _paint_figures(rng, canvas: np.ndarray, scene: Scene, modality: int, contrast: tuple[float, float]) -> None:
    """Blends the figures that the camera sees over the canvas (C, H, W), from far to near.

    Visible: brighter or darker than the background, with a tone per part. Infrared: warmer, most of all the head.
    """
    background = canvas.copy()
    for figure in scene.figures:
        if not figure.seen[modality]:
            continue
        patch, behind = (image[:, figure.rows, figure.columns] for image in (canvas, background))  # (C, h, w)
        around = behind[:, patch.shape[1] // 2, patch.shape[2] // 2]  # (C,)
        strength = uniform(rng, *contrast) * (0.4 if figure.kind == "occluder" else 1)
        if modality == INFRARED:
            hues, factors = 1.0, [uniform(rng, 0.8, 1.2) * factor for factor in (1.15, 0.95, 0.9, 0.8)]
        else:
            sign = -1 if around.min() > 1.3 * strength and rng.random() < 0.5 else 1
            hues = [sign * uniform(rng, 0.75, 1.25) for _ in around]
            factors = [uniform(rng, 0.5, 1.4) for _ in range(MATERIALS)]
        tones = around[:, None] + (strength * np.outer(hues, factors)).astype(np.float32)  # (C, MATERIALS)
        patch += figure.coverage * (tones[:, figure.material] - patch)


def _visible_background(rng: np.random.Generator, domain: Domain, scene: Scene) -> np.ndarray:
    """Sky, buildings with a few lit windows, ground under lamps, and deep shadow or glare; (H, W) float32."""
    width, ambient = scene.size[1], uniform(rng, *domain.ambient)
    canvas = np.float32(ambient) * _texture(rng, scene.size)
    canvas[: int(scene.horizon)] *= np.float32(1.4 if domain.daytime else 0.35)
    for rows, columns in scene.buildings:
        canvas[rows, columns] = ambient * uniform(rng, 0.5, 0.9)
        for row in range(rows.start + 2, rows.stop - 4, 6):
            for column in range(columns.start + 2, columns.stop - 4, 7):
                if rng.random() < 0.25:
                    canvas[row : row + 3, column : column + 4] = uniform(rng, 60, 190)
    light = np.ones(scene.size, dtype=np.float32)
    for _ in range(0 if domain.daytime else count(rng, 1, 3)):
        peak = uniform(rng, 0.7, 2)
        _add_light(rng, light, at=uniform(rng, -0.1, 1.1), row=uniform(rng, 0.2, 1), reach=(0.15, 0.4), peak=peak)
    canvas *= light
    failure = _failure(scene, VISIBLE)
    if rng.random() < 0.5:
        canvas *= 1 - np.float32(0.8) * failure
    elif failure.any():
        canvas += failure * (np.float32(uniform(rng, 150, 230)) - canvas)
        at, row, apart = sum(scene.failed[VISIBLE]) / 2 / width, uniform(rng, 0.3, 0.6), uniform(rng, 0.02, 0.05)
        for headlight in (at - apart, at + apart):
            _add_light(rng, canvas, at=headlight, row=row, reach=(0.012, 0.03), peak=220.0)
    return canvas


def _infrared_background(rng: np.random.Generator, domain: Domain, scene: Scene, heat: tuple) -> np.ndarray:
    """Cold sky, warmer buildings and ground, warm patches, and walls and ground as warm as people; (H, W) float32."""
    ground = uniform(rng, *domain.ground)
    canvas = np.float32(ground) * _texture(rng, scene.size)
    canvas[: int(scene.horizon)] *= np.float32(uniform(rng, 0.4, 0.7))
    for rows, columns in scene.buildings:
        canvas[rows, columns] = ground * uniform(rng, 0.8, 1.3)
    for _ in range(count(rng, 2, 6)):
        peak = uniform(rng, *domain.infrared_contrast)
        _add_light(rng, canvas, at=rng.random(), row=uniform(rng, 0.1, 1), reach=(0.02, 0.1), peak=peak)
    return canvas + _failure(scene, INFRARED) * np.float32(uniform(rng, *heat))


def _failure(scene: Scene, modality: int) -> np.ndarray:
    """How much the camera fails where: 0..1, (H, W) float32; all of it from the horizon down, inside its columns."""
    left, right = scene.failed[modality]
    y, x = (np.arange(length, dtype=np.float32) for length in scene.size)
    inwards = np.minimum(x - np.float32(left), np.float32(right) - x) * np.float32(4 / max(right - left, 1))
    return np.clip(inwards, 0, 1) * np.clip(2 * y / np.float32(scene.horizon) - 1, 0, 1)[:, None]


def _add_light(rng, canvas: np.ndarray, *, at: float, row: float, reach: tuple[float, float], peak: float) -> None:
    """Adds a spot. at, row: shares of the width and the height; reach: in widths, drawn per axis."""
    height, width = canvas.shape
    far_x = (np.arange(width, dtype=np.float32) - np.float32(at * width)) / np.float32(uniform(rng, *reach) * width)
    far_y = (np.arange(height, dtype=np.float32) - np.float32(row * height)) / np.float32(uniform(rng, *reach) * width)
    near = 1 / ((1 + far_x * far_x) + (far_y * far_y)[:, None])  # (H, W)
    canvas += near * near * np.float32(peak)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Smooth random texture about 1: a grid of random values, bilinearly enlarged; (H, W) float32."""
    grid = (0.78 + 0.44 * rng.random((8, 10))).astype(np.float32)
    for axis in (0, 1):
        step = np.float32((grid.shape[axis] - 1) / size[axis])
        place = (np.arange(size[axis], dtype=np.float32) + np.float32(0.5)) * step
        first = place.astype(np.intp)
        share = (place - first).reshape((-1, 1) if axis == 0 else (1, -1))
        grid = grid.take(first, axis) * (1 - share) + grid.take(first + 1, axis) * share
    return grid


def _noise(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Sensor noise: the sum of two random bytes."""
    noise = np.frombuffer(rng.bytes(2 * math.prod(shape)), dtype=np.uint8).reshape(2, *shape)
    noise = noise[0].astype(np.float32) + noise[1] - np.float32(255)
    return noise * np.float32(deviation / math.sqrt((256**2 - 1) / 6))


def _blur(image: np.ndarray) -> np.ndarray:
    """Softens (C, H, W) with weights 1 2 1 down and across; the border repeats."""
    for axis in (1, 2):
        image = image.swapaxes(1, axis)
        softened = image + image
        softened[:, 1:] += image[:, :-1]
        softened[:, :-1] += image[:, 1:]
        softened[:, [0, -1]] += image[:, [0, -1]]
        image = (softened * np.float32(0.25)).swapaxes(1, axis)
    return image


def _shifted(rng: np.random.Generator, image: np.ndarray, domain: Domain) -> np.ndarray:
    """Moves (C, H, W) down and right by the offset, give or take a pixel; the border repeats."""
    for axis, ahead in zip((1, 2), domain.offset, strict=True):
        places = np.arange(image.shape[axis]) - ahead + count(rng, -1, 1)
        image = image.take(np.clip(places, 0, image.shape[axis] - 1), axis)
    return image
