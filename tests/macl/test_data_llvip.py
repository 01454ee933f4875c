"""LLVIP's layout: what is read, what is held out, and what each kind of bad input says."""

import logging
import os
import pickle
import struct

import pytest
import torch
from PIL import Image, ImageFile

from macl.data import LLVIP, find_pairs, hold_out, read_image, read_pair, refuse_absent_classes
from macl.data.voc import read_voc
from trainkit import files
from trainkit.errors import InputError

OBJECT = (
    "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def voc(*objects, size=SIZE):
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def person(x1, y1, x2, y2, difficult=0):
    return OBJECT.format("person", f"<difficult>{difficult}</difficult>", x1, y1, x2, y2)


def write_pair(root, split, name, annotation=None, *, size=(40, 30), infrared_size=None):
    for modality, tone in (("visible", (200, 100, 50)), ("infrared", (90, 90, 90))):
        folder = root / modality / split
        folder.mkdir(parents=True, exist_ok=True)
        shape = size if modality == "visible" or infrared_size is None else infrared_size
        Image.new("RGB", shape, tone).save(folder / f"{name}.jpg")
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(annotation or voc(person(1, 1, 10, 20)))


@pytest.fixture
def root(tmp_path):
    """Two cameras with two and one training pairs, and one test pair, without lists."""
    root = tmp_path / "LLVIP"
    for name in ("010001", "010002", "020001"):
        write_pair(root, "train", name)
    write_pair(root, "test", "190001")
    return root


def refused(call, *words):
    """The one-sentence message of the InputError that call() raises; it must hold the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def test_a_sample_follows_the_contract(root):
    annotation = voc(person(1, 1, 10, 20), person(5, 6, 12, 18, difficult=1), OBJECT.format("car", "", 1, 1, 5, 5))
    (root / "Annotations" / "010002.xml").write_text(annotation)
    sample = LLVIP(root.parent, "train")[1]
    assert sample["visible"].shape == sample["infrared"].shape == (3, 30, 40)
    assert sample["visible"].dtype == sample["infrared"].dtype == torch.uint8
    assert sample["visible"][:, 9, 9].tolist() == pytest.approx([200, 100, 50], abs=4)  # RGB, not BGR
    assert sample["infrared"][:, 9, 9].tolist() == pytest.approx([90, 90, 90], abs=4)
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
    assert data[0]["boxes"].tolist() == [[30, 10, 40, 20], [0, 0, 5, 6]]  # one is too thin for float32
    assert data[1]["boxes"].shape == (0, 4) and data[1]["labels"].shape == data[1]["ignore"].shape == (0,)
    counts = dict(pairs=3, scenes=2, boxes=3, ignored=0, clipped=2, dropped=2, other_classes=1, empty_images=1)
    heights = dict(min_height=6.0, median_height=10.0, max_height=20.0)
    assert data.statistics() == counts | heights | dict(named_dog=1, named_person=5)


@pytest.mark.parametrize(
    ("written", "marked"), [("1", 1), (" True ", 1), ("true", 1), ("YES", 1), ("2", 1), ("0", 0), ("False", 0), ("", 0)]
)
def test_difficult_however_it_is_spelt(root, written, marked):
    (root / "Annotations" / "010001.xml").write_text(voc(person(1, 1, 10, 20, difficult=written)))
    assert LLVIP(root, "train")[0]["ignore"].tolist() == [bool(marked)]


def test_a_class_that_nobody_has_is_refused_with_the_names_that_occur(root):
    other = voc(OBJECT.format("People", "", 1, 1, 5, 5), person(1, 1, 9, 9, difficult=1), person(30, 9, 20, 10))
    for file in (root / "Annotations").iterdir():
        file.write_text(other)
    train = LLVIP(root, "train")
    said = refused(lambda: refuse_absent_classes(train, every=False), "'person'", "'People' 3", "'person' 6")
    assert str(root / "visible" / "train") in said
    refuse_absent_classes(LLVIP(root, "train", classes=("person", "People")), every=False)
    refused(lambda: refuse_absent_classes(LLVIP(root, "train", classes=("person", "People")), every=True), "'person'")
    refused(lambda: refuse_absent_classes(LLVIP(root, "train", classes=("People",) * 2), every=True), "given once")
    for file in (root / "Annotations").iterdir():
        file.write_text(voc())
    refused(lambda: refuse_absent_classes(train, every=False), "none at all")


def test_annotations_are_read_no_further_than_a_class_is_seen(root):
    (root / "Annotations" / "010002.xml").write_text("not xml")
    refuse_absent_classes(LLVIP(root, "train"), every=True)


def test_labels_are_positions_and_other_classes_need_no_box(root):
    objects = OBJECT.format("car", "", 1, 1, 5, 5), person(2, 2, 6, 9), "<object><name>dog</name></object>"
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
    assert sentence.startswith("Warning") and "no camera to spare" in sentence
    assert [len(part) for part in hold_out(train.subset([0, 1], "two"))[:2]] == [1, 1]
    refused(lambda: hold_out(train.subset([0], "one")), "1 pair")


def test_it_can_be_pickled(root):
    again = pickle.loads(pickle.dumps(LLVIP(root, "train")))
    assert torch.equal(again[2]["visible"], LLVIP(root, "train")[2]["visible"])


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("missing", ["visible", "infrared", "Annotations"])
def test_the_first_missing_path_is_named(root, missing, file):
    missing += file * ("/010002.xml" if missing == "Annotations" else "/train/010002.jpg")
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("010001\n010002\n020001\n")
    (root / missing).rename(root / "elsewhere")
    refused(lambda: LLVIP(root, "train"), str(root / missing), "does not exist")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"010001\n010001\n", "twice"),
        (b"\xff\xfe\x01", "UTF-8"),
        *(
            (f"010001\n{line}\n".encode(), repr(line))
            for line in ("../secret", "/etc/passwd", "a\\b", "..", "a/010001")
        ),
    ],
)
def test_bad_lists(root, content, word):
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_bytes(content)
    refused(lambda: LLVIP(root, "train"), "train.txt", word)


def test_what_macos_leaves_beside_each_file_is_no_picture(root):
    for file in list(root.rglob("*.*")):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\26\7")
    assert names(LLVIP(root, "train")) == ["010001", "010002", "020001"]
    assert len(find_pairs(root / "visible/train", root / "infrared/train")) == 3


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
    refused(lambda: LLVIP(root, "train"), str(annotation), "does not exist")  # the picture is none of the names
    refused(lambda: read_image(picture), str(picture))
    refused(lambda: read_voc(annotation, classes=()), str(annotation))


def test_the_layout_for_data_of_ones_own_is_told(root):
    for place in (root.parent.parent, root / "visible", root / "Annotations" / "010001.xml"):
        refused(lambda place=place: LLVIP(place, "train"), str(place), "infrared/{train,test}/NAME.jpg", "VOC")


def test_what_else_cannot_be_opened(root):
    refused(lambda: LLVIP(root, "val"), "'val'", "train", "test")
    Image.new("RGB", (40, 30)).save(root / "visible/train/010001.PNG")
    refused(lambda: LLVIP(root, "train"), "010001.PNG", "010001.jpg", "expected one a name")
    (root / "visible/test/190001.jpg").unlink()
    refused(lambda: LLVIP(root, "test"), str(root / "visible" / "test"))


@pytest.mark.parametrize(
    ("annotation", "word"),
    [
        ("not xml", "not XML"),
        ("<annotation><size>", "not XML"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "not XML"),
        ("<kml/>", "<kml>"),
        ('<!DOCTYPE a [<!ENTITY b "' + 50000 * "x" + '">]>' + voc().replace("40", 2000 * "&b;"), "not XML"),
        (voc(size=""), "<size>, width: expected a whole number"),
        (voc(size="<size><width>0</width><height>30</height></size>"), "from 1 to 65535, got 0"),
        (voc(size="<size><width>40</width><height>1e30</height></size>"), "height: expected a whole number"),
        (voc("<object/>"), "<name>"),
        (voc("<object><name>person</name></object>"), "<bndbox><xmin>"),
        (voc(person("nan", 1, 5, 5)), "<bndbox><xmin>: expected a number"),
        (voc(person("one", 1, 5, 5)), "'one'"),
        (voc(person(1, 1, 5, "9" * 400)), "<ymax>: expected a number"),
        (voc(person(1, 1, 5, 5, difficult="perhaps")), "<difficult>: expected"),
        (voc(size="<size><width>41</width><height>30</height></size>"), "41 x 30"),
    ],
)
def test_bad_annotations(root, annotation, word):
    (root / "Annotations" / "010001.xml").write_text(annotation)
    refused(lambda: LLVIP(root, "train")[0], str(root / "Annotations" / "010001.xml"), word)


def test_a_picture_that_is_stored_turned_is_seen_as_shown(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for modality in ("visible", "infrared"):
        file = root / modality / "train" / "010001.jpg"
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    sample = LLVIP(root, "train")[0]
    assert sample["visible"].shape == sample["infrared"].shape == (3, 30, 40)
    for modality in ("visible", "infrared"):
        file = root / modality / "train" / "010001.jpg"
        Image.open(file).convert("L").save(file, exif=b"")
    refused(lambda: LLVIP(root, "train")[0], "40 x 30", "30 x 40")


@pytest.mark.parametrize("content", [b"", b"text", "half"])
@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_undecodable_images(root, modality, content):
    file = root / modality / "train" / "010001.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size - 200] if content == "half" else content)
    refused(lambda: LLVIP(root, "train")[0], str(file), "decoded")


def test_oversized_images_are_refused_before_decoding(root, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIXELS", 1199)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    refused(lambda: LLVIP(root, "train")[0], "40 x 30", "1199")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what Pillow itself holds for a decompression bomb
    refused(lambda: LLVIP(root, "train")[0], "010001.jpg")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_formats_and_modes_come_out_as_three_channels(tmp_path, suffix, mode):
    Image.new("RGB", (8, 6), (102, 102, 102)).convert(mode).save(tmp_path / f"a{suffix}", lossless=True)
    image = read_image(tmp_path / f"a{suffix}")
    assert image.shape == (3, 6, 8) and image.dtype == torch.uint8 and (image.int() - 102).abs().max() <= 1


def test_more_than_eight_bits_are_refused(tmp_path):
    Image.new("I;16", (8, 6), 40000).save(tmp_path / "deep.png")
    refused(lambda: read_image(tmp_path / "deep.png"), "deep.png", "8 bits")


def test_what_pillow_logs_of_damage_does_not_reach_the_terminal(tmp_path, monkeypatch):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    samples = struct.pack("<HHI", 277, 3, 1)  # tag, type and count of the samples per pixel, before their number
    assert samples in data
    (tmp_path / "a.tif").write_bytes(data.replace(samples + b"\3\0", samples + b"\0\x08"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging, "lastResort", logging.Handler())  # where a record without any handler goes
    said = []
    logging.lastResort.emit = said.append
    refused(lambda: read_image(tmp_path / "a.tif"), "a.tif")
    assert not said


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
    pairs = find_pairs(visible, infrared)
    assert [(v.name, i.name) for v, i in pairs] == [(f"{n}.jpg",) * 2 for n in ("010001", "010002", "020001")]
    assert all(v.parent == visible and i.parent == infrared for v, i in pairs)
    assert [v for v, _ in find_pairs(None, infrared)] == [None] * 3
    one, other = visible / "010001.jpg", infrared / "010002.jpg"
    assert find_pairs(one, other) == [(one, other)]
    (infrared / "010002.jpg").unlink()
    refused(lambda: find_pairs(visible, infrared), str(visible / "010002.jpg"), "no partner")
    (visible / "010002.jpg").rename(infrared / "010002.jpg")
    refused(lambda: find_pairs(visible, infrared), str(infrared / "010002.jpg"), "no partner")


def test_find_pairs_refuses_what_it_cannot_match(root):
    visible = root / "visible/train"
    refused(lambda: find_pairs(visible, root / "nowhere"), "nowhere", "does not exist")
    refused(lambda: find_pairs(visible, root / "infrared/train/010001.jpg"), "two folders")
    refused(lambda: find_pairs(root / "Annotations", None), "no image")
    (visible / "010001.png").write_bytes(b"")
    refused(lambda: find_pairs(visible, None), "010001.jpg", "010001.png")


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
    sample = data[0]
    assert sample["visible"].shape == (3, 1024, 1280) and sample["scene"] == 19
    # Registered, and the right way round: visible light has colour, infrared has none.
    spread = [(sample[key].float().amax(0) - sample[key].float().amin(0)).mean() for key in ("visible", "infrared")]
    assert spread[0] > spread[1]
    boxes = sample["boxes"].long()
    inside = torch.cat([sample["infrared"][0, y1:y2, x1:x2].flatten() for x1, y1, x2, y2 in boxes.tolist()])
    assert inside.float().mean() > sample["infrared"][0].float().mean()  # people are warm
