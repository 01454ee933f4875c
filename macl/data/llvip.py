"""LLVIP in its own layout (Jia et al., "LLVIP: A Visible-infrared Paired Dataset for Low-light Vision", 2021).

LLVIP/visible/{train,test}/NNNNNN.jpg       the first two digits are the camera
LLVIP/infrared/{train,test}/NNNNNN.jpg      the same name, registered
LLVIP/Annotations/NNNNNN.xml                VOC, shared by both images
LLVIP/ImageSets/Main/{train,test}.txt       optional
"""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from macl.data.occurrence import summary
from macl.data.sample import check_same_size, files_in, images_by_stem, read_image
from macl.data.voc import read_voc
from trainkit.errors import InputError
from trainkit.files import inside, read_lines, shown

SPLITS = ("train", "test")
OWN_DATA = (
    "data of your own goes into LLVIP's layout: visible/{train,test}/NAME.jpg, infrared/{train,test}/NAME.jpg, and "
    "Annotations/NAME.xml in VOC form"
)


class LLVIP(torch.utils.data.Dataset):
    """Pairs of LLVIP, or of data kept in its layout, as samples (see macl.data.sample).

    root: the folder that holds visible/ and infrared/, or its parent that holds LLVIP/.
    split: "train" or "test".
    lists: a folder with {split}.txt, one name without suffix a line; by default ImageSets/Main or ImageSets where they
        hold that file, else every image of visible/{split} is read. `source` says which.
    classes: the names of the objects to read, labelled 1, 2, ...; others are left out (statistics() counts them).

    `names`, `scenes`: for each pair its name and camera (-1 where the name does not start with two digits).

    Raises InputError at construction for a missing folder, list, image, partner or annotation (the first missing path
    is named), an empty list and a bad name in it; and when a sample is read, for an undecodable image, sizes that
    differ between the images or from the annotation, and an XML that is not VOC. Boxes are clipped to the image, and
    left out when nothing remains (statistics() counts both).
    """

    def __init__(
        self, root: str | Path, split: str, *, lists: str | Path | None = None, classes: Sequence[str] = ("person",)
    ):
        if split not in SPLITS:
            raise InputError(f"LLVIP has no split {split!r}; expected one of {', '.join(SPLITS)}")
        self.root = _find_root(Path(root))
        self.split = split
        self.classes = tuple(classes)
        self.names, self.source = self._list_names(lists)
        self.scenes = [int(name[:2]) if name[:2].isdecimal() and len(name) > 2 else -1 for name in self.names]
        self._images = self._find_files()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        visible_path, infrared_path, annotation_path = self.paths(index)
        visible, infrared = read_image(visible_path), read_image(infrared_path)  # (3, H, W)
        check_same_size(visible=visible, infrared=infrared, visible_path=visible_path, infrared_path=infrared_path)
        annotation = read_voc(annotation_path, classes=self.classes)
        size = (visible.shape[2], visible.shape[1])
        if annotation.size != size:
            raise InputError(
                f"{annotation_path} says {annotation.size[0]} x {annotation.size[1]} pixels but {visible_path} has "
                f"{size[0]} x {size[1]}"
            )
        return {
            "visible": visible,
            "infrared": infrared,
            "boxes": annotation.boxes,
            "labels": annotation.labels,
            "ignore": annotation.ignore,
            "image_id": range(len(self))[index],
            "path": str(visible_path),
            "scene": self.scenes[index],
        }

    scene_kind = "camera"

    @staticmethod
    def scene_name(scene: int) -> str:
        return f"{scene:02d}"

    @staticmethod
    def scene_group(scene: int) -> int:
        """Cameras are all of one kind (see `hold_out`)."""
        return 0

    def paths(self, index: int) -> tuple[Path, Path, Path]:
        """The visible image, the infrared image and the annotation of a pair."""
        name = self.names[index]
        visible, infrared = (
            self.root / modality / self.split / images[name] for modality, images in self._images.items()
        )
        return visible, infrared, self.root / "Annotations" / f"{name}.xml"

    def objects(self, index: int) -> tuple[list[str], set[int]]:
        """The names of all objects of a pair, and the labels that one of them has that is not ignored."""
        annotation = read_voc(self.paths(index)[2], classes=self.classes)
        return annotation.names, set(annotation.labels[~annotation.ignore].tolist())

    def subset(self, indices: Sequence[int], source: str) -> "LLVIP":
        """The same data set with some of its pairs, renumbered from 0; `source` becomes the new one's."""
        chosen = copy.copy(self)
        chosen.names = [self.names[index] for index in indices]
        chosen.scenes = [self.scenes[index] for index in indices]
        chosen.source = source
        return chosen

    def statistics(self) -> dict:
        """Counts over the annotations alone (no image is decoded): pairs, scenes, boxes, ignored, clipped, dropped,
        other_classes, empty_images, and min_height, median_height, max_height of the boxes in pixels (None without
        boxes)."""
        everyone = [read_voc(self.paths(index)[2], classes=self.classes) for index in range(len(self))]
        return summary(self.scenes, everyone) | {"other_classes": sum(one.other_classes for one in everyone)}

    def _list_names(self, lists: str | Path | None) -> tuple[list[str], str]:
        folders = [self.root / "ImageSets" / "Main", self.root / "ImageSets"] if lists is None else [Path(lists)]
        for file in (folder / f"{self.split}.txt" for folder in folders):
            if file.is_file():
                names = _read_list(file, self.root)
                return names, f"LLVIP {self.split}: {len(names)} pairs listed in {file}"
        if lists is not None:
            raise InputError(f"{file} does not exist; expected a list of image names")
        folder = self.root / "visible" / self.split
        names = list(images_by_stem(folder))
        if not names:
            raise InputError(f"{folder} holds no image such as NAME.jpg; {OWN_DATA}")
        return names, f"LLVIP {self.split}: {len(names)} pairs found in {folder} (no list in ImageSets)"

    def _find_files(self) -> dict[str, dict[str, str]]:
        """Checks that every listed pair is complete; returns the images' files by modality and name."""
        images = {modality: images_by_stem(self.root / modality / self.split) for modality in ("visible", "infrared")}
        annotations = self.root / "Annotations"
        known = files_in(annotations)
        for modality, found in images.items():
            for name in self.names:
                if name not in found:
                    path = self.root / modality / self.split / name
                    raise InputError(f"{path}.jpg does not exist; expected an image there ({self.source})")
        for name in self.names:
            if f"{name}.xml" not in known:
                raise InputError(f"{annotations / name}.xml does not exist; expected the boxes of {name}")
        return images


def _find_root(root: Path) -> Path:
    for candidate in (root, root / "LLVIP"):
        if (candidate / "visible").is_dir() and (candidate / "infrared").is_dir():
            return candidate
    missing = root / ("infrared" if (root / "visible").is_dir() else "visible")
    raise InputError(f"{missing} does not exist; expected visible/ and infrared/; {OWN_DATA}")


def _read_list(file: Path, root: Path) -> list[str]:
    names = read_lines(file, "one image name a line")
    if not names:
        raise InputError(f"{file} is empty; expected one image name a line")
    for name, times in Counter(names).items():
        if inside(root, name, str(file)).name != name:
            raise InputError(f"{file} lists {shown(name)}; expected an image name without folders or suffix")
        if times > 1:
            raise InputError(f"{file} lists {shown(name)} twice; expected every pair once")
    return names
