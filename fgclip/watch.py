"""Watch a video: when something happens, what it is, and which phrases fit.

python -m fgclip.watch --checkpoint runs/NAME/best.pt --video shop.mp4 --output shop
python -m fgclip.watch --checkpoint runs/NAME/best.pt --video FRAMES --phrases phrases.txt --peaks 10 --output shop

Any video that PyAV reads, or a folder of numbered images, of any length. --output gets scores.json, curves.png and the
pictures at the peaks; what is said of the peaks is printed, too.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fgclip.evaluate_video import add_model_flags, as_json, open_model
from fgclip.video.decode import open_video
from fgclip.video.metrics import ALARM, VideoScores, by_frame
from fgclip.video.model import NORMAL, VideoModel
from fgclip.video.records import VideoRecord
from fgclip.video_plots import clock, draw_curves, need_matplotlib, peaks, time_of
from trainkit.arguments import make_parser, positive_int
from trainkit.errors import InputError, one_sentence
from trainkit.files import read_lines, whole_file, write_json, writing
from trainkit.tables import aligned

MOST_PHRASES = 10  # of a peak, those that fit best


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add = parser.add_argument_group("what to watch").add_argument
    add("--video", required=True, metavar="PATH", help="a video, or a folder of numbered images")
    add("--output", required=True, metavar="DIR", help="the folder for what was found; it is made where it is missing")
    add("--phrases", metavar="FILE", help="what the peaks may show, one phrase per line; else the sentences of the "
        "classes")
    add("--peaks", type=positive_int, default=5, metavar="N", help="most peaks to tell of")
# fmt: on


def described(model: VideoModel, scores: VideoScores, frames: np.ndarray, phrases: list[str], count: int) -> list[dict]:
    """The peaks in the order of time: time (s), clip, score, class of the highest probability, normal among them, the
    probabilities of all by name, and the phrases of the highest cosines with the clip's row of frames (T, D)."""
    names, found = (NORMAL, *model.classes), []
    texts = model.embed(phrases)[0].cpu().numpy()  # (M, D)
    for clip in sorted(peaks(scores.scores, count)):
        row, cosines = scores.class_scores[clip].astype(float).round(6), texts @ frames[clip]
        best = [(phrases[i], round(float(cosines[i]), 4)) for i in np.argsort(-cosines, kind="stable")[:MOST_PHRASES]]
        found.append({
            "time": time_of(scores, clip), "clip": clip, "score": round(float(scores.scores[clip]), 6),
            "class": names[row.argmax()], "probabilities": dict(zip(names, row.tolist(), strict=True)),
            "phrases": [dict(phrase=phrase, cosine=cosine) for phrase, cosine in best],
        })  # fmt: skip
    return found


def summary(scores: VideoScores, found: list[dict]) -> str:
    """What the peaks are, as a table, and how long the score is above the level of an alarm."""
    seconds = (by_frame([scores])[0] > ALARM).sum() / float(scores.rate)
    alarms = f"score above {ALARM:g} for {seconds:.1f} s; its peaks:"
    rows = [["time", "score", "class", "p", "cosine", " phrase"]]
    for peak in found:
        for place, fit in enumerate(peak["phrases"][:3]):
            p = peak["probabilities"][peak["class"]]
            first = [clock(peak["time"]), f"{peak['score']:.3f}", peak["class"], f"{p:.3f}"]
            rows.append([*(first if place == 0 else [""] * 4), f"{fit['cosine']:.3f}", " " + fit["phrase"]])
    width = max(len(row[-1]) for row in rows)
    return "\n".join([alarms, aligned([[*row[:-1], row[-1].ljust(width)] for row in rows])])


def main(arguments: list[str] | None = None) -> None:
    """Write and print what happens in a video. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    need_matplotlib()
    model, encoder = open_model(args)
    phrases = [text for texts in model.prompts.values() for text in texts]
    if args.phrases and not (phrases := list(dict.fromkeys(read_lines(args.phrases, "phrases, one per line")))):
        raise InputError(f"{args.phrases} holds no phrases; expected one per line")
    video, output = open_video(args.video), Path(args.output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=video.claimed, unit="frame", disable=None) as bar:
        clips = encoder.video(video, progress=lambda frames: bar.update(frames - bar.n))

    name = Path(args.video).resolve().name
    scores, frames = model.scores(VideoRecord(name), clips)
    before = model.tokenizer.truncated
    found = described(model, scores, frames, phrases, args.peaks)
    cut = model.tokenizer.truncated - before
    said = [video.problem] * bool(video.problem)
    said += [f"{cut} phrases were longer than the model reads, and were cut"] * bool(cut)
    times = [peak["time"] for peak in found]
    pictures = list(zip(times, video.at(times), strict=True))
    for number, (peak, (_, picture)) in enumerate(zip(found, pictures, strict=True), start=1):
        peak["picture"] = f"peak-{number}.jpg"
        with whole_file(output / peak["picture"]) as file:
            Image.fromarray(picture).save(file, format="JPEG", quality=90)
    rows = scores.class_scores.T.astype(float).round(6).tolist()
    probabilities = dict(zip((NORMAL, *model.classes), rows, strict=True))
    seconds = float(clips.frames / clips.rate)
    known = dict(checkpoint=args.checkpoint, supervision=model.supervision, problem=video.problem, seconds=seconds)
    known |= as_json(scores) | dict(probabilities=probabilities, peaks=found)
    write_json(output / "scores.json", known)
    draw_curves(output / "curves.png", [(scores, name, pictures)])
    print(f"{args.video}: {clips.frames} frames, {clock(seconds)} at {float(clips.rate):g} frames a second")
    print(f"supervision: {model.supervision}", *said, summary(scores, found), sep="\n")
    print(f"written to {output}: scores.json, curves.png and {len(found)} pictures")


if __name__ == "__main__":
    with one_sentence():
        main()
