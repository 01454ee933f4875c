"""`python -m fgclip.score`: cosines and probabilities of captions for an image or its boxes."""

import json

import pytest
import torch
from scripts import refused

from fgclip import Tokenizer, score
from fgclip.images import preprocess
from fgclip.model import l2_normalize
from trainkit.files import open_image

MERGES = [["t", "h"], ["th", "e</w>"], ["r", "e"], ["re", "d</w>"]]
TEXTS = ["a red cat", "a dog", "something"]


def command(folder):
    checkpoint, image = folder / "run.pt", folder / "images" / "0.png"
    return ["--checkpoint", checkpoint, "--weights", "raw", "--image", image, "--device", "cpu"]


def run(folder, *flags):
    score.main([str(part) for part in [*command(folder), *flags]])


def scored(capsys, folder, *flags):
    run(folder, *flags, "--json")
    return json.loads(capsys.readouterr().out)


def pixels(folder):
    return preprocess(open_image(folder / "images" / "0.png"), 32)[None]


def texts_of(texts):
    return [part for text in texts for part in ("--text", text)]


def expected(model, seen, texts, scale):
    cosines = l2_normalize(seen) @ l2_normalize(model.encode_text(Tokenizer(MERGES)(texts, 40))).T
    return cosines.tolist(), (scale * cosines).softmax(dim=1).tolist()


def test_an_image(folder, model, capsys):
    found = scored(capsys, folder, *texts_of(TEXTS))
    cosines, probabilities = expected(model, model.encode_image(pixels(folder)), TEXTS, 20.0)
    (region,) = found["regions"]
    assert region["box"] is None and found["scale"] == pytest.approx(20.0) and found["texts"] == TEXTS
    assert region["cosine"] == pytest.approx(cosines[0], abs=1e-5)
    assert region["probability"] == pytest.approx(probabilities[0], abs=1e-4)


def test_boxes_are_in_pixels_and_have_the_scale_of_regions(folder, model, capsys):
    flags = ("--box", "5,4,30,20", "--box=-10,10,25,100")
    found = scored(capsys, folder, *texts_of(TEXTS), *flags)
    boxes = torch.tensor([[0.125, 4 / 30, 0.75, 20 / 30], [0.0, 10 / 30, 0.625, 1.0]])
    cosines, probabilities = expected(model, model.encode_regions(pixels(folder), [boxes]), TEXTS, 10.0)
    assert [region["box"] for region in found["regions"]] == [[5, 4, 30, 20], [-10, 10, 25, 100]]
    for region, cosine, probability in zip(found["regions"], cosines, probabilities, strict=True):
        assert region["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert region["probability"] == pytest.approx(probability, abs=1e-4)
    run(folder, *texts_of(TEXTS), *flags)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("scale 10.0; CLIP BPE with 4 merges learned from the data")
    assert "box 5,4,30,20" in said and said[4].split() == [
        f"{cosines[0][1]:.3f}", f"{probabilities[0][1]:.4f}", "a", "dog"
    ]  # fmt: skip


def test_only_texts_beyond_the_short_length_take_the_long_path(folder, tmp_path, model, capsys):
    """38 bytes and two marks are 40 tokens."""
    texts = ["a" * 38, "a" * 39, "short", "b" * 120]
    (tmp_path / "texts.txt").write_text("\n".join(texts[1:]) + "\n\n")
    found = scored(capsys, folder, "--text", texts[0], "--text-file", tmp_path / "texts.txt")
    assert found["texts"] == texts and found["long"] == [False, True, False, True] and found["truncated"] == 1
    image = l2_normalize(model.encode_image(pixels(folder)))[0]
    for text, long, cosine in zip(texts, found["long"], found["regions"][0]["cosine"], strict=True):
        tokens = Tokenizer(MERGES)([text], 100 if long else 40)
        assert cosine == pytest.approx(float(l2_normalize(model.encode_text(tokens, long=long))[0] @ image), abs=1e-5)
    run(folder, "--text", texts[3])
    assert "b (as a long text)\n1 captions were longer" in capsys.readouterr().out


def test_bad_input_is_refused(folder, capsys):
    for flags, said in (
        ((), "give captions with --text or --text-file"),
        (("--text", "a", "--box", "1,2,3"), "--box 1,2,3: expected 4 numbers"),
        (("--text", "a", "--box", "1,2,3,nan"), "--box 1,2,3,nan: expected a number"),
        (("--text", "a", "--box", "5,5,20,20", "--box", "0.1,0,0.5,1"), "--box 0.1,0,0.5,1: expected x1"),
        (("--text", "a", "--image-size", "8192"), "of at most 4096"),
        (("--text", "a", "--box", "30,4,5,20"), "--box 30,4,5,20: expected x1,y1,x2,y2"),
        (("--text", "a", "--box", "60,4,70,20"), "overlapping the image of 40x30"),
        (("--text", "a", "--image", folder / "none.png"), "none.png does not exist"),
        (("--text-file", folder / "none.txt"), "none.txt does not exist"),
        (("--text", "a", "--image-size", 12), "--image-size 12: expected a multiple of the patch size, 8"),
        (("--text", "a", "--vocab", "bytes"), "brings its own tokenizer"),
    ):
        assert said in refused(capsys, score.main, *command(folder), *flags), flags
