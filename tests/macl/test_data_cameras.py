"""Cameras that do not agree, labels of each, thermal values of 16 bits, and one camera alone."""

import json

import numpy as np
import pytest
import torch
from pairs import cvc14, refused, write
from PIL import Image

from macl.data import PairedAugmentation, Pairs, collate, open_root, read_onto
from macl.data.annotation import Labels, Object, join

SIZE = (40, 20)


def test_cvc14_is_joined_by_the_persons_number(tmp_path):
    cvc14(tmp_path, "Day", "Train", "2014_05_01", [(11, 9, 8, 12, 1), (31, 9, 8, 12, 2)], [(13, 9, 8, 12, 1)])
    cvc14(tmp_path, "Night", "Train", "2014_05_02", [], [(21, 9, 8, 12, 5)], ("FramesNeg", "FramesPos"))
    cvc14(tmp_path, "Night", "Train", "2014_05_03", [(11, 9, 8, 12, 1)], [], ("FramesPos", None))
    cvc14(tmp_path, "Day", "NewTest", "2014_05_04", [(11, 9, 8, 12, 1)], [(11, 9, 8, 12, 1)])
    data = open_root(tmp_path, "train")
    assert len(data) == 2 and "CVC-14 Train: 2 pairs" in data.source and "1 without a partner" in data.source
    assert [pair.daytime for pair in data.pairs] == [True, False] and len(open_root(tmp_path, "test")) == 1
    sample = data[0]
    assert sample["boxes"].tolist() == [[6, 2, 14, 14], [26, 2, 34, 14]]  # not [[10, 8, 18, 20], ...]
    assert sample["boxes_infrared"].tolist() == [[8, 2, 16, 14], [26, 2, 34, 14]]
    assert sample["visible_in"].tolist() == [[True, True], [True, False]]
    assert data[1]["boxes"].tolist() == [[16, 2, 24, 14]] and data[1]["visible_in"].tolist() == [[False, True]]
    write(tmp_path / "CVC-14/Day/FIR/Train/Annotations/2014_05_01.txt", "1 2 3\n")
    refused(lambda: data[0], "2014_05_01.txt, line 1", "expected 11 numbers")


CHOICES = {
    "visible": ([[6, 2, 14, 14], [26, 2, 34, 14], [0, 0, 5, 9]], [False, False, True]),
    "infrared": ([[8, 2, 16, 14], [26, 2, 34, 14], [0, 0, 5, 9]], [False, True, False]),
    "both": ([[7, 2, 15, 14], [26, 2, 34, 14], [0, 0, 5, 9]], [False, False, False]),
}


def two_jsons(root, size=SIZE):
    """A person seen in both, one seen in visible and one in infrared light alone."""

    def coco(*boxes, size=SIZE):
        images = [dict(id=1, file_name="a1.png", width=size[0], height=size[1])]
        rows = [dict(id=i, image_id=1, category_id=1, bbox=box) for i, box in enumerate(boxes)]
        return dict(images=images, annotations=rows, categories=[dict(id=1, name="person")])

    for camera, side in (("v", SIZE), ("i", size)):
        write(root / camera / "a1.png", (90, 60, 30), side)
    scale = size[0] / SIZE[0]
    infrared = [[scale * x for x in box] for box in ([0, 0, 5, 9], [8, 2, 8, 12])]
    jsons = write(root / "v.json", coco([6, 2, 8, 12], [26, 2, 8, 12])), coco(*infrared, size=size)
    return Pairs(root / "v", root / "i", jsons[0], labels_infrared=write(root / "i.json", jsons[1]))


@pytest.mark.parametrize("choice", CHOICES)
def test_two_jsons_and_whose_boxes_are_detected(tmp_path, choice):
    data = two_jsons(tmp_path).with_onto(read_onto(None), choice)
    assert f"detected are those of {choice}" in data.source
    target = collate([data[0]])["targets"][0]
    assert (target["boxes"].tolist(), target["ignore"].tolist()) == CHOICES[choice]
    assert target["own_boxes"][0].tolist() == [[6, 2, 14, 14], [8, 2, 16, 14]]
    assert data.statistics()["seen_in_both"] == data.statistics()["infrared_only"] == 1
    one = Pairs(tmp_path / "v", tmp_path / "i", tmp_path / "v.json")
    assert "boxes_infrared" not in one[0] and one.with_onto(read_onto(None), choice)[0].keys() == one[0].keys()


def test_labels_of_infrared_go_with_its_images_before_they_are_joined(tmp_path):
    data = two_jsons(tmp_path, size=(80, 40))
    refused(lambda: data[0], "--infrared-to-visible")
    assert data.statistics()["pairs"] == 1  # the labels have the sizes of the images
    sample = data.with_onto(read_onto("resize"))[0]
    assert sample["boxes_infrared"].tolist() == [[8, 2, 16, 14], [26, 2, 34, 14], [0, 0, 5, 9]]
    assert sample["visible_in"].tolist() == [[True, True], [True, False], [False, True]]


@pytest.mark.parametrize("kind", ["homography", "none"])
def test_infrareds_labels_for_images_of_another_size_are_refused(tmp_path, kind):
    two_jsons(tmp_path, size=(80, 40))
    write(tmp_path / "i/a1.png", (90, 60, 30), SIZE)
    data = Pairs(tmp_path / "v", tmp_path / "i", tmp_path / "v.json", labels_infrared=tmp_path / "i.json")
    onto = read_onto(None if kind == "none" else torch.eye(3).tolist())
    other = f"{tmp_path / 'v.json'}" if kind == "none" else "but the infrared image has (40, 20)"
    refused(lambda: data.with_onto(onto).statistics(), "i.json, images[0] (a1.png) is for (80, 40) pixels", other)


def test_each_camera_has_its_own_label_files(tmp_path):
    """All in one folder; where a label file of visible is absent, there is no object, not infrared's."""
    for end, x in (("_rgb", 0.5), ("_ir", 0.55)):
        for stem in "ab":
            write(tmp_path / f"all/{stem}{end}.png", (90, int(99 * x), 30), SIZE)
            write(tmp_path / f"labels/{stem}{end}.txt", f"0 {x} 0.5 0.2 0.5\n")
    (tmp_path / "labels/b_rgb.txt").unlink()
    places, ends = [tmp_path / name for name in ("all", "all", "labels")], dict(suffixes=("_rgb", "_ir"))
    sample = Pairs(*places, labels_infrared=places[2], **ends)[0]
    assert (sample["boxes"].tolist(), sample["boxes_infrared"].tolist()) == ([[16, 5, 24, 15]], [[18, 5, 26, 15]])
    assert Pairs(None, *places[1:], **ends)[0]["boxes"].tolist() == [[18, 5, 26, 15]]
    data = Pairs(*places, **ends)
    assert not data.of_infrared and [data[i]["boxes"].tolist() for i in (0, 1)] == [[[16, 5, 24, 15]], []]


def test_both_kinds_of_boxes_are_augmented(tmp_path):
    sample = PairedAugmentation(flip=1)(two_jsons(tmp_path)[0])
    assert sample["boxes"][0].tolist() == [26, 2, 34, 14] and sample["boxes_infrared"][0].tolist() == [24, 2, 32, 14]
    sample = PairedAugmentation(flip=0, crop=1, crop_scale=(0.3, 0.3))(two_jsons(tmp_path)[0])
    assert {len(sample[key]) for key in ("boxes", "boxes_infrared", "labels", "visible_in")} == {len(sample["boxes"])}


def test_what_overlaps_most_is_joined_and_names_must_agree():
    def labels(*objects):
        return Labels("x", SIZE, [Object(name, box) for name, box in objects])

    near, far = (0, 0, 10, 10), (2, 0, 12, 10)
    rows = join(labels(("a", far), ("a", near), ("b", near)), labels(("a", near), ("c", near))).objects
    assert [(row.name, row.box, row.infrared) for row in rows] == [
        ("a", far, None), ("a", near, near), ("b", near, None), ("c", None, near)
    ]  # fmt: skip
    assert join(labels(), labels()).objects == []


@pytest.mark.parametrize("kind", ["png", "tif", "float"])
def test_values_of_more_than_8_bits(tmp_path, kind):
    write(tmp_path / "v/a1.png", (9, 9, 9), (2, 2))
    write(tmp_path / "l/a1.txt", "0 0.5 0.5 1 1\n")
    values = np.array([[1000, 2000], [3000, 60000]], np.float32 if kind == "float" else np.uint16)
    path = tmp_path / f"i/a1.{'png' if kind == 'png' else 'tif'}"
    write(tmp_path / "i/note.txt", "")
    Image.fromarray(values).save(path)
    data = Pairs(tmp_path / "v", tmp_path / "i", tmp_path / "l")
    refused(lambda: data[0], "more than 8 bits", "--infrared-range")
    sample = data.with_onto(read_onto(None, [2000, 3000]))[0]
    assert sample["infrared"][0].tolist() == [[0, 0], [255, 255]]
    assert data.with_onto(read_onto(None, [0, 4000]))[0]["infrared"][0].tolist() == [[64, 128], [191, 255]]
    Image.new("L", (2, 2), 77).save(tmp_path / "i/a1.png") if kind == "png" else path.unlink()
    if kind == "png":  # 8 bits stay
        assert data.with_onto(read_onto(None, [2000, 3000]))[0]["infrared"].unique().tolist() == [77]
    refused(lambda: read_onto(None, [3, 3]), "--infrared-range 3 3", "the smaller one first")


@pytest.mark.parametrize("camera", ["visible", "infrared"])
def test_one_camera_alone(tmp_path, camera):
    write(tmp_path / "x/a1.png", (90, 60, 30), SIZE)
    write(tmp_path / "l/a1.txt", "0 0.5 0.5 0.5 0.5\n")
    places = {"visible": None, "infrared": None} | {camera: tmp_path / "x"}
    data = Pairs(*places.values(), tmp_path / "l")
    sample, present = data[0], [camera == "visible", camera == "infrared"]
    assert f"1 {camera} image " in data.source and data.modalities == (camera,)
    assert [bool(sample[name].any()) for name in places] == sample["present"].tolist() == present
    assert sample["visible_in"].tolist() == [present] and sample["path"].endswith("x/a1.png")
    assert torch.equal(collate([sample])["targets"][0]["present"], sample["present"])
    assert json.dumps(data.statistics())
