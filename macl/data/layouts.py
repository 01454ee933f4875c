"""Where visible images, infrared images and labels lie below a root: a table of layouts, told by their folders."""

import os
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from macl.data.label_files import NAME_FILES
from trainkit.errors import InputError

FORMS = {"voc": ".xml", "yolo": ".txt", "coco": ".json", "cvc14": ".txt"}  # of labels, by the suffix of their files
ALL = "all"  # the split of a layout that has none
SPLITS = {"train": ("train", "Train"), "val": ("val", "valid", "validation"), "test": ("test", "NewTest"), ALL: (ALL,)}
WORDS = tuple(chain(*SPLITS.values()))
LISTS = ("ImageSets/Main/{split}.txt", "ImageSets/{split}.txt", "meta/{split}.txt", "align_{split}.txt", "{split}.txt")
PATHS = "{split}.txt"  # in the place of a folder: a list of visible paths, `visible` is `infrared` in the others'
OWN_DATA = (
    "data of your own goes into LLVIP's layout: visible/{train,test}/NAME.jpg, infrared/{train,test}/NAME.jpg, and "
    "Annotations/NAME.xml in VOC form; or another of docs/data.md, or name --visible, --infrared and --labels"
)


class Layout(NamedTuple):
    """Places below the root; {split} stands for train, val, ..., and one folder without it holds all pairs."""

    name: str
    visible: str
    infrared: str
    labels: tuple[str, ...]  # the first that holds labels
    suffixes: tuple[str, str] = ("", "")  # of the names of visible and of infrared images
    names: tuple[str, ...] = ()  # of YOLO's ids, where the data set has no file of them
    cameras: bool = False  # whether the first two digits of a name are the camera
    first_pixel: int | None = None  # of VOC's boxes; None: as the data show
    beside: str = ""  # another folder, by which the layout is known
    form: str | None = None  # of the labels; None: told by the files
    resize: bool = False  # whether infrared is resized, as the cameras are known to differ in size

    def has(self, root: Path, split: str) -> bool:
        if self.visible == PATHS:
            file = root / PATHS.format(split=split)
            return file.is_file() and "visible" in file.open(errors="replace").readline(4096)
        folders = [place.format(split=split) for place in (self.visible, self.infrared, self.beside) if place]
        named = "{split}" in self.visible or split == ALL or self.listed(root, split) is not None
        return named and all(any(map(Path.is_dir, root.glob(folder))) for folder in folders)

    def split(self, root: Path, *wanted: str) -> str | None:
        """The first of the splits that is there, as it is spelt there; "val" is also valid and validation."""
        spelt = (word for name in wanted for word in SPLITS.get(name, (name,)))
        return next((word for word in spelt if self.has(root, word)), None)

    def listed(self, root: Path, split: str) -> Path | None:
        """The list of a split's names. What lies beside folders of splits may be a list of paths."""
        lists = () if self.visible == PATHS else LISTS[:2] if "{split}" in self.visible else LISTS
        return next(filter(Path.is_file, (root / place.format(split=split) for place in lists)), None)

    def place(self, root: Path, split: str) -> dict:
        """The keywords of `Pairs`."""
        places = (self.visible, self.infrared, *self.labels)
        visible, infrared, *labels = (root / place.format(split=split) for place in places)
        kept = {name: getattr(self, name) for name in ("suffixes", "cameras", "first_pixel", "form", "resize")}
        known = dict(names=dict(enumerate(self.names)) or None, listed=self.listed(root, split), title=self.name)
        labels = next(filter(form_of, labels), labels[0])
        return kept | known | dict(visible=visible, infrared=infrared, labels=labels, root=root, split=split)


_JSON = ("annotations/{split}.json", "annotations/instances_{split}.json", "Annotations/coco/{split}.json")
LAYOUTS = (
    Layout("LLVIP", "visible/{split}", "infrared/{split}", ("Annotations",), cameras=True, first_pixel=1),
    Layout("visible + infrared", "visible/{split}", "infrared/{split}",
           ("labels/visible/{split}", "labels/{split}", "labels", *_JSON, "visible/{split}", "infrared/{split}")),
    Layout("visible + infrared in each split", "{split}/visible/images", "{split}/infrared/images",
           ("{split}/visible/labels", "{split}/infrared/labels", "{split}/labels")),
    Layout("images/visible + images/infrared", "images/visible/{split}", "images/infrared/{split}",
           ("labels/visible/{split}", "labels/infrared/{split}", "labels/{split}", *_JSON)),
    Layout("images + images_ir", "images/{split}", "images_ir/{split}", ("labels/{split}", *_JSON, "images/{split}")),
    Layout("vis_imgs + ir_imgs", "{split}_imgs/vis_imgs", "{split}_imgs/ir_imgs", _JSON),
    Layout("FLIR-aligned", "JPEGImages", "JPEGImages", ("Annotations",), ("_RGB", "_PreviewData")),
    Layout("M3FD", "Vis", "Ir", ("Annotation", "Annotations", "labels")),
    Layout("M3FD", "vi", "ir", ("labels",), beside="meta",
           names=("People", "Car", "Bus", "Lamp", "Motorcycle", "Truck")),
    Layout("MSRS", "detection/vi", "detection/ir", ("detection/labels",), names=("person", "bike", "car")),
    Layout("vi + ir", "vi", "ir", ("labels",)),
    Layout("images + images_ir", "images", "images_ir", ("labels", "images")),
    Layout("RGBimages + IRimages", "RGBimages", "IRimages", ("labels",)),
    Layout("Visual + Thermal", "Visual", "Thermal", ("label", "labels")),
    Layout("Himax + Lepton", "Himax", "Lepton", ("Lepton",), resize=True),
    Layout("visible + infrared", "visible", "infrared", ("labels", "visible", "infrared")),
    Layout("CVC-14", "*/Visible/{split}", "*/FIR/{split}", ("*/Visible/{split}/Annotations",), form="cvc14"),
    Layout("lists of visible paths", PATHS, "", ("",)),
)  # fmt: skip


def find_source(root: str | Path) -> tuple[Path, Layout]:
    """The data set in a folder, or in the only folder within it that holds one, two levels down at most."""
    root = Path(root)
    for level in ("", "*", "*/*"):
        folders = sorted(filter(Path.is_dir, root.glob(level))) if level else [root]
        known = [(at, row, word) for at in folders for row in LAYOUTS for word in WORDS if row.has(at, word)]
        found = [one for one in known if one[1].form or form_of(one[1].place(one[0], one[2])["labels"])]
        if len({folder for folder, *_ in found}) > 1:
            several = ", ".join(dict.fromkeys(str(folder) for folder, *_ in found))
            raise InputError(f"{root} holds several data sets, {several}: give --data-root one of them")
        if found:
            return found[0][:2]
        if known:
            places = dict.fromkeys(str(folder / place) for folder, row, _ in known for place in row.labels)
            raise InputError(f"{root} is laid out as {known[0][1].name}, but no labels are in {', '.join(places)}")
    raise InputError(f"{root} holds no pairs in a known layout; {OWN_DATA}")


def form_of(labels: Path) -> str | None:
    """The form of the labels in a folder or file; None where there are none."""
    if labels.is_file():
        return "coco" if labels.suffix == FORMS["coco"] else None
    names = os.listdir(labels) if labels.is_dir() else ()
    kinds = {os.path.splitext(name)[1].lower() for name in names if name not in NAME_FILES}
    return next((form for form, suffix in FORMS.items() if suffix in kinds and form in ("voc", "yolo")), None)
