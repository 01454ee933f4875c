"""`--worst`: what counts as missed, false and found, in which order the frames come, and the page."""

import re

import numpy as np
import pytest
import torch
from pairs import found, truth
from PIL import Image

from macl.failures import COLOURS, RECALLS, Judged, found_table, kinds, write_failures
from macl.metrics import average_precision, matches

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
A, B, FAR, CROWD = [10, 10, 50, 110], [200, 10, 240, 110], [400, 200, 440, 300], [100, 200, 300, 380]
FRAMES = [  # found well; missed, by a score too low; missed for good; on an ignored box; and two false alarms
    (found(A, FAR, scores=[0.9, 0.6]), truth(A)),
    (found(A, B, scores=[0.95, 0.2]), truth(A, B, daytime=False)),
    (found(FAR, B, scores=[0.7, 0.8]), truth(A, B, occlusion=[2, 0])),
    (found(A, [110, 210, 150, 300], scores=[0.85, 0.99]), truth(A, CROWD, ignore=[1], daytime=False)),
]


def results(frames=FRAMES, classes=("person",), mode="both"):
    return [
        {"size": (400, 500), "classes": classes, "detections": {mode: outputs}, "ground_truth": target}
        for outputs, target in frames
    ]


def test_matches_are_those_of_the_average_precision():
    metrics = matches(*zip(*FRAMES, strict=True))
    assert metrics["hits"].tolist() == [1, 0, 1, 1, 0, 1, 1, -1]
    assert metrics["found"].tolist() == pytest.approx([0.9, 0.95, 0.2, 0, 0.8, 0.85, 0.99])
    precision, scores = metrics["curves"][1]
    ap50 = average_precision(*zip(*FRAMES, strict=True))["ap50"]
    assert np.nan_to_num(precision).mean() == pytest.approx(ap50)
    assert scores[1] == pytest.approx(0.95) and np.nanmin(scores) == pytest.approx(0.2) and np.isnan(scores[-1])
    few = matches(*zip(*FRAMES, strict=True), max_detections=1)
    assert few["hits"].tolist() == [1, -1, 1, -1, -1, 1, -1, -1] and few["found"].tolist() == pytest.approx(
        [0.9, 0.95, 0, 0, 0.8, 0, 0.99]
    )


def test_a_class_without_a_true_box_is_all_false_alarms():
    metrics = matches([found(A, B, labels=[1, 2], scores=[0.9, 0.8])], [truth(A, B)])
    assert metrics["hits"].tolist() == [1, 0] and list(metrics["curves"]) == [1]
    judged = Judged(results([(found(A, B, labels=[1, 2]), truth(A, B))], ("person", "car")), "both", 100)
    assert judged.false.tolist() == [True, False] and [row[2] for row in judged.detections] == [2, 1]
    silent = Judged(results([(found(), truth(A)), (found(), truth())]), "both", 100)
    assert silent.missed.tolist() == [True] and silent.errors(2).tolist() == [1, 0]


def test_the_worst_frames_come_first():
    """At the best F1 four of six are found, and both false alarms score below them."""
    judged = Judged(results(), "both", 100)
    assert judged.thresholds[1] == pytest.approx(0.8)
    assert judged.missed.tolist() == [False, False, True, True, False, False, False]
    assert judged.errors(4).tolist() == pytest.approx([0, 0.8, 1, 0])
    drawn = {frame: [(mark.kind, mark.text) for mark in judged.marks(frame, ["person"])] for frame in range(4)}
    assert drawn[1] == [("missed", "0.20"), ("found", "person 0.95")]
    assert drawn[2] == [("missed", ""), ("found", "person 0.80")]
    assert drawn[3] == [("ignored", ""), ("found", "person 0.85")]
    lower = [*FRAMES, (found(B, scores=[0.97]), truth())]
    assert Judged(results(lower), "both", 100).errors(5).tolist() == pytest.approx([0, 0.8, 1, 0, 0.97])


def test_kinds_and_the_table():
    truths = [target for _, target in FRAMES]
    named = kinds([target | {"visible_in": torch.ones(len(target["boxes"]), 2).bool()} for target in truths])
    assert {name: int(rows.sum()) for name, rows in named.items()} == {
        "all": 7, "up to 100 pixels high": 6, "100 to 100 pixels high": 0, "more than 100 pixels high": 1,
        "not occluded": 6, "partly occluded": 0, "heavily occluded": 1, "by day": 3, "by night": 4, "seen in both": 7,
        "seen in visible only": 0, "seen in infrared only": 0,
    }  # fmt: skip
    page = found_table({"both": Judged(results(), "both", 100)}, truths, ["person"])
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>\d+</td><td>([^<]*)</td></tr>", page))
    expected = {"all": "66.7 %", "up to 100 pixels high": "66.7 %", "not occluded": "80.0 %"}
    assert rows == expected | {"heavily occluded": "0.0 %", "by day": "66.7 %", "by night": "66.7 %"}
    assert "<td>false alarms per frame</td><td></td><td>0.00</td>" in page and "<td>0.800</td>" in page


def test_the_page_escapes_and_needs_no_network(tmp_path):
    grey = torch.full((3, 400, 500), 90, dtype=torch.uint8)
    data = [{"visible": grey, "infrared": grey, "path": f"<i>{index}</i>"} for index in range(4)]
    count = write_failures(tmp_path / "a" / "b", results(classes=("<b>x",)), data, 24, 100, "from <data>")
    page = (tmp_path / "a/b/worst.html").read_text()
    assert count == 2 and page.count("data:image/jpeg") == 2 and "default-src 'none'" in page
    assert "<i>" not in page and "<b>" not in page and "<data>" not in page and "://" not in page
    assert page.index("1. &lt;i&gt;2") < page.index("2. &lt;i&gt;1") and "1 missed, 0 false" in page
    picture = np.asarray(Image.open(tmp_path / "a/b/worst-001.png"))
    for panel in (picture[:400, :500], picture[:400, 504:1004]):
        assert (panel[60, 10] == COLOURS["missed"]).all() and (panel[60, 200] == COLOURS["found"]).all()
    assert len(RECALLS) == 101 and page.count("<svg") == 1
