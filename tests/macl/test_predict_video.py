"""`python -m macl.predict` on videos: pairs by time, what is written of them, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import refused
from videos import write_video

from macl import predict
from macl.data import SyntheticPairs, moved
from macl.video import Frame, paired
from trainkit import drawing
from trainkit.errors import InputError
from trainkit.video import header, video_writer

av = pytest.importorskip("av", reason="PyAV is not installed")

ROOT = Path(__file__).resolve().parents[2]
BITS, SIDE = 8, 16  # a frame's number is in black and white squares


class Reader(torch.nn.Module):
    """In the place of a detector: it remembers the numbers in the frames. A box is as far right as its first number."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.fusion, self.roi_head, self.kwargs = Namespace(kind="mean"), Namespace(), {"classes": ["person"]}
        self.seen, self.stop_at = [], stop_at

    def forward(self, **images):
        shown = tuple(shows(images[name][0]) if name in images else None for name in ("visible", "infrared"))
        self.seen.append(shown)
        if len(self.seen) == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        box = [next(number for number in shown if number is not None), 2.0, 120.0, 14.0]
        return [{"boxes": torch.tensor([box]), "labels": torch.ones(1).long(), "scores": torch.tensor([0.5])}]


def shows(image):
    """The number in a (3, SIDE, BITS * SIDE) image of 0..1."""
    return sum(int(square.mean() > 0.5) << bit for bit, square in enumerate(image.split(SIDE, dim=2)))


def picture(number):
    bits = [number >> bit & 1 for bit in range(BITS)]
    return np.kron(np.array([bits]), np.full((SIDE, SIDE), 255))[..., None].repeat(3, 2).astype(np.uint8)


def write(path, rate, count, times=None):
    with video_writer(path, Fraction(rate)) as add:
        for number in range(count):
            add(picture(number), number / rate if times is None else times[number])
    return path


def run(monkeypatch, tmp_path, *flags, reader=None):
    """-> what the detector saw, and detections.json."""
    reader = reader or Reader()
    monkeypatch.setattr(predict, "load_detector", lambda path, **options: reader)
    monkeypatch.setattr(predict, "read_checkpoint", lambda path: {})
    monkeypatch.setattr(drawing, "MIN_SIDE", SIDE)  # pictures as small as the frames
    common = ["--checkpoint", "a.pt", "--output", tmp_path / "out", "--device", "cpu"]
    try:
        predict.main([str(flag) for flag in (*common, *flags)])
    finally:
        path = tmp_path / "out/detections.json"
        rows = json.loads(path.read_text()) if path.exists() else None
    return reader.seen, rows


def frames(*times):
    return [Frame(number, time, None) for number, time in enumerate(times)]


@pytest.mark.parametrize(
    ("slow", "fast", "tolerance", "pairs"),
    [
        ((0, 1, 2), (0, 1, 2), 0, [(0, 0), (1, 1), (2, 2)]),
        ((0, 1, 2), (0.6, 1.6, 2.6), 0.5, [(1, 0), (2, 1)]),  # 0.4 s away, not 0.6
        ((0, 3, 6), (0, 1, 2, 3, 4, 5, 6, 7), 0.5, [(0, 0), (1, 3), (2, 6)]),
        ((0, 1, 2), (0, 2), 0.5, [(0, 0), (2, 1)]),  # one was lost
        ((5, 6), (0, 1), 0.5, []),
        ((0, 1), (), 9, []),
        ((0, 1, 2), (0.4, 2.4), 9, [(0, 0), (1, 1)]),  # each once
        ((0.0,), (0.05000001,), 0.05, [(0, 0)]),  # time stamps are rounded
    ],
)
def test_a_frame_is_paired_with_the_nearest(slow, fast, tolerance, pairs):
    found = [(a.number, b.number) for a, b in paired(frames(*slow), frames(*fast), tolerance)]
    assert found == pairs


@pytest.mark.parametrize(("rates", "offset"), [((25, 25), 0.4), ((30, 9), -0.5), ((10, 25), 0.0), ((25, 24), 1.0)])
def test_every_frame_of_two_videos_is_paired_right(monkeypatch, tmp_path, capsys, rates, offset):
    """What both show at one moment is known from the rates."""
    paths = [write(tmp_path / f"{rate}-{i}.mp4", rate, 2 * rate) for i, rate in enumerate(rates)]
    seen, rows = run(monkeypatch, tmp_path, "--visible", paths[0], "--infrared", paths[1], "--offset", offset)
    for (visible, infrared), row in zip(seen, rows, strict=True):
        apart = abs(visible / rates[0] - infrared / rates[1] - offset)
        assert apart <= 0.5 / max(rates) + 1e-4
        assert (row["visible_frame"], row["infrared_frame"]) == (visible, infrared)
        assert row["time"] == pytest.approx(visible / rates[0], abs=1e-4)
        assert row["detections"][0]["box"][0] == visible and row["infrared"] == f"../{paths[1].name}"
    times = [row["time"] for row in rows]
    assert times == sorted(times) and len(rows) >= int((2 - abs(offset)) * min(rates)) - 1
    with av.open(str(tmp_path / "out/annotated.mp4")) as file:
        shown = [frame.time for frame in file.decode(video=0)]
    assert np.allclose(shown, np.array(times) - times[0], atol=1e-3)
    assert f"{len(rows)} pairs, at most " in (said := capsys.readouterr().out) and "frames a second" in said


def test_one_camera_and_times_that_jump(monkeypatch, tmp_path, capsys):
    times = np.cumsum([0, 1, 5, 1, 1, 30]) / 10
    path = write(tmp_path / "i.mp4", 10, 6, times)
    seen, rows = run(monkeypatch, tmp_path, "--infrared", path)
    assert seen == [(None, number) for number in range(6)] and "6 of 6 infrared frames" in capsys.readouterr().out
    assert np.allclose([row["time"] for row in rows], times, atol=1e-3)
    assert [row["infrared_frame"] for row in rows] == [*range(6)] and "visible" not in rows[0]


def test_a_video_that_is_cut_short_says_so(monkeypatch, tmp_path, capsys):
    """Of Matroska, whose header stands at the beginning."""
    path = tmp_path / "a.mkv"
    write_video(path, map(picture, range(200)), 25, g="5")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, rows = run(monkeypatch, tmp_path, "--visible", path)
    assert 0 < len(rows) < 200 and f"{len(rows)} of 200 visible frames" in capsys.readouterr().out


def test_grey_of_sixteen_bits_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "gray16le"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ones((32, 32), np.uint16), format="gray16le")))
        file.mux(stream.encode())
    with pytest.raises(InputError, match="more than 8 bits per pixel"):
        header(tmp_path / "a.mkv")


@pytest.mark.parametrize("video", [True, False])
def test_ctrl_c_leaves_whole_files(monkeypatch, tmp_path, capsys, video):
    if video:
        path = write(tmp_path / "v.mp4", 25, 50)
    else:
        path = tmp_path / "v"
        path.mkdir()
        for number in range(5):
            Image.fromarray(picture(number)).save(path / f"{number}.png")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, "--visible", path, reader=Reader(stop_at=3))
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out/detections.json").read_text())) == 3
    if video:
        with av.open(str(tmp_path / "out/annotated.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == 3
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_rig_is_found_in_videos(monkeypatch, tmp_path, capsys):
    sample = SyntheticPairs(1, 3)[0]
    still = {
        "visible": sample["visible"],
        "infrared": moved(sample | {"infrared": sample["visible"]}, (5, 0))["infrared"],
    }
    for name, image in still.items():
        with video_writer(tmp_path / f"{name}.mp4", Fraction(10)) as add:
            for number in range(12):
                add(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), number / 10)
    flags = [part for name in still for part in (f"--{name}", tmp_path / f"{name}.mp4")]
    _, rows = run(monkeypatch, tmp_path, *flags, "--register", "rig")
    assert "the shift (5, 0)" in capsys.readouterr().out and len(rows) == 12
    assert "visible" in rows[0] and "infrared" not in rows[0]  # the boxes are not in the pixels of its file


def test_bad_input_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(predict, "load_detector", lambda path, **options: Reader())
    monkeypatch.setattr(predict, "read_checkpoint", lambda path: {})
    monkeypatch.chdir(tmp_path)
    for name in ("v.mp4", "i.mp4"):
        write(name, 10, 5)
    with video_writer("large.mp4", Fraction(10)) as add:
        add(np.zeros((32, 64, 3), np.uint8), 0.0)
    Image.fromarray(picture(1)).save("a.png")
    Path("text.mp4").write_text("no video")
    for flags, said in (
        ("--visible v.mp4 --infrared i.mp4 --offset 60", "none of both within --tolerance"),
        ("--visible v.mp4 --infrared i.mp4 --offset 60 --register rig", "none of both within --tolerance"),
        ("--visible v.mp4 --infrared v.mp4", "v.mp4 and v.mp4 are the same video"),
        ("--visible v.mp4 --infrared a.png", "v.mp4 is a video and a.png is none"),
        ("--visible v.mp4 --infrared large.mp4", "v.mp4 is 128 x 16 but large.mp4 is 64 x 32; expected a registered"),
        ("--visible v.mp4 --offset 1", "--offset needs two videos"),
        ("--visible a.png --tolerance 1", "--tolerance needs two videos"),
        ("--visible text.mp4", "text.mp4 cannot be read as a video"),
        ("--visible v.mp4 --infrared i.mp4 --tolerance=-1", "--tolerance: expected a number of at least 0"),
        ("--visible v.mp4 --output a.png", "a.png cannot be written"),
    ):
        flags = ["--checkpoint", "a.pt", "--output", "out", "--device", "cpu", *flags.split()]
        assert said in refused(capsys, predict.main, *flags), flags
        assert not list(Path("out").glob("*")) if Path("out").exists() else True
    monkeypatch.setitem(sys.modules, "av", None)
    flags = ["--checkpoint", "a.pt", "--output", "out", "--visible", "v.mp4"]
    assert "needs `pip install av`" in refused(capsys, predict.main, *flags)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path):
    """Decoding, pairing, drawing and writing of small pictures; the detector keeps nothing by itself."""
    most, still = [], np.zeros((96, 128, 3), np.uint8)
    for count in (200, 2000):
        with video_writer(tmp_path / "visible.mp4", Fraction(30)) as add:
            for number in range(count):
                add(still, number / 30)
        shutil.copy(tmp_path / "visible.mp4", tmp_path / "infrared.mp4")
        code = (
            "import resource; from macl import predict; from trainkit import drawing; "
            "from test_predict_video import Reader\n"
            "drawing.MIN_SIDE, predict.read_checkpoint = 32, lambda path: {}\n"
            "predict.load_detector = lambda path, **options: Reader()\n"
            "predict.main('--checkpoint a --visible visible.mp4 --infrared infrared.mp4 --output out'.split())\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests/harness", ROOT / "tests/macl")))
        here = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
        done = subprocess.run([sys.executable, "-c", code], **here, capture_output=True, text=True, check=True)
        assert f"{count} pairs" in done.stdout
        most.append(float(done.stdout.split()[-1]))
    assert most[1] < most[0] + 20, most
