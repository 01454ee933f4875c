"""KAIST's layouts, lists, annotations and rules: what is read, and what each kind of bad input says."""

import pickle

import pytest
import torch
from pairs import FRAMES, PERSON, SIZE, bbgt, kaist, published, refused, write
from PIL import Image

from macl.data import KAIST, Onto, collate, hold_out, read_ground_truth
from macl.data.kaist import TRAINING_RULES
from trainkit.loader import make_loader


def xml(*objects, corners=False, size=SIZE):
    """The tree's own XML, or with corners that of the processed layout."""
    tags = ("xmin", "ymin", "xmax", "ymax") if corners else "xywh"
    text = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, x, y, w, h, hidden in objects:
        box = zip(tags, (x, y, x + w, y + h) if corners else (x, y, w, h), strict=True)
        text += f"<object><name>{name}</name><bndbox>" + "".join(f"<{tag}>{value}</{tag}>" for tag, value in box)
        text += f"</bndbox><occlusion>{hidden}</occlusion></object>"
    return f"<annotation>{text}</annotation>"


def processed(root, frames=FRAMES, objects=(PERSON,), name="all"):
    listed = []
    for frame in frames:
        video, image = frame.replace("/V", "_V").rsplit("/", 1)
        write(root / "visible" / f"{video}_visible_{image}.jpg", (200, 100, 50))
        write(root / "infrared" / f"{video}_lwir_{image}.jpg", (90, 90, 90))
        for modality in ("visible", "lwir"):
            write(root / "Annotations" / f"{video}_{modality}_{image}.xml", xml(*objects, corners=True))
            listed.append(f"{video}_{modality}_{image}")
    write(root / "ImageSets" / f"{name}.txt", "\n".join(listed) + "\n")
    return root


def numbers(data):
    return [(pair.scene, int(pair.visible.stem[-5:])) for pair in data.pairs]


@pytest.fixture(params=[kaist, processed])
def root(request, tmp_path):
    return request.param(tmp_path / "a visible infrared lwir place")  # the words of the layouts in the path itself


@pytest.fixture
def tree(tmp_path):
    return kaist(tmp_path / "kaist")


def test_a_sample_follows_the_contract_in_both_layouts(root):
    data = KAIST(root, "all")
    assert len(data) == 5
    sample = data[4]
    for key, colour in (("visible", [200, 100, 50]), ("infrared", [90, 90, 90])):
        assert sample[key].shape == (3, 112, 96) and sample[key].dtype == torch.uint8
        assert sample[key][:, 9, 9].tolist() == pytest.approx(colour, abs=4)
    assert sample["boxes"].tolist() == [[10, 20, 40, 80]] and sample["boxes"].dtype == torch.float32
    assert sample["labels"].tolist() == [1] and sample["ignore"].tolist() == [False]
    assert sample["occlusion"].tolist() == [0] and sample["occlusion"].dtype == torch.int64
    assert sample["image_id"] == 4 and data[-1]["image_id"] == 4
    assert [data[index]["scene"] for index in range(5)] == data.scenes == [0, 0, 4002, 6000, 11001]
    assert [data[index]["daytime"] for index in range(5)] == [True, True, False, True, False]
    assert sample["path"] == str(data.pairs[4].visible)


@pytest.mark.parametrize(("make", "name"), [(kaist, "kaist-rgbt"), (processed, "KAIST_processed")])
def test_source_says_layout_list_labels_and_counts_and_the_parent_of_the_root_will_do(tmp_path, make, name):
    root = make(tmp_path / name)
    source = KAIST(tmp_path, "all").source
    assert "5 pairs (3 by day, 2 by night)" in source and "all.txt" in source and str(root) in source
    assert ("original tree" in source) == (make is kaist) != ("processed VOC layout" in source)
    assert "nnotations, one" in source
    assert "below 20 pixels or of occlusion above 1" in KAIST(root, "all").with_rules(**TRAINING_RULES).source


def test_the_same_boxes_from_every_kind_of_annotation(tree, tmp_path):
    objects = [PERSON, ("people", 5, 6, 7, 50, 0), ("person", 40, 3, 12.5, 30, 2)]
    write(tree / "annotations" / f"{FRAMES[3]}.txt", bbgt(*objects))
    write(tree / "annotations-xml-new" / f"{FRAMES[3]}.xml", xml(*objects))
    flat = write(tmp_path / "flat" / "set06_V000_visible_I00019.xml", xml(*objects, corners=True)).parent
    file = write(tmp_path / "test.json", published({FRAMES[3]: objects}))
    one = write(tmp_path / "one.txt", FRAMES[3])
    expected = KAIST(tree, one)[0]
    assert expected["boxes"].tolist() == [[10, 20, 40, 80], [5, 6, 12, 56], [40, 3, 52.5, 33]]
    assert expected["ignore"].tolist() == [False, True, False] and expected["occlusion"].tolist() == [0, 0, 2]
    for annotations in ("annotations-xml-new", tree / "annotations-xml-new", flat, file, str(file)):
        sample = KAIST(tree, one, annotations)[0]
        for key in ("boxes", "labels", "ignore", "occlusion"):
            assert torch.equal(sample[key], expected[key]), (annotations, key)


def test_boxes_of_other_names_are_ignored_and_person_has_to_be_among_the_classes(tree, tmp_path):
    objects = [(name, *PERSON[1:]) for name in ("people", "person?", "cyclist", "person", "person?a")]
    write(tree / "annotations" / f"{FRAMES[0]}.txt", bbgt(*objects))
    for classes, labels in (
        (["person"], [1] * 5),
        (["car", "person"], [2] * 5),
        (["person", "cyclist"], [1, 1, 2, 1, 1]),
    ):
        sample = KAIST(tree, "all", classes=classes)[0]
        assert sample["labels"].tolist() == labels
        assert sample["ignore"].tolist() == [True, True, "cyclist" not in classes, False, True]
    refused(lambda: KAIST(tree, "all", classes=("car", "cyclist")), "named person", "'car', 'cyclist'")
    people = write(tmp_path / "people.json", published({FRAMES[0]: objects[:3:2]}))
    refused(lambda: read_ground_truth(people), people, "'person'", "'cyclist' 1", "'people' 1")


def test_suffixes_of_windows_and_label_folders_of_both_cameras(tree):
    for image in tree.rglob("*.jpg"):
        image.rename(image.with_suffix(".JPG"))
    for frame in FRAMES:
        video, image = frame.rsplit("/", 1)
        write(tree / "paired" / video / "visible" / f"{image}.txt", "\ufeff" + bbgt(PERSON).replace("\n", "\r\n"))
        write(tree / "paired" / video / "lwir" / f"{image}.txt", bbgt(("person", 1, 1, 9, 9, 0)))
    data = KAIST(tree, "all", "paired")
    assert data[0]["path"].endswith(".JPG") and data[0]["boxes"].tolist() == [[10, 20, 40, 80]]
    assert "one txt file per image of each camera" in data.source
    assert data[0]["boxes_infrared"].tolist() == [[1, 1, 10, 10]] and data[0]["visible_in"].tolist() == [[True, True]]
    for choice, box in (("infrared", [1, 1, 10, 10]), ("both", [5.5, 10.5, 25, 45])):
        assert collate([data.with_onto(Onto(), choice)[0]])["targets"][0]["boxes"].tolist() == [box]
    write(tree / "paired" / f"{FRAMES[0].replace('/I', '/lwir/I')}.txt", bbgt(PERSON, PERSON))
    refused(lambda: data[0], "lwir", "2 people", "1")


def test_small_and_occluded_people_are_ignored_by_rule(tree):
    objects = [("person", 1, 1, 10, 19, 0), ("person", 1, 1, 10, 20, 1), ("person", 1, 1, 10, 60, 2)]
    write(tree / "annotations" / f"{FRAMES[0]}.txt", bbgt(*objects))
    data = KAIST(tree, "all")
    assert data[0]["ignore"].tolist() == [False] * 3  # the evaluator has rules of its own
    assert data.with_rules(**TRAINING_RULES)[0]["ignore"].tolist() == [True, False, True]
    assert data.with_rules(min_height=21, max_occlusion=2)[0]["ignore"].tolist() == [True, True, False]
    assert data.with_rules(min_height=0, max_occlusion=0)[0]["ignore"].tolist() == [False, True, True]


def test_marks_of_the_annotation_itself_are_kept(tree, tmp_path):
    write(tree / "annotations" / f"{FRAMES[0]}.txt", bbgt(PERSON).replace("0 0 0 0 0 0\n", "0 0 0 0 1 0\n"))
    one = write(tmp_path / "one.txt", FRAMES[0])
    assert KAIST(tree, one)[0]["ignore"].tolist() == [True]
    content = published({FRAMES[0]: [PERSON, ("__ignore__", *PERSON[1:])]})
    content["annotations"][0]["ignore"] = 1
    assert KAIST(tree, one, write(tmp_path / "a.json", content))[0]["ignore"].tolist() == [True, True]
    difficult = xml(PERSON).replace("</object>", "<difficult>1</difficult></object>")
    write(tree / "xml" / f"{FRAMES[0]}.xml", difficult.replace("<occlusion>0</occlusion>", ""))
    sample = KAIST(tree, one, "xml")[0]
    assert sample["ignore"].tolist() == [True] and sample["occlusion"].tolist() == [0]  # whole where it is not marked


def test_boxes_are_clipped_dropped_and_counted_but_not_for_the_evaluator(tree):
    objects = [("person", 80, 20, 17, 93, 1), ("people", 96, 1, 5, 5, 0), ("person", 5, 5, 0, 9, 0), PERSON, PERSON]
    write(tree / "annotations" / f"{FRAMES[0]}.txt", bbgt(*objects))
    write(tree / "annotations" / f"{FRAMES[1]}.txt", bbgt())
    data = KAIST(tree, "all")
    assert len(data) == 5 and data[1]["boxes"].shape == (0, 4) and data[1]["occlusion"].shape == (0,)
    assert data[0]["boxes"].tolist() == [[80, 20, 96, 112], [10, 20, 40, 80], [10, 20, 40, 80]]
    assert data.ground_truth()[0]["boxes"].tolist()[:2] == [[80, 20, 97, 113], [96, 1, 101, 6]]
    counts = dict(pairs=5, day=3, night=2, scenes=4, boxes=6, ignored=0, clipped=1, dropped=2, other_classes=0)
    counts |= dict(empty_images=1, min_height=60.0, median_height=60.0, max_height=92.0, whole=5, partial=1, heavy=0)
    assert data.statistics() == counts | dict(named_people=1, named_person=7)


def test_ground_truth_needs_no_images(tree, tmp_path):
    data = KAIST(tree, "all")
    for image in (tree / "images").rglob("*.jpg"):
        image.unlink()
    frames = data.ground_truth()
    assert [frame["daytime"] for frame in frames] == [True, True, False, True, False]
    assert frames[0]["size"] == (112, 96) and frames[0]["ignore"].tolist() == [False]
    content = published({name: [PERSON] * index for index, name in enumerate(FRAMES)}, info_improved={})
    content["images"].reverse()  # the ids count, not the order
    alone, source = read_ground_truth(write(tmp_path / "all.json", content))
    assert [len(frame["boxes"]) for frame in alone] == [0, 1, 2, 3, 4]
    assert [frame["daytime"] for frame in alone] == [True, True, False, True, False]
    assert alone[0]["size"] == (112, 96) and "5 frames" in source and "improved" in source


def test_stride_counts_as_the_lists_of_the_benchmark_do(tmp_path):
    frames = [f"set00/V00{video}/I{number:05d}" for video in (0, 1) for number in range(46)]
    tree = kaist(tmp_path / "kaist", frames, name="train-all-01")
    chosen = KAIST(tree, "train-all-01", stride=20)
    assert numbers(chosen) == [(video, number) for video in (0, 1) for number in (19, 39)]
    assert len(KAIST(tree, "train-all-01", None, 2)) == 46 and "among the 92 listed" in chosen.source
    two = write(tmp_path / "two.txt", "\n".join(frames[1::2]))
    assert numbers(KAIST(tree, two, stride=20)) == numbers(chosen)  # of the video's frames, not of the list's
    refused(lambda: KAIST(tree, "train-all-01", stride=47), "stride=47", "92 frames", "train-all-01.txt")


def test_lists_name_frames_in_either_way(root, tmp_path):
    lines = "set06_V000_lwir_I00019\nset00/V000/I00001\n\nset00_V000_I00003\nset06_V000_visible_I00019\n"
    data = KAIST(root, write(tmp_path / "mine.txt", lines))
    assert numbers(data) == [(6000, 19), (0, 1), (0, 3)]  # in the list's order, each once
    assert "mine.txt" in data.source
    assert len(KAIST(root, "all.txt")) == 5
    refused(lambda: KAIST(root, "train-all-02"), "train-all-02.txt does not exist", "lists (all)")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("../set00/V000/I00001", "'../set00/V000/I00001'"),
        ("set12/V000/I00001", "set00 to set11"),
        ("set00/V000/I0001", "'set00/V000/I0001'"),
        (FRAMES[0], "twice"),
        ("set03/V009/I00005", "I00005.jpg does not exist; expected an image of set03/V009/I00005, listed in"),
    ],
)
def test_lists_of_unknown_frames(root, tmp_path, line, word):
    file = write(tmp_path / "list.txt", f"{FRAMES[0]}\n{line}\n")
    refused(lambda: KAIST(root, file), file, word)
    refused(lambda: KAIST(root, write(file, " \n")), file, "is empty")


@pytest.mark.parametrize("part", ["visible", "lwir", "annotations"])
def test_the_first_missing_file_is_named(tree, part):
    missing = tree / f"images/set04/V002/{part}/I00019.jpg"
    if part == "annotations":
        missing = tree / "annotations/set04/V002/I00019.txt"
    missing.unlink()
    refused(lambda: KAIST(tree, "all"), f"{missing} does not exist", "set04/V002/I00019")


def test_missing_folders_are_named(tree, tmp_path):
    (tmp_path / "visible").mkdir()
    for place in (tmp_path / "nowhere", tmp_path, tree / "imageSets"):
        refused(lambda place=place: KAIST(place, "all"), f"{place} does not hold KAIST", "images/set00", "VOC form")
    refused(lambda: KAIST(tree, "all", "labels"), "labels does not exist", "expected a folder of annotations")
    (tree / "annotations").rename(tree / "old")
    refused(lambda: KAIST(tree, "all"), tree / "annotations", "does not exist")
    assert len(KAIST(tree, "all", "old")) == 5


HEAD = "% bbGt version=3\n"
BAD_TEXT = [
    (bbgt(PERSON, version=2), "expected '% bbGt version=3'"),
    ("", "starts with ''"),
    (HEAD + "person 10 20 30 60\n", "line 2 (a name and 11 numbers): expected 11 numbers"),
    (HEAD + "person 10 20 30 60 3 0 0 0 0 0 0\n", "heavy): expected a whole number from 0 to 2, got 3"),
    (HEAD + "person 10 20 2147483647 60 0 0 0 0 0 0 0\n", "expected a number from"),
    (bbgt(("pedestrian", *PERSON[1:])), "'pedestrian'; expected person, people, cyclist"),
]
BAD_XML = [
    ("<vbb/>", "<vbb>"),
    ("no xml", "not XML"),
    (xml(PERSON, size=(640, 480)), "640 x 480"),
    (xml(PERSON).replace("<w>30</w>", ""), "<bndbox><w>"),
    (xml(PERSON).replace("<x>10</x>", ""), "<bndbox><xmin>"),
    (xml(("person", 1, 2, 3, 4, 5)), "heavy): expected a whole number from 0 to 2, got 5"),
    (xml(PERSON).replace("</object>", "<difficult>maybe</difficult></object>"), "expected a whole number from 0 to 9"),
]


def changed(**changes):
    return published({FRAMES[0]: [PERSON]}) | changes


def image(**changes):
    return changed(images=[changed()["images"][0] | changes])


def box(**changes):
    return changed(annotations=[changed()["annotations"][0] | changes])


BAD_JSON = [
    ("{", "is not valid JSON"),
    ([], "holds []; expected the json of KAIST's annotations, an object"),
    (changed(images=[], annotations=[]), "holds no images"),
    (image(im_name="../x"), "images[0] (../x) names '../x'"),
    (changed(images=changed()["images"] * 2), "twice"),
    (box(image_id=7), "annotations[0]: no image has the id 7"),
    (box(category_id=9), "annotations[0]: no image has the id 0, or no category the id 9"),
    (box(bbox=[1, 2, 3]), "annotations[0], bbox (x, y, width, height): expected 4 numbers"),
    (box(occlusion=None), "annotations[0], occlusion"),
    (box(ignore="perhaps"), "annotations[0], ignore"),
    (changed(annotations=[{"id": 3, **changed()["annotations"][0]}] * 2), "an annotation id twice"),
    (published({FRAMES[1]: [PERSON]}), "holds 1 frames but not set00/V000/I00001"),
    (published({FRAMES[0]: [PERSON]}, size=(640, 512)), "640 x 512"),
]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        *((f"labels/{FRAMES[0]}.txt", *case) for case in BAD_TEXT),
        *((f"labels/{FRAMES[0]}.xml", *case) for case in BAD_XML),
        *(("labels.json", *case) for case in BAD_JSON),
    ],
)
def test_annotations_of_another_version(tree, name, content, word):
    file, one = write(tree / name, content), write(tree / "one.txt", FRAMES[0])
    refused(lambda: KAIST(tree, one, name.split("/")[0])[0], file, word)


def test_broken_and_unequal_images(tree):
    refused(lambda: read_ground_truth(tree / "annotations"), "is not a file; expected the json")
    data = KAIST(tree, "all")
    file = tree / "images/set00/V000/lwir/I00003.jpg"
    Image.new("RGB", (96, 100)).save(file)
    refused(lambda: data[1], file, "96 x 100")
    Image.new("RGB", (96, 100)).save(tree / "images/set00/V000/visible/I00003.jpg")
    refused(lambda: data[1], "is for 96 x 112", "96 x 100")
    file.write_bytes(file.read_bytes()[:200])
    refused(lambda: data[1], file, "decoded")


def test_a_subset_is_renumbered(root):
    for image in root.rglob("set*/V001/*/I00039.jpg" if (root / "images").exists() else "*set11*_I00039.jpg"):
        Image.open(image).save(image.with_suffix(".png"))
        image.unlink()
    data = KAIST(root, "all").subset([4, 0], "kept")
    assert len(data) == 2 and data.source.endswith("2 of them kept") and data.scenes == [11001, 0]
    assert data[0]["image_id"] == 0 and data[0]["path"].endswith("I00039.png") and data.statistics()["pairs"] == 2
    assert data[1]["path"].endswith("I00001.jpg")


def test_a_video_of_every_set_is_held_out(tmp_path):
    frames = [f"set{place:02d}/V{video:03d}/I00001" for place in (0, 3) for video in range(3)]
    train, validation, sentence = hold_out(KAIST(kaist(tmp_path, [*frames, "set04/V000/I00001"]), "all"))
    assert validation.scenes == [2, 3002] and train.scenes == [0, 1, 3000, 3001, 4000]
    assert "2 of the 7 pairs of all, all those of video set00/V002, set03/V002" in sentence
    ruled = train.with_rules(**TRAINING_RULES)
    assert ruled.annotation(0).ignore.tolist() == [False] and "below 20 pixels" in ruled.source


@pytest.mark.parametrize("annotations", [None, "json"])
def test_it_is_lazy_and_can_be_pickled(tree, tmp_path, annotations):
    if annotations == "json":
        annotations = write(tmp_path / "all.json", published({name: [PERSON] for name in FRAMES}))
    for frame in FRAMES[1:]:  # not decoded before it is asked for
        video, image = frame.rsplit("/", 1)
        (tree / "images" / video / "visible" / f"{image}.jpg").write_bytes(b"")
    again = pickle.loads(pickle.dumps(KAIST(tree, "all", annotations)))
    assert again[0]["boxes"].tolist() == [[10, 20, 40, 80]]
    batch = next(iter(make_loader(again, [[0, 0]], collate)))
    assert batch["targets"][0]["daytime"].item() is True and batch["targets"][0]["occlusion"].tolist() == [0]


def test_real_frames_are_the_same_in_both_layouts(shared):
    folder = shared / "data/kaist"
    tree, voc = KAIST(folder / "kaist-rgbt", "test", "annotations-xml-new"), KAIST(folder / "KAIST_processed", "test")
    improved = KAIST(folder / "kaist-rgbt", "test", folder / "eval/gt/kaist_annotations_test20.json")
    text = KAIST(folder / "kaist-rgbt", "test")
    assert len(tree) == len(voc) == 8 and tree.scenes == voc.scenes and tree.size == (640, 512)
    for index in range(8):
        one, other = tree[index], voc[index]
        for key in ("visible", "infrared", "boxes", "labels", "ignore", "occlusion"):
            assert torch.equal(one[key], other[key]), key
        boxes = [sorted(data.annotation(index).boxes.tolist()) for data in (improved, text)]
        assert boxes[0] == boxes[1]
    counts = text.statistics()
    assert (counts["boxes"], counts["ignored"], counts["named_people"], counts["empty_images"]) == (62, 7, 7, 1)
    assert (counts["day"], counts["night"], counts["heavy"]) == (4, 4, 3)
