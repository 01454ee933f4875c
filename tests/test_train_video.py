"""train_video.py as a person runs it: its stages, own videos, two processes, wrong flags, and what it learns."""

import math
import os
import re
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import VIDEO, equal, load, metrics, refused, run

import train_video
from fgclip.embedding import Embedder
from fgclip.video import TemporalHead, VideoModel, load_video_model
from fgclip.video.features import ClipEncoder, FeatureStore
from fgclip.video.records import VideoSet
from fgclip.video.synthetic import EVENTS, SyntheticVideos
from fgclip.video.training import VideoFrames
from trainkit.files import number, open_image

HEAD = "--tower frozen --epochs 2 --validate-every 1 --bank-size 0 --bank-classes 1".split()


def train(folder: Path, *flags) -> Path:
    return run(train_video, [*VIDEO, *flags], folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Drawn videos as folders of images, one folder per class: 12 of each of two."""
    root, videos = tmp_path_factory.mktemp("videos"), SyntheticVideos(24, seed=5, image_size=32)
    for record in videos.records:
        folder = root / ("fire" if record.classes else "normal") / record.name
        folder.mkdir(parents=True)
        for index, _, picture in videos.open(record).frames(period=8):
            Image.fromarray(picture).save(folder / f"{index // 8:04}.png")
    return root


def test_tower_and_head_learn_one_after_the_other(plain):
    steps, towers = metrics(plain), metrics(plain)[:8]
    assert all({"loss_short", "loss_region", "loss_hard"} <= line.keys() for line in towers)
    for line in steps[8:]:
        assert {"loss_bag", "loss_class", "loss_texts", "loss_caption", "loss_track", "loss_hard"} <= line.keys()
    # The schedule begins anew, the banks of two classes fill half by half and are used after three steps.
    assert steps[8]["lr"] < 0.1 * steps[12]["lr"] and steps[7]["lr"] < steps[5]["lr"]
    assert towers[-1]["region_bank"] == 16 and steps[-1]["track_bank"] == 2 * steps[-1]["track_bank_events"] == 16
    assert towers[1]["region_candidates"] < towers[-1]["region_candidates"]
    assert towers[-1]["region_in_batch"] < towers[-1]["loss_region"]
    if find_spec("matplotlib"):
        assert open_image(plain / "pictures/curves.png").width == 990
    first, *_, last = metrics(plain, "validation")
    assert first["region"]["count"] > 8 and {"scores", "classes", "map"} <= last.keys()
    before, after = load(plain, "best.pt"), load(plain)
    for name in before["model"]:  # the towers stand still while the head learns
        assert not name.startswith("fgclip.vision") or torch.equal(before["model"][name], after["model"][name]), name
    assert torch.equal(
        after["model"]["fgclip.visual_projection.weight"], after["ema"]["fgclip.visual_projection.weight"]
    )


def test_a_head_learns_from_the_towers_and_features_of_another_run(plain, tmp_path, capsys, monkeypatch):
    features = ["--features", plain / "features"]
    before = {path.name: path.stat().st_mtime_ns for path in (plain / "features").iterdir()}
    folder = train(tmp_path / "head", *HEAD, "--init-from", plain / "last.pt", *features, "--max-steps", 2)
    assert {path.name: path.stat().st_mtime_ns for path in (plain / "features").iterdir()} == before
    one, two = load_video_model(plain / "last.pt"), load_video_model(folder / "last.pt")
    assert torch.equal(one.fgclip.visual_projection.weight, two.fgclip.visual_projection.weight)
    assert two.supervision.endswith("not weakly supervised") and two.classes == EVENTS
    assert not any("fgclip" in group["name"] for group in load(folder)["optimizer"]["param_groups"])
    flags = [*VIDEO, *HEAD, "--init-from", plain / "last.pt", *features, "--output", tmp_path / "other"]
    assert "holds features of another key" in refused(capsys, train_video.main, *flags, "--frames-per-clip", 2)
    if find_spec("matplotlib"):  # videos that cannot be read any more cost the picture alone
        monkeypatch.setattr(train_video, "draw", lambda path, *_: number("x", str(path)))
        train_video.main([str(flag) for flag in (*flags, "--epochs", 1, "--output", tmp_path / "third")])
        assert "no picture of the scores: " in capsys.readouterr().out


def test_a_check_of_features_tells_norms_and_cosines(plain, capsys):
    flags = [*VIDEO, *HEAD, "--init-from", plain / "last.pt", "--features", plain / "features", "--check"]
    train_video.main([str(flag) for flag in flags])
    said = capsys.readouterr().out
    rows = re.findall(r"^(video-\S+): norms of global 1\.000, motion 0\.\d+; cosines with normal (\S+), ex", said, re.M)
    assert len(rows) == 4 and all(abs(float(cosine)) < 1 for _, cosine in rows)


def test_main_hands_its_parts_what_the_flags_say(plain, tmp_path, monkeypatch):
    seen, clamped = {}, []
    for name in ("SyntheticVideos", "TemporalHead", "ClipBags", "VideoLoss"):
        part, calls = getattr(train_video, name), seen.setdefault(name, [])
        monkeypatch.setattr(train_video, name, lambda *a, part=part, calls=calls, **k: calls.append(k) or part(*a, **k))
    clamp = VideoModel.clamp_logit_scales
    monkeypatch.setattr(VideoModel, "clamp_logit_scales", lambda self: clamped.append(clamp(self)))
    flags = "--seed 3 --most-clips 20 --top-share 0.2 --window 3 --head-layers 1 --inputs global amount --max-steps 2"
    train(tmp_path / "run", *HEAD, *flags.split(), "--init-from", plain / "last.pt")
    assert [call["seed"] for call in seen["SyntheticVideos"]] == [3, 10_003]
    (head,), (bags,), (loss,) = seen["TemporalHead"], seen["ClipBags"], seen["VideoLoss"]
    assert (head["window"], head["layers"], head["inputs"]) == (3, 1, ["global", "amount"])
    assert (bags["most_clips"], bags["clip_frames"], loss["top_share"], len(clamped)) == (20, 4, 0.2, 2)


def test_the_head_knows_the_texts_of_the_trained_towers_and_the_spread_of_training_clips(plain):
    model = load_video_model(plain / "last.pt", weights="raw")
    store = FeatureStore(plain / "features", ClipEncoder(model.fgclip, **model.clips).key)
    texts = model.class_texts.clone()
    model.refresh_texts()
    torch.testing.assert_close(texts, model.class_texts)
    clips = [store.read(record.name).tensors() for record in SyntheticVideos(32, seed=0).records]
    rows = torch.cat([model.head.stacked(video) for video in clips])
    torch.testing.assert_close(model.head.mean, rows.mean(0))
    torch.testing.assert_close(model.head.spread, rows.std(0, correction=0).clamp(min=1e-4))


def test_a_higher_figure_is_better_and_one_that_cannot_be_measured_is_worst():
    def chosen(value, by="auc"):
        scores = {"anomaly score": {"auc": value, "anomalous_auc": 0.1, "video_auc": 0.5}}
        return train_video.best_metric({"scores": scores, "map": {"with_events": {"average": 0.3}}}, by)

    assert chosen(0.9) > chosen(0.8) > chosen(math.nan) == (-math.inf, 0.5)
    assert [chosen(0.9, by)[0] for by in ("anomaly-auc", "video-auc", "map")] == [0.1, 0.5, 0.3]


def test_own_videos_in_folders(own, plain, tmp_path, capsys):
    """Only labels of videos: no tracks, no captions. What is held out is not trained on."""
    flags = ["--data-root", own, "--format", "folders", *HEAD, "--init-from", plain / "last.pt", "--val-share", "0.25"]
    folder = run(train_video, flags, tmp_path / "run", "--batch-size", 4, "--device", "cpu", "--workers", 0)
    output = capsys.readouterr().out
    assert "supervision: labels of videos alone" in output
    assert "training: 18 videos, 9 with an event" in output and "held out for validation: 6 videos, 3 with" in output
    line = metrics(folder)[0]
    assert {"loss_bag", "loss_class", "loss_texts"} <= line.keys() and "loss_track" not in line
    last = metrics(folder, "validation")[-1]["scores"]["anomaly score"]
    assert last["auc"] is None and 0 <= last["video_auc"] <= 1  # it is not known when the events are
    assert load_video_model(folder / "best.pt").classes == ("fire",)
    # Without the videos their features are enough, for those that a list names.
    listed = tmp_path / "listed"
    listed.mkdir()
    names = [("fire" if r.classes else "Normal_Videos", r.name) for r in SyntheticVideos(24, seed=5).records]
    (listed / "Anomaly_Train.txt").write_text("\n".join(f"{kind}/{name}.mp4" for kind, name in names))
    (listed / "Anomaly_Test.txt").write_text("fire/another.mp4")
    again = ["--data-root", listed, *HEAD, "--init-from", plain / "last.pt", "--val-share", "0.25", "--batch-size", 4]
    again += ["--device", "cpu", "--workers", 0, "--features", folder / "features"]
    assert len(metrics(run(train_video, again, tmp_path / "again"))) == len(metrics(folder))


def test_a_signal_during_extraction_leaves_a_run_to_go_on_with(plain, tmp_path, monkeypatch):
    """It ends after the video in hand; what is extracted is kept."""
    opened, count = SyntheticVideos.open, [0]

    def told_to_end(self, record):
        count[0] += 1
        if count[0] == 5:
            signal.raise_signal(signal.SIGTERM)
        return opened(self, record)

    flags = [*VIDEO, *HEAD, "--init-from", plain / "last.pt", "--max-steps", 3]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(SyntheticVideos, "open", told_to_end)
        run(train_video, flags, tmp_path / "run")
    assert stop.value.code == 143 and len(list((tmp_path / "run/features").glob("*.npz"))) == 5
    begun = tmp_path / "run/args.json"
    begun.write_text(begun.read_text().replace('"vocab": null', '"vocab": "bytes"'))  # of published weights
    train_video.main(["--resume", str(tmp_path / "run"), "--max-steps", "3", "--device", "cpu", "--workers", "0"])
    assert equal(load(tmp_path / "run")["model"], load(run(train_video, flags, tmp_path / "other"))["model"])


def test_a_damaged_video_is_named_and_another_takes_its_place(own, plain, tmp_path, capsys):
    root = shutil.copytree(own, tmp_path / "videos")
    (victim,) = sorted((root / "fire").iterdir())[:1]
    for path in victim.iterdir():
        path.write_bytes(b"no picture")
    flags = ["--data-root", root, "--format", "folders", *HEAD, "--init-from", plain / "last.pt", "--batch-size", 4]
    flags += ["--device", "cpu", "--workers", 0, "--max-steps", 3]
    assert victim.name in refused(capsys, train_video.main, *flags, "--output", tmp_path / "one")
    assert len(metrics(run(train_video, flags, tmp_path / "two", "--allow-missing", 1))) == 3


def test_two_processes_train_as_one(plain, tmp_path, two_ranks):
    """Half a batch each: the same losses, of the towers and, but for what dropout draws, of the head."""
    (first, _) = two_ranks(__file__, tmp_path)
    for one, two in zip(metrics(plain)[:2] + metrics(plain)[8:10], first["towers"] + first["head"], strict=True):
        for name in (name for name in one if name.startswith("loss_")):
            assert two[name] == pytest.approx(one[name], rel=0.02 if "loss_bag" in one else 1e-3), name


def test_half_precision_has_logits_in_float32(plain, tmp_path, monkeypatch):
    seen, forward = [], TemporalHead.forward
    monkeypatch.setattr(TemporalHead, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])
    flags = ["--init-from", plain / "last.pt", "--features", plain / "features", "--amp", "bf16", "--max-steps", 1]
    (line,) = metrics(train(tmp_path / "run", *HEAD, *flags))
    assert all(output[name].dtype == torch.float32 for output in seen for name in ("anomaly", "classes", "frames"))
    assert all(np.isfinite(value) for name, value in line.items() if name.startswith("loss_"))


def test_wrong_flags_end_in_one_sentence(own, plain, tmp_path, capsys):
    def say(*flags):
        return refused(capsys, train_video.main, *VIDEO, "--output", tmp_path / "run", *flags)

    assert "random towers say nothing" in say("--tower", "frozen")
    assert "below --epochs 6" in say("--tower-epochs", 6)
    assert "expected an even number" in say("--batch-size", 3)
    assert "leaves no video to validate on" in say("--val-share", 0)
    assert "does not divide among the 2" in say("--bank-size", 5)
    assert "makes features of its own" in say("--features", tmp_path)
    assert "--tracks needs --data-root" in say("--tracks", "x.json")
    assert "brings its own tokenizer" in say("--init-from", plain / "last.pt", "--vocab", "bytes")
    data = ["--data-root", own, "--format", "folders"]
    assert "--init-from is missing" in say(*data, "--tower", "frozen")
    assert "learns from --tracks or --captions" in say(*data, "--tower", "tune")
    (tmp_path / "other.json").write_text('[{"video": "other.mp4", "region_captions": [], "box_infos": []}]')
    of_others = ["--tower", "tune", "--tracks", tmp_path / "other.json", "--init-from", plain / "last.pt"]
    assert "no loss of the towers has a weight" in say(*data, *of_others)
    assert "holds no Anomaly_Test.txt" in say("--data-root", own, *HEAD, "--init-from", plain / "last.pt")


def tracks_among_32(checkpoint: Path) -> float:
    """How often a track in a frame of a validation video finds its phrase among 32 different ones."""
    model, videos = load_video_model(checkpoint), SyntheticVideos(100, seed=10_000)
    frames = VideoFrames(videos, image_size=64, margin=4 / 60, seed=0)
    embedder, phrases = Embedder(model.fgclip, model.tokenizer), []
    for index in range(len(frames)):
        phrases += frames.describe(index).phrases
    regions, texts = embedder.images(frames, regions=True)[1], embedder.texts(phrases)
    hits, rng = [], np.random.default_rng(0)
    for _ in range(50):
        order = rng.permutation(len(phrases)).tolist()
        rows = list({phrases[i]: i for i in order}.values())[:32]
        hits.append((regions[rows] @ texts[rows].T).argmax(1) == torch.arange(32))
    return torch.cat(hits).float().mean().item()


def shuffled(videos: VideoSet, seed: int) -> VideoSet:
    """The same videos with the labels of others."""
    records = videos.records
    order = np.random.default_rng(seed).permutation(len(records))
    labels = [dict(classes=records[i].classes, tracks=(), captions=()) for i in order]
    return videos.of(type(r)(**{**vars(r), **label}) for r, label in zip(records, labels, strict=True))


@pytest.mark.slow
def test_the_default_run_finds_events_and_what_should_fail_fails(tmp_path, monkeypatch):
    """The bars for drawn videos, and controls: without motion, without neighbouring clips, with shuffled labels."""
    train_video.main(["--output", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"])
    last = metrics(tmp_path / "run", "validation")[-1]
    scores, own = last["scores"]["anomaly score"], {name: row["auc"] for name, row in last["classes"].items()}
    average = last["map"]["with_events"]["average"]
    assert scores["auc"] >= 0.80 and scores["anomalous_auc"] >= 0.78 and scores["ap"] >= 0.50 and average >= 0.30
    assert min(own.values()) >= 0.62 and min(own["explosion"], own["fire"]) >= 0.75
    assert last["scores"]["oracle of the video's label"]["anomalous_auc"] == pytest.approx(0.5)

    assert tracks_among_32(tmp_path / "run/last.pt") >= 0.4
    flags = ["--tower", "frozen", "--init-from", tmp_path / "run/last.pt", "--features", tmp_path / "run/features"]
    flags += ["--epochs", 30, "--validate-every", 30, "--device", "cpu", "--track-weight", 0, "--caption-weight", 0]

    def control(name: str, *more) -> dict:
        return metrics(run(train_video, [*flags, *more], tmp_path / name), "validation")[-1]

    plain, still = control("plain"), control("still", "--inputs", "global")
    alone = control("alone", "--head-layers", 0)
    auc = [each["scores"]["anomaly score"]["auc"] for each in (plain, still)]
    assert auc[1] < auc[0] - 0.10
    assert alone["map"]["with_events"]["average"] < plain["map"]["with_events"]["average"] - 0.08
    opened, found = train_video.open_videos, []
    for seed in range(3):
        monkeypatch.setattr(
            train_video,
            "open_videos",
            lambda args, seed=seed: (lambda t, v, m: (shuffled(t, seed), v, m))(*opened(args)),
        )
        found.append(control(f"shuffled-{seed}")["scores"]["anomaly score"]["anomalous_auc"])
    assert abs(np.mean(found) - 0.5) <= 0.1


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    halves = [*VIDEO, "--batch-size", 4]
    train(folder / "towers", *halves, "--max-steps", 2)
    train_video.main(["--resume", str(folder / "towers"), "--max-steps", "10", "--device", "cpu"])
    lines = metrics(folder / "towers")
    torch.save({"towers": lines[:2], "head": lines[8:]}, folder / f"rank{os.environ['RANK']}.pt")
