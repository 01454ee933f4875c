"""How infrared is read: its values, and how images and boxes are put onto visible where cameras do not agree."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2.functional import resize

from macl.data.annotation import Labels
from trainkit.errors import InputError
from trainkit.files import numbers, read_json, reason, regular_file, shown


@dataclasses.dataclass(frozen=True, eq=False)
class Onto:
    """What --infrared-to-visible and --infrared-range ask for. Sizes are (width, height) in pixels.

    homography: (3, 3) float64, from the x, y, 1 of infrared's pixels to those of visible's, as OpenCV has them: the
        centre of the first pixel is 0, 0
    resize: whether infrared is resized instead; without either, sizes have to be the same
    levels: the values of an infrared image of more than 8 bits that become 0 and 255; None: such images are refused
    """

    homography: Tensor | None = None
    resize: bool = False
    levels: tuple[float, float] | None = None

    @property
    def places(self) -> bool:
        """Whether infrared images are put onto visible ones, and may have another size."""
        return self.resize or self.homography is not None

    def image(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(3, h, w) uint8 -> (3, height, width) uint8, bilinear. Its border is repeated where nothing comes in."""
        width, height = size
        if self.homography is None:
            unequal = self.resize and tuple(image.shape[:0:-1]) != size
            return resize(image, [height, width], antialias=True) if unequal else image
        grid = _grid(self, tuple(image.shape[:0:-1]), size)
        placed = grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)
        return placed[0].round().to(image.dtype)

    def labels(self, labels: Labels, size: tuple[int, int], infrared: tuple[int, int]) -> Labels:
        """Boxes in the infrared image -> the upright ones around them in the visible one. The images' sizes follow."""
        if self.homography is not None and labels.size != infrared:
            raise InputError(f"{labels.place} is for {labels.size} pixels but the infrared image has {infrared}")
        boxes = torch.tensor([item.box for item in labels.objects], dtype=torch.float64).reshape(-1, 4)
        boxes = clip_boxes_to_image(boxes, labels.size[::-1])  # beyond the image a homography may turn things round
        corners = _project(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2), self.edges(labels.size, size))
        placed = torch.cat([corners.amin(1), corners.amax(1)], 1).tolist()
        objects = [item._replace(box=tuple(box)) for item, box in zip(labels.objects, placed, strict=True)]
        return labels._replace(size=size, objects=objects)

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


def read_onto(given: str | list | None, levels: Sequence[float] | None = None) -> Onto:
    """Of "resize", "none" or None, the rows of a homography, or the .npy or .json file of it. Raises InputError."""
    if levels is not None and not levels[0] < levels[1]:
        raise InputError(f"--infrared-range {levels[0]:g} {levels[1]:g}: expected two numbers, the smaller one first")
    levels = None if levels is None else tuple(levels)
    if given is None or given in ("none", "resize"):
        return Onto(resize=given == "resize", levels=levels)
    expected = "resize, none, or a .json or .npy file of 3 x 3 numbers"
    place, rows = shown(given), given
    if isinstance(given, str):
        path = regular_file(given, expected)
        try:
            npy = path.suffix == ".npy"
            rows = np.load(path, allow_pickle=False).tolist() if npy else read_json(path, expected, list)
        except (AttributeError, OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} cannot be read ({reason(error)}); expected {expected}") from error
    rows = [numbers(row, f"{place}, a row of 3 x 3", 3) for row in (rows if isinstance(rows, list) else ())]
    rows = torch.tensor(rows, dtype=torch.float64)
    if rows.shape != (3, 3) or rows.det().abs() < 1e-12:
        raise InputError(f"{place} holds no homography that can be inverted; expected {expected}")
    return Onto(rows, levels=levels)


def _project(points: Tensor, matrix: Tensor) -> Tensor:
    """(..., 2) points, moved by a homography."""
    moved = points.to(matrix.dtype) @ matrix[:, :2].T + matrix[:, 2]
    return moved[..., :2] / moved[..., 2:]
