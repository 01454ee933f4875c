"""Where infrared lies beside visible: a shift in whole pixels, by the correlation of edges. Nothing is trained."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from macl.data import to_float
from trainkit.errors import InputError

MOST = (12, 6)  # pixels across and down
STRONGEST = 5.0  # edges are clipped at so many times their mean
PAIRS = 200


def edge_strength(image: Tensor) -> Tensor:
    """(3, H, W) uint8, or float of 0..1 -> (H, W): gradient of the grey image over its mean, clipped at STRONGEST.

    The grey image is averaged over 3 x 3 pixels first: at full size single pixels are noise.
    """
    grey = to_float(image).mean(0, keepdim=True)
    grey = avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)[0]
    across, down = grey.diff(dim=1, append=grey[:, -1:]), grey.diff(dim=0, append=grey[-1:])  # forward differences
    strength = torch.hypot(across, down)
    return (strength / strength.mean().clamp(min=1e-6)).clamp(max=STRONGEST)


def estimate_shift(visible: Tensor, infrared: Tensor, most: tuple[int, int] = MOST) -> tuple[tuple[int, int], float]:
    """By how many pixels infrared lies further right and further down than visible, and the score of that shift.

    visible, infrared: (3, H, W) uint8, or float of 0..1
    most: largest shift either way, across and down

    The score of a shift d, -1 to 1, is the normalised correlation of the edges e of both images, that is of
    e_visible(p) and e_infrared(p + d), over all p that are further than most + 2 from the border. ((0, 0), 0) where one
    shows nothing. Raises InputError for images in which no such p is left.
    """
    height, width = visible.shape[-2:]
    x, y = most
    inside = torch.zeros(height, width)
    inside[y + 2 : height - y - 2, x + 2 : width - x - 2] = 1
    count = inside.sum()
    if count == 0:
        raise InputError(f"--register-most {x} {y} is too far for an image of {width} x {height} pixels")
    first, second = edge_strength(visible), edge_strength(infrared)
    first = (first - (first * inside).sum() / count) * inside
    # The sums over p for every d at once, d in cyclic order. No d up to `most` reaches beyond the border.
    transform = torch.fft.rfft2(torch.stack([second, second, second.square()]))
    transform *= torch.fft.rfft2(torch.stack([first, inside, inside])).conj()
    product, total, squares = torch.fft.irfft2(transform, s=(height, width)).roll((y, x), (1, 2))
    spread = (squares - total.square() / count).clamp(min=1e-4 * count)  # rounding must not look like edges
    scores = product / (first.square().sum().clamp(min=1e-4 * count) * spread).sqrt()
    scores = scores[: 2 * y + 1, : 2 * x + 1]
    best = int(scores.argmax())
    score = scores.flatten()[best].item()
    return ((best % (2 * x + 1) - x, best // (2 * x + 1) - y), score) if score > 1e-3 else ((0, 0), 0.0)


def rig_shift(dataset, pairs: int = PAIRS, *, most: tuple[int, int] = MOST, read: Callable = dict) -> tuple:
    """The shift (x, y) of a pair of cameras, and the share of the image pairs whose own lies within 1 pixel of it.

    dataset: what `read` makes a sample of; at most `pairs` are drawn, always the same ones

    The shift is the median of `estimate_shift` over these, across and down.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:pairs].tolist()
    samples = (read(dataset[index]) for index in chosen)
    shifts = torch.tensor([estimate_shift(one["visible"], one["infrared"], most)[0] for one in samples])  # (pairs, 2)
    rig = shifts.median(dim=0).values
    return tuple(rig.tolist()), ((shifts - rig).abs() <= 1).all(1).double().mean().item()


def correction(images: dict[str, Tensor], most: tuple[int, int] = MOST) -> tuple[int, int]:
    """The move of infrared that puts it onto visible: minus its shift."""
    (x, y), _ = estimate_shift(images["visible"], images["infrared"], most)
    return -x, -y
