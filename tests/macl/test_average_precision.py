"""Average precision: worked by hand, and the ways nothing can be measured; through both packages that compute it."""

import sys

import pytest
from pairs import found, truth

from macl.metrics import average_precision

A, B, FAR = [10, 10, 50, 110], [200, 10, 240, 110], [400, 200, 440, 300]


@pytest.fixture(params=["pycocotools", "faster_coco_eval"], autouse=True)
def package(request, monkeypatch):
    pytest.importorskip(request.param)
    found = request.param if request.param == "faster_coco_eval" else None
    monkeypatch.setattr(sys.modules["macl.metrics.average_precision"], "find_spec", lambda _: found)


def test_perfect_and_printing_nothing(capfd):
    result = average_precision([found(A, B), found()], [truth(A, B), truth()])
    assert [result[key] for key in ("ap", "ap50", "ap75", "recall")] == pytest.approx([1, 1, 1, 1])
    assert capfd.readouterr().out == ""


def test_worked_by_hand():
    # Hit, false alarm, hit: precision 1 up to recall 0.5, then 2/3; 51 of COCO's 101 recall points lie in the first.
    frames = [truth(A), truth(B)]
    result = average_precision([found(A, scores=[0.9]), found(FAR, B, scores=[0.8, 0.7])], frames)
    assert result["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result["recall"] == 1
    detections, frames = [found(FAR, A)], [truth(A)]
    assert average_precision(detections, frames)["ap50"] == pytest.approx(0.5)
    assert average_precision(detections, frames, max_detections=1)["ap50"] == 0


def test_a_loose_box_counts_up_to_its_overlap():
    loose = [10, 10, 50, 135]  # IoU 0.8 with A: seven of the ten thresholds
    result = average_precision([found(loose)], [truth(A)])
    assert result["ap50"] == result["ap75"] == pytest.approx(1)
    assert result["ap"] == result["recall"] == pytest.approx(0.7)
    looser = [10, 10, 50, 149]  # IoU 0.72: five of them
    result = average_precision([found(looser)], [truth(A)])
    assert (result["ap"], result["ap50"], result["ap75"]) == pytest.approx((0.5, 1, 0))


def test_ignored_boxes_are_neither_hits_nor_alarms():
    frames = [truth(A, [190, 0, 400, 400], ignore=[1])]
    on_ignored = [B, [210, 120, 250, 220], [300, 100, 340, 200]]
    result = average_precision([found(*on_ignored, A)], frames)
    assert result["ap"] == pytest.approx(1)
    without = average_precision([found(*on_ignored, A)], [truth(A)])
    assert without["ap"] == pytest.approx(0.25)


def test_classes_are_averaged_and_one_of_ignored_boxes_only_is_none():
    result = average_precision([found(A, B, labels=[1, 1])], [truth(A, B, FAR, labels=[1, 2, 3], ignore=[2])])
    assert result["ap50"] == pytest.approx(0.5)
    assert result["per_class"][1]["ap50"] == pytest.approx(1)
    assert result["per_class"][2] == {"ap": 0, "ap50": 0, "ap75": 0, "recall": 0, "boxes": 1}
    assert result["per_class"][3] == {"ap": None, "ap50": None, "ap75": None, "recall": None, "boxes": 0}


@pytest.mark.parametrize("frames", [[], [truth()], [truth(A, ignore=[0])]])
def test_without_a_real_box_there_is_no_number(frames):
    result = average_precision([found(A)] * len(frames), frames)
    assert [result[key] for key in ("ap", "ap50", "ap75", "recall")] == [None] * 4


def test_wrong_arguments():
    with pytest.raises(ValueError, match="0 frames of detections for 1"):
        average_precision([], [truth(A)])
    with pytest.raises(ValueError, match="frame 1 has boxes that are not finite"):
        average_precision([found(), found([0, 0, 1, float("inf")])], [truth(A), truth()])
