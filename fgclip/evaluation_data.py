"""Data that is only evaluated on: captioned images of the retrieval benchmarks, labelled boxes, folders of classes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fgclip.data import (
    JsonItems,
    Record,
    Region,
    annotation_files,
    field,
    read_coco,
    read_instances,
    read_text,
    scale_box,
)
from fgclip.errors import InputError


def read_object(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


class Flickr30k(Sequence):
    """Records of one split of a captions file in Karpathy's layout (dataset_flickr30k.json, dataset_coco.json): an
    object with a list under images, each with filename, split and sentences, which hold raw."""

    def __init__(self, path: str | Path, split: str = "test", *, most_captions: int | None = None):
        path = Path(path)
        images = field(read_object(path), "images", list, str(path))
        self.records, splits = [], set()
        for i, image in enumerate(images):
            source = f"{path}, images[{i}]"
            if not isinstance(image, dict):
                raise InputError(f"{source}: expected an object")
            splits.add(field(image, "split", str, source))
            if image["split"] == split:
                self.records.append(self.record(image, source, most_captions))
        if not self.records:
            raise InputError(f"{path} has no split {split!r}; expected one of {', '.join(sorted(splits)) or 'several'}")

    @staticmethod
    def record(image: dict, source: str, most_captions: int | None) -> Record:
        captions = []
        for i, sentence in enumerate(field(image, "sentences", list, source)[:most_captions]):
            if not isinstance(sentence, dict):
                raise InputError(f"{source}, sentences[{i}]: expected an object")
            captions.append(field(sentence, "raw", str, f"{source}, sentences[{i}]").strip())
        if not captions:
            raise InputError(f"{source}: expected at least one sentence")
        name = field(image, "filename", str, source)
        if "filepath" in image:  # COCO's two folders
            name = f"{field(image, 'filepath', str, source)}/{name}"
        return Record(name, tuple(captions), " ".join(captions), source=source)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


class ShareGPT4V(Sequence):
    """Records of ShareGPT4V's captions (Chen et al. 2023): a JSON list of objects with image and conversations, whose
    second entry's value is the long caption. There are no short ones."""

    def __init__(self, path: str | Path):
        self.items = JsonItems(annotation_files(path))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        item, source = self.items[index]
        turns = field(item, "conversations", list, source)
        if len(turns) < 2 or not isinstance(turns[1], dict):
            raise InputError(f"{source}: expected two objects under the key conversations")
        caption = field(turns[1], "value", str, f"{source}, conversations[1]")
        return Record(field(item, "image", str, source), (), caption, source=source)


class DCI(Sequence):
    """Records of Densely Captioned Images (Urbanek et al. 2024): a folder of files, one an image, with the keys image
    and extra_caption, the long caption; short_caption is the short one where it is there."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder of DCI annotations")
        self.paths = sorted(folder.glob("*.json"))
        if not self.paths:
            raise InputError(f"{folder} holds no .json file")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        source = str(self.paths[index])
        item = read_object(self.paths[index])
        short = (field(item, "short_caption", str, source),) if "short_caption" in item else ()
        return Record(
            field(item, "image", str, source), short, field(item, "extra_caption", str, source), source=source
        )


class COCOBoxes(Sequence):
    """Records of the images of an instances_*.json that have boxes; a region's one phrase is its category's name.

    `categories` are the names of all categories of the file. Crowds are left out.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        images = enumerate(read_coco(self.path, "images")["images"])
        self.categories, self.regions = read_instances(self.path)
        if len(set(self.categories)) < len(self.categories):
            raise InputError(f"{path}: expected categories with distinct names")
        self.images = [
            (i, image) for i, image in images if field(image, "id", int, f"{path}, images[{i}]") in self.regions
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        i, image = self.images[index]
        source = f"{self.path}, images[{i}]"
        size = [field(image, key, int, source) for key in ("width", "height")]
        regions = tuple(Region(scale_box(box, *size, source), (name,)) for box, name in self.regions[image["id"]])
        return Record(field(image, "file_name", str, source), (), "", regions, source=source)


class ClassFolders(Sequence):
    """Records of the images in a folder of class folders, whose label is the class's number.

    class_names: a text file with one name a line, of the class folders in alphabetical order; by default a class is
    called what its folder is. What is no image by its name is left out.
    """

    def __init__(self, root: str | Path, class_names: str | Path | None = None):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root} is not a folder of class folders")
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        if len(folders) < 2:
            raise InputError(f"{root} holds {len(folders)} folders; expected one a class, at least two")
        self.categories = tuple(folder.name for folder in folders)
        if class_names is not None:
            lines = read_text(Path(class_names)).splitlines()
            self.categories = tuple(line.strip() for line in lines if line.strip())
            if len(self.categories) != len(folders):
                raise InputError(
                    f"{class_names} names {len(self.categories)} classes, but {root} holds {len(folders)} folders"
                )
        suffixes = Image.registered_extensions()
        self.images = [
            (path.relative_to(root).as_posix(), label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in suffixes
        ]
        if not self.images:
            raise InputError(f"{root}: none of its {len(folders)} folders holds an image")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        name, label = self.images[index]
        return Record(name, (), "", label=label)


def by_image(records: Sequence[Record]) -> list[Record]:
    """Records of the same image joined into one, in the order of their first; its source is that of the first."""
    joined: dict[str, Record] = {}
    for record in records:
        first = joined.get(record.image)
        joined[record.image] = record if first is None else replace(first, regions=first.regions + record.regions)
    return list(joined.values())
