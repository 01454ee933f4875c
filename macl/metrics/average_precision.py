"""COCO average precision of detections against boxes, by faster-coco-eval where it is installed, or pycocotools."""

import contextlib
import io
from importlib.util import find_spec

import numpy as np

from macl.metrics.frames import flatten

MEASURES = ("ap50", "ap75", "ap", "recall")
MAX_DETECTIONS = 100  # COCO's


def average_precision(
    detections: list[dict], ground_truth: list[dict], *, max_detections: int = MAX_DETECTIONS
) -> dict:
    """Average precision as COCO defines it (Lin et al., "Microsoft COCO", 2014), in fractions.

    Both lists hold one dict per frame, in the same order; tensors on any device, arrays or lists.

    detections: boxes (N, 4) x1, y1, x2, y2 in pixels, labels (N,), scores (N,)
    ground_truth: boxes (M, 4), labels (M,), ignore (M,) bool, by default all False. A detection that has no real box
        and lies on an ignored box of its class is neither a true nor a false positive: COCO's crowd rule.
    max_detections: per frame and class, the best first

    Returns ap (mean over IoU 0.50:0.05:0.95), ap50, ap75 and recall (the largest recall, mean over the same IoUs), each
    the mean over the classes with a real box; per_class, the same four and boxes per label; boxes and detections, their
    numbers. The four are None without a real box, also per class. Detections of a class without any box do not count.
    Raises ValueError for unequal lengths and values that are not finite.
    """
    fast = find_spec("faster_coco_eval") is not None  # the same figures, sooner
    evaluation, outputs, targets = _evaluate(detections, ground_truth, max_detections, fast)
    per_class = _per_class(evaluation)
    for label, values in per_class.items():
        values["boxes"] = sum(box["category_id"] == label and not box["iscrowd"] for box in targets)
    measured = [values for values in per_class.values() if values["boxes"]]
    return {
        **{name: float(np.mean([one[name] for one in measured])) if measured else None for name in MEASURES},
        "per_class": per_class,
        "boxes": sum(values["boxes"] for values in measured),
        "detections": len(outputs),
    }


def matches(detections: list[dict], ground_truth: list[dict], *, max_detections: int = MAX_DETECTIONS) -> dict:
    """What `average_precision` counts at an IoU of 0.50, by pycocotools. Arguments and errors as there.

    Returns, frames in a row, hits (N,), 1 for a detection that found a box, 0 for a false alarm, -1 for what does not
    count; found (M,), the scores of the detections that found the boxes, 0 where none did; and curves, per label of a
    real box precision and score (101,) at recalls of 0, 0.01, ... 1, NaN beyond the largest.
    """
    evaluation, outputs, targets = _evaluate(detections, ground_truth, max_detections, fast=False)
    labels = evaluation.params.catIds
    known = [output["category_id"] in labels for output in outputs]
    hits, found = -np.array(known, dtype=int), np.zeros(len(targets))
    score_of = np.array([0.0, *(output["score"] for output in outputs)])  # by id
    for one in filter(None, evaluation.evalImgs):
        places, boxes = (np.array(one[key], int) - 1 for key in ("dtIds", "gtIds"))
        hits[places] = np.where(one["dtIgnore"][0], -1, one["dtMatches"][0] > 0)
        found[boxes] = score_of[one["gtMatches"][0].astype(int)]
    real = {box["category_id"] for box in targets if not box["iscrowd"]}
    curves = {label: _curve(evaluation, place) for place, label in enumerate(labels) if label in real}
    return {"hits": hits, "found": found, "curves": curves}


def _annotations(frames: list[dict], key: str, name: str) -> list[dict]:
    """The boxes as COCO's annotations, the values of `key` under `name`."""
    boxes, frame, labels, values = flatten(frames, "labels", key)
    columns = (boxes.tolist(), frame.tolist(), labels.astype(int).tolist(), values.tolist())
    rows = enumerate(zip(*columns, strict=True), 1)  # an id of 0 would read as "not matched" inside pycocotools
    return [
        {"id": index, "bbox": box, "area": box[2] * box[3], "image_id": image, "category_id": label, "iscrowd": 0}
        | {name: value}
        for index, (box, image, label, value) in rows
    ]


def _evaluate(detections: list[dict], ground_truth: list[dict], max_detections: int, fast: bool) -> tuple:
    """The evaluation of the labels of the boxes, and what went in, as COCO's annotations: detections, then boxes."""
    if fast:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    if len(detections) != len(ground_truth):
        raise ValueError(f"{len(detections)} frames of detections for {len(ground_truth)} frames of ground truth")
    ground_truth = [{"ignore": np.zeros(len(frame["boxes"])), **frame} for frame in ground_truth]
    targets = _annotations(ground_truth, "ignore", "iscrowd")
    outputs = _annotations(detections, "scores", "score")
    labels = sorted({box["category_id"] for box in targets})
    images, categories = [{"id": index} for index in range(len(ground_truth))], [{"id": label} for label in labels]
    with contextlib.redirect_stdout(io.StringIO()):  # both print their progress
        datasets = []
        for annotations in (targets, outputs):
            coco = COCO()
            coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
            coco.createIndex()
            datasets.append(coco)
        evaluation = COCOeval(*datasets, iouType="bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]  # no small / medium / large
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation, outputs, targets


def _per_class(evaluation) -> dict[int, dict]:
    """MEASURES by label, None for a class without a real box."""
    precision = evaluation.eval["precision"][..., 0, 0].mean(1)  # (IoUs, classes), the mean over 101 recalls
    recall = evaluation.eval["recall"][..., 0, 0].mean(0)  # (classes,)
    rows = np.stack([precision[0], precision[5], precision.mean(0), recall], 1).tolist()  # -1 without a real box
    return {
        label: {name: None if value < 0 else value for name, value in zip(MEASURES, row, strict=True)}
        for label, row in zip(evaluation.params.catIds, rows, strict=True)
    }


def _curve(evaluation, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and score (101,) of the class at this place."""
    precision, scores = (evaluation.eval[name][0, :, place, 0, 0] for name in ("precision", "scores"))
    return np.where(scores > 0, precision, np.nan), np.where(scores > 0, scores, np.nan)
