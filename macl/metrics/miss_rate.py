"""Log-average miss rate over false positives per image, by the rules of the KAIST pedestrian benchmark.

Dollar et al., "Pedestrian Detection: An Evaluation of the State of the Art" (PAMI 2012), section 3; Hwang et al.,
"Multispectral Pedestrian Detection" (CVPR 2015) for the subsets. Frames are KAIST's, 640 x 512 pixels.
"""

import numpy as np

from macl.metrics.frames import flatten

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
DAYTIMES = {"all": None, "day": True, "night": False}
TABLE = [("reasonable", daytime) for daytime in DAYTIMES] + [(name, "all") for name in SUBSETS if name != "reasonable"]
FRAME = (640, 512)  # width, height in pixels
BORDER = (5, 5, 635, 507)  # a box that leaves this x1, y1, x2, y2 is ignored
REFERENCE_FPPI = 10.0 ** np.linspace(-2, 0, 9)
SCRIPT_FPPI = REFERENCE_FPPI.round(4)
MIN_OVERLAP = 0.5
MAX_DETECTIONS = 1000  # per frame


def miss_rate_curve(
    detections: list[dict], ground_truth: list[dict], subset: str = "reasonable", daytime: str = "all"
) -> dict:
    """Miss rate over false positives per image, and its log-average.

    Both lists hold one dict per frame, in the same order; tensors on any device, arrays or lists.

    detections: boxes (N, 4) x1, y1, x2, y2 in pixels of the 640 x 512 frame, scores (N,); all count as pedestrians
    ground_truth: boxes (M, 4), ignore (M,) bool, occlusion (M,) 0 none, 1 partial, 2 heavy; and daytime, a bool, unless
        `daytime` is "all". Frames without boxes count in the false positives per image.
    subset: reasonable, near, medium, far, none, partial, heavy or all
    daytime: all, day or night

    Returns fppi (P,) and miss_rate (P,) float64 arrays, one point per counted detection by falling score, miss rates in
    percent; log_average_miss_rate and the final recall in percent (None where there is no real box, and then the
    arrays are empty); boxes, the number of real ones; frames. For the log-average the miss rate is read at nine points,
    10^-2 to 10^0 false positives per image evenly in log space, and averaged geometrically.

    Raises KeyError for an unknown subset or daytime, and ValueError for values that are not finite.
    """
    return _Matches(detections, ground_truth).curve(subset, daytime)


def log_average_miss_rate(
    detections: list[dict], ground_truth: list[dict], subset: str = "reasonable", daytime: str = "all"
) -> float | None:
    """The log-average miss rate of `miss_rate_curve`, in percent (lower is better); None without a real box."""
    return miss_rate_curve(detections, ground_truth, subset, daytime)["log_average_miss_rate"]


def miss_rate_by_script(detections: list[dict], ground_truth: list[dict]) -> dict[str, float | None]:
    """What the Python script of MLPD (Kim et al., 2021), in use with many papers since, gives for "reasonable".

    Arguments as miss_rate_curve. It departs from the benchmark's MATLAB code in three ways: people of frames without a
    detection are not counted as missed; where the first detection lies beyond a reference point, the final recall is
    read there; reference points have four decimals.

    Returns the rates by daytime, in percent; None without a real box.
    """
    found = [len(frame["boxes"]) > 0 for frame in detections]
    rates, matches = {}, _Matches(detections, ground_truth)
    for daytime in DAYTIMES:
        curve = matches.curve("reasonable", daytime, counted=np.array(found, bool))
        miss = curve["miss_rate"]
        at_reference = miss[np.searchsorted(curve["fppi"], SCRIPT_FPPI, side="right") - 1] if len(miss) else miss
        with np.errstate(divide="ignore"):  # nothing missed: the script's logarithm is -inf, its rate 0
            rates[daytime] = float(np.exp(np.log(at_reference).mean())) if len(miss) else None
    return rates


def row_name(subset: str, daytime: str) -> str:
    return f"{subset} {daytime}" if subset == "reasonable" else subset


def miss_rate_table(detections: list[dict], ground_truth: list[dict], table: list = TABLE) -> dict[str, dict]:
    """The rows of `table`, (subset, daytime) each, the ten customary ones; arguments as miss_rate_curve.

    Returns "reasonable all", "reasonable day", "reasonable night", "near", "medium", "far", "none", "partial", "heavy"
    and "all", each a dict of miss_rate and recall in percent (None without a real box), boxes and frames.
    """
    matches = _Matches(detections, ground_truth)
    rows = {}
    for subset, daytime in table:
        curve = matches.curve(subset, daytime)
        row = {key: curve[key] for key in ("recall", "boxes", "frames")}
        rows[row_name(subset, daytime)] = {"miss_rate": curve["log_average_miss_rate"]} | row
    return rows


class _Matches:
    """What every subset shares: D detections by falling score, G boxes, and the P pairs that overlap enough."""

    def __init__(self, detections: list[dict], ground_truth: list[dict]):
        if len(detections) != len(ground_truth):
            raise ValueError(f"{len(detections)} frames of detections for {len(ground_truth)} frames of ground truth")
        self.ground_truth = ground_truth
        self.boxes, self.box_frame, ignore, self.occlusion = flatten(ground_truth, "ignore", "occlusion")  # (G, ...)
        self.ignore = ignore != 0
        detected, frame, scores = flatten(detections, "scores")
        order = np.lexsort((-scores, frame))  # equal scores keep their order
        rank = np.arange(len(order)) - np.searchsorted(frame, frame)  # of a detection in its frame
        order = order[rank < MAX_DETECTIONS]
        order = order[np.argsort(-scores[order], kind="stable")]
        self.detection_frame = frame[order]  # (D,)

        # Every detection beside every box of its own frame, without a loop: boxes lie in frame order.
        first_box = np.searchsorted(self.box_frame, self.detection_frame)
        beside = np.searchsorted(self.box_frame, self.detection_frame, side="right") - first_box
        detection = np.repeat(np.arange(len(order)), beside)  # (P,)
        box = np.arange(len(detection)) - np.repeat(np.cumsum(beside) - beside - first_box, beside)  # (P,)
        iou, coverage = _overlaps(detected[order][detection], self.boxes[box])
        pairs = np.flatnonzero((iou >= MIN_OVERLAP) | (coverage >= MIN_OVERLAP))
        # By detection, then by falling overlap; of two boxes with the same overlap the later one comes first.
        pairs = pairs[np.lexsort((-box[pairs], -iou[pairs], detection[pairs]))]
        self.detection, self.box, self.iou, self.coverage = (x[pairs] for x in (detection, box, iou, coverage))  # (P,)

    def curve(self, subset: str, daytime: str, counted: np.ndarray | bool = True) -> dict:
        """What miss_rate_curve returns. counted: (frames,) bool, those whose boxes are; the others stay in the rate."""
        frames = np.ones(len(self.ground_truth), bool)  # those that count
        if daytime != "all":
            frames[:] = [bool(frame["daytime"]) == DAYTIMES[daytime] for frame in self.ground_truth]
        low, high, occlusions = SUBSETS[subset]
        x, y, width, height = self.boxes.T
        inside = (x >= BORDER[0]) & (y >= BORDER[1]) & (x + width <= BORDER[2]) & (y + height <= BORDER[3])
        wanted = (height >= low) & (height <= high) & np.isin(self.occlusion, occlusions)
        real = ~self.ignore & inside & wanted  # (G,)
        boxes = int((real & (frames & counted)[self.box_frame]).sum())

        # Each detection in turn takes the real box that it overlaps most of those still free.
        on_real = (self.iou >= MIN_OVERLAP) & real[self.box]
        matched, taken = set(), set()
        for detection, box in zip(self.detection[on_real].tolist(), self.box[on_real].tolist(), strict=True):
            if detection not in matched and box not in taken:
                matched.add(detection)
                taken.add(box)
        hit, dropped = np.zeros((2, len(self.detection_frame)), bool)
        hit[list(matched)] = True
        dropped[self.detection[(self.coverage >= MIN_OVERLAP) & ~real[self.box]]] = True
        hit = hit[frames[self.detection_frame] & (hit | ~dropped)]

        result = {"boxes": boxes, "frames": int(frames.sum()), "log_average_miss_rate": None, "recall": None}
        if boxes == 0:
            return {"fppi": np.zeros(0), "miss_rate": np.zeros(0), **result}
        fppi = np.cumsum(~hit) / result["frames"]
        recall = np.concatenate([[0.0], np.cumsum(hit) / boxes])  # before the first detection nothing is found
        at_reference = recall[np.searchsorted(fppi, REFERENCE_FPPI, side="right")]
        result["log_average_miss_rate"] = float(100 * np.exp(np.log(np.maximum(1e-10, 1 - at_reference)).mean()))
        result["recall"] = float(100 * recall[-1])
        return {"fppi": fppi, "miss_rate": 100 * (1 - recall[1:]), **result}


def _overlaps(detected: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and intersection / detection area of (P, 4) pairs of x, y, w, h; a box of no area overlaps nothing."""
    low = np.maximum(detected[:, :2], boxes[:, :2])
    high = np.minimum(detected[:, :2] + detected[:, 2:], boxes[:, :2] + boxes[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(1)
    area = detected[:, 2] * detected[:, 3]
    union = area + boxes[:, 2] * boxes[:, 3] - intersection
    touching = intersection > 0
    iou, coverage = np.zeros((2, len(area)))
    np.divide(intersection, union, out=iou, where=touching)
    np.divide(intersection, area, out=coverage, where=touching)
    return iou, coverage
