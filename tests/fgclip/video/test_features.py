"""Features of clips, the folder that keeps them, and `python -m fgclip.extract` as a person runs it.

In two processes, too: this file starts itself for that.
"""

import io
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
from videos import write_video

import fgclip.extract as command
from fgclip import FGCLIP
from fgclip.images import normalise, preprocess
from fgclip.model import l2_normalize
from fgclip.video.decode import Video, open_video
from fgclip.video.features import INPUTS, ClipEncoder, Clips, FeatureStore, extract
from fgclip.video.model import load_towers
from fgclip.video.records import read_videos
from fgclip.video.synthetic import SyntheticVideos
from trainkit import distributed
from trainkit.errors import InputError

CLIP = dict(clip_frames=4, frames_per_clip=1)
HALF = dict(atol=4e-3, rtol=0)  # what float16 leaves of numbers of up to 10


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


def saved(arrays: dict, **changes) -> bytes:
    np.savez(file := io.BytesIO(), **arrays | changes)
    return file.getvalue()


def names(store: FeatureStore) -> list[str]:
    return [name for name in "abc" if name in store]


def parts(model: FGCLIP, folder: Path, **clips) -> tuple[ClipEncoder, FeatureStore]:
    encoder = ClipEncoder(model, **CLIP | clips)
    return encoder, FeatureStore(folder, encoder.key)


@pytest.fixture
def videos(tmp_path):
    """Of 20, 30 and 10 frames, images in folders, in folders of classes."""
    for i, (place, count) in enumerate((("normal/a", 20), ("fire/b", 30), ("fire/c", 10))):
        (tmp_path / "root" / place).mkdir(parents=True)
        for frame, picture in enumerate(noise(count, seed=i)):
            Image.fromarray(picture).save(tmp_path / "root" / place / f"{frame:03}.png")
    return read_videos(tmp_path / "root", "folders", "train")


# ---- a clip


def test_a_still_picture_is_what_encode_image_says_and_nothing_moves(small_model):
    picture = noise(1)[0]
    clips = ClipEncoder(small_model, **CLIP).video(Pictures([picture] * 10)).tensors()
    with torch.inference_mode():
        image = l2_normalize(small_model.encode_image(preprocess(Image.fromarray(picture), 32).unsqueeze(0)))
    torch.testing.assert_close(clips["global"], image.expand(3, -1), **HALF)
    torch.testing.assert_close(clips["amount"], torch.full((3, 4), math.log(1e-4)), **HALF)
    assert not clips["motion"].any() and clips["motion"].shape == (3, 16)


def test_motion_and_amount_are_those_of_a_plain_loop(small_model):
    now, then = colours(noise(3)), colours(noise(3, seed=1))
    then[1, :, 8:] = now[1, :, 8:]  # only the first row of patches moves
    found = ClipEncoder(small_model).encode(now, then)
    with torch.inference_mode():
        dense = small_model.dense_features(normalise(now))  # (3, D, 4, 4)
    for i in range(3):
        cells = [(i, slice(None), slice(y, y + 8), slice(x, x + 8)) for y in range(0, 32, 8) for x in range(0, 32, 8)]
        change = [float((now[cell] - then[cell]).abs().mean()) for cell in cells]
        ranked = sorted(change)
        weights = [max(0, each - ranked[7]) for each in change]
        rows = [dense[i, :, y, x] / dense[i, :, y, x].norm() for y in range(4) for x in range(4)]
        motion = sum(weight * row for weight, row in zip(weights, rows, strict=True)) / sum(weights)
        torch.testing.assert_close(found["motion"][i], motion, atol=1e-5, rtol=0)
        amount = [sum(change) / 16, ranked[-1], sum(ranked[-4:]) / 4, sum(ranked[-12:]) / 12]
        torch.testing.assert_close(found["amount"][i], torch.tensor(amount).log(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("frames", "length", "each"),
    [(33, 16, 1), (25, 16, 1), (24, 16, 1), (16, 16, 1), (1, 16, 1), (40, 8, 3), (9, 4, 4), (7, 1, 1), (13, 4, 2)],
)
def test_the_clips_of_a_video_are_those_of_a_plain_loop(small_model, frames, length, each):
    pictures, pairs = noise(frames), []
    for clip in range(math.ceil(frames / length)):
        looked_at = [clip * length + math.floor((j + 0.5) * length / each) for j in range(each)]
        pairs += [(i, i + 1) if i < frames - 1 else (frames - 1, max(0, frames - 2)) for i in looked_at]
    now, then = (colours(pictures[list(side)]) for side in zip(*pairs, strict=True))
    own = ClipEncoder(small_model).encode(now, then)
    for size in (1, 5, 64):
        encoder = ClipEncoder(small_model, clip_frames=length, frames_per_clip=each, batch_size=size)
        clips = encoder.video(Pictures(pictures))
        assert (clips.frames, clips.rate, clips.features["motion"].dtype) == (frames, 30, np.float16)
        for name, rows in own.items():
            torch.testing.assert_close(clips.tensors()[name], rows.unflatten(0, (-1, each)).mean(1), **HALF)


@pytest.mark.slow
def test_memory_does_not_grow_over_a_long_video(tmp_path, small_model):
    pytest.importorskip("av")
    still, seen = noise(30, size=(48, 64)), []
    write_video(tmp_path / "long.mp4", (still[i % 30] for i in range(18_000)), 30)
    video = open_video(tmp_path / "long.mp4")
    walk = video.walk

    def watched():
        for index, frame in enumerate(walk()):
            if index % 2000 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                seen.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            yield frame

    video.walk = watched
    assert len(ClipEncoder(small_model, clip_frames=4).video(video).features["amount"]) == 4500
    assert len(seen) == 9 and max(seen[2:]) - seen[2] < 8, seen  # MiB; the pictures themselves, squashed, are 27


# ---- the folder


def test_a_key_tells_apart_what_would_differ_and_another_is_refused(tmp_path, small_model):
    keys = [ClipEncoder(small_model, clip_frames=n, frames_per_clip=k).key for n, k in ((16, 1), (16, 2), (8, 1))]
    others = [small_model.with_image_size(40)]
    for change in (dict(activation="gelu"), dict(heads=2)):
        others.append(FGCLIP(**small_model.config | dict(vision=small_model.config["vision"] | change)))
    for name in ("vision_model.encoder.layers.0.mlp.fc1.bias", "visual_projection.weight"):
        others.append(FGCLIP(**small_model.config))
        others[-1].load_state_dict(small_model.state_dict())
        others[-1].get_parameter(name).data.view(-1)[0] += 1e-3
    for other in others[1:3]:
        other.load_state_dict(small_model.state_dict())
    keys += [ClipEncoder(other).key for other in others]
    assert len({json.dumps(key) for key in keys}) == len(keys) == 8
    small_model.text_projection.weight.data.add_(1)
    assert ClipEncoder(small_model).key == FeatureStore(tmp_path, keys[0]).key
    with pytest.raises(InputError, match=f"another key, .*{keys[0]['weights']}.*expected .*{keys[-1]['weights']}"):
        FeatureStore(tmp_path, keys[-1])


def test_killed_at_any_file_and_resumed_it_equals_one_go(videos, tmp_path, small_model, monkeypatch):
    assert extract(videos, *parts(small_model, tmp_path / "whole")) == []
    whole, replace, files = contents(tmp_path / "whole"), os.replace, []
    assert len(whole) == 1 + 3

    def killed(*names):
        files.append(names)
        if len(files) > after:
            raise KeyboardInterrupt
        replace(*names)

    for after in range(3):
        encoder, store = parts(small_model, tmp_path / str(after))
        files.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            extract(videos, encoder, store)
        assert names(store) == sorted("bac"[:after])  # the largest first
        assert extract(videos, encoder, store) == [] and contents(store.folder) == whole
    (tmp_path / "root/normal/a/019.png").unlink()  # it is another video now
    assert extract(videos, encoder, store) == [] and store.read("a").frames == 19


def test_damaged_videos_are_recorded_and_not_tried_again(videos, tmp_path, small_model):
    picture = tmp_path / "root/fire/b/007.png"
    good = picture.read_bytes()
    picture.write_bytes(good[: len(good) // 2])
    encoder, store = parts(small_model, tmp_path / "features")
    tried, opened = [], videos.open

    def claiming_more(record):
        """One frame more than there is: of c's 10 it is damage, of a's 20 it is not."""
        tried.append(record.name)
        video = opened(record)
        video.claimed += record.name != "b"
        return video

    videos.open = claiming_more
    for _ in range(2):
        lost = extract(videos, encoder, store)
        assert [each[:2] for each in sorted(lost)] == ["b ", "c "] and sorted(tried) == ["a", "b", "c"]
    assert "007.png cannot be decoded" in store.error("b") and "10 of the 11 frames" in store.error("c")
    assert names(store) == ["a"] and store.error("a") == ""
    with pytest.raises(InputError, match="holds no features of b .*007.png"):
        store.read("b")
    picture.write_bytes(good)
    assert extract(videos, encoder, store) == [f"c ({store.error('c')})"] and tried[3:] == ["b"] and "b" in store


def test_half_written_and_foreign_files_are_refused_in_a_sentence(videos, tmp_path, small_model):
    encoder, store = parts(small_model, tmp_path / "features")
    extract(videos, encoder, store)
    path, again = tmp_path / "features/a.npz", "/a.npz: .*delete it to extract the features of a again"
    with np.load(path) as file:
        arrays = dict(file)
    for content, sentence in [
        (path.read_bytes()[:-100], again),
        (b"", again),
        (b"{}", again),
        (saved(arrays)[:500] + b"?" * 9 + saved(arrays)[509:], again),  # a checksum tells
        (saved({}), again),
        (saved(arrays, amount=np.array([{}] * 5)), "Object arrays cannot.*delete it"),  # no code of a file is run
        (saved(arrays, amount=np.zeros((5, 4))), r"a: amount is not \(5, 4\) of float16"),
        (saved(arrays, amount=np.zeros((4, 4), np.float16)), "amount is not"),
        (saved(arrays, frames=-20), "global is not"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            store.read("a")
    (tmp_path / "features/d.npz.partial").write_bytes(b"?")
    assert store.load("d", "frames") is None and "d" not in store and "b" in store
    for content in (b"{", b"{}", b'{"key": 3}'):
        (tmp_path / "features/index.json").write_bytes(content)
        with pytest.raises(InputError, match="index.json|of another key"):
            FeatureStore(tmp_path / "features", store.key)
    (tmp_path / "features/index.json").unlink()
    with pytest.raises(InputError, match="index.json does not exist"):
        FeatureStore(tmp_path / "features", store.key)
    with pytest.raises(InputError, match="must be relative"):
        store.read("../a")
    with pytest.raises(InputError, match="e: features that are not finite"):
        arrays = dict(zip(INPUTS, (np.ones((5, 16)), np.ones((5, 16)), np.full((5, 4), np.nan)), strict=True))
        store.write("e", Clips(arrays, frames=20, rate=Fraction(30)))


# ---- several processes


def share(folder: Path) -> dict:
    """What this process took of five drawn videos."""
    torch.manual_seed(0)
    model, taken = FGCLIP(vision=dict(image_size=32, width=16, layers=2, heads=2), text=dict(layers=1)), []
    videos, (encoder, store) = SyntheticVideos(5, seed=0, image_size=32), parts(model, folder / "features")
    opened = videos.open
    videos.open = lambda record: taken.append(record.name) or opened(record)
    lost = extract(videos, encoder, store)
    return dict(names=taken, lost=lost, found=[record.name for record in videos.records if record.name in store])


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    seen = share(Path(sys.argv[1]))
    torch.save(seen, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


def test_two_processes_share_the_videos(tmp_path, two_ranks):
    first, second = two_ranks(__file__, tmp_path)
    one = share(tmp_path / "one")
    assert sorted(map(len, (first["names"], second["names"]))) == [2, 3]
    assert sorted(first["names"] + second["names"]) == sorted(one["names"])
    assert first["found"] == second["found"] == one["found"] and first["lost"] == second["lost"] == []
    assert contents(tmp_path / "features") == contents(tmp_path / "one/features")


# ---- the command


def test_the_command_extracts_goes_on_and_names_what_it_cannot_read(folder, tmp_path, capsys):
    pytest.importorskip("av")
    drawn, features = SyntheticVideos(6, seed=1, image_size=32), tmp_path / "features"
    for half, record in zip(["train"] * 4 + ["test"] * 2, drawn.records, strict=True):
        place = tmp_path / "data" / half / (*record.classes, "normal")[0]
        place.mkdir(parents=True, exist_ok=True)
        pictures = (picture for _, _, picture in drawn.open(record).frames())
        write_video(place / f"{record.name}.mp4", pictures, 30)
    (place / "bad.mp4").write_bytes(b"no video")
    shutil.copy(folder / "run.pt", tmp_path)
    flags = f"--init-from {tmp_path}/run.pt --data-root {tmp_path}/data --format folders --device cpu"
    flags = [*flags.split(), "--features", str(features)]
    for flag, value in (("--image-size", 30), ("--frames-per-clip", 17), ("--vocab", "x")):
        assert flag in refused(capsys, command.main, *flags, flag, value) and not features.exists()
    command.main([*flags, "--split", "train"])
    assert "has the clips of 4 of 4 videos" in capsys.readouterr().out
    before = contents(features)
    assert "1 videos are missing or damaged (--allow-missing goes without): bad (" in refused(
        capsys, command.main, *flags
    )
    command.main([*flags, "--allow-missing", "1"])
    said = capsys.readouterr().out
    assert said.count(f"without bad ({place}/bad.mp4 cannot be read as a video") == said.count("6 of 7 videos") == 1
    assert before.items() <= contents(features).items()
    towers, _ = load_towers(tmp_path / "run.pt")
    store = FeatureStore(features, ClipEncoder(towers).key)
    for record in drawn.records:
        found, own = store.read(record.name), ClipEncoder(towers).video(drawn.open(record))
        assert (found.frames, found.rate) == (own.frames, own.rate)
        assert (found.features["global"] * own.features["global"]).sum(1).min() > 0.9  # a codec lies between
    sentence = refused(capsys, command.main, *flags, "--image-size", 40)
    assert "features of another key, " in sentence and "'image_size': 32" in sentence and "40" in sentence
