"""The temporal head: what happens when in a video, from one feature per clip."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fgclip.model import l2_normalize
from fgclip.transformer import Block
from fgclip.video.store import INPUTS

AMOUNTS = 4  # numbers that say how much moves in a clip
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

    Frame features y = unit(x + W e), with x CLIP's own feature of the clip and e its context. W starts at 0: the class
    logits of an untrained head are zero-shot CLIP's.

    dim: width D of CLIP's features. classes: C, kinds of events; a video without is one more, row 0 of the texts.
    inputs: those of INPUTS that it sees, standardised by `standardise`.
    layers, heads: of the transformer. window: clips that a clip sees to either side, in each layer.
    """

    def __init__(
        self, dim: int, *, classes: int, inputs: Sequence[str] = INPUTS, layers: int = 2, window: int = 4,
        heads: int = 8, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.kwargs = dict(dim=dim, classes=classes, inputs=list(inputs), layers=layers, window=window)
        self.kwargs |= dict(heads=heads, dropout=dropout)
        self.inputs, self.window, self.reach = tuple(inputs), window, layers * window
        widths = [AMOUNTS if name == "amount" else dim for name in inputs]
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("spread", torch.ones(sum(widths)))
        self.embed = nn.Linear(sum(widths), dim)
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
        """Keep mean and spread of the clips of these videos, dicts of (T, ...) each."""
        clips = torch.cat([self.stacked(video) for video in videos]).double()
        self.mean.copy_(clips.mean(0))
        self.spread.copy_(clips.std(0, correction=0).clamp(min=1e-4))

    def stacked(self, features: Mapping[str, Tensor]) -> Tensor:
        """The inputs side by side (..., T, sum of widths), the global feature of length 1."""
        parts = [l2_normalize(features[name]) if name == "global" else features[name].float() for name in self.inputs]
        return torch.cat(parts, dim=-1)

    def class_texts(self, texts: Tensor) -> Tensor:
        """Unit vectors (1 + C, D) of the classes: the texts' own (1 + C, D), plus what was learnt."""
        return l2_normalize(texts + self.text_offsets)

    def forward(
        self, features: Mapping[str, Tensor], mask: Tensor, texts: Tensor, spans: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Features of clips, by name (B, T, ...), which of them there are (B, T) bool, and unit texts (1 + C, D).

        spans: stretches of clips to be pooled: videos, starts and ends (N,).
        -> anomaly (B, T) and classes (B, T, 1 + C), logits; frames (B, T, D), texts (1 + C, D) and spans (N, D), unit
        vectors; scale, the multiplier of the cosines.
        """
        x = self.dropout(self.embed((self.stacked(features) - self.mean) / self.spread))  # (B, T, D)
        place = torch.arange(x.shape[1], device=x.device)
        near = (place[:, None] - place).abs() <= self.window
        seen = (near & mask[:, None]) | (place[:, None] == place)  # (B, T, T); padding sees itself, and stays finite
        for block in self.blocks:
            x = block(x, seen.unsqueeze(1))
        x = self.norm(x)
        frames = l2_normalize(l2_normalize(features["global"]) + self.correction(x))
        texts, scale = self.class_texts(texts), self.logit_scale.exp()
        with torch.autocast(x.device.type, enabled=False):  # logits are float32
            classes = scale * frames @ texts.T
        output = dict(anomaly=self.anomaly(x).squeeze(-1).float(), classes=classes, frames=frames)
        if spans is not None:
            videos, starts, ends = (each[:, None] for each in spans)
            inside = (starts <= place) & (place < ends)  # (N, T)
            output["spans"] = l2_normalize(self.pool(frames[videos.squeeze(1)], inside))
        return output | dict(texts=texts, scale=scale)

    @torch.inference_mode()
    def score(self, features: Mapping[str, Tensor], texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a video of any length: anomaly (T,) and classes (T, 1 + C), probabilities, and frames (T, D).

        It goes through in pieces that overlap by what a clip sees, so that memory is bounded and nothing changes.
        """
        count, parts = len(features["global"]), []
        for start in range(0, count, CHUNK):
            first = max(start - self.reach, 0)
            piece = {name: features[name][None, first : start + CHUNK + self.reach] for name in features}
            mask = torch.ones(piece["global"].shape[:2], dtype=torch.bool, device=texts.device)
            output = self(piece, mask, texts)
            kept = slice(start - first, start - first + min(CHUNK, count - start))
            parts.append([output[name][0, kept] for name in ("anomaly", "classes", "frames")])
        anomaly, classes, frames = (torch.cat(part) for part in zip(*parts, strict=True))
        return anomaly.sigmoid(), classes.softmax(-1), frames
