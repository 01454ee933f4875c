"""What a training step sees of a video, and the losses of the head: a label per video, captions and tracks. The towers
see one frame with boxes, the head all clips. Means are over all ranks."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fgclip.data import Record, Region, Sample, draw_sample
from fgclip.images import preprocess
from fgclip.losses import hard_negative_loss, symmetric_loss
from fgclip.video.features import Clips
from fgclip.video.records import VideoRecord, VideoSet
from trainkit.device import to_device
from trainkit.distributed import global_mean

LOSSES = ("bag", "class", "texts", "smooth", "caption", "track", "hard")
EVENT_SHARE = 0.6  # of the frames of a video with tracks of events are drawn from these
WHOLE = 60.0  # seconds from which a frame is drawn for a caption without an end
SPANS = 4  # captions and tracks of a video per visit of the head


class VideoFrames(Dataset):
    """A frame of each video, drawn anew at every visit, as a `Sample`: tracks are its regions. A video about which
    nothing is said stands for another. Label 1 says that a track of an event is in the frame.
    margin: seconds beyond its key frames up to which a track is taken to be there."""

    def __init__(self, videos: VideoSet, *, image_size: int, margin: float, seed: int):
        self.videos, self.image_size, self.margin, self.seed = videos, image_size, margin, seed
        self.spoken = [record for record in videos.records if record.tracks or record.captions]

    def __len__(self) -> int:
        return len(self.videos)

    def describe(self, key: int | tuple[int, int]) -> Sample:
        """The sample without pixels."""
        return self.draw(key)[2]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        record, moment, sample = self.draw(key)
        (picture,) = self.videos.open(record).at([moment])
        return replace(sample, pixels=preprocess(Image.fromarray(picture), self.image_size))

    def draw(self, key: int | tuple[int, int]) -> tuple[VideoRecord, float, Sample]:
        """A video, a moment of it in seconds, and what is said about that."""
        epoch, index = key if isinstance(key, tuple) else (-1, key)
        record, draw = self.videos.records[index], random.Random(f"{self.seed} {epoch} {index}")
        if not (record.tracks or record.captions):
            record = draw.choice(self.spoken)
        events = [track for track in record.tracks if track.event]
        tracks = events if events and draw.random() < EVENT_SHARE else record.tracks
        spans = [span for track in tracks for span in track.spans]
        spans = spans or [(span.start, min(span.end, span.start + WHOLE)) for span in record.captions]
        start, end = draw.choices(spans, [end - start + 1e-3 for start, end in spans])[0]
        moment = draw.uniform(start, end)
        there = [(track, track.box_at(moment, self.margin)) for track in record.tracks]
        there = [(track, box) for track, box in there if box is not None]
        captions = [span.text for span in record.captions if span.start <= moment <= span.end]
        captions = captions or [span.text for span in record.captions[:1]] or [""]
        picture = Record(
            record.name, tuple(captions), label=int(any(track.event for track, _ in there)),
            regions=tuple(Region(tuple(box.tolist()), track.phrases, track.negatives) for track, box in there),
            source=f"{record.name}, {moment:.2f} s",
        )  # fmt: skip
        return record, moment, draw_sample(picture, draw)


class ClipBags(Dataset):
    """Videos as bags of clips. A longer one is averaged to `most_clips` stretches, as is the field's rule.
    A bag is a video's clips (T, ...) by name, its classes (1 + C,), which sum to 1, its name, and some of its captions
    and tracks: first clip, end, whether it is a track and of an event, rows of its text and of altered ones.
    clips: name of a video -> its features; one without stands for the next with the same label. rows: of what captions
    and tracks say, in the table of its features."""

    def __init__(self, videos: VideoSet, clips: Mapping[str, Clips], *, clip_frames: int, most_clips: int, seed: int):
        self.videos, self.clips = videos, clips
        self.clip_frames, self.most_clips, self.seed = clip_frames, most_clips, seed
        self.said: dict[str, list] = {}  # like the spans of a bag, but for seconds and texts
        for record in videos.records:
            parts = [(span.start, span.end, False, span.event, [span.text]) for span in record.captions]
            for track in record.tracks:
                parts += [(*span, True, track.event, [track.phrases[0], *track.negatives]) for span in track.spans]
            self.said[record.name] = parts
        texts = dict.fromkeys(text for parts in self.said.values() for *_, said in parts for text in said)
        self.rows = {text: row for row, text in enumerate(texts)}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor, str, list[tuple]]:
        epoch, index = key
        records = self.videos.records[index:] + self.videos.records[:index]
        record = next(r for r in records if r.name in self.clips and bool(r.classes) == bool(records[0].classes))
        clips = self.clips[record.name]
        features, seconds = clips.tensors(), float(self.clip_frames / clips.rate)
        length = len(features["global"])
        if length > self.most_clips:
            features = {name: shortened(value, self.most_clips) for name, value in features.items()}
            seconds, length = seconds * length / self.most_clips, self.most_clips
        target = torch.zeros(1 + len(self.videos.classes))
        rows = [1 + self.videos.classes.index(name) for name in record.classes] or [0]
        target[rows] = 1 / len(rows)
        draw, parts, spans = random.Random(f"{self.seed} {epoch} {index}"), self.said[record.name], []
        for start, end, tracked, event, said in draw.sample(parts, min(SPANS, len(parts))):
            first = min(int(start / seconds), length - 1)
            last = max(first + 1, round(min(end / seconds, length)))
            spans.append((first, last, tracked, event, [self.rows[text] for text in said]))
        return features, target, record.name, spans


def shortened(values: Tensor, count: int) -> Tensor:
    """(T, ...) to the means of `count` equal stretches, T > count."""
    ends = torch.arange(count + 1) * len(values) // count
    sums = torch.cat([torch.zeros_like(values[:1], dtype=torch.float64), values.double().cumsum(0)])
    return ((sums[ends[1:]] - sums[ends[:-1]]) / (ends[1:] - ends[:-1])[:, None]).float()


def collate_bags(bags: Sequence[tuple]) -> dict:
    """features (B, T, ...) padded with 0, mask (B, T), targets (B, 1 + C), sources, and int64: spans (N, 6) of video,
    first clip, end, kind (1 of a track), label (1 of an event) and text; hard (H,) texts of the spans hard_rows (J,)
    that have altered ones, each span's own first, and their hard_counts (J,)."""
    features, targets, sources, said = zip(*bags, strict=True)
    spans = [(i, *span) for i, own in enumerate(said) for span in own]
    hard = {i: texts for i, (*_, texts) in enumerate(spans) if len(texts) > 1}
    rows = dict(hard=sum(hard.values(), []), hard_rows=list(hard), hard_counts=list(map(len, hard.values())))
    rows["spans"] = [(*map(int, span), texts[0]) for *span, texts in spans]
    batch = {name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}
    batch["spans"] = batch["spans"].view(-1, 6)
    batch["features"] = {name: pad_sequence([each[name] for each in features], True) for name in features[0]}
    batch["mask"] = pad_sequence([torch.ones(len(each["global"]), dtype=torch.bool) for each in features], True)
    return batch | dict(targets=torch.stack(targets), sources=list(sources))


def top_mean(values: Tensor, mask: Tensor, share: float = 1 / 16) -> Tensor:
    """The mean (B, ...) of the highest floor(T * share) + 1 of each video's T values (B, T, ...). mask: (B, T) bool,
    which there are."""
    counts = (mask.sum(1) * share).long() + 1  # (B,)
    shape = (len(mask), -1) + (1,) * (values.ndim - 2)
    ranked = values.masked_fill(~mask.view(shape), -torch.inf).sort(dim=1, descending=True).values
    kept = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    return ranked.masked_fill(~kept.view(shape), 0).sum(1) / counts.view(shape[:1] + shape[2:])


def bag_loss(anomaly: Tensor, mask: Tensor, labels: Tensor, share: float = 1 / 16) -> Tensor:
    """Cross-entropy of a video's label and the mean probability of its highest clips (VadCLIP, Wu et al. 2024).
    anomaly: (B, T) logits. mask: (B, T) bool. labels: (B,), 1 where the video has an event."""
    probability = top_mean(anomaly.float().sigmoid(), mask, share).clamp(1e-6, 1 - 1e-6)
    return global_mean(F.binary_cross_entropy(probability, labels.float(), reduction="sum"), len(labels))


def class_loss(classes: Tensor, mask: Tensor, targets: Tensor, share: float = 1 / 16) -> Tensor:
    """Cross-entropy of a video's classes and the mean logits of its highest clips (VadCLIP's MIL-Align). classes: (B,
    T, 1 + C) logits. targets: (B, 1 + C), rows that sum to 1; column 0 is the video without an event."""
    return global_mean(F.cross_entropy(top_mean(classes, mask, share), targets, reduction="sum"), len(targets))


def text_separation(texts: Tensor) -> Tensor:
    """Mean |cosine| of the text of no event, row 0, and those of the events (VadCLIP)."""
    return (texts[1:] @ texts[0]).abs().mean()


def smoothness(anomaly: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of neighbouring clips' probabilities (Sultani et al. 2018, there a sum)."""
    pairs, probability = mask[:, 1:] & mask[:, :-1], anomaly.float().sigmoid()
    squares = (probability[:, 1:] - probability[:, :-1]).square() * pairs
    return global_mean(squares.sum(), pairs.sum())


class VideoLoss:
    """The losses loss_* of the head, named as in LOSSES, and metrics.
    names: those that are computed. banks: negatives for "track" and "caption" from earlier steps. texts, ids: unit
    vectors (U, D) and `caption_ids` (U,) of what captions and tracks say. top_share: of a video's clips that its label
    is about."""

    def __init__(self, names: Collection[str], *, banks: Mapping, texts: Tensor, ids: Tensor, top_share: float, device):
        self.names, self.banks, self.texts, self.ids = set(names), dict(banks.items()), texts, ids
        self.top_share, self.device, self.use_banks = top_share, device, True

    def __call__(self, model: nn.Module, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of a batch of `collate_bags`; captions and tracks are stretches of clips against their texts.
        Metrics of "track" and "caption": _r1, hits among what the loss sees; _in_batch, the loss without the bank;
        _bank, the pairs in it, and _bank_events, those of events where it has two classes."""
        batch = to_device(batch, self.device)
        output, mask, metrics = model(batch), batch["mask"], {}
        losses = {
            "bag": bag_loss(output["anomaly"], mask, 1 - batch["targets"][:, 0], self.top_share),
            "class": class_loss(output["classes"], mask, batch["targets"], self.top_share),
            "texts": text_separation(output["texts"]), "smooth": smoothness(output["anomaly"], mask),
        }  # fmt: skip
        *_, kinds, labels, rows = batch["spans"].unbind(1)
        for kind, name in enumerate(("caption", "track")):
            if name not in self.names:
                continue
            own, bank = kinds == kind, self.banks.get(name)
            spans, texts, ids = output["spans"][own], self.texts[rows[own]], self.ids[rows[own]]
            options = dict(ids=ids, bank=bank if self.use_banks else None, with_stats=True)
            losses[name], stats = symmetric_loss(spans, texts, output["scale"], **options)
            metrics[f"{name}_r1"] = stats["top1"] / stats["rows_with_negatives"].clamp(min=1)
            if bank is not None:
                with torch.no_grad():
                    metrics[f"{name}_in_batch"] = symmetric_loss(spans, texts, output["scale"], ids=ids)
                bank.enqueue(spans, texts, ids, labels[own])
                metrics[f"{name}_bank"] = torch.tensor(len(bank), device=self.device)
                metrics[f"{name}_bank_events"] = torch.tensor(len(bank.images[-1]), device=self.device)
        if "hard" in self.names:
            losses["hard"] = hard_negative_loss(
                output["spans"][batch["hard_rows"]], self.texts[batch["hard"]], output["scale"],
                counts=batch["hard_counts"], ids=self.ids[batch["hard"]],
            )  # fmt: skip
        return {f"loss_{name}": losses[name] for name in LOSSES if name in self.names}, metrics
