"""Evaluate a model of train_video.py: frames, detections and classes of events in videos.

python -m fgclip.evaluate_video --checkpoint runs/NAME/best.pt                                  # newly drawn videos
python -m fgclip.evaluate_video --checkpoint runs/NAME/best.pt --data-root UCF_Crimes --features features
python -m fgclip.evaluate_video --checkpoint runs/NAME/best.pt --data-root XD --format xd-violence --plot curves.png

The test videos of --data-root, whose features are extracted where --features lacks them. All figures stand beside those
of who knows nothing but which videos have an event.
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fgclip.video.features import ClipEncoder, FeatureStore, extract, refuse_lost
from fgclip.video.metrics import ALARM, VideoScores, anomaly_report, by_frame, frame_auc, report_text
from fgclip.video.model import NORMAL, VideoModel, load_video_model
from fgclip.video.records import FORMATS, VideoSet, read_videos
from fgclip.video.synthetic import SyntheticVideos
from trainkit import distributed
from trainkit.arguments import check_needed, make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import InputError, one_sentence
from trainkit.files import whole_file, write_json
from trainkit.load_report import summarise
from trainkit.log import plain

DRAWN_COUNT, DRAWN_SEED = 100, 20_000  # neither training nor validation draws from that seed
WIDTH, HEIGHT, DOTS = 11, 3.3, 90  # inches of a strip, and dots per inch
MOST_STRIPS = 200  # in one picture
TICKS = (0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)  # seconds
# A video, its title, and the times (s) of its peaks with the pictures (H, W, 3) uint8 there.
Strip = tuple[VideoScores, str, Sequence[tuple[float, np.ndarray]]]


# fmt: off
def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `open_model` reads."""
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, metavar="FILE", help="best.pt or last.pt of train_video.py")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged (EMA) weights if any, or raw ones")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="frames at once")
    add("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the towers")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("videos").add_argument
    add("--data-root", metavar="DIR", help="root of a data set, for its test videos; else they are drawn")
    add("--format", choices=tuple(FORMATS), help="layout of --data-root (ucf-crime)")
    add("--features", metavar="DIR", help="of python -m fgclip.extract; what it lacks is added. Else they are not kept")
    add("--allow-missing", type=non_negative_int, metavar="N", help="go on without so many missing or damaged videos")
    add("--count", type=positive_int, metavar="N", help="of drawn videos (100)")
    add("--seed", type=non_negative_int, metavar="N", help="of drawn videos (20000)")
    add = parser.add_argument_group("results").add_argument
    add("--output", metavar="FILE", help="also write all figures, and the scores of every video, to this json file")
    add("--plot", metavar="FILE", help="also draw the scores of the best and worst videos of each class into this png")
# fmt: on


def open_model(args: argparse.Namespace) -> tuple[VideoModel, ClipEncoder]:
    """The model that `add_model_flags` name, on its device, and what makes clips of videos for it."""
    options = dict(device=distributed.start(args.device), batch_size=args.batch_size, amp=args.amp)
    model = load_video_model(args.checkpoint, args.weights).to(options["device"])
    return model, ClipEncoder(model.fgclip, **model.clips, **options)


def need_matplotlib() -> None:
    """Raises InputError where it is missing: call it before hours of work that end in a picture."""
    if find_spec("matplotlib") is None:
        raise InputError('pictures of scores need matplotlib: pip install "macl-fgclip[viz]"')


def check(args: argparse.Namespace) -> None:
    """Raises InputError on a flag that nothing would read, and where a result cannot be written."""
    check_needed(args, format=("data_root",), allow_missing=("data_root",))
    if args.data_root and not args.count is args.seed is None:
        raise InputError("--count and --seed are of drawn videos; they have no part in --data-root")
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path and not Path(path).resolve().parent.is_dir():
            raise InputError(f"{flag} {path}: expected a file in a folder that exists")
    if args.plot:
        need_matplotlib()


def open_videos(args: argparse.Namespace, model: VideoModel) -> tuple[VideoSet, str]:
    """The videos, and what they are. Raises InputError where they have classes that the model does not know."""
    if args.data_root is None:
        seed, size = DRAWN_SEED if args.seed is None else args.seed, model.fgclip.vision_model.image_size
        videos = SyntheticVideos(args.count or DRAWN_COUNT, seed=seed, image_size=size)
        about = f"{len(videos)} videos drawn from seed {seed} (no --data-root)"
    else:
        videos = read_videos(args.data_root, args.format or "ucf-crime", "test")
        about = ". ".join([f"test videos of {args.data_root}", *videos.notes])
    if unknown := sorted({name for record in videos.records for name in record.classes} - set(model.classes)):
        known = summarise(model.classes, 20)
        raise InputError(f"{about}: events of {summarise(unknown, 5)}; {args.checkpoint} knows {known}")
    return videos, about


def scored(model: VideoModel, encoder: ClipEncoder, videos: VideoSet, folder: str, allowed: int) -> tuple[list, list]:
    """VideoScores of the videos, on rank 0, and which of them, at most `allowed`, are missing or damaged."""
    store = FeatureStore(folder, encoder.key)
    lost = extract(videos, encoder, store)
    refuse_lost(lost, allowed)
    records = [record for record in videos.records if record.name in store and distributed.is_main()]
    return [model.scores(record, store.read(record.name))[0] for record in records], lost


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


def as_json(video: VideoScores) -> dict:
    """What a curve is drawn from, as plain values. rate: frames per second."""
    sizes = dict(name=video.name, rate=float(video.rate), clip_frames=video.clip_frames, frames=video.frames)
    return sizes | dict(scores=video.scores.astype(float).round(6).tolist())


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of the videos. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    check(args)
    model, encoder = open_model(args)
    videos, about = open_videos(args, model)
    with tempfile.TemporaryDirectory() as own:
        folder = args.features or distributed.run_on_main(lambda: own)
        scores, lost = scored(model, encoder, videos, folder, args.allow_missing or 0)
    if distributed.is_main():
        about += f". Without {len(lost)}: {', '.join(lost)}" if lost else ""
        print(f"supervision: {model.supervision} ({args.checkpoint})", about, sep="\n")
        report = anomaly_report(scores, model.classes, normal_counts=args.format == "xd-violence")
        print("\n" + report_text(report))
        if args.output:
            known = dict(checkpoint=args.checkpoint, supervision=model.supervision, data=about)
            each = [as_json(one) | dict(classes=one.classes, events=one.events) for one in scores]
            write_json(args.output, known | dict(metrics=plain(report), videos=each))
        if args.plot:
            draw(args.plot, scores, videos)
    distributed.stop()


if __name__ == "__main__":
    with one_sentence():
        main()
