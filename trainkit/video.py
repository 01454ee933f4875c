"""Video files by PyAV: opened, and written frame by frame. It is the extra `video`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import chain
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


def header(path: Path) -> tuple[Fraction, int | None, float | None]:
    """Frames a second, on average; their number and the length in seconds, None where the file does not say it."""
    with opened(path) as container:
        stream = container.streams.video[0]
        rate, frames, pixels = stream.average_rate or stream.guessed_rate, stream.frames, str(stream.pix_fmt)
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
    if pixels.startswith("gray1"):
        raise InputError(f"{path} has more than 8 bits per pixel ({pixels}); scale it to 8 bits first")
    if not rate:
        raise InputError(f"{path} does not say how many frames a second it has")
    return rate, frames or None, float(seconds) or None


def decoded(path: Path, start: float = 0.0) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """The frames as they are shown, from one that is shown at `start` (s) or before: the time of each in seconds from
    the video's beginning, and what makes its (H, W, 3) uint8 RGB. None is kept. Raises PyAV's FFmpegError of damage."""
    convert = library().video.reformatter.VideoReformatter()
    with opened(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # videos are decoded side by side, one in a process
        rate = float(stream.average_rate or stream.guessed_rate)
        for index, frame in enumerate(_decoded_from(container, stream, start)):
            time = index / rate if frame.pts is None else _shown_at(frame, stream)
            yield time, partial(_as_rgb, convert, frame)


def _decoded_from(container, stream, start: float) -> Iterator:
    """The decoded frames from the last key frame that is shown at `start` (s) or before."""
    if start > 0:
        # Some formats seek by the order of decoding, so that only an earlier moment, or one before all, leads there.
        for back in (*(2.0**i - 1 for i in range(12) if 2**i - 1 < start), start, start + 1):
            container.seek((stream.start_time or 0) + int((start - back) / stream.time_base), stream=stream)
            frames = container.decode(stream)
            first = next((frame for frame in frames if frame.key_frame), None)
            if first is not None and first.pts is not None and _shown_at(first, stream) <= start:
                return chain([first], frames)
        container.seek(stream.start_time or 0, stream=stream)
    return container.decode(stream)


def _shown_at(frame, stream) -> float:
    return float((frame.pts - (stream.start_time or 0)) * stream.time_base)


def _as_rgb(convert, frame) -> np.ndarray:
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
