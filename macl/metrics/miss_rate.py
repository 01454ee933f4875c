"""Log-average miss rate over false positives per image, by the rules of the KAIST pedestrian benchmark.

Dollar et al., "Pedestrian Detection: An Evaluation of the State of the Art" (PAMI 2012), section 3; Hwang et al.,
"Multispectral Pedestrian Detection" (CVPR 2015) for the subsets. Frames are KAIST's, 640 x 512 pixels.
"""

from dataclasses import dataclass

import numpy as np

from macl.metrics.frames import check_same_frames, flatten_boxes, flatten_values

SUBSETS = {  # smallest and largest height in pixels, both included; occlusion levels: 0 none, 1 partial, 2 heavy
    "reasonable": (55, np.inf, (0, 1)),
    "near": (115, np.inf, (0,)),
    "medium": (45, 115, (0,)),
    "far": (1, 45, (0,)),
    "none": (1, np.inf, (0,)),
    "partial": (1, np.inf, (1,)),
    "heavy": (1, np.inf, (2,)),
    "all": (20, np.inf, (0, 1, 2)),
}
DAYTIMES = ("all", "day", "night")
TABLE = [("reasonable", daytime) for daytime in DAYTIMES] + [(name, "all") for name in SUBSETS if name != "reasonable"]
FRAME = (640, 512)  # width, height in pixels of the frames that heights and border are meant for
BORDER = (5, 5, 635, 507)  # a box that leaves this x1, y1, x2, y2 is ignored
REFERENCE_FPPI = 10.0 ** np.linspace(-2, 0, 9)
MIN_OVERLAP = 0.5
MAX_DETECTIONS = 1000  # a frame


def log_average_miss_rate(
    detections: list[dict], ground_truth: list[dict], subset: str = "reasonable", daytime: str = "all"
) -> float | None:
    """Log-average miss rate in percent (lower is better), or None where the subset has no real box.

    Both lists hold one dict a frame, in the same order; tensors on any device, arrays or lists.

    * ``detections``: boxes (N, 4) x1, y1, x2, y2 in pixels of the 640 x 512 frame, scores (N,). A frame without
      detections is one with no rows; all N count as the one class, pedestrian, whatever their labels.
    * ``ground_truth``: boxes (M, 4), ignore (M,) bool, occlusion (M,) 0 none, 1 partial, 2 heavy; and daytime, a bool,
      when ``daytime`` is not "all". Frames without boxes count in the false positives per image.
    * ``subset``: reasonable, near, medium, far, none, partial, heavy or all; ``daytime``: all, day or night.

    The miss rate is read at nine points, 10^-2 to 10^0 false positives per image evenly in log space, and averaged
    geometrically. Raises ValueError for an unknown subset or daytime, missing keys and non-finite values.
    """
    return miss_rate_curve(detections, ground_truth, subset, daytime)["log_average_miss_rate"]


def miss_rate_curve(
    detections: list[dict], ground_truth: list[dict], subset: str = "reasonable", daytime: str = "all"
) -> dict:
    """The curve behind log_average_miss_rate, which describes the arguments.

    Returns fppi (P,) and miss_rate (P,) float64 arrays, one point a counted detection by falling score, miss rates in
    percent; log_average_miss_rate and the final recall in percent (None where there is no real box, and then the
    arrays are empty); boxes, the number of real ones; frames.
    """
    return _curve(_match_table(detections, ground_truth), subset, daytime)


def miss_rate_table(detections: list[dict], ground_truth: list[dict]) -> dict[str, dict]:
    """The ten customary rows, which share one computation of the overlaps; arguments as log_average_miss_rate.

    Returns "reasonable all", "reasonable day", "reasonable night", "near", "medium", "far", "none", "partial", "heavy"
    and "all", each a dict of miss_rate and recall in percent (None without a real box), boxes and frames.
    """
    table = _match_table(detections, ground_truth)
    rows = {}
    for subset, daytime in TABLE:
        curve = _curve(table, subset, daytime)
        rows[f"{subset} {daytime}" if subset == "reasonable" else subset] = {
            "miss_rate": curve["log_average_miss_rate"],
            **{key: curve[key] for key in ("recall", "boxes", "frames")},
        }
    return rows


@dataclass
class _MatchTable:
    """What every subset shares: D detections by falling score, G boxes, and the P pairs that overlap enough.

    Pairs are ordered by detection, then by falling overlap, then by falling box index, so that of two boxes with the
    same overlap the later one comes first.
    """

    detection_frame: np.ndarray  # (D,)
    boxes: np.ndarray  # (G, 4) x, y, w, h
    box_frame: np.ndarray  # (G,)
    ignore: np.ndarray  # (G,) bool
    occlusion: np.ndarray  # (G,)
    daytime: list  # one bool a frame, None where it is not given
    pair_detection: np.ndarray  # (P,)
    pair_box: np.ndarray  # (P,)
    pair_iou: np.ndarray  # (P,) overlap with a real box
    pair_coverage: np.ndarray  # (P,) intersection / detection area, overlap with an ignored box


def _match_table(detections, ground_truth) -> _MatchTable:
    check_same_frames(detections, ground_truth)
    boxes, box_frame = flatten_boxes(ground_truth)
    ignore = flatten_values(ground_truth, "ignore", box_frame) != 0
    occlusion = flatten_values(ground_truth, "occlusion", box_frame)
    detected, detection_frame = flatten_boxes(detections)
    scores = flatten_values(detections, "scores", detection_frame)
    order = _by_score(scores, detection_frame)
    detected, detection_frame = detected[order], detection_frame[order]

    # Every detection beside every box of its own frame, without a loop: boxes lie in frame order.
    count = np.bincount(box_frame, minlength=len(ground_truth))
    beside = count[detection_frame]
    first_box = (np.cumsum(count) - count)[detection_frame]
    detection = np.repeat(np.arange(len(detected)), beside)  # (P,)
    box = np.arange(len(detection)) - np.repeat(np.cumsum(beside) - beside - first_box, beside)  # (P,)
    iou, coverage = _overlaps(detected[detection], boxes[box])
    near = (iou >= MIN_OVERLAP) | (coverage >= MIN_OVERLAP)
    detection, box, iou, coverage = detection[near], box[near], iou[near], coverage[near]
    order = np.lexsort((-box, -iou, detection))
    return _MatchTable(
        detection_frame=detection_frame,
        boxes=boxes,
        box_frame=box_frame,
        ignore=ignore,
        occlusion=occlusion,
        daytime=[frame.get("daytime") for frame in ground_truth],
        pair_detection=detection[order],
        pair_box=box[order],
        pair_iou=iou[order],
        pair_coverage=coverage[order],
    )


def _by_score(scores: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Indices by falling score, equal scores in the given order, at most MAX_DETECTIONS of a frame."""
    order = np.argsort(-scores, kind="stable")
    by_frame = np.argsort(frame[order], kind="stable")
    count = np.bincount(frame)
    rank = np.empty(len(order), int)
    rank[by_frame] = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    return order[rank < MAX_DETECTIONS]


def _overlaps(detected: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and intersection / detection area of (P, 4) pairs of x, y, w, h; a box of no area overlaps nothing."""
    low = np.maximum(detected[:, :2], boxes[:, :2])
    high = np.minimum(detected[:, :2] + detected[:, 2:], boxes[:, :2] + boxes[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(1)
    area = detected[:, 2] * detected[:, 3]
    union = area + boxes[:, 2] * boxes[:, 3] - intersection
    touching = intersection > 0
    iou, coverage = np.zeros(len(area)), np.zeros(len(area))
    np.divide(intersection, union, out=iou, where=touching)
    np.divide(intersection, area, out=coverage, where=touching)
    return iou, coverage


def _curve(table: _MatchTable, subset: str, daytime: str) -> dict:
    frames = _frames_of(table, daytime)
    real = ~_ignored(table, subset)
    boxes = int((real & frames[table.box_frame]).sum())
    on_real = (table.pair_iou >= MIN_OVERLAP) & real[table.pair_box]
    on_ignored = (table.pair_coverage >= MIN_OVERLAP) & ~real[table.pair_box]
    hit = np.zeros(len(table.detection_frame), bool)
    hit[_greedy_matches(table.pair_detection[on_real], table.pair_box[on_real])] = True
    dropped = np.zeros(len(hit), bool)
    dropped[table.pair_detection[on_ignored]] = True
    hit = hit[frames[table.detection_frame] & (hit | ~dropped)]

    result = {"boxes": boxes, "frames": int(frames.sum()), "log_average_miss_rate": None, "recall": None}
    if boxes == 0:
        return {"fppi": np.zeros(0), "miss_rate": np.zeros(0), **result}
    fppi = np.cumsum(~hit) / result["frames"]
    recall = np.concatenate([[0.0], np.cumsum(hit) / boxes])  # before the first detection nothing is found
    at_reference = recall[np.searchsorted(fppi, REFERENCE_FPPI, side="right")]
    result["log_average_miss_rate"] = float(100 * np.exp(np.log(np.maximum(1e-10, 1 - at_reference)).mean()))
    result["recall"] = float(100 * recall[-1])
    return {"fppi": fppi, "miss_rate": 100 * (1 - recall[1:]), **result}


def _frames_of(table: _MatchTable, daytime: str) -> np.ndarray:
    if daytime not in DAYTIMES:
        raise ValueError(f"daytime is {daytime!r}, expected one of {', '.join(DAYTIMES)}")
    if daytime == "all":
        return np.ones(len(table.daytime), bool)
    if None in table.daytime:
        raise ValueError(f"frame {table.daytime.index(None)} has no 'daytime'")
    return np.array([bool(day) == (daytime == "day") for day in table.daytime], bool)


def _ignored(table: _MatchTable, subset: str) -> np.ndarray:
    if subset not in SUBSETS:
        raise ValueError(f"subset is {subset!r}, expected one of {', '.join(SUBSETS)}")
    low, high, occlusions = SUBSETS[subset]
    x, y, width, height = table.boxes.T
    left, top, right, bottom = BORDER
    inside = (x >= left) & (y >= top) & (x + width <= right) & (y + height <= bottom)
    wanted = (height >= low) & (height <= high) & np.isin(table.occlusion, occlusions)
    return table.ignore | ~inside | ~wanted


def _greedy_matches(detection: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The detections that get a box when each in turn takes the best one still free.

    Pairs (P,) come ordered by detection and by preference within one. Rather than one detection after the other, all
    ask for their favourite at once, each box keeps the first detection that asks, and the others lose that wish:
    deferred acceptance, which with one ranking of detections for all boxes ends in the same matches.
    """
    while True:
        favourite = np.flatnonzero(np.diff(detection, prepend=-1))  # the first pair left of each detection
        kept = favourite[np.unique(box[favourite], return_index=True)[1]]
        if len(kept) == len(favourite):
            return detection[kept]
        lost = np.setdiff1d(favourite, kept)
        detection, box = np.delete(detection, lost), np.delete(box, lost)
