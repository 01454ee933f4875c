"""The log-average miss rate: worked by hand, and on published detection files."""

import itertools
import math
import time

import pytest
from pairs import found, truth

from macl.data import read_ground_truth
from macl.metrics import miss_rate_by_script, miss_rate_curve, miss_rate_table, read_detections
from macl.metrics.miss_rate import MAX_DETECTIONS

PERSON = (100, 100, 140, 200)  # 40 x 100 pixels


def shifted(box, x, y=0):
    return (box[0] + x, box[1] + y, box[2] + x, box[3] + y)


def counts(detections, ground_truth, **arguments):
    """(true positives, false positives, real boxes)."""
    curve = miss_rate_curve(detections, ground_truth, **arguments)
    hits = round(curve["recall"] / 100 * curve["boxes"])
    return hits, round(curve["fppi"][-1] * curve["frames"]) if len(curve["fppi"]) else 0, curve["boxes"]


def log_average_miss_rate(*arguments, **more):
    return miss_rate_curve(*arguments, **more)["log_average_miss_rate"]


def test_a_perfect_detector_misses_nothing_and_no_detector_misses_all():
    frames = [truth(PERSON), truth()]
    assert log_average_miss_rate([found(PERSON), found()], frames) == pytest.approx(100 * 1e-10)
    assert log_average_miss_rate([found(), found()], frames) == 100
    assert counts([found((120, 150, 120, 150), PERSON)], [truth(PERSON)]) == (1, 1, 1)  # one box without area


def test_the_average_worked_by_hand():
    # Two frames, two people. By score: hit, false alarm, hit. Half of the people are found at 0 false positives per
    # image, all at 0.5: the eight reference points up to 10^-0.25 = 0.562 ...
    frames = [truth(PERSON), truth(PERSON)]
    detections = [found(shifted(PERSON, 300), PERSON, scores=[0.8, 0.7]), found(PERSON, scores=[0.9])]
    # ... so 7 points below 0.5 read a miss rate of 0.5; 0.562 and 1 read 0, held at 1e-10.
    expected = 100 * math.exp((7 * math.log(0.5) + 2 * math.log(1e-10)) / 9)
    assert log_average_miss_rate(detections, frames) == pytest.approx(expected)
    curve = miss_rate_curve(detections, frames)
    assert log_average_miss_rate([found(shifted(PERSON, 300), PERSON)], [truth(PERSON)]) == pytest.approx(
        100 * 1e-10 ** (1 / 9)  # at exactly 1 false positive per image
    )
    assert curve["fppi"].tolist() == [0, 0.5, 0.5] and curve["miss_rate"].tolist() == [50, 50, 0]


def test_half_of_a_box_is_enough_and_less_is_not():
    wide = (100, 100, 200, 200)
    assert counts([found((100, 100, 200, 300))], [truth(wide)]) == (1, 0, 1)
    assert counts([found((100, 100, 200, 301))], [truth(wide)]) == (0, 1, 1)
    assert counts([found((150, 100, 250, 200))], [truth(wide, (400, 100, 440, 200), ignore=[0])]) == (0, 0, 1)
    assert counts([found((151, 100, 251, 200))], [truth(wide, (400, 100, 440, 200), ignore=[0])]) == (0, 1, 1)


def test_of_two_equal_overlaps_the_later_box_wins():
    # The first detection lies between both people; the second one can only have the left one, the first of the list.
    left, right = (100, 100, 140, 200), (110, 100, 150, 200)
    between, only_left = (105, 100, 145, 200), (90, 100, 130, 200)
    assert counts([found(between, only_left)], [truth(left, right)]) == (2, 0, 2)
    assert counts([found(between, only_left)], [truth(right, left)]) == (1, 1, 2)


def test_detections_by_falling_score_take_the_real_box_that_they_overlap_most():
    boxes = truth(PERSON, shifted(PERSON, 12))
    # By 24 pixels: overlaps the second person only. By 2: both, but the first more; by 10: the second more.
    assert counts([found(shifted(PERSON, 24), shifted(PERSON, 2), scores=[0.1, 0.9])], [boxes]) == (2, 0, 2)
    assert counts([found(shifted(PERSON, 24), shifted(PERSON, 10), scores=[0.1, 0.9])], [boxes]) == (1, 1, 2)
    assert counts([found(PERSON)], [truth(PERSON, (50, 50, 300, 300), ignore=[1])]) == (1, 0, 1)


def test_daytime_chooses_frames():
    frames = [truth(PERSON), truth(PERSON, daytime=False)]
    detections = [found(PERSON), found(shifted(PERSON, 300))]
    expected = {"all": (1, 1, 2), "day": (1, 0, 1), "night": (0, 1, 1)}
    assert {daytime: counts(detections, frames, daytime=daytime) for daytime in expected} == expected


def test_a_box_beyond_the_border_is_ignored():
    beyond = [(4, 100, 44, 200), (596, 100, 636, 200), (100, 4, 140, 100), (100, 408, 140, 508)]
    for box in ((5, 5, 635, 507), *beyond):
        curve = miss_rate_curve([found(box), found()], [truth(box), truth(PERSON)])
        assert curve["boxes"] == 1 + (box not in beyond) and len(curve["fppi"]) == (box not in beyond)


@pytest.mark.parametrize(
    "subset, inside, outside, occlusions",
    [
        ("reasonable", (55, 200, 300), (54.5,), (0, 1)),
        ("near", (115, 200, 300), (114.5,), (0,)),
        ("medium", (45, 80, 115), (44.5, 115.5), (0,)),
        ("far", (1, 20, 45), (0.5, 45.5), (0,)),
        ("none", (1, 20, 300), (0.5,), (0,)),
        ("partial", (1, 20, 300), (0.5,), (1,)),
        ("heavy", (1, 20, 300), (0.5,), (2,)),
        ("all", (20, 100, 300), (19.5,), (0, 1, 2)),
    ],
)
def test_subsets_by_height_and_occlusion(subset, inside, outside, occlusions):
    for occlusion, height in itertools.product((0, 1, 2), inside + outside):
        frames = [truth((100, 100, 140, 100 + height), occlusion=[occlusion])]
        expected = int(height in inside and occlusion in occlusions)
        assert miss_rate_curve([found()], frames, subset)["boxes"] == expected, (height, occlusion)


def test_a_subset_without_people_is_none():
    assert log_average_miss_rate([found(PERSON)], [truth()]) is None
    assert log_average_miss_rate([], []) is None
    heavy = miss_rate_table([found()], [truth(PERSON)])["heavy"]
    assert heavy == {"miss_rate": None, "recall": None, "boxes": 0, "frames": 1}


def test_detections_beyond_the_limit_of_a_frame_are_left_out():
    far = [shifted(PERSON, 200)] * MAX_DETECTIONS
    beyond, within = ([0.1] + [0.9] * count for count in (MAX_DETECTIONS, MAX_DETECTIONS - 1))
    assert counts([found(PERSON, *far, scores=beyond)], [truth(PERSON)]) == (0, MAX_DETECTIONS, 1)
    assert counts([found(PERSON, *far[1:], scores=within)], [truth(PERSON)])[0] == 1


def test_wrong_arguments():
    good = [truth(PERSON)]
    for detections, ground_truth, message in (
        ([found(PERSON)] * 2, good, "2 frames of detections for 1"),
        ([found(PERSON, scores=[math.nan])], good, "frame 0 has scores that are not finite"),
        ([{"boxes": [PERSON], "scores": [1, 2]}], good, "frame 0 has 1 boxes but 2 scores"),
    ):
        with pytest.raises(ValueError, match=message):
            log_average_miss_rate(detections, ground_truth)
    for options in (dict(subset="easy"), dict(daytime="dusk")):
        with pytest.raises(KeyError, match="easy|dusk"):
            log_average_miss_rate([found(PERSON)], good, **options)


def test_the_rate_of_the_script_worked_by_hand():
    # A false alarm before the hit, at 0.5 per image: below that the script reads the last miss rate, 1/2, not 1. The
    # third person's frame has no detection, so the person is not counted.
    frames = [truth(PERSON, shifted(PERSON, 100)), truth(PERSON)]
    detections = [found(shifted(PERSON, 300), PERSON, scores=[0.8, 0.7]), found()]
    assert miss_rate_by_script(detections, frames)["all"] == pytest.approx(50)
    expected = 100 * math.exp((7 * math.log(1) + 2 * math.log(2 / 3)) / 9)
    assert log_average_miss_rate(detections, frames) == pytest.approx(expected)
    assert miss_rate_by_script([found(PERSON)], [truth(PERSON)])["all"] == 0
    assert miss_rate_by_script([found()], [truth(PERSON)])["all"] is None


def test_published_detections(shared):
    """Their published miss rates are held by the command's test."""
    frames, _ = read_ground_truth(shared / "data/kaist/eval/gt/kaist_annotations_test20.json")
    detections = read_detections(shared / "data/kaist/eval/results/MBNet_result.txt", len(frames))
    start = time.process_time()
    table = miss_rate_table(detections, frames)
    assert time.process_time() - start < 5  # 0.3 s on an idle core
    assert [table[f"reasonable {daytime}"]["boxes"] for daytime in ("all", "day", "night")] == [1455, 989, 466]
    assert table["reasonable all"]["recall"] == pytest.approx(98.42, abs=0.0051)
    for frame in detections:
        kept = frame["scores"] >= 0.5
        frame.update({key: value[kept] for key, value in frame.items()})
    assert log_average_miss_rate(detections, frames) == pytest.approx(28.52, abs=0.0051)  # frames without any count
    assert miss_rate_by_script(detections, frames)["all"] == pytest.approx(23.36, abs=0.0051)  # there they do not
