"""KAIST in its own tree, or in the VOC layout that it is often converted to.

Hwang et al., "Multispectral Pedestrian Detection: Benchmark Dataset and Baseline" (CVPR 2015).

images/setXX/VXXX/{visible,lwir}/IXXXXX.jpg         the original tree
annotations/setXX/VXXX/IXXXXX.txt                   bbGt version 3, or .xml; KAIST-Paired's visible/IXXXXX.txt
imageSets/NAME.txt                                  setXX/VXXX/IXXXXX a line

visible/setXX_VXXX_visible_IXXXXX.jpg               the processed layout
infrared/setXX_VXXX_lwir_IXXXXX.jpg
Annotations/setXX_VXXX_visible_IXXXXX.xml
ImageSets/NAME.txt                                  the visible and the lwir name of every pair, or either
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from macl.data.kaist_labels import PLACES, Frame, Labels, People, apply_rules, as_truth, read_json, read_labels
from macl.data.kaist_layout import FORMS, find_annotations, find_layout, find_list, read_list
from macl.data.occurrence import label_of_people, summary
from macl.data.sample import check_same_size, files_in, images_by_stem, read_image
from trainkit.errors import InputError

DAYTIMES = ("all", "day", "night")
TRAINING_RULES = {"min_height": 20, "max_occlusion": 1}  # what is smaller or heavily occluded teaches little


class KAIST(torch.utils.data.Dataset):
    """Pairs of KAIST as samples (see macl.data.sample), with occlusion and daytime; scene is set and video, 6001 for
    set06/V001. Frames without people are kept.

    root: the folder that holds images/, or visible/ and infrared/; or its parent, where that is called kaist-rgbt or
        KAIST_processed. The layout is told by these folders.
    image_set: the name of a list in the root's imageSets ("train-all-02", "test-all-20", ...), or a list's path.
    annotations: a folder, in the root or anywhere, of one file a frame (setXX/VXXX/IXXXXX.txt or .xml, or the
        processed layout's names), or the published json of the test frames. By default the root's own folder.
    stride: keep every n-th frame of a video, counted as the benchmark's own lists do: those whose number + 1 is
        divisible by it, whatever the list left out. train-all-01 with stride 2 is train-all-02.
    daytime: "all", "day" (sets 00-02, 06-08) or "night" (03-05, 09-11). place: "all", "campus" (sets 00, 03, 06, 09),
        "road" (01, 04, 07, 10) or "downtown" (02, 05, 08, 11).
    classes: the names that are real, labelled 1, 2, ..., person among them; people, cyclist and person? are ignored
        under person's label unless they are among them too.
    min_height, max_occlusion: a box of less height in pixels, or more occlusion (0 none, 1 partial, 2 heavy), is
        ignored. By default none is, as evaluation wants it, whose rows have limits of their own; TRAINING_RULES are
        meant for training.

    Boxes are read as published, clipped to the image, and left out when nothing remains (statistics() counts both).
    `source` says which list, layout, labels and rules were read. Raises InputError at construction for a missing
    folder, list, image, partner or annotation (the first is named), a bad name in the list and an annotation json of
    another form; and when a sample is read, for a broken image, sizes that differ, and annotations of another version.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str | Path,
        annotations: str | Path | None = None,
        stride: int = 1,
        *,
        daytime: str = "all",
        place: str = "all",
        classes: Sequence[str] = ("person",),
        min_height: float = 0,
        max_occlusion: int = 2,
    ):
        _check_choices(stride, daytime, place, max_occlusion)
        self.root, self.layout = find_layout(Path(root))
        self.classes = tuple(classes)
        label_of_people(classes, "KAIST's annotations")
        self.rules = {"min_height": min_height, "max_occlusion": max_occlusion}
        file = find_list(self.root, self.layout, image_set)
        listed = read_list(file)
        self.frames = [frame for frame in listed if _chosen(frame, stride, daytime, place)]
        if not self.frames:
            raise InputError(
                f"{file} lists {len(listed)} frames, of which none is left with stride {stride} (frames whose number "
                f"+ 1 is divisible by it), daytime {daytime} and place {place}"
            )
        self._names = self._find_images(file)
        self._labels, about_labels = self._find_labels(annotations)
        self.size = tuple(read_image(self.paths(0)[0]).shape[:0:-1])  # width, height; all frames have the same
        self.split = file.stem
        self._about = self._describe(file, len(listed), stride, daytime, place, about_labels)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict:
        frame = self.frames[index]
        visible_path, infrared_path = self.paths(index)
        visible, infrared = read_image(visible_path), read_image(infrared_path)  # (3, H, W)
        check_same_size(visible=visible, infrared=infrared, visible_path=visible_path, infrared_path=infrared_path)
        if visible.shape[:0:-1] != self.size:
            raise InputError(
                f"{visible_path} is {visible.shape[2]} x {visible.shape[1]}; expected {self.size[0]} x {self.size[1]} "
                f"as {self.paths(0)[0]}"
            )
        people = self.people(index)
        return {
            "visible": visible,
            "infrared": infrared,
            "boxes": people.boxes,
            "labels": people.labels,
            "ignore": people.ignore,
            "image_id": range(len(self))[index],
            "path": str(visible_path),
            "scene": frame.scene,
            "occlusion": people.occlusion,
            "daytime": frame.daytime,
        }

    scene_kind = "video"

    @staticmethod
    def scene_name(scene: int) -> str:
        return f"set{scene // 1000:02d}/V{scene % 1000:03d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """The set: one place, by day or by night (see `hold_out`)."""
        return scene // 1000

    @property
    def source(self) -> str:
        """Which list, layout, labels and rules were read."""
        height, occlusion = self.rules["min_height"], self.rules["max_occlusion"]
        rules = [f"below {height:g} pixels"] * (height > 0)
        rules += [f"occluded by more than level {occlusion}"] * (occlusion < 2)
        return self._about + (f"; people {' or '.join(rules)} are ignored" if rules else "")

    @property
    def scenes(self) -> list[int]:
        """For each pair its set and video, as in the samples."""
        return [frame.scene for frame in self.frames]

    def paths(self, index: int) -> tuple[Path, Path]:
        """The visible and the infrared image of a pair."""
        index = range(len(self))[index]
        parts = self.frames[index].parts
        return tuple(
            (self.root / template.format(**parts)).with_name(names[index])
            for template, names in zip((self.layout.visible, self.layout.infrared), self._names, strict=True)
        )

    def labels(self, index: int) -> Labels:
        """What the annotation says of a frame, before any rule."""
        labels = self._labels(self.frames[index])
        if labels.size not in (None, self.size):
            raise InputError(
                f"{labels.place} says {labels.size[0]} x {labels.size[1]} pixels but {self.paths(index)[0]} belongs "
                f"to frames of {self.size[0]} x {self.size[1]}"
            )
        return labels

    def people(self, index: int) -> People:
        """The boxes of a sample, without its images."""
        return apply_rules(self.labels(index), classes=self.classes, clip_to=self.size, **self.rules)

    def objects(self, index: int) -> tuple[list[str], set[int]]:
        """The names of all objects of a frame, and the labels that one of them has that is not ignored."""
        people = self.people(index)
        return self.labels(index).names, set(people.labels[~people.ignore].tolist())

    def ground_truth(self) -> list[dict]:
        """What `macl.metrics` compares detections with, without the images: of every frame boxes (not clipped), labels,
        ignore, occlusion, daytime, and size (H, W)."""
        return [
            as_truth(frame, self.labels(index), size=self.size, classes=self.classes, **self.rules)
            for index, frame in enumerate(self.frames)
        ]

    def subset(self, indices: Sequence[int], source: str) -> "KAIST":
        """The same data set with some of its pairs, renumbered from 0; `source` begins the new one's."""
        chosen = copy.copy(self)
        chosen.frames = [self.frames[index] for index in indices]
        chosen._names = tuple([names[index] for index in indices] for names in self._names)
        chosen._about = source
        return chosen

    def with_rules(self, *, min_height: float, max_occlusion: int) -> "KAIST":
        """The same pairs, of which other boxes are ignored."""
        ruled = copy.copy(self)
        ruled.rules = {"min_height": min_height, "max_occlusion": max_occlusion}
        return ruled

    def statistics(self) -> dict:
        """Counts over the annotations alone (no image is decoded): those of LLVIP.statistics but other_classes (here
        they are ignored, not left out); pairs by day and by night; boxes by name, and by occlusion."""
        names, everyone = Counter(), []
        for index in range(len(self)):
            labels = self.labels(index)
            names.update(labels.names)
            everyone.append(apply_rules(labels, classes=self.classes, clip_to=self.size, **self.rules))
        occlusion = torch.cat([people.occlusion for people in everyone])
        return summary(self.scenes, everyone) | {
            "day": sum(frame.daytime for frame in self.frames),
            "night": sum(not frame.daytime for frame in self.frames),
            **{f"named_{name}": count for name, count in sorted(names.items())},
            **{name: int((occlusion == level).sum()) for level, name in enumerate(("whole", "partial", "heavy"))},
        }

    def _find_images(self, file: Path) -> tuple[list[str], list[str]]:
        """Checks that every pair is there; returns the files' names of the visible and of the infrared images."""
        listing = functools.cache(images_by_stem)
        found = []
        for template in (self.layout.visible, self.layout.infrared):
            names = []
            for frame in self.frames:
                path = self.root / template.format(**frame.parts)
                names.append(listing(path.parent).get(path.name))
                if names[-1] is None:
                    raise InputError(f"{path}.jpg does not exist; expected an image of {frame.name}, listed in {file}")
            found.append(names)
        return tuple(found)

    def _find_labels(self, annotations: str | Path | None) -> tuple[Callable[[Frame], Labels], str]:
        """What gives a frame's labels, and a sentence about it."""
        source = find_annotations(self.root, self.layout, annotations)
        if source.suffix == ".json":
            frames, version = read_json(source)
            for frame in self.frames:
                if frame not in frames:
                    raise InputError(f"{source} holds {len(frames)} frames but not {frame.name}; expected all listed")
            return frames.__getitem__, f"{source} ({version})"
        form = next((form for form in FORMS if (source / form.format(**self.frames[0].parts)).is_file()), FORMS[0])
        listing = functools.cache(files_in)
        for frame in self.frames:
            path = source / form.format(**frame.parts)
            if path.name not in listing(path.parent):
                raise InputError(f"{path} does not exist; expected the boxes of {frame.name} (bbGt text or XML)")
        which = "visible image" if "/visible/" in form else "frame"
        about = f"{source}, one {form[-3:]} file a {which} (which do not say of which revision)"
        return functools.partial(read_labels, source, form), about

    def _describe(self, file: Path, listed: int, stride: int, daytime: str, place: str, about_labels: str) -> str:
        day = sum(frame.daytime for frame in self.frames)
        chosen = [f"stride {stride}"] * (stride > 1) + [value for value in (daytime, place) if value != "all"]
        kept = f" (chosen from {listed} by {', '.join(chosen)})" if chosen else ""
        return (
            f"KAIST {file.stem}: {len(self)} pairs ({day} by day, {len(self) - day} by night) of {self.root}, "
            f"{self.layout.name}, listed in {file}{kept}; labels of {about_labels}"
        )


def _check_choices(stride: int, daytime: str, place: str, max_occlusion: int) -> None:
    if stride < 1:
        raise InputError(f"KAIST's stride is {stride}; expected 1 or more")
    if daytime not in DAYTIMES:
        raise InputError(f"KAIST has no daytime {daytime!r}; expected one of {', '.join(DAYTIMES)}")
    if place not in ("all", *PLACES):
        raise InputError(f"KAIST has no place {place!r}; expected one of all, {', '.join(PLACES)}")
    if max_occlusion not in (0, 1, 2):
        raise InputError(f"KAIST's max_occlusion is {max_occlusion}; expected 0 none, 1 partial or 2 heavy")


def _chosen(frame: Frame, stride: int, daytime: str, place: str) -> bool:
    return (
        (frame.number + 1) % stride == 0
        and (daytime == "all" or frame.daytime == (daytime == "day"))
        and place in ("all", frame.place)
    )
