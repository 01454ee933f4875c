"""KAIST in its own tree, or in the VOC layout that it is often converted to.

Hwang et al., "Multispectral Pedestrian Detection: Benchmark Dataset and Baseline" (CVPR 2015).
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from macl.data.annotation import Annotation, Labels, annotate, check_person, refuse_absent_classes
from macl.data.kaist_labels import IGNORED_NAMES, Frame, parse_frame, read_json, read_labels
from macl.data.pairs import OWN_DATA, Listing, Pair, PairedDataset, find_root, read_list
from macl.data.sample import read_image
from trainkit.errors import InputError

TRAINING_RULES = {"min_height": 20, "max_occlusion": 1}  # what is smaller or heavily occluded teaches little


class Layout(NamedTuple):
    """Where things lie below the root; {set}, {video} and {image} are the parts of a frame's name."""

    name: str
    folders: tuple[str, ...]  # by which it is known
    images: tuple[str, str]  # visible, infrared; without suffix
    annotations: tuple[str, ...]  # the first that exists is read by default
    lists: tuple[str, ...]  # a line is set06/V000/I00019, or a name of the processed layout's images


LAYOUTS = (
    Layout(
        name="original tree",
        folders=("images",),
        images=("images/{set}/{video}/visible/{image}", "images/{set}/{video}/lwir/{image}"),
        annotations=("annotations", "annotations-xml-new", "annotations-xml"),
        lists=("imageSets", "ImageSets"),
    ),
    Layout(
        name="processed VOC layout",
        folders=("visible", "infrared"),
        images=("visible/{set}_{video}_visible_{image}", "infrared/{set}_{video}_lwir_{image}"),
        annotations=("Annotations",),
        lists=("ImageSets", "ImageSets/Main"),
    ),
)
FORMS = (
    "{set}/{video}/{image}.txt",  # bbGt version 3
    "{set}/{video}/{image}.xml",
    "{set}_{video}_visible_{image}.xml",
    "{set}/{video}/visible/{image}.txt",  # KAIST-Paired (Zhang et al., 2019), which labels lwir by itself as well
)


class KAISTFrames(PairedDataset):
    """Frames with their labels; an annotation json has these alone. The annotation of a pair is Labels, or a file."""

    scene_kind = "video"
    size = None  # width, height in pixels of frames whose labels do not say it
    rules = {"min_height": 0, "max_occlusion": 2}

    def labels(self, index: int) -> Labels:
        """What the annotation says of a frame, before any rule."""
        source = self.pairs[index].annotation
        labels = source if isinstance(source, Labels) else read_labels(source)
        return labels._replace(size=labels.size or self.size)

    def annotation(self, index: int, *, clip: bool = True) -> Annotation:
        return annotate(self.labels(index), self.classes, ignored_names=IGNORED_NAMES, **self.rules, clip=clip)

    people = annotation

    def ground_truth(self) -> list[dict]:
        """What `macl.metrics` compares detections with, one dict per frame, without the images.

        boxes (not clipped), labels, ignore and occlusion as in a sample, daytime, and size (H, W).
        """
        truth = []
        for index, pair in enumerate(self.pairs):
            annotation = self.annotation(index, clip=False)
            truth.append(annotation.per_box() | {"daytime": pair.daytime, "size": annotation.size[::-1]})
        return truth

    @staticmethod
    def scene_name(scene: int) -> str:
        return f"set{scene // 1000:02d}/V{scene % 1000:03d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """The set: one place, by day or by night."""
        return scene // 1000


class KAIST(KAISTFrames):
    """Pairs of KAIST, with occlusion and daytime; scene is 6001 for set06/V001. Frames without people are kept.

    root: the folder that holds images/, or visible/ and infrared/; or its parent, where that is called kaist-rgbt or
        KAIST_processed.
    image_set: the name of a list in the root's imageSets ("train-all-02", "test-all-20", ...), or a list's path.
    annotations: a folder, in the root or anywhere, of one file per frame (see FORMS), or the published json of the test
        frames. By default the root's own folder.
    stride: keep every n-th frame of a video, counted as the benchmark's own lists do: those whose number + 1 is
        divisible by it, whatever the list left out. train-all-01 with stride 2 is train-all-02.
    classes: the names that are real, labelled 1, 2, ..., person among them; people, cyclist and person? are ignored
        under person's label unless they are among them too.
    min_height, max_occlusion: a lower box, in pixels, or more occlusion (0 none, 1 partial, 2 heavy) is ignored. None
        is by default, as the rows of the miss rate have limits of their own; TRAINING_RULES are for training.

    `source` says which list, layout, labels and rules were read. Raises InputError at construction for the first
    missing folder, list, image, partner or annotation, a bad name in the list and an annotation json of another form;
    when a sample is read, for a broken image, sizes that differ, and annotations of another version.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str | Path,
        annotations: str | Path | None = None,
        stride: int = 1,
        *,
        classes: Sequence[str] = ("person",),
        min_height: float = 0,
        max_occlusion: int = 2,
    ):
        check_person(classes, "KAIST's annotations")
        root, number = find_root(root, ["kaist-rgbt", "KAIST_processed"], *(layout.folders for layout in LAYOUTS))
        layout = LAYOUTS[number]
        file = _find_list(root, layout, image_set)
        # The visible and the lwir name of a frame are the same one.
        listed = list(dict.fromkeys(parse_frame(*line) for line in read_list(file, "a frame").items()))
        frames = [frame for frame in listed if stride > 0 and (frame.number + 1) % stride == 0]
        if not frames:
            raise InputError(f"{file} lists {len(listed)} frames, but none whose number + 1 is divisible by {stride=}")
        listing, images = Listing(), []
        for frame in frames:
            what = f"{frame.name}, listed in {file}"
            images.append([listing.image(root / frame.path(form), what) for form in layout.images])
        labels, about_labels = _find_labels(_find_annotations(root, layout, annotations), frames)
        pairs = [
            Pair(*both, label, frame.scene, frame.daytime)
            for frame, both, label in zip(frames, images, labels, strict=True)
        ]
        day = sum(frame.daytime for frame in frames)
        source = (
            f"KAIST {file.stem}: {len(pairs)} pairs ({day} by day, {len(pairs) - day} by night) of {root}, "
            f"{layout.name}, among the {len(listed)} listed in {file}; labels of {about_labels}"
        )
        super().__init__(pairs, classes, split=file.stem, source=source)
        self.size = tuple(read_image(pairs[0].visible).shape[:0:-1])
        self._set_rules(min_height, max_occlusion)

    def with_rules(self, *, min_height: float, max_occlusion: int) -> "KAIST":
        """The same pairs, of which other boxes are ignored."""
        ruled = copy.copy(self)
        ruled._set_rules(min_height, max_occlusion)
        return ruled

    def _set_rules(self, min_height: float, max_occlusion: int) -> None:
        self.rules = {"min_height": min_height, "max_occlusion": max_occlusion}
        if self.rules != KAISTFrames.rules:
            self.source += f"; people below {min_height:g} pixels or of occlusion above {max_occlusion} are ignored"


def _find_list(root: Path, layout: Layout, image_set: str | Path) -> Path:
    """The file of a list: of the root's own by its name, any other by its path."""
    name = str(image_set).removesuffix(".txt")
    places = [*(root / folder / f"{name}.txt" for folder in layout.lists), Path(image_set)]
    for file in places:
        if file.is_file():
            return file
    known = sorted({file.stem for folder in layout.lists for file in (root / folder).glob("*.txt")})
    expected = ", ".join(known) or "the lists of KAIST"
    raise InputError(f"{places[0]} does not exist; expected the path of a list, or one of {expected}; {OWN_DATA}")


def _find_annotations(root: Path, layout: Layout, annotations: str | Path | None) -> Path:
    """The folder or json of the annotations."""
    places = [root / folder for folder in ([annotations] if annotations else layout.annotations)]
    for place in (*places, Path(annotations or places[0])):
        if place.is_dir() or (place.is_file() and place.suffix == ".json"):
            return place
    raise InputError(f"{places[0]} does not exist; expected a folder of annotations, or a json")


def _find_labels(source: Path, frames: list[Frame]) -> tuple[list[Path | Labels], str]:
    """The labels of every frame, or their file, and a sentence about them."""
    if source.suffix == ".json":
        known, version = read_json(source)
        for frame in frames:
            if frame not in known:
                raise InputError(f"{source} holds {len(known)} frames but not {frame.name}; expected all listed")
        return [known[frame] for frame in frames], f"{source} ({version})"
    form = next((form for form in FORMS if (source / frames[0].path(form)).is_file()), FORMS[0])
    listing, which = Listing(), "visible image" if "/visible/" in form else "frame"
    about = f"{source}, one {form[-3:]} file per {which} (which do not say of which revision)"
    return [listing.file(source / frame.path(form), frame.name) for frame in frames], about


def read_ground_truth(path: str | Path) -> tuple[list[dict], str]:
    """What KAIST.ground_truth gives, in the order of the image ids, from an annotation json alone; and its source."""
    if Path(path).suffix != ".json":
        raise InputError(f"{path} is not an annotation json; with a folder of annotations give the data's root as well")
    frames, version = read_json(path)
    pairs = [Pair(frame.name, None, labels, frame.scene, frame.daytime) for frame, labels in frames.items()]
    source = f"KAIST: {len(frames)} frames of {path} ({version})"
    data = KAISTFrames(pairs, ("person",), split="test", source=source)
    refuse_absent_classes(data, every=False)
    return data.ground_truth(), source
