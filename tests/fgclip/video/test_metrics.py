"""Figures of frame scores and detections: recorded ones, brute force, and cases made by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fgclip.video.metrics import (
    VideoScores,
    anomaly_report,
    average_precision,
    by_frame,
    detection_map,
    frame_auc,
    frame_figures,
    proposals,
    report_text,
)
from trainkit.errors import InputError

NORMAL = "Normal"


def video(scores, events=(), classes=None, *, name="video", frames=None, clip_frames=4, class_scores=None):
    """A video of whole clips, by default, of the classes of its events."""
    classes = tuple(dict.fromkeys(event[2] for event in events or ())) if classes is None else classes
    class_scores = np.ones((len(scores), 3)) / 3 if class_scores is None else np.array(class_scores, dtype=float)
    frames = clip_frames * len(scores) if frames is None else frames
    return VideoScores(name, classes, events, frames, clip_frames, np.array(scores, dtype=float), class_scores)


@pytest.fixture(scope="module")
def recorded(shared):
    """Videos, names of the classes without normal, and scikit-learn's and VadCLIP's figures of them."""
    data = json.loads((shared / "data/video/golden/evaluation.json").read_text())
    videos = []
    for one in data["videos"]:
        classes = () if one["label"] == NORMAL else (one["label"],)
        events = tuple((start, end, one["label"]) for start, end in one["events"])
        scores, class_scores = np.array(one["scores"]), np.array(one["class_scores"])
        videos.append(VideoScores(one["video"], classes, events, one["frames"], 16, scores, class_scores))
    return videos, data["classes"][1:], data["expected"]


@pytest.fixture(scope="module")
def official(shared):
    """The official test videos of UCF-Crime with random scores."""
    lines = (shared / "data/video/ucf_crime/test_with_frame_counts.txt").read_text().splitlines()
    rng, videos = np.random.default_rng(0), []
    for name, frames, kind, *spans in (line.split() for line in lines if line.strip()):
        spans = [(int(start), int(end), kind) for start, end in zip(spans[::2], spans[1::2], strict=True)]
        events, clips = tuple(span for span in spans if span[0] >= 0), -(-int(frames) // 16)
        scores = rng.random(clips), rng.dirichlet(np.ones(14), clips)
        videos.append(VideoScores(name, () if kind == NORMAL else (kind,), events, int(frames), 16, *scores))
    return videos


def test_recorded_figures(recorded):
    videos, classes, expected = recorded
    report = anomaly_report(videos, classes)
    figures, counts = report["scores"]["anomaly score"], report["counts"]
    assert (counts["frames"], counts["positives"]) == (expected["all"]["frames"], expected["all"]["positives"])
    for kind, start in (("all", ""), ("anomalous", "anomalous_")):
        for name in ("auc", "ap"):
            assert figures[start + name] == pytest.approx(expected[kind][name], abs=1e-9)
    for name, row in report["classes"].items():
        wanted = expected["per_class"].get(name, {}).get("auc", math.nan)
        assert row["auc"] == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    published = report["map"]["published"]
    assert [100 * published[str(t)] for t in expected["vadclip_map"]["iou"]] == pytest.approx(
        expected["vadclip_map"]["map"], abs=1e-9
    )
    assert 100 * published["average"] == pytest.approx(expected["vadclip_map"]["average"], abs=1e-9)
    share = 14 / len(expected["per_class"])  # the other classes have no events here
    assert report["map"]["with_events"]["average"] == pytest.approx(share * published["average"])


def test_a_shift_of_one_clip_is_seen(recorded):
    videos, _, expected = recorded
    late = [video(np.roll(v.scores, 1), v.events, frames=v.frames, clip_frames=16) for v in videos]
    assert expected["all"]["auc"] - frame_figures(late)["auc"] > 0.005


def test_official_counts_and_what_the_label_alone_reaches(official):
    report = anomaly_report(official, sorted({v.classes[0] for v in official if v.classes}))
    assert report["counts"] == dict(videos=290, anomalous=140, frames=1_111_808, positives=84_182, unknown=0, unclear=0)
    _, _, label, middle = report["scores"].values()
    assert label["auc"] == pytest.approx(0.8157, abs=5e-5) and middle["auc"] == pytest.approx(0.8652, abs=5e-5)
    assert label["anomalous_auc"] == 0.5 and middle["anomalous_auc"] == pytest.approx(0.634, abs=5e-4)
    assert label["ap"] == pytest.approx(0.1819, abs=5e-5) and label["video_auc"] == 1
    assert report["scores"]["anomaly score"]["auc"] == pytest.approx(0.5, abs=0.02)


def test_equal_scores_share_a_threshold():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, truth = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3
        above = np.sign(scores[truth][:, None] - scores[~truth])
        assert frame_auc(scores, truth) == pytest.approx((above / 2 + 0.5).mean())
        precision = sum(truth[scores >= s].mean() for s in scores[truth]) / truth.sum()
        assert average_precision(scores, truth) == pytest.approx(precision)
    assert frame_auc(np.ones(5), np.arange(5) < 2) == 0.5
    for nothing in (np.zeros(3, dtype=bool), np.zeros(0, dtype=bool)):
        assert math.isnan(frame_auc(nothing * 1.0, nothing)) and math.isnan(average_precision(nothing * 1.0, nothing))


def test_frames_of_clips():
    """The end of an event is left out; events may overlap, and may end behind the video."""
    one = video([0, 0, 0, 0], ((3, 6, "a"), (5, 9, "b"), (13, 99, "a")), frames=14)
    assert by_frame([one])[1].nonzero()[0].tolist() == [3, 4, 5, 6, 7, 8, 13]
    assert (
        by_frame([replace(one, scores=np.arange(4)), one])[0].tolist()
        == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [0] * 14
    )
    exact = video([0.1, 0.9, 0.2], ((4, 8, "a"),))
    assert frame_figures([exact])["auc"] == 1 and frame_figures([video(exact.scores, ((4, 9, "a"),))])["auc"] < 1


@pytest.mark.parametrize(
    "scores, rows, frames, said",
    [
        ([0.1] * 3, 3, 8, "video: 3 scores and 3 rows of class scores for 8 frames in clips of 4"),
        ([0.1] * 3, 2, 9, "3 scores and 2 rows"),
        ([], 0, 0, "0 scores"),
        ([0.1, math.nan], 2, 8, "video: some scores are not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, rows, frames, said):
    with pytest.raises(InputError, match=said):
        video(scores, frames=frames, class_scores=np.zeros((rows, 3)))


def test_proposals():
    column = [0.0, 1.0, 0.8, 0.4, 0.41, 0.0]  # strictly above 0.4
    (first, constant, _) = proposals(video([0] * 6, class_scores=np.array([column, [0.5] * 6, [0] * 6]).T, frames=21))
    assert first.tolist() == pytest.approx(np.array([[4, 12, 1.7], [16, 20, 0.41 + 0.7]])) and not len(constant)
    (single, _, _) = proposals(video([0] * 4, class_scores=np.eye(4)[:, 1:], clip_frames=1))
    assert not len(single)  # one frame is no run
    (long, *_) = proposals(video([0] * 32, class_scores=np.linspace(0, 1, 96).reshape(32, 3)))
    assert long[0, 2] == pytest.approx(93 / 95 + 0.7 * (93 + 90) / 2 / 95)  # 8 of 128 frames: two clips


def test_detections():
    """Each event is found once; a normal video's proposal is a false one."""
    a = np.array([[0, 0.9, 0], [0, 0, 0], [0, 0.8, 0], [0, 0, 0]])
    quiet = np.array([[1.0, 0, 0.1]] * 3 + [[1, 1.0, 0.1]])
    videos = [video([0] * 4, ((0, 4, "a"), (8, 20, "a")), class_scores=a), video([0] * 4, class_scores=quiet)]
    found = detection_map(videos, ["", "a", "b"])
    assert np.isnan(found[[0, 2]]).all()
    # By score: the false one, then IoU 1, then IoU 1/3.
    assert found[1].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2] * 3 + [1 / 4] * 2)
    twice = [video([0] * 4, ((0, 12, "a"),), class_scores=a)]
    assert detection_map(twice, ["", "a", "b"], [0.3])[1, 0] == 1  # the second has no event left
    assert detection_map(videos, [None, "a", "b"], [0.5])[0, 0] == 0  # constant, hence nothing proposed
    whole = [video([0] * 4, class_scores=np.array([[0.9, 0, 0]] * 3 + [[0.1, 0, 0]]))]
    assert detection_map(whole, [None, "a", "b"], [0.5, 0.8]).tolist()[0] == [1, 0]


def test_a_report_says_what_it_cannot_measure():
    scores = np.array([[0.8, 0.1, 0.1], [0.1, 0.3, 0.6]])
    videos = [
        video([0.2, 0.9], ((4, 8, "b"),), class_scores=scores),
        video([0.1, 0.6], class_scores=scores),
        video([0.3, 0.2], None, ("a",), class_scores=scores),
    ]
    report = anomaly_report(videos, ("a", "b"))
    assert report["counts"] == dict(videos=3, anomalous=2, frames=16, positives=4, unknown=1, unclear=0)
    assert report["top1"] == 0.5 and report["scores"]["anomaly score"] == pytest.approx(
        dict(auc=1, ap=1, anomalous_auc=1, anomalous_ap=1, mean_auc=1, video_auc=0.5, false_alarms=1 / 3)
    )
    assert report["scores"]["1 - p(normal)"]["auc"] == pytest.approx(5 / 6)
    assert report["classes"]["b"] == pytest.approx(dict(videos=1, events=1, auc=1, one_vs_rest_auc=5 / 6, map=1))
    assert report["map"]["with_events"]["average"] == 1 and report["map"]["published"]["0.5"] == pytest.approx(1 / 3)
    assert math.isnan(report["classes"]["a"]["auc"]) and math.isnan(report["classes"]["a"]["map"])
    said = report_text(report).splitlines()
    assert said[0] == ("3 videos, 2 anomalous; 16 frames, 4 in events; 1 videos of unknown events count only as wholes")
    assert "a 1 0 - - -".split() in [line.split() for line in said]
    assert "as published (3 classes) 33.33".split() == said[-1].split()[:5]
    with pytest.raises(InputError, match="at least one video of which it is known when its events are"):
        anomaly_report(videos[2:], ("a", "b"))


def test_the_class_of_a_video_is_that_of_its_best_sixteenth():
    rows = np.full((32, 3), 0.1)
    rows[3, 1], rows[7:10, 2] = 0.9, 0.5
    report = anomaly_report([video([0] * 32, None, ("b",), class_scores=rows), video([0])], ("a", "b"))
    assert report["top1"] == 1 and math.isnan(report["map"]["published"]["average"])


def test_events_without_a_class_count_for_none():
    """They may be of any of their video's classes; as events they count."""
    scores = np.array([[0.8, 0.1, 0.1], [0.1, 0.3, 0.6]])
    clear = video([0.2, 0.9], ((4, 8, "b"),), class_scores=scores)
    unclear = video([0.9, 0.2], ((0, 4, ""), (4, 8, "a")), ("a", "b"), class_scores=scores)
    alone = anomaly_report([clear, video([0.1, 0.1])], ("a", "b"), normal_counts=True)
    both = anomaly_report([clear, unclear, video([0.1, 0.1])], ("a", "b"), normal_counts=True)
    assert both["map"] == alone["map"] and both["map"]["with_events"]["average"] == 1
    assert both["counts"] | dict(videos=2) == dict(
        videos=2, anomalous=2, frames=24, positives=12, unknown=0, unclear=1
    ) and "; 1 of events without a class count for none" in report_text(both)
    assert both["classes"]["b"] == pytest.approx(alone["classes"]["b"] | dict(videos=2, auc=5 / 6))
    only = anomaly_report([unclear], ("a", "b"))
    assert only["scores"]["anomaly score"]["ap"] == 1 and math.isnan(only["map"]["published"]["average"])


def test_normal_videos_alone_have_no_curve():
    figures = frame_figures([video([0.2, 0.9], ()), video([0.7, 0.1], ())])
    assert figures.pop("false_alarms") == 0.5 and all(math.isnan(value) for value in figures.values())
