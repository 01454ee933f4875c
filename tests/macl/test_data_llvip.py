"""LLVIP's layout: what is read, what is held out, and what each kind of bad input says."""

import os

import pytest
import torch
from pairs import refused, write
from PIL import Image

from macl.data import LLVIP, find_pairs, hold_out, read_image, read_pair, refuse_absent_classes
from macl.data.label_files import read_voc

OBJECT = (
    "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def voc(*objects, size=SIZE):
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def person(x1, y1, x2, y2, difficult=0):
    return OBJECT.format("person", f"<difficult>{difficult}</difficult>", x1, y1, x2, y2)


def write_pair(root, split, name, infrared_size=(40, 30)):
    write(root / "visible" / split / f"{name}.jpg", (200, 100, 50), (40, 30))
    write(root / "infrared" / split / f"{name}.jpg", (90, 90, 90), infrared_size)
    write(root / "Annotations" / f"{name}.xml", voc(person(1, 1, 10, 20)))


@pytest.fixture
def root(tmp_path):
    """Two cameras with two and one training pairs, and one test pair, without lists."""
    root = tmp_path / "LLVIP"
    for name in ("010001", "010002", "020001"):
        write_pair(root, "train", name)
    write_pair(root, "test", "190001")
    return root


def test_a_sample_follows_the_contract(root):
    annotation = voc(person(1, 1, 10, 20), person(5, 6, 12, 18, difficult=1), OBJECT.format("car", "", 1, 1, 5, 5))
    (root / "Annotations" / "010002.xml").write_text(annotation)
    sample = LLVIP(root.parent, "train")[1]
    for key, colour in (("visible", [200, 100, 50]), ("infrared", [90, 90, 90])):
        assert sample[key].shape == (3, 30, 40) and sample[key].dtype == torch.uint8
        assert sample[key][:, 9, 9].tolist() == pytest.approx(colour, abs=4)  # RGB, not BGR
    assert sample["boxes"].tolist() == [[0, 0, 10, 20], [4, 5, 12, 18]] and sample["boxes"].dtype == torch.float32
    assert sample["labels"].tolist() == [1, 1] and sample["labels"].dtype == torch.int64
    assert sample["ignore"].tolist() == [False, True]
    assert sample["image_id"] == 1 and sample["scene"] == 1
    assert sample["path"] == str(root / "visible" / "train" / "010002.jpg")


def test_boxes_are_clipped_and_dropped_and_counted(root):
    boxes = person(31, 11, 60, 20), person(50, 1, 60, 20), person(30.00000001, 1, 29.00000002, 9), person(0, 1, 5, 6)
    (root / "Annotations" / "010001.xml").write_text(voc(*boxes, OBJECT.format("dog", "", 1, 1, 2, 2)))
    (root / "Annotations" / "010002.xml").write_text(voc())
    data = LLVIP(root, "train")
    assert "from 1, though 010001.xml has a 0" in data.source  # and one box is too thin for float32
    assert data[0]["boxes"].tolist() == [[30, 10, 40, 20], [0, 0, 5, 6]] and data[1]["boxes"].shape == (0, 4)
    assert data[1]["labels"].shape == data[1]["ignore"].shape == (0,)
    counts = dict(boxes=3, clipped=2, dropped=2, other_classes=1, empty_images=1, named_dog=1, named_person=5)
    assert data.statistics() == data.statistics() | counts


def test_difficult_however_it_is_spelt(root):
    spellings = {"1": True, " True ": True, "YES": True, "2": True, "0": False, "False": False, "": False}
    boxes = [person(1, 1, 10, 20, difficult=written) for written in spellings]
    (root / "Annotations" / "010001.xml").write_text(voc(*boxes))
    assert LLVIP(root, "train")[0]["ignore"].tolist() == list(spellings.values())


def test_a_class_that_nobody_has_is_refused_with_the_names_that_occur(root):
    other = voc(OBJECT.format("People", "", 1, 1, 5, 5), person(1, 1, 9, 9, difficult=1), person(31, 9, 30, 20))
    for file in (root / "Annotations").iterdir():
        file.write_text(other)
    classes = ["person"], ["person", "People"], ["People", "People"]
    train, both, twice = (LLVIP(root, "train", classes=names) for names in classes)
    place = str(root / "visible" / "train")
    refused(lambda: refuse_absent_classes(train, every=False), "'person'", "'People' 3", "'person' 6", place)
    refuse_absent_classes(both, every=False)
    refused(lambda: refuse_absent_classes(both, every=True), "'person'")
    refused(lambda: refuse_absent_classes(twice, every=True), "given once")
    (root / "Annotations" / "010001.xml").write_text(voc(person(1, 1, 9, 9)))
    (root / "Annotations" / "010002.xml").write_text("not xml")
    refuse_absent_classes(train, every=True)  # reads no further than it needs


def test_labels_are_positions_among_the_classes_given(root):
    objects = OBJECT.format("car", "", 1, 1, 5, 5), person(2, 2, 6, 9), OBJECT.format("dog", "", 1, 1, 5, 5)
    (root / "Annotations" / "010001.xml").write_text(voc(*objects))
    assert LLVIP(root, "train", classes=("person", "car"))[0]["labels"].tolist() == [2, 1]


def names(data):
    return [pair.visible.stem for pair in data.pairs]


def test_which_list_is_read(root):
    data = LLVIP(root, "train")
    assert names(data) == ["010001", "010002", "020001"] and "no list" in data.source
    for folder, listed in (("ImageSets", b"020001\n\n010001\n"), ("ImageSets/Main", b"\xef\xbb\xbf010002\r\n\r\n")):
        (root / folder).mkdir()
        (root / folder / "train.txt").write_bytes(listed)  # the second as Windows writes it
        data = LLVIP(root, "train")
        assert names(data) == listed.decode("utf-8-sig").split() and str(root / folder / "train.txt") in data.source
    assert names(LLVIP(root, "test")) == ["190001"]  # without a list of its own, from the folder


def test_last_cameras_are_held_out(tmp_path):
    for name in ("street", *(f"{camera:02d}{number:04d}" for camera in (1, 2, 3) for number in range(11 - camera))):
        write_pair(tmp_path, "train", name)
    data = LLVIP(tmp_path, "train")
    train, validation, sentence = hold_out(data)
    assert data.scenes[-1] == -1 and set(train.scenes) == {-1, 1, 2} and "all those of camera 03" in sentence
    assert len(train) + len(validation) == len(data) == 28
    assert [validation[index]["image_id"] for index in range(8)] == list(range(8))
    assert validation[7]["path"].endswith("030007.jpg") and validation.statistics()["pairs"] == 8
    assert "8 of them held out" in validation.source and "20 of them kept" in train.source
    for _ in range(60):  # one camera is not a tenth any more
        data.pairs.append(data.pairs[0])
    assert set(hold_out(data)[1].scenes) == {2, 3}


def test_one_camera_gives_every_kth_pair_and_a_warning(tmp_path):
    for number in range(20):
        write_pair(tmp_path, "train", f"01{number:04d}")
    train, validation, sentence = hold_out(LLVIP(tmp_path, "train"))
    assert names(validation) == ["010009", "010019"] and len(train) == 18
    assert sentence.startswith("Warning") and "no camera is to spare" in sentence
    assert [len(part) for part in hold_out(train.subset([0, 1], "two"))[:2]] == [1, 1]
    one = train.subset([0], "one")
    assert hold_out(one)[:2] == (one, one) and "cannot be split" in hold_out(one)[2]


@pytest.mark.parametrize("missing", ["visible/train/010002.jpg", "infrared/train/010002.jpg", "Annotations/010002.xml"])
def test_the_first_missing_path_is_named(root, missing):
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("010001\n010002\n020001\n")
    (root / missing).unlink()
    refused(lambda: LLVIP(root, "train"), str(root / missing), "does not exist")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\n \n", "empty"),
        (b"010001\n010001\n", "twice"),
        (b"\xff\xfe\x01", "UTF-8"),
        *((f"010001\n{line}\n".encode(), repr(line)) for line in ("../secret", "/etc/passwd", "a\\b", "a/010001")),
    ],
)
def test_bad_lists(root, content, word):
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_bytes(content)
    refused(lambda: LLVIP(root, "train"), "train.txt", word)


def test_names_that_are_not_utf_8(root):
    name = b"19" + "行人".encode("gbk")
    for folder in (root / "visible/test", root / "infrared/test", root / "Annotations"):
        file = next(folder.glob("190001*"))
        os.rename(file, os.fsencode(folder) + b"/" + name + os.fsencode(file.suffix))
    sample = LLVIP(root, "test")[0]
    assert os.fsencode(sample["path"]).endswith(name + b".jpg") and len(sample["boxes"]) == 1
    (root / "Annotations" / os.fsdecode(name + b".xml")).write_text("broken")
    refused(lambda: LLVIP(root, "test")[0], "\\udcd0").encode("utf-8")


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "dangling"])
def test_no_file_in_the_place_of_one(root, kind):
    make = {"folder": os.mkdir, "fifo": os.mkfifo, "loop": lambda file: os.symlink(file, file)}
    make["dangling"] = lambda file: os.symlink(root / "nowhere", file)
    picture, annotation = root / "visible/train/010001.jpg", root / "Annotations/010002.xml"
    for file in (picture, annotation):
        file.unlink()
        make[kind](file)
    refused(lambda: LLVIP(root, "train"), str(annotation), "expected the boxes of 010002")
    refused(lambda: read_image(picture), str(picture))
    refused(lambda: read_voc(annotation), str(annotation))


def test_what_else_cannot_be_opened(root):
    (root / "visible/test/190001.jpg").unlink()
    for place, split in ((root.parent.parent, "train"), (root / "visible", "train"), (root, "val")):
        refused(lambda where=(place, split): LLVIP(*where), str(place), "infrared/{train,test}/NAME.jpg", "VOC")
    refused(lambda: LLVIP(root, "test"), "visible/test is no folder of images")
    Image.new("RGB", (40, 30)).save(root / "visible/train/010001.PNG")
    refused(lambda: LLVIP(root, "train"), "010001.PNG", "010001.jpg", "expected one per name")


@pytest.mark.parametrize(
    ("annotation", "word"),
    [
        ("not xml", "not XML"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "not XML"),
        ("<kml/>", "<kml>"),
        ('<!DOCTYPE a [<!ENTITY b "' + 50000 * "x" + '">]>' + voc().replace("40", 2000 * "&b;"), "not XML"),
        (voc(size="<size><width>40</width><height>1e30</height></size>"), "height: expected a whole number"),
        (voc("<object><name>person</name></object>"), "<bndbox><xmin>"),
        (voc(person(1, 1, 5, "9" * 400)), "<ymax>: expected a number"),
        (voc(person(1, 1, 5, 5, difficult="perhaps")), "<difficult>: expected"),
        (voc(size="<size><width>41</width><height>30</height></size>"), "41 x 30"),
    ],
)
def test_bad_annotations(root, annotation, word):
    (root / "Annotations" / "010001.xml").write_text(annotation)
    refused(lambda: LLVIP(root, "train")[0], str(root / "Annotations" / "010001.xml"), word)


def test_read_pair_of_one_or_two_images(root):
    visible, infrared = root / "visible/train/010001.jpg", root / "infrared/train/010001.jpg"
    assert read_pair(visible, infrared)["infrared"].shape == (3, 30, 40)
    assert read_pair(None, infrared)["visible"] is None and read_pair(visible, None)["infrared"] is None
    write_pair(root, "train", "010001", infrared_size=(40, 31))
    refused(lambda: read_pair(visible, infrared), str(visible), "40 x 30", str(infrared), "40 x 31")
    refused(lambda: LLVIP(root, "train")[0], "40 x 31")


def test_find_pairs_matches_by_name(root):
    visible, infrared = root / "visible/train", root / "infrared/train"
    (visible / "notes.txt").write_text("no image")
    pairs = find_pairs(visible, infrared).values()
    assert [(v.name, i.name) for v, i in pairs] == [(f"{n}.jpg",) * 2 for n in ("010001", "010002", "020001")]
    assert all(v.parent == visible and i.parent == infrared for v, i in pairs)
    assert [v for v, _ in find_pairs(None, infrared).values()] == [None] * 3
    one, other = visible / "010001.jpg", infrared / "010002.jpg"
    assert find_pairs(one, other) == {"010001": (one, other)}
    (infrared / "010002.jpg").rename(infrared / "010003.jpg")
    refused(lambda: find_pairs(visible, infrared), f"{visible}/010003.jpg does", f"partner of {infrared}/010003.jpg")
    (infrared / "010003.jpg").unlink()
    refused(lambda: find_pairs(visible, infrared), f"{infrared}/010002.jpg does", f"partner of {visible}/010002.jpg")
    for place in (root / "nowhere", infrared / "010001.jpg", root / "Annotations"):
        refused(lambda place=place: find_pairs(visible, place), str(place), "is no folder of images")


def test_a_picture_is_not_its_own_partner(root, tmp_path):
    visible, link = root / "visible/train", tmp_path / "link"
    link.symlink_to(visible)
    for other in (visible, link, root / "infrared/../visible/train"):
        refused(lambda other=other: find_pairs(visible, other), str(visible), "same pictures")
        refused(lambda other=other: find_pairs(visible / "010001.jpg", other / "010001.jpg"), "same pictures")
    assert find_pairs(visible / "010001.jpg", link / "010002.jpg")


def test_real_pairs(shared):
    data = LLVIP(shared / "data/llvip", "test")
    assert len(data) == 32 and data.statistics()["boxes"] == 100
    assert data[0]["visible"].shape == (3, 1024, 1280) and data[0]["scene"] == 19
