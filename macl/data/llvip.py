"""LLVIP in its own layout (Jia et al., "LLVIP: A Visible-infrared Paired Dataset for Low-light Vision", 2021).

LLVIP/visible/{train,test}/NNNNNN.jpg       the first two digits are the camera
LLVIP/infrared/{train,test}/NNNNNN.jpg      the same name, registered
LLVIP/Annotations/NNNNNN.xml                VOC, shared by both images
LLVIP/ImageSets/Main/{train,test}.txt       optional
"""

from collections.abc import Sequence
from pathlib import Path

from macl.data.annotation import Annotation
from macl.data.pairs import OWN_DATA, Pair, PairedDataset, find_images, find_root, read_list
from macl.data.sample import images_by_stem
from macl.data.voc import read_voc
from trainkit.errors import InputError
from trainkit.files import inside, regular_file, shown


class LLVIP(PairedDataset):
    """Pairs of LLVIP, or of data kept in its layout; scene is the camera, -1 where a name does not start with one.

    root: the folder that holds visible/ and infrared/, or its parent that holds LLVIP/
    split: "train", "test" or your own: the names in {split}.txt of ImageSets/Main or ImageSets, one per line without
        suffix; without that file every image of visible/{split}
    classes: the names of labels 1, 2, ...; other objects are left out

    Raises InputError at construction for a missing folder, image or annotation, and a bad list; when a sample is read,
    for a broken image, sizes that differ, and an XML that is not VOC.
    """

    scene_kind = "camera"

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] = ("person",)):
        root, _ = find_root(root, ["LLVIP"], ["visible", "infrared"])
        names, where = _find_names(root, split)
        visible, infrared = (
            find_images((root / folder / split / name, name) for name in names) for folder in ("visible", "infrared")
        )
        files = [regular_file(root / "Annotations" / f"{name}.xml", f"the boxes of {name}") for name in names]
        cameras = [int(name[:2]) if name[:2].isdecimal() and len(name) > 2 else -1 for name in names]
        pairs = map(Pair, visible, infrared, files, cameras)
        super().__init__(pairs, classes, split=split, source=f"LLVIP {split}: {len(names)} pairs {where}")

    def annotation(self, index: int) -> Annotation:
        return read_voc(self.pairs[index].annotation, classes=self.classes)


def _find_names(root: Path, split: str) -> tuple[list[str], str]:
    """The names of the pairs, and their source."""
    for file in (root / folder / f"{split}.txt" for folder in ("ImageSets/Main", "ImageSets")):
        if file.is_file():
            names = read_list(file, "one image name")
            for name in names:
                if inside(root, name, str(file)).name != name:
                    raise InputError(f"{file}: {shown(name)}; expected an image name without folders or suffix")
            return names, f"listed in {file}"
    folder = root / "visible" / split
    names = list(images_by_stem(folder))
    if not names:
        raise InputError(f"{folder} holds no image such as NAME.jpg; {OWN_DATA}")
    return names, f"found in {folder} (no list in ImageSets)"
