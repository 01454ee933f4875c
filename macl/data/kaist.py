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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from macl.data.annotation import Annotation, Labels, check_person
from macl.data.kaist_labels import Frame, annotate_kaist, ground_truth, parse_frame, read_json, read_labels
from macl.data.pairs import OWN_DATA, Listing, Pair, PairedDataset, find_root, read_list
from macl.data.sample import read_image
from trainkit.errors import InputError

TRAINING_RULES = {"min_height": 20, "max_occlusion": 1}  # what is smaller or heavily occluded teaches little


class Layout(NamedTuple):
    """Where things lie below the root; {set}, {video} and {image} are the parts of a frame's name."""

    name: str
    folders: tuple[str, ...]  # by which it is known
    visible: str
    infrared: str
    annotations: tuple[str, ...]  # the first that exists is read by default
    lists: tuple[str, ...]


LAYOUTS = (
    Layout(
        name="original tree",
        folders=("images",),
        visible="images/{set}/{video}/visible/{image}",
        infrared="images/{set}/{video}/lwir/{image}",
        annotations=("annotations", "annotations-xml-new", "annotations-xml"),
        lists=("imageSets", "ImageSets"),
    ),
    Layout(
        name="processed VOC layout",
        folders=("visible", "infrared"),
        visible="visible/{set}_{video}_visible_{image}",
        infrared="infrared/{set}_{video}_lwir_{image}",
        annotations=("Annotations",),
        lists=("ImageSets", "ImageSets/Main"),
    ),
)
FORMS = (
    "{set}/{video}/{image}.txt",
    "{set}/{video}/{image}.xml",
    "{set}_{video}_visible_{image}.xml",
    "{set}/{video}/visible/{image}.txt",  # KAIST-Paired (Zhang et al., 2019), which labels lwir by itself as well
)


class KAIST(PairedDataset):
    """Pairs of KAIST as samples (see macl.data.sample), with occlusion and daytime; scene is set and video, 6001 for
    set06/V001. Frames without people are kept.

    root: the folder that holds images/, or visible/ and infrared/; or its parent, where that is called kaist-rgbt or
        KAIST_processed.
    image_set: the name of a list in the root's imageSets ("train-all-02", "test-all-20", ...), or a list's path.
    annotations: a folder, in the root or anywhere, of one file per frame (see FORMS), or the published json of the test
        frames. By default the root's own folder.
    stride: keep every n-th frame of a video, counted as the benchmark's own lists do: those whose number + 1 is
        divisible by it, whatever the list left out. train-all-01 with stride 2 is train-all-02.
    classes: the names that are real, labelled 1, 2, ..., person among them; people, cyclist and person? are ignored
        under person's label unless they are among them too.
    min_height, max_occlusion: a box of less height in pixels, or more occlusion (0 none, 1 partial, 2 heavy), is
        ignored. By default none is, as the rows of the miss rate have limits of their own; TRAINING_RULES are meant
        for training.

    `source` says which list, layout, labels and rules were read. Raises InputError at construction for the first
    missing folder, list, image, partner or annotation, a bad name in the list and an annotation json of another form;
    when a sample is read, for a broken image, sizes that differ, and annotations of another version.
    """

    scene_kind = "video"

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
            raise InputError(
                f"{file} lists {len(listed)} frames, of which none is left with stride {stride} (frames whose number "
                "+ 1 is divisible by it)"
            )
        listing = Listing()
        annotation_of, about_labels = _find_annotations(root, layout, annotations, frames[0], listing)
        pairs = []
        for frame in frames:
            what = f"{frame.name}, listed in {file}"
            images = [listing.image(root / frame.path(form), what) for form in (layout.visible, layout.infrared)]
            pairs.append(Pair(*images, annotation_of(frame), frame.scene, frame.daytime))
        self.size = tuple(read_image(pairs[0].visible).shape[:0:-1])  # width, height; all frames have the same
        day = sum(frame.daytime for frame in frames)
        kept = f" (chosen from {len(listed)} by stride {stride})" if stride > 1 else ""
        source = (
            f"KAIST {file.stem}: {len(pairs)} pairs ({day} by day, {len(pairs) - day} by night) of {root}, "
            f"{layout.name}, listed in {file}{kept}; labels of {about_labels}"
        )
        super().__init__(pairs, classes, split=file.stem, source=source)
        self._set_rules(min_height, max_occlusion)

    def with_rules(self, *, min_height: float, max_occlusion: int) -> "KAIST":
        """The same pairs, of which other boxes are ignored."""
        ruled = copy.copy(self)
        ruled._set_rules(min_height, max_occlusion)
        return ruled

    def labels(self, index: int) -> Labels:
        """What the annotation says of a frame, before any rule."""
        pair = self.pairs[index]
        labels = pair.annotation if isinstance(pair.annotation, Labels) else read_labels(pair.annotation)
        if labels.size not in (None, self.size):
            raise InputError(
                f"{labels.place} says {labels.size[0]} x {labels.size[1]} pixels but {pair.visible} belongs to frames "
                f"of {self.size[0]} x {self.size[1]}"
            )
        return labels._replace(size=self.size)

    def annotation(self, index: int) -> Annotation:
        return annotate_kaist(self.labels(index), self.classes, **self.rules)

    people = annotation

    def ground_truth(self) -> list[dict]:
        """What `macl.metrics` compares detections with, without the images: of every frame boxes (not clipped), labels,
        ignore, occlusion, daytime, and size (H, W)."""
        return [
            ground_truth(self.labels(index), self.classes, pair.daytime, **self.rules)
            for index, pair in enumerate(self.pairs)
        ]

    @staticmethod
    def scene_name(scene: int) -> str:
        return f"set{scene // 1000:02d}/V{scene % 1000:03d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """The set: one place, by day or by night."""
        return scene // 1000

    def _set_rules(self, min_height: float, max_occlusion: int) -> None:
        self.rules = {"min_height": min_height, "max_occlusion": max_occlusion}
        rules = [f"below {min_height:g} pixels"] * (min_height > 0)
        rules += [f"occluded by more than level {max_occlusion}"] * (max_occlusion < 2)
        if rules:
            self.source += f"; people {' or '.join(rules)} are ignored"


def _find_list(root: Path, layout: Layout, image_set: str | Path) -> Path:
    """The file of a list: of the root's own by its name, any other by its path."""
    name = str(image_set).removesuffix(".txt")
    folders = [root / folder for folder in layout.lists if (root / folder).is_dir()]
    own = [folder / f"{name}.txt" for folder in folders if Path(name).name == name]
    for file in (*own, Path(image_set)):
        if file.is_file():
            return file
    known = sorted({file.stem for folder in folders for file in folder.glob("*.txt")})
    raise InputError(
        f"{(folders or [root / layout.lists[0]])[0] / name}.txt does not exist, and {image_set} is no list's path; "
        f"expected one of {', '.join(known) or 'the lists of KAIST'}; {OWN_DATA}"
    )


def _find_annotations(
    root: Path, layout: Layout, annotations: str | Path | None, first: Frame, listing: Listing
) -> tuple[Callable[[Frame], Path | Labels], str]:
    """What gives a frame's labels or their file, and a sentence about it."""
    if annotations is None:
        own = [root / folder for folder in layout.annotations]
        source = next((folder for folder in own if folder.is_dir()), own[0])
    else:
        places = [place for place in (root / annotations, Path(annotations)) if place.is_dir() or place.is_file()]
        source = places[0] if places else Path(annotations)
    if source.suffix == ".json" and source.is_file():
        frames, version = read_json(source)

        def labels_of(frame: Frame) -> Labels:
            if frame not in frames:
                raise InputError(f"{source} holds {len(frames)} frames but not {frame.name}; expected all listed")
            return frames[frame]

        return labels_of, f"{source} ({version})"
    if not source.is_dir():
        raise InputError(
            f"{source} does not exist; expected a folder of annotations, in {root} or elsewhere, or a json"
        )
    form = next((form for form in FORMS if (source / first.path(form)).is_file()), FORMS[0])
    kind = f"one {form[-3:]} file per {'visible image' if '/visible/' in form else 'frame'}"
    return (
        lambda frame: listing.file(source / frame.path(form), frame.name),
        f"{source}, {kind} (which do not say of which revision)",
    )
