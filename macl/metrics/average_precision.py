"""COCO average precision of detections against boxes, through pycocotools."""

import contextlib
import io

import numpy as np
import torch

from macl.metrics.frames import check_same_frames, flatten_boxes, flatten_values, to_array

MEASURES = ("ap50", "ap75", "ap", "recall")
MAX_DETECTIONS = 100  # COCO's


def average_precision(
    detections: list[dict], ground_truth: list[dict], *, max_detections: int = MAX_DETECTIONS
) -> dict:
    """Average precision as COCO defines it (Lin et al., "Microsoft COCO", 2014), all as fractions from 0 to 1.

    Both lists hold one dict a frame, in the same order; tensors on any device, arrays or lists.

    * ``detections``: boxes (N, 4) x1, y1, x2, y2 in pixels, labels (N,), scores (N,).
    * ``ground_truth``: boxes (M, 4), labels (M,), ignore (M,) bool, all False where the key is missing. A detection at
      least half (or whatever the IoU threshold is) of whose area lies on an ignored box of its class, and that finds no
      real box, is neither a true nor a false positive: COCO's crowd rule.
    * ``max_detections``: the best of a frame and class that are looked at.

    Returns ap (mean over IoU 0.50:0.05:0.95), ap50, ap75 and recall (the largest recall, mean over the same IoUs), each
    the mean over the classes that have a real box; per_class, the same four and boxes by label; boxes and detections,
    their numbers. Without a real box there is nothing to measure: the four are None, as they are in the entry of a
    class that only has ignored boxes. Detections of a class without any box count nowhere.
    Raises ValueError for lists of unequal length, missing keys and non-finite values.
    """
    check_same_frames(detections, ground_truth)
    ground_truth = [{"ignore": np.zeros(len(frame.get("boxes", ()))), **frame} for frame in ground_truth]
    truth = _coco_annotations(ground_truth, "ignore")
    found = _coco_annotations(detections, "scores")
    labels = sorted({box["category_id"] for box in truth})
    real = {label: sum(box["category_id"] == label and not box["iscrowd"] for box in truth) for label in labels}
    per_class = {label: dict.fromkeys(MEASURES) for label in labels}
    measured = [label for label in labels if real[label]]
    if measured:
        values = _evaluate(found, truth, labels, len(ground_truth), max_detections)
        per_class |= {label: values[label] for label in measured}
    return {
        **{
            name: float(np.mean([per_class[label][name] for label in measured])) if measured else None
            for name in MEASURES
        },
        "per_class": {label: {**per_class[label], "boxes": real[label]} for label in labels},
        "boxes": sum(real.values()),
        "detections": len(found),
    }


def ignore_all_but(ground_truth: list[dict], keep: list) -> list[dict]:
    """The same frames with every box outside the masks ``keep``, one (M,) bool a frame, set to ignore.

    The boxes stay, so that a detection of one of them is no false positive. The given frames are not changed.
    """
    check_same_frames(keep, ground_truth)
    result = []
    for index, (frame, mask) in enumerate(zip(ground_truth, keep, strict=True)):
        outside = to_array(mask).reshape(-1) == 0
        ignore = to_array(frame.get("ignore", np.zeros(len(outside)))).reshape(-1) != 0
        if not len(outside) == len(ignore) == len(frame["boxes"]):
            raise ValueError(f"frame {index} has {len(frame['boxes'])} boxes but a mask of {len(outside)}")
        result.append({**frame, "ignore": torch.from_numpy(ignore | outside)})
    return result


def seen_in(ground_truth: list[dict], *, visible: bool, infrared: bool) -> list[np.ndarray]:
    """Masks (M,) of the boxes whose visible_in (M, 2), visible light then infrared, is exactly this combination.

    ``ignore_all_but(frames, seen_in(frames, visible=True, infrared=False))`` leaves the people that only the visible
    camera shows.
    """
    return [(to_array(frame["visible_in"]).reshape(-1, 2) == (visible, infrared)).all(1) for frame in ground_truth]


def _coco_annotations(frames: list[dict], key: str) -> list[dict]:
    """The boxes as COCO's annotations; ``key`` tells ignore (ground truth) from scores (detections)."""
    boxes, frame = flatten_boxes(frames)
    labels = flatten_values(frames, "labels", frame).astype(int)
    values = flatten_values(frames, key, frame)
    name, values = ("iscrowd", values.astype(int)) if key == "ignore" else ("score", values)
    columns = (boxes.tolist(), boxes[:, 2:].prod(1).tolist(), frame.tolist(), labels.tolist(), values.tolist())
    return [
        # An id of 0 would read as "not matched" inside pycocotools.
        {"id": index, "bbox": box, "area": area, "image_id": image, "category_id": label, "iscrowd": 0, name: value}
        for index, (box, area, image, label, value) in enumerate(zip(*columns, strict=True), 1)
    ]


def _evaluate(found, truth, labels, frame_count, max_detections) -> dict[int, dict]:
    """MEASURES by label; -1 for a class without a real box."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, categories = [{"id": index} for index in range(frame_count)], [{"id": label} for label in labels]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        datasets = []
        for annotations in (truth, found):
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
    return {
        label: {name: float(column[row]) for name, column in zip(MEASURES, columns, strict=True)}
        for row, label in enumerate(labels)
    }
