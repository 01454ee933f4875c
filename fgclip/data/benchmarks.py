"""Data to evaluate on: captioned images of the retrieval benchmarks, labelled boxes, folders of classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fgclip.data.records import Record, Records, Region, field, read_coco, read_instances, scaled
from trainkit.errors import InputError
from trainkit.files import image_size, is_image, natural, objects, read_json, read_lines


def of_split(items: Sequence[tuple[dict, str]], split: str, path: str | Path) -> list[tuple[dict, str]]:
    """The items whose key split says so. Raises InputError where there is none."""
    splits = [field(item, "split", str, place) for item, place in items]
    if split not in splits:
        names = ", ".join(sorted(set(splits))) or "several"
        raise InputError(f"{path} has no split {split!r}; expected one of {names}")
    return [item for item, name in zip(items, splits, strict=True) if name == split]


class Flickr30k(Records):
    """One split of a captions file in Karpathy's layout (dataset_flickr30k.json, dataset_coco.json)."""

    def __init__(self, path: str | Path, split: str = "test", *, most_captions: int | None = None):
        images = objects(read_json(path, "captions in Karpathy's layout", dict), "images", str(path))
        self.items, self.most_captions = of_split(images, split, path), most_captions

    def record(self, image: dict, source: str) -> Record:
        sentences = objects(image, "sentences", source)[: self.most_captions]
        captions = [field(sentence, "raw", str, place).strip() for sentence, place in sentences]
        name = field(image, "filename", str, source)
        if "filepath" in image:  # COCO's two folders
            name = f"{field(image, 'filepath', str, source)}/{name}"
        return Record(name, tuple(captions), " ".join(captions), source=source)


class ShareGPT4V(Records):
    """ShareGPT4V's long captions (Chen et al. 2023): image, and the value of the second of conversations."""

    def record(self, item: dict, source: str) -> Record:
        turns = objects(item, "conversations", source)
        if len(turns) < 2:
            raise InputError(f"{source}: expected two objects under the key conversations")
        answer, place = turns[1]
        return Record(field(item, "image", str, source), long=field(answer, "value", str, place), source=source)


class DCI(Records):
    """Densely Captioned Images (Urbanek et al. 2024), a file per image: image, extra_caption, maybe short_caption."""

    def record(self, item: dict, source: str) -> Record:
        short = (field(item, "short_caption", str, source),) if "short_caption" in item else ()
        long = field(item, "extra_caption", str, source)
        return Record(field(item, "image", str, source), short, long, source=source)


class DOCCI(Records):
    """One split of DOCCI's descriptions (Onoe et al. 2024) in JSON lines: image_file, description, split."""

    def __init__(self, path: str | Path, split: str = "test"):
        super().__init__(path)
        self.items = of_split(self.items, split, path)

    def record(self, item: dict, source: str) -> Record:
        image, long = (field(item, key, str, source) for key in ("image_file", "description"))
        return Record(image, long=long, source=source)


class CaptionFiles(Records):
    """A folder of .txt, each the long caption of the image of that name in another (Urban-1k, Zhang et al. 2024)."""

    def __init__(self, path: str | Path, image_root: str | Path):
        for folder in (path, image_root):
            if not Path(folder).is_dir():
                raise InputError(f"{folder} is not a folder; expected one of texts and one of images")
        images = {image.stem: image.name for image in Path(image_root).iterdir() if is_image(image)}
        texts = [text for text in Path(path).iterdir() if text.suffix == ".txt" and not text.name.startswith(".")]
        self.items = [(text, images.get(text.stem)) for text in sorted(texts, key=lambda text: natural(text.name))]
        if without := [text for text, image in self.items if image is None]:
            raise InputError(f"{without[0]}: {image_root} has no image of this name")

    def record(self, text: Path, image: str) -> Record:
        return Record(Path(image), long=" ".join(read_lines(text)), source=str(text))


class COCOBoxes(Records):
    """The images of COCO's or LVIS's instances that have boxes; a region's one phrase is its category's name.

    LVIS (Gupta et al. 2019) names an image by its address, of which the last folder and the name are below the root.
    """

    def __init__(self, path: str | Path):
        (images,) = read_coco(Path(path), "images")
        self.categories, self.instances = read_instances(Path(path))
        if len(set(self.categories)) < len(self.categories):
            raise InputError(f"{path}: expected categories with distinct names")
        self.items = [(image, place) for image, place in images if field(image, "id", int, place) in self.instances]

    def record(self, image: dict, source: str) -> Record:
        size = image_size(image.get("width"), image.get("height"), source)
        regions = tuple(Region(scaled(box, size), (name,)) for box, name in self.instances[image["id"]])
        key = "file_name" if "file_name" in image else "coco_url"
        name = "/".join(field(image, key, str, source).split("/")[-2 if key == "coco_url" else 0 :])
        return Record(name, regions=regions, source=source, size=size)


class ClassFolders(Records):
    """The images in a folder of class folders, 2 before 10; class_names: a file of names for them, one per line."""

    def __init__(self, root: str | Path, class_names: str | Path | None = None):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root} is not a folder of class folders")
        folders = [f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX"))]
        folders.sort(key=lambda folder: natural(folder.name))
        if len(folders) < 2:
            raise InputError(f"{root} holds {len(folders)} folders; expected one per class, at least two")
        self.folders = self.categories = tuple(folder.name for folder in folders)
        if class_names is not None:
            self.categories = tuple(read_lines(class_names, "names of classes, one per line"))
            if len(self.categories) != len(folders):
                names = f"{class_names} names {len(self.categories)} classes"
                raise InputError(f"{names}, but {root} holds {len(folders)} folders")
        paths = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.rglob("*"))]
        self.items = [(path.relative_to(root), label) for path, label in paths if is_image(path)]
        if not self.items:
            raise InputError(f"{root}: none of its {len(folders)} folders holds an image")

    def record(self, image: Path, label: int) -> Record:
        return Record(image, label=label)


def by_image(records: Sequence[Record]) -> list[Record]:
    """Records of the same image joined into one, in the order and with the source of their first."""
    joined: dict[str, Record] = {}
    for record in records:
        first = joined.setdefault(record.image, record)
        if first.size != record.size:
            raise InputError(f"{record.source}: the size of {record.image} is another than in {first.source}")
        if first is not record:
            joined[record.image] = replace(first, regions=first.regions + record.regions)
    return list(joined.values())
