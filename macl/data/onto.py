"""Infrared images and boxes put onto the visible image, where the cameras do not agree in size or place."""

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2.functional import resize

from macl.data.annotation import Annotation
from trainkit.errors import InputError
from trainkit.files import numbers, read_json, reason, regular_file


@dataclasses.dataclass(frozen=True, eq=False)
class Onto:
    """What --infrared-to-visible asks for. Sizes are (width, height) in pixels.

    homography: (3, 3) float64, from the x, y, 1 of infrared's pixels to those of visible's, as OpenCV has them: the
        centre of the first pixel is 0, 0. None: infrared is resized
    """

    homography: Tensor | None = None

    def image(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(3, h, w) uint8 -> (3, height, width) uint8, bilinear. Its border is repeated where nothing comes in."""
        width, height = size
        if self.homography is None:
            return image if tuple(image.shape[:0:-1]) == size else resize(image, [height, width], antialias=True)
        grid = _grid(self, tuple(image.shape[:0:-1]), size)
        placed = grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)
        return placed[0].round().to(image.dtype)

    def boxes(self, annotation: Annotation, size: tuple[int, int]) -> Annotation:
        """Boxes in the infrared image -> the upright ones around them in the visible one, clipped."""
        corners = annotation.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        corners = _project(corners, self.edges(annotation.size, size))
        boxes = clip_boxes_to_image(torch.cat([corners.amin(1), corners.amax(1)], 1).float(), size[::-1])
        remains = (boxes[:, :2] < boxes[:, 2:]).all(dim=1)
        kept = {key: value[remains] for key, value in (annotation.per_box() | {"boxes": boxes}).items()}
        return dataclasses.replace(annotation, size=size, **kept)

    def edges(self, infrared: tuple[int, int], visible: tuple[int, int]) -> Tensor:
        """The homography of points, for which the centre of the first pixel is 0.5, 0.5 as for boxes."""
        if self.homography is None:
            scale = [new / old for new, old in zip(visible, infrared, strict=True)]
            return torch.diag(torch.tensor([*scale, 1], dtype=torch.float64))
        shift = torch.eye(3, dtype=torch.float64)
        shift[:2, 2] = 0.5
        return shift @ self.homography @ shift.inverse()


@functools.lru_cache(maxsize=2)  # the cameras of a rig have one size each
def _grid(onto: Onto, infrared: tuple[int, int], visible: tuple[int, int]) -> Tensor:
    """(1, height, width, 2) float32: where in infrared, from -1 to 1, each pixel of visible lies."""
    x, y = (torch.arange(side) + 0.5 for side in visible)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    points = _project(points, onto.edges(infrared, visible).inverse())
    return (2 * points / torch.tensor(infrared) - 1).nan_to_num(0, 9, -9).clamp(-9, 9).float()[None]


def read_onto(text: str | None) -> Onto | None:
    """ "resize", or the homography in a .npy or .json file. Raises InputError."""
    if text in (None, "resize"):
        return None if text is None else Onto()
    expected = "resize, or a .json or .npy file of 3 x 3 numbers"
    path = regular_file(text, expected)
    try:
        rows = np.load(path, allow_pickle=False).tolist() if path.suffix == ".npy" else read_json(path, expected, list)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); expected {expected}") from error
    place = f"--infrared-to-visible {path}, a row of 3 x 3"
    rows = torch.tensor([numbers(row, place, 3) for row in rows], dtype=torch.float64)
    if rows.shape != (3, 3) or rows.det().abs() < 1e-12:
        raise InputError(f"{path} holds no homography that can be inverted; expected {expected}")
    return Onto(rows)


def _project(points: Tensor, matrix: Tensor) -> Tensor:
    """(..., 2) points, moved by a homography."""
    moved = points.to(matrix.dtype) @ matrix[:, :2].T + matrix[:, 2]
    return moved[..., :2] / moved[..., 2:]
