"""The temporal head, which tells what happens when from one feature per clip, and FG-CLIP with it."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fgclip.loading import check_image_size, load_model
from fgclip.losses import caption_ids
from fgclip.model import FGCLIP, MAX_LOGIT_SCALE, l2_normalize
from fgclip.objective import freeze_unreached
from fgclip.tokenizer import Tokenizer
from fgclip.transformer import Block
from fgclip.video.features import INPUTS, Clips
from fgclip.video.metrics import VideoScores
from fgclip.video.records import VideoRecord
from fgclip.weight_files import read_run
from trainkit.errors import InputError
from trainkit.files import check_like, state_dict_of

TEMPLATES = ("{}", "a video of {}.", "a surveillance camera shows {}.", "a scene of {}.")
NORMAL = "normal"
CHUNK = 512  # clips at once of a long video


class GatedPool(nn.Module):
    """Many features to one: their mean, plus an attention-weighted sum behind a projection that starts at 0."""

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim // 2), nn.Tanh(), nn.Linear(dim // 2, 1))
        self.projection = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features (N, L, D) and which of them count (N, L) bool, at least one per row, to (N, D)."""
        mask = mask.unsqueeze(-1)
        features = features.masked_fill(~mask, 0)
        weights = self.score(features).masked_fill(~mask, -torch.inf).softmax(dim=1)  # (N, L, 1)
        return features.sum(1) / mask.sum(1) + self.projection((weights * features).sum(1))


class TemporalHead(nn.Module):
    """Scores of a video's clips, each seeing its neighbours.
    Frame features are y = unit(x + W e), with x CLIP's own feature of the clip and e its context. W starts at 0: the
    class logits of an untrained head are zero-shot CLIP's.
    dim: width D of CLIP's features. classes: C, without normal. inputs: those of INPUTS that it sees. window: clips
    that a clip sees to either side, in each layer."""

    def __init__(
        self, dim: int, *, classes: int, inputs: Sequence[str] = INPUTS, layers: int = 2, window: int = 4,
        heads: int = 8, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        sizes = dict(dim=dim, classes=classes, layers=layers, window=window, heads=heads)
        self.kwargs = sizes | dict(inputs=list(inputs), dropout=dropout)
        self.inputs, self.window, self.reach = tuple(inputs), window, layers * window
        width = sum(4 if name == "amount" else dim for name in inputs)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.embed = nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, 2 * dim, "gelu", 1e-5) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.correction = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.correction.weight)
        self.anomaly = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))
        self.text_offsets = nn.Parameter(torch.zeros(1 + classes, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pool = GatedPool(dim)

    def standardise(self, videos: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep mean and spread of the clips of videos, dicts of (T, ...) each."""
        count, total, squares = 0, 0.0, 0.0
        for video in videos:  # one after the other: all clips of a data set at once are gigabytes
            clips = self.stacked(video).double()
            count, total, squares = count + len(clips), total + clips.sum(0), squares + clips.square().sum(0)
        self.mean.copy_(total / count)
        self.spread.copy_((squares / count - (total / count).square()).clamp(min=1e-8).sqrt())

    def stacked(self, features: Mapping[str, Tensor]) -> Tensor:
        """The inputs side by side (..., T, sum of widths), the global feature of length 1."""
        parts = [l2_normalize(features[name]) if name == "global" else features[name].float() for name in self.inputs]
        return torch.cat(parts, dim=-1)

    def forward(
        self, features: Mapping[str, Tensor], mask: Tensor, texts: Tensor, spans: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Features of clips, by name (B, T, ...), which of them there are (B, T) bool, and unit texts (1 + C, D).
        spans: stretches of clips to be pooled: videos, starts and ends (N,).
        -> anomaly (B, T) and classes (B, T, 1 + C), logits; frames (B, T, D), texts (1 + C, D) with what was learnt,
        and spans (N, D), unit vectors; scale, the multiplier of the cosines."""
        x = self.dropout(self.embed((self.stacked(features) - self.mean) / self.spread))  # (B, T, D)
        place = torch.arange(x.shape[1], device=x.device)
        near = (place[:, None] - place).abs() <= self.window
        seen = (near & mask[:, None]) | (place[:, None] == place)  # (B, T, T); padding sees itself, and stays finite
        for block in self.blocks:
            x = block(x, seen.unsqueeze(1))
        x = self.norm(x)
        frames = l2_normalize(l2_normalize(features["global"]) + self.correction(x))
        texts, scale = l2_normalize(texts + self.text_offsets), self.logit_scale.exp()
        with torch.autocast(x.device.type, enabled=False):  # logits are float32
            classes = scale * frames @ texts.T
        output = dict(anomaly=self.anomaly(x).squeeze(-1).float(), classes=classes, frames=frames)
        if spans is not None:
            videos, starts, ends = spans
            inside = (starts[:, None] <= place) & (place < ends[:, None])  # (N, T)
            output["spans"] = l2_normalize(self.pool(frames[videos], inside))
        return output | dict(texts=texts, scale=scale)

    @torch.inference_mode()
    def score(self, features: Mapping[str, Tensor], texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a video of any length: anomaly (T,) and classes (T, 1 + C), probabilities, and frames (T, D). It goes
        through in pieces that overlap by what a clip sees, so that memory is bounded and nothing changes."""
        count, parts = len(features["global"]), []
        for start in range(0, count, CHUNK):
            first = max(start - self.reach, 0)
            piece = {name: rows[None, first : start + CHUNK + self.reach] for name, rows in features.items()}
            mask = torch.ones(piece["global"].shape[:2], dtype=torch.bool, device=texts.device)
            output = self(piece, mask, texts)
            kept = slice(start - first, start - first + min(CHUNK, count - start))
            parts.append([output[name][0, kept] for name in ("anomaly", "classes", "frames")])
        anomaly, classes, frames = map(torch.cat, zip(*parts, strict=True))
        return anomaly.sigmoid(), classes.softmax(-1), frames


def class_prompts(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sentences for the video without an event, first, and for each class; RoadAccidents is read as road accidents."""
    words = {name: " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", name).lower().split()) for name in names}
    prompts = {NORMAL: "normal activity"} | words
    return {name: tuple(template.format(text) for template in TEMPLATES) for name, text in prompts.items()}


class VideoModel(nn.Module):
    """Towers, temporal head and class texts.
    prompts: class name -> sentences; first that of normal videos, then the C events. clips: clip_frames and
    frames_per_clip of `ClipEncoder`. supervision: what it was trained with, for the first line of an evaluation."""

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
        """Let the "towers" or the "head" alone learn, as far as these losses reach."""
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
        spans = batch["spans"][:, :3].unbind(1) if self.pools else None
        return self.head(batch["features"], batch["mask"], self.class_texts, spans)

    def scores(self, record: VideoRecord, clips: Clips) -> tuple[VideoScores, np.ndarray]:
        """What the metrics want to know of a video, and the unit vectors (T, D) of its clips."""
        features = {name: value.to(self.class_texts.device) for name, value in clips.tensors().items()}
        anomaly, classes, frames = (part.cpu().numpy() for part in self.head.score(features, self.class_texts))
        events = record.events
        if events is not None:
            events = tuple((round(start * clips.rate), round(end * clips.rate), name) for start, end, name in events)
        sizes = clips.frames, self.clips["clip_frames"]
        return VideoScores(record.name, record.classes, events, *sizes, anomaly, classes, clips.rate), frames

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Hold all multipliers between 1 and 100. Call it after every optimizer step."""
        self.fgclip.clamp_logit_scales()
        self.head.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def constants(self) -> dict:
        """What a checkpoint holds beside the weights, as plain values."""
        return dict(
            model_kwargs=self.fgclip.config, head_kwargs=self.head.kwargs, merges=self.tokenizer.merges,
            prompts=self.prompts, clips=self.clips, supervision=self.supervision,
        )  # fmt: skip


def load_video_model(path: str | Path, weights: str = "ema") -> VideoModel:
    """The model of a checkpoint of train_video.py, in evaluation mode on the CPU. weights: as in `load_model`."""
    run = read_run(Path(path))
    if run is None or run.get("script") != "video" or "head_kwargs" not in run:
        raise InputError(f"{path} is not a checkpoint of train_video.py")
    fgclip, tokenizer = load_model(path, weights=weights)
    state = state_dict_of(run["ema"] if weights == "ema" and run.get("ema") is not None else run["model"], path)
    source = f"{path} (damaged, or written by another version of the model)"
    try:
        options = dict(prompts=run["prompts"], clips=run["clips"], supervision=run["supervision"])
        model = VideoModel(fgclip, TemporalHead(**run["head_kwargs"]), tokenizer, **options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: {error}") from error
    check_like(state, model.state_dict(), source)
    model.load_state_dict(state)
    return model.eval()


def load_towers(
    path: str | Path, vocab: str | Path | None = None, *, weights: str = "ema", image_size: int | None = None
) -> tuple[FGCLIP, Tokenizer]:
    """What `load_model` returns. image_size: side of the square frames that the towers are to see, if not their own."""
    towers, tokenizer = load_model(path, vocab, weights=weights)
    if image_size not in (None, towers.vision_model.image_size):
        check_image_size(towers, image_size)
        towers = towers.with_image_size(image_size).eval()
    return towers, tokenizer
