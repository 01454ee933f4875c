"""Pictures of scores over time: one strip per video, with frames at its peaks below. They need the ``viz`` extra."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fgclip.video.metrics import ALARM, VideoScores, frame_auc
from trainkit.errors import InputError
from trainkit.files import whole_file

WIDTH, TITLE, CURVE, TIMES, FRAMES, SIDE = 11, 0.45, 1.1, 0.35, 1.15, 0.6  # inches of a strip, and beside its curve
DOTS = 90  # per inch
MOST_STRIPS = 200  # in one picture
MOST_STEPS = 2000  # of a curve; of more the highest score of each stretch is drawn
TICKS = (0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)  # seconds


@dataclass(frozen=True)
class Strip:
    """A video, its title, and the frames (H, W, 3) uint8 at the times (s) of its peaks."""

    video: VideoScores
    title: str
    peaks: Sequence[tuple[float, np.ndarray]] = ()


def need_matplotlib() -> None:
    """Raises InputError where it is missing: call it before hours of work that end in a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('pictures of scores need matplotlib: pip install "macl-fgclip[viz]"') from error


def clock(seconds: float) -> str:
    """1:02:03 or 2:03, and 0:03.2 where there are tenths."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:{minutes:02}" if hours else str(minutes)
    return f"{start}:{tenths // 10:02}" + (f".{tenths % 10}" if tenths % 10 else "")


def peaks(scores: np.ndarray, count: int) -> list[int]:
    """At most `count` clips that score as high as both neighbours (T,), highest first, none near a higher one.

    Near is T / (4 count) clips: those of a long video, or few of them, are further apart.
    """
    apart, found = max(1, len(scores) // (4 * count)), []
    higher = np.maximum(np.append(scores[1:], -np.inf), np.append(-np.inf, scores[:-1]))  # of the neighbours
    free = np.where(scores >= higher, scores, -np.inf)
    while len(found) < count and np.isfinite(free).any():
        found.append(best := int(np.argmax(free)))
        free[max(0, best - apart) : best + apart + 1] = -np.inf
    return found


def time_of(video: VideoScores, clip: int) -> float:
    """When the middle of a clip is shown, in s."""
    return float(min(clip * video.clip_frames + video.clip_frames // 2, video.frames - 1) / video.rate)


def best_and_worst(videos: Sequence[VideoScores], each: int = 4) -> list[VideoScores]:
    """Of each class `each` videos, half those with the best AUC of their own and half those with the worst; normal ones
    by the lowest and highest peak. Where it is not known when events are, they are ranked by their peaks, too."""
    chosen = []
    for kind in sorted({v.classes[:1] for v in videos}):
        some = [v for v in videos if v.classes[:1] == kind]
        own = [frame_auc(v.scores, *v.counts) if v.events else v.scores.max() * (1 if kind else -1) for v in some]
        ranked = [some[i] for i in np.argsort(-np.nan_to_num(own), kind="stable")]
        chosen += ranked if len(ranked) <= each else [*ranked[: each - each // 2], *ranked[-(each // 2) :]]
    return chosen[:MOST_STRIPS]


def draw_curves(path: str | Path, strips: Sequence[Strip]) -> None:
    """Write a png: of each video the score over time, its events shaded, and the frames at its peaks."""
    need_matplotlib()
    from matplotlib.figure import Figure

    heights = [TITLE + CURVE + TIMES + FRAMES * bool(strip.peaks) for strip in strips]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DOTS)

    def axes(left: float, top: float, width: float, height: float):
        """In inches from the upper left corner."""
        return figure.add_axes((left / WIDTH, 1 - (top + height) / sum(heights), width / WIDTH, height / sum(heights)))

    for strip, top in zip(strips, np.cumsum([0, *heights]), strict=False):
        draw_curve(axes(SIDE, top + TITLE, WIDTH - 1.5 * SIDE, CURVE), strip)
        room = (WIDTH - 1.5 * SIDE) / max(4, len(strip.peaks))
        for place, (time, picture) in enumerate(sorted(strip.peaks, key=lambda peak: peak[0])):
            frame = axes(SIDE + place * room, top + TITLE + CURVE + TIMES, 0.95 * room, FRAMES - 0.25)
            frame.imshow(thumbnail(picture))
            frame.set_anchor("W")
            frame.set_axis_off()
            frame.text(0, -0.03, clock(time), transform=frame.transAxes, fontsize=8, va="top")
    with whole_file(path) as file:
        figure.savefig(file, format="png")


def draw_curve(axes, strip: Strip) -> None:
    video = strip.video
    edges = np.minimum(np.arange(len(video.scores) + 1) * video.clip_frames, video.frames) / float(video.rate)
    starts = np.arange(0, len(video.scores), -(-len(video.scores) // MOST_STEPS))
    axes.stairs(np.maximum.reduceat(video.scores, starts), np.append(edges[starts], edges[-1]), color="C0", lw=1.2)
    for start, end, _ in video.events or ():
        axes.axvspan(start / float(video.rate), min(end, video.frames) / float(video.rate), color="C1", alpha=0.3, lw=0)
    for time, _ in strip.peaks:
        axes.plot(time, video.scores[int(time * video.rate + 0.5) // video.clip_frames], "o", color="C3", ms=4)
    axes.axhline(ALARM, color="gray", lw=0.5, ls=":")
    step = next((tick for tick in TICKS if edges[-1] / tick <= 12), TICKS[-1])
    ticks = np.arange(0, edges[-1] + 1e-9, step)
    axes.set(xlim=(0, edges[-1]), ylim=(-0.02, 1.02), xticks=ticks, yticks=(0, 0.5, 1))
    axes.set_xticklabels(map(clock, ticks), fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(strip.title.replace("$", r"\$"), fontsize=10, loc="left")


def thumbnail(picture: np.ndarray, side: int = 240) -> np.ndarray:
    """A picture of at most `side` pixels a side, its shape kept."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    return np.asarray(image)
