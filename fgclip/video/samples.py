"""What a training step sees of a video: one frame with boxes for the towers, or all of its clips for the head."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fgclip.data import Record, Region, Sample, draw_sample
from fgclip.images import preprocess
from fgclip.video.records import VideoRecord, VideoSet
from fgclip.video.store import Clips

EVENT_SHARE = 0.6  # of the frames of a video with tracks of events are drawn from these
WHOLE = 60.0  # seconds from which a frame is drawn for a caption without an end
SPANS = 4  # captions and tracks of a video per visit of the head


class VideoFrames(Dataset):
    """A frame of each video, drawn anew at every visit, as a `Sample`: tracks are its regions.

    A video about which nothing is said stands for another. Label 1 says that a track of an event is in the frame.
    margin: seconds beyond its key frames up to which a track is taken to be there.
    """

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
        spans = [(times[0], times[-1]) for track in tracks for times, _ in track.stretches]
        spans = spans or [(span.start, min(span.end, span.start + WHOLE)) for span in record.captions]
        start, end = draw.choices(spans, [end - start + 1e-3 for start, end in spans])[0]
        moment = draw.uniform(start, end)
        regions, label = [], 0
        for track in record.tracks:
            boxes, inside = track.boxes_at(np.array([moment]), self.margin)
            if inside[0]:
                regions.append(Region(tuple(boxes[0].tolist()), track.phrases, track.negatives))
                label = max(label, int(track.event))
        captions = [span.text for span in record.captions if span.start <= moment <= span.end]
        captions = captions or [span.text for span in record.captions[:1]] or [""]
        source = f"{record.name}, {moment:.2f} s"
        picture = Record(record.name, tuple(captions), regions=tuple(regions), label=label, source=source)
        return record, moment, draw_sample(picture, draw)


@dataclass
class Bag:
    """A video's clips, its classes, and some of its captions and tracks as stretches of clips."""

    features: dict[str, Tensor]  # (T, ...)
    target: Tensor  # (1 + C,), rows of the class texts
    spans: list[tuple[int, int, bool, bool, list[int]]]  # see `ClipBags`
    source: str


class ClipBags(Dataset):
    """Videos as bags of clips. A longer one is averaged to `most_clips` stretches, as is the field's rule.

    clips: name of a video -> its features; one without stands for the next with the same label.
    clip_frames: frames per clip. texts: what captions and tracks say -> row of a table of features.
    A span is first clip, end, whether it is a track's, whether it is of an event, and rows of texts: its own, and those
    of its altered phrases.
    """

    def __init__(
        self, videos: VideoSet, clips: Mapping[str, Clips], *, clip_frames: int, texts: Mapping[str, int],
        most_clips: int, seed: int,
    ):  # fmt: skip
        self.videos, self.clips, self.clip_frames = videos, clips, clip_frames
        self.texts, self.most_clips, self.seed = texts, most_clips, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Bag:
        epoch, index = key
        record = self.videos.records[index]
        if record.name not in self.clips:
            following = self.videos.records[index:] + self.videos.records[:index]
            alike = (r for r in following if r.name in self.clips and bool(r.classes) == bool(record.classes))
            record = next(alike)
        clips = self.clips[record.name]
        features, seconds = clips.tensors(), float(self.clip_frames / clips.rate)
        length = len(features["global"])
        if length > self.most_clips:
            features = {name: shortened(value, self.most_clips) for name, value in features.items()}
            seconds, length = seconds * length / self.most_clips, self.most_clips
        target = torch.zeros(1 + len(self.videos.classes))
        rows = [1 + self.videos.classes.index(name) for name in record.classes] or [0]
        target[rows] = 1 / len(rows)
        parts = [(span.start, span.end, False, span.event, [span.text]) for span in record.captions]
        parts += [
            (times[0], times[-1], True, track.event, [track.phrases[0], *track.negatives])
            for track in record.tracks
            for times, _ in track.stretches
        ]
        draw, spans = random.Random(f"{self.seed} {epoch} {index}"), []
        for start, end, tracked, event, said in draw.sample(parts, min(SPANS, len(parts))):
            first = min(int(start / seconds), length - 1)
            last = max(first + 1, round(min(end / seconds, length)))
            spans.append((first, last, tracked, event, [self.texts[text] for text in said]))
        return Bag(features, target, spans, record.name)


def shortened(values: Tensor, count: int) -> Tensor:
    """(T, ...) to the means of `count` equal stretches, T > count."""
    ends = torch.arange(count + 1) * len(values) // count
    sums = torch.cat([torch.zeros_like(values[:1], dtype=torch.float64), values.double().cumsum(0)])
    return ((sums[ends[1:]] - sums[ends[:-1]]) / (ends[1:] - ends[:-1])[:, None]).float()


def collate_bags(samples: Sequence[Bag]) -> dict:
    """features (B, T, ...) padded with 0, mask (B, T), targets (B, 1 + C); of N spans (N,) videos, starts, ends, kinds
    (1 of a track), labels (1 of an event) and texts; hard (H,) texts of the spans hard_rows (J,) that have altered
    ones, each span's own first, and their hard_counts (J,); sources."""
    names, spans = samples[0].features, [(i, *span) for i, sample in enumerate(samples) for span in sample.spans]
    lengths = torch.tensor([len(sample.features["global"]) for sample in samples])
    columns = zip(*(span[:5] for span in spans), strict=True) if spans else [()] * 5
    hard = {i: span[5] for i, span in enumerate(spans) if len(span[5]) > 1}
    return dict(
        features={name: pad_sequence([s.features[name] for s in samples], batch_first=True) for name in names},
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        targets=torch.stack([sample.target for sample in samples]),
        **dict(zip(("videos", "starts", "ends", "kinds", "labels"), map(integers, columns), strict=True)),
        texts=integers([span[5][0] for span in spans]), hard=integers([row for rows in hard.values() for row in rows]),
        hard_rows=integers(list(hard)), hard_counts=integers([len(rows) for rows in hard.values()]),
        sources=[sample.source for sample in samples],
    )  # fmt: skip


def integers(values: Sequence) -> Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)
