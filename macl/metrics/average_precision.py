"""COCO average precision of detections against boxes, through pycocotools."""

import contextlib
import io

import numpy as np

from macl.metrics.frames import check_same_frames, flatten

MEASURES = ("ap50", "ap75", "ap", "recall")
MAX_DETECTIONS = 100  # COCO's


def average_precision(
    detections: list[dict], ground_truth: list[dict], *, max_detections: int = MAX_DETECTIONS
) -> dict:
    """Average precision as COCO defines it (Lin et al., "Microsoft COCO", 2014), in fractions.

    Both lists hold one dict per frame, in the same order; tensors on any device, arrays or lists.

    * ``detections``: boxes (N, 4) x1, y1, x2, y2 in pixels, labels (N,), scores (N,).
    * ``ground_truth``: boxes (M, 4), labels (M,), ignore (M,) bool, all False where the key is missing. A detection
      without a real box that has enough of its area on an ignored box of its class counts neither as a true nor as a
      false positive: COCO's crowd rule.
    * ``max_detections``: how many per frame and class count, the best first.

    Returns ap (mean over IoU 0.50:0.05:0.95), ap50, ap75 and recall (the largest recall, mean over the same IoUs), each
    the mean over the classes with a real box; per_class, the same four and boxes per label; boxes and detections, their
    numbers. The four are None without a real box, also per class. Detections of a class without any box do not count.
    Raises ValueError for lists of unequal length, missing keys and values that are not finite.
    """
    check_same_frames(detections, ground_truth)
    ground_truth = [{"ignore": np.zeros(len(frame.get("boxes", ()))), **frame} for frame in ground_truth]
    targets = _annotations(ground_truth, "ignore", "iscrowd")
    outputs = _annotations(detections, "scores", "score")
    labels = sorted({box["category_id"] for box in targets})
    counts = {label: sum(box["category_id"] == label and not box["iscrowd"] for box in targets) for label in labels}
    values = _evaluate(outputs, targets, labels, len(ground_truth), max_detections) if any(counts.values()) else {}
    values = {label: values[label] if count else dict.fromkeys(MEASURES) for label, count in counts.items()}
    measured = [values[label] for label, count in counts.items() if count]
    means = {name: float(np.mean([one[name] for one in measured])) if measured else None for name in MEASURES}
    return {
        **means,
        "per_class": {label: {**values[label], "boxes": counts[label]} for label in labels},
        "boxes": sum(counts.values()),
        "detections": len(outputs),
    }


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


def _evaluate(outputs, targets, labels, frame_count, max_detections) -> dict[int, dict]:
    """MEASURES by label; -1 for a class without a real box."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, categories = [{"id": index} for index in range(frame_count)], [{"id": label} for label in labels]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
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
    precision = evaluation.eval["precision"][..., 0, 0].mean(1)  # (IoUs, classes), the mean over 101 recalls
    recall = evaluation.eval["recall"][..., 0, 0].mean(0)  # (classes,)
    columns = (precision[0], precision[5], precision.mean(0), recall)
    rows = (dict(zip(MEASURES, map(float, row), strict=True)) for row in zip(*columns, strict=True))
    return dict(zip(labels, rows, strict=True))
