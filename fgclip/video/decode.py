"""Videos as frames: files by PyAV, and folders of numbered images. Times are seconds from the beginning, by the video's
own time stamps. An index counts decoded frames."""

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from trainkit.errors import InputError
from trainkit.files import is_image, natural, open_image, reason, regular_file, shown
from trainkit.video import decoded, header, library

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
IMAGE_RATE = Fraction(30)  # frames a second of a folder of images, which does not say it
LEAST_SHARE = 0.95  # of what a header claims; with less the video counts as damaged
WALK = 2.0  # seconds up to which decoding on is no dearer than a seek

Step = tuple[float, Callable[[], np.ndarray]]  # time in seconds, and what makes its (H, W, 3) uint8 RGB


class Video:
    """The frames of a video. Every pass opens it anew, so that it can be sent to another process.
    rate: frames a second, on average. claimed, seconds: frames and length by the header, or None. After a full pass,
    count: decoded frames; damaged: whether too few of those claimed came; problem: a sentence where it broke off, or
    None.
    A subclass gives walk(start): the frames as they are shown, from one that is shown at `start` (s) or before."""

    count: int | None = None
    problem: str | None = None
    damaged = False
    error = ""  # of decoding, which ended the latest walk

    def __init__(self, path: Path, rate: Fraction, claimed: int | None = None, seconds: float | None = None):
        self.path, self.rate, self.claimed, self.seconds = path, rate, claimed, seconds

    def frames(self, period: int = 1, offsets: Collection[int] = (0,)) -> Iterator[tuple[int, float, np.ndarray]]:
        """Index, time in s and picture (H, W, 3) uint8 RGB of the frames whose index % period is in offsets, in order,
        and of the last two. Only these are converted. An error of decoding ends the pass. Raises InputError where the
        video cannot be opened, or one of its images."""
        self.count, self.problem, self.damaged = None, None, False
        count, time, waiting = 0, 0.0, deque()
        for time, picture in self.walk():
            waiting.append((count, time, picture))
            count += 1
            if len(waiting) > 2 and (earlier := waiting.popleft())[0] % period in offsets:
                yield *earlier[:2], earlier[2]()
        yield from ((index, moment, picture()) for index, moment, picture in waiting)
        reached = count / self.claimed if self.claimed else time / self.seconds if self.seconds else 1.0
        self.count, self.damaged = count, count == 0 or reached < LEAST_SHARE
        if self.error or self.damaged:
            claim = f"{count} of the {self.claimed}" if self.claimed else f"{count} ({time:.1f} s)"
            self.problem = f"{self.path} broke off: {claim} frames can be decoded ({self.error or 'nothing follows'})"

    def at(self, times: Sequence[float]) -> list[np.ndarray]:
        """The pictures (H, W, 3) uint8 RGB shown at these moments (s), in any order; beyond an end its frame. Raises
        InputError where no frame can be decoded."""
        pictures, walk, now, following = {}, iter(()), None, None
        for time in sorted(set(times)):
            if now is None or (following is not None and time > following[0] + WALK):
                walk = self.walk(time)
                now, following = next(walk, None), next(walk, None)
            # Time stamps are rounded, to 1 ms in some formats.
            while following is not None and following[0] <= time + 0.1 / self.rate:
                now, following = following, next(walk, None)
            if now is None:
                raise InputError(f"{self.path}: no frame can be decoded at {time:g} s ({self.error or 'it is empty'})")
            pictures[time] = now[1]()
        return [pictures[time] for time in times]


class VideoFile(Video):
    """A file that PyAV reads. Raises InputError without PyAV, or where it is no video."""

    def __init__(self, path: Path):
        super().__init__(path, *header(path))

    def walk(self, start: float = 0.0) -> Iterator[Step]:
        self.error = ""
        try:
            yield from decoded(self.path, start)
        except library().FFmpegError as error:
            self.error = reason(error)


class ImageFolder(Video):
    """A folder of images whose names end in numbers, in a row. Raises InputError where they do not."""

    def __init__(self, path: Path):
        self.images = sorted(filter(is_image, os.listdir(path)), key=natural)
        if not self.images:
            raise InputError(f"{path} holds no images; expected a video, or a folder of numbered images")
        numbers = [int((re.findall(r"\d+", Path(name).stem) or [-1])[-1]) for name in self.images]
        for i, (before, number) in enumerate(pairwise(numbers)):
            if number != before + 1 or before < 0:
                names = f"{shown(self.images[i + 1])} follows {shown(self.images[i])}"
                raise InputError(f"{path}: {names}; expected the images of a video to be numbered in a row")
        super().__init__(path, IMAGE_RATE, len(numbers), float(len(numbers) / IMAGE_RATE))

    def walk(self, start: float = 0.0) -> Iterator[Step]:
        first = min(max(0, int(start * self.rate)), len(self.images) - 1)
        for index, name in enumerate(self.images[first:], first):
            yield float(index / self.rate), lambda path=self.path / name: np.asarray(open_image(path))


def open_video(path: str | Path) -> Video:
    """A video file, or a folder of numbered images. Raises InputError where it is neither, or cannot be read."""
    if os.path.isdir(path):
        return ImageFolder(Path(path))
    return VideoFile(regular_file(path, "a video, or a folder of numbered images"))
