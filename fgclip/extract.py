"""Features of the clips of all videos of a data set, for train_video.py and fgclip.evaluate_video.

python -m fgclip.extract --init-from fg-clip-base --data-root UCF_Crimes --features features --amp bf16
torchrun --nproc-per-node 4 -m fgclip.extract --init-from fg-clip-base --data-root UCF_Crimes --features features

Each video is read once. Those that the folder has are passed over, so that the same command goes on after Ctrl-C.
"""

import argparse
from datetime import timedelta

import torch

from fgclip.video.features import ClipEncoder, FeatureStore, extract, refuse_lost
from fgclip.video.model import load_towers
from fgclip.video.records import FORMATS, VideoSet, read_videos
from trainkit import distributed
from trainkit.arguments import make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import one_sentence

SPLITS = dict(train=("train",), test=("test",), all=("train", "test"))


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the towers, the videos, what a clip is, and the run."""
    add = parser.add_argument
    add("--init-from", required=True, metavar="PATH", help="published weights, or a run's checkpoint")
    add("--vocab", metavar="PATH", help="merges of the tokenizer of published weights")
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the square that frames are resized to")
    add("--data-root", required=True, metavar="PATH", help="the data set, in its own layout")
    add("--format", choices=tuple(FORMATS), default="ucf-crime", help="layout of --data-root")
    add("--split", choices=tuple(SPLITS), default="all", help="which of its videos")
    add("--features", required=True, metavar="DIR", help="folder to write to; what it has is kept")
    add("--clip-frames", type=positive_int, default=16, metavar="N", help="frames per clip")
    add("--frames-per-clip", type=positive_int, default=1, metavar="N", help="frames of a clip that are looked at")
    add("--allow-missing", type=non_negative_int, default=0, metavar="N", help="videos that may be missing or damaged")
    add("--batch-size", type=positive_int, default=256, metavar="N", help="frames at once, of each process")
    add("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the forward pass")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
# fmt: on


def open_videos(args: argparse.Namespace) -> VideoSet:
    """The videos of --split, each once: without folders for the two halves, all belong to both."""
    halves = [read_videos(args.data_root, args.format, split) for split in SPLITS[args.split]]
    records = {record.name: record for half in halves for record in half.records}
    return VideoSet(list(records.values()), halves[0].classes)


def main(arguments: list[str] | None = None) -> None:
    """Extract, and say what could not be. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    device = distributed.start(args.device, timedelta(days=30))  # a rank that is done waits for the others
    videos = open_videos(args)
    model, _ = load_towers(args.init_from, args.vocab, image_size=args.image_size)
    clips = dict(clip_frames=args.clip_frames, frames_per_clip=args.frames_per_clip)
    encoder = ClipEncoder(model, **clips, device=device, batch_size=args.batch_size, amp=args.amp)
    lost = extract(videos, encoder, FeatureStore(args.features, encoder.key))
    if distributed.is_main():
        print(*(f"without {each}" for each in lost), sep="\n", end="\n" * bool(lost))
        print(f"{args.features} has the clips of {len(videos) - len(lost)} of {len(videos)} videos")
    distributed.stop()
    refuse_lost(lost, args.allow_missing)


if __name__ == "__main__":
    with one_sentence():
        main()
