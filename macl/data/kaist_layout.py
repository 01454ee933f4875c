"""Where KAIST's images, lists and annotations lie, in each of its layouts."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from macl.data.kaist_labels import Frame, parse_frame
from macl.data.llvip import OWN_DATA
from trainkit.errors import InputError
from trainkit.files import read_text, shown


@dataclass(frozen=True)
class Layout:
    """Where things lie below the root; {set}, {video} and {image} are a frame's parts."""

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


def find_layout(root: Path) -> tuple[Path, Layout]:
    if not root.is_dir():
        raise InputError(f"{root} does not exist; expected KAIST's own root")
    for candidate in (root, root / "kaist-rgbt", root / "KAIST_processed"):
        for layout in LAYOUTS:
            if all((candidate / folder).is_dir() for folder in layout.folders):
                return candidate, layout
    half = [folder for folder in ("visible", "infrared") if (root / folder).is_dir()]
    missing = root / {"visible": "infrared", "infrared": "visible"}[half[0]] if half else root / "images"
    raise InputError(f"{missing} does not exist; expected KAIST's images/, or visible/ and infrared/; {OWN_DATA}")


def find_list(root: Path, layout: Layout, image_set: str | Path) -> Path:
    """The file of a list: of the tree's own by its name, any other by its path. Raises InputError that names those."""
    name = str(image_set).removesuffix(".txt")
    folders = [root / folder for folder in layout.lists if (root / folder).is_dir()]
    for folder in folders if Path(name).name == name else ():
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"
    if Path(image_set).is_file():
        return Path(image_set)
    known = sorted({file.stem for folder in folders for file in folder.glob("*.txt")})
    raise InputError(
        f"{(folders or [root / layout.lists[0]])[0] / name}.txt does not exist, and {image_set} is no list's path; "
        f"expected one of {', '.join(known) or 'the lists of KAIST'}; {OWN_DATA}"
    )


def read_list(file: Path) -> list[Frame]:
    """A list's frames in its order; the visible and the lwir name of a frame are the same one."""
    lines = [line.strip() for line in read_text(file, "a list of frames").split("\n")]
    names = [(name, number) for number, name in enumerate(lines, 1) if name]
    if not names:
        raise InputError(f"{file} is empty; expected a frame such as set06/V000/I00019 a line")
    for name, times in Counter(name for name, _ in names).items():
        if times > 1:
            raise InputError(f"{file} lists {shown(name)} twice; expected every frame once")
    return list(dict.fromkeys(parse_frame(name, f"{file}, line {number}") for name, number in names))


def find_annotations(root: Path, layout: Layout, annotations: str | Path | None) -> Path:
    if annotations is None:
        for folder in layout.annotations:
            if (root / folder).is_dir():
                return root / folder
        raise InputError(f"{root / layout.annotations[0]} does not exist; expected the annotations there")
    for source in (root / annotations, Path(annotations)):
        if source.is_dir() or (source.is_file() and source.suffix == ".json"):
            return source
    raise InputError(f"{annotations} is neither a folder of annotations, in {root} or elsewhere, nor a json file")
