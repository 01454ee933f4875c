"""Pairs in folders of images with label files, in any of the layouts of `macl.data.layouts`."""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from macl.data import label_files
from macl.data.annotation import Annotation, Labels, annotate, join, refuse_other_form
from macl.data.layouts import ALL, FORMS, LAYOUTS, OWN_DATA, PATHS, WORDS, find_source, form_of
from macl.data.names import bare, find_images, find_pairs, images_by_stem, read_list, read_stems
from macl.data.pairs import Pair, PairedDataset
from trainkit.errors import InputError
from trainkit.files import is_image, picture_size, read_json, read_lines, regular_file, shown


class Pairs(PairedDataset):
    """Pairs of two folders, or images of one camera, with VOC, YOLO or COCO labels.

    visible: a folder; or a list of paths, in which `visible` is `infrared` for the other image, and `images` is
        `labels` for a .txt of YOLO, which may also lie beside the image; None for infrared alone
    infrared: a folder, with the same names but for the suffix; None for visible alone
    labels: a folder of .xml or .txt files with these names, or a COCO json
    labels_infrared: the same for the boxes in infrared; `labels` are visible's then, see `annotation.join`
    classes: the names of labels 1, 2, ...; other objects are left out. None: all that occur, in the order of the file
        of names, of the json's categories or of the first objects
    form: voc, yolo or coco; None: told by the files; cvc14: its tree, visible is ROOT/*/Visible/SPLIT
    listed: a list of the names to take; None: all in the folder
    suffixes: what ends the names of visible and infrared images, such as _RGB and _PreviewData
    names: of YOLO's class ids, where no file from `labels` up to `root` gives them, see `find_names`
    cameras: whether the first two digits of a name are the camera, its scene; otherwise names that are alike but for
        the number that ends them are a scene
    first_pixel: what VOC's boxes count from, 0 or 1; None: 0 if some xmin or ymin in the folder is 0
    resize: whether infrared is resized unless a flag says otherwise, see `macl.data.onto`

    Raises InputError at construction for a missing folder, image or annotation, a bad list, a json of other images and,
    where classes is None, bad labels; when a sample is read, for these, a broken image and sizes that differ.
    """

    def __init__(
        self, visible: str | Path | None, infrared: str | Path | None, labels: str | Path, *,
        labels_infrared: str | Path | None = None, classes: Sequence[str] | None = None, form: str | None = None,
        listed: Path | None = None, suffixes: Sequence[str] = ("", ""), names: dict[int, str] | None = None,
        cameras: bool = False, first_pixel: int | None = None, root: Path | None = None, split: str = ALL,
        resize: bool = False, title: str = "pairs",
    ):  # fmt: skip
        folders = [None if folder is None else Path(folder) for folder in (visible, infrared)]
        self.modalities = tuple(name for name, folder in zip(("visible", "infrared"), folders, strict=True) if folder)
        first, labels, *second = map(Path, filter(None, (visible or infrared, labels, labels_infrared)))
        self.form = form or ("yolo" if first.is_file() else form_of(labels))
        if self.form is None:
            raise InputError(f"{labels} holds no labels; expected a folder of .xml or .txt files, or a COCO .json")
        if second and None in folders:
            raise InputError(f"{second[0]}: labels of infrared need images of both cameras")
        if self.form == "cvc14":
            stems, pairs, where, order = _find_cvc14(first)
        elif first.is_file():
            stems, pairs, where, order = _follow_paths(first)
        else:
            stems, pairs, where, order = _find_in_folders(folders, suffixes, [labels, *second], self.form, listed)
        files = [file for pair in pairs for file in pair.annotation]
        self.own_boxes = len(files) > len(pairs)
        if first.is_file():  # a list of paths, beside which no folder of labels was named
            labels = next(filter(None, files)).parent
        beside = folders[0] != folders[1] == labels or "infrared" in labels.parts[len(root.parts) if root else 0 :][-2:]
        named = [file.place[:-1] if isinstance(file, Labels) else file for file in filter(None, files)]  # "(a_ir.jpg)"
        apart = beside or any(os.path.splitext(file)[0].endswith(suffixes[1] or "/") for file in named)
        self.of_infrared = apart and not self.own_boxes and len(self.modalities) == 2
        self.scene_kind, self.resize, self.opened = "camera" if cameras else "sequence", resize, False
        scenes, self.scene_names = _scenes(stems, cameras)
        pairs = [pair._replace(scene=scene) for pair, scene in zip(pairs, scenes, strict=True)]
        super().__init__(pairs, classes or (), split=split, source="")
        alike = _of_all_splits(labels, root, split)
        about, self._categories = "", order if self.form == "coco" else {}
        if self.form == "voc":
            self.first_pixel, about = label_files.first_pixel_of([*alike, *second], first_pixel)
        elif self.form == "yolo":
            ids = functools.partial(_all_ids, files, alike)
            self.names, about = label_files.find_names(labels, root or labels.parent, names, self.classes, ids)
            order = (self.names or {}).values()
            about += f"; {files.count(None)} without a label file are without objects" * (None in files)
        what = "pair" if len(self.modalities) == 2 else f"{self.modalities[0]} image"
        count = f"{len(pairs)} {what}{'s' * (len(pairs) != 1)}"
        self.source = f"{title}{'' if split == ALL else f' {split}'}: {count} {where}{about}"
        self.source += "; boxes are those in infrared" * self.of_infrared
        refuse_other_form([self.labels(index) for index in range(0, len(self), 1 + len(self) // 200)])
        if classes is None:
            self._take_all_classes(order)
        self.opened = True  # `labels` refuses sizes that differ from here on, as it is known what becomes of them

    def annotation(self, index: int) -> Annotation:
        return annotate(self.labels(index), self.classes)

    def labels(self, index: int) -> Labels:
        """The objects of a pair, in pixels of the visible image."""
        visible, infrared, files, *_ = self.pairs[index]
        first, *second = map(self._read, files, (infrared if self.of_infrared else visible or infrared, infrared))
        if len(self.modalities) == 2 and self.onto.places:
            size, own = picture_size(visible), picture_size(infrared)
            if self.of_infrared or (first.size != size and first.size == own):
                first = self.onto.labels(first, size, own)
            second = [self.onto.labels(one, size, own) for one in second]
        if self.opened and second and second[0].size != first.size and picture_size(visible) == picture_size(infrared):
            raise InputError(f"{second[0].place} is for {second[0].size} pixels but {first.place} for {first.size}")
        return join(first, *second) if second else first

    def _read(self, file: Path | Labels | None, image: Path) -> Labels:
        if self.form == "voc":
            return label_files.read_voc(file, first_pixel=self.first_pixel)
        if self.form == "yolo":
            return label_files.read_yolo(file, picture_size(image), self.names)
        return label_files.read_cvc14(file, picture_size(image)) if self.form == "cvc14" else file

    @property
    def coco_ids(self) -> tuple[list[int | str], dict[str, int | str]] | None:
        """The ids of images, and of classes by name, in their json; None where boxes are in other pixels."""
        first = self.pairs[0].annotation[0]
        if not self._categories or (self.onto.places and (self.of_infrared or self.labels(0).size != first.size)):
            return None
        return [pair.annotation[0].image_id for pair in self.pairs], self._categories

    def _take_all_classes(self, order: Sequence[str]) -> None:
        counts = Counter(item.name for index in range(len(self)) for item in self.labels(index).objects)
        if not counts:
            raise InputError(f"no object is in the labels of {self.source}")
        order = sorted(counts, key=int) if self.form == "yolo" and self.names is None else [*order, *counts]
        self.classes = tuple(name for name in dict.fromkeys(order) if counts[name])
        named = ", ".join(f"{name} ({counts[name]})" for name in self.classes)
        self.source += f"; classes: {named}"


class LLVIP(Pairs):
    """Pairs of LLVIP, or of data kept in its layout; scene is the camera, -1 where a name does not start with one.

    Jia et al., "LLVIP: A Visible-infrared Paired Dataset for Low-light Vision", 2021.

    root: the folder that holds visible/ and infrared/, or its parent that holds LLVIP/
    split: "train", "test" or your own: the names in {split}.txt of ImageSets/Main or ImageSets, one per line without
        suffix; without that file every image of visible/{split}
    """

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] | None = ("person",)):
        layout, root = LAYOUTS[0], Path(root) / "LLVIP" if (Path(root) / "LLVIP").is_dir() else Path(root)
        if not layout.has(root, split):
            raise InputError(f"{root} does not hold the folders visible/{split}/ and infrared/{split}/; {OWN_DATA}")
        super().__init__(**layout.place(root, split) | dict(form="voc", classes=classes))


def open_root(root: str | Path, *splits: str, **options) -> Pairs | None:
    """The first of the splits that the data set in a folder has, with these keywords of Pairs; None without any.

    A split may be the .txt list of the names to take, which are all in the folder of one split, or of all pairs.
    """
    root, layout = find_source(root)
    listed, suffixes = Path(splits[0]), options.get("suffixes", layout.suffixes)
    if listed.suffix != ".txt" or not listed.is_file():
        split = layout.split(root, *splits)
        return split and Pairs(**layout.place(root, split) | options)
    if layout.form == "cvc14" or layout.visible == PATHS:
        return None
    first = read_stems(listed, suffixes)[0]
    for place in (layout.place(root, word) for word in WORDS if layout.has(root, word)):
        if first in images_by_stem(place["visible"], *suffixes):
            return Pairs(**place | dict(listed=listed, split=listed.stem) | options)
    raise InputError(f"{listed}: no folder of visible images in {root} holds {shown(first)}")


def _find_in_folders(
    folders: Sequence[Path | None], suffixes: Sequence[str], labels: list[Path], form: str, listed: Path | None
) -> tuple[list[str], list[Pair], str, Sequence[str]]:
    """Pairs, or images of one camera, of folders and label files of the same names.

    -> names without suffix; pairs, whose `annotation` holds labels, or their files, of both cameras, or of visible and
    of infrared; where they were found, in words; and the order of the classes, empty where it is not known
    """
    first, *ends = (folders[0], *suffixes) if folders[0] else (folders[1], *suffixes[::-1])
    stems = list(images_by_stem(first, *ends)) if listed is None else read_stems(listed, suffixes)
    where, order = f"found in {first} (no list)" if listed is None else f"listed in {listed}", ()
    if form == "coco":
        known, categories = zip(*(_read_json(path, stems, first, suffixes) for path in labels), strict=True)
        stems = [stem for stem in stems if all(stem in one for one in known)]
        where, order = f"{where}, labels of {' and '.join(map(str, labels))}", categories[0]
    pairs = find_pairs(*folders, suffixes, stems)
    if form != "coco":
        ends = [suffixes[:1], suffixes[1:]] if len(labels) == 2 else [ends]
        known = [_find_files(path, stems, form, own) for path, own in zip(labels, ends, strict=True)]
    return stems, [Pair(*pairs[stem], tuple(one[stem] for one in known)) for stem in stems], where, order


def _find_cvc14(visible: Path) -> tuple[list[str], list[Pair], str, tuple]:
    """visible: ROOT/*/Visible/SPLIT, beside which is FIR. Frames that one camera lacks are left out."""
    root, cameras = visible.parents[2], [f"{camera}/{visible.name}" for camera in ("Visible", "FIR")]
    images = [{(path.parts[-5], path.stem): path for path in sorted(root.glob(f"*/{camera}/Frames*/*"))
               if is_image(path)} for camera in cameras]  # fmt: skip
    frames, pairs = [frame for frame in images[0] if frame in images[1]], []
    for day, stem in frames:
        files = [root / day / camera / f"Annotations/{stem}.txt" for camera in cameras]
        files = tuple(file if file.is_file() else None for file in files)
        pairs.append(Pair(*(each[day, stem] for each in images), files, daytime=day == "Day"))
    if not any(pair.annotation[0] for pair in pairs):
        raise InputError(f"{visible} holds no frame with a partner in FIR and a text in Annotations")
    where = f"found in {visible}, {len(images[0]) - len(frames)} without a partner in FIR left out"
    return [stem for _, stem in frames], pairs, where, ()


def _find_files(labels: Path, stems: list[str], form: str, suffixes: Sequence[str]) -> dict[str, Path | None]:
    """The label file of each pair: all are named as the pairs, or all with the first of the suffixes that occurs."""
    known = set(os.listdir(labels)) if labels.is_dir() else set()
    endings = [f"{end}{FORMS[form]}" for end in ("", *suffixes)]
    ending = next((end for end in endings if any(stem + end in known for stem in stems)), None)
    if ending is None:
        raise InputError(f"{labels} holds no label file of the pairs, such as {stems[0]}{endings[0]}")
    files = {stem: labels / f"{stem}{ending}" for stem in stems}
    if form == "yolo":  # which writes none for an image without objects
        return {stem: file if file.name in known else None for stem, file in files.items()}
    return {stem: regular_file(file, f"the boxes of {stem}") for stem, file in files.items()}


def _read_json(path: Path, stems: list[str], folder: Path, suffixes: Sequence[str]) -> tuple[dict, dict]:
    """The labels by image name without suffixes, and the ids of the json's categories by name.

    Folder and json may hold more than the other, but not both.
    """
    images, categories = label_files.read_coco(read_json(path, "a COCO json", dict), path)
    known = {}
    for name, one in images.values():
        if known.setdefault(name := bare(os.path.basename(name), suffixes), one) is not one:
            raise InputError(f"{path} names {shown(name)} twice, in different folders or with other suffixes")
    if sum(stem in known for stem in stems) < min(len(stems), len(images)):
        missing = next(stem for stem in stems if stem not in known)
        problem = f"holds {len(images)} images but not {missing} of {folder}, and some that are not there"
        raise InputError(f"{path} {problem}")
    return known, categories


def _follow_paths(file: Path) -> tuple[list[str], list[Pair], str, tuple]:
    """The pairs in a list of visible paths."""
    lines = read_list(file, "the path of a visible image")
    for line in lines:
        if "visible" not in os.path.splitext(line)[0] or not is_image(line):
            raise InputError(f"{file}: {shown(line)}; expected the path of an image that holds the word visible")
    stems = [os.path.splitext(line)[0] for line in lines]
    visible, infrared = (
        find_images((file.parent / stem.replace("visible", camera), stem) for stem in stems)
        for camera in ("visible", "infrared")
    )
    places = [["labels".join(stem.rsplit("images", 1)), stem] for stem in stems]
    labels = [next(filter(Path.is_file, (file.parent / f"{each}.txt" for each in place)), None) for place in places]
    if not any(labels):
        raise InputError(f"{file}: no label file of its images, such as {file.parent / stems[0]}.txt")
    return stems, list(map(Pair, visible, infrared, zip(labels))), f"listed in {file}", ()


def _scenes(stems: list[str], cameras: bool) -> tuple[list[int], list[str]]:
    """The camera of each name; or what precedes its last number, and the names of these; -1 where it is unknown.

    What precedes says nothing where it is one for all, or hardly two of a kind.
    """
    if cameras:
        return [int(stem[:2]) if stem[:2].isdecimal() and len(stem) > 2 else -1 for stem in stems], []
    begins = [re.sub(r"\d*$", "", stem) for stem in stems]
    names = list(dict.fromkeys(begins))
    if not 1 < len(names) <= len(stems) // 2:
        return [-1] * len(stems), []
    places = {name: place for place, name in enumerate(names)}
    return [places[begin] for begin in begins], names


def _of_all_splits(labels: Path, root: Path | None, split: str) -> set[Path]:
    """The folder of labels, and those in its place of other splits, so that all agree on what labels mean."""
    below = labels.relative_to(root).parts if root and labels.is_relative_to(root) else ()
    return {labels, *(root.joinpath(*(word if part == split else part for part in below)) for word in WORDS if below)}


def _all_ids(files: Sequence[Path | None], folders: Iterable[Path]) -> list[int]:
    """The class ids in label files and in those of folders."""
    others = (file for folder in folders for file in folder.glob("*.txt") if file.name not in label_files.NAME_FILES)
    files = set(filter(None, (*files, *others)))
    lines = [line.split() for file in files for line in read_lines(file, "YOLO's labels")]
    return sorted({int(word) for word, *box in lines if len(box) == 4 and word.isdecimal() and len(word) < 17})
