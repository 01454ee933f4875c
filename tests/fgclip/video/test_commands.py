"""`python -m fgclip.evaluate_video` and `python -m fgclip.watch`, and the curves that they draw."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, refused
from videos import write_video

from fgclip import FGCLIP, Tokenizer, evaluate_video, watch
from fgclip.tokenizer import learn_merges
from fgclip.video.features import INPUTS, ClipEncoder, Clips
from fgclip.video.metrics import VideoScores, anomaly_report
from fgclip.video.model import NORMAL, TemporalHead, VideoModel
from fgclip.video.records import VideoRecord
from fgclip.video.synthetic import PROMPTS, SyntheticVideos, sentences
from fgclip.video_plots import best_and_worst, clock, draw_curve, peaks
from trainkit.files import open_image

SIDE = 32
pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tower, tokenizer = dict(width=16, layers=1, heads=2, mlp_width=32), Tokenizer(learn_merges(sentences()))
    text = dict(vocab_size=tokenizer.vocab_size, context_length=16, **tower)
    towers = FGCLIP(vision=dict(image_size=SIDE, patch_size=8, **tower), text=text, embed_dim=16)
    head = TemporalHead(16, classes=4, layers=1, window=2, heads=2)
    clips = dict(clip_frames=4, frames_per_clip=1)
    model = VideoModel(towers, head, tokenizer, prompts=PROMPTS, clips=clips, supervision="labels of videos alone")
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.save(dict(script="video", model=model.state_dict(), ema=None, **model.constants()), path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight drawn videos in files, laid out as UCF-Crime is."""
    pytest.importorskip("av", reason="PyAV is not installed")
    root, videos, lists, times = tmp_path_factory.mktemp("ucf"), SyntheticVideos(8, seed=3, image_size=SIDE), [], []
    for record in videos.records:
        kind = record.classes[0] if record.classes else "Normal"
        (root / kind).mkdir(exist_ok=True)
        pictures = (picture for _, _, picture in videos.open(record).frames())
        write_video(root / kind / f"{record.name}.mp4", pictures, 30)
        start, end = (round(30 * time) for time in record.events[0][:2]) if record.events else (-1, -1)
        lists.append(f"{kind}/{record.name}.mp4")
        times.append(f"{record.name}.mp4  {kind}  {start}  {end}  -1  -1  ")
    (root / "Anomaly_Test.txt").write_text("\n".join(lists))
    (root / "Temporal_Anomaly_Annotation.txt").write_text("\n".join(times))
    return root


def evaluate(checkpoint, *flags):
    evaluate_video.main([str(flag) for flag in ("--checkpoint", checkpoint, "--device", "cpu", *flags)])


def watched(checkpoint, video, output, *flags):
    flags = ("--checkpoint", checkpoint, "--device", "cpu", "--video", video, "--output", output, *flags)
    watch.main([str(flag) for flag in flags])
    return json.loads((output / "scores.json").read_text())


def expected(model, videos, **options):
    encoder = ClipEncoder(model.fgclip, **model.clips)
    scores = [model.scores(record, encoder.video(videos.open(record)))[0] for record in videos.records]
    return scores, anomaly_report(scores, model.classes, **options)


def images(folder, count):
    """The first pictures of an anomalous drawn video as a folder of numbered images; -> the video."""
    videos = SyntheticVideos(2, seed=3, image_size=SIDE)
    video = videos.open(videos.records[1])
    folder.mkdir(parents=True)
    for index, _, picture in video.frames():
        if index < count:
            Image.fromarray(picture).save(folder / f"{index:04}.png")
    return video


def test_drawn_videos(checkpoint, model, tmp_path, capsys):
    report, curves = tmp_path / "report.json", tmp_path / "curves.png"
    evaluate(checkpoint, "--count", 8, "--seed", 3, "--output", report, "--plot", curves)
    said, written = capsys.readouterr().out.splitlines(), json.loads(report.read_text())
    assert said[0].startswith("supervision: labels of videos alone (")
    assert said[1].startswith("8 videos drawn from seed 3") and said[3].startswith("8 videos, 4 anomalous; ")
    scores, wanted = expected(model, SyntheticVideos(8, seed=3, image_size=SIDE))
    assert written["metrics"]["counts"] == wanted["counts"] and len(wanted["scores"]) == 4
    for name, row in wanted["scores"].items():
        assert written["metrics"]["scores"][name] == pytest.approx(row, abs=1e-6), name
    one = written["videos"][1]
    assert one["scores"] == pytest.approx(scores[1].scores, abs=1e-5) and one["name"] == "video-3-1"
    assert (one["rate"], one["clip_frames"], one["frames"]) == (30, 4, scores[1].frames)
    assert one["classes"] == ["explosion"] and one["events"] == [list(event) for event in scores[1].events]
    assert open_image(curves).width == 990
    evaluate(checkpoint, "--count", 1, "--output", report)  # normal alone: nothing to rank
    assert '"auc": null' in report.read_text()


def test_videos_in_files(checkpoint, root, tmp_path, capsys, monkeypatch):
    """Features are made once. Frames are counted as in what the files were written from."""
    flags = ("--data-root", root, "--features", tmp_path / "features")
    evaluate(checkpoint, *flags, "--plot", tmp_path / "curves.png")
    first, videos = capsys.readouterr().out, SyntheticVideos(8, seed=3, image_size=SIDE)
    drawn = [videos.open(record) for record in videos.records]
    frames, positives = sum(each.claimed for each in drawn), sum(each.end - each.start for each in drawn if each.event)
    assert f"8 videos, 4 anomalous; {frames} frames, {positives} in events" in first
    assert (tmp_path / "curves.png").exists()
    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "video", None)
        evaluate(checkpoint, *flags)
    evaluate(checkpoint, "--data-root", root)
    assert capsys.readouterr().out == first + first


def test_lost_videos_are_named_and_counted(checkpoint, root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "part")
    (tmp_path / "part/Normal/video-3-0.mp4").unlink()
    cut = tmp_path / "part/fight/video-3-3.mp4"
    cut.write_bytes(cut.read_bytes()[:2000])
    flags = (checkpoint, "--data-root", tmp_path / "part", "--allow-missing")
    said = refused(capsys, evaluate_video.main, "--device", "cpu", "--checkpoint", *flags, 1)
    assert "2 videos are missing or damaged (--allow-missing goes without): video-3-0 (missing), video-3-3 (" in said
    evaluate(*flags, 2)
    said = capsys.readouterr().out.splitlines()
    assert ". Without 2: video-3-0 (missing), video-3-3 (" in said[1] and said[3].startswith("6 videos, 3 anomalous")


@pytest.mark.parametrize("name", ["ucf-crime", "xd-violence"])
def test_normal_is_a_class_of_xd_violence(name, checkpoint, model, tmp_path, monkeypatch):
    """The test videos are taken."""
    videos = SyntheticVideos(4, seed=5, image_size=SIDE)
    monkeypatch.setattr(evaluate_video, "read_videos", lambda *asked: videos if asked == ("X", name, "test") else None)
    evaluate(checkpoint, "--data-root", "X", "--format", name, "--output", tmp_path / "report.json")
    right, wrong = (expected(model, videos, normal_counts=x)[1] for x in (name == "xd-violence", name == "ucf-crime"))
    published = json.loads((tmp_path / "report.json").read_text())["metrics"]["map"]["published"]
    assert published == pytest.approx(right["map"]["published"], abs=1e-6) != wrong["map"]["published"]


def test_events_are_in_frames_of_the_video_s_own_rate(model):
    arrays = (np.zeros((10, width), np.float16) for width in (16, 16, 4))
    clips = Clips(dict(zip(INPUTS, arrays, strict=True)), frames=38, rate=Fraction(15))
    found, _ = model.scores(VideoRecord("a", None, ("fire",), ((1.0, 2.0, "fire"),)), clips)
    assert found.rate == 15 and found.events == ((15, 30, "fire"),)


def test_watching_a_folder_of_images(checkpoint, model, tmp_path, capsys):
    """Scores are the model's, a peak's picture is the middle of its clip, phrases are ranked by their cosines."""
    video, texts = images(tmp_path / "frames", 200), ["a red ring", "an explosion", ("a red ring " * 9).strip()]
    (tmp_path / "phrases.txt").write_text("\n".join([*texts, "", texts[0]]))
    flags = ("--phrases", tmp_path / "phrases.txt", "--peaks", 3)
    found = watched(checkpoint, tmp_path / "frames", tmp_path / "out" / "deep", *flags)
    expected, frames = model.scores(VideoRecord("x"), ClipEncoder(model.fgclip, **model.clips).video(video))
    scores, classes = expected.scores, expected.class_scores
    assert (found["name"], found["rate"], found["clip_frames"], found["frames"]) == ("frames", 30, 4, video.count)
    assert found["seconds"] == pytest.approx(video.count / 30) and found["scores"] == pytest.approx(scores, abs=1e-5)
    assert (names := list(found["probabilities"])) == [NORMAL, *model.classes]
    assert pytest.approx(classes, abs=1e-5) == np.array([*found["probabilities"].values()]).T
    said, cosines = capsys.readouterr().out, frames @ model.embed(texts)[0].numpy().T
    assert "1 phrases were longer than the model reads" in said and "supervision: labels of videos alone" in said
    assert [peak["clip"] for peak in found["peaks"]] == sorted(peaks(scores, 3)) and len(found["peaks"]) == 3
    for peak in found["peaks"]:
        clip, order = peak["clip"], np.argsort(-cosines[peak["clip"]])
        assert peak["time"] == pytest.approx((4 * clip + 2) / 30) and peak["class"] == names[classes[clip].argmax()]
        assert [one["phrase"] for one in peak["phrases"]] == [texts[i] for i in order]
        assert [one["cosine"] for one in peak["phrases"]] == pytest.approx(cosines[clip][order], abs=1e-3)
        picture = np.asarray(open_image(tmp_path / "out/deep" / peak["picture"]), dtype=float)
        errors = [abs(picture - video.draw(index)).mean() for index in range(video.count)]
        assert abs(int(np.argmin(errors)) - 4 * clip - 2) <= 1  # jpg
        assert clock(peak["time"]) in said and peak["phrases"][0]["phrase"] in said
    assert open_image(tmp_path / "out/deep/curves.png").width == 990


def test_without_phrases_the_sentences_of_the_classes_are_taken(checkpoint, tmp_path):
    images(tmp_path / "frames", 3)
    found = watched(checkpoint, tmp_path / "frames", tmp_path / "out")
    phrases = {one["phrase"] for one in found["peaks"][0]["phrases"]}
    assert len(found["scores"]) == 1 and len(phrases) == watch.MOST_PHRASES
    assert phrases <= {text for texts in PROMPTS.values() for text in texts}


def test_watching_a_video_that_breaks_off(checkpoint, tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV is not installed")
    rng, path = np.random.default_rng(0), tmp_path / "x.mkv"
    write_video(path, rng.integers(0, 255, (60, 64, 96, 3), dtype=np.uint8), Fraction(24000, 1001))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = watched(checkpoint, path, tmp_path / "out")
    assert 10 < found["frames"] < 50 and "x.mkv broke off" in found["problem"] in capsys.readouterr().out
    assert found["rate"] == pytest.approx(24000 / 1001, abs=0.05)


@pytest.mark.parametrize("name, frames", [("Fighting033_x264_570_841", 271), ("RoadAccidents133_x264_270_451", 181)])
def test_watching_real_clips(name, frames, shared, checkpoint, tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    found = watched(checkpoint, shared / f"data/video/clips/{name}.mp4", tmp_path / "out")
    assert found["frames"] == frames and found["problem"] is None and found["rate"] == 30
    assert len(found["scores"]) == -(-frames // 4) and np.isfinite(found["scores"]).all() and found["peaks"]


def test_bad_input_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "root" / "picnic" / "one", 2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "text.mp4").write_text("no video, no weights")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "taken/index.json").write_text('{"key": {"dim": 1, "clip_frames": 4}}')
    torch.save(torch.load(shutil.copy(checkpoint, "best.pt")) | dict(script="fgclip"), "other.pt")
    watching = "--output out --video root/picnic/one"
    for command, flags, said in (
        (evaluate_video, "--checkpoint none.pt", "none.pt does not exist"),
        (evaluate_video, "--checkpoint text.mp4", "text.mp4 was not written by torch.save"),
        (evaluate_video, "--checkpoint other.pt", "other.pt is not a checkpoint of train_video.py"),
        (evaluate_video, "--output no/a.json", "--output no/a.json: expected a file in a folder that exists"),
        (evaluate_video, "--plot no/a.png", "--plot no/a.png: expected a file in a folder that exists"),
        (evaluate_video, "--format folders", "--format needs --data-root"),
        (evaluate_video, "--allow-missing 3", "--allow-missing needs --data-root"),
        (evaluate_video, "--data-root . --seed 0", "--count and --seed are of drawn videos"),
        (evaluate_video, "--data-root none", "none is not a folder"),
        (evaluate_video, "--data-root root --format folders", "events of picnic; best.pt knows explosion, fight"),
        (evaluate_video, "--features taken --count 2", "taken holds features of another key"),
        (watch, "--output out --video none.mp4", "none.mp4 does not exist"),
        (watch, "--output out --video root", "root holds no images"),
        (watch, f"{watching} --phrases blank.txt", "blank.txt holds no phrases"),
        (watch, f"{watching} --phrases none.txt", "none.txt does not exist"),
        (watch, f"{watching} --output text.mp4", "text.mp4 cannot be written"),
        (watch, f"{watching} --peaks 0", "--peaks: expected a whole number"),
    ):  # fmt: skip
        assert said in refused(capsys, command.main, "--checkpoint", "best.pt", *flags.split()), flags
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command, flags in ((watch, "--video none --output none"), (evaluate_video, "--plot x.png")):
        assert "need matplotlib: pip install" in refused(capsys, command.main, "--checkpoint", "none", *flags.split())


@pytest.mark.slow
def test_memory_of_watching_does_not_grow_with_the_length(checkpoint, tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    most, still = [], np.zeros((240, 320, 3), dtype=np.uint8)
    for name, count in (("short.mp4", 300), ("long.mp4", 6000)):
        write_video(tmp_path / name, (still for _ in range(count)), 30)
        flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "--video", name, "--output", "out"]
        code = f"from fgclip import watch; watch.main({flags}); print(open('/proc/self/status').read())"
        here = dict(cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
        said = subprocess.run([sys.executable, "-c", code], **here, capture_output=True, text=True, check=True).stdout
        most.append(int(said.partition("VmHWM:")[2].split()[0]) / 1024)  # MiB
    assert most[1] < most[0] + 30, most


def video(scores, events=(), classes=None, name="video", rate=30):
    classes = tuple({event[2] for event in events or ()}) if classes is None else classes
    scores = np.array(scores, dtype=float)
    return VideoScores(name, classes, events, 4 * len(scores), 4, scores, np.zeros((len(scores), 2)), Fraction(rate))


def test_peaks_and_times():
    assert peaks(np.array([0, 5, 4, 0, 0, 3, 0, 9.0]), 2) == [7, 1] and peaks(np.ones(3), 5) == [0, 2]
    assert peaks(np.exp(-(np.linspace(-3, 3, 101) ** 2)), 5) == [50]
    assert [clock(s) for s in (0, 3.2, 59.96, 61, 3723.04)] == ["0:00", "0:03.2", "1:00", "1:01", "1:02:03"]


def test_the_best_and_the_worst_of_each_class():
    found = [video([0, i / 10, 0, 0.45], ((4, 8, "a"),), name=f"a{i}") for i in (3, 9, 1, 7, 5)]
    found += [video([0.1 * i], name=f"n{i}") for i in range(6)]
    found += [video([0.1 * i], None, ("b",), f"b{i}") for i in (1, 2)]
    names = [one.name for one in best_and_worst(found)]
    assert names == ["n0", "n1", "n4", "n5", "a9", "a7", "a3", "a1", "b2", "b1"]


def test_a_strip_is_in_seconds():
    from matplotlib.figure import Figure

    one, axes = video([0.1, 0.2, 0.9, 0.3], ((6, 99, "a"),), rate=2), Figure().add_subplot()
    draw_curve(axes, one, "a title with $\\frac$", [5.0])
    span, curve = axes.patches
    assert span.get_extents().transformed(axes.transData.inverted()).intervalx == pytest.approx([3, 8])
    assert curve.get_data().edges.tolist() == [0, 2, 4, 6, 8] and axes.get_xlim() == (0, 8)
    assert axes.lines[0].get_xydata().tolist() == [[5, 0.9]]
