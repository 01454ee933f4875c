"""The videos of one or two cameras as frames, paired by time."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from macl.data import put_together
from trainkit.errors import InputError
from trainkit.files import reason
from trainkit.video import decoded, header, library

ROUNDING = 1e-3  # seconds by which a tolerance is stretched: some formats round time stamps to 1 ms


class Frame(NamedTuple):
    number: int  # of the decoded frames, from 0
    time: float  # seconds, from the video's beginning plus the offset
    picture: Callable[[], np.ndarray]  # makes its (H, W, 3) uint8 RGB


class Camera:
    """A video file, whose frames every pass decodes anew; none is kept. offset: seconds added to their times.

    rate: frames a second. claimed: frames by the header, or None. problem: why the latest pass broke off, or "".
    """

    def __init__(self, path: str, offset: float = 0.0):
        self.path, self.offset, self.problem = Path(path), offset, ""
        self.rate, frames, seconds = header(self.path)
        self.claimed = frames or (seconds and round(seconds * self.rate))

    def __iter__(self) -> Iterator[Frame]:
        self.problem, number = "", -1
        try:
            for number, (time, picture) in enumerate(decoded(self.path)):
                yield Frame(number, time + self.offset, picture)
        except library().FFmpegError as error:
            self.problem = f"{self.path} broke off after {number + 1} frames ({reason(error)})"


def paired(slow: Iterable[Frame], fast: Iterable[Frame], tolerance: float) -> Iterator[tuple[Frame, Frame]]:
    """Each frame of the slower camera with the nearest one of the faster, at most `tolerance` (s) away, each once."""
    fast = iter(fast)
    now, after = next(fast, None), next(fast, None)
    for frame in slow:
        while after is not None and abs(after.time - frame.time) < abs(now.time - frame.time):
            now, after = after, next(fast, None)
        if now is not None and abs(now.time - frame.time) <= tolerance + ROUNDING:
            yield frame, now
            now, after = after, next(fast, None)


class Videos:
    """The pairs of two videos, or the frames of one, as samples. paths: by modality. onto: see `put_together`.

    offset: how much later infrared began, in seconds. tolerance: see `paired`; None for half a frame of the faster one.
    """

    def __init__(self, paths: dict[str, str], onto=None, *, offset: float = 0.0, tolerance: float | None = None):
        if len(paths) == 2 and os.path.samefile(*paths.values()):
            raise InputError(f"{' and '.join(paths.values())} are the same video")
        cameras = {name: Camera(path, offset * (name == "infrared")) for name, path in paths.items()}
        self.paths, self.onto, self.cameras = paths, onto, cameras
        self.order = sorted(cameras, key=lambda name: cameras[name].rate)  # the slower first
        self.rate, fastest = (cameras[name].rate for name in (self.order[0], self.order[-1]))
        self.tolerance = float(1 / fastest / 2) if tolerance is None else tolerance
        self.total = cameras[self.order[0]].claimed

    def __iter__(self) -> Iterator[tuple[dict, dict, dict]]:
        """Images (3, H, W) uint8 by modality, None for that which is not given; paths; time and number of the frame."""
        cameras = [self.cameras[name] for name in self.order]
        for frames in paired(*cameras, self.tolerance) if len(cameras) == 2 else zip(*cameras, strict=True):
            frames = dict(zip(self.order, frames, strict=True))
            images = {name: np.ascontiguousarray(frame.picture()) for name, frame in frames.items()}
            images = {name: torch.from_numpy(image).permute(2, 0, 1) for name, image in images.items()}
            numbers = {f"{name}_frame": frame.number for name, frame in frames.items()}
            stamp = {"time": round(frames[next(iter(self.paths))].time, 6)} | numbers
            yield put_together({"visible": None, "infrared": None} | images, self.paths, self.onto), self.paths, stamp

    def summary(self, count: int) -> str:
        """What was paired, and where a video broke off, as a sentence."""
        each = " and ".join(f"{camera.claimed or '?'} {name}" for name, camera in self.cameras.items())
        pairs = f"{count} pairs, at most {self.tolerance:.3g} s apart, of" if len(self.cameras) == 2 else f"{count} of"
        return "; ".join([f"{pairs} {each} frames", *(one.problem for one in self.cameras.values() if one.problem)])
