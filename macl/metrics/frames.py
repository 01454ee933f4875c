"""Detections and ground truth as lists of dicts, one a frame, turned into flat float64 arrays."""

import numpy as np
import torch


def check_same_frames(detections: list[dict], ground_truth: list[dict]) -> None:
    """Raise ValueError unless both lists hold the same number of frames."""
    if len(detections) != len(ground_truth):
        raise ValueError(f"{len(detections)} frames of detections for {len(ground_truth)} frames of ground truth")


def flatten_boxes(frames: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """All boxes as x, y, width, height (N, 4) float64, and the frame each belongs to (N,) int64.

    ``frames[i]["boxes"]`` is (n_i, 4) x1, y1, x2, y2: a tensor on any device, an array or a list.
    """
    boxes = [_array(frame, index, "boxes").reshape(-1, 4) for index, frame in enumerate(frames)]
    flat = np.concatenate(boxes) if boxes else np.zeros((0, 4))  # (N, 4)
    frame = np.repeat(np.arange(len(frames)), [len(box) for box in boxes])
    if not np.isfinite(flat).all():
        raise ValueError(f"a box of frame {frame[~np.isfinite(flat).all(1)][0]} is not finite")
    return np.concatenate([flat[:, :2], flat[:, 2:] - flat[:, :2]], 1), frame


def flatten_values(frames: list[dict], key: str, frame: np.ndarray) -> np.ndarray:
    """One value a box, (N,) float64; ``frame`` is what flatten_boxes returned for the same frames."""
    values = [_array(item, index, key).reshape(-1) for index, item in enumerate(frames)]
    flat = np.concatenate(values) if values else np.zeros(0)  # (N,)
    counts = np.bincount(frame, minlength=len(frames))
    for index, value in enumerate(values):
        if len(value) != counts[index]:
            raise ValueError(f"frame {index} has {counts[index]} boxes but {len(value)} {key}")
    if not np.isfinite(flat).all():
        raise ValueError(f"{key!r} of frame {frame[~np.isfinite(flat)][0]} is not finite")
    return flat


def to_array(values) -> np.ndarray:
    """A tensor on any device, an array or a list as a float64 array."""
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _array(frame: dict, index: int, key: str) -> np.ndarray:
    if key not in frame:
        raise ValueError(f"frame {index} has no {key!r}, only {', '.join(sorted(frame))}")
    return to_array(frame[key])
