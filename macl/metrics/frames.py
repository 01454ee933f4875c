"""Lists of dicts, one per frame, as flat arrays."""

import numpy as np
import torch


def check_same_frames(detections: list[dict], ground_truth: list[dict]) -> None:
    """Raise ValueError unless both lists hold the same number of frames."""
    if len(detections) != len(ground_truth):
        raise ValueError(f"{len(detections)} frames of detections for {len(ground_truth)} frames of ground truth")


def flatten(frames: list[dict], *keys: str) -> tuple[np.ndarray, ...]:
    """All boxes (N, 4) as x, y, width, height, the frame of each (N,) int64, and per key one value of each (N,).

    frames: boxes (n, 4) x1, y1, x2, y2 and the keys (n,); tensors on any device, arrays or lists. Values are float64.
    Raises ValueError for missing keys, unequal lengths and values that are not finite.
    """
    columns = {"boxes": [np.zeros((0, 4))], **{key: [np.zeros(0)] for key in keys}}
    counts = []
    for index, frame in enumerate(frames):
        for key, column in columns.items():
            if key not in frame:
                raise ValueError(f"frame {index} has no {key!r}, only {', '.join(sorted(frame))}")
            values = torch.as_tensor(frame[key], dtype=torch.float64).detach().cpu().numpy()
            values = values.reshape(-1, *column[0].shape[1:])
            if not np.isfinite(values).all():
                raise ValueError(f"frame {index} has {key} that are not finite")
            column.append(values)
        counts.append(len(columns["boxes"][-1]))
        for key in keys:
            if len(columns[key][-1]) != counts[-1]:
                raise ValueError(f"frame {index} has {counts[-1]} boxes but {len(columns[key][-1])} {key}")
    boxes, *values = (np.concatenate(column) for column in columns.values())
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    return boxes, np.repeat(np.arange(len(frames)), counts), *values
