"""Surveillance videos of moving shapes, half of them with an event, drawn from a seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from fgclip.synthetic import COLOURS, KINDS, alterations, paint, phrase
from fgclip.video.decode import Step, Video
from fgclip.video.records import Span, Track, VideoRecord, VideoSet

EVENTS = ("explosion", "fight", "speeding", "fire")
VERBS = dict(fight="fighting", speeding="speeding", fire="burning")  # of the shapes that an event is about
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


@dataclass(frozen=True)
class Plan:
    """Everything about a video: what is in it, where it moves, and what happens from frame `start` to `end`."""

    frames: int
    kinds: list[tuple[str, str, str]]  # colour, texture and shape of each of N things
    sides: np.ndarray  # (N,)
    origin: np.ndarray  # (N, 2), of their centres, before reflection
    velocity: np.ndarray  # (N, 2) per frame
    event: str | None
    actors: list[int]  # the things that the event is about
    start: int
    end: int
    spot: np.ndarray  # (2,), where it explodes
    lamp: tuple[float, float, int] | None  # x, y and the frames from one change to the next

    def centres(self, frames: np.ndarray) -> np.ndarray:
        """(N, F, 2) in 0..1 at these frames (F,)."""
        time = np.repeat(frames[None].astype(float), len(self.kinds), axis=0)  # (N, F)
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
        """(N, F, 4) xyxy in 0..1."""
        centres, half = self.centres(frames), self.sides[:, None, None] / 2
        return np.concatenate([centres - half, centres + half], axis=2).clip(0, 1)

    def happens(self, frame: int) -> bool:
        return self.event is not None and self.start <= frame < self.end

    def blast(self, frames: np.ndarray) -> np.ndarray:
        """The box (F, 4) of the ring of an explosion, which grows again and again."""
        half = (0.06 + 0.2 * ((frames - self.start) % PULSE) / (PULSE - 1))[:, None]
        return np.concatenate([self.spot - half, self.spot + half], axis=1)


class SyntheticVideos(VideoSet):
    """`count` videos of a seed: three moving shapes each, and an event of one of four kinds in every second one.

    An explosion is a ring that grows again and again; in a fight two shapes meet and shake; speeding is a shape five
    times as fast; fire turns a shape to flickering orange. Lamps blink and orange shapes move in all videos, so that
    neither motion nor colour alone is a sign.
    """

    missing = ()  # they are drawn when they are opened

    def __init__(self, count: int, *, seed: int, image_size: int = 64):
        self.seed, self.image_size = seed, image_size
        self.plans = {f"video-{seed}-{index}": plan(seed, index) for index in range(count)}
        super().__init__([record(name, plan) for name, plan in self.plans.items()], EVENTS)

    def open(self, record: VideoRecord) -> "DrawnVideo":
        return DrawnVideo(record.name, self.plans[record.name], self.image_size)


class DrawnVideo(Video):
    """A video that is drawn frame by frame, at 30 frames per second."""

    def __init__(self, name: str, plan: Plan, image_size: int):
        super().__init__(Path(name), Fraction(30), plan.frames, plan.frames / 30)
        self.plan, self.seed = plan, tuple(map(int, name.split("-")[1:]))
        rng = np.random.default_rng((*self.seed, 1))
        grain = 0.03 * rng.standard_normal((image_size, image_size, 3))
        self.background = (rng.uniform(0.3, 0.6) + grain).astype(np.float32)  # (S, S, 3)

    def walk(self, start: float = 0.0) -> Iterator[Step]:
        return ((index / 30, partial(self.draw, index)) for index in range(self.plan.frames))

    def at(self, times: Sequence[float]) -> list[np.ndarray]:
        return [self.draw(min(max(int(time * 30 + 1e-6), 0), self.plan.frames - 1)) for time in times]

    def draw(self, frame: int) -> np.ndarray:
        """(S, S, 3) uint8."""
        plan, canvas, happens = self.plan, self.background.copy(), self.plan.happens(frame)
        boxes = plan.boxes(np.array([frame]))[:, 0]
        rng = np.random.default_rng((*self.seed, 2, frame))
        if plan.lamp is not None and frame // plan.lamp[2] % 2:
            x, y, _ = plan.lamp
            paint(canvas, np.array([x, y, x + 0.1, y + 0.1]), "square", "plain", np.array([1.0, 1.0, 0.8]))
        for i, (colour, texture, shape) in enumerate(plan.kinds):
            rgb = np.array(COLOURS[colour])
            if happens and plan.event == "fire" and i in plan.actors:
                rgb = np.array(COLOURS["orange"]) * rng.uniform(0.6, 1.3)
                texture = ("plain", "dotted", "checked")[rng.integers(3)]
            paint(canvas, boxes[i], shape, texture, rgb)
        if happens and plan.event == "explosion":
            paint(canvas, plan.blast(np.array([frame]))[0], "ring", "plain", np.array([1, 0.9, 0.6]))
        canvas += 0.01 * rng.standard_normal(canvas.shape, dtype=np.float32)
        return (255 * canvas.clip(0, 1)).round().astype(np.uint8)


def plan(seed: int, index: int) -> Plan:
    """What happens in video `index`: an event in every odd one, each kind equally often."""
    rng = np.random.default_rng((seed, index, 0))
    frames, sides = int(rng.integers(*FRAMES, endpoint=True)), rng.uniform(0.2, 0.3, 3)
    angle, speed = rng.uniform(0, 2 * np.pi, 3), rng.uniform(*SPEED, 3)
    length = round(frames * rng.uniform(*SHARE))
    start = int(rng.integers(0, frames - length + 1))
    event = EVENTS[index // 2 % len(EVENTS)] if index % 2 else None
    actors = dict(explosion=[], fight=[0, 1], speeding=[0], fire=[0]).get(event, [])
    lamp = (*rng.uniform(0, 0.9, 2), int(rng.integers(3, 12))) if rng.random() < LAMPS else None
    return Plan(
        frames, [KINDS[i] for i in rng.choice(len(KINDS), 3, replace=False)], sides, rng.uniform(0, 2, (3, 2)),
        speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), event, actors, start, start + length,
        rng.uniform(0.3, 0.7, 2), lamp,
    )  # fmt: skip


def record(name: str, plan: Plan) -> VideoRecord:
    """The labels of a drawn video: classes, events, tracks with phrases, and captions."""
    things, whole = ", ".join(f"{colour} {shape}" for colour, _, shape in plan.kinds), [(0, plan.frames)]
    if plan.event is None:
        tracks = [track(plan, i, whole) for i in range(3)]
        return VideoRecord(name, None, (), (), tuple(tracks), (Span(0.0, plan.frames / 30, things, False),))
    outside = [(start, end) for start, end in ((0, plan.start), (plan.end, plan.frames)) if start < end]
    tracks = [track(plan, i, outside if i in plan.actors else whole) for i in range(3)]
    tracks += [track(plan, i, [(plan.start, plan.end)], plan.event) for i in plan.actors]
    if plan.event == "explosion":
        frames = np.arange(plan.start, plan.end)
        keys = frames / 30, plan.blast(frames).clip(0, 1)
        tracks.append(Track((keys,), ("an explosion",), True, tuple(map(phrase, plan.kinds))))
    event = (plan.start / 30, plan.end / 30)
    captions = [Span(start / 30, end / 30, things, False) for start, end in outside]
    captions.append(Span(*event, f"{things}, {plan.event}", True))
    return VideoRecord(name, None, (plan.event,), ((*event, plan.event),), tuple(tracks), tuple(captions))


def track(plan: Plan, thing: int, parts: list[tuple[int, int]], event: str | None = None) -> Track:
    """One thing in some parts of the video; its phrase says what it does in an event."""
    keys = [np.unique([*range(start, end, KEY_EVERY), end - 1]) for start, end in parts]
    stretches = tuple((frames / 30, plan.boxes(frames)[thing]) for frames in keys)
    kind = plan.kinds[thing]
    texts = {None: phrase(kind)} | {name: f"a {verb} {' '.join(kind)}" for name, verb in VERBS.items()}
    others = tuple(text for name, text in texts.items() if name != event)
    return Track(stretches, (texts[event],), event is not None, (*others, *alterations(kind)[:4]))


def sentences() -> list[str]:
    """Every word of the drawn videos, for a vocabulary."""
    return [*PROMPTS["normal"], *(f"a {verb} {' '.join(kind)}" for verb in VERBS.values() for kind in KINDS),
            "an explosion", *(f"{phrase(kind)}, {event}" for kind in KINDS for event in EVENTS)]  # fmt: skip
