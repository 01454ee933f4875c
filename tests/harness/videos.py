"""Videos written for tests."""

from fractions import Fraction
from pathlib import Path

import av


def write_video(path: Path, pictures, rate: Fraction | int, codec: str = "libx264", **options: str) -> None:
    """Write pictures (H, W, 3) uint8 RGB, H and W even, as a file of the kind that its suffix says (.mp4, .avi, .mkv).

    options: of the encoder, such as g="30", frames from one key frame to the next.
    """
    with av.open(str(path), "w", format={".mkv": "matroska", ".ts": "mpegts"}.get(path.suffix)) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        for index, picture in enumerate(pictures):
            if index == 0:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
