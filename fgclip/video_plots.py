"""Pictures of what a model says of videos: the score over time, the events, and the frames at the highest peaks."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from fgclip.video.metrics import ALARM, VideoScores, by_frame, frame_auc
from fgclip.video.model import NORMAL
from fgclip.video.records import VideoSet
from trainkit.errors import InputError
from trainkit.files import whole_file

WIDTH, HEIGHT, DOTS = 11, 3.3, 90  # inches of a strip, and dots per inch
MOST_STRIPS = 200  # in one picture
TICKS = (0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)  # seconds
# A video, its title, and the times (s) of its peaks with the pictures (H, W, 3) uint8 there.
Strip = tuple[VideoScores, str, Sequence[tuple[float, np.ndarray]]]


def need_matplotlib() -> None:
    """Raises InputError where it is missing: call it before hours of work that end in a picture."""
    if find_spec("matplotlib") is None:
        raise InputError('pictures of scores need matplotlib: pip install "macl-fgclip[viz]"')


def clock(seconds: float) -> str:
    """1:02:03 or 2:03, and 0:03.2 where there are tenths."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    start = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else str(minutes)
    return f"{start}:{tenths // 10:02}" + f".{tenths % 10}" * (tenths % 10 > 0)


def peaks(scores: np.ndarray, count: int) -> list[int]:
    """At most `count` clips (T,) that score as high as both neighbours, highest first, none near a higher one. Near is
    T / (4 count) clips: in a long video, or where they are few, they are further apart."""
    apart, found = max(1, len(scores) // (4 * count)), []
    neighbours = np.maximum(np.append(scores[1:], -np.inf), np.append(-np.inf, scores[:-1]))
    free = np.where(scores >= neighbours, scores, -np.inf)
    while len(found) < count and np.isfinite(free).any():
        found.append(best := int(np.argmax(free)))
        free[max(0, best - apart) : best + apart + 1] = -np.inf
    return found


def time_of(video: VideoScores, clip: int) -> float:
    """When the middle of a clip is shown, in s."""
    return float(min(clip * video.clip_frames + video.clip_frames // 2, video.frames - 1) / video.rate)


def best_and_worst(videos: Sequence[VideoScores]) -> list[VideoScores]:
    """Of each class the two videos of the best own AUC and the two of the worst; MOST_STRIPS in all. Normal videos are
    ranked by their peaks, low ones first; videos of unknown events by theirs, high ones first."""
    chosen = []
    for kind in sorted({video.classes[:1] for video in videos}):
        some = [video for video in videos if video.classes[:1] == kind]
        own = [frame_auc(*by_frame([v])) if v.events else v.scores.max() * (1 if kind else -1) for v in some]
        ranked = [some[i] for i in np.argsort(-np.nan_to_num(own), kind="stable")]
        chosen += ranked[:2] + ranked[2:][-2:]
    return chosen[:MOST_STRIPS]


def draw(path: str | Path, scores: list[VideoScores], videos: VideoSet) -> None:
    """A png of the best and the worst videos of each class, with frames at the four highest peaks."""
    strips, records = [], {record.name: record for record in videos.records}
    for one in best_and_worst(scores):
        title = f"{one.name}: {', '.join(one.classes) or NORMAL}"
        title += f", AUC {frame_auc(*by_frame([one])):.3f}" if one.events else ""
        times = [time_of(one, clip) for clip in peaks(one.scores, 4)]
        pictures = [] if one.name in videos.missing else videos.open(records[one.name]).at(times)
        small = [np.asarray(Image.fromarray(p).reduce(max(1, max(p.shape) // 240))) for p in pictures]
        strips.append((one, title, list(zip(times, small, strict=bool(small)))))
    draw_curves(path, strips)


def draw_curves(path: str | Path, strips: Sequence[Strip]) -> None:
    """Write a png: of each video the score over time, its events shaded, and the pictures at its peaks."""
    from matplotlib.figure import Figure

    figure, columns = Figure((WIDTH, HEIGHT * len(strips)), DOTS), max(4, *(len(seen) for *_, seen in strips), 0)
    border = 0.4 / figure.get_figheight()
    sides = dict(left=0.05, right=0.98, bottom=border / 4, top=1 - border)
    grid = figure.add_gridspec(2 * len(strips), columns, **sides, hspace=0.5, wspace=0.05)
    for i, (video, title, seen) in enumerate(strips):
        draw_curve(figure.add_subplot(grid[2 * i, :]), video, title, [time for time, _ in seen])
        for column, (time, picture) in enumerate(sorted(seen, key=lambda peak: peak[0])):
            axes = figure.add_subplot(grid[2 * i + 1, column], anchor="NW")
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(clock(time), fontsize=8, loc="left", pad=2)
    with whole_file(path) as file:
        figure.savefig(file, format="png")


def draw_curve(axes, video: VideoScores, title: str, marks: Sequence[float]) -> None:
    """The score over time, events shaded, a dot at each of the times `marks` (s)."""
    rate = float(video.rate)
    edges = np.minimum(np.arange(len(video.scores) + 1) * video.clip_frames, video.frames) / rate
    for start, end, _ in video.events or ():
        axes.axvspan(start / rate, min(end, video.frames) / rate, color="C1", alpha=0.3, lw=0)
    axes.stairs(video.scores, edges, baseline=None, color="C0", zorder=3)
    axes.plot(marks, video.scores[np.searchsorted(edges, marks, side="right") - 1], "o", color="C3", ms=4, zorder=4)
    axes.axhline(ALARM, color="gray", lw=0.5, ls=":")
    ticks = np.arange(0, edges[-1] + 1e-9, next((tick for tick in TICKS if edges[-1] / tick <= 12), TICKS[-1]))
    axes.set(xlim=(0, edges[-1]), ylim=(-0.03, 1.03), yticks=(0, 0.5, 1))
    axes.set_xticks(ticks, [clock(tick) for tick in ticks])
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
