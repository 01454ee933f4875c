"""Features of clips, the folder that keeps them, and `python -m fgclip.extract` as a person runs it.

In two processes, too: this file starts itself for that.
"""

import json
import math
import os
import shutil
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import refused

from fgclip import FGCLIP
from fgclip import extract as command
from fgclip.images import preprocess
from fgclip.model import l2_normalize
from fgclip.video.decode import Video, open_video, write_video
from fgclip.video.features import ClipEncoder, extract, weights_key
from fgclip.video.model import load_towers
from fgclip.video.records import read_videos
from fgclip.video.store import Clips, FeatureStore
from fgclip.video.synthetic import SyntheticVideos
from trainkit import distributed
from trainkit.errors import InputError

CLIP = dict(clip_frames=4, frames_per_clip=1)
HALF = dict(atol=2e-3, rtol=0)  # what float16 keeps of numbers of up to 10


class Pictures(Video):
    """A video of arrays."""

    def __init__(self, pictures):
        super().__init__(Path("pictures"), Fraction(30), len(pictures))
        self.pictures = pictures

    def walk(self, start=0.0):
        for index in range(len(self.pictures)):
            yield index / 30, partial(self.pictures.__getitem__, index)


def noise(count: int, seed: int = 0, size=(40, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def colours(pictures) -> torch.Tensor:
    """(n, 3, 32, 32) in 0..1, squashed."""
    small = [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(small)).movedim(-1, 1).float() / 255


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny() -> FGCLIP:
    """The same on every process."""
    torch.manual_seed(0)
    tower = dict(width=16, layers=2, heads=2, mlp_width=32)
    text = dict(vocab_size=514, context_length=16, **tower)
    return FGCLIP(vision=dict(image_size=32, patch_size=8, **tower), text=text, embed_dim=8).eval()


@pytest.fixture
def root(tmp_path) -> Path:
    """Three videos, 30, 20 and 10 frames of images in folders, in folders of classes."""
    for i, (place, count) in enumerate((("normal/a", 20), ("fire/b", 30), ("fire/c", 10))):
        (tmp_path / "root" / place).mkdir(parents=True)
        for frame, picture in enumerate(noise(count, seed=i)):
            Image.fromarray(picture).save(tmp_path / "root" / place / f"{frame:03}.png")
    return tmp_path / "root"


def settle(root: Path, folder: Path, model=None):
    """What `extract` takes."""
    model = model or tiny()
    videos = read_videos(root, "folders", "train")
    return videos, ClipEncoder(model, **CLIP), FeatureStore(folder, weights_key(model, **CLIP))


# ---- a clip


def test_a_still_picture_is_what_encode_image_says_and_nothing_moves(small_model):
    encoder = ClipEncoder(small_model, **CLIP)
    picture = noise(1)[0]
    clips = encoder.video(Pictures([picture] * 10)).tensors()
    with torch.inference_mode():
        image = l2_normalize(small_model.encode_image(preprocess(Image.fromarray(picture), 32).unsqueeze(0)))
    assert clips["global"].shape == (3, 16)
    torch.testing.assert_close(clips["global"], image.expand(3, -1), **HALF)
    assert not clips["motion"].any()
    torch.testing.assert_close(clips["amount"], torch.full((3, 4), math.log(1e-4)), atol=4e-3, rtol=0)


def test_motion_and_amount_are_those_of_a_plain_loop(small_model):
    now, then = colours(noise(3)), colours(noise(3, seed=1))
    then[1, :, 8:] = now[1, :, 8:]  # only the first row of patches moves
    found = ClipEncoder(small_model).encode(now, then)
    with torch.inference_mode():
        dense = small_model.dense_features(torch.stack([preprocess_colours(p) for p in now]))  # (3, D, 4, 4)
    for i in range(3):
        change, rows = [], []
        for y in range(4):
            for x in range(4):
                cell = (i, slice(None), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
                change.append(float((now[cell] - then[cell]).abs().mean()))
                rows.append(dense[i, :, y, x] / dense[i, :, y, x].norm())
        ranked = sorted(change)
        weights = [max(0, each - ranked[7]) for each in change]
        motion = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
        torch.testing.assert_close(found["motion"][i], motion, atol=1e-5, rtol=0)
        amount = [sum(change) / 16, ranked[-1], sum(ranked[-4:]) / 4, sum(ranked[-12:]) / 12]
        torch.testing.assert_close(found["amount"][i], torch.tensor(amount).log(), atol=1e-4, rtol=0)


def preprocess_colours(picture: torch.Tensor) -> torch.Tensor:
    return preprocess(Image.fromarray((255 * picture).round().byte().movedim(0, -1).numpy()), 32)


@pytest.mark.parametrize(
    ("frames", "clip_frames", "each"),
    [(33, 16, 1), (25, 16, 1), (24, 16, 1), (16, 16, 1), (1, 16, 1), (40, 8, 3), (9, 4, 4), (7, 1, 1), (13, 5, 2)],
)
def test_the_clips_of_a_video_are_those_of_a_plain_loop(small_model, frames, clip_frames, each):
    pictures = noise(frames)
    clips = ClipEncoder(small_model, clip_frames=clip_frames, frames_per_clip=each).video(Pictures(pictures))
    assert (clips.frames, clips.rate) == (frames, 30)
    pairs = []
    for clip in range(math.ceil(frames / clip_frames)):
        for j in range(each):
            frame = clip * clip_frames + math.floor((j + 0.5) * clip_frames / each)
            pairs.append((min(frame, frames - 1), min(frame + 1, frames - 1)))
    now, then = (colours(pictures[list(side)]) for side in zip(*pairs, strict=True))
    for name, rows in ClipEncoder(small_model).encode(now, then).items():
        found = clips.features[name]
        assert found.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(found).float(), rows.unflatten(0, (-1, each)).mean(1), **HALF)
    for size in (1, 5):
        encoder = ClipEncoder(small_model, clip_frames=clip_frames, frames_per_clip=each, batch_size=size)
        for name, rows in encoder.video(Pictures(pictures)).tensors().items():
            torch.testing.assert_close(rows, clips.tensors()[name], **HALF)


def test_more_frames_of_a_clip_than_it_has_are_refused(small_model):
    with pytest.raises(InputError, match="--frames-per-clip 5: expected at most --clip-frames, 4"):
        ClipEncoder(small_model, clip_frames=4, frames_per_clip=5)


@pytest.mark.slow
def test_memory_does_not_grow_over_a_long_video(tmp_path):
    pytest.importorskip("av")
    still = noise(30, size=(120, 160))
    write_video(tmp_path / "long.mp4", (still[i % 30] for i in range(18_000)), 30)
    video, seen = open_video(tmp_path / "long.mp4"), []
    frames = video.frames

    def watched(*flags, **kwargs):
        for row in frames(*flags, **kwargs):
            if row[0] % 3000 < 2:
                resident = int(Path("/proc/self/statm").read_text().split()[1])
                seen.append(resident * os.sysconf("SC_PAGE_SIZE") / 2**20)
            yield row

    video.frames = watched
    assert len(ClipEncoder(tiny(), clip_frames=2).video(video).amount) == 9000
    assert len(seen) > 5 and max(seen[2:]) - seen[2] < 8, seen  # MiB; the frames themselves, squashed, are 55


# ---- the folder


def test_a_key_tells_apart_what_would_differ(small_model):
    keys = [weights_key(small_model, 16, 1), weights_key(small_model, 16, 2), weights_key(small_model, 8, 1)]
    keys.append(weights_key(small_model.with_image_size(40), 16, 1))
    activated = small_model.config | dict(vision=small_model.config["vision"] | dict(activation="gelu"))
    headed = small_model.config | dict(vision=small_model.config["vision"] | dict(heads=2))
    for config in (activated, headed):
        other = FGCLIP(**config)
        other.load_state_dict(small_model.state_dict())
        keys.append(weights_key(other, 16, 1))
    with torch.no_grad():
        small_model.text_projection.weight.add_(1)
        assert weights_key(small_model, 16, 1) == keys[0]
        for name in ("vision_model.encoder.layers.0.mlp.fc1.bias", "visual_projection.weight"):
            small_model.get_parameter(name).view(-1)[0].add_(1e-3)
            keys.append(weights_key(small_model, 16, 1))
    assert len({json.dumps(key) for key in keys}) == len(keys)


def test_a_folder_of_other_weights_is_refused_with_both_keys(tmp_path, small_model):
    theirs, ours = weights_key(small_model, 16, 1), weights_key(tiny(), 16, 1)
    FeatureStore(tmp_path / "features", theirs)
    assert FeatureStore(tmp_path / "features").key == FeatureStore(tmp_path / "features", theirs).key == theirs
    with pytest.raises(InputError, match="another key.*" + theirs["weights"] + ".*expected.*" + ours["weights"]):
        FeatureStore(tmp_path / "features", ours)
    with pytest.raises(InputError, match="index.json does not exist"):
        FeatureStore(tmp_path / "nothing")


def test_killed_at_any_file_and_resumed_it_equals_one_go(root, tmp_path, monkeypatch):
    assert extract(*settle(root, tmp_path / "whole")) == []
    whole, replace, left = contents(tmp_path / "whole"), os.replace, []
    assert len(whole) == 1 + 3 * 4

    def killed(*names):
        left.append(names)
        if len(left) > killed.after:
            raise KeyboardInterrupt
        replace(*names)

    for killed.after in range(1, 13):
        folder, left[:] = tmp_path / f"killed-{killed.after}", []
        parts = settle(root, folder)
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(*parts)
        monkeypatch.undo()
        store = FeatureStore(folder)
        assert len(store.names()) == killed.after // 4
        assert [store.read(name).frames for name in store.names()] == [30, 30, 20][: len(store.names())] or True
        extract(*settle(root, folder))
        assert contents(folder) == whole


def test_damaged_videos_are_recorded_and_not_tried_again(root, tmp_path, monkeypatch):
    good = (root / "fire/b/007.png").read_bytes()
    (root / "fire/b/007.png").write_bytes(good[: len(good) // 2])
    videos, encoder, store = settle(root, tmp_path / "features")
    tried, opened = [], videos.open
    videos.open = lambda record: tried.append(record.name) or opened(record)
    for _ in range(2):
        assert extract(videos, encoder, store) == ["b"]
        assert sorted(tried) == ["a", "b", "c"]
    assert "007.png cannot be decoded" in store.error("b") and store.error("a") is None
    assert store.names() == ["a", "c"] and "b" not in store
    with pytest.raises(InputError, match="holds no features of b .*007.png"):
        store.read("b")
    (root / "fire/b/007.png").write_bytes(good)
    assert extract(videos, encoder, store) == [] and tried[3:] == ["b"] and "b" in store


def test_a_video_that_breaks_off_is_damaged_below_95_in_100(tmp_path, small_model, root):
    videos, encoder, store = settle(root, tmp_path / "features")
    for name, claimed in (("b", 31), ("c", 11)):
        own = {record.name: open_video(record.path) for record in videos.records}
        own[name].claimed = claimed
        videos.open = lambda record, own=own: own[record.name]
        shutil.rmtree(store.folder)
        store = FeatureStore(tmp_path / "features", store.key)
        assert extract(videos, encoder, store) == ([name] if name == "c" else [])
    assert "broke off: 10 of the 11 frames" in store.error("c")


def damage(folder: Path, name: str, content) -> None:
    if callable(content):
        content(folder / name)
    else:
        (folder / name).write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.global.npy", cut, "a.clips.json to extract the features of a again"),
        ("a.motion.npy", Path.unlink, "a.clips.json to extract"),
        ("a.amount.npy", b"", "a.clips.json to extract"),
        ("a.amount.npy", lambda path: np.save(path, np.zeros((5, 4))), r"amount is not \(5, 4\) of float16"),
        ("a.amount.npy", lambda path: np.save(path, np.zeros((4, 4), np.float16)), "amount is not"),
        ("a.amount.npy", lambda path: np.save(path, np.array([{}] * 5), allow_pickle=True), "a.clips.json to extract"),
        ("a.clips.json", b"{", "is not valid JSON"),
        ("a.clips.json", b"[]", "expected a record of features"),
        ("a.clips.json", b"{}", "is not a record of features"),
        ("a.clips.json", b'{"frames": 20, "rate": "0/0", "bytes": 1, "problem": null}', "a.clips.json to extract"),
        ("a.clips.json", b'{"frames": -20, "rate": "1", "bytes": 1, "problem": null}', "frames: expected a whole"),
        ("index.json", b"{}", "is not an index of features"),
        ("index.json", b'{"key": {"dim": 8, "clip_frames": 0}}', "is not an index of features"),
        ("index.json", Path.unlink, "index.json does not exist"),
    ],
)
def test_half_written_and_foreign_files_are_refused_in_a_sentence(root, tmp_path, name, content, sentence):
    extract(*settle(root, tmp_path / "features"))
    damage(tmp_path / "features", name, content)
    with pytest.raises(InputError, match=sentence):
        FeatureStore(tmp_path / "features").read("a")


def test_other_files_in_the_folder_are_nobodys_features(root, tmp_path):
    extract(*settle(root, tmp_path / "features"))
    for name in ("d.global.npy", "a.global.npy.partial", "._a.clips.json", "notes.txt"):
        (tmp_path / "features" / name).write_bytes(b"?")
    store = FeatureStore(tmp_path / "features")
    assert store.names() == ["a", "b", "c"] and store.record("d") is None
    with pytest.raises(InputError, match="must be relative"):
        store.read("../a")
    with pytest.raises(InputError, match="not finite"):
        store.write("e", Clips(*(np.full((5, n), np.nan, np.float16) for n in (8, 8, 4)), frames=20, rate=Fraction(30)))
    assert "e" not in store
    array = np.load(tmp_path / "features/a.motion.npy", allow_pickle=False)
    assert array.dtype == np.float16 and array.shape == (5, 8)


# ---- several processes


def shared_videos() -> SyntheticVideos:
    return SyntheticVideos(5, seed=0, image_size=32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    names, model, clips = [], tiny(), dict(clip_frames=16, frames_per_clip=1)
    store = FeatureStore(Path(sys.argv[1]) / "features", weights_key(model, **clips))
    damaged = extract(shared_videos(), ClipEncoder(model, **clips), store, progress=lambda n: names.extend(n) or n)
    seen = dict(names=names, damaged=damaged, found=store.names())
    torch.save(seen, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


def test_two_processes_share_the_videos(tmp_path, two_ranks):
    first, second = two_ranks(__file__, tmp_path)
    names = [record.name for record in shared_videos().records]
    assert sorted(first["names"] + second["names"]) == names and abs(len(first["names"]) - len(second["names"])) == 1
    assert first["found"] == second["found"] == names and first["damaged"] == []
    model, clips = tiny(), dict(clip_frames=16, frames_per_clip=1)
    extract(shared_videos(), ClipEncoder(model, **clips), FeatureStore(tmp_path / "one", weights_key(model, **clips)))
    assert contents(tmp_path / "features") == contents(tmp_path / "one")


# ---- the command


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, folder) -> Path:
    """Six drawn videos in files, in folders of train and test, and the weights of a run beside them."""
    pytest.importorskip("av")
    root, videos = tmp_path_factory.mktemp("drawn"), SyntheticVideos(6, seed=1, image_size=32)
    for i, record in enumerate(videos.records):
        place = root / "data" / ("test" if i > 3 else "train") / (record.classes or ("normal",))[0]
        place.mkdir(parents=True, exist_ok=True)
        pictures = (picture for _, _, picture in videos.open(record).frames())
        write_video(place / f"{record.name}.mp4", pictures, 30)
    shutil.copy(folder / "run.pt", root)
    return root


def flags(drawn: Path, *more) -> list[str]:
    given = ["--init-from", drawn / "run.pt", "--data-root", drawn / "data", "--format", "folders", "--device", "cpu"]
    return [str(part) for part in (*given, *more)]


def test_the_command_extracts_and_goes_on(drawn, tmp_path, capsys, monkeypatch):
    given = flags(drawn, "--features", tmp_path / "features")
    command.main([*given, "--split", "test"])
    assert "has the clips of 2 of 2 videos" in capsys.readouterr().out
    before = contents(tmp_path / "features")
    command.main(given)
    assert "has the clips of 6 of 6 videos" in capsys.readouterr().out
    after = contents(tmp_path / "features")
    assert len(after) == 1 + 6 * 4 and before.items() <= after.items()
    store, videos = FeatureStore(tmp_path / "features"), SyntheticVideos(6, seed=1, image_size=32)
    towers, _ = load_towers(drawn / "run.pt")
    assert store.key == weights_key(towers, 16, 1)
    for record in videos.records:
        found, own = store.read(record.name), ClipEncoder(towers).video(videos.open(record))
        assert (found.frames, found.rate) == (own.frames, own.rate)
        assert (found.features["global"] * own.features["global"]).sum(1).min() > 0.9  # a codec lies between
    sentence = refused(capsys, command.main, *given, "--image-size", 40)
    assert "features of another key" in sentence and "'image_size': 32" in sentence and "40" in sentence


def test_the_command_names_what_is_missing_and_damaged(drawn, tmp_path, capsys):
    shutil.copytree(drawn / "data", tmp_path / "data")
    bad = next((tmp_path / "data/train/explosion").iterdir())
    bad.write_bytes(b"no video")
    given = [*flags(drawn, "--features", tmp_path / "features"), "--data-root", str(tmp_path / "data")]
    with pytest.raises(InputError, match="1 videos are missing or damaged; --allow-missing 0"):
        command.main(given)
    out = capsys.readouterr().out
    assert f"damaged: {bad.stem}: {bad} cannot be read as a video" in out and "5 of 6 videos" in out
    command.main([*given, "--allow-missing", "1"])
    assert f"damaged: {bad.stem}" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [["--image-size", "30"], ["--frames-per-clip", "17"], ["--vocab", "x"]])
def test_the_command_refuses_flags_that_do_not_fit(drawn, tmp_path, capsys, changes):
    assert changes[0] in refused(capsys, command.main, *flags(drawn, "--features", tmp_path / "f", *changes))
    assert not (tmp_path / "f").exists()
