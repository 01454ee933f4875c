"""`python -m fgclip.score`: cosines and probabilities of captions for an image or its boxes."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fgclip import FGCLIP, Tokenizer, score
from fgclip.images import preprocess, read_image
from fgclip.model import unit
from trainkit.errors import one_sentence

WIDTH, HEIGHT = 50, 40
TEXTS = ["a red cat", "a dog", "something"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = FGCLIP(
        vision=dict(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_width=64),
        text=dict(vocab_size=514, context_length=24, width=32, layers=2, heads=4, mlp_width=64),
        embed_dim=16,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.logit_scale.fill_(math.log(20.0))
        model.logit_scale_finegraind.fill_(math.log(5.0))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("score")
    kept = dict(script="fgclip", model_kwargs=model.config, model=model.state_dict(), ema=None, merges=[])
    torch.save(kept, folder / "run.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def run(folder, *flags):
    common = ["--checkpoint", folder / "run.pt", "--image", folder / "image.png", "--device", "cpu"]
    score.main([str(part) for part in [*common, *flags]])


def scored(capsys, folder, *flags):
    run(folder, *flags, "--json")
    return json.loads(capsys.readouterr().out)


def refused(capsys, folder, *flags) -> str:
    with pytest.raises(SystemExit) as stop, one_sentence():
        run(folder, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def pixels(folder):
    return preprocess(read_image(folder / "image.png"), 32)[None]


def texts_of(texts):
    return [part for text in texts for part in ("--text", text)]


def expected(model, seen, texts, scale):
    cosines = unit(seen) @ unit(model.encode_text(Tokenizer("bytes")(texts, 24))).T
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
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.0, 0.25, 0.5, 1.0]])
    cosines, probabilities = expected(model, model.encode_regions(pixels(folder), [boxes]), TEXTS, 5.0)
    assert [region["box"] for region in found["regions"]] == [[5, 4, 30, 20], [-10, 10, 25, 100]]
    for region, cosine, probability in zip(found["regions"], cosines, probabilities, strict=True):
        assert region["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert region["probability"] == pytest.approx(probability, abs=1e-4)
    run(folder, *texts_of(TEXTS), *flags)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("scale 5.0; CLIP BPE on bytes, no merges")
    assert "box 5,4,30,20" in said and said[4].split() == [
        f"{cosines[0][1]:.3f}", f"{probabilities[0][1]:.4f}", "a", "dog"
    ]  # fmt: skip


def test_only_texts_beyond_the_short_length_take_the_long_path(folder, model, capsys):
    """22 bytes and two marks are 24 tokens."""
    texts = ["a" * 22, "a" * 23, "short", "b" * 40]
    (folder / "texts.txt").write_text("\n".join(texts[1:]) + "\n\n")
    found = scored(capsys, folder, "--text", texts[0], "--text-file", folder / "texts.txt")
    assert found["texts"] == texts and found["long"] == [False, True, False, True] and found["truncated"] == 1
    image = unit(model.encode_image(pixels(folder)))[0]
    for text, long, cosine in zip(texts, found["long"], found["regions"][0]["cosine"], strict=True):
        tokens = Tokenizer("bytes")([text], model.text_model.long_context_length if long else 24)
        assert cosine == pytest.approx(float(unit(model.encode_text(tokens, long=long))[0] @ image), abs=1e-5)
    run(folder, "--text", texts[3])
    assert "b (as a long text)\n1 captions were longer" in capsys.readouterr().out


def test_bad_input_is_refused(folder, capsys):
    box = "expected x1,y1,x2,y2"
    for flags, said in (
        ((), "give captions with --text or --text-file"),
        (("--text", "a", "--box", "1,2,3"), "--box 1,2,3: expected 4 numbers"),
        (("--text", "a", "--box", "1,2,3,nan"), "--box 1,2,3,nan: expected a number"),
        (("--text", "a", "--box", "5,5,20,20", "--box", "0.1,0,0.5,1"), "--box 0.1,0,0.5,1 looks like fractions"),
        (("--text", "a", "--image-size", "8192"), "of at most 4096"),
        (("--text", "a", "--heads", "1", "1"), "run.pt brings its own"),
        (("--text", "a", "--box", "30,4,5,20"), f"--box 30,4,5,20: {box} with x1 < x2 and y1 < y2"),
        (("--text", "a", "--box", "60,4,70,20"), "that meets the image of 50x40 pixels"),
        (("--text", "a", "--image", folder / "none.png"), "none.png does not exist"),
        (("--text", "a", "--image", folder / "run.pt"), "run.pt cannot be decoded as an image: none of JPEG"),
        (("--text-file", folder / "none.txt"), "none.txt does not exist"),
        (("--text", "a", "--image-size", 12), "--image-size 12: expected a multiple of the patch size, 8"),
        (("--text", "a", "--vocab", "bytes"), "brings its own tokenizer"),
    ):
        assert said in refused(capsys, folder, *flags), flags
