"""Annotation formats, what they refuse, images, boxes, and batches."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from pairs import write
from PIL import Image
from torchvision import transforms

from fgclip import Tokenizer
from fgclip.data.benchmarks import DCI, ClassFolders, COCOBoxes, Flickr30k, ShareGPT4V, by_image
from fgclip.data.collate import Collate
from fgclip.data.dataset import RegionDataset, data_statistics, evenly, hold_out, image_ids, usable_regions
from fgclip.data.records import COCO, FGOVD, FineHARD, JsonItems, Record, Region
from fgclip.images import normalise, preprocess
from fgclip.regions import BoxStatistics, usable_boxes
from trainkit.errors import InputError


def item(i, **changes):
    region = dict(bbox=[0.1, 0.2, 0.5, 0.6, 0.99], short_expr=f"box {i}", long_expr=f"a long box {i}")
    region |= dict(flag_short_neg=1, short_expr_negs={str(k): f'not "{k}" {{' for k in range(3)})
    plain = dict(bbox=[0, 0, 1, 1], short_expr="all", flag_short_neg=0, short_expr_negs={"0": "unused"})
    found = dict(f_path=f"grit-20m/data-12m/{i}.png", caption=f"long {i} ä\\", short_caption=f"short {i}")
    return found | dict(bbox_info=[region, plain]) | changes


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def finehard(tmp_path, name="items.json", items=None, **dump):
    path = tmp_path / name
    items = [item(i) for i in range(5)] if items is None else items
    if name.endswith("l"):
        path.write_text("\n".join(json.dumps(x, **dump) for x in items) + "\n\n")
    else:
        path.write_text(json.dumps(items, **dump))
    return path


def test_finehard_record(tmp_path):
    record = FineHARD(finehard(tmp_path))[3]
    assert record.image == "3.png" and record.long == "long 3 ä\\" and record.short == ("a photo of short 3",)
    first, second = record.regions
    assert first.box == (0.1, 0.2, 0.5, 0.6) and first.phrases == ("box 3", "a long box 3")
    assert first.negatives == ('not "0" {', 'not "1" {', 'not "2" {')
    assert second == Region((0.0, 0.0, 1.0, 1.0), ("all",), ())
    assert "items.json, item 3" in record.source and record.label == 0


@pytest.mark.parametrize("dump", [{}, dict(ensure_ascii=False), dict(indent=2), dict(separators=(",", ":"))])
def test_every_layout_of_files_gives_the_same_records(tmp_path, dump):
    expected = [item(i) for i in range(5)]
    whole = finehard(tmp_path, items=expected, **dump)
    found = FineHARD(whole)
    assert [found.items[i][0] for i in range(5)] == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    finehard(folder, "b.json", expected[3:], **dump)
    finehard(folder, "a.jsonl", expected[:3])
    (folder / "readme.md").write_text("no annotations")
    (folder / "._a.jsonl").write_bytes(b"\0\5\26\7 what macOS leaves")
    (tmp_path / "list.txt").write_text("folder/a.jsonl\n\nfolder/b.json\n")
    for path in (folder, tmp_path / "list.txt"):
        again = pickle.loads(pickle.dumps(FineHARD(path)))
        assert [replace(r, source="") for r in again] == [replace(r, source="") for r in found]
    with pytest.raises(IndexError):
        found[5]


def test_only_offsets_are_kept_in_memory(tmp_path):
    path = finehard(tmp_path, items=[item(i, caption="x" * 10000) for i in range(50)])
    items = JsonItems([path])
    assert len(pickle.dumps(items)) < 3000 < path.stat().st_size
    assert items[49][0]["f_path"].endswith("49.png")


@pytest.mark.parametrize("content", ["", '[{"a": 1}', '[{"a": 1}, 3, {"b": 2}]', '{"a": 1}\nb'])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(InputError, match="some.json"):
        JsonItems([path])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(f_path=None), "f_path"),
        (dict(bbox_info={"0": {}}), "bbox_info"),
        (dict(bbox=[0, 1, 2]), "bbox"),
        (dict(bbox=[0, 0, 30, 30]), "looks like pixels; expected fractions"),
        (dict(long_expr=7), "long_expr"),
        (dict(short_expr_negs=["a"]), "short_expr_negs"),
    ],
)
def test_wrong_schema_names_file_item_and_key(tmp_path, change, said):
    wrong = item(1)
    (wrong if change.keys() <= wrong.keys() else wrong["bbox_info"][0]).update(change)
    path = finehard(tmp_path, items=[item(0), wrong])
    assert FineHARD(path)[0]
    with pytest.raises(InputError, match=f"items.json, item 1.*{said}"):
        FineHARD(path)[1]


def test_missing_annotations_are_named(tmp_path):
    (tmp_path / "list.txt").write_text("absent.json\n")
    (tmp_path / "leaves.txt").write_text("../other.json\n")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("absent.json", "absent.json"),
        ("list.txt", "absent.json"),
        ("leaves.txt", "leaves.txt.*must be relative"),
        ("folder", "folder names or holds no .json or .jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            FineHARD(tmp_path / name)


def coco(tmp_path):
    images = [dict(id=7, file_name="0.png", width=30, height=20), dict(id=9, file_name="1.png", width=30, height=21)]
    texts = [(7, "one"), (9, "two "), (7, "three")]
    captions = dict(images=images, annotations=[dict(image_id=i, caption=text) for i, text in texts])
    boxes = [(7, [3, 5, 15, 10], 4, 0), (7, [0, 0, 30, 20], 4, 1), (9, [0, 0, 30, 21], 2, 0)]
    annotations = [dict(image_id=i, bbox=box, category_id=c, iscrowd=crowd) for i, box, c, crowd in boxes]
    instances = dict(annotations=annotations, categories=[dict(id=4, name="cat"), dict(id=2, name="dog")])
    for name, content in (("captions", captions), ("instances", instances)):
        (tmp_path / f"{name}_val2017.json").write_text(json.dumps(content))
    return captions, instances, tmp_path / "captions_val2017.json"


def test_coco(tmp_path):
    records = COCO(coco(tmp_path)[2])
    assert [r.short for r in records] == [("one", "three"), ("two",)] and records[0].long == "one three"
    assert records[0].regions == (Region(pytest.approx((0.1, 0.25, 0.6, 0.75)), ("a cat",)),)
    assert records[1].regions[0].phrases == ("a dog",)
    assert [r.short for r in COCO(tmp_path / "captions_val2017.json", most_captions=1)] == [("one",), ("two",)]
    (tmp_path / "instances_val2017.json").unlink()
    assert COCO(tmp_path / "captions_val2017.json")[0].regions == ()


SEVEN, FOUR = dict(id=7, file_name="0.png"), dict(id=4, name="bird")
CAPTION, BOX = dict(image_id=7, caption="a"), dict(image_id=7, bbox=[3, 5, 15, 10], category_id=4)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("captions", dict(annotations=[CAPTION, dict(image_id=7)]), r"annotations\[1\].*caption"),
        ("captions", dict(images=[SEVEN, SEVEN]), r"images\[1\]: the id 7 occurs twice, first in .*images\[0\]"),
        ("captions", dict(annotations=[dict(id=1.0) | CAPTION] * 2), r"annotations\[1\]: the id 1 occurs twice"),
        ("captions", dict(images=[SEVEN]), r"images\[0\], width"),
        ("instances", dict(annotations=[BOX, BOX | dict(category_id=5)]), r"annotations\[1\]: category_id 5"),
        ("instances", dict(categories=[FOUR, FOUR]), "the id 4 occurs twice"),
        ("instances", dict(annotations=[BOX | dict(bbox=[0.1, 0.2, 0.5, 0.5])]), "looks like fractions"),
    ],
)
def test_what_coco_refuses(tmp_path, file, change, message):
    captions, instances, path = coco(tmp_path)
    content = (captions if file == "captions" else instances) | change
    (tmp_path / f"{file}_val2017.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{file}_val2017.json.*{message}"):
        list(COCO(path))


def test_fgovd(tmp_path):
    line = dict(img_path="val2017/0.png", bbox=[3, 5, 15, 10], width=30, height=20, category_id=0)
    line |= dict(pos_expression=["a red cat"], neg_expression=["a blue cat", "a red dog"])
    path = tmp_path / "hard.jsonl"
    wrong = [dict(neg_expression=[]), dict(bbox=[0.1, 0.25, 0.5, 0.5]), dict(width=1e30)]
    path.write_text("\n".join(json.dumps(line | change) for change in ({}, *wrong)))
    records = FGOVD(path)
    assert len(records) == 4 and records[0].image == "val2017/0.png"
    region = Region(pytest.approx((0.1, 0.25, 0.6, 0.75)), ("a red cat",), ("a blue cat", "a red dog"))
    assert records[0].regions == (region,)
    for i, said in enumerate(("neg_expression", "looks like fractions; expected xywh in pixels", "width: expected"), 1):
        with pytest.raises(InputError, match=f"hard.jsonl, item {i}.*{said}"):
            records[i]


def test_an_image_of_another_size_than_its_boxes_were_scaled_by_is_refused(tmp_path, images):
    """0.png is 30 x 20."""
    captions, instances, path = coco(tmp_path)
    path.with_name("instances_val2017.json").write_text(json.dumps(instances | dict(images=captions["images"])))
    for record in (COCO(path)[0], COCOBoxes(path.with_name("instances_val2017.json"))[0]):
        assert RegionDataset([record], images, image_size=16)[0]
        with pytest.raises(InputError, match=r"0.png is 30 x 20 pixels, .* for 20 x 30 \(.*images\[0"):
            RegionDataset([replace(record, size=(20, 30))], images, image_size=16)[0]
    captions["images"][0]["width"] = 99
    path.write_text(json.dumps(captions))
    (tmp_path / "instances_val2017.json").unlink()
    assert RegionDataset([COCO(path)[0]], images, image_size=16)[0]  # without boxes the size is no matter


def test_fgovd_records_of_one_image_are_joined(tmp_path):
    line = dict(bbox=[2, 3, 20, 15], pos_expression=["a"], neg_expression=["b"], width=40, height=30)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line | dict(img_path=f"{i}.png")) for i in (0, 1, 0)))
    joined = by_image(FGOVD(tmp_path / "x.jsonl"))
    assert [(record.image, len(record.regions)) for record in joined] == [("0.png", 2), ("1.png", 1)]
    with pytest.raises(InputError, match="item 1: the size of 0.png is another than in .*item 0"):
        by_image([replace(r, image="0.png", size=(40, 30 + i)) for i, r in enumerate(FGOVD(tmp_path / "x.jsonl"))])


def test_flickr30k(tmp_path):
    image = dict(filename="1.jpg", filepath="a", split="test", sentences=[dict(raw=" a "), dict(raw="b")])
    path = write(tmp_path / "dataset.json", dict(images=[dict(filename="0.jpg", split="train", sentences=[]), image]))
    assert [(r.image, r.short) for r in Flickr30k(path)] == [("a/1.jpg", ("a", "b"))]
    assert Flickr30k(path, most_captions=1)[0].short == ("a",) and Flickr30k(path, "train")[0].image == "0.jpg"
    with pytest.raises(InputError, match="no split 'val'; expected one of test, train"):
        Flickr30k(path, "val")
    for broken, message in (({}, "images"), (dict(images=[image | dict(sentences=[{}])]), r"sentences\[0\].*raw")):
        with pytest.raises(InputError, match=message):
            list(Flickr30k(write(tmp_path / "broken.json", broken)))


def test_long_caption_layouts(tmp_path):
    turns = [dict(value="describe"), dict(value="a long one")]
    path = write(tmp_path / "share.json", [dict(image=f"x/{n}.jpg", conversations=turns[:n]) for n in (2, 1)])
    assert (ShareGPT4V(path)[0].image, ShareGPT4V(path)[0].long) == ("x/2.jpg", "a long one")
    with pytest.raises(InputError, match="item 1: expected two objects under the key conversations"):
        ShareGPT4V(path)[1]
    write(tmp_path / "dci" / "b.json", dict(image="b.jpg", extra_caption="bb", short_caption="b"))
    write(tmp_path / "dci" / "a.json", dict(image="a.jpg", extra_caption="aa"))
    (tmp_path / "dci" / "._a.json").write_bytes(b"\0\5\26\7")
    assert [(r.image, r.long, r.short) for r in DCI(tmp_path / "dci")] == [("a.jpg", "aa", ()), ("b.jpg", "bb", ("b",))]


def test_classes_are_in_natural_order(tmp_path):
    """And what macOS leaves is no picture."""
    for name in ("11", "2", "b", "1", "__MACOSX", ".git"):
        (tmp_path / name).mkdir()
        for file in (f"{name}.JPG", "._1.jpg", "notes.pdf", b"caf\xe9.png"):
            (tmp_path / name / os.fsdecode(file)).touch()
    data = ClassFolders(tmp_path)
    assert data.categories == data.folders == ("1", "2", "11", "b")
    assert [r.label for r in data] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [str(r.image) for r in data][::2] == [f"{c}/{c}.JPG" for c in data.folders]
    Image.new("RGB", (9, 9)).save(tmp_path / "1" / os.fsdecode(b"caf\xe9.png"))
    assert RegionDataset(data, tmp_path, image_size=8)[1].pixels.shape == (3, 8, 8)
    (tmp_path / "names.txt").write_text("one\n")
    with pytest.raises(InputError, match="names.txt names 1 classes, but .* holds 4 folders"):
        ClassFolders(tmp_path, tmp_path / "names.txt")


def test_boxes_are_clipped_dropped_and_counted():
    boxes = [[0.1, 0.1, 0.5, 0.5], [-0.2, 0.5, 0.5, 1.7]]  # the second reaches out of the image
    boxes += [[0.5, 0.1, 0.4, 0.5], [0.3, 0.3, 0.3, 0.9], [1.1, 0, 2, 1]]  # inverted, without area, outside
    statistics = BoxStatistics()
    kept, which = usable_boxes(torch.tensor([*boxes, [0.0, torch.nan, 1.0, 1.0]]), statistics)
    torch.testing.assert_close(kept, torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.0, 0.5, 0.5, 1.0]]))
    assert which.tolist() == [True, True, False, False, False, False]
    assert statistics == dict(total=6, clipped=1, inverted=1, empty=3) and statistics.invalid == 4
    assert "4 (66.67%) dropped" in str(statistics)
    assert usable_boxes(torch.zeros(0, 4))[0].shape == (0, 4) and "0 boxes" in str(BoxStatistics())


@pytest.mark.parametrize("name", ["/etc/passwd", "../0.png", "a/../../0.png", "", "a\0b"])
def test_image_paths_stay_below_their_root(images, name):
    dataset = RegionDataset([Record(name, ("a",), "b", source="some.json, item 0")], images, image_size=16)
    with pytest.raises(InputError, match="some.json, item 0"):
        dataset[0]


def test_samples_depend_on_epoch_and_index_alone(tmp_path, images):
    records = FineHARD(finehard(tmp_path))
    dataset = RegionDataset(records, images, image_size=16, seed=3)
    again = RegionDataset(records, images, image_size=16, seed=3)
    drawn = {epoch: [dataset[epoch, i].phrases[0] for i in range(5)] for epoch in range(4)}
    assert drawn == {epoch: [again[epoch, i].phrases[0] for i in range(5)] for epoch in (3, 1, 2, 0)}
    assert {p for phrases in drawn.values() for p in phrases} == {
        f"{a}box {i}" for i in range(5) for a in ("", "a long ")
    }
    assert dataset[2].pixels.shape == (3, 16, 16) and len(dataset) == 5
    sample = dataset[0, 2]
    assert sample.hard[0][0] == "box 2" and len(sample.hard[0]) == 4 and sample.hard[1] == []


def test_collate(tmp_path, images):
    tokenizer = Tokenizer("bytes")
    records = [item(0), item(1, bbox_info=[]), item(2, caption="c" * 99, label=1)]
    del records[1]["bbox_info"]
    dataset = RegionDataset(FineHARD(finehard(tmp_path, items=records)), images, image_size=16)
    batch = Collate(tokenizer, context_length=24, long_context_length=36)([dataset[i] for i in range(3)])
    texts = batch["short_texts"]

    def text(rows):
        symbols = {i: symbol for symbol, i in tokenizer.encoder.items()}
        return ["".join(symbols[int(t)] for t in texts[r] if 0 <= t < 512).rstrip("!") for r in rows]

    assert texts.shape[1] == int((texts == 513).int().argmax(1).max()) + 1 < 24
    assert len(set(map(tuple, texts.tolist()))) == len(texts) == len(batch["short_ids"])
    assert [t.replace("</w>", " ") for t in text(batch["short"])] == [f"a photo of short {i} " for i in range(3)]
    assert [len(b) for b in batch["boxes"]] == [2, 0, 2] and len(batch["region"]) == 4
    assert batch["region"][1] == batch["region"][3]  # "all", once
    assert batch["hard_regions"].tolist() == [0, 2] and batch["hard_counts"].tolist() == [4, 4]
    assert len(batch["hard"]) == 8 and [t.split("</w>")[0] for t in text(batch["hard"][[0, 4]])] == ["box", "box"]
    assert batch["hard"][1:4].equal(batch["hard"][5:8])  # the same three negatives
    assert batch["labels"].tolist() == [0, 0, 1] and batch["region_labels"].tolist() == [0, 0, 1, 1]
    assert batch["truncated"] == 1 and batch["long_texts"].shape == (3, 36)
    assert batch["sources"][2].endswith("item 2")

    without = Collate(tokenizer, regions=False, long_context_length=None)([dataset[0]])
    assert not {"boxes", "region", "hard", "long", "long_texts"} & without.keys() and len(without["short_texts"]) == 1
    easy = Collate(tokenizer, hard=False, context_length=24)([dataset[i] for i in range(3)])
    assert len(easy["region"]) == 4 and len(easy["short_texts"]) == len(texts) - 3
    assert not len(easy["hard"]) and not len(easy["hard_counts"]) and not len(easy["hard_regions"])


def test_held_out_records_are_spread_and_apart():
    records = [Record(f"{i}.png", (), "") for i in range(100)]
    train, held_out = hold_out(records, 0.1, 1000)
    assert len(held_out) == 10 and sorted([*train, *held_out], key=records.index) == records
    assert held_out[0] == records[0] and held_out[9] == records[99]
    assert len(hold_out(records, 0.5, 3)[1]) == 3 and len(hold_out(records, 0.0, 3)[1]) == 1
    with pytest.raises(InputError, match="100 annotated images are too few"):
        hold_out(records, 1.0, 1000)
    assert [*evenly(records, 3)] == [records[i] for i in (0, 50, 99)] and evenly(records, 100) is records


def test_an_image_is_held_out_in_all_its_records(tmp_path):
    """However its path is spelt; and it is validated on once."""
    items = [item(i, f_path=f"{('', './', 'grit-20m/data-12m/', 'a/../')[i % 3]}{i // 5:02d}.png") for i in range(50)]
    train, held_out = hold_out(FineHARD(finehard(tmp_path, items=items)), 0.2, 1000)
    names = [{os.path.normpath(part[i].image) for i in range(len(part))} for part in (train, held_out)]
    assert len(held_out) == len(names[1]) == 2 and len(train) == 40 and not names[0] & names[1]
    both = [Record(name, (), "") for name in ("b/0.png", "1.png")]
    ids, below = image_ids(both, tmp_path / "a"), image_ids([Record("0.png", (), "")], f"{tmp_path}/./a//b")
    assert below[0] == ids[0] != ids[1]


def test_most_regions_are_counted_after_the_bad_ones():
    boxes = [(0, 0, 0, 1), (0, 0, 1, 1), (0.5, 0, 1, 1), (0, 0, 0.5, 1)]
    record = Record("a", (), "", tuple(Region(b, (str(i),)) for i, b in enumerate(boxes)))
    kept, regions = usable_regions(record, 2)
    assert [r.phrases for r in regions] == [("1",), ("2",)] and kept.tolist() == [[0, 0, 1, 1], [0.5, 0, 1, 1]]


def test_data_statistics(tmp_path):
    wrong = item(2, caption="d" * 60, label=1)
    wrong["bbox_info"][0]["bbox"] = [0.4, 0.4, 0.2, 0.5]
    records = FineHARD(finehard(tmp_path, items=[item(0), item(1, bbox_info=[]), wrong]))
    found = data_statistics(records)
    assert (found.images, found.regions, found.images_without_regions, found.abnormal) == (3, 3, 1, 1)
    assert (found.regions_with_negatives, found.negatives, found.boxes["inverted"]) == (1, 3, 1)
    assert found.phrases == {"box 0", "a long box 0", "all"} and len(found.captions) == 3
    assert "1 (25.00%) dropped" in str(found)


@pytest.mark.parametrize("sides", [(224, 37), (32, 33), (336, 17)])
def test_a_crop_is_that_of_openai(sides):
    """Resize and CenterCrop of torchvision, for every remainder of the long side, lying and standing."""
    size, short = sides
    reference = transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size), np.array
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    for long in range(short, short + 12):
        for shape in ((short, long, 3), (long, short, 3)):
            image = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
            expected = normalise(torch.from_numpy(reference(image)).permute(2, 0, 1).float() / 255)
            assert preprocess(image, size, crop=True).equal(expected), shape


@pytest.mark.parametrize("shape", [(3, 2000), (2000, 3), (1, 65535)])
def test_of_a_strip_only_the_centre_is_made(shape):
    height, width = shape
    colours = np.full((height, width, 3), 100, dtype=np.uint8)
    if width > height:
        colours[:, : width // 2 - 1000] = 0
    assert preprocess(Image.fromarray(colours), 336, crop=True).shape == (3, 336, 336)
    pixels = preprocess(Image.fromarray(colours), 32, crop=True)
    assert pixels.equal(normalise(torch.full((3, 32, 32), 100 / 255)))


def test_golden_pixels(golden):
    g = golden("preprocess")
    for case in range(int(g["n"])):
        image, size = Image.fromarray(g[f"{case}/image_u8"].numpy()), int(g[f"{case}/size"])
        for crop, name in ((False, "pixel_values"), (True, "pixel_values_crop")):
            torch.testing.assert_close(preprocess(image, size, crop), g[f"{case}/{name}"], rtol=0, atol=1e-5)


def test_real_sample(shared):
    data = shared / "data" / "fgclip"
    finehard, coco = FineHARD(data / "finehard_format_DERIVED.json"), data / "coco"
    captions = COCO(coco / "annotations" / "captions_val2017.json")
    assert len(finehard) == 25 and len(captions) == 65
    for records, root in ((finehard, coco), (captions, coco / "val2017")):
        statistics = data_statistics(records)
        assert statistics.boxes["total"] - statistics.boxes.invalid == statistics.regions > len(records)
        dataset = RegionDataset(records, root, image_size=32)
        batch = Collate(Tokenizer("bytes"))([dataset[0, i] for i in range(3)])
        assert batch["pixels"].shape == (3, 3, 32, 32) and len(batch["region"]) == sum(map(len, batch["boxes"])) > 0
