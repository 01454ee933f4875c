"""Events in surveillance videos, learnt from a label per video: FG-CLIP with a temporal head.

    python train_video.py                                               # drawn videos, minutes on two CPU cores
    python -m fgclip.extract --init-from fg-clip-base --data-root UCF_Crimes --features features --amp bf16
    python train_video.py --data-root UCF_Crimes --features features --init-from fg-clip-base --check
    python train_video.py --data-root UCF_Crimes --features features --init-from fg-clip-base
    python train_video.py --data-root UCF_Crimes --tracks tracks.json --tower tune --init-from fg-clip-base --amp bf16
    torchrun --nproc-per-node 4 train_video.py --data-root UCF_Crimes --features features --init-from fg-clip-base
    python train_video.py --resume auto                                 # go on after Ctrl-C

First, with --tower tune, the towers learn from frames with tracks and captions; then the head learns from the features
of every clip, which are extracted where --features lacks them. Without data both happen, on drawn videos.
"""

import trainkit.process_setup  # noqa: F401, I001  before torch

import argparse
import collections
import math
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from fgclip import FGCLIP, Tokenizer
from fgclip.data import Collate
from fgclip.embedding import Embedder
from fgclip.losses import PairBank
from fgclip.objective import FGCLIPLoss
from fgclip.tasks import validation_metrics, validation_text
from fgclip.tokenizer import learn_merges
from fgclip.video.annotations import add_annotations, read_sentences, read_tracks
from fgclip.video.features import INPUTS, ClipEncoder, FeatureStore, extract, refuse_lost
from fgclip.video.metrics import anomaly_report
from fgclip.video.model import NORMAL, TemporalHead, VideoModel, class_prompts, load_towers
from fgclip.video.records import FORMATS, VideoSet, hold_out, read_videos
from fgclip.video.synthetic import PROMPTS, SyntheticVideos, sentences
from fgclip.video.training import LOSSES, ClipBags, VideoFrames, VideoLoss, collate_bags
from fgclip.video_plots import draw
from trainkit import distributed
from trainkit.arguments import (
    add_recipe_flags,
    check_needed,
    fraction,
    make_parser,
    non_negative_float,
    non_negative_int,
    parse_with_resume,
    peek_flags,
    positive_float,
    positive_int,
)
from trainkit.errors import InputError, one_sentence
from trainkit.loader import make_loader
from trainkit.optimizer import build_optimisation, ema
from trainkit.run import Run
from trainkit.run_folder import find_resume
from trainkit.sampler import AlternatingSampler
from trainkit.step import TrainStep, print_step

SCRIPT = "video"
PRINTED = ("region_in_batch_r1", "short_in_batch_r1")  # the others are in metrics.jsonl
MAY_CHANGE = ("features", "tracks", "captions", "allow_missing")
VALIDATION_SEED = 10_000  # of the drawn validation videos, plus --seed: never a training video
CHECKED = 4  # videos of whose clips --check tells norms and cosines
BEST = {"auc": "auc", "anomaly-auc": "anomalous_auc", "video-auc": "video_auc", "map": "map"}  # and their metric

# The recipe for UCF-Crime with published weights, and what differs for drawn videos.
RECIPE = dict(
    epochs=10, batch_size=128, lr=1e-4, lr_scale=["fgclip=0.05"], weight_decay=0.01, clip_norm=1.0,
    best_by="video-auc",
)  # fmt: skip
SYNTHETIC_RECIPE = dict(
    epochs=70, tower_epochs=40, batch_size=32, workers=1, lr=1e-3, lr_scale=["fgclip=1.5"], weight_decay=0.05,
    warmup_steps=20, tower="tune", clip_frames=4, window=4, image_size=64, best_by="auc", validate_every=10,
)  # fmt: skip
DRAWN_TOWER = dict(layers=4, width=128, heads=4, mlp_width=512)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the data or the resumed run that they name."""
    parser = make_parser(__doc__)
    add_recipe_flags(parser, SCRIPT, MAY_CHANGE)
    add_flags(parser)
    given = peek_flags(arguments, "--data-root")
    return parse_with_resume(parser, arguments, SCRIPT, RECIPE | (SYNTHETIC_RECIPE if given.data_root is None else {}))


# fmt: off
def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("videos, and what is said about them").add_argument
    add("--format", choices=tuple(FORMATS), default="ucf-crime", help="layout of --data-root")
    add("--tracks", metavar="PATH", help="boxes over time with phrases")
    add("--track-rate", type=positive_float, default=25.0, metavar="X", help="frames per second in which the key "
        "frames of --tracks count, where the file does not say it")
    add("--captions", metavar="PATH", help="sentences with start and end: UCA or HIVAU")
    add("--val-share", type=fraction, default=0.1, metavar="X", help="share of the training videos of each class that "
        "is held out")
    add("--allow-missing", type=non_negative_int, default=0, metavar="N", help="go on without so many videos")
    add("--synthetic-train", type=positive_int, default=320, metavar="N", help="drawn training videos")
    add("--synthetic-val", type=positive_int, default=100, metavar="N", help="drawn validation videos")
    add = parser.add_argument_group("clips").add_argument
    add("--features", metavar="DIR", help="features of python -m fgclip.extract; without it a folder of the run")
    add("--clip-frames", type=positive_int, default=16, metavar="N", help="frames per clip")
    add("--frames-per-clip", type=positive_int, default=1, metavar="N", help="frames of a clip that are looked at")
    add("--most-clips", type=positive_int, default=256, metavar="N", help="longer videos are averaged to so many")
    add = parser.add_argument_group("model").add_argument
    add("--tower", choices=("frozen", "tune"), default="frozen", help="tune: first learn from --tracks and --captions")
    add("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS), help="what the head sees of a clip")
    add("--head-layers", type=non_negative_int, default=2, metavar="N", help="transformer blocks of the head")
    add("--window", type=positive_int, default=8, metavar="CLIPS", help="that a clip sees to either side, per layer")
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the square that frames are resized to")
    add("--vocab", metavar="PATH", help="merges of the tokenizer of --init-from")
    add = parser.add_argument_group("losses").add_argument
    add("--bag-weight", type=positive_float, default=1.0, metavar="X", help="label of the video, highest clips")
    add("--class-weight", type=positive_float, default=1.0, metavar="X", help="classes of the video, highest clips")
    add("--texts-weight", type=non_negative_float, default=0.1, metavar="X", help="texts of events away from normal")
    add("--smooth-weight", type=non_negative_float, default=0.0, metavar="X", help="neighbouring clips alike")
    add("--caption-weight", type=non_negative_float, default=0.5, metavar="X", help="sentences, where there are any")
    add("--track-weight", type=non_negative_float, default=0.5, metavar="X", help="phrases of tracks, where there are")
    add("--hard-weight", type=non_negative_float, default=0.0, metavar="X", help="altered phrases of tracks")
    add("--top-share", type=fraction, default=0.0625, metavar="X", help="highest clips of a video, for its label")
    add("--bank-size", type=non_negative_int, default=0, metavar="N", help="negatives from earlier steps, of each kind")
    add("--bank-classes", type=int, choices=(1, 2), default=1, help="2: half of the places for events")
    add("--bank-warmup-steps", type=non_negative_int, default=50, metavar="N", help="optimizer steps before it is used")
    add = parser.add_argument_group("towers, with --tower tune").add_argument
    add("--tower-epochs", type=non_negative_int, default=5, metavar="N", help="the first of --epochs, for the towers")
    add("--best-by", choices=tuple(BEST), default="video-auc", help="what chooses best.pt: frames of all videos, of "
        "those with an event, mAP of classes in time, videos")
# fmt: on


def validate_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other or have no effect."""
    drawn = args.data_root is None
    if args.tower == "frozen":
        args.tower_epochs = 0
        if drawn and not args.init_from and not args.resume:
            raise InputError("--tower frozen: random towers say nothing; give --init-from, or --tower tune")
    elif args.features:
        raise InputError("--features: --tower tune makes features of its own, in the folder of the run")
    elif not (drawn or args.tracks or args.captions):
        raise InputError("--tower tune learns from --tracks or --captions; give one of them, or --tower frozen")
    elif not 0 < args.tower_epochs < args.epochs:
        raise InputError(f"--tower-epochs {args.tower_epochs}: expected at least 1, and below --epochs {args.epochs}")
    if not args.val_share:
        raise InputError("--val-share 0 leaves no video to validate on; expected more")
    if args.batch_size % 2:
        raise InputError(f"--batch-size {args.batch_size}: half of the videos have an event; expected an even number")
    if not drawn and not (args.init_from or args.resume):
        raise InputError("--init-from is missing: expected CLIP or FG-CLIP weights, or a run of train_fgclip.py")
    if args.bank_size % args.bank_classes or (args.bank_classes > 1 and not args.bank_size):
        raise InputError(f"--bank-size {args.bank_size} does not divide among the {args.bank_classes} --bank-classes")
    check_needed(args, tracks=("data_root",), captions=("data_root",), vocab=("init_from", "resume"))


def open_videos(args: argparse.Namespace) -> tuple[VideoSet, VideoSet, list[str]]:
    """Training and validation videos, and what there is to say about them."""
    if args.data_root is None:
        train = SyntheticVideos(args.synthetic_train, seed=args.seed, image_size=args.image_size)
        validation = SyntheticVideos(args.synthetic_val, seed=VALIDATION_SEED + args.seed, image_size=args.image_size)
        drawn = f"{len(train)} videos drawn from seed {args.seed} (no --data-root)"
        return train, validation, [f"training on {drawn}, validating on {len(validation)} from seed {validation.seed}"]
    videos = read_videos(args.data_root, args.format, "train")
    kept = {path.stem for path in Path(args.features).glob("*.npz")} if args.features else ()
    missing = [name for name in videos.missing if name not in kept]  # features do without the videos
    refuse_lost(missing, args.allow_missing)
    messages = [*videos.notes, *[f"without {len(missing)} missing videos: {', '.join(missing)}"] * bool(missing)]
    entries = read_tracks(args.tracks, args.track_rate) if args.tracks else []
    entries += read_sentences(args.captions) if args.captions else []
    videos, said = add_annotations(videos, entries)
    there = videos.of(record for record in videos.records if record.name not in missing)
    train, validation = hold_out(there, args.val_share, args.seed)
    for name, part in (("training", train), ("held out for validation", validation)):
        events = sum(bool(record.classes) for record in part.records)
        messages.append(f"{name}: {len(part)} videos, {events} with an event of {len(part.classes)} classes")
    return train, validation, [*messages, *said]


def supervision(videos: VideoSet, args: argparse.Namespace) -> str:
    """What is known beside the classes of whole videos."""
    tracks = sum(track.event for record in videos.records for track in record.tracks)
    captions = sum(span.event for record in videos.records for span in record.captions)
    parts = [f"{tracks} tracks"] * bool(tracks and args.track_weight)
    parts += [f"{captions} captions"] * bool(captions and args.caption_weight)
    return f"{' and '.join(parts)} that name events: not weakly supervised" if parts else "labels of videos alone"


def build_model(args: argparse.Namespace, train: VideoSet) -> tuple[VideoModel, str]:
    """Towers of --init-from, of the resumed run or, for drawn videos, new ones; a new head; and a sentence."""
    source = find_resume(args.resume, args.output, SCRIPT) or args.init_from
    if source is not None:
        of_run = dict(weights="raw") if source != args.init_from else dict(vocab=args.vocab)
        fgclip, tokenizer = load_towers(source, **of_run, image_size=args.image_size)
        about = f"towers of {source}; tokenizer: {tokenizer.description}"
    else:
        tokenizer, about = Tokenizer(learn_merges(sentences())), "towers from random weights"
        vision = dict(image_size=args.image_size, patch_size=8, **DRAWN_TOWER)
        text = dict(vocab_size=tokenizer.vocab_size, **DRAWN_TOWER)
        fgclip = FGCLIP(vision=vision, text=text, embed_dim=128, logit_scale=math.log(1 / 0.07))
    args.image_size = fgclip.vision_model.image_size
    head = TemporalHead(
        fgclip.visual_projection.out_features, classes=len(train.classes), inputs=args.inputs, layers=args.head_layers,
        window=args.window,
    )  # fmt: skip
    prompts = PROMPTS if args.data_root is None else class_prompts(train.classes)
    clips = dict(clip_frames=args.clip_frames, frames_per_clip=args.frames_per_clip)
    said = supervision(train, args)
    return VideoModel(fgclip, head, tokenizer, prompts=prompts, clips=clips, supervision=said), about


def loss_weights(args: argparse.Namespace, videos: VideoSet) -> tuple[dict[str, float], dict[str, float]]:
    """The weights of the towers' losses, which are FG-CLIP's, and of the head's. Those of captions and tracks are 0
    where there are none; the towers take captions only where each video with tracks has one."""
    tracks = [track for record in videos.records for track in record.tracks]
    captions = [bool(record.captions) for record in videos.records if record.captions or record.tracks]
    there = dict(caption=any(captions), track=bool(tracks), hard=bool(tracks))
    weights = {name: getattr(args, f"{name}_weight") * there.get(name, True) for name in LOSSES}
    towers = dict(short=weights["caption"] * all(captions), region=weights["track"])
    towers["hard"] = weights["hard"] * any(track.negatives for track in tracks)
    return tuple({f"loss_{name}": weight for name, weight in part.items()} for part in (towers, weights))


class TowerStage:
    """The towers learn from frames, their tracks and captions, with FG-CLIP's own losses; the head waits."""

    def __init__(self, args, train_step: TrainStep, data, names: list[str], banks, sampler, device):
        model, self.options = train_step.bare_model, dict(device=device, amp=args.amp)
        sizes = dict(image_size=args.image_size, margin=args.clip_frames / 60, seed=args.seed)
        spoken = data[1].of(record for record in data[1].records if record.tracks or record.captions)
        train, self.validation = (VideoFrames(videos, **sizes) for videos in (data[0], spoken))
        length = model.fgclip.text_model.context_length
        collate = Collate(model.tokenizer, context_length=length, long_context_length=None, hard="hard" in names)
        self.loader = make_loader(train, sampler, collate, workers=args.workers, device=device)
        loss = FGCLIPLoss(train_step.model, names=names, banks=banks, device=device)
        self.forward = lambda _, batch: (loss(batch), {})
        self.begin, self.metrics, self.text = loss.begin, loss.metrics, validation_text

    def validate(self, model: VideoModel) -> dict:
        """`validation_metrics` of a frame of each validation video, the same every time."""
        embedder = Embedder(model.fgclip, model.tokenizer, **self.options)
        return validation_metrics(embedder, self.validation, long=False) if len(self.validation) else {}


class HeadStage:
    """The head learns from the features of every clip, extracted where `folder` lacks them, with a call of `between`
    after each video; the towers stand still."""

    def __init__(self, args, train_step: TrainStep, data, names: list[str], banks, sampler, device, folder, between):
        model, (train, validation) = train_step.bare_model, data
        encoder = ClipEncoder(model.fgclip, **model.clips, device=device, amp=args.amp)
        store = FeatureStore(folder, encoder.key)
        refuse_lost([each for videos in data for each in extract(videos, encoder, store, between)], args.allow_missing)
        self.clips = {r.name: store.read(r.name) for videos in data for r in videos.records if r.name in store}
        self.validation = [record for record in validation.records if record.name in self.clips]
        model.refresh_texts()
        model.head.standardise([self.clips[r.name].tensors() for r in train.records if r.name in self.clips])
        sizes = dict(clip_frames=args.clip_frames, most_clips=args.most_clips, seed=args.seed)
        bags = ClipBags(train, self.clips, **sizes)
        table, ids = model.embed(list(bags.rows))
        self.loader = make_loader(bags, sampler, collate_bags, device=device)
        self.forward = VideoLoss(names, banks=banks, texts=table, ids=ids, top_share=args.top_share, device=device)
        self.metrics = dict  # none, the forward pass returns them

    def begin(self, batches: list[dict], *, use_banks: bool) -> None:
        self.forward.use_banks = use_banks

    def validate(self, model: VideoModel) -> dict:
        """`anomaly_report` of the validation videos."""
        model.eval()
        self.scored = [model.scores(record, self.clips[record.name])[0] for record in self.validation]
        model.train()
        return anomaly_report(self.scored, model.classes)

    def text(self, metrics: dict) -> str:
        scores, oracle = metrics["scores"]["anomaly score"], metrics["scores"]["oracle of the video's label"]
        own = ", ".join(f"{name} {row['auc']:.3f}" for name, row in metrics["classes"].items())
        parts = {
            "frames: AUC": scores["auc"], "of who knows the video's label": oracle["auc"], "AP": scores["ap"],
            f"within videos with events: AUC ({own})": scores["anomalous_auc"],
            "mAP@IoU": metrics["map"]["with_events"]["average"], "videos: AUC": scores["video_auc"],
        }  # fmt: skip
        return "; ".join(f"{name} {value:.3f}" for name, value in parts.items() if not math.isnan(value))


def best_metric(metrics: dict, by: str) -> tuple[float, float]:
    """What --best-by names, and the AUC of videos that breaks ties; -inf where it cannot be measured."""
    scores = metrics["scores"]["anomaly score"]
    value = metrics["map"]["with_events"]["average"] if by == "map" else scores[BEST[by]]
    return -math.inf if math.isnan(value) else value, scores["video_auc"]


def few(videos: VideoSet, count: int) -> VideoSet:
    """At most `count` of the videos, half of them with an event, first those about which something is said."""
    records = sorted(videos.records, key=lambda record: not (record.tracks or record.captions))
    halves = [[r for r in records if bool(r.classes) is event][: count // 2] for event in (False, True)]
    return videos.of(record for record in records if record in halves[0] + halves[1])


def begin_stage(args, train_step: TrainStep, data, banks, sampler, device, folder: Path, between=None):
    """The TowerStage or HeadStage in which the sampler is. data: training and validation videos."""
    model, average = train_step.bare_model, train_step.average
    towers = sampler.epoch + (len(sampler) == 0) < args.tower_epochs
    if average is not None and args.tower_epochs and not towers:
        model.fgclip.load_state_dict(average.module.fgclip.state_dict())
    weights = loss_weights(args, data[0])[0 if towers else 1]
    names = [name.removeprefix("loss_") for name in weights if weights[name]]
    model.select("towers" if towers else "head", names)
    train_step.model, train_step.weights = distributed.parallel(model), weights
    parts = args, train_step, data, names, banks, sampler, device
    stage = TowerStage(*parts) if towers else HeadStage(*parts, folder, between)
    train_step.forward = stage.forward
    return stage


def check(messages: list[str], videos: VideoSet, train_step: TrainStep, stage: TowerStage | HeadStage) -> None:
    """--check: what the data holds, one step, and whether a gradient reaches every part that learns."""
    counts = collections.Counter(name for record in videos.records for name in record.classes or (NORMAL,))
    print("\n".join([*messages, "videos per class: " + ", ".join(f"{name} {n}" for name, n in counts.items())]))
    print("before training: " + stage.text(stage.validate(train_step.bare_model)))
    model, batches = train_step.bare_model, [next(iter(stage.loader))]
    for record in stage.validation[:CHECKED] if isinstance(stage, HeadStage) else ():
        clips = stage.clips[record.name].tensors()
        norms = ", ".join(f"{name} {clips[name].norm(dim=1).mean():.3f}" for name in INPUTS[:2])
        cosines = (clips["global"] @ model.class_texts.cpu().T).mean(0).tolist()
        texts = ", ".join(f"{name} {cosine:.3f}" for name, cosine in zip(model.prompts, cosines, strict=True))
        print(f"{record.name}: norms of {norms}; cosines with {texts}")
    stage.begin(batches, use_banks=True)
    print_step(train_step, batches, model)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = distributed.start(args.device)
    validate_args(args)
    torch.manual_seed(args.seed)
    *data, messages = open_videos(args)
    model, about = build_model(args, data[0])
    if args.check:  # as many as one step takes
        data = [few(videos, args.batch_size) for videos in data]
    weights = loss_weights(args, data[0])
    if args.tower_epochs and not any(weights[0].values()):
        raise InputError("--tower tune: no loss of the towers has a weight, and tracks or captions to learn from")
    model = model.to(device).train()
    average = ema(model, args.ema_decay) if args.ema_decay else None

    sampler = AlternatingSampler([bool(r.classes) for r in data[0].records], args.batch_size, seed=args.seed)
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / args.accumulate)
    model.fgclip.requires_grad_(args.tower_epochs > 0)  # what never learns has no place in the optimizer
    optimizer, schedule = build_optimisation(args, model, steps_per_epoch, restart_epochs=args.tower_epochs)
    enabled = {name for part in weights for name, weight in part.items() if weight}
    banks = torch.nn.ModuleDict({
        name: PairBank(args.bank_size, model.class_texts.shape[1], classes=args.bank_classes, device=device)
        for name in ("short", "region", "caption", "track") if args.bank_size and f"loss_{name}" in enabled
    })  # fmt: skip
    train_step = TrainStep(
        model, optimizer, forward=None, weights=weights[1], schedule=schedule, average=average,
        describe=lambda batch: batch["sources"], device=device, amp=args.amp, clip_norm=args.clip_norm,
    )  # fmt: skip
    parts = args, train_step, data, banks, sampler, device
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            stage = begin_stage(*parts, Path(args.features or folder))
            check([f"supervision: {model.supervision}", *messages, about], data[0], train_step, stage)
        return

    run = Run(
        args, SCRIPT, train_step, sampler, total_steps=args.epochs * steps_per_epoch, parts={"banks": banks},
        constants=model.constants(), may_change=MAY_CHANGE,
    )  # fmt: skip
    run.say(f"supervision: {model.supervision}", *messages, about)
    folder = Path(args.features or run.folder / "features")
    with run:
        stage = begin_stage(*parts, folder, run.leave_if_asked)
        for epoch in run.epochs():
            for batches in run.batches(stage.loader):
                stage.begin(batches, use_banks=train_step.steps >= args.bank_warmup_steps)
                result = train_step(batches)
                model.clamp_logit_scales()
                count = sum(len(batch["sources"]) for batch in batches) * distributed.world_size()
                metrics = stage.metrics()
                shown = {name: metrics[name] for name in PRINTED if name in metrics}
                run.log_step(result, images=count, metrics=shown, hidden=metrics)
            if isinstance(stage, TowerStage) and epoch == args.tower_epochs and len(sampler) == 0:
                stage = begin_stage(*parts, folder, run.leave_if_asked)
            if run.validation_due():
                metrics = stage.validate(model if average is None else average.module)
                run.log_validation(metrics, stage.text(metrics))
                if epoch > args.tower_epochs:
                    run.keep_best(best_metric(metrics, args.best_by), args.best_by)
                if epoch == args.epochs and distributed.is_main() and find_spec("matplotlib"):
                    (run.folder / "pictures").mkdir(exist_ok=True)
                    try:
                        draw(run.folder / "pictures/curves.png", stage.scored, data[1])
                    except InputError as error:  # of videos whose features alone are at hand
                        run.say(f"no picture of the scores: {error}")


if __name__ == "__main__":
    with one_sentence():
        main()
