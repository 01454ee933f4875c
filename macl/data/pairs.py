"""Pairs of image files with boxes: what the data sets share, whatever their layout on the disk."""

import copy
import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from macl.data.annotation import Annotation
from macl.data.sample import files_in, images_by_stem, read_pair
from trainkit.errors import InputError
from trainkit.files import read_text, shown

HELD_OUT = 0.1  # share of the training pairs
OWN_DATA = (
    "data of your own goes into LLVIP's layout: visible/{train,test}/NAME.jpg, infrared/{train,test}/NAME.jpg, and "
    "Annotations/NAME.xml in VOC form"
)


class Pair(NamedTuple):
    visible: Path | str
    infrared: Path | None
    annotation: Any  # what the data set's `annotation` reads
    scene: int = -1
    daytime: bool | None = None


class PairedDataset(Dataset):
    """Pairs as samples (see macl.data.sample). A subclass lists them and says what the annotation of each holds.

    pairs: list of Pair. classes: the names of labels 1, 2, ...; split: what the pairs are of; source: a sentence about
    where they were read. Raises InputError when a sample is read, for broken images and sizes that differ.
    """

    scene_kind = "scene"

    def __init__(self, pairs: Sequence[Pair], classes: Sequence[str], *, split: str, source: str):
        self.pairs, self.classes, self.split, self.source = list(pairs), tuple(classes), split, source

    def annotation(self, index: int) -> Annotation:
        """The boxes of a pair, without its images."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        visible, infrared = self.paths(index)
        images, annotation = read_pair(visible, infrared), self.annotation(index)
        _, height, width = images["visible"].shape
        if annotation.size != (width, height):
            said = " x ".join(map(str, annotation.size))
            raise InputError(f"{annotation.place} is for {said} pixels but {visible} has {width} x {height}")
        return self.sample(index, images, annotation)

    def sample(self, index: int, images: dict[str, Tensor], annotation: Annotation) -> dict:
        pair = self.pairs[index]
        sample = images | annotation.per_box()
        sample |= {"image_id": range(len(self))[index], "path": str(pair.visible), "scene": pair.scene}
        return sample if pair.daytime is None else sample | {"daytime": pair.daytime}

    def paths(self, index: int) -> tuple[Path, Path]:
        """The visible and the infrared image of a pair."""
        return self.pairs[index][:2]

    @property
    def scenes(self) -> list[int]:
        return [pair.scene for pair in self.pairs]

    @staticmethod
    def scene_name(scene: int) -> str:
        return f"{scene:02d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """Scenes of a group are alike, so that one of them stands for the others (see `hold_out`)."""
        return 0

    def subset(self, indices: Sequence[int], why: str) -> "PairedDataset":
        """The same data set with some of its pairs, renumbered from 0; `source` tells that and `why`."""
        chosen = copy.copy(self)
        chosen.pairs = [self.pairs[index] for index in indices]
        chosen.source += f", {len(chosen)} of them {why}"
        return chosen

    def statistics(self) -> dict:
        """Counts over the annotations alone; no image is decoded. Heights are in pixels, None without boxes.

        Where the data set knows: pairs by day and by night, boxes by occlusion and by the modalities that show them.
        """
        annotations = [self.annotation(index) for index in range(len(self))]
        boxes = torch.cat([one.boxes for one in annotations])
        heights = (boxes[:, 3] - boxes[:, 1]).sort().values.tolist()
        names = Counter(name for one in annotations for name in one.names)
        daytimes = [pair.daytime for pair in self.pairs]
        dropped = sum(one.dropped for one in annotations)
        counts = {
            "pairs": len(self),
            "scenes": len(set(self.scenes)),
            "boxes": len(boxes),
            "ignored": sum(int(one.ignore.sum()) for one in annotations),
            "clipped": sum(one.clipped for one in annotations),
            "dropped": dropped,
            "other_classes": sum(names.values()) - len(boxes) - dropped,
            "empty_images": sum(len(one.boxes) == 0 for one in annotations),
            "min_height": heights[0] if heights else None,
            "median_height": heights[len(heights) // 2] if heights else None,
            "max_height": heights[-1] if heights else None,
            **{f"named_{name}": count for name, count in sorted(names.items())},
        }
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


def hold_out(dataset: PairedDataset) -> tuple[PairedDataset, PairedDataset, str]:
    """Validation pairs out of a training set: whole scenes, since neighbouring pairs of a scene look alike.

    The last scenes, one of each group a round, until they hold HELD_OUT of the pairs; the first of a group always
    stays. Where no scene can be spared, every k-th pair. -> the rest for training, the pairs held out, and a sentence
    that says what was held out. Raises InputError when there are fewer than two pairs.
    """
    total, scenes = len(dataset), dataset.scenes
    if total < 2:
        raise InputError(f"{dataset.source}: {total} pair; at least 2 are needed to hold one out")
    groups = defaultdict(list)
    for scene in sorted(set(scenes)):
        groups[dataset.scene_group(scene)].append(scene)
    chosen = set()
    for back in range(1, max(map(len, groups.values()))):
        chosen |= {group[-back] for group in groups.values() if len(group) > back}
        if sum(scene in chosen for scene in scenes) >= HELD_OUT * total:
            break
    if chosen:
        held_out = [index for index, scene in enumerate(scenes) if scene in chosen]
        which = f"all those of {dataset.scene_kind} {', '.join(map(dataset.scene_name, sorted(chosen)))}"
        sentence = f"Held out for validation: {len(held_out)} of the {total} pairs of {dataset.split}, {which}"
    else:
        step = min(round(1 / HELD_OUT), total)
        held_out = range(step - 1, total, step)
        sentence = (
            f"Warning: {dataset.split} has no {dataset.scene_kind} to spare, so one in {step} of its {total} pairs is "
            f"held out for validation ({len(held_out)} pairs), which look like their neighbours in training"
        )
    kept = sorted(set(range(total)) - set(held_out))
    return dataset.subset(kept, "kept for training"), dataset.subset(held_out, "held out for validation"), sentence


def find_root(root: str | Path, known_as: Sequence[str], *layouts: Sequence[str]) -> tuple[Path, int]:
    """The root, or a folder in it of one of these names, that holds all folders of a layout; and which layout."""
    root = Path(root)
    for candidate in (root, *(root / name for name in known_as)):
        for number, folders in enumerate(layouts):
            if all((candidate / folder).is_dir() for folder in folders):
                return candidate, number
    begun = [folders for folders in layouts if any((root / folder).is_dir() for folder in folders)]
    missing = next(root / folder for folder in (begun or layouts)[0] if not (root / folder).is_dir())
    expected = ", or ".join(" and ".join(f"{folder}/" for folder in folders) for folders in layouts)
    raise InputError(f"{missing} does not exist; expected {expected}; {OWN_DATA}")


def read_list(file: Path, what: str) -> dict[str, str]:
    """The names in a list, one per line, in its order -> their places for messages. what: what a line should be."""
    names = {}
    for number, line in enumerate(read_text(file, f"{what} per line").split("\n"), 1):
        name = line.strip()
        if name in names:
            raise InputError(f"{file} lists {shown(name)} twice; expected every pair once")
        if name:
            names[name] = f"{file}, line {number}"
    if not names:
        raise InputError(f"{file} is empty; expected {what} per line")
    return names


class Listing:
    """Finds many files in folders, each of which is listed once."""

    def __init__(self):
        self._images, self._files = functools.cache(images_by_stem), functools.cache(files_in)

    def image(self, path: Path, what: str) -> Path:
        """The image of a path without suffix. what: which image it is, for the InputError."""
        name = self._images(path.parent).get(path.name)
        if name is None:
            raise InputError(f"{path}.jpg does not exist; expected an image of {what}")
        return path.with_name(name)

    def file(self, path: Path, what: str) -> Path:
        if path.name not in self._files(path.parent):
            raise InputError(f"{path} does not exist; expected the boxes of {what}")
        return path
