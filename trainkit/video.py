"""Video files by PyAV: opened, and written frame by frame. It is the extra `video`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from trainkit.errors import InputError
from trainkit.files import reason, whole_file

TICKS = 90_000  # a second, of the time stamps that are written


def library():
    """PyAV. Raises InputError without it."""
    try:
        import av
    except ImportError as error:
        raise InputError("reading videos needs `pip install av`") from error
    return av


def opened(path: Path):
    """The container of a file with pictures. It reads nothing but this file."""
    av = library()
    try:
        only_files = {"protocol_whitelist": "file"}  # a playlist may name what it likes
        container = av.open(f"file:{os.path.abspath(path)}", metadata_errors="replace", options=only_files)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({reason(error)})") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{path} holds no pictures; expected a video")
    return container


def shown_at(frame, stream) -> float:
    return float((frame.pts - (stream.start_time or 0)) * stream.time_base)


def as_rgb(convert, frame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned as the file says that it is to be shown."""
    picture = convert.reformat(frame, format="rgb24").to_ndarray()
    return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture


@contextlib.contextmanager
def video_writer(path: str | Path, rate: Fraction) -> Iterator[Callable[[np.ndarray, float], None]]:
    """An mp4 (H.264) that gets its name when it is complete, as `whole_file` has it. rate: frames a second, about.

    Yields what adds a picture (H, W, 3) uint8 RGB, all of one size, and its time in seconds, later than that before.
    An odd side loses its last pixels, as H.264 needs even ones.
    """
    with whole_file(path) as file, library().open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, TICKS)
        yield partial(_add, container, stream)
        if stream.codec_context.is_open:
            container.mux(stream.encode())


def _add(container, stream, picture: np.ndarray, time: float) -> None:
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    frame = library().VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
    frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
    if not stream.codec_context.is_open:
        stream.height, stream.width = height, width
    container.mux(stream.encode(frame))
