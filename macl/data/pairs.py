"""Pairs of image files with boxes, whatever their layout on the disk."""

import abc
import bisect
import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from macl.data.annotation import Annotation
from macl.data.onto import Onto
from macl.data.sample import moved, read_pair
from trainkit.errors import InputError
from trainkit.load_report import summarise

HELD_OUT = 0.1  # share of the training pairs


class Pair(NamedTuple):
    visible: Path | str | None  # None, as for infrared, without that camera
    infrared: Path | None
    annotation: Any  # what the data set's `annotation` reads
    scene: int = -1
    daytime: bool | None = None


class PairedDataset(Dataset, abc.ABC):
    """Pairs as samples (see macl.data.sample). A subclass reads the annotation of each.

    classes: the names of labels 1, 2, ...
    split: the name of the pairs
    source: where they were read, as a sentence
    moves: of infrared, see `moved`
    at_least: pixels of the short side that are needed, see `decoded_at`
    onto: how infrared is read and put onto visible, see `with_onto`
    boxes_of: whose boxes are detected, where each camera has its own (`own_boxes`)
    modalities: the cameras there are
    resize: whether they are known to differ in size
    """

    scene_kind, scene_names = "scene", ()
    moves = ()
    at_least = None
    onto = Onto()
    own_boxes, boxes_of = False, "visible"
    modalities = ("visible", "infrared")
    resize = False

    def __init__(self, pairs: Sequence[Pair], classes: Sequence[str], *, split: str, source: str):
        self.pairs, self.classes, self.split, self.source = list(pairs), tuple(classes), split, source

    @abc.abstractmethod
    def annotation(self, index: int) -> Annotation:
        """The boxes of a pair, without its images."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        paths = self.pairs[index][:2]
        at_least = None if self.onto.places or self.moves else self.at_least  # both count in pixels of the whole image
        images, annotation = read_pair(*paths, self.onto, at_least), self.annotation(index)
        shown_in = next(image for image in images.values() if image is not None)
        _, height, width = shown_in.shape
        images = {name: torch.zeros_like(shown_in) if image is None else image for name, image in images.items()}
        if at_least is not None:
            annotation = annotation.scaled((width, height))
        if annotation.size != (width, height):
            size = " x ".join(map(str, annotation.size))
            path = paths[0] or paths[1]
            raise InputError(f"{annotation.place} is for {size} pixels but {path} has {width} x {height}")
        return self.sample(index, images, annotation)

    def sample(self, index: int, images: dict[str, Tensor], annotation: Annotation) -> dict:
        """What is known of a pair, with its images (3, H, W), moved as `moves` says."""
        pair = self.pairs[index]
        for move in self.moves:
            images = moved(images, move)
        sample = images | annotation.per_box()
        path = str(pair.visible or pair.infrared)
        sample |= {"image_id": range(len(self))[index], "path": path, "scene": pair.scene}
        if self.own_boxes:
            sample["boxes_of"] = self.boxes_of
        if len(self.modalities) == 1:
            sample["present"] = torch.tensor([name in self.modalities for name in ("visible", "infrared")])
            sample["visible_in"] = sample["present"].expand(len(sample["boxes"]), 2)
        return sample if pair.daytime is None else sample | {"daytime": pair.daytime}

    @property
    def scenes(self) -> list[int]:
        return [pair.scene for pair in self.pairs]

    def scene_name(self, scene: int) -> str:
        return self.scene_names[scene] if self.scene_names else f"{scene:02d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """Scenes of a group are alike: `hold_out` takes some of each."""
        return 0

    def changed(self, **attributes) -> "PairedDataset":
        chosen = copy.copy(self)
        vars(chosen).update(attributes)
        return chosen

    def subset(self, indices: Sequence[int], why: str) -> "PairedDataset":
        """The same data set with some of its pairs, renumbered from 0. why: for `source`."""
        pairs = [self.pairs[index] for index in indices]
        return self.changed(pairs=pairs, source=f"{self.source}, {len(pairs)} of them {why}")

    def with_onto(self, onto: Onto, boxes_of: str | None = None) -> "PairedDataset":
        """The same data set with infrared images, and boxes that are infrared's, read and put onto visible by `onto`.

        boxes_of: "visible" (None), "infrared" or "both" (the mean): which are detected where each camera has its own;
            what the camera does not show is ignored then
        """
        boxes_of = boxes_of or "visible"
        about = f"; each camera has boxes of its own, detected are those of {boxes_of}" * self.own_boxes
        return self.changed(onto=onto, boxes_of=boxes_of, source=self.source + about)

    def decoded_at(self, short_side: int | None) -> "PairedDataset":
        """The same data set with JPEGs, and their boxes, at 1/2, 1/4 or 1/8 while their short side has so many pixels.

        Images that are registered or put onto each other stay whole.
        """
        return self.changed(at_least=short_side)

    def moved(self, move: tuple[int, int] | Callable) -> "PairedDataset":
        """The same data set with infrared moved (see `sample.moved`) after the moves before; the boxes stay."""
        return self if move == (0, 0) else self.changed(moves=(*self.moves, move))

    def statistics(self) -> dict:
        """Counts over the annotations; no image is decoded. Heights are in pixels, None without boxes.

        Where known: pairs by day and by night, boxes by occlusion and by the modalities that show them.
        """
        annotations = [self.annotation(index) for index in range(len(self))]
        boxes = torch.cat([one.boxes for one in annotations])
        heights = (boxes[:, 3] - boxes[:, 1]).sort().values.double().round(decimals=1).tolist() or [None]
        names = Counter(name for one in annotations for name in one.names)
        dropped = sum(one.dropped for one in annotations)
        counts = {
            "pairs": len(self),
            "scenes": len(set(self.scenes)),
            "boxes": len(boxes),
            "ignored": sum(int(one.ignore.sum()) for one in annotations),
            "clipped": sum(one.clipped for one in annotations),
            "dropped": dropped,
            "other_classes": names.total() - len(boxes) - dropped,
            "empty_images": sum(len(one.boxes) == 0 for one in annotations),
            "min_height": heights[0],
            "median_height": heights[len(heights) // 2],
            "max_height": heights[-1],
            **{f"named_{name}": count for name, count in sorted(names.items())},
        }
        daytimes = [pair.daytime for pair in self.pairs]
        if None not in daytimes:
            counts |= {"day": daytimes.count(True), "night": daytimes.count(False)}
        if annotations[0].occlusion is not None:
            levels = torch.cat([one.occlusion for one in annotations]).bincount(minlength=3).tolist()
            counts |= zip(("whole", "partial", "heavy"), levels, strict=True)
        if annotations[0].visible_in is not None:
            seen = Counter(tuple(row) for one in annotations for row in one.visible_in.tolist())
            counts |= {"seen_in_both": seen[True, True], "visible_only": seen[True, False],
                       "infrared_only": seen[False, True]}  # fmt: skip
        return counts


class JointDataset(ConcatDataset):
    """Data sets laid end to end. "domain" in a sample is the index of its data set.

    Scene numbers are made unique across the data sets; -1, unknown, stays.
    """

    def __init__(self, *parts: Dataset):
        super().__init__(parts)
        self.source = " and ".join(part.source for part in parts)

    def __getitem__(self, index: int) -> dict:
        sample, domain = super().__getitem__(index), bisect.bisect(self.cumulative_sizes, index)
        scene = sample["scene"]
        return sample | {"domain": domain, "scene": scene if scene < 0 else scene * len(self.datasets) + domain}

    def decoded_at(self, short_side: int) -> "JointDataset":
        """See `PairedDataset.decoded_at`."""
        return JointDataset(*(part.decoded_at(short_side) for part in self.datasets))


def hold_out(dataset: PairedDataset) -> tuple[PairedDataset, PairedDataset, str]:
    """Split off validation pairs: whole scenes, since neighbouring pairs of a scene look alike.

    Takes the last scene of each group, then the last but one, until HELD_OUT of the pairs are reached; the first of a
    group stays. Where that is more than half, or no scene can be spared, every k-th pair; a single pair serves both. ->
    the rest for training, the pairs held out, and a sentence about them.
    """
    total, scenes = len(dataset), dataset.scenes
    if total < 2:
        return dataset, dataset, f"Warning: validating on the training data, as {dataset.source} cannot be split"
    groups = defaultdict(list)
    for scene in sorted(set(scenes)):
        groups[dataset.scene_group(scene)].append(scene)
    chosen = set()
    for back in range(1, max(map(len, groups.values()))):
        chosen |= {group[-back] for group in groups.values() if len(group) > back}
        if sum(scene in chosen for scene in scenes) >= HELD_OUT * total:
            break
    held_out = [index for index, scene in enumerate(scenes) if scene in chosen]
    if 0 < 2 * len(held_out) <= total:
        names = [dataset.scene_name(scene) for scene in sorted(chosen)]
        which = f"all those of {dataset.scene_kind} {summarise(names, 8)}"
    else:
        chosen, step = set(), min(round(1 / HELD_OUT), total)
        held_out = range(step - 1, total, step)
        which = f"one in {step}; they look like their neighbours in training, but no {dataset.scene_kind} is to spare"
    sentence = f"{'' if chosen else 'Warning: '}Held out for validation: {len(held_out)} of the {total} pairs of "
    sentence += f"{dataset.split}, {which}"
    kept = sorted(set(range(total)) - set(held_out))
    return dataset.subset(kept, "kept for training"), dataset.subset(held_out, "held out for validation"), sentence
