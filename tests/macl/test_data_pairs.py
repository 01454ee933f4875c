"""Pairs in every layout and label form: what is recognised, which classes, and what wrong labels say."""

import json
import re

import numpy as np
import pytest
import torch
from pairs import refused, write
from PIL import Image

import train_stage1
from macl import training
from macl.data import DAY_AND_NIGHT, JointDataset, Pairs, SyntheticPairs, find_pairs, hold_out, open_root, read_onto
from macl.data.label_files import read_names

SIZE, BOX = (40, 20), [10, 5, 30, 15]  # width, height; x1, y1, x2, y2
YOLO = "{} 0.5 0.5 0.5 0.5\n"
VOC = "<annotation><size><width>40</width><height>20</height></size>{}</annotation>"
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>30</xmax><ymax>15</ymax></bndbox></object>"


def coco(names, categories=("person", "car"), **changes):
    """A json in which each image has a person and, but for the first, a car."""
    images = [dict(id=f"i{i}", file_name=f"{name}.png", width=40.0, height=20.0) for i, name in enumerate(names)]
    boxes = [dict(image_id=f"i{i}", category_id=kind, bbox=[10, 5, 20, 10], iscrowd=0)
             for i in range(len(names)) for kind in (3, 5)[: 1 + (i > 0)]]  # fmt: skip
    kinds = [dict(id=3 + 2 * i, name=name) for i, name in enumerate(categories)]
    return dict(images=images, annotations=boxes, categories=kinds) | changes


def build(root, visible, infrared, labels, names=("a1", "a2", "b1"), form="yolo", ends=("", ""), size=SIZE):
    """Pairs, the first with a person, the others with a person and a car (class ids 0 and 1)."""
    for folder, end, other in ((visible, ends[0], SIZE), (infrared, ends[1], size)):
        for name in names:
            write(root / folder / f"{name}{end}.png", (90, 60, 30), other)
    for place, name in enumerate(names):
        count = 1 + (place > 0)
        if form == "yolo":
            write(root / labels / f"{name}.txt", "".join(map(YOLO.format, range(count))))
        elif form == "voc":
            objects = (OBJECT.format(kind, 11, 6) for kind in ("person", "car")[:count])
            write(root / labels / f"{name}{ends[1]}.xml", VOC.format("".join(objects)))
    if form == "coco":
        write(root / labels, coco(names))
    return root


def many(template):
    return {split: [place.format(split=split) for place in template] for split in ("train", "val")}


LAYOUTS = [
    ("LLVIP", "voc", many(("visible/{split}", "infrared/{split}", "Annotations"))),
    ("visible + infrared", "yolo", many(("visible/{split}", "infrared/{split}", "visible/{split}"))),
    ("visible + infrared", "yolo", many(("visible/{split}", "infrared/{split}", "labels/{split}"))),
    ("visible + infrared", "coco", many(("visible/{split}", "infrared/{split}", "annotations/{split}.json"))),
    ("in each split", "yolo", many(("{split}/visible/images", "{split}/infrared/images", "{split}/visible/labels"))),
    ("images/visible", "yolo", many(("images/visible/{split}", "images/infrared/{split}", "labels/visible/{split}"))),
    ("images + images_ir", "yolo", many(("images/{split}", "images_ir/{split}", "labels/{split}"))),
    ("images + images_ir", "yolo", {"all": ("images", "images_ir", "labels")}),
    ("RGBimages", "voc", {"all": ("RGBimages", "IRimages", "labels")}),
    ("vis_imgs + ir_imgs", "coco", many(("{split}_imgs/vis_imgs", "{split}_imgs/ir_imgs", "annotations/{split}.json"))),
    ("FLIR-aligned", "voc", {"all": ("align/JPEGImages", "align/JPEGImages", "align/Annotations")}),
    ("M3FD", "voc", {"all": ("M3FD_Detection/Vis", "M3FD_Detection/Ir", "M3FD_Detection/Annotation")}),
    ("MSRS", "yolo", {"all": ("MSRS/detection/vi", "MSRS/detection/ir", "MSRS/detection/labels")}),
]


@pytest.mark.parametrize(("title", "form", "splits"), LAYOUTS)
def test_a_layout_is_told_by_its_folders(tmp_path, title, form, splits):
    for split, places in splits.items():
        ends = ("_RGB", "_PreviewData") if "FLIR" in title else ("", "")
        build(tmp_path, *places, names=[f"{split[0]}{i}" for i in range(3)], form=form, ends=ends)
    if form == "yolo" and title != "MSRS":
        write(tmp_path / "data.yaml", "path: .\nnames:\n  0: person\n  1: car\nnc: 2\n")
    for split in splits:
        data = open_root(tmp_path, split)
        names = "person (3), bike (2)" if title == "MSRS" else "person (3), car (2)"
        assert len(data) == 3 and title in data.source and data.split == split and names in data.source
        sample = data[1]
        assert sample["boxes"].tolist() == [BOX, BOX] and sample["labels"].tolist() == [1, 2]
        assert f"/{split[0]}1" in sample["path"] and data[0]["labels"].tolist() == [1]
        assert open_root(tmp_path, split, classes=[names[12:].split()[0]])[1]["labels"].tolist() == [1]
    assert open_root(tmp_path, "test") is None


def test_a_list_of_visible_paths(tmp_path):
    build(tmp_path, "d/visible/images/x", "d/infrared/images/x", "d/visible/labels/x")
    write(tmp_path / "train.txt", "./d/visible/images/x/a2.png\nd/visible/images/x/b1.png\n")
    write(tmp_path / "test.txt", "d/visible/images/x/a1.png\n")
    write(tmp_path / "d/visible/labels/x/a1.txt", YOLO.format(3))
    data = [open_root(tmp_path, split, classes=["one", "two", "three"]) for split in ("train", "test")]
    assert all("id 0 is one, id 1 is two, id 3 is three" in one.source and not one.of_infrared for one in data)
    write(tmp_path / "d/visible/labels/x/classes.txt", "person\ncar\n")
    data = open_root(tmp_path, "train")
    assert len(data) == 2 and data[0]["path"].endswith("a2.png") and data[0]["labels"].tolist() == [1, 2]
    assert open_root(tmp_path, str(write(tmp_path / "mine.txt", "a2\n"))) is None
    write(tmp_path / "train.txt", "d/visible/images/x/a2.png\nd/other/b1.png\n")
    refused(lambda: open_root(tmp_path, "train"), "d/other/b1.png", "word visible")


def test_splits_from_lists_and_what_no_layout_fits(tmp_path):
    build(tmp_path / "M", "Vis", "Ir", "Annotation", names=["00000", "00001", "01000"], form="voc")
    assert open_root(tmp_path, "all").scenes == [-1] * 3  # no cameras in such names
    write(tmp_path / "M/meta/val.txt", "00001.png\n")
    assert [pair.visible.name for pair in open_root(tmp_path, "val").pairs] == ["00001.png"]
    assert open_root(tmp_path, "train") is None
    write(tmp_path / "M/mine.txt", "01000\n")
    assert open_root(tmp_path, str(tmp_path / "M/mine.txt")).split == "mine"
    for split, name in (("train", "a1"), ("test", "b1")):
        build(tmp_path / "own/S", f"visible/{split}", f"infrared/{split}", "Annotations", [name], "voc")
    few, none = (str(write(tmp_path / name, text)) for name, text in (("few.txt", "b1\n"), ("none.txt", "c1\n")))
    listed = open_root(tmp_path / "own", few)
    assert listed[0]["path"].endswith("test/b1.png") and listed.split == "few"
    refused(lambda: open_root(tmp_path / "own", none), "none.txt: no folder", "'c1'")
    write(tmp_path / "own/S/infrared/test/b2.png", (1, 2, 3), SIZE)  # without a visible image
    assert len(open_root(tmp_path / "own", "test")) == 1
    build(tmp_path / "N", "Vis", "Ir", "Annotation", form="voc")
    refused(lambda: open_root(tmp_path, "all"), "several data sets", tmp_path / "N")
    refused(lambda: open_root(tmp_path / "M/Vis", "all"), "no pairs in a known layout", "--visible, --infrared")
    build(tmp_path / "L", "Vis", "Ir", "other")
    refused(lambda: open_root(tmp_path / "L", "all"), "laid out as M3FD", "Annotation", "labels")


def test_whole_sequences_are_held_out(tmp_path):
    names = [f"{place}_{number}" for place in ("east", "north", "west") for number in range(8, 12)]
    data = Pairs(*(build(tmp_path, "v", "i", "l", names) / part for part in "vil"), classes=["0"])
    train, validation, sentence = hold_out(data)
    assert "all those of sequence west_" in sentence and len(train) == 8 and len(set(train.scenes)) == 2
    train, validation, sentence = hold_out(data.subset([0, 1, 2, *range(8, 12)], "chosen"))  # more than half are west
    assert "one in 7; they look like" in sentence and (len(train), len(validation)) == (6, 1)


def test_lists_beside_folders_of_splits_and_a_split_without_labels(tmp_path):
    build(tmp_path, "visible/train", "infrared/train", "labels/train")
    write(tmp_path / "train.txt", "visible/train/a1.png\nvisible/train/a2.png\n")  # paths; the folder is the split
    assert len(open_root(tmp_path, "train")) == 3
    both = write(tmp_path / "both.txt", "a1\na2.png\na1.png\n")
    assert len(open_root(tmp_path, str(both))) == 2
    build(tmp_path, "visible/test", "infrared/test", "labels/test")
    for file in (tmp_path / "labels/train").iterdir():
        file.unlink()
    assert len(open_root(tmp_path, "test")) == 3


@pytest.mark.parametrize(
    "text",
    [
        "names: [person, 'a, car']\nnc: 2", "names: ['person', \"a, car\",]  # two\n", "names:\n- person\n- a, car",
        "names:\n  - 'person'\n  # no\n  - a, car\nval: x", "names: {0: person, 1: 'a, car'}",
        "names:\n  0: person\n  1: a, car\n",
        "train: [x]\nnames:  # ids\n    0: 'person'\n    1: \"a, car\"\ndownload: |\n  x: y\n",
    ],
)  # fmt: skip
def test_names_of_a_data_yaml(tmp_path, text):
    assert read_names(write(tmp_path / "data.yaml", text)) == {0: "person", 1: "a, car"}
    assert read_names(write(tmp_path / "data.yaml", "train: x\nnc: 2\n")) == {}


def test_classes_by_name(tmp_path):
    parts = [build(tmp_path, "v", "i", "l", ["a1", "a2"]) / part for part in "vil"]
    data = Pairs(*parts)
    assert data.classes == ("0", "1") and "so they are their own names" in data.source
    data = Pairs(*parts, classes=["person", "car"])
    assert "id 0 is person, id 1 is car" in data.source and data[1]["labels"].tolist() == [1, 2]
    write(parts[2] / "a1.txt", YOLO.format(7))
    write(parts[2] / "a2.txt", YOLO.format(7) + YOLO.format(19))
    assert "id 7 is boat, id 19 is buoy" in Pairs(*parts, classes=["boat", "buoy"]).source
    refused(lambda: Pairs(*parts, classes=["boat"])[0], "a1.txt, line 1", "class id 7 is beyond", "0 boat")
    write(parts[2] / "classes.txt", "person\ncar\n")
    refused(lambda: Pairs(*parts), "class id 7 is beyond", "1 car")


BAD = [
    ("yolo", "0 0.5 0.5 0.5", "4 numbers, as of part of a line"),
    ("yolo", "0 0.5 0.5 0.5 0.5 0.9", "as of a score"),
    ("yolo", "0 0.1 0.1 0.5 0.5 0.9 0.9 0.1 0.8", "as of a polygon"),
    ("yolo", "0 320 240 50 80", "centre in fractions of the image: expected a number from 0 to 1, got 320"),
    ("yolo", "0 0.5 0.5 30 20", "width and height in fractions"),
    ("yolo", "person 0.5 0.5 0.5 0.5", "class id: expected a whole number"),
    ("yolo", "2 0.5 0.5 0.5 0.5", "class id 2 is beyond the names, 0 person, 1 car"),
    ("yolo", None, "no label file of the pairs, such as a1.txt"),
    ("coco", coco(["x1", "x2", "x3"]), "holds 3 images but not a1"),
    ("coco", coco(["a1", "x2", "b1"]), "holds 3 images but not a2"),
    ("coco", coco(["a1", "a2", "a1"]), "twice"),
    ("coco", coco(["a1", "a2", "x/a1"]), "names 'a1' twice"),
    ("coco", coco(["a1"], categories=[]), "no category the id 3"),
    ("coco", coco(["a1"], annotations=[dict(image_id="i0", category_id=3, bbox=[1, 2, 3])]), "bbox (x, y, width"),
    ("coco", [], "expected a COCO json, an object"),
    ("coco", coco(["a1"]) | dict(categories=[dict(id=3, name=name) for name in "ab"]), "a category id"),
    ("yolo", "0 0.6 0.5 1 0.8\n" * 5, "a2.txt: many boxes reach far out"),
    ("coco", coco(["a1"], annotations=[dict(image_id="i0", category_id=3, bbox=[9, 9, -9, 9])] * 5), "end before they"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "content", "words"), BAD)
def test_wrong_labels_end_in_one_sentence(tmp_path, form, content, words):
    labels = "l" if form == "yolo" else "l.json"
    root = build(tmp_path, "v", "i", labels, form=form)
    write(root / "classes.txt", "person\ncar\n")
    if content is None:
        [file.rename(file.with_name(f"other{file.name}")) for file in list((root / "l").iterdir())]
    else:
        write(root / (labels if form == "coco" else "l/a2.txt"), content)
    refused(lambda: Pairs(root / "v", root / "i", root / labels), words)


def test_what_else_labels_may_hold(tmp_path):
    """YOLO without a file, and boxes that reach out; crowd; a json of more or fewer images than there are."""
    root = build(tmp_path, "v", "i", "l")
    (root / "l/a1.txt").unlink()
    write(root / "l/a2.txt", "0 0.9 0.5 0.5 1.6\n" * 5)
    data = Pairs(root / "v", root / "i", root / "l")
    assert "1 without a label file" in data.source and len(data[0]["boxes"]) == 0
    assert data[1]["boxes"].tolist() == [[26, 0, 40, 20]] * 5 and data.statistics()["clipped"] == 5
    content = coco(["a1", "a2", "b1", "c1"])
    content["annotations"][0]["iscrowd"] = content["annotations"][1]["ignore"] = 1
    data = Pairs(root / "v", root / "i", write(root / "l.json", content))
    assert [data[i]["ignore"].tolist() for i in (0, 1)] == [[True], [True, False]] and len(data) == 3
    assert len(Pairs(root / "v", root / "i", write(root / "l.json", coco(["b1"])))) == 1


def test_what_voc_counts_from_is_told_by_the_data(tmp_path):
    parts = [build(tmp_path, "v", "i", "l", form="voc") / part for part in "vil"]
    assert "count pixels from 1" in Pairs(*parts).source and Pairs(*parts)[0]["boxes"].tolist() == [BOX]
    write(parts[2] / "b1.xml", VOC.format(OBJECT.format("person", 0, 3)))
    assert "count pixels from 0, as b1.xml has a 0" in Pairs(*parts).source
    assert Pairs(*parts)[0]["boxes"].tolist() == [[11, 6, 30, 15]]
    for split in ("train", "test"):
        build(tmp_path, f"{split}/visible/images", f"{split}/infrared/images", f"{split}/labels", form="voc")
    write(tmp_path / "train/labels/b1.xml", VOC.format(OBJECT.format("person", 0, 3)))
    assert "count pixels from 0, as b1.xml has a 0" in open_root(tmp_path, "test").source


EXPECTED = {  # pairs and boxes of each sample, by their PROVENANCE.md and label files
    "flir_aligned": (2, {"car": 11}),
    "m3fd": (4, {"People": 21, "Car": 25, "Lamp": 7}),
    "msrs": (5, {"person": 13, "car": 3}),
    "harbour_yolo": (19, None),
    "damsdet_coco/dataset/coco_LLVIP": (2, {"person": 3}),
    "damsdet_coco/dataset/coco_FLIR_align": (2, {"person": 13, "car": 3}),
    "vedai": (1, {"car": 1, "truck": 1, "tractor": 6, "camper": 1}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_samples(shared, name):
    if not (shared / "data/pairs").is_dir():
        pytest.skip("no samples of other layouts in shared/data/pairs")
    pairs, boxes = EXPECTED[name]
    data = open_root(shared / "data/pairs" / name, "train", "all", "val")
    counts = {key.removeprefix("named_"): value for key, value in data.statistics().items() if key.startswith("named_")}
    assert len(data) == pairs and (boxes is None or counts == boxes) and data.classes == tuple(boxes or data.classes)
    assert all((data[index]["boxes"] >= 0).all() for index in range(pairs))


def test_suffixes_pair_a_single_folder(tmp_path):
    for name in ("a_RGB", "a_PreviewData", "b_RGB", "b_PreviewData", "c", "c_lr"):
        write(tmp_path / f"{name}.png", (1, 2, 3))
    for ends in (("_RGB", "_PreviewData"), ("_PreviewData", "_RGB")):
        found = [tuple(path.stem for path in pair) for pair in find_pairs(tmp_path, tmp_path, ends).values()]
        assert found == [(f"a{ends[0]}", f"a{ends[1]}"), (f"b{ends[0]}", f"b{ends[1]}")]
    refused(lambda: find_pairs(tmp_path, tmp_path), "same pictures", "--suffixes")
    refused(lambda: find_pairs(tmp_path, tmp_path, ("", "_lr")), "a_PreviewData_lr.jpg does not exist")
    refused(lambda: find_pairs(tmp_path, tmp_path, ("_vis", "_lr")), "is no folder of images (_vis.jpg")
    (tmp_path / "b_PreviewData.png").unlink()
    refused(lambda: find_pairs(tmp_path, tmp_path, ("_RGB", "_PreviewData")), "b_PreviewData.jpg does", "b_RGB.png")


def scene(root, homography, size=(60, 44)):
    """A pair whose infrared image, 30 x 22, shows the visible one's white box as the homography says."""
    visible, infrared = (torch.zeros(3, *side[::-1], dtype=torch.uint8) for side in (size, (30, 22)))
    visible[:, 12:28, 20:40] = 255
    y, x = torch.meshgrid(torch.arange(22.0), torch.arange(30.0), indexing="ij")
    x, y, one = torch.tensor(homography) @ torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    infrared[:] = (255 * (((x / one - 29.5).abs() < 10) & ((y / one - 19.5).abs() < 8))).view(22, 30)
    for name, image in (("v", visible), ("i", infrared)):
        path = write(root / name / "a1.png", (0, 0, 0))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return visible, infrared


@pytest.mark.parametrize("kind", ["resize", "json", "npy"])
def test_infrared_is_put_onto_visible_with_its_boxes(tmp_path, kind):
    homography = [[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]  # the resize, as of pixels' centres
    if kind == "json":
        homography = [[1.9, 0.1, 2], [-0.05, 2.05, 1], [0.0004, 0.0002, 1.0]]
    scene(tmp_path, homography)
    write(tmp_path / "i/a1.txt", "0 0.5 0.45454545 0.33333333 0.36363636\n")
    parts = [tmp_path / "v", tmp_path / "i", tmp_path / "i"]
    refused(lambda: Pairs(*parts)[0], "60 x 44", "30 x 22", "--infrared-to-visible resize or FILE")
    file = write(tmp_path / "h.json", homography)
    if kind == "npy":
        np.save(tmp_path / "h.npy", np.array(homography))
    onto = read_onto("resize" if kind == "resize" else str(file.with_suffix(f".{kind}")))
    sample = Pairs(*parts).with_onto(onto)[0]
    assert sample["infrared"].shape == sample["visible"].shape == (3, 44, 60)
    off = (sample["infrared"].float() - sample["visible"].float()).abs().gt(128)[0].float().mean()
    assert off < 0.02  # the border of the white box
    assert sample["boxes"][0].tolist() == pytest.approx([20, 12, 40, 28], abs=3.5 if kind == "json" else 1e-3)
    write(tmp_path / "l.json", coco(["a1"], images=[dict(id="i0", file_name="a1.png", width=30, height=22)]))
    boxes = Pairs(*parts[:2], tmp_path / "l.json").with_onto(read_onto("resize"))[0]["boxes"]
    assert boxes.tolist() == [[20, 10, 60, 30]]  # of a json that is for the infrared size
    write(tmp_path / "v.json", coco(["a1"], images=[dict(id="i0", file_name="a1.png", width=60, height=44)]))
    assert Pairs(*parts[:2], tmp_path / "v.json").with_onto(onto)[0]["boxes"].tolist() == [[10, 5, 30, 15]]


@pytest.mark.parametrize(("labels", "moved"), [("i", True), ("labels/infrared", True), ("labels", False), ("v", False)])
def test_boxes_drawn_in_infrared_go_with_it(tmp_path, labels, moved):
    root = build(tmp_path, "v", "i", labels, form="voc")
    write(root / "h.json", [[1, 0, 4], [0, 1, -2], [0, 0, 1]])
    data = Pairs(root / "v", root / "i", root / labels).with_onto(read_onto(str(root / "h.json")))
    assert data[0]["boxes"].tolist() == [[14, 3, 34, 13] if moved else BOX]


def test_a_json_of_infrared_images(tmp_path):
    """Its file names say so, not the name of ROOT. Its ids stay texts, and are none of boxes in other pixels."""
    assert not open_root(build(tmp_path / "infrared", "images", "images_ir", "labels"), "all").of_infrared
    root = build(tmp_path, "all", "all", "l", form=None, ends=("_rgb", "_ir"))
    content = json.dumps(coco(["a1_ir", "a2_ir", "b1_ir"]))
    labels = write(root / "l.json", re.sub(r'"i(\d)"', r'"00\1"', content))
    data = Pairs(root / "all", root / "all", labels, suffixes=("_rgb", "_ir"))
    assert data.of_infrared and data.coco_ids[0] == ["000", "001", "002"]
    assert data.with_onto(read_onto([[1, 0, 4], [0, 1, -2], [0, 0, 1]])).coco_ids is None


@pytest.mark.parametrize("content", [[[1, 0, 0], [0, 1, 0]], [[1, 0, 0]] * 3, [[1, 0], [0, 1]], {}, [[1, 0, "x"]] * 3])
def test_what_is_no_homography(tmp_path, content):
    refused(lambda: read_onto(str(write(tmp_path / "h.json", content))), "h.json", "3 x 3")
    refused(lambda: read_onto(str(write(tmp_path / "h.npy", "x"))), "h.npy", "3 x 3")
    refused(lambda: read_onto("resise"), "expected resize, none, or a .json or .npy")


def jpegs(root, size=(81, 65), suffix=".jpg"):
    """One pair: a white box on black, x 20 to 60 and y 10 to 50."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (20, 10, 60, 50))
    for folder, end in (("v", ".jpg"), ("i", suffix)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        image.save(root / folder / f"a1{end}")
    width, height = size
    text = f"0 {40 / width:.9f} {30 / height:.9f} {40 / width:.9f} {40 / height:.9f}"
    write(root / "labels/a1.txt", text)
    return Pairs(root / "v", root / "i", root / "labels")


@pytest.mark.parametrize(("short_side", "size"), [(33, (81, 65)), (32, (41, 33)), (16, (21, 17)), (1, (11, 9))])
def test_jpegs_are_decoded_at_the_size_that_is_needed(tmp_path, short_side, size):
    data = jpegs(tmp_path)
    sample = data.decoded_at(short_side)[0]
    assert sample["visible"].shape == sample["infrared"].shape == (3, size[1], size[0])
    x1, y1, x2, y2 = (side * size[i % 2] / (81, 65)[i % 2] for i, side in enumerate((20, 10, 60, 50)))
    assert sample["boxes"][0].tolist() == pytest.approx([x1, y1, x2, y2], abs=1e-4)
    inside = sample["infrared"][:, round(y1 + 1) : round(y2 - 1), round(x1 + 1) : round(x2 - 1)]
    assert inside.float().mean() > 250 and sample["infrared"].float().mean() < 120
    assert JointDataset(data, data).decoded_at(short_side)[1]["visible"].shape == sample["visible"].shape
    places = [tmp_path / name for name in ("v", "i", "labels")]
    own = Pairs(*places, labels_infrared=places[2]).decoded_at(short_side)[0]
    assert own["boxes_infrared"].tolist() == own["boxes"].tolist() == sample["boxes"].tolist()


def test_what_is_registered_or_no_jpeg_is_decoded_whole(tmp_path):
    data = jpegs(tmp_path)
    assert data.moved((1, 0)).decoded_at(16)[0]["visible"].shape == (3, 65, 81)
    assert data.with_onto(read_onto("resize")).decoded_at(16)[0]["visible"].shape == (3, 65, 81)
    sample = jpegs(tmp_path / "png", suffix=".png").decoded_at(16)[0]
    assert sample["visible"].shape == (3, 65, 81) and sample["boxes"][0].tolist() == pytest.approx([20, 10, 60, 50])


@pytest.mark.parametrize(("flag", "height"), [(0, 65), (32, 33)])
def test_the_flag_is_of_training_batches(tmp_path, flag, height):
    jpegs(tmp_path)
    places = ("--visible", tmp_path / "v", "--infrared", tmp_path / "i", "--labels", tmp_path / "labels")
    args = train_stage1.parse_arguments(list(map(str, (*places, "--decode-at", flag, "--workers", 0))))
    data, validation, *_ = train_stage1.open_data(args)
    loader = training.augmented_loader(args, data, [[(0, 0)]], torch.device("cpu"))
    assert next(iter(loader))["visible"][0].shape[1] == height and validation[0]["visible"].shape[1] == 65


def test_joined_data_sets_keep_their_order_and_say_where_samples_are_from():
    parts = SyntheticPairs(3, 0, domain=DAY_AND_NIGHT), SyntheticPairs(2, 0)
    joint = JointDataset(*parts)
    assert len(joint) == 5 and joint.source == f"{parts[0].source} and {parts[1].source}"
    samples = [joint[index] for index in range(5)]
    assert [sample["domain"] for sample in samples] == [0, 0, 0, 1, 1]
    assert [sample["path"] for sample in samples] == [part[i]["path"] for part in parts for i in range(len(part))]
    assert len({sample["scene"] for sample in samples}) == 5  # though both parts number theirs from 0
    joint.datasets[1].sample = lambda index, *_: {"scene": -1}
    assert [joint[index]["scene"] for index in (1, 3)] == [2, -1]  # unknown scenes stay so
    with pytest.raises(IndexError):
        joint[5]
