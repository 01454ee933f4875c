"""Data sets for the tests, in LLVIP's layout and in KAIST's original one, and what is said of bad ones."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainkit.errors import InputError

SIZE = (96, 112)  # of KAIST's images here
FRAMES = ["set00/V000/I00001", "set00/V000/I00003", "set04/V002/I00019", "set06/V000/I00019", "set11/V001/I00039"]
PERSON = ("person", 10, 20, 30, 60, 0)  # name, x, y, width, height, occlusion


def write(path: Path, content, size=SIZE) -> Path:
    """A picture of a colour, a text, or else json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        Image.new("RGB", size, content).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def llvip(root: Path, *names: str, places=("train/010001", "train/020001", "test/190001"), size=(80, 64)) -> Path:
    """Pairs, each with an object of every name."""
    box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>30</xmax><ymax>50</ymax></bndbox>"
    rows = "".join(f"<object><name>{name}</name>{box}</object>" for name in names)
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for place in places:
        for modality in ("visible", "infrared"):
            write(root / modality / f"{place}.jpg", (90, 60, 30), size)
        write(root / "Annotations" / f"{place.split('/')[1]}.xml", f"<annotation>{sides}{rows}</annotation>")
    return root


def bbgt(*objects, version=3) -> str:
    lines = [f"{name} {x} {y} {w} {h} {occlusion} 0 0 0 0 {0} 0" for name, x, y, w, h, occlusion in objects]
    return "\n".join([f"% bbGt version={version}", *lines]) + "\n"


def kaist(root: Path, frames=FRAMES, objects=(PERSON,), name="all", size=SIZE) -> Path:
    """Frames with these objects each, and a list of them."""
    for frame in frames:
        video, image = frame.rsplit("/", 1)
        write(root / "images" / video / "visible" / f"{image}.jpg", (200, 100, 50), size)
        write(root / "images" / video / "lwir" / f"{image}.jpg", (90, 90, 90), size)
        write(root / "annotations" / f"{frame}.txt", bbgt(*objects))
    write(root / "imageSets" / f"{name}.txt", "\n".join(frames) + "\n")
    return root


def published(objects_by_frame: dict, size=SIZE, **extra) -> dict:
    """The json of KAIST's test frames."""
    names = ["__ignore__", "person", "cyclist", "people", "person?"]
    annotations = [
        {"image_id": i, "category_id": names.index(name), "bbox": [x, y, w, h], "occlusion": hidden, "ignore": 0}
        for i, objects in enumerate(objects_by_frame.values())
        for name, x, y, w, h, hidden in objects
    ]
    images = [dict(id=i, im_name=name, width=size[0], height=size[1]) for i, name in enumerate(objects_by_frame)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    return extra | {"images": images, "annotations": annotations, "categories": categories}


def cvc14(root, day, split, name, visible, infrared, frames=("FramesPos", "FramesPos")):
    """A frame of CVC-14; rows of x, y, width, height, number: the centre, pixels from 1."""
    for camera, rows, folder in zip(("Visible", "FIR"), (visible, infrared), frames, strict=True):
        place = root / "CVC-14" / day / camera / split
        if folder is not None:
            write(place / folder / f"{name}.tif", (90, 60, 30), (40, 20))
        text = "".join(f"{x} {y} {w} {h} 1 0 0 0 0 {key} 0\n" for x, y, w, h, key in rows)
        write(place / "Annotations" / f"{name}.txt", text)


def truth(*boxes, labels=None, ignore=(), occlusion=None, daytime=True) -> dict:
    """The ground truth of a frame; ignore: places of the boxes that are."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
        "ignore": torch.tensor([index in ignore for index in range(len(boxes))], dtype=torch.bool),
        "occlusion": torch.tensor(occlusion or [0] * len(boxes)),
        "daytime": daytime,
    }


def found(*boxes, labels=None, scores=None) -> dict:
    """The detections of a frame, by falling score where none are given."""
    scores = torch.tensor(scores or [0.9 - 0.1 * index for index in range(len(boxes))])
    return {name: truth(*boxes, labels=labels)[name] for name in ("boxes", "labels")} | {"scores": scores}


def refused(call, *words) -> str:
    """The one-sentence message of the InputError that call() raises; it must hold the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    return message
