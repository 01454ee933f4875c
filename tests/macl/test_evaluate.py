"""`python -m macl.evaluate`: a tiny detector on each data set, detection files, and flags that do not fit."""

import itertools
import json
import math
import os
from types import SimpleNamespace

import pairs
import pytest
import scripts
import torch
from pairs import llvip
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import macl
import train_stage1
import train_stage2
from macl import data, evaluate, predict
from macl.data import SyntheticPairs, moved
from macl.data.annotation import Annotation
from macl.evaluation import detection_metrics, miss_rate_curves, miss_rate_tables, validation_text
from macl.metrics import alignment, miss_rate_curve, read_detections
from trainkit.errors import InputError

ROWS = ["reasonable all", "reasonable day", "reasonable night", "near", "medium", "far", "none", "partial", "heavy"]
ROWS += ["all"]
PUBLISHED = {
    "MBNet": [8.13, 8.28, 7.86, 0.00, 16.07, 55.99, 27.74, 35.43, 59.14, 31.87],
    "MLPD": [7.58, 7.95, 6.95, 0.00, 12.10, 52.79, 25.18, 29.84, 55.05, 29.52],
}
FRAMES = ["set06/V000/I00019", "set09/V000/I00019", "set11/V001/I00039"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt")


def save_checkpoint(path, **changes):
    """An untrained detector of a few thousand weights, in the form of a run's checkpoint."""
    torch.manual_seed(0)
    kwargs = dict(
        backbone="resnet18", norm="group", fpn_channels=8, fpn_levels=3, anchor_sizes=(16, 32, 64), head_width=8,
        aspect_ratios=(2.0,), rpn_pre_nms=(20, 10), rpn_post_nms=(10, 5), macl_hidden=(8,), macl_dim=8,
    )  # fmt: skip
    detector = macl.build_detector(**kwargs | changes)
    torch.save({"model_kwargs": detector.kwargs, "model": detector.state_dict(), "ema": None}, path)
    return path


@pytest.fixture
def kaist(tmp_path):
    """Three frames, the last without people, in a tree whose images are small but not square."""
    root, person = tmp_path / "kaist", ("person", 20, 10, 15, 40, 0)
    for name in ("mine", "test-all-20"):
        pairs.kaist(root, FRAMES, [], name, size=(80, 64))
    for frame in FRAMES[:2]:
        pairs.write(root / "annotations" / f"{frame}.txt", pairs.bbgt(person))
    return root


@pytest.fixture
def annotations(tmp_path):
    """The json of the same frames at KAIST's size."""
    people = dict.fromkeys(FRAMES[:2], [("person", 160, 80, 120, 320, 0)])
    return pairs.write(tmp_path / "test.json", pairs.published(people | {FRAMES[2]: []}, size=(640, 512)))


def run(capsys, *flags, command=evaluate.main):
    """What the command prints."""
    command([*map(str, flags), "--device", "cpu", *["--workers", "0"] * (command is evaluate.main)])
    return capsys.readouterr().out


def refused(capsys, *flags) -> str:
    return scripts.refused(capsys, evaluate.main, *flags, "--device", "cpu", "--workers", 0)


def rows_of(output: str) -> dict[str, list[str]]:
    """The printed miss-rate table: row -> cells."""
    lines = output.splitlines()
    return {row: line[len(row) :].split() for row in ROWS for line in lines if line.startswith(f"{row}  ")}


def test_a_detector_on_kaist(checkpoint, kaist, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("metrics.json", "detections.txt", "curve.png")}
    names = ("--output", "--save-detections", "--plot")
    flags = [part for pair in zip(names, files.values(), strict=True) for part in pair]
    flags += ["--dataset", "kaist", "--data-root", kaist, "--score-threshold", 0]
    output = run(capsys, "--checkpoint", checkpoint, *flags, "--merge", "logit")
    assert "KAIST test-all-20: 3 pairs (1 by day, 2 by night)" in output
    assert all(f"\n{mode}  " in output for mode in ("both", "visible", "infrared"))
    rows = rows_of(output)
    assert list(rows) == ROWS and all(len(cells) == 8 for cells in rows.values())
    assert rows["reasonable day"][-2:] == ["1", "1"] and rows["reasonable night"][-2:] == ["1", "2"]
    assert rows["heavy"][0] == "-"
    metrics = json.loads(files["metrics.json"].read_text())
    assert set(metrics["miss_rate"]) == set(metrics["detection"]) == {"both", "visible", "infrared"}
    assert metrics["miss_rate"]["both"]["reasonable all"]["boxes"] == 2
    names = ("detections", "detections-visible", "detections-infrared")
    both, *alone = (sum(len(frame["scores"]) for frame in read_detections(tmp_path / f"{n}.txt", 3)) for n in names)
    assert min(alone) > 0 and max(alone) < both  # three views merged
    flags[flags.index("--save-detections") + 1] = tmp_path / "one.txt"
    run(capsys, "--checkpoint", checkpoint, *flags)
    assert len((tmp_path / "one.txt").read_text().splitlines()) < both
    assert set(metrics["miss_rate_curves"]["visible"]) == set(ROWS[:3]) and files["curve.png"].stat().st_size > 10_000


def test_what_was_saved_gives_the_same_metrics(checkpoint, kaist, tmp_path, capsys):
    (kaist / "annotations").rename(kaist / "labels")
    common = ["--dataset", "kaist", "--data-root", kaist, "--image-set", "mine", "--annotations", "labels"]
    found = tmp_path / "detections.json"
    flags = ["--modality", "infrared", "--save-detections", found, "--score-threshold", 0]
    output = run(capsys, "--checkpoint", checkpoint, *common, *flags)
    again = run(capsys, "--detections", found, *common)
    assert len(rows_of(output)) == 10 and rows_of(output) == rows_of(again)
    assert not (tmp_path / "detections-infrared.json").exists()


def test_drawn_scenes_have_ten_miss_rates_and_llvip_has_that_of_all(checkpoint, tmp_path, capsys):
    output = run(capsys, "--checkpoint", checkpoint, "--count", 2)
    assert len(rows_of(output)) == 10 and rows_of(output)["reasonable day"][-1] == "0"  # drawn at night
    root = llvip(tmp_path / "L", "person")
    flags = ["--checkpoint", checkpoint, "--dataset", "llvip", "--data-root", root]
    output = run(capsys, *flags, "--misalign", 3, "--output", tmp_path / "b.json")
    assert list(rows_of(output)) == ["all"] and "both,infrared+3px" in output
    assert list(json.loads((tmp_path / "b.json").read_text())["miss_rate"]["both"]) == ["all"]


class SeesShift(torch.nn.Module):
    """Finds the box that its data set marks with a white column, as many pixels off as infrared is."""

    modes = {"both": ("visible", "infrared"), "visible": ("visible",)}
    macl, kwargs, roi_head, merge = None, {"classes": ["person"]}, SimpleNamespace(), "none"

    def extract(self, images):
        return images

    def detect_modes(self, images, modes, *, score_threshold):
        return {mode: self.detect(images[names[-1]]) for mode, names in modes.items()}

    def detect(self, images):
        columns = [float(image[0, 0].argmax()) for image in images]
        label, score = torch.tensor([1]), torch.tensor([0.9])
        return [{"boxes": torch.tensor([[x, 40, x + 20, 100]]), "labels": label, "scores": score} for x in columns]


class Marked(SyntheticPairs):
    """Infrared lies `off` pixels further right."""

    def __init__(self, off=0):
        super().__init__(3, 0)
        self.off = off

    def __getitem__(self, index):
        image, zero = torch.zeros(3, 128, 160, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        image[..., 50] = 255
        pair = moved({"visible": image, "infrared": image}, (self.off, 0))
        boxes = torch.tensor([[50.0, 40, 70, 100]])
        truth = Annotation("", (160, 128), [], boxes, zero + 1, zero > 0, occlusion=zero)
        return self.sample(index, pair, truth) | {"daytime": True}


def test_what_is_moved_is_seen_moved_and_the_boxes_are_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "read_checkpoint", lambda path: {})
    monkeypatch.setattr(evaluate, "load_detector", lambda path, **options: SeesShift())
    monkeypatch.setattr(evaluate, "open_dataset", lambda *arguments: Marked())
    flags = ["--checkpoint", "a.pt", "--output", tmp_path / "a.json"]
    output = run(capsys, *flags, "--misalign", 3, 15, "--register-most", 15, 2)
    metrics = json.loads((tmp_path / "a.json").read_text())
    modes = ["both", "visible", "both,infrared+3px", "both,infrared+15px", "both,infrared+15px,corrected"]
    assert [metrics["detection"][mode]["ap50"] for mode in modes] == [1, 1, 1, 0, 1]
    rates = [round(metrics["miss_rate"][mode]["reasonable all"]["miss_rate"], 2) for mode in modes]
    assert rates == [0, 0, 0, 100, 0] and rows_of(output)["reasonable all"][8] == "100.00"


@pytest.mark.parametrize(("register", "ap50"), [("none", 0), ("rig", 1), ("each", 1)])
def test_infrared_that_lies_elsewhere_is_registered(tmp_path, capsys, monkeypatch, register, ap50):
    monkeypatch.setattr(evaluate, "read_checkpoint", lambda path: {"register": "rig 4 2"})
    monkeypatch.setattr(evaluate, "load_detector", lambda path, **options: SeesShift())
    monkeypatch.setattr(evaluate, "open_dataset", lambda *arguments: Marked(13))
    flags = ["--checkpoint", "a.pt", "--output", tmp_path / "a.json", "--register", register]
    output = run(capsys, *flags, "--register-most", 14, 0)
    assert json.loads((tmp_path / "a.json").read_text())["detection"]["both"]["ap50"] == ap50
    assert "trained with --register 'rig 4 2'" in output
    assert ("the shift (13, 0)" in output and "100% of the pairs" in output) == (register == "rig")


PERSON, CYCLIST, NOTHING = [100, 100, 140, 200], [300, 100, 340, 200], [400, 100, 440, 200]


def results(found, truth, size=(512, 640)):
    """One frame, as predict gives it."""
    boxes, occlusion = torch.tensor(truth, dtype=torch.float32).reshape(-1, 4), torch.zeros(len(truth)).long()
    truth = {"boxes": boxes, "labels": torch.ones_like(occlusion), "occlusion": occlusion, "daytime": True}
    truth["ignore"] = torch.zeros(len(boxes), dtype=torch.bool)
    found = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
    found = {"boxes": found, "labels": torch.ones(len(found)).long(), "scores": torch.linspace(0.9, 0.1, len(found))}
    return {"size": size, "classes": ["person"], "detections": {"both": found}, "ground_truth": truth}


def rates(frame):
    return {row: values["miss_rate"] for row, values in miss_rate_tables([frame])["both"].items()}


def test_images_of_another_size_are_stretched_to_kaists():
    box = [25, 25, 35, 50]  # 100 pixels tall when the image's 128 rows become 512, and then within the border
    metrics = rates(results([box], [box], size=(128, 320)))
    assert list(metrics) == ROWS and metrics["reasonable night"] is metrics["far"] is metrics["near"] is None
    assert metrics["reasonable all"] == pytest.approx(0, abs=1e-6)
    metrics = rates(results([box], [box]))
    assert metrics["reasonable all"] is None and metrics["far"] == pytest.approx(0, abs=1e-6)


def test_classes_but_person_are_ignored():
    frame = results([NOTHING, PERSON], [PERSON, CYCLIST])
    frame["ground_truth"]["labels"][1] = frame["detections"]["both"]["labels"][0] = 2
    assert rates(frame)["reasonable all"] == pytest.approx(0, abs=1e-6)
    frame["detections"]["both"]["labels"][0] = 1
    assert rates(frame)["reasonable all"] > 1


def test_average_precision_of_each_class():
    frame = results([PERSON], [PERSON, CYCLIST]) | {"classes": ["person", "cyclist", "car"]}
    frame["ground_truth"]["labels"][1] = 2
    metrics = detection_metrics([frame])
    own = {name: values["ap50"] for name, values in metrics["both"]["per_class"].items()}
    assert own == {"person": pytest.approx(1), "cyclist": 0, "car": None}
    rows = [line.split()[:2] for line in validation_text(metrics | {"alignment": None}).splitlines()]
    assert rows[2:] == [["both", "50.0"], ["person", "100.0"], ["cyclist", "0.0"], ["car", "-"]]
    assert "per_class" not in detection_metrics([frame | {"classes": ["person"]}])["both"]


def test_embeddings_that_all_are_alike_are_said_to_have_collapsed():
    rows, both = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), {"both": {"ap50": 0.5}}
    agreements = [alignment(one, one) | {"r1_seen_in_one": None} for one in (rows, rows + 9)]
    assert ["collapsed" in validation_text(both | {"alignment": one}) for one in agreements] == [False, True]


def test_average_precision_of_those_seen_in_one_modality():
    frame = results([PERSON, CYCLIST], [PERSON, CYCLIST, NOTHING])
    frame["ground_truth"]["visible_in"] = torch.tensor([[True, True], [True, False], [False, True]])
    metrics = detection_metrics([frame])["both"]
    seen = {name: metrics[f"ap50_seen_in_{name}"] for name in ("both", "visible_only", "infrared_only")}
    assert seen == {"both": pytest.approx(1), "visible_only": pytest.approx(1), "infrared_only": 0}  # no false alarms
    del frame["ground_truth"]["visible_in"]
    assert set(detection_metrics([frame])["both"]) == {"ap50", "ap75", "ap", "recall"}


def test_the_miss_rate_of_all_where_daytime_or_occlusion_is_not_known():
    for key in ("daytime", "occlusion"):
        frame = results([PERSON], [PERSON])
        del frame["ground_truth"][key]
        rows = miss_rate_tables([frame])["both"]
        assert list(rows) == ["all"] == list(miss_rate_curves([frame])["both"])
        assert rows["all"]["miss_rate"] == pytest.approx(0, abs=1e-6) and rows["all"]["boxes"] == 1
        assert miss_rate_tables([frame | {"classes": ["car"]}]) == {} == miss_rate_curves([frame | {"classes": []}])


def test_a_curve_keeps_the_points_that_count():
    frame = results([PERSON, NOTHING, NOTHING, CYCLIST, NOTHING], [PERSON, CYCLIST])  # by falling score
    curve = miss_rate_curves([frame])["both"]["reasonable all"]
    assert curve["fppi"] == [0, 2, 3] and curve["miss_rate"] == [50, 0, 0]
    whole = miss_rate_curve([frame["detections"]["both"]], [frame["ground_truth"]])
    assert curve["log_average_miss_rate"] == whole["log_average_miss_rate"] and len(whole["fppi"]) == 5


def test_image_ids_of_a_json_from_0_or_1(annotations, tmp_path, capsys):
    # In the second frame by ids from 1, in the third, where nobody is, by ids from 0.
    found = tmp_path / "detections.json"
    found.write_text(json.dumps([{"image_id": 2, "category_id": 1, "bbox": [160, 80, 120, 320], "score": 0.9}]))
    for flags, recall in (([], "100.00"), (["--first-id", 0], "0.00"), (["--first-id", 1], "100.00")):
        output = run(capsys, "--dataset", "kaist", "--detections", found, "--annotations", annotations, *flags)
        assert rows_of(output)["reasonable night"][1] == recall
        assert ("--first-id settles it" in output) == (not flags)
    for image_id in (0, 3):
        found.write_text(json.dumps([{"image_id": image_id, "bbox": [1, 1, 5, 5], "score": 0.9}]))
        assert "settles" not in run(capsys, "--dataset", "kaist", "--detections", found, "--annotations", annotations)


def test_whatever_category_a_file_of_others_gives_is_a_person(annotations, tmp_path, capsys):
    found = tmp_path / "detections.json"
    box = {"category_id": 7, "bbox": [160, 80, 120, 320], "score": 0.9}
    found.write_text(json.dumps([{"image_id": 1, **box}, {"image_id": 2, **box}]))
    flags = ["--dataset", "kaist", "--detections", found, "--annotations", annotations]
    output = run(capsys, *flags)
    assert rows_of(output)["reasonable all"][:2] == ["0.00", "100.00"] and "detections of" in output
    assert "of the best 1000 detections" in output and "best 7 d" in run(capsys, *flags, "--max-detections", 7)
    found.write_text(json.dumps([{"image_id": 1, **box}, {"image_id": 2, **box, "category_id": 2}]))
    assert "detections.json holds the categories [2, 7]" in refused(capsys, *flags)


def test_whose_boxes_of_kaist_are_scored_is_as_in_training(checkpoint, kaist, tmp_path, capsys):
    for frame, camera in itertools.product(FRAMES, ("visible", "lwir")):
        pairs.write(
            kaist / "paired" / f"{frame.replace('/I', f'/{camera}/I')}.txt", pairs.bbgt(("person", 9, 9, 9, 9, 0))
        )
    trained = torch.load(checkpoint) | {
        "reading": dict(boxes="infrared", infrared_to_visible=[[2]], infrared_range=None)
    }
    torch.save(trained, tmp_path / "best.pt")
    flags = ("--checkpoint", tmp_path / "best.pt", "--data-root", kaist, "--annotations", "paired")
    assert "as in training: --boxes 'infrared'\n" in run(capsys, *flags)


MODEL, OTHERS = "--checkpoint a.pt", "--detections a.txt --dataset kaist"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "either --checkpoint PATH or --detections FILE"),
        (f"{MODEL} --dataset kaist", "--dataset kaist needs --data-root"),
        (f"{MODEL} --data-root x --dataset synthetic", "need --dataset pairs or kaist"),
        (f"{MODEL} --image-set test", "--image-set needs --dataset kaist"),
        (f"{MODEL} --dataset kaist --data-root x --split test", "--split needs --dataset pairs"),
        ("--detections a.txt", "--detections needs --dataset kaist"),
        (OTHERS, "needs --data-root, or --detections and --annotations FILE.json"),
        (f"{OTHERS} --annotations folder", "folder does not exist; expected the json of KAIST's annotations"),
        (f"{OTHERS} --data-root x --misalign 2", "--misalign and --register need --checkpoint"),
        (f"{MODEL} --misalign much", "invalid int value: 'much'"),
        (f"{MODEL} --save-detections a.csv", "ends in .txt or .json"),
        (f"{MODEL} --plot missing/a.png", "missing/a.png: the folder missing does not exist"),
        (f"{MODEL} --boxes both", "--boxes needs --data-root"),
    ],
)
def test_flags_that_do_not_fit(capsys, flags, words):
    assert words in refused(capsys, *flags.split())


def test_a_plot_needs_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    assert "pip install -e '.[viz]'" in refused(capsys, *MODEL.split(), "--plot", "a.png")


def test_what_does_not_fit_the_files_is_named(checkpoint, kaist, annotations, tmp_path, capsys):
    common = ["--dataset", "kaist", "--detections", tmp_path / "detections.txt", "--annotations", annotations]
    assert "detections.txt does not exist" in refused(capsys, *common)
    model = ["--checkpoint", checkpoint, "--dataset", "kaist", "--data-root", kaist, "--modality", "infrared"]
    assert "not with infrared alone" in refused(capsys, *model, "--misalign", 3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_detections_from_the_command_line(shared, tmp_path, capsys, name):
    folder = shared / "data/kaist/eval"
    file = folder / "results" / f"{name}_result.txt"
    flags = ["--annotations", folder / "gt/kaist_annotations_test20.json", "--output", tmp_path / "metrics.json"]
    output = run(capsys, "--dataset", "kaist", "--detections", file, *flags, "--miss-rate-script")
    assert [rows_of(output)[row][0] for row in ROWS] == [f"{value:.2f}" for value in PUBLISHED[name]]
    script = {"MLPD": "all 7.58, day 7.96, night 6.95", "MBNet": "all 8.13, day 8.28, night 7.86"}[name]
    assert f"reasonable by the Python script in use, %, {file.stem}: {script}" in output  # as MLPD's script computes
    rows = json.loads((tmp_path / "metrics.json").read_text())["miss_rate"][file.stem]
    assert [round(rows[row]["miss_rate"], 2) for row in ROWS] == PUBLISHED[name]


def test_data_is_opened_with_the_classes_of_the_checkpoint(kaist, tmp_path, capsys):
    two = save_checkpoint(tmp_path / "two.pt", classes=["car", "person"])
    other = save_checkpoint(tmp_path / "other.pt", classes=["car"])
    root, bikes = llvip(tmp_path / "L", "person", "car"), llvip(tmp_path / "bikes", "Person", "bike")
    flags = ["--checkpoint", two, "--modality", "both"]
    for name, place, has_cars in (("llvip", root, True), ("kaist", kaist, False), ("synthetic", None, False)):
        data = ["--dataset", name] + (["--data-root", place] if place else [])
        output = run(capsys, *flags, *data, "--count", 2, "--output", tmp_path / "a.json")
        own = json.loads((tmp_path / "a.json").read_text())["detection"]["both"]["per_class"]
        assert own["person"]["ap50"] is not None and (own["car"]["ap50"] is not None) == has_cars
        if not has_cars:
            assert rows_of(output)["reasonable all"][2] != "0"
            assert "named person; the classes are 'car'" in refused(capsys, "--checkpoint", other, *data)
    assert "lines know no class" in refused(capsys, *flags, "--count", 2, "--save-detections", tmp_path / "a.txt")
    output = refused(capsys, *flags, "--dataset", "llvip", "--data-root", bikes)
    assert "'car' or 'person'" in output and "'Person' 1, 'bike' 1" in output


class Knows(SeesShift):
    """Finds what the label files of its own data set say, with labels of its own order of classes."""

    def __init__(self, data, classes):
        super().__init__()
        self.kwargs, self.left = {"classes": classes}, [[data[i] for i in range(len(data))] for _ in self.modes]

    def detect(self, images):
        found = [self.left[0].pop(0) for _ in images]
        self.left.append(self.left.pop(0))
        return [
            {key: one[key] for key in ("boxes", "labels")} | {"scores": torch.ones(len(one["labels"]))} for one in found
        ]


def test_pairs_of_any_layout_by_name(tmp_path, capsys, monkeypatch):
    """The detector's order of classes is not the data's; the truth has an AP of 1 for each."""
    for name in "ab":
        for folder, size in (("images", (80, 64)), ("images_ir", (40, 32))):
            pairs.write(tmp_path / "d" / folder / f"{name}.bmp", (9, 9, 9), size)
        pairs.write(tmp_path / "d/labels" / f"{name}.txt", "0 0.3 0.5 0.2 0.5\n1 0.7 0.5 0.2 0.5\n")
    pairs.write(tmp_path / "d/data.yaml", "names: [person, car]")
    classes, flags = ["car", "bike", "person"], ["--infrared-to-visible", "resize"]
    truth = data.open_root(tmp_path / "d", "all", classes=classes).with_onto(data.read_onto("resize"))
    monkeypatch.setattr(evaluate, "read_checkpoint", lambda path: {})
    monkeypatch.setattr(evaluate, "load_detector", lambda path, **options: Knows(truth, classes))
    places = [["--data-root", tmp_path]]
    places += [
        ["--visible", tmp_path / "d/images", "--infrared", tmp_path / "d/images_ir", "--labels", tmp_path / "d/labels"]
    ]
    for place in places:
        output = run(capsys, "--checkpoint", "a.pt", *place, *flags, "--output", tmp_path / "a.json")
        own = json.loads((tmp_path / "a.json").read_text())["detection"]["both"]["per_class"]
        assert [own[name]["ap50"] for name in classes] == [pytest.approx(1), None, pytest.approx(1)]
        assert "see --split held-out" in output and "  car  " in output
    assert "1 of them held out" in run(capsys, "--checkpoint", "a.pt", *place, *flags, "--split", "held-out")
    assert "infrared-to-visible resize" in refused(capsys, "--checkpoint", "a.pt", *places[0])
    assert "--split test: the data have none" in refused(capsys, "--checkpoint", "a.pt", *place, "--split", "test")


def test_saved_detections_bear_the_ids_of_the_json(tmp_path, capsys, monkeypatch):
    """So that COCO's own evaluation takes them beside that json."""
    for folder, name in itertools.product(("v", "i"), "ab"):
        pairs.write(tmp_path / folder / f"{name}.png", (9, 9, 9), (80, 64))
    images = [dict(id=70 - i, file_name=f"{name}.png", width=80, height=64) for i, name in enumerate("ab")]
    rows = [dict(id=10 + i, image_id=image, category_id=kind, bbox=[10 * i, 8, 9, 20], area=180, iscrowd=0)
            for i, (image, kind) in enumerate([(70, 31), (69, 31), (69, 7)])]  # fmt: skip
    kinds = [dict(id=31, name="person"), dict(id=7, name="car")]
    labels = pairs.write(tmp_path / "l.json", dict(images=images, annotations=rows, categories=kinds))
    classes, places = ["bike", "car", "person"], [tmp_path / "v", tmp_path / "i", labels]
    monkeypatch.setattr(evaluate, "read_checkpoint", lambda path: {})
    monkeypatch.setattr(
        evaluate, "load_detector", lambda *_, **__: Knows(data.Pairs(*places, classes=classes), classes)
    )
    flags = [item for pair in zip(("--visible", "--infrared", "--labels"), places, strict=True) for item in pair]
    run(capsys, "--checkpoint", "a.pt", *flags, "--save-detections", tmp_path / "d.json")
    truth = COCO(str(labels))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "d.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_prediction_pairs_a_folder_by_suffixes_and_resizes(checkpoint, tmp_path, capsys):
    for name, size in (("a_v", (80, 64)), ("a_i", (40, 32))):
        pairs.write(tmp_path / "in" / f"{name}.png", (9, 9, 9), size)
    flags = [
        "--checkpoint",
        checkpoint,
        "--visible",
        tmp_path / "in",
        "--infrared",
        tmp_path / "in",
        "--output",
        tmp_path / "o",
    ]
    flags += ["--suffixes", "_v", "_i"]
    assert "--infrared-to-visible" in scripts.refused(capsys, predict.main, *flags, "--device", "cpu")
    assert "wrote 1 picture" in run(capsys, *flags, "--infrared-to-visible", "resize", command=predict.main)
    assert (tmp_path / "o/a_v.png").is_file()


def test_scripts_train_on_no_class_that_nobody_has(kaist, tmp_path):
    root, bikes = llvip(tmp_path / "L", "person", "car"), llvip(tmp_path / "bikes", "Person")
    stage1, stage2 = train_stage1.parse_arguments, train_stage2.parse_arguments
    for flags in (
        ["--data-root", bikes, "--classes", "person"],
        ["--data-root", root, "--classes", "person", "bike"],
        ["--classes", "car"],
    ):
        with pytest.raises(InputError, match="'Person' 1|'person' 1, 'car' 1|named person"):
            train_stage1.open_data(stage1([*map(str, flags)]))
    train_stage1.open_data(stage1(["--data-root", str(root), "--classes", "car", "person"]))
    kaist_flags = ["--data-root", kaist, "--image-set", "mine", "--val-image-set", "mine", "--min-height", 1]
    args = stage2([*map(str, kaist_flags), "--llvip-root", str(root)])
    train, validation, old, _, output = train_stage2.open_data(args, ["car", "person"])
    assert all(data.classes == ("car", "person") for data in (*train.datasets, validation, old))
    assert any("car may be unlearnt" in line for line in output)
    with pytest.raises(InputError, match="named person"):
        train_stage2.open_data(args, ["car"])
    with pytest.raises(InputError, match="'Person' 1"):
        train_stage2.open_data(stage2([*map(str, kaist_flags), "--llvip-root", str(bikes)]), ["person"])
    drawn = train_stage2.open_data(stage2([]), ["car", "person"])[0]
    assert [part[0]["labels"].unique().tolist() for part in drawn.datasets] == [[2], [2]]


def test_which_scenes_are_drawn(checkpoint, tmp_path, capsys):
    stage2 = tmp_path / "last.pt"
    torch.save(torch.load(checkpoint, weights_only=True) | {"script": "stage2"}, stage2)
    choose = ["--domain", "day-and-night"], ["--domain", "night"]
    cases = (checkpoint, [], False), (checkpoint, choose[0], True), (stage2, [], True), (stage2, choose[1], False)
    for path, flags, by_day in cases:
        output = run(capsys, "--checkpoint", path, "--count", 2, "--modality", "both", *flags)
        assert ("of them by day" in output) == by_day


def test_weights_and_limits_reach_the_detector(checkpoint, tmp_path, capsys):
    held = torch.load(checkpoint, weights_only=True)
    held["ema"] = held["model"] | {"roi_head.cls_score.bias": torch.tensor([20.0, -20.0])}  # finds nothing
    torch.save(held, tmp_path / "last.pt")
    flags, file = ["--checkpoint", tmp_path / "last.pt"], tmp_path / "a.txt"

    def count(*more):
        run(capsys, *flags, "--count", 2, "--modality", "both", "--save-detections", file, *more)
        return len(file.read_text().splitlines())

    assert count() == 0 < count("--score-threshold", 0)
    assert count("--weights", "raw") > 2 == count("--weights", "raw", "--max-detections", 1)
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    for score, some in ((0, True), (1, False)):
        own = ["--visible", tmp_path / "a.png", "--output", tmp_path / "out", "--weights", "raw", "--min-score", score]
        assert ("a: 0 found" not in run(capsys, *flags, *own, command=predict.main)) == some


@pytest.mark.parametrize("part", ["backbone.conv1.weight", "rpn.head.bbox_pred.bias", "roi_head.cls_score.weight"])
def test_what_is_not_finite_stops_evaluation_and_prediction(checkpoint, tmp_path, part):
    detector, held = macl.load_detector(checkpoint), torch.load(checkpoint, weights_only=True)
    detector.get_parameter(part).data.view(-1)[-1] = math.nan
    with pytest.raises(InputError, match="(region proposals|scores and boxes) are not finite"):
        detector(visible=[torch.rand(3, 64, 64)])
    held["model"][part].view(-1)[-1] = math.nan
    torch.save(held, tmp_path / "bad.pt")
    own = ["--visible", tmp_path / "a.png", "--output", tmp_path / "out"]
    for module, flags in ((evaluate, ["--count", 2, "--workers", 0]), (predict, own)):
        with pytest.raises(InputError, match=r"bad\.pt.* not finite"):
            module.main([*map(str, ["--checkpoint", tmp_path / "bad.pt", *flags])])


@pytest.mark.parametrize("size", [(2000, 3), (3, 2000), (1, 1)])
def test_prediction_in_pictures_that_are_all_but_a_line(tmp_path, capsys, size):
    path = save_checkpoint(tmp_path / "small.pt", min_size=96, max_size=96)
    Image.new("RGB", size, (9, 99, 200)).save(tmp_path / "a.png")
    flags = ["--checkpoint", path, "--visible", tmp_path / "a.png", "--output", tmp_path / "out"]
    run(capsys, *flags, command=predict.main)
    assert max(Image.open(tmp_path / "out/a.png").size) < 9000
    assert len(json.loads((tmp_path / "out/detections.json").read_text())) == 1


def test_prediction_names_pictures_as_they_are_named(checkpoint, tmp_path, capsys):
    folder, name = tmp_path / "in", os.fsdecode(b"a\nb" + "行人".encode("gbk"))
    folder.mkdir()
    Image.new("RGB", (80, 64)).save(folder / "x.png")
    (folder / "x.png").rename(folder / f"{name}.png")
    (folder / f"._{name}.png").write_bytes(b"\0\5\26\7")
    flags = ["--checkpoint", checkpoint, "--infrared", folder, "--output", tmp_path / "out"]
    output = run(capsys, *flags, command=predict.main)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.png", "detections.json"}
    assert json.loads((tmp_path / "out/detections.json").read_text())[0]["image"] == str(folder / f"{name}.png")
    assert output.startswith("a\\nb\\udcd0") and "wrote 1 picture and detections.json" in output


def test_the_worst_frames_of_a_run(checkpoint, kaist, tmp_path, capsys):
    output = run(
        capsys, "--checkpoint", checkpoint, "--count", 3, "--worst", 2, tmp_path / "worst", "--modality", "both"
    )
    assert f"{tmp_path / 'worst' / 'worst.html'}: 2 pictures" in output
    page = (tmp_path / "worst/worst.html").read_text()
    assert "detecting with both" in page and "seen in infrared only" in page and "1. synthetic/20000/" in page
    detections = pairs.write(tmp_path / "d.json", [dict(image_id=1, bbox=[0, 0, 9, 9], score=0.9)])
    flags = ["--dataset", "kaist", "--detections", detections, "--worst", 9, tmp_path / "worst"]
    assert "3 pictures" not in (said := run(capsys, *flags, "--data-root", kaist)) and "2 pictures" in said
    for flags, expected in (
        (["--detections", detections, "--dataset", "kaist", "--annotations", "a.json"], "it needs --data-root"),
        (["--checkpoint", checkpoint, "--worst", "x", "b"], "--worst N: expected a whole number from 1"),
    ):
        assert expected in refused(capsys, "--worst", 3, tmp_path, *flags)
