"""Lists of dicts, one per frame, as flat arrays."""

import numpy as np
import torch


def flatten(frames: list[dict], *keys: str) -> tuple[np.ndarray, ...]:
    """All boxes (N, 4) as x, y, width, height, the frame of each (N,) int64, and per key one value of each (N,).

    frames: boxes (n, 4) x1, y1, x2, y2 and the keys (n,); tensors on any device, arrays or lists. Values are float64.
    Raises ValueError for unequal lengths and values that are not finite.
    """
    counts = [len(frame["boxes"]) for frame in frames]
    columns = []
    for key in ("boxes", *keys):
        parts = [np.zeros(0)]
        for index, frame in enumerate(frames):
            values = torch.as_tensor(frame[key], dtype=torch.float64).detach().cpu().numpy()
            if len(values) != counts[index]:
                raise ValueError(f"frame {index} has {counts[index]} boxes but {len(values)} {key}")
            if not np.isfinite(values).all():
                raise ValueError(f"frame {index} has {key} that are not finite")
            parts.append(values.ravel())
        columns.append(np.concatenate(parts))
    boxes = columns[0].reshape(-1, 4)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    return boxes, np.repeat(np.arange(len(frames)), counts), *columns[1:]
