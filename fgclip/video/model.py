"""FG-CLIP with a temporal head, and the texts of the classes; read from a checkpoint of train_video.py."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fgclip.loading import check_image_size, load_model
from fgclip.losses import caption_ids
from fgclip.model import FGCLIP, MAX_LOGIT_SCALE, l2_normalize
from fgclip.objective import freeze_unreached
from fgclip.tokenizer import Tokenizer, checked_merges
from fgclip.video.head import TemporalHead
from fgclip.video.metrics import VideoScores
from fgclip.video.records import VideoRecord
from fgclip.video.store import Clips
from fgclip.weight_files import read_run
from fgclip.weights import build
from trainkit.errors import InputError
from trainkit.files import check_like, state_dict_of

TEMPLATES = ("{}", "a video of {}.", "a surveillance camera shows {}.", "a scene of {}.")
NORMAL = "normal"


def class_prompts(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sentences for the video without an event, first, and for each class; RoadAccidents is read as road accidents."""
    words = {name: " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", name).lower().split()) for name in names}
    prompts = {NORMAL: "normal activity"} | words
    return {name: tuple(template.format(text) for template in TEMPLATES) for name, text in prompts.items()}


class VideoModel(nn.Module):
    """Towers, temporal head and class texts.

    prompts: class name -> sentences; first that of a video without an event, then the C events.
    clips: keywords of `ClipEncoder` that say what a clip is: clip_frames and frames_per_clip.
    supervision: what it was trained with, for the first line of an evaluation.
    """

    def __init__(
        self, fgclip: FGCLIP, head: TemporalHead, tokenizer: Tokenizer, *, prompts: Mapping[str, Sequence[str]],
        clips: Mapping[str, int], supervision: str = "none",
    ):  # fmt: skip
        super().__init__()
        self.fgclip, self.head, self.tokenizer = fgclip, head, tokenizer
        self.prompts = {name: tuple(texts) for name, texts in prompts.items()}
        self.clips, self.supervision = dict(clips), supervision
        self.pools = False  # whether captions and tracks are pooled from the clips, see `select`
        self.register_buffer("class_texts", torch.zeros(len(self.prompts), fgclip.visual_projection.out_features))
        self.refresh_texts()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the events."""
        return tuple(self.prompts)[1:]

    def select(self, part: str, losses: Collection[str]) -> None:
        """Let the "towers" or the "head" learn, as far as these losses reach. The other part stands still."""
        towers = part == "towers"
        self.fgclip.requires_grad_(towers)
        self.head.requires_grad_(not towers)
        self.pools = not towers and not {"caption", "track", "hard"}.isdisjoint(losses)
        self.head.pool.requires_grad_(self.pools)
        if towers:
            freeze_unreached(self.fgclip, losses)

    @torch.no_grad()
    def refresh_texts(self) -> None:
        """After the towers moved: the classes (1 + C, D) as means of the unit vectors of their sentences."""
        rows = [self.embed(texts)[0].mean(0) for texts in self.prompts.values()]
        self.class_texts.copy_(l2_normalize(torch.stack(rows)))

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors (N, D) of short texts, and their `caption_ids` (N,)."""
        tokens = self.tokenizer(list(texts), self.fgclip.text_model.context_length)  # (N, L)
        parts = [l2_normalize(self.fgclip.encode_text(part.to(self.class_texts.device))) for part in tokens.split(256)]
        ids = caption_ids(tokens, self.tokenizer.eos_id).to(self.class_texts.device)
        return torch.cat(parts or [self.class_texts[:0]]), ids

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Pixels are for the towers, see `FGCLIP.forward`; features (B, T, ...), mask (B, T) and spans for the head."""
        if "pixels" in batch:
            return self.fgclip(batch)
        spans = [batch[name] for name in ("videos", "starts", "ends")] if self.pools else None
        return self.head(batch["features"], batch["mask"], self.class_texts, spans)

    def score(self, clips: Clips) -> tuple[Tensor, Tensor, Tensor]:
        """`TemporalHead.score` of a video's clips."""
        features = {name: value.to(self.class_texts.device) for name, value in clips.tensors().items()}
        return self.head.score(features, self.class_texts)

    def scores(self, record: VideoRecord, clips: Clips) -> VideoScores:
        """What the metrics want to know of a video."""
        anomaly, classes, _ = (part.cpu().numpy() for part in self.score(clips))
        events = record.events
        if events is not None:
            events = tuple((round(start * clips.rate), round(end * clips.rate), name) for start, end, name in events)
        sizes = clips.frames, self.clips["clip_frames"]
        return VideoScores(record.name, record.classes, events, *sizes, anomaly, classes, clips.rate)

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Hold all multipliers between 1 and 100. Call it after every optimizer step."""
        self.fgclip.clamp_logit_scales()
        self.head.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def constants(self) -> dict:
        """What a checkpoint holds beside the weights, as plain values."""
        return {
            "model_kwargs": self.fgclip.config, "head_kwargs": self.head.kwargs, "merges": self.tokenizer.merges,
            "prompts": {name: list(texts) for name, texts in self.prompts.items()}, "clips": self.clips,
            "supervision": self.supervision,
        }  # fmt: skip


def load_video_model(path: str | Path, weights: str = "ema") -> VideoModel:
    """The model of a checkpoint of train_video.py, in evaluation mode on the CPU. Raises InputError for other files.

    weights: "ema" takes the averaged weights where there are any, "raw" the trained ones.
    """
    run = read_run(Path(path))
    if run is None or run.get("script") != "video" or "head_kwargs" not in run:
        raise InputError(f"{path} is not a checkpoint of train_video.py")
    state = state_dict_of(run["ema"] if weights == "ema" and run.get("ema") is not None else run["model"], path)
    source = f"{path} (damaged, or written by another version of the model)"
    towers = {name.removeprefix("fgclip."): value for name, value in state.items() if name.startswith("fgclip.")}
    fgclip = build(run["model_kwargs"], towers, source)
    try:
        head = TemporalHead(**run["head_kwargs"])
        tokenizer = Tokenizer(checked_merges(run["merges"], str(path)), vocab_size=fgclip.text_model.vocab_size)
        options = dict(prompts=run["prompts"], clips=run["clips"], supervision=run["supervision"])
        model = VideoModel(fgclip, head, tokenizer, **options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: {error}") from error
    check_like(state, model.state_dict(), source)
    model.load_state_dict(state)
    return model.eval()


def load_towers(
    path: str | Path, vocab: str | Path | None = None, *, weights: str = "ema", image_size: int | None = None
) -> tuple[FGCLIP, Tokenizer]:
    """Towers, in evaluation mode on the CPU, and tokenizer: a checkpoint of train_video.py, or as of `load_model`.

    image_size: side of the square frames that they are to see, instead of their own.
    """
    run = read_run(Path(path))
    if run is not None and run.get("script") == "video":
        model = load_video_model(path, weights)
        towers, tokenizer = model.fgclip, model.tokenizer
    else:
        towers, tokenizer = load_model(path, vocab, weights=weights)
    if image_size not in (None, towers.vision_model.image_size):
        check_image_size(towers, image_size)
        towers = towers.with_image_size(image_size).eval()
    return towers, tokenizer
