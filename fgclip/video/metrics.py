"""How well scores over time find the events in videos, beside what knowing less would reach. NumPy alone.

Frames are counted from 0, an event [start, end) leaves its end out, and a clip's score holds for each of its frames.
The frames of all videos make one ROC curve, on which equal scores are one point. Its area may only tell which videos
are anomalous: hence the figures within anomalous videos, the detections, and the oracles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from trainkit.errors import InputError
from trainkit.tables import aligned

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the IoU
ALARM = 0.5  # a score above it is an alarm


@dataclass(frozen=True)
class VideoScores:
    """What a model says of a video of so many decoded frames, and what is known of it.
    classes: () of a normal video. events: (start, end, class) in frames, class "" where it may be any of the video's;
    None where it is not known when they are. scores (T,): how likely an event is in each clip, T = ceil(frames /
    clip_frames); class_scores (T, 1 + C): the probabilities of normal and of each class. rate: frames per second.
    Raises InputError where sizes do not fit."""

    name: str
    classes: tuple[str, ...]
    events: tuple[tuple[int, int, str], ...] | None
    frames: int
    clip_frames: int
    scores: np.ndarray
    class_scores: np.ndarray
    rate: Fraction = Fraction(30)

    def __post_init__(self):
        if not 0 < -(-self.frames // self.clip_frames) == len(self.scores) == len(self.class_scores):
            sizes = f"{len(self.scores)} scores and {len(self.class_scores)} rows of class scores"
            raise InputError(f"{self.name}: {sizes} for {self.frames} frames in clips of {self.clip_frames}")
        if not (np.isfinite(self.scores).all() and np.isfinite(self.class_scores).all()):
            raise InputError(f"{self.name}: some scores are not finite")


def by_frame(videos: Sequence[VideoScores]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and truth (N,) bool of all frames of the videos."""
    scores, truth = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    for video in videos:
        scores.append(np.repeat(video.scores, video.clip_frames)[: video.frames])
        truth.append(np.zeros(video.frames, dtype=bool))
        for start, end, _ in video.events or ():
            truth[-1][start:end] = True
    return np.concatenate(scores), np.concatenate(truth)


def frame_auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """How often a positive frame scores above a negative one; equal scores count half. NaN without both kinds."""
    true, false = _above(scores, truth)
    area = (np.diff(false, prepend=0) * (true + np.append(0, true[:-1]))).sum() / 2
    return float(area / true[-1] / false[-1]) if true.any() and false.any() else float("nan")


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Sum over the distinct scores of precision times gain in recall. NaN without positives."""
    true, false = _above(scores, truth)
    return float((np.diff(true, prepend=0) * true / (true + false)).sum() / true[-1]) if true.any() else float("nan")


def _above(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative frames at or above each distinct score, highest first."""
    order = np.argsort(-scores)
    last = np.flatnonzero(np.append(np.diff(scores[order]), 1)[: len(scores)])  # of those that are equal
    return np.cumsum(truth[order])[last], np.cumsum(~truth[order])[last]


def proposals(video: VideoScores) -> list[np.ndarray]:
    """For each column of class_scores (n, 3): start and end in frames and the score of what it proposes as events. Runs
    of at least two frames strictly above max - 0.6 (max - min), scored by their highest plus 0.7 times the mean of the
    highest sixteenth of the frames, the last clip counted whole: so measures VadCLIP (Wu et al. 2024)."""
    x, size = video.class_scores, video.clip_frames  # (T, 1 + C)
    count = max(1, len(x) * size // 16)  # frames
    taken = np.clip(count - size * np.arange(len(x)), 0, size)[:, None]  # of each clip, highest first
    levels = (-np.sort(-x, axis=0) * taken).sum(axis=0) / count
    high, found = x > x.max(axis=0) - 0.6 * (x.max(axis=0) - x.min(axis=0)), []
    for column, above, level in zip(x.T, high.T, levels, strict=True):
        edges = np.flatnonzero(np.diff(above, prepend=False, append=False))  # start, end, start, ... of the runs
        best = np.maximum.reduceat(np.append(column, 0), edges)[::2] if len(edges) else np.empty(0)
        rows = np.column_stack([edges.reshape(-1, 2) * size, best + 0.7 * level])
        found.append(rows[rows[:, 1] - rows[:, 0] >= 2])
    return found


def detection_map(videos: Sequence[VideoScores], names: Sequence[str | None], thresholds=THRESHOLDS) -> np.ndarray:
    """Average precision (len(names), thresholds) of the proposals for each column of class_scores; NaN without events.
    names: the class of each column; None: its events are the normal videos as wholes. Of the unused events of its class
    and video a proposal takes the one of largest IoU, and is a hit where that reaches the threshold."""
    result, found = np.full((len(names), len(thresholds)), np.nan), [proposals(video) for video in videos]
    for column, name in enumerate(names):
        events = {i: [event[:2] for event in v.events or () if event[2] == name] for i, v in enumerate(videos)}
        if name is None:
            events = {i: [] if video.classes else [(0, video.frames)] for i, video in enumerate(videos)}
        count = sum(map(len, events.values()))
        rows = [(*row, i) for i, columns in enumerate(found) for row in columns[column].tolist()]
        rows.sort(key=lambda row: -row[2])
        near = [(rank, i, start, end) for rank, (start, end, _, i) in enumerate(rows, start=1) if events[i]]
        for place, threshold in enumerate(thresholds) if count else ():
            hits, unused = [], {i: list(some) for i, some in events.items()}
            for rank, i, start, end in near:
                overlaps = [(min(end, e) - max(start, s)) / (max(end, e) - min(start, s)) for s, e in unused[i]]
                if max(overlaps, default=0) >= threshold:
                    unused[i].pop(int(np.argmax(overlaps)))
                    hits.append(rank)
            result[column, place] = sum(n / rank for n, rank in enumerate(hits, start=1)) / count
    return result


def frame_figures(videos: Sequence[VideoScores]) -> dict[str, float]:
    """auc and ap of all frames, the same of anomalous videos, the mean of their own AUC, and the share of the frames
    without an event that raise an alarm; video_auc: of the highest scores, also of videos with unknown events."""
    known, highest = [v for v in videos if v.events is not None], np.array([video.scores.max() for video in videos])
    (scores, truth), anomalous = by_frame(known), [v for v in known if v.classes]
    return dict(
        auc=frame_auc(scores, truth), ap=average_precision(scores, truth),
        anomalous_auc=frame_auc(*by_frame(anomalous)), anomalous_ap=average_precision(*by_frame(anomalous)),
        mean_auc=_mean([frame_auc(*by_frame([video])) for video in anomalous]),
        video_auc=frame_auc(highest, np.array([bool(video.classes) for video in videos])),
        false_alarms=_mean(scores[~truth] > ALARM),
    )  # fmt: skip


def _mean(values) -> float:
    """The mean of those that are not NaN."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def oracles(videos: Sequence[VideoScores]) -> dict[str, list[VideoScores]]:
    """Scores of who knows only which videos are anomalous, and of who guesses also that events are in the middle."""
    label = [replace(v, clip_frames=1, scores=np.full(v.frames, float(bool(v.classes))),
                     class_scores=np.zeros((v.frames, 0))) for v in videos]  # fmt: skip
    ramps = [1 - abs(2 * (np.arange(v.frames) + 0.5) / v.frames - 1) for v in videos]  # 0 at both ends, 1 in the middle
    middle = [replace(v, scores=v.scores * ramp) for v, ramp in zip(label, ramps, strict=True)]
    return {"oracle of the video's label": label, "oracle x middle of the video": middle}


def anomaly_report(videos: Sequence[VideoScores], classes: Sequence[str], *, normal_counts: bool = False) -> dict:
    """Nested dict of plain ints and floats in 0..1, NaN where something cannot be measured.
    scores: `frame_figures` of the anomaly score, of 1 - p(normal) and of the `oracles`. classes: of each class its
    videos, events, auc within its videos, one_vs_rest_auc of its own score, and mAP. map: by threshold and averaged,
    the mean of the classes that have events, and that over 1 + C as published, where those without count 0. top1: how
    often the class that is highest in an anomalous video's best sixteenth is one of its own. Videos of events without a
    class have no part in one_vs_rest_auc and map.
    normal_counts: normal is a class with events in the published mean, as for XD-Violence."""
    known, anomalous = [v for v in videos if v.events is not None], [v for v in videos if v.classes]
    if not known:
        raise InputError("expected at least one video of which it is known when its events are, found none")
    clear, rows = [v for v in known if all(kind for *_, kind in v.events)], {}
    precision = detection_map(clear, [None if normal_counts else "", *classes])  # (1 + C, thresholds)
    for column, name in enumerate(classes, start=1):
        own, events = [v for v in known if name in v.classes], [[e for e in v.events if e[2] == name] for v in clear]
        as_one = [replace(v, scores=v.class_scores[:, column], events=e) for v, e in zip(clear, events, strict=True)]
        rows[name] = dict(
            videos=sum(name in v.classes for v in videos), events=sum(map(len, events)),
            auc=frame_auc(*by_frame(own)), one_vs_rest_auc=frame_auc(*by_frame(as_one)), map=_mean(precision[column]),
        )  # fmt: skip
    best = [np.sort(v.class_scores[:, 1:], axis=0)[-1 - len(v.scores) // 16 :].mean(axis=0).argmax() for v in anomalous]
    steps = dict(zip([*map(str, THRESHOLDS), "average"], [*range(len(THRESHOLDS)), slice(None)], strict=True))
    nowhere = np.isnan(precision).all()
    maps = dict(with_events=precision[1:], published=np.where(nowhere, np.nan, np.nan_to_num(precision)))
    truth = by_frame(known)[1]
    kinds = {"anomaly score": videos, "1 - p(normal)": [replace(v, scores=1 - v.class_scores[:, 0]) for v in videos]}
    return dict(
        counts=dict(
            videos=len(videos), anomalous=len(anomalous), frames=len(truth), positives=int(truth.sum()),
            unknown=len(videos) - len(known), unclear=len(known) - len(clear),
        ),
        scores={name: frame_figures(part) for name, part in (kinds | oracles(videos)).items()},
        classes=rows,
        mean_one_vs_rest_auc=_mean([row["one_vs_rest_auc"] for row in rows.values()]),
        top1=_mean([classes[i] in v.classes for i, v in zip(best, anomalous, strict=True)]),
        map={name: {step: _mean(part[:, at]) for step, at in steps.items()} for name, part in maps.items()},
    )  # fmt: skip


def report_text(report: dict) -> str:
    """The tables of an `anomaly_report`, shares in percent, a dash where something cannot be measured."""
    counts, classes = report["counts"], report["classes"]
    with_events = sum(row["events"] > 0 for row in classes.values())
    maps = {f"mean of the {with_events} classes with events": report["map"]["with_events"]}
    maps |= {f"as published ({1 + len(classes)} classes)": report["map"]["published"]}
    said = "{videos} videos, {anomalous} anomalous; {frames} frames, {positives} in events".format(**counts)
    said += f"; {counts['unknown']} videos of unknown events count only as wholes" if counts["unknown"] else ""
    said += f"; {counts['unclear']} of events without a class count for none" if counts["unclear"] else ""
    shares = f"mean one vs rest AUC {_cell(report['mean_one_vs_rest_auc'])}; "
    shares += f"top 1 class of anomalous videos {_cell(report['top1'])}"
    tables = _table(report["scores"], "%"), f"{_table(classes, '% by class')}\n{shares}", _table(maps, "mAP@IoU, %")
    return "\n\n".join([said, *tables])


def _table(rows: dict[str, dict], corner: str) -> str:
    names = [name.replace("_", " ") for name in next(iter(rows.values()), {})]
    return aligned([[corner, *names], *([name, *map(_cell, row.values())] for name, row in rows.items())])


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else "-" if np.isnan(value) else f"{100 * value:.2f}"
