"""The label files of pairs: PASCAL VOC, YOLO's text with its file of names, and COCO's json. All raise InputError."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import trainkit.files as files
from macl.data.annotation import Labels, Object
from trainkit.errors import InputError
from trainkit.files import MAX_ID, image_size, number, numbers, objects, plain_text, read_lines, read_text

NAME_FILES = ("classes.txt", "obj.names", "data.yaml", "*.yaml", "*.yml")
OCCLUSION = "occlusion (none, partial or heavy)"
_FLAGS = {"true": 1, "yes": 1, "false": 0, "no": 0, "": 0}
_YAML_NAMES = re.compile(r"^names:[ \t]*(\[[^]]*]|\{[^}]*}|(?:\n+[ \t]*(?:-[ \t]|\d{1,9}[ \t]*:).*)+)", re.MULTILINE)
_YAML_ITEM = re.compile(r"""(?:(\d{1,9})\s*:\s*)?("[^"]*"|'[^']*'|[^\s,:'"-][^,\n]*)""")


def read_voc(path: str | Path, *, first_pixel: int = 1, occlusion: bool = False) -> Labels:
    """Objects marked "difficult" are ignored. Boxes are <xmin> <ymin> <xmax> <ymax>, or KAIST's <x> <y> <w> <h>.

    first_pixel: 1, as in VOC, where a box includes its last pixel: edges are x1 - 1, y1 - 1, x2, y2; or 0
    occlusion: whether objects have one, 0 to 2
    """
    path = files.regular_file(path, "a VOC annotation")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # LookupError: an unknown encoding
        raise InputError(f"{path} is not XML ({files.reason(error)}); expected a VOC annotation") from error
    if root.tag != "annotation":
        raise InputError(f"{path} starts with <{files.shown(root.tag)[1:-1]}>; expected the <annotation> of a VOC file")
    size = image_size(root.findtext("size/width"), root.findtext("size/height"), f"{path}, <size>")
    found = []
    for item in root.iterfind("object"):
        name = item.findtext("name", "").strip()
        if not name:
            raise InputError(f"{path} has an <object> without a <name>; expected a VOC annotation")
        sides = ("xmin", "ymin", "xmax", "ymax") if item.find("bndbox/x") is None else "xywh"
        box = tuple(number(item.findtext(f"bndbox/{side}"), f"{path}, <bndbox><{side}>") for side in sides)
        x1, y1, x2, y2 = edges(*box) if sides == "xywh" else box
        ignore, level = flag(item.findtext("difficult", ""), f"{path}, <difficult>"), 0
        if occlusion:
            level = number(item.findtext("occlusion", "0"), f"{path}, {OCCLUSION}", 0, 2, whole=True)
        found.append(Object(name, (x1 - first_pixel, y1 - first_pixel, x2, y2), ignore, level))
    return Labels(str(path), size, found)


def first_pixel_of(folders: Iterable[Path], known: int | None) -> tuple[int, str]:
    """What VOC's boxes count from, and a clause about it."""
    zero = re.compile(r"<[xy]min>\s*0(?:\.0*)?\s*<")
    found = (file for at in folders for file in at.glob("*.xml") if zero.search(read_text(file, "VOC's labels")))
    file = next(found, None)
    first = int(file is None) if known is None else known
    why = "as no xmin and no ymin is 0" if file is None else f"{'though' if first else 'as'} {file.name} has a 0"
    return first, f"; boxes count pixels from {first}, {why}"


def flag(value, place: str) -> bool:
    """Whether an annotation marks something: true, yes or 1 to 9, rather than false, no, 0 or nothing."""
    word = str(value).strip().lower()
    return number(_FLAGS.get(word, word), place, 0, 9, whole=True) > 0


def read_yolo(path: Path | None, size: tuple[int, int], names: Mapping[int, str] | None) -> Labels:
    """Per line a class id and centre x, centre y, width, height as fractions of the image's sides.

    path: None, as an empty file, for an image without objects
    size: width, height of the image in pixels
    names: by id; None: an id is its own name

    Boxes that reach out of the image are clipped later. A centre outside of it is refused, and so are other numbers per
    line: polygons and scores.
    """
    found = []
    for count, line in enumerate(read_text(path, "YOLO's labels").split("\n") if path else (), 1):
        if not line.strip():
            continue
        place = f"{path}, line {count}"
        first, *values = line.split()
        if len(values) != 4:
            kind = "a score" if len(values) == 5 else "a polygon" if len(values) > 5 else "part of a line"
            expected = "a class id, centre x, centre y, width, height"
            raise InputError(f"{place} has {len(values) + 1} numbers, as of {kind}; expected {expected}")
        label = number(first, f"{place}, class id", 0, MAX_ID, whole=True)
        if names is not None and label not in names:
            known = ", ".join(f"{key} {name}" for key, name in names.items())
            raise InputError(f"{place}: class id {label} is beyond the names, {known}; see classes.txt or data.yaml")
        x, y = numbers(values[:2], f"{place}, centre in fractions of the image", 2, 0, 1)
        wide, high = numbers(values[2:], f"{place}, width and height in fractions of the image", 2, 0, 2)
        edges = (x - wide / 2) * size[0], (y - high / 2) * size[1], (x + wide / 2) * size[0], (y + high / 2) * size[1]
        found.append(Object(str(label) if names is None else names[label], edges))
    return Labels(str(path), size, found)


def read_cvc14(path: Path | None, size: tuple[int, int]) -> Labels:
    """Per line x, y, width, height, 1 0 0 0 0, the person's number in both cameras, 0: the centre, pixels from 1.

    path, size: as of `read_yolo`
    """
    found = []
    for count, line in enumerate(read_lines(path, "CVC-14's labels") if path else (), 1):
        x, y, wide, high, *_, key, _ = numbers(line.split(), f"{path}, line {count} (11 numbers)", 11)
        box = edges(x - 1 - wide / 2, y - 1 - high / 2, wide, high)
        found.append(Object("person", box, key=int(key)))
    return Labels(str(path), size, found)


def read_names(path: Path) -> dict[int, str]:
    """Class id -> name: the lines of a text file, or `names` of a YAML file, {} without; its `nc` is their number."""
    text = read_text(path, "the names of the classes")
    if path.suffix not in (".yaml", ".yml"):
        return dict(enumerate(filter(None, map(str.strip, text.split("\n")))))
    text = re.sub(r"(?m)(?:^|[ \t]+)(?:#.*)?$", "", text)
    found, count = _YAML_NAMES.search(text), re.search(r"(?m)^nc:[ \t]*(\d{1,9})[ \t]*$", text)
    body = found[1] if found else ""
    body = (
        body.strip("[]{}") if body[:1] in "[{" else body.replace(",", "\0")
    )  # which ends no name in a line of its own
    items = _YAML_ITEM.findall(body)
    names = {int(key or i): name.strip().strip("'\"").replace("\0", ",") for i, (key, name) in enumerate(items)}
    if re.search(r"(?m)^names:", text) and (not names or len(names) < len(items)):
        raise InputError(f"{path}: names is not a list, or not a mapping of whole numbers, of class names")
    if names and count and int(count[1]) != len(names):
        raise InputError(f"{path} says nc: {count[1]} but gives {len(names)} names")
    return names


def find_names(labels: Path, root: Path, known: dict | None, classes: Sequence[str], ids: Callable):
    """YOLO's names by class id, None where an id is its own name, and a clause about them.

    labels, root: the file of names is in the folder of the labels, or else in one above it up to `root`
    known: the names of the layout, where there is no file
    ids: gives all that occur, which `classes` name in order where nothing else does; or the ids 0, 1, 2, ...
    """
    above = [folder for folder in labels.parents if folder.is_relative_to(root)]
    for file in chain.from_iterable(sorted(folder.glob(at)) for folder in (labels, *above) for at in NAME_FILES):
        if names := read_names(file):
            return names, f"; class names of {file}"
    if known or all(map(str.isdecimal, classes)):
        alone = "; no classes.txt or data.yaml names the class ids, so they are their own names"
        return known, "" if known else alone
    occurring = ids()
    names = dict(zip(occurring if len(occurring) == len(classes) else range(len(classes)), classes, strict=True))
    return names, "; no classes.txt or data.yaml: " + ", ".join(f"id {key} is {name}" for key, name in names.items())


def read_coco(
    data: dict, path: str | Path, *, name_key: str = "file_name", occlusion: bool = False
) -> tuple[dict[int | str, tuple[str, Labels]], dict[str, int | str]]:
    """Image id -> image name and labels, and category name -> id, in the file's order. A bbox is x, y, width, height.

    data: the json of the file `path`
    name_key: of an image's name
    occlusion: whether annotations have one, 0 to 2

    What is marked as crowd or "ignore" is ignored. Ids are whole numbers or texts.
    """
    named = objects(data, "categories", str(path))
    categories = {_id(item, "id", place): plain_text(item.get("name"), f"{place}, name") for item, place in named}
    images, annotations = {}, objects(data, "annotations", str(path))
    for item, place in objects(data, "images", str(path)):
        name = plain_text(item.get(name_key), f"{place}, {name_key}")
        size = image_size(item.get("width"), item.get("height"), place)
        image = _id(item, "id", place)
        images[image] = name, Labels(f"{place} ({name})", size, [], image_id=image)
    if not images:
        raise InputError(f"{path} holds no images")
    ids = [_id(item, "id", place) for item, place in annotations if "id" in item]
    each = ((categories, named), ({name for name, _ in images.values()}, data["images"]), (set(ids), ids))
    if any(len(once) < len(given) for once, given in each):
        raise InputError(f"{path} holds a category id, an image id, a {name_key} or an annotation id twice")
    for item, place in annotations:
        image, category = _id(item, "image_id", place), _id(item, "category_id", place)
        if image not in images or category not in categories:
            raise InputError(f"{place}: no image has the id {image}, or no category the id {category}")
        box = edges(*numbers(item.get("bbox"), f"{place}, bbox (x, y, width, height)"))
        ignore = flag(item.get("ignore", ""), f"{place}, ignore") or flag(item.get("iscrowd", ""), f"{place}, iscrowd")
        level = number(item.get("occlusion"), f"{place}, {OCCLUSION}", 0, 2, whole=True) if occlusion else 0
        images[image][1].objects.append(Object(categories[category], box, ignore, level))
    return images, {name: category for category, name in categories.items()}


def edges(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x, y, x + width, y + height


def _id(item: dict, key: str, place: str) -> int | str:
    value = item.get(key)
    if isinstance(value, str):
        return plain_text(value, f"{place}, {key}")
    return number(value, f"{place}, {key}", -MAX_ID, MAX_ID, whole=True)
