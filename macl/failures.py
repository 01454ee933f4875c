"""Where a detector fails: a page of the frames with the worst misses and false alarms, and what is found by kind."""

from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from macl.evaluation import SEEN
from macl.metrics import matches
from trainkit.drawing import Mark, draw_marks
from trainkit.files import whole_file, write_text, writing
from trainkit.page import draw, figure, html_page, keys, picture, table

# Okabe and Ito's, for colour-blind users.
COLOURS = {"missed": (213, 94, 0), "false": (240, 228, 66), "found": (86, 180, 233), "ignored": (150, 150, 150)}
RECALLS = np.linspace(0, 1, 101)  # as COCO's AP: it is the mean of these precisions, nothing counted as 0
FOUND = "Found is a box by a detection of its class with an IoU of at least 0.5, and a score from which on F1 is best."
OCCLUSIONS = ("not occluded", "partly occluded", "heavily occluded")


class Rows(NamedTuple):
    """The detections (n), or the true boxes (n), of all frames in a row."""

    frame: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4)
    labels: np.ndarray  # (n,)
    scores: np.ndarray  # (n,) of the detections, or of those that found the boxes, 0 where none did
    state: np.ndarray  # (n,) 1 for a hit or a real box, 0 for a false alarm, -1 for what does not count


def column(frames: list[dict], key: str) -> np.ndarray:
    return np.concatenate([frame[key].numpy() for frame in frames])


def rows(frames: list[dict], scores: np.ndarray, state: np.ndarray) -> Rows:
    index = np.repeat(np.arange(len(frames)), [len(frame["boxes"]) for frame in frames])
    return Rows(index, column(frames, "boxes"), column(frames, "labels"), scores, state)


def precision_recall(outputs: Rows, boxes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall, precision and score (n,) after each detection that counts, the best first. boxes: number of real ones."""
    counts = outputs.state >= 0
    order = np.argsort(-outputs.scores[counts], kind="stable")
    found = outputs.state[counts][order].cumsum()
    return found / max(boxes, 1), found / np.arange(1, 1 + len(found)), outputs.scores[counts][order]


class Judged:
    """The detections of a mode beside the truth. threshold: the score from which on the F1 is best."""

    def __init__(self, results: list[dict], mode: str, max_detections: int):
        outputs, truths = [one["detections"][mode] for one in results], [one["ground_truth"] for one in results]
        hits, found = matches(outputs, truths, max_detections=max_detections)
        self.outputs = rows(outputs, column(outputs, "scores"), hits)
        self.truth = rows(truths, found, np.where(column(truths, "ignore"), -1, 1))
        recall, precision, scores = precision_recall(self.outputs, (self.truth.state > 0).sum())
        f1 = recall * precision / np.maximum(recall + precision, 1e-9)
        self.threshold = float(scores[f1.argmax()]) if len(f1) else 1.0
        self.missed = (self.truth.state > 0) & (found < self.threshold)  # of the true boxes
        self.false = (hits == 0) & (self.outputs.scores >= self.threshold)  # of the detections

    def errors(self, count: int) -> np.ndarray:
        """How wrong each frame is, (count,): what the score lacks of every miss to 1, and of every false alarm to 0."""
        misses = np.bincount(self.truth.frame, self.missed * (1 - self.truth.scores), count)
        return misses + np.bincount(self.outputs.frame, self.false * self.outputs.scores, count)

    def marks(self, frame: int, classes: list[str]) -> list[Mark]:
        marks, truth, outputs = [], self.truth, self.outputs
        for i in np.flatnonzero((truth.frame == frame) & ((truth.state < 0) | self.missed)):
            kind = "ignored" if truth.state[i] < 0 else "missed"
            name = classes[truth.labels[i] - 1] if len(classes) > 1 else ""
            name = f"{name} {truth.scores[i]:.2f}" if truth.scores[i] else name
            marks.append(Mark(truth.boxes[i].tolist(), kind, name.strip(), below=True))
        shown = np.flatnonzero((outputs.frame == frame) & (outputs.state >= 0) & (outputs.scores >= self.threshold))
        for i in shown[np.argsort(outputs.scores[shown])]:
            text = f"{classes[outputs.labels[i] - 1]} {outputs.scores[i]:.2f}"
            marks.append(Mark(outputs.boxes[i].tolist(), "false" if self.false[i] else "found", text))
        return marks


def curves(judged: dict[str, Judged], classes: list[str]) -> str:
    """A chart per class of the precision over the recall, a curve per mode."""
    charts = []
    for label, name in enumerate(classes, 1):
        drawn = []
        for one in judged.values():
            boxes = int(((one.truth.labels == label) & (one.truth.state > 0)).sum())
            chosen = one.outputs.labels == label
            recall, precision, _ = precision_recall(Rows(*(part[chosen] for part in one.outputs)), boxes)
            best = np.append(np.maximum.accumulate(precision[::-1])[::-1], np.nan)  # at this recall or a larger one
            drawn.append((RECALLS, best[np.searchsorted(recall, RECALLS)]))
        chart = draw(drawn, False, salt=ascii(name), across="recall") + keys(judged)
        charts.append(figure(chart, name, f"precision over recall of {boxes} boxes"))
    return f'<div class="charts">{"".join(charts)}</div>'


def kinds(truths: list[dict]) -> dict[str, np.ndarray]:
    """Name of a kind of boxes -> which are of it, (M,) bool: by size, and by what the data know."""
    boxes, known = column(truths, "boxes"), set.intersection(*map(set, truths))
    heights = boxes[:, 3] - boxes[:, 1]
    low, high = np.quantile(heights, [1 / 3, 2 / 3]).round() if len(heights) else (0, 0)
    named = {
        "all": heights >= 0,
        f"up to {low:.0f} pixels high": heights <= low,
        f"{low:.0f} to {high:.0f} pixels high": (low < heights) & (heights <= high),
        f"more than {high:.0f} pixels high": high < heights,
    }
    if "occlusion" in known:
        named |= {name: column(truths, "occlusion") == level for level, name in enumerate(OCCLUSIONS)}
    if "daytime" in known:
        day = np.repeat([bool(truth["daytime"]) for truth in truths], [len(truth["boxes"]) for truth in truths])
        named |= {"by day": day, "by night": ~day}
    if "visible_in" in known:
        seen = column(truths, "visible_in")
        named |= {f"seen in {name.replace('_', ' ')}": (seen == which).all(1) for name, which in SEEN.items()}
    return named


def found_table(judged: dict[str, Judged], truths: list[dict]) -> str:
    """The share of the boxes of each kind that each mode finds."""
    lines, real = [], next(iter(judged.values())).truth.state > 0
    for name, chosen in kinds(truths).items():
        if count := int((chosen & real).sum()):
            shares = [f"{100 * (1 - one.missed[chosen & real].mean()):.1f} %" for one in judged.values()]
            lines.append([name, str(count), *shares])
    false = [f"{one.false.sum() / len(truths):.2f}" for one in judged.values()]
    lines.append(["false alarms per frame", "", *false])
    lines.append(["score from", "", *(f"{one.threshold:.3f}" for one in judged.values())])
    return table(["found", "boxes", *judged], lines)


def write_failures(folder: Path, results: list[dict], dataset: Dataset, count: int, max_detections: int, source: str):
    """Write worst.html, and a png of each of the `count` worst frames of the first mode. -> their number.

    results: of `evaluation.predict`, an item per sample of `dataset`. source: what was evaluated, as a sentence.
    """
    truths, classes = [result["ground_truth"] for result in results], list(results[0]["classes"])
    judged = {mode: Judged(results, mode, max_detections) for mode in results[0]["detections"]}
    mode, first = next(iter(judged.items()))
    errors, pictures = first.errors(len(results)), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for place, frame in enumerate(np.argsort(-errors, kind="stable")[:count][: (errors > 0).sum()], 1):
        sample = dataset[int(frame)]
        images = {name: to_pil_image(sample[name]) for name in ("visible", "infrared")}
        image = draw_marks(images, first.marks(frame, classes), COLOURS)
        with whole_file(folder / f"worst-{place:03d}.png") as file:
            image.save(file, "PNG")
        missed, false = (int(which[part.frame == frame].sum()) for which, part in
                         ((first.missed, first.truth), (first.false, first.outputs)))  # fmt: skip
        pictures.append(picture(image, f"{place}. {sample['path']}", f"{missed} missed, {false} false"))
    sections = [
        ("Data", f"<p>{escape(source)}</p><p>{FOUND}</p>"),
        (f"Worst frames, detecting with {mode}", f'<div class="pictures">{"".join(pictures)}</div>'),
        ("Precision over recall", curves(judged, classes)),
        ("What is found", found_table(judged, truths)),
    ]
    write_text(folder / "worst.html", html_page("Where the detector fails", sections))
    return len(pictures)
