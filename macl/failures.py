"""Where a detector fails: a page of the frames with the worst misses and false alarms, and what is found by kind."""

from html import escape
from pathlib import Path

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
FOUND = "Found is a box by a detection of its class with an IoU of at least 0.5, and a score from which on F1 is best."
OCCLUSIONS = ("not occluded", "partly occluded", "heavily occluded")
RECALLS = np.linspace(0, 1, 101)
UNKNOWN = 0.5  # score from which on detections of a class that the truth does not have are false alarms


def column(frames: list[dict], key: str) -> np.ndarray:
    """The values of a key, of all frames in a row; without one the frame that each row is of."""
    if not key:
        return np.repeat(np.arange(len(frames)), [len(frame["boxes"]) for frame in frames])
    return np.concatenate([frame[key].numpy() for frame in frames])


class Judged:
    """The detections of a mode beside the truth, at the score of each class from which on its F1 is best."""

    def __init__(self, results: list[dict], mode: str, max_detections: int):
        outputs, truths = [one["detections"][mode] for one in results], [one["ground_truth"] for one in results]
        metrics = matches(outputs, truths, max_detections=max_detections)
        self.curves, self.found = metrics["curves"], metrics["found"]
        self.thresholds = np.full(1 + len(results[0]["classes"]), UNKNOWN)
        for label, (precision, scores) in self.curves.items():
            f1 = np.nan_to_num(precision * RECALLS / np.maximum(precision + RECALLS, 1e-9))
            self.thresholds[label] = scores[f1.argmax()] if f1.any() else 1
        self.boxes, self.labels, self.frame = (column(truths, key) for key in ("boxes", "labels", ""))
        self.real = ~column(truths, "ignore")
        self.missed = self.real & (self.found < self.thresholds[self.labels])
        # Of the detections those that count, from the threshold on, the best last.
        keys = ("boxes", "labels", "", "scores")
        boxes, labels, frame, scores = (column(outputs, key) for key in keys)
        kept = (metrics["hits"] >= 0) & (scores >= self.thresholds[labels])
        kept = np.flatnonzero(kept)[np.argsort(scores[kept], kind="stable")]
        self.detections = list(zip(frame[kept], boxes[kept].tolist(), labels[kept], scores[kept], strict=True))
        self.false = metrics["hits"][kept] == 0

    def errors(self, count: int) -> np.ndarray:
        """How wrong each frame is, (count,): what the score lacks of every miss to 1, and of every false alarm to 0."""
        errors = np.bincount(self.frame, self.missed * (1 - self.found), count)
        for (frame, _, _, score), false in zip(self.detections, self.false, strict=True):
            errors[frame] += false * score
        return errors

    def marks(self, frame: int, classes: list[str]) -> list[Mark]:
        """What to draw. A missed box bears the score by which it is found below the threshold."""
        marks = []
        for i in np.flatnonzero((self.frame == frame) & (~self.real | self.missed)):
            name = classes[self.labels[i] - 1] if len(classes) > 1 else ""
            text = f"{name} {self.found[i]:.2f}".strip() if self.real[i] and self.found[i] else name
            marks.append(Mark(self.boxes[i], "missed" if self.real[i] else "ignored", text, below=True))
        for (place, box, label, score), false in zip(self.detections, self.false, strict=True):
            if place == frame:
                marks.append(Mark(box, "false" if false else "found", f"{classes[label - 1]} {score:.2f}"))
        return marks


def curves(judged: dict[str, Judged], classes: list[str]) -> str:
    """A chart per class with a real box of the precision over the recall, a curve per mode."""
    charts = []
    for label in next(iter(judged.values())).curves:
        lines = [(RECALLS, one.curves[label][0]) for one in judged.values()]
        chart = draw(lines, False, salt=str(label), across="recall") + keys(judged)
        charts.append(figure(chart, classes[label - 1], "precision over recall"))
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
        day = np.array([bool(truth["daytime"]) for truth in truths])[column(truths, "")]
        named |= {"by day": day, "by night": ~day}
    if "visible_in" in known:
        seen = column(truths, "visible_in")
        named |= {f"seen in {name.replace('_', ' ')}": (seen == which).all(1) for name, which in SEEN.items()}
    return named


def found_table(judged: dict[str, Judged], truths: list[dict], classes: list[str]) -> str:
    """The share of the boxes of each kind that each mode finds."""
    lines, modes = [], list(judged.values())
    for name, chosen in kinds(truths).items():
        chosen = chosen & modes[0].real
        if chosen.any():
            lines.append(
                [name, str(chosen.sum()), *(f"{100 * (1 - one.missed[chosen].mean()):.1f} %" for one in modes)]
            )
    lines.append(["false alarms per frame", "", *(f"{one.false.sum() / len(truths):.2f}" for one in modes)])
    lines += [[f"{name}: score from", "", *(f"{one.thresholds[label]:.3f}" for one in modes)]
              for label, name in enumerate(classes, 1)]  # fmt: skip
    return table(["found", "boxes", *judged], lines)


def write_failures(folder: Path, results: list[dict], dataset: Dataset, count: int, max_detections: int, source: str):
    """Write worst.html, and a png of each of the `count` worst frames of the first mode. -> their number.

    results: of `evaluation.predict`, an item per sample of `dataset`. source: what was evaluated, as a sentence.
    """
    truths, classes, pictures = [result["ground_truth"] for result in results], list(results[0]["classes"]), []
    judged = {mode: Judged(results, mode, max_detections) for mode in results[0]["detections"]}
    mode, first = next(iter(judged.items()))
    errors = first.errors(len(results))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for place, frame in enumerate(np.argsort(-errors, kind="stable")[:count][: (errors > 0).sum()], 1):
        sample, marks = dataset[int(frame)], first.marks(frame, classes)
        cameras = zip(("visible", "infrared"), sample.get("present", (True, True)), strict=True)
        image = draw_marks({name: to_pil_image(sample[name]) for name, there in cameras if there}, marks, COLOURS)
        with whole_file(folder / f"worst-{place:03d}.png") as file:
            image.save(file, "PNG")
        wrong = [sum(mark.kind == kind for mark in marks) for kind in ("missed", "false")]
        pictures.append(picture(image, f"{place}. {sample['path']}", "{} missed, {} false".format(*wrong)))
    sections = [
        ("Data", f"<p>{escape(source)}</p><p>{FOUND}</p>"),
        (f"Worst frames, detecting with {mode}", f'<div class="pictures">{"".join(pictures)}</div>'),
        ("Precision over recall", curves(judged, classes)),
        ("What is found", found_table(judged, truths, classes)),
    ]
    write_text(folder / "worst.html", html_page("Where the detector fails", sections))
    return len(pictures)
