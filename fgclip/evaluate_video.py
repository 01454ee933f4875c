"""Evaluate a model of train_video.py: frames, detections and classes of events in videos.

python -m fgclip.evaluate_video --checkpoint runs/NAME/best.pt                                  # newly drawn videos
python -m fgclip.evaluate_video --checkpoint runs/NAME/best.pt --data-root UCF_Crimes --features features
python -m fgclip.evaluate_video --checkpoint runs/NAME/best.pt --data-root XD --format xd-violence --plot curves.png

The test videos of --data-root, whose features are extracted where --features lacks them. All figures stand beside those
of who knows nothing but which videos have an event.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from fgclip.video.features import ClipEncoder, FeatureStore, extract, refuse_lost
from fgclip.video.metrics import VideoScores, anomaly_report, report_text
from fgclip.video.model import VideoModel, load_video_model
from fgclip.video.records import FORMATS, VideoSet, read_videos
from fgclip.video.synthetic import SyntheticVideos
from fgclip.video_plots import draw, need_matplotlib
from trainkit import distributed
from trainkit.arguments import check_needed, make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import InputError, one_sentence
from trainkit.files import write_json
from trainkit.load_report import summarise
from trainkit.log import plain

DRAWN_COUNT, DRAWN_SEED = 100, 20_000  # neither training nor validation draws from that seed


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
