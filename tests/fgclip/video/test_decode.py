"""Videos show the right frame at every index and time, and damage is one sentence with a count."""

import os
import pickle
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from videos import write_video

from fgclip.video.decode import open_video
from trainkit.errors import InputError

BITS, SIDE, COUNT = 8, 16, 240  # a frame's number is in black and white squares
NTSC = Fraction(30000, 1001)


def picture(number):
    """(SIDE, BITS * SIDE, 3) uint8."""
    bits = [number >> i & 1 for i in range(BITS)]
    return np.kron(np.array([bits]), np.full((SIDE, SIDE), 255))[..., None].repeat(3, 2).astype(np.uint8)


def shows(frame):
    assert frame.dtype == np.uint8 and frame.shape == (SIDE, BITS * SIDE, 3)
    return sum(int(square.mean() > 127) << i for i, square in enumerate(np.split(frame, BITS, axis=1)))


def written(path, rate=30, codec="libx264", count=COUNT, **options):
    write_video(path, map(picture, range(count)), rate, codec, **options)
    return path


def refusal(call, *arguments):
    with pytest.raises(InputError) as refused:
        call(*arguments)
    return str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "rate", "codec", "options"),
    [
        (".mp4", 30, "libx264", dict(g="250")),
        (".mp4", 30, "libx264", dict(g="12", bf="3")),
        (".avi", 25, "mpeg4", dict(g="12")),
        (".ts", 30, "libx264", dict(g="24", bf="3")),
        (".mkv", NTSC, "libx264", dict(g="48")),
        (".mp4", NTSC, "libx264", dict(g="48", bf="0")),
    ],
)
def test_every_frame_and_sixty_seeks_are_exact(tmp_path, suffix, rate, codec, options):
    video = pickle.loads(pickle.dumps(open_video(written(tmp_path / f"a{suffix}", rate, codec, **options))))
    times = {}
    for index, time, frame in video.frames():
        assert shows(frame) == index and abs(time - index / rate) < 1e-3
        times[index] = time
    assert (len(times), video.count, video.problem, video.damaged) == (COUNT, COUNT, None, False)
    assert abs(video.rate - rate) < 0.01 and abs(video.seconds - COUNT / rate) < 0.1
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, COUNT, 60)
    for chosen in (wanted[:30], wanted[30:]):
        inside = rng.uniform(0.01, 0.8, 30) / float(rate)  # any moment at which a frame is shown
        assert [shows(f) for f in video.at([times[i] + d for i, d in zip(chosen, inside, strict=True)])] == [*chosen]
        assert [shows(video.at([i / rate])[0]) for i in chosen] == [*chosen]
    assert [shows(frame) for frame in video.at([99.0, -1.0, 0.0])] == [COUNT - 1, 0, 0]


def test_the_frames_of_clips(tmp_path):
    video = open_video(written(tmp_path / "a.mp4", count=39))
    assert [index for index, *_ in video.frames(16, (8, 9))] == [8, 9, 24, 25, 37, 38]
    assert [(index, shows(f)) for index, _, f in video.frames(16, (8,))] == [(8, 8), (24, 24), (37, 37), (38, 38)]
    assert [index for index, *_ in video.frames(19, (0,))] == [0, 19, 37, 38] and video.count == 39


def test_a_variable_rate_goes_by_time_stamps(tmp_path):
    stamps = np.cumsum(np.random.default_rng(0).integers(5, 200, 60)) - 5  # ms
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("libx264", rate=30, options=dict(g="20"))
        stream.height, stream.width, stream.pix_fmt = SIDE, BITS * SIDE, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    video, times = open_video(tmp_path / "a.mkv"), (stamps - stamps[0]) / 1000
    found = list(video.frames())
    np.testing.assert_allclose([time for _, time, _ in found], times, atol=1.1e-3)
    moments = np.random.default_rng(1).uniform(0, times[-1], 60)
    moments = moments[np.abs(moments[:, None] - times).min(axis=1) > 4e-3]
    assert [shows(f) for f in video.at(moments)] == [*np.searchsorted(times, moments) - 1]


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".mp4"])
def test_a_damaged_file_says_how_far_it_can_be_read(tmp_path, suffix):
    path = written(tmp_path / f"a{suffix}", codec="mpeg4", g="12")
    content = path.read_bytes()
    half = len(content) // 2
    if suffix == ".mp4":  # without its end, the table of contents, it cannot be opened at all
        path.write_bytes(content[:half])
        assert str(path) in (say := refusal(open_video, path)) and "cannot be read as a video" in say
        half = (content.find(b"mdat") + content.find(b"moov")) // 2
    path.write_bytes(content[:half] + (b"\xff" * 300 + content[half + 300 :] if suffix == ".mp4" else b""))
    video = open_video(path)
    count = sum(1 for _ in video.frames())
    assert video.count == count < COUNT and video.damaged and "\n" not in video.problem
    assert video.problem.startswith(f"{path} broke off: {count} ") and "frames can be decoded" in video.problem


def test_a_folder_of_images_is_a_video(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(40):
        Image.fromarray(picture(i)).save(tmp_path / "a" / f"frame_{i + 1}.png")  # 10 comes after 9
    folder, video = open_video(tmp_path / "a"), open_video(written(tmp_path / "a.mp4", count=40))
    for arguments in ((), (16, (8, 9))):
        both = [[(i, round(t, 6), shows(f)) for i, t, f in one.frames(*arguments)] for one in (folder, video)]
        assert both[0] == both[1] and folder.count == video.count == 40
    moments = np.random.default_rng(0).uniform(0, 2, 40)
    assert [shows(f) for f in folder.at(moments)] == [shows(f) for f in video.at(moments)]
    (tmp_path / "a" / "frame_7.png").unlink()
    assert "'frame_8.png' follows 'frame_6.png'" in refusal(open_video, tmp_path / "a")


def test_what_is_no_video_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        file.mux([*stream.encode(sound), *stream.encode()])
    said = dict(a="cannot be read as a video", sound="holds no pictures", none="does not exist; expected a video")
    for name, words in said.items():
        assert words in refusal(open_video, tmp_path / f"{name}.mp4")
    assert "holds no images" in refusal(open_video, tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "av", None)
    assert refusal(open_video, tmp_path / "a.mp4") == "reading videos needs `pip install av`"


def test_memory_stays_flat(tmp_path):
    def used():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    frame = np.zeros((128, 128, 3), np.uint8)
    write_video(tmp_path / "a.mp4", (frame for _ in range(2000)), 30, "mpeg4")  # decoded, 98 MB
    sizes = [used() for index, *_ in open_video(tmp_path / "a.mp4").frames() if index in (300, 1999)]
    assert sizes[1] - sizes[0] < 8e6


def test_real_videos(shared):
    clips = shared / "data/video/clips"
    for name, count in (("Fighting033_x264_570_841", 271), ("RoadAccidents133_x264_270_451", 181)):
        video = open_video(clips / f"{name}.mp4")
        assert [frame.shape for *_, frame in video.frames(16, (8,))] == [(240, 320, 3)] * ((count + 7) // 16 + 2)
        assert video.count == count and video.problem is None and video.rate == 30
