"""LLVIP in its own layout (Jia et al., "LLVIP: A Visible-infrared Paired Dataset for Low-light Vision", 2021).

LLVIP/visible/{train,test}/NNNNNN.jpg       the first two digits are the camera
LLVIP/infrared/{train,test}/NNNNNN.jpg      the same name, registered
LLVIP/Annotations/NNNNNN.xml                VOC, shared by both images
LLVIP/ImageSets/Main/{train,test}.txt       optional
"""

from collections.abc import Sequence
from pathlib import Path

from macl.data.annotation import Annotation
from macl.data.pairs import OWN_DATA, Listing, Pair, PairedDataset, find_root, read_list
from macl.data.sample import images_by_stem
from macl.data.voc import read_voc
from trainkit.errors import InputError
from trainkit.files import inside, shown

SPLITS = ("train", "test")


class LLVIP(PairedDataset):
    """Pairs of LLVIP, or of data kept in its layout; scene is the camera, -1 where a name does not start with one.

    root: the folder that holds visible/ and infrared/, or its parent that holds LLVIP/.
    split: "train" or "test". The pairs of ImageSets/Main or ImageSets where they hold {split}.txt, one name without
        suffix per line; else every image of visible/{split}. `source` says which.
    classes: the names of the objects to read, labelled 1, 2, ...; others are left out (statistics() counts them).

    Raises InputError at construction for the first missing folder, image, partner or annotation, and a bad list; when a
    sample is read, for a broken image, sizes that differ, and an XML that is not VOC.
    """

    scene_kind = "camera"

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] = ("person",)):
        if split not in SPLITS:
            raise InputError(f"LLVIP has no split {split!r}; expected one of {', '.join(SPLITS)}")
        root, _ = find_root(root, ["LLVIP"], ["visible", "infrared"])
        names, where = _find_names(root, split)
        listing, pairs = Listing(), []
        for name in names:
            images = [listing.image(root / folder / split / name, name) for folder in ("visible", "infrared")]
            camera = int(name[:2]) if name[:2].isdecimal() and len(name) > 2 else -1
            pairs.append(Pair(*images, listing.file(root / "Annotations" / f"{name}.xml", name), camera))
        super().__init__(pairs, classes, split=split, source=f"LLVIP {split}: {len(pairs)} pairs {where}")

    def annotation(self, index: int) -> Annotation:
        return read_voc(self.pairs[index].annotation, classes=self.classes)


def _find_names(root: Path, split: str) -> tuple[list[str], str]:
    """The names of the pairs, and where they were found."""
    for file in (root / folder / f"{split}.txt" for folder in ("ImageSets/Main", "ImageSets")):
        if file.is_file():
            names = read_list(file, "one image name")
            for name, place in names.items():
                if inside(root, name, place).name != name:
                    raise InputError(f"{place}: {shown(name)}; expected an image name without folders or suffix")
            return list(names), f"listed in {file}"
    folder = root / "visible" / split
    names = list(images_by_stem(folder))
    if not names:
        raise InputError(f"{folder} holds no image such as NAME.jpg; {OWN_DATA}")
    return names, f"found in {folder} (no list in ImageSets)"
