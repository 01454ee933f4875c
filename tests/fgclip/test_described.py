"""`python -m fgclip.score --detections`: what macl.predict wrote, described; and --map."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import refused

from fgclip import Tokenizer, score
from fgclip.images import preprocess
from fgclip.model import l2_normalize
from trainkit.files import open_image

MERGES = [["t", "h"], ["th", "e</w>"], ["r", "e"], ["re", "d</w>"]]
TEXTS = ["a red cat", "a dog", "something", "a long thing"]
BOXES = [[5.0, 4, 30, 20], [10.0, 10, 25, 29]]


@pytest.fixture
def found(folder, tmp_path):
    """detections.json of two images, the second without any, and phrases.txt."""
    (tmp_path / "out").mkdir()
    for name in ("0", "1"):
        Image.open(folder / "images" / f"{name}.png").save(tmp_path / f"{name}.png")
    rows = [{"box": box, "class": "person", "score": 0.9 - 0.1 * i} for i, box in enumerate(BOXES)]
    rows = [{"image": f"elsewhere/{n}.png", "visible": f"../{n}.png", "detections": rows * (n == 0)} for n in range(2)]
    (tmp_path / "out/detections.json").write_text(json.dumps(rows))
    (tmp_path / "phrases.txt").write_text("\n".join(TEXTS))
    return tmp_path


def command(folder, found, *flags):
    common = ["--checkpoint", folder / "run.pt", "--weights", "raw", "--device", "cpu"]
    named = ["--detections", found / "out/detections.json", "--text-file", found / "phrases.txt"]
    return [str(part) for part in [*common, *named, "--output", found / "a/described", *flags]]


def cosines(model, image, boxes):
    sides = torch.tensor(boxes) / torch.tensor(image.size * 2)
    regions = model.encode_regions(preprocess(image, 32)[None], [sides])
    return l2_normalize(regions) @ l2_normalize(model.encode_text(Tokenizer(MERGES)(TEXTS, 40))).T


def check(row, expected, best):
    for one, cosine in zip(row["detections"], expected, strict=True):
        order = cosine.argsort(descending=True)[:best].tolist()
        chances = (10 * cosine).softmax(0)
        assert [phrase["phrase"] for phrase in one["phrases"]] == [TEXTS[i] for i in order]
        assert [phrase["cosine"] for phrase in one["phrases"]] == pytest.approx(cosine[order].tolist(), abs=1e-3)
        assert [phrase["probability"] for phrase in one["phrases"]] == pytest.approx(chances[order].tolist(), abs=1e-3)


def test_detections_get_the_phrases_that_fit_best(folder, found, model, capsys):
    score.main(command(folder, found, "--best", "2"))
    first, second = json.loads((found / "a/described/detections.json").read_text())
    check(first, cosines(model, open_image(found / "0.png"), BOXES), 2)
    assert [one["score"] for one in first["detections"]] == [0.9, 0.8] and first["visible"] == "../../0.png"
    assert second["detections"] == [] and second["image"] == "elsewhere/1.png"
    names = {path.name for path in (found / "a/described").iterdir()}
    assert names == {"0.png", "1.png", "detections.json"} and "wrote 2 pictures" in capsys.readouterr().out
    pixels = np.asarray(Image.open(found / "a/described/0.png"))
    factor = pixels.shape[1] // 40
    assert (pixels[12 * factor, 5 * factor] == score.BOX).all()


def test_frames_of_a_video(folder, found, model):
    """Frames are numbered as they are decoded; the camera is chosen."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from trainkit.video import decoded, video_writer

    rng = np.random.default_rng(0)
    with video_writer(found / "i.mp4", Fraction(10)) as add:
        for number in range(6):
            add(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), number / 10)
    shown = [Image.fromarray(picture()) for _, picture in decoded(found / "i.mp4")]
    rows = [
        {"visible": "no", "infrared": "../i.mp4", "infrared_frame": n, "detections": [{"box": BOXES[0]}]}
        for n in (1, 4)
    ]
    (found / "out/detections.json").write_text(json.dumps(rows))
    score.main(command(folder, found, "--camera", "infrared"))
    for row, number in zip(json.loads((found / "a/described/detections.json").read_text()), (1, 4), strict=True):
        check(row, cosines(model, shown[number], BOXES[:1]), 3)
    assert (found / "a/described/i-000004.png").exists()


def test_a_map_shows_where_a_text_fits(folder, found, model):
    image, path = open_image(folder / "images/0.png"), found / "map.png"
    flags = ["--checkpoint", folder / "run.pt", "--weights", "raw", "--device", "cpu", "--map", path]
    texts = [part for text in TEXTS[:2] for part in ("--text", text)]
    score.main([str(flag) for flag in [*flags, "--image", folder / "images/0.png", *texts]])
    dense = l2_normalize(model.dense_features(preprocess(image, 32)[None])[0].movedim(0, -1))
    values = dense @ l2_normalize(model.encode_text(Tokenizer(MERGES)(TEXTS[:2], 40))).T  # (4, 4, 2)
    pixels = np.asarray(Image.open(path)).astype(float).sum(2)
    width, height = 40 * (factor := -(-384 // 30)), 30 * factor
    for panel in range(2):
        part = pixels[:height, (panel + 1) * (width + 4) :][:, :width]
        rows = [band.mean() for band in np.array_split(part[:, :], 4, 0)]
        wanted = values[..., panel].mean(1).detach().numpy()
        assert np.corrcoef(rows, wanted)[0, 1] > 0.8


def test_bad_input_is_refused(folder, found, capsys):
    path = found / "out/detections.json"
    rows = json.loads(path.read_text())
    outside = [rows[0] | {"detections": [{"box": [50, 5, 60, 20]}]}]
    for content, flags, said in (
        (rows, ["--image", found / "0.png"], "expected either --image FILE or --detections FILE"),
        (rows, ["--box", "1,2,3,4"], "--detections needs --output DIR, and neither --box"),
        (rows, ["--camera", "infrared"], "item 0 has no detections, or no infrared image"),
        ({}, [], "a list"),
        ([{"visible": "../0.png"}], [], "item 0 has no detections"),
        ([{"visible": "../0.png", "detections": [{"score": 1}]}], [], "0.png: expected 4 numbers"),
        ([{"visible": "../9.png", "detections": []}], [], "9.png does not exist; expected a picture, named by"),
        (outside, [], "lies outside of the image of 40x30"),
        (rows, ["--best", "0"], "--best: expected a whole number of at least 1"),
        (rows, ["--output", found / "0.png"], "0.png cannot be written"),
    ):
        path.write_text(json.dumps(content))
        assert said in refused(capsys, score.main, *command(folder, found, *flags)), said
        assert not (found / "a/described/detections.json").exists()
    flags = ["--checkpoint", folder / "run.pt", "--text", "a", "--device", "cpu"]
    assert "either --image" in refused(capsys, score.main, *flags)
    assert "needs --output" in refused(capsys, score.main, *flags, "--detections", path)
