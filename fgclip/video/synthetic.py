"""Surveillance videos of moving shapes, half of them with an event, drawn from a seed."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from fgclip.synthetic import COLOURS, KINDS, alterations, paint, phrase
from fgclip.video.decode import Step, Video
from fgclip.video.records import Span, Track, VideoRecord, VideoSet

EVENTS = ("explosion", "fight", "speeding", "fire")
ACTORS = dict(fight=[0, 1], speeding=[0], fire=[0])  # which of its three things an event is about
VERBS = dict(fight="fighting", speeding="speeding", fire="burning")  # what they do
FRAMES = (96, 160)  # of a video
SHARE = (0.12, 0.3)  # of a video that its event takes
SPEED = (0.004, 0.012)  # of a shape, in image sides per frame
FASTER = 5  # times that, where it speeds
LAMPS = 0.4  # share of all videos with a blinking lamp, which means nothing
RAMP = 6  # frames in which two shapes come together
PULSE = 9  # frames in which an explosion grows
KEY_EVERY = 4  # frames between the key frames of a track
# Sentences for the classes, made of what the phrases of tracks say. Row 0 is a video without event.
PROMPTS = {"normal": tuple(f"a {colour} {shape}" for colour in COLOURS for shape in ("ring", "square", "circle"))}
PROMPTS["explosion"] = ("an explosion",)
PROMPTS |= {name: tuple(f"a {verb} {text[2:]}" for text in PROMPTS["normal"]) for name, verb in VERBS.items()}


class SyntheticVideos(VideoSet):
    """`count` videos of a seed: three moving shapes each, and an event of one of four kinds in every second one.
    An explosion is a ring that grows again and again; in a fight two shapes meet and shake; speeding is a shape five
    times as fast; fire turns a shape to flickering orange. Lamps blink and orange shapes move in all videos, so that
    neither motion nor colour alone is a sign."""

    missing = ()  # they are drawn when they are opened

    def __init__(self, count: int, *, seed: int, image_size: int = 64):
        self.seed, self.image_size = seed, image_size
        super().__init__([DrawnVideo(seed, index, image_size).record() for index in range(count)], EVENTS)

    def open(self, record: VideoRecord) -> "DrawnVideo":
        return DrawnVideo(*map(int, record.name.split("-")[1:]), self.image_size)


class DrawnVideo(Video):
    """Video `index` of a seed, drawn frame by frame, 30 a second. It has an event if odd, each kind equally often."""

    def __init__(self, seed: int, index: int, image_size: int):
        rng = np.random.default_rng((seed, index, 0))
        frames, self.sides = int(rng.integers(*FRAMES, endpoint=True)), rng.uniform(0.2, 0.3, 3)
        angle, speed = rng.uniform(0, 2 * np.pi, 3), rng.uniform(*SPEED, 3)
        self.velocity = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (3, 2) per frame
        length = round(frames * rng.uniform(*SHARE))
        self.start = int(rng.integers(0, frames - length + 1))
        self.end = self.start + length
        self.event = EVENTS[index // 2 % len(EVENTS)] if index % 2 else None
        self.actors = ACTORS.get(self.event, [])
        # x, y and the frames from one change to the next.
        self.lamp = (*rng.uniform(0, 0.9, 2), int(rng.integers(3, 12))) if rng.random() < LAMPS else None
        self.kinds = [KINDS[i] for i in rng.choice(len(KINDS), 3, replace=False)]
        self.origin = rng.uniform(0, 2, (3, 2))  # of their centres, before reflection
        self.spot = rng.uniform(0.3, 0.7, 2)  # where it explodes
        self.seed, rng = (seed, index), np.random.default_rng((seed, index, 1))
        grain = 0.03 * rng.standard_normal((image_size, image_size, 3))
        self.background = (rng.uniform(0.3, 0.6) + grain).astype(np.float32)  # (S, S, 3)
        super().__init__(Path(f"video-{seed}-{index}"), Fraction(30), frames, frames / 30)

    def centres(self, frames: np.ndarray) -> np.ndarray:
        """(3, F, 2) in 0..1 at these frames (F,)."""
        time = np.repeat(frames[None].astype(float), len(self.kinds), axis=0)  # (3, F)
        if self.event == "speeding":
            time[self.actors] += (FASTER - 1) * (frames.clip(self.start, self.end) - self.start)
        path = self.origin[:, None] + self.velocity[:, None] * time[..., None]
        room = 1 - self.sides[:, None, None]
        centres = room * (1 - abs(path % 2 - 1)) + self.sides[:, None, None] / 2  # reflected at the borders
        if self.event == "fight":
            inside = np.minimum(frames - self.start, self.end - 1 - frames)
            near = ((inside + 1) / RAMP).clip(0, 1)[:, None]  # (F, 1), 1 where they are together
            shake = 0.03 * np.stack([np.sin(2.1 * frames), np.cos(2.9 * frames)], axis=1)
            for sign, actor in zip((-1, 1), self.actors, strict=True):
                together = 0.5 + 0.4 * (self.spot - 0.5) + sign * (np.array([0.08, 0]) + shake)
                centres[actor] += near * (together - centres[actor])
        return centres

    def boxes(self, frames: np.ndarray) -> np.ndarray:
        """(3, F, 4) xyxy in 0..1."""
        centres, half = self.centres(frames), self.sides[:, None, None] / 2
        return np.concatenate([centres - half, centres + half], axis=2).clip(0, 1)

    def blast(self, frames: np.ndarray) -> np.ndarray:
        """The box (F, 4) of the ring of an explosion, which grows again and again."""
        half = (0.06 + 0.2 * ((frames - self.start) % PULSE) / (PULSE - 1))[:, None]
        return np.concatenate([self.spot - half, self.spot + half], axis=1)

    def walk(self, start: float = 0.0) -> Iterator[Step]:
        return ((index / 30, partial(self.draw, index)) for index in range(self.claimed))

    def at(self, times: Sequence[float]) -> list[np.ndarray]:
        return [self.draw(min(max(int(time * 30 + 1e-6), 0), self.claimed - 1)) for time in times]

    def draw(self, frame: int) -> np.ndarray:
        """(S, S, 3) uint8."""
        canvas, now = self.background.copy(), np.array([frame])
        event = self.event if self.start <= frame < self.end else None
        rng = np.random.default_rng((*self.seed, 2, frame))
        if self.lamp is not None and frame // self.lamp[2] % 2:
            x, y, _ = self.lamp
            paint(canvas, np.array([x, y, x + 0.1, y + 0.1]), "square", "plain", np.array([1.0, 1.0, 0.8]))
        for i, (box, (colour, texture, shape)) in enumerate(zip(self.boxes(now)[:, 0], self.kinds, strict=True)):
            rgb = np.array(COLOURS[colour])
            if event == "fire" and i in self.actors:
                rgb = np.array(COLOURS["orange"]) * rng.uniform(0.6, 1.3)
                texture = ("plain", "dotted", "checked")[rng.integers(3)]
            paint(canvas, box, shape, texture, rgb)
        if event == "explosion":
            paint(canvas, self.blast(now)[0], "ring", "plain", np.array([1, 0.9, 0.6]))
        canvas += 0.01 * rng.standard_normal(canvas.shape, dtype=np.float32)
        return (255 * canvas.clip(0, 1)).round().astype(np.uint8)

    def record(self) -> VideoRecord:
        """Classes, events, tracks with phrases, and captions."""
        name, things = self.path.name, ", ".join(f"{colour} {shape}" for colour, _, shape in self.kinds)
        whole, parts = [(0, self.claimed)], [(0, self.start), (self.end, self.claimed)]
        outside = whole if self.event is None else [(start, end) for start, end in parts if start < end]
        tracks = [self.track(i, outside if i in self.actors else whole) for i in range(3)]
        captions = [Span(start / 30, end / 30, things, False) for start, end in outside]
        if self.event is None:
            return VideoRecord(name, None, (), (), tuple(tracks), tuple(captions))
        tracks += [self.track(i, [(self.start, self.end)], self.event) for i in self.actors]
        if self.event == "explosion":
            frames = np.arange(self.start, self.end)
            keys = frames / 30, self.blast(frames).clip(0, 1)
            tracks.append(Track((keys,), ("an explosion",), True, tuple(map(phrase, self.kinds))))
        event = self.start / 30, self.end / 30
        captions.append(Span(*event, f"{things}, {self.event}", True))
        return VideoRecord(name, None, (self.event,), ((*event, self.event),), tuple(tracks), tuple(captions))

    def track(self, thing: int, parts: list[tuple[int, int]], event: str | None = None) -> Track:
        """One thing in some parts of the video; its phrase says what it does in an event."""
        keys = [np.unique([*range(start, end, KEY_EVERY), end - 1]) for start, end in parts]
        stretches = tuple((frames / 30, self.boxes(frames)[thing]) for frames in keys)
        kind = self.kinds[thing]
        texts = {None: phrase(kind)} | {name: f"a {verb} {' '.join(kind)}" for name, verb in VERBS.items()}
        others = tuple(text for name, text in texts.items() if name != event)
        return Track(stretches, (texts[event],), event is not None, (*others, *alterations(kind)[:4]))


def sentences() -> list[str]:
    """Every word of the drawn videos, for a vocabulary."""
    return [*PROMPTS["normal"], *(f"a {verb} {' '.join(kind)}" for verb in VERBS.values() for kind in KINDS),
            "an explosion", *(f"{phrase(kind)}, {event}" for kind in KINDS for event in EVENTS)]  # fmt: skip
