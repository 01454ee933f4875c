"""Pictures of scores over time: one strip per video, with frames at its peaks below. They need the ``viz`` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fgclip.video.metrics import ALARM, VideoScores, frame_auc
from trainkit.errors import InputError
from trainkit.files import whole_file

WIDTH, CURVE, FRAMES, MARGIN = 11, 1.1, 1.15, 0.55  # inches of a strip: its width, its curve, its frames, its texts
MAX_POINTS = 2000  # of a curve; beyond them the highest score of each stretch is drawn
TICKS = (0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)  # seconds


def need_matplotlib() -> None:
    """Raises InputError where it is missing: call it before hours of work that end in a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('pictures of scores need matplotlib: pip install "macl-fgclip[viz]"') from error


def clock(seconds: float) -> str:
    """1:02:03 or 2:03, and 0:03.2 where there are tenths."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:{minutes:02}" if hours else str(minutes)
    return f"{start}:{rest // 10:02}" + (f".{rest % 10}" if rest % 10 else "")


def peaks(scores: np.ndarray, count: int, apart: int) -> list[int]:
    """At most `count` clips of the highest scores (T,), each at least `apart` clips from the others, highest first."""
    free, found = np.array(scores, dtype=float), []
    while len(found) < count and np.isfinite(free).any():
        found.append(best := int(np.argmax(free)))
        free[max(0, best - apart + 1) : best + apart] = -np.inf
    return found


def best_and_worst(videos: Sequence[VideoScores], each: int = 4) -> list[VideoScores]:
    """Of each class `each` videos, half with the best AUC of their own and half with the worst, and so many normals,
    half with the lowest peak and half with the highest. Videos of unknown events are left out."""
    own = {v.name: frame_auc(v.scores, *v.counts) if v.classes else -v.scores.max() for v in videos if v.known}
    result = {}
    for kind in sorted({v.classes[:1] for v in videos}):
        ranked = sorted((v for v in videos if v.classes[:1] == kind and v.name in own), key=lambda v: -own[v.name])
        result |= {v.name: v for v in (ranked if len(ranked) <= each else [*ranked[: each // 2], *ranked[-each // 2 :]])}
    return list(result.values())


def draw_curves(
    path: str | Path, videos: Sequence[VideoScores], pictures: Mapping[str, Sequence[tuple[float, np.ndarray]]]
) -> None:
    """Write a png: a strip per video of its score over time, its events shaded, its class and own AUC above.

    pictures: by a video's name the time (s) of its peaks and the frame (H, W, 3) uint8 shown there.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    sizes = [part for v in videos for part in (MARGIN, CURVE, FRAMES if pictures.get(v.name) else 0.01)]
    figure = Figure(figsize=(WIDTH, sum(sizes)))
    bottom = np.cumsum(sizes[::-1])[::-1] - sizes  # inches of each part above the lower edge
    for place, video in enumerate(videos):
        ...
'''
