"""Data that is only evaluated on: captioned images of the retrieval benchmarks, labelled boxes, folders of classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fgclip.data import (
    JsonItems,
    Record,
    annotation_files,
    field,
    files_in,
    objects,
    read_coco,
    read_instances,
    scaled,
    size_of,
)
from trainkit.errors import InputError
from trainkit.files import is_image, natural, read_json, read_lines


class Flickr30k(Sequence):
    """Records of one split of a captions file in Karpathy's layout (dataset_flickr30k.json, dataset_coco.json): an
    object with a list under images, each with filename, split and sentences, which hold raw."""

    def __init__(self, path: str | Path, split: str = "test", *, most_captions: int | None = None):
        images = objects(read_json(path, "captions in Karpathy's layout", dict), "images", str(path))
        splits = [field(image, "split", str, place) for image, place in images]
        kept = (one for one, name in zip(images, splits, strict=True) if name == split)
        self.records = [self.record(*one, most_captions) for one in kept]
        if not self.records:
            names = ", ".join(sorted(set(splits))) or "several"
            raise InputError(f"{path} has no split {split!r}; expected one of {names}")

    @staticmethod
    def record(image: dict, source: str, most_captions: int | None) -> Record:
        sentences = objects(image, "sentences", source)[:most_captions]
        captions = [field(sentence, "raw", str, place).strip() for sentence, place in sentences]
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
        turns = objects(item, "conversations", source)
        if len(turns) < 2:
            raise InputError(f"{source}: expected two objects under the key conversations")
        answer, place = turns[1]
        return Record(field(item, "image", str, source), (), field(answer, "value", str, place), source=source)


class DCI(Sequence):
    """Records of Densely Captioned Images (Urbanek et al. 2024): a folder of files, one an image, with the keys image
    and extra_caption, the long caption; short_caption is the short one where it is there."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder of DCI annotations")
        self.paths = files_in(folder, ".json")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        source = str(self.paths[index])
        item = read_json(source, "an annotation of DCI", dict)
        short = (field(item, "short_caption", str, source),) if "short_caption" in item else ()
        return Record(
            field(item, "image", str, source), short, field(item, "extra_caption", str, source), source=source
        )


class COCOBoxes(Sequence):
    """Records of the images of an instances_*.json that have boxes; a region's one phrase is its category's name.

    `categories` are the names of all categories of the file. Crowds are left out.
    """

    def __init__(self, path: str | Path):
        (images,) = read_coco(Path(path), "images")
        self.categories, self.regions = read_instances(Path(path))
        if len(set(self.categories)) < len(self.categories):
            raise InputError(f"{path}: expected categories with distinct names")
        self.images = [(image, place) for image, place in images if field(image, "id", int, place) in self.regions]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        image, source = self.images[index]
        size = size_of(image, source)
        regions = scaled([(box, (name,)) for box, name in self.regions[image["id"]]], size)
        return Record(field(image, "file_name", str, source), (), "", regions, source=source, size=size)


class ClassFolders(Sequence):
    """Records of the images in a folder of class folders, whose label is the class's number.

    class_names: a text file with one name a line, of the class folders in natural order (2 before 10); by default a
    class is called what its folder is. What is no image by its name is left out. `folders` are the folders' names.
    """

    def __init__(self, root: str | Path, class_names: str | Path | None = None):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root} is not a folder of class folders")
        folders = [f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX"))]
        folders.sort(key=lambda folder: natural(folder.name))
        if len(folders) < 2:
            raise InputError(f"{root} holds {len(folders)} folders; expected one a class, at least two")
        self.folders = self.categories = tuple(folder.name for folder in folders)
        if class_names is not None:
            self.categories = tuple(read_lines(class_names, "names of classes, one a line"))
            if len(self.categories) != len(folders):
                raise InputError(
                    f"{class_names} names {len(self.categories)} classes, but {root} holds {len(folders)} folders"
                )
        self.images = [
            (path.relative_to(root).as_posix(), label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if is_image(path)
        ]
        if not self.images:
            raise InputError(f"{root}: none of its {len(folders)} folders holds an image")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        name, label = self.images[index]
        return Record(name, (), "", label=label, found=True)


def by_image(records: Sequence[Record]) -> list[Record]:
    """Records of the same image joined into one, in the order of their first; its source is that of the first."""
    joined: dict[str, Record] = {}
    for record in records:
        first = joined.setdefault(record.image, record)
        if first.size != record.size:
            raise InputError(f"{record.source}: the size of {record.image} is another than in {first.source}")
        if first is not record:
            joined[record.image] = replace(first, regions=first.regions + record.regions)
    return list(joined.values())
