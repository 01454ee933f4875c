"""Damaged pairs, annotations, detections and checkpoints: read sanely, or refused in a line that names the place."""

import argparse
import io
import json

import pytest
import torch
from mutants import hunt, xml
from pairs import cvc14, kaist, llvip, write
from PIL import Image

import macl
from macl.data import KAIST, LLVIP, Pairs, collate, open_root
from macl.metrics import average_precision
from macl.metrics.detection_files import read_detections
from macl.training import READING, choose_reading, onto_of
from trainkit.errors import InputError
from trainkit.files import open_image, read_json
from trainkit.report import main as report

SIZE = dict(width=32, height=24)
PERSON = dict(name="person", difficult=0, bndbox=dict(xmin=3, ymin=4, xmax=13, ymax=20))
FRAMES = ["set00/V000/I00019", "set06/V001/I00039"]
PUBLISHED = dict(
    images=[dict(id=i, im_name=name, **SIZE) for i, name in enumerate(FRAMES)],
    annotations=[dict(image_id=i, category_id=1, bbox=[3, 4, 10, 15], occlusion=0, ignore=0) for i in range(2)],
    categories=[dict(id=0, name="__ignore__"), dict(id=1, name="person")],
)
DETECTIONS = [dict(image_id=1, bbox=[3, 4, 10, 15], score=0.5), dict(image_id=2, bbox=[1, 2, 3, 4], score=0.1)]
SMALL = dict(
    backbone="resnet18", norm="group", fpn_channels=4, fpn_levels=3, head_width=4, macl_hidden=[4], macl_dim=4,
    anchor_sizes=[8, 16, 32], min_size=[32], max_size=64,
)  # fmt: skip


def use(data):
    """What training makes of what was read."""
    data.statistics()
    batch = collate([data[i] for i in range(len(data))])
    for target in batch["targets"]:
        boxes = target["boxes"]
        assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes.abs() <= 1e6).all()


COUNTS = [200, pytest.param(1500, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_voc_annotations(tmp_path, count):
    root = llvip(tmp_path, "person", places=("train/010001", "train/020001"), size=(32, 24))
    sound = dict(size=SIZE, object=[PERSON, PERSON | dict(difficult=1)])
    hunt(root / "Annotations" / "010001.xml", sound, lambda path: use(LLVIP(root, "train")), count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("labels/a.txt", [[0, 0.5, 0.5, 0.25, 0.5], [1, 0.2, 0.7, 0.1, 0.1]]),
        ("labels/a.xml", dict(size=SIZE, object=[PERSON, PERSON | dict(difficult=1)])),
        ("labels/classes.txt", ["person", "car"]),
        ("labels/data.yaml", ["names:", "  0: person", "  1: car", "nc: 2"]),
        ("boxes.json", PUBLISHED | dict(images=[dict(id=i, file_name=f"{'ab'[i]}.png", **SIZE) for i in (0, 1)])),
    ],
)  # fmt: skip
def test_labels_of_pairs(tmp_path, name, sound, count):
    """A second file keeps the form of the labels and the classes."""
    for place in ("v/a.png", "v/b.png", "i/a.png", "i/b.png"):
        write(tmp_path / place, (1, 2, 3), (32, 24))
    labels = tmp_path / ("boxes.json" if name == "boxes.json" else "labels")
    voc = xml("annotation", dict(size=SIZE, object=[PERSON]))
    write(tmp_path / "labels/b.xml", voc) if "xml" in name else write(tmp_path / "labels/b.txt", "0 0.5 0.5 0.5 0.5\n")
    hunt(tmp_path / name, sound, lambda path: use(Pairs(tmp_path / "v", tmp_path / "i", labels)), count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("imageSets/all.txt", FRAMES),
        (f"annotations/{FRAMES[0]}.txt", ["% bbGt version=3", ["person", 3, 4, 10, 15, *[0] * 7]]),
        ("published.json", PUBLISHED),
    ],
)
def test_lists_and_annotations_of_kaist(tmp_path, name, sound, count):
    root = kaist(tmp_path, FRAMES, objects=(), size=(32, 24))
    annotations = root / name if name.endswith("json") else None
    hunt(root / name, sound, lambda path: use(KAIST(root, "all", annotations)), count)


@pytest.mark.parametrize("count", COUNTS)
def test_labels_of_cvc14(tmp_path, count):
    cvc14(tmp_path, "Day", "Train", "a", [(11, 9, 8, 12, 1)], [(13, 9, 8, 12, 1), (31, 9, 8, 12, 2)])
    sound = [[11, 9, 8, 12, 1, 0, 0, 0, 0, 1, 0], [30, 9, 8, 12, 1, 0, 0, 0, 0, 2, 0]]
    place = tmp_path / "CVC-14/Day/Visible/Train/Annotations/a.txt"
    hunt(place, sound, lambda path: use(open_root(tmp_path, "train", classes=["person"])), count)


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_what_a_checkpoint_says_of_the_cameras(tmp_path, count):
    sound = dict(infrared_to_visible=[[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]], infrared_range=[2.0, 9.0])
    nothing = argparse.Namespace(**dict.fromkeys(READING))

    def use(path):
        try:
            onto = onto_of(choose_reading(nothing, None, read_json(path))[0])
        except InputError as error:  # which names what is in the checkpoint, but not the file
            raise InputError(f"{path}: {error}") from error
        assert onto.homography is None or onto.homography.isfinite().all()

    hunt(tmp_path / "reading.json", sound | dict(boxes="both"), use, count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_detection_files(tmp_path, suffix, count):
    sound = DETECTIONS if suffix == "json" else ["1,3,4,10,15,0.5", "2,1,2,3,4,0.1"]
    box = dict(boxes=torch.tensor([[3.0, 4, 13, 19]]), labels=torch.ones(1).long(), ignore=torch.zeros(1).bool())

    def use(path):
        detections = read_detections(path, 2)
        assert all(part.isfinite().all() for frame in detections for part in frame.values())
        average_precision(detections, [box, box])

    hunt(tmp_path / f"detections.{suffix}", sound, use, count)


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_checkpoints(tmp_path, count):
    detector = macl.build_detector(**SMALL)
    tensors = {name: tensor for name, tensor in detector.state_dict().items()}
    sound = dict(script="stage1", model_kwargs=dict(SMALL), model=tensors, ema=None)

    def use(path):
        with torch.inference_mode():
            macl.load_detector(path)(visible=[torch.rand(3, 32, 32)], infrared=[torch.rand(3, 32, 32)])

    hunt(tmp_path / "best.pt", sound, use, count)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl"])
def test_reports_of_a_run(tmp_path, name, count, capsys):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    run.mkdir()
    record = dict(script="stage1", arguments=dict(lr=0.1, classes=["person"]), resumed=[], versions=dict(torch="2"))
    lines = [dict(step=i, epoch=1, kind="train", loss=1.0 / i, lr=0.1) for i in (1, 2)]
    lines.append(dict(step=2, epoch=1, kind="validation", both=dict(ap50=0.5, per_class=dict(person=dict(ap50=0.5)))))
    kept = {"args.json": record, "metrics.jsonl": lines}
    for other, value in kept.items():
        (run / other).write_text(json.dumps(value) if other == "args.json" else "\n".join(map(json.dumps, value)))
    hunt(run / name, kept[name], lambda path: report([str(run), "--output", str(tmp_path / "page.html")]), count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF"])
def test_pictures(tmp_path, kind, count):
    out = io.BytesIO()
    image = Image.effect_noise((24, 16), 60).convert("RGB")
    try:
        image.save(out, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    hunt(tmp_path / f"one.{kind.lower()}", out.getvalue(), open_image, count)
