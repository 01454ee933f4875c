"""The labels of KAIST's frames: bbGt text, the two kinds of XML, and the json of the test frames.

Boxes are taken as published, nothing added or subtracted, as in the benchmark's evaluation.
"""

import re
from pathlib import Path
from typing import NamedTuple

import trainkit.files as files
from macl.data.annotation import Labels, Object
from macl.data.label_files import OCCLUSION, edges, flag, read_coco, read_voc
from trainkit.errors import InputError
from trainkit.files import MAX_ID, number, numbers, read_text, shown

IGNORED_NAMES = ("people", "cyclist", "person?", "person?a", "__ignore__")
BBGT = "% bbGt version=3"
_FRAME = re.compile(r"set([0-9]{2})[/_]V([0-9]{3})[/_](?:(?:visible|lwir)[/_])?I([0-9]{5})")


class Frame(NamedTuple):
    """The name of a frame: both images and the annotation are found by it."""

    set: int
    video: int
    number: int

    @property
    def name(self) -> str:
        return f"set{self.set:02d}/V{self.video:03d}/I{self.number:05d}"

    @property
    def scene(self) -> int:
        """Set and video as one number: 6001 for set06/V001."""
        return 1000 * self.set + self.video

    @property
    def daytime(self) -> bool:
        """Sets 00 to 02 and 06 to 08 were taken by day, 03 to 05 and 09 to 11 by night."""
        return self.set % 6 < 3

    def path(self, template: str) -> str:
        """A path in which {set}, {video} and {image} stand for the parts of the name."""
        return template.format(**dict(zip(("set", "video", "image"), self.name.split("/"), strict=True)))


def parse_frame(name: str, place: str) -> Frame:
    """The frame of "set06/V000/I00019", "set06_V000_visible_I00019" or "..._lwir_...". place: for messages.

    Nothing else passes, so that no path made of it can leave a data set's root.
    """
    match = _FRAME.fullmatch(name)
    if match is None or int(match[1]) > 11:
        raise InputError(f"{place} names {shown(name)}; expected a frame of set00 to set11 such as set06/V000/I00019")
    return Frame(*map(int, match.groups()))


def read_frame(path: Path) -> Labels:
    """One frame's .xml or bbGt: per line a name, x y w h, occlusion, x y w h of the visible part, ignore, angle."""
    if path.suffix == ".xml":
        return read_voc(path, first_pixel=0, occlusion=True)
    first, *lines = read_text(path, "a bbGt annotation").split("\n")
    if first.strip() != BBGT:
        raise InputError(f"{path} starts with {shown(first.strip())}; expected {BBGT!r}, the version that is read")
    objects = []
    for count, line in enumerate(lines, 2):
        if line.strip():
            place = f"{path}, line {count} (a name and 11 numbers)"
            name, *values = line.split()
            values = numbers(values, place, 11)
            level = number(values[4], f"{place}, {OCCLUSION}", 0, 2, whole=True)
            ignore = flag(values[9], f"{place}, ignore")
            objects.append(Object(name, edges(*values[:4]), ignore, level, key=len(objects)))  # in both cameras' files
    return Labels(str(path), None, objects)


def read_json(path: str | Path) -> tuple[dict[Frame, Labels], str]:
    """The labels by frame, in the order of the image ids, and the version that the file says it holds.

    The published json of the 2252 test frames: COCO's, whose images have an "im_name" instead of a "file_name", and
    whose annotations have an "occlusion".
    """
    data = files.read_json(path, "the json of KAIST's annotations", dict)
    images, _ = read_coco(data, path, name_key="im_name", occlusion=True)
    by_id = {number(key, f"{path}, image id", -MAX_ID, MAX_ID, whole=True): image for key, image in images.items()}
    frames = {parse_frame(name, labels.place): labels for _, (name, labels) in sorted(by_id.items())}
    if len(frames) < len(images):
        raise InputError(f"{path} holds an im_name twice; expected each once")
    improved = isinstance(data.get("info_improved"), dict)
    return frames, "improved annotations, as the file says" if improved else "the file does not say which revision"
