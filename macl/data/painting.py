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
    _add_noise(light, visible, uniform(light, *domain.visible_noise))

    colder = domain.colder > 0 and thermal.random() < domain.colder
    heat = tuple(-strength if colder else strength for strength in domain.infrared_contrast)
    infrared = _infrared_background(thermal, domain, scene, heat)[None]  # (1, H, W)
    _paint_figures(thermal, infrared, scene, INFRARED, heat)
    infrared = _shifted(thermal, infrared, domain)
    for _ in range(domain.blur):
        infrared = _blur(infrared)
    if domain.stripes:
        columns = np.zeros((1, 1, infrared.shape[2]), dtype=np.float32)
        _add_noise(thermal, columns, domain.stripes)
        infrared += columns
    _add_noise(thermal, infrared, uniform(thermal, *domain.infrared_noise))
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
            factors = [uniform(rng, 0.8, 1.2) * factor for factor in (1.15, 0.95, 0.9, 0.8)]
        else:
            darker = around.min() > 1.3 * strength and rng.random() < 0.5
            factors = [(-1 if darker else 1) * uniform(rng, 0.5, 1.4) for _ in range(MATERIALS)]
        tones = np.empty((len(canvas), MATERIALS), dtype=np.float32)
        for channel, tone in enumerate(around.tolist()):
            hue = 1.0 if modality == INFRARED else uniform(rng, 0.75, 1.25)
            tones[channel] = [tone + strength * factor * hue for factor in factors]
        patch += figure.coverage * (tones[:, figure.material] - patch)


def _visible_background(rng: np.random.Generator, domain: Domain, scene: Scene) -> np.ndarray:
    """Sky, buildings with a few lit windows, and ground under lamps, headlights and shadows; (H, W) float32."""
    height, width = scene.size
    y, x = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    horizon, ambient = int(scene.horizon), uniform(rng, *domain.ambient)
    canvas = np.float32(ambient) * _texture(rng, scene.size, cells=(9, 11), low=0.75, high=1.25)
    canvas[:horizon] *= np.float32(domain.sky)
    for rows, columns in scene.buildings:
        canvas[rows, columns] = ambient * uniform(rng, 0.5, 0.9)
        for row in range(rows.start + 2, rows.stop - 4, 6):
            for column in range(columns.start + 2, columns.stop - 4, 7):
                if rng.random() < 0.25:
                    canvas[row : row + 3, column : column + 4] = uniform(rng, 60, 190)
    centre, drift = uniform(rng, 0.2, 0.8) * width, uniform(rng, -1.5, 1.5)
    below = (y[horizon:] - horizon)[:, None]
    canvas[horizon:][np.abs(x - (centre + drift * below)) < np.float32(0.025) * below] *= np.float32(1.5)  # a lane

    light = np.ones(scene.size, dtype=np.float32)
    for _ in range(count(rng, domain.lamps)):
        peak = uniform(rng, *domain.lamp) / domain.ambient[1]
        _add_light(rng, light, at=uniform(rng, -0.1, 1.1), row=uniform(rng, 0.2, 1), reach=(0.15, 0.4), peak=peak)
    for figure in scene.figures if domain.shadows else ():
        if figure.seen[VISIBLE]:
            shade, reach = np.ones_like(light), (0.2 * figure.height / width, 0.4 * figure.height / width)
            at, row = figure.foot[0] / width, figure.foot[1] / height
            _add_light(rng, shade, at=at, row=row, reach=reach, peak=-domain.shadows)
            light *= shade
    canvas *= light
    failure = _failure(scene, VISIBLE)
    if rng.random() < 0.5:
        canvas *= 1 - np.float32(0.8) * failure  # deep shadow
    elif failure.any():
        canvas += failure * (np.float32(uniform(rng, 150, 230)) - canvas)  # glare of headlights
        at, row, apart = sum(scene.failed[VISIBLE]) / 2 / width, uniform(rng, 0.3, 0.6), uniform(rng, 0.02, 0.05)
        for shift in (-apart, apart):
            _add_light(rng, canvas, at=at + shift, row=row, reach=(0.012, 0.03), peak=220.0)
    away_y, away_x = (y / np.float32(height / 2) - 1)[:, None], x / np.float32(width / 2) - 1
    return canvas * (1 - np.float32(domain.vignette / 2) * (away_x * away_x + away_y * away_y))


def _infrared_background(rng: np.random.Generator, domain: Domain, scene: Scene, heat: tuple) -> np.ndarray:
    """Cold sky, warmer buildings and ground, and warm patches without a person's shape; (H, W) float32."""
    ground = uniform(rng, *domain.ground)
    canvas = np.float32(ground) * _texture(rng, scene.size, cells=(7, 9), low=0.8, high=1.2)
    canvas[: int(scene.horizon)] *= np.float32(uniform(rng, 0.4, 0.7))
    for rows, columns in scene.buildings:
        canvas[rows, columns] = ground * uniform(rng, 0.8, 1.3)
    for _ in range(count(rng, domain.warm_clutter)):
        peak = uniform(rng, *domain.infrared_contrast)
        _add_light(rng, canvas, at=rng.random(), row=uniform(rng, 0.1, 1), reach=(0.02, 0.1), peak=peak)
    return canvas + _failure(scene, INFRARED) * np.float32(uniform(rng, *heat))  # as warm as people


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


def _texture(rng: np.random.Generator, size: tuple[int, int], *, cells: tuple[int, int], low: float, high: float):
    """Smooth random texture: a grid of random values, bilinearly enlarged; (H, W) float32."""
    grid = (low + (high - low) * rng.random(cells)).astype(np.float32)
    for axis in (0, 1):
        place = (np.arange(size[axis], dtype=np.float32) + np.float32(0.5)) * np.float32((cells[axis] - 1) / size[axis])
        first = place.astype(np.intp)
        share = (place - first).reshape((-1, 1) if axis == 0 else (1, -1))
        grid = grid.take(first, axis) * (1 - share) + grid.take(first + 1, axis) * share
    return grid


def _add_noise(rng: np.random.Generator, canvas: np.ndarray, deviation: float) -> None:
    """Adds sensor noise: the sum of two random bytes."""
    noise = np.frombuffer(rng.bytes(2 * canvas.size), dtype=np.uint8).reshape(2, *canvas.shape)
    noise = noise[0].astype(np.float32) + noise[1] - np.float32(255)
    canvas += noise * np.float32(deviation / math.sqrt((256**2 - 1) / 6))


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
    """Moves (C, H, W) down and right by the offset, give or take the misregistration; the border repeats."""
    for axis, ahead in zip((1, 2), domain.offset, strict=True):
        step = int(uniform(rng, 0, 2 * domain.misregistration + 1)) - domain.misregistration - ahead
        image = image.take(np.clip(np.arange(image.shape[axis]) + step, 0, image.shape[axis] - 1), axis)
    return image
