"""KAIST in its own tree, or in the VOC layout that it is often converted to.

Hwang et al., "Multispectral Pedestrian Detection: Benchmark Dataset and Baseline" (CVPR 2015).
"""

from collections.abc import Sequence
from pathlib import Path

from macl.data.annotation import Annotation, Labels, annotate, check_person, join, refuse_absent_classes
from macl.data.kaist_labels import IGNORED_NAMES, Frame, parse_frame, read_frame, read_json
from macl.data.layouts import OWN_DATA
from macl.data.names import find_images, read_list
from macl.data.pairs import Pair, PairedDataset
from trainkit.errors import InputError
from trainkit.files import picture_size, regular_file

TRAINING_RULES = {"min_height": 20, "max_occlusion": 1}  # what is smaller or heavily occluded teaches little


# Where things lie below the root; {set}, {video} and {image} are the parts of a frame's name.
LAYOUTS = {  # name -> the frames' images of both cameras without suffix, and folders of annotations and of lists
    "original tree": (
        ("images/{set}/{video}/visible/{image}", "images/{set}/{video}/lwir/{image}"),
        ("annotations", "annotations-xml-new", "annotations-xml"),
        ("imageSets", "ImageSets"),
    ),
    "processed VOC layout": (
        ("visible/{set}_{video}_visible_{image}", "infrared/{set}_{video}_lwir_{image}"),
        ("Annotations",),
        ("ImageSets", "ImageSets/Main"),
    ),
}
FORMS = (
    "{set}/{video}/{image}.txt",  # bbGt version 3
    "{set}/{video}/{image}.xml",
    "{set}_{video}_visible_{image}.xml",
    "{set}/{video}/visible/{image}.txt",  # KAIST-Paired (Zhang et al., 2019), which labels lwir by itself as well
)


class KAISTFrames(PairedDataset):
    """Frames with their labels, which is all that an annotation json has. `Pair.annotation`: Labels, or files."""

    scene_kind = "video"
    size = None  # width, height in pixels of frames whose labels do not say it
    rules = {"min_height": 0, "max_occlusion": 2}

    def annotation(self, index: int, *, clip: bool = True) -> Annotation:
        labels = self.pairs[index].annotation
        if isinstance(labels, list):  # of files, of one or of both cameras
            labels, *second = map(read_frame, labels)
            if second and len(labels.objects) != len(second[0].objects):
                count = f"{len(second[0].objects)} people but {labels.place} {len(labels.objects)}"
                raise InputError(f"{second[0].place} has {count}; expected the same ones in the same order")
            labels = join(labels, *second) if second else labels
        labels = labels._replace(size=labels.size or self.size)
        return annotate(labels, self.classes, ignored_names=IGNORED_NAMES, **self.rules, clip=clip)

    def ground_truth(self) -> list[dict]:
        """What `macl.metrics` compares detections with, without the images.

        One dict per frame: boxes (not clipped), labels, ignore, occlusion and daytime as in a sample, and size (H, W).
        """
        both = [(self.annotation(index, clip=False), pair) for index, pair in enumerate(self.pairs)]
        return [one.per_box() | {"daytime": pair.daytime, "size": one.size[::-1]} for one, pair in both]

    @staticmethod
    def scene_name(scene: int) -> str:
        return f"set{scene // 1000:02d}/V{scene % 1000:03d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """The set: one place, by day or by night."""
        return scene // 1000


class KAIST(KAISTFrames):
    """Pairs of KAIST, with occlusion and daytime; scene is 6001 for set06/V001. Frames without people are kept.

    root: the folder that holds images/, or visible/ and infrared/; or the parent of kaist-rgbt or KAIST_processed
    image_set: the name of a list in the root's imageSets ("train-all-02", "test-all-20", ...), or a list's path
    annotations: a folder of one file per frame (see FORMS), in the root or anywhere, or the published json of the test
        frames; by default the root's own folder
    stride: keep the frames whose number + 1 is divisible by it; train-all-01 with stride 2 is train-all-02
    classes: the names of labels 1, 2, ..., person among them; people, cyclist and person? are ignored under person's
        label unless they are among them too

    Raises InputError at construction for a missing folder, list, image or annotation, a bad name in the list and an
    annotation json of another form; when a sample is read, for a broken image, sizes that differ, and annotations of
    another version.
    """

    def __init__(
        self, root: str | Path, image_set: str | Path, annotations: str | Path | None = None, stride: int = 1, *,
        classes: Sequence[str] = ("person",),
    ):  # fmt: skip
        check_person(classes, "KAIST's annotations")
        root, layout = find_kaist(root)
        if layout is None:
            frames = "images/set00/V000/... or visible/set00_V000_visible_..."
            raise InputError(f"{root} does not hold KAIST, whose frames are in {frames}; {OWN_DATA}")
        images, own, lists = LAYOUTS[layout]
        folders, name = [root / folder for folder in lists], str(image_set).removesuffix(".txt")
        known = sorted({file.stem for folder in folders for file in folder.glob("*.txt")})
        expected = f"one of the root's lists ({', '.join(known) or 'it has none'}), or the path of a list"
        file = _first_existing([*(folder / f"{name}.txt" for folder in folders), Path(image_set)], expected)
        # The visible and the lwir name of a frame are the same one.
        listed = list(dict.fromkeys(parse_frame(line, str(file)) for line in read_list(file, "a frame")))
        frames = [frame for frame in listed if (frame.number + 1) % stride == 0]
        if not frames:
            raise InputError(f"{file} lists {len(listed)} frames, but none whose number + 1 is divisible by {stride=}")
        visible, infrared = (
            find_images((root / frame.path(form), f"{frame.name}, listed in {file}") for frame in frames)
            for form in images
        )
        places = [root / annotations, Path(annotations)] if annotations else [root / one for one in own]
        labels, about_labels = _find_labels(_first_existing(places, "a folder of annotations, or a json"), frames)
        daytimes = [frame.daytime for frame in frames]
        pairs = map(Pair, visible, infrared, labels, [frame.scene for frame in frames], daytimes)
        source = (
            f"KAIST {file.stem}: {len(frames)} pairs ({daytimes.count(True)} by day, {daytimes.count(False)} by night) "
            f"of {root}, {layout}, among the {len(listed)} listed in {file}; labels of {about_labels}"
        )
        super().__init__(pairs, classes, split=file.stem, source=source)
        self.size = picture_size(visible[0])
        self.own_boxes = isinstance(labels[0], list) and len(labels[0]) == 2

    def with_rules(self, *, min_height: float, max_occlusion: int) -> "KAIST":
        """The same pairs, of which lower boxes, in pixels, and more occlusion (0 none, 1 partial, 2 heavy) are ignored.

        By default none are, as the rows of the miss rate have limits of their own. TRAINING_RULES are for training.
        """
        about = f"; people below {min_height:g} pixels or of occlusion above {max_occlusion} are ignored"
        return self.changed(rules=dict(min_height=min_height, max_occlusion=max_occlusion), source=self.source + about)


def _first_existing(places: list[Path], expected: str) -> Path:
    for place in places:
        if place.exists():
            return place
    raise InputError(f"{places[0]} does not exist; expected {expected}")


def find_kaist(root: str | Path) -> tuple[Path, str | None]:
    """The root, or kaist-rgbt or KAIST_processed in it, and its layout, known by the names of its frames; or None."""
    for place in (Path(root), Path(root) / "kaist-rgbt", Path(root) / "KAIST_processed"):
        for layout, frames in zip(LAYOUTS, ("images/set[01][0-9]", "visible/set[01][0-9]_V*"), strict=True):
            if any(place.glob(frames)):
                return place, layout
    return Path(root), None


def is_kaist(root: str | Path | None) -> bool:
    """Whether a folder is laid out as KAIST."""
    return root is not None and find_kaist(root)[1] is not None


def _find_labels(source: Path, frames: list[Frame]) -> tuple[list[list[Path]] | list[Labels], str]:
    """The labels of every frame, or their files, and a sentence about them."""
    if source.suffix == ".json":
        known, version = read_json(source)
        for frame in frames:
            if frame not in known:
                raise InputError(f"{source} holds {len(known)} frames but not {frame.name}; expected all listed")
        return [known[frame] for frame in frames], f"{source} ({version})"
    form = next((form for form in FORMS if (source / frames[0].path(form)).is_file()), FORMS[0])
    forms = [form, form.replace("/visible/", "/lwir/")]
    forms = forms if forms[0] != forms[1] and (source / frames[0].path(forms[1])).is_file() else forms[:1]
    which = "image of each camera" if len(forms) == 2 else "visible image" if "/visible/" in form else "frame"
    found = [[source / frame.path(form) for form in forms] for frame in frames]
    found = [[regular_file(file, f"the boxes of {file.stem}") for file in files] for files in found]
    return found, f"{source}, one {form[-3:]} file per {which} (which do not say of which revision)"


def read_ground_truth(path: str | Path) -> tuple[list[dict], str]:
    """KAIST.ground_truth in the order of the image ids, from an annotation json alone; and its source."""
    frames, version = read_json(path)
    pairs = [Pair(frame.name, None, labels, frame.scene, frame.daytime) for frame, labels in frames.items()]
    source = f"KAIST: {len(frames)} frames of {path} ({version})"
    data = KAISTFrames(pairs, ("person",), split="test", source=source)
    refuse_absent_classes(data, every=False)
    return data.ground_truth(), source
