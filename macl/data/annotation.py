"""The objects of an annotation file as boxes that count, are ignored, or are left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from macl.data.sample import PER_BOX
from trainkit.errors import InputError
from trainkit.files import shown

SAME = 0.3  # least overlap of an object's boxes in both cameras, where nothing else joins them


class Object(NamedTuple):
    name: str
    box: tuple[float, float, float, float] | None  # x1, y1, x2, y2 in pixels; None, in joined labels, where not seen
    ignore: bool = False  # as the annotation marks it
    occlusion: int = 0  # 0 none, 1 partial, 2 heavy
    key: int | None = None  # the same in the labels of both cameras
    infrared: tuple[float, float, float, float] | None = None  # of joined labels, like `box`


class Labels(NamedTuple):
    """The content of an annotation file for one pair; or, joined, those of visible and of infrared."""

    place: str  # the file, and where in it, for messages
    size: tuple[int, int] | None  # width, height in pixels; None where the file does not say it
    objects: list[Object]
    joined: bool = False
    image_id: int | str | None = None  # in the json that it is from


@dataclass(frozen=True)
class Annotation:
    """The boxes of a sample; `occlusion` and `visible_in` are None where unknown."""

    place: str
    size: tuple[int, int]  # width, height in pixels
    names: list[str]  # of all objects, in the file's order
    boxes: Tensor  # (N, 4) float32, x1 y1 x2 y2
    labels: Tensor  # (N,) int64
    ignore: Tensor  # (N,) bool
    occlusion: Tensor | None = None  # (N,) int64
    visible_in: Tensor | None = None  # (N, 2) bool
    boxes_infrared: Tensor | None = None  # (N, 4) float32, like `boxes`, which are then visible's
    clipped: int = 0  # boxes that reached out of the image
    dropped: int = 0  # boxes without area in the image, left out

    def per_box(self) -> dict[str, Tensor]:
        """The known keys of a sample."""
        return {key: getattr(self, key) for key in PER_BOX if getattr(self, key) is not None}

    def scaled(self, size: tuple[int, int]) -> "Annotation":
        """For the image at a half, a quarter or an eighth, rounded up, of its sides; unchanged for any other size."""
        if size not in [tuple(-(-side // part) for side in self.size) for part in (2, 4, 8)]:
            return self
        factors = self.boxes.new_tensor([new / old for new, old in zip(size, self.size, strict=True)] * 2)
        own = None if self.boxes_infrared is None else self.boxes_infrared * factors
        return replace(self, size=size, boxes=self.boxes * factors, boxes_infrared=own)


def annotate(
    labels: Labels, classes: Sequence[str], *, ignored_names: Sequence[str] | None = None, min_height: float = 0,
    max_occlusion: int | None = None, clip: bool = True,
) -> Annotation:  # fmt: skip
    """The objects of `classes`, labelled 1, 2, ...

    ignored_names: these are ignored under person's label, other names are refused; None: other names are left out
    min_height, max_occlusion: lower boxes, in pixels, and more occlusion are ignored; None: occlusion is unknown
    clip: clip boxes to the image, and leave out those without area in it
    """
    known = (*classes, *(ignored_names or ()))
    kept = [item for item in labels.objects if item.name in known]
    if ignored_names is not None and len(kept) < len(labels.objects):
        name = next(item.name for item in labels.objects if item.name not in known)
        raise InputError(f"{labels.place} names an object {shown(name)}; expected {', '.join(dict.fromkeys(known))}")
    numbers = [1 + classes.index(item.name if item.name in classes else "person") for item in kept]
    occlusion = torch.tensor([item.occlusion for item in kept], dtype=torch.int64)
    ignore = torch.tensor([item.ignore or item.name not in classes for item in kept], dtype=torch.bool)
    rows = [(item.box or item.infrared, item.infrared or item.box) for item in kept]
    boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2, 4)  # of visible, of infrared
    ignore |= boxes[:, 0, 3] - boxes[:, 0, 1] < min_height - 1e-6  # y + h - y need not be h
    if max_occlusion is not None:
        ignore |= occlusion > max_occlusion
    inside = clip_boxes_to_image(boxes, labels.size[::-1]) if clip else boxes
    rounded = inside.float()
    remains = (rounded[..., :2] < rounded[..., 2:]).all(dim=2).all(dim=1)
    seen = torch.tensor([(item.box is not None, item.infrared is not None) for item in kept]).reshape(-1, 2).bool()
    return Annotation(
        place=labels.place,
        size=labels.size,
        names=[item.name for item in labels.objects],
        boxes=rounded[remains, 0],
        labels=torch.tensor(numbers, dtype=torch.int64)[remains],
        ignore=ignore[remains],
        occlusion=None if max_occlusion is None else occlusion[remains],
        visible_in=seen[remains] if labels.joined else None,
        boxes_infrared=rounded[remains, 1] if labels.joined else None,
        clipped=int((inside != boxes).flatten(1).any(dim=1)[remains].sum()),
        dropped=int((~remains).sum()),
    )


def join(visible: Labels, infrared: Labels) -> Labels:
    """The objects of both cameras row by row: those of one key or, without keys, of one name that overlap most."""
    first, second = visible.objects, infrared.objects
    boxes = [torch.tensor([item.box for item in each], dtype=torch.float64).reshape(-1, 4) for each in (first, second)]
    keyed = all(item.key is not None for item in (*first, *second))
    same = [one.key == other.key if keyed else one.name == other.name for one in first for other in second]
    score = torch.tensor(same, dtype=torch.float64).reshape(len(first), len(second))
    score, rows, left = score if keyed else score * box_iou(*boxes).nan_to_num(), list(first), set(range(len(second)))
    while score.numel() and score.max() >= SAME:
        row, column = divmod(int(score.argmax()), len(second))
        other = second[column]
        rows[row] = first[row]._replace(infrared=other.box, ignore=first[row].ignore or other.ignore)
        score[row], score[:, column] = 0, 0
        left.remove(column)
    rows += [second[column]._replace(box=None, infrared=second[column].box) for column in sorted(left)]
    return Labels(visible.place, visible.size, rows, joined=True)


def refuse_other_form(labels: Sequence[Labels]) -> None:
    """Raises InputError where a fifth of the boxes, five at least, look as if their numbers were of another form.

    Corners read as a size: nearly all have x2 > 2 x1, y2 > 2 y1, and reach far out. A size read as corners: x2 < x1.
    """
    found = [(one, item.box or item.infrared) for one in labels for item in one.objects]
    boxes = [[value / side for value, side in zip(box, one.size * 2, strict=True)] for one, box in found]
    first, last = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 2, 2).unbind(1)
    corners = ((last > 2 * first) & (last - first < 1.01)).all(dim=1).double().mean() > 0.95
    far = ((first < -0.05) | (last > 1.05)) & corners
    wrong = (far | (last < first)).any(dim=1)
    if len(found) >= 5 and wrong.double().mean() > 0.2:
        place = found[wrong.int().argmax()][0].place
        raise InputError(f"{place}: many boxes reach far out or end before they begin: corners read as a size?")


def refuse_absent_classes(dataset, *, every: bool) -> None:
    """Raises InputError, with the names that occur, where classes have no object that counts.

    every: refuse if any class is absent, as for training; otherwise if all are. Reads no further than it needs.
    """
    names, seen = Counter(), set()
    for annotation in map(dataset.annotation, range(len(dataset))):
        names.update(annotation.names)
        seen.update(annotation.labels[~annotation.ignore].tolist())
        if len(seen) == len(dataset.classes) or (seen and not every):
            return
    absent = " or ".join(shown(name) for label, name in enumerate(dataset.classes, 1) if label not in seen)
    known = ", ".join(f"{shown(name)} {count}" for name, count in names.most_common(12)) or "none at all"
    raise InputError(
        f"no object that counts has the class {absent}: is it spelt as in the data, given once, not always ignored? "
        f"Names in the data: {known}. Read: {dataset.source}"
    )


def check_person(classes: Sequence[str], source: str) -> None:
    """Raises InputError where person is not among the classes."""
    if "person" not in classes:
        raise InputError(f"{source} hold people, named person; the classes are {', '.join(map(shown, classes))}")
