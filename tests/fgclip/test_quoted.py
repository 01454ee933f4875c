"""Urban-1k, DOCCI, LVIS, several sets in one table, features that are kept, and clip-benchmark's interface."""

import json
import os
import sys
import types

import pytest
import torch
from PIL import Image
from scripts import refused

from fgclip import FGCLIP, clip_benchmark, evaluate, load_model
from fgclip.data.benchmarks import DOCCI, CaptionFiles, COCOBoxes
from fgclip.embedding import Embedder
from fgclip.embedding_cache import IMAGE_PARTS, weights_hash
from trainkit.errors import InputError
from trainkit.files import open_image

BOXES = [dict(id=k, image_id=k % 4, category_id=k % 3, bbox=[1 + k, 2, 20, 20]) for k in range(6)]


@pytest.fixture
def sets(folder, tmp_path):
    """A suite of four tasks on the images of `folder`."""
    (tmp_path / "caption").mkdir()
    for i in range(4):
        (tmp_path / "caption" / f"{i}.txt").write_text(f"the red \n one {i}\n")
    docci = [dict(image_file=f"{i}.png", description=f"red {i}", split="qual" if i == 3 else "test") for i in range(4)]
    (tmp_path / "docci.jsonlines").write_text("\n".join(map(json.dumps, docci)))
    for name in ("lvis", "coco"):
        images = [dict(id=i, width=40 + i, height=30) for i in range(4)]
        for i, image in enumerate(images):
            place = dict(coco_url=f"http://images.cocodataset.org/images/{i}.png") if name == "lvis" else None
            image.update(place or dict(file_name=f"images/{i}.png"))
        categories = [dict(id=k, name=f"a_{k}") for k in range(3)]
        content = dict(images=images, annotations=BOXES, categories=categories)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    images = folder / "images"
    (tmp_path / "sets.txt").write_text(
        f"# a comment\nurban --task long-retrieval --format urban1k --annotations {tmp_path}/caption "
        f"--image-root {images}\n\ndocci --task long-retrieval --format docci --annotations {tmp_path}/docci.jsonlines "
        f"--image-root {images} --limit 3\nlvis --task boxes --annotations {tmp_path}/lvis.json --image-root {folder}\n"
        f"coco --task boxes --annotations {tmp_path}/coco.json --image-root {folder}  # the same boxes\n"
    )
    return tmp_path


def run(folder, *flags, checkpoint="run.pt"):
    flags = ["--checkpoint", folder / checkpoint, "--device", "cpu", "--workers", 0, *flags]
    evaluate.main([str(flag) for flag in flags])


def test_records_of_urban1k_docci_and_lvis(sets, folder):
    urban = CaptionFiles(sets / "caption", folder / "images")
    assert [record.long for record in urban] == [f"the red one {i}" for i in range(4)]
    assert urban[3].picture(folder / "images").size == (43, 30)
    (sets / "caption" / "10.txt").write_text("no image")
    with pytest.raises(InputError, match="10.txt: .*images has no image of this name"):
        CaptionFiles(sets / "caption", folder / "images")
    with pytest.raises(InputError, match="nowhere is not a folder"):
        CaptionFiles(sets / "caption", sets / "nowhere")
    assert [record.long for record in DOCCI(sets / "docci.jsonlines", "qual")] == ["red 3"]
    with pytest.raises(InputError, match="no split 'val'; expected one of qual, test"):
        DOCCI(sets / "docci.jsonlines", "val")
    lvis, coco = COCOBoxes(sets / "lvis.json"), COCOBoxes(sets / "coco.json")
    assert [(r.image, r.regions) for r in lvis] == [(r.image, r.regions) for r in coco] and len(lvis) == 4


def test_several_sets_stand_in_one_table(sets, folder, capsys):
    run(folder, "--suite", sets / "sets.txt", "--output", sets / "whole.json")
    output = capsys.readouterr().out
    whole = json.loads((sets / "whole.json").read_text())
    rows = [f"{name}: {way}" for name in ("urban", "docci") for way in ("image_to_text", "text_to_image")]
    assert list(whole["metrics"]) == [*rows, "lvis: boxes", "coco: boxes"]
    assert output.count("R@5") == output.count("class mean") == 1 and "docci: 3 images with 3 long captions" in output
    assert whole["metrics"]["lvis: boxes"] == whole["metrics"]["coco: boxes"] and whole["task"]["lvis"] == "boxes"
    run(folder, *(sets / "sets.txt").read_text().splitlines()[1].split()[1:], "--output", sets / "one.json")
    one = json.loads((sets / "one.json").read_text())["metrics"]
    assert one["image_to_text"] == whole["metrics"]["urban: image_to_text"]
    flags = ["--checkpoint", folder / "run.pt", "--suite", sets / "bad.txt"]
    for line, sentence in {
        "urban": "bad.txt: urban: expected a name of its own and flags",
        "a --task synthetic\na --task synthetic": "bad.txt: a: expected a name of its own",
        "a --task boxes": "--task boxes needs --annotations",
    }.items():
        (sets / "bad.txt").write_text(line)
        assert sentence in refused(capsys, evaluate.main, *flags)


def test_kept_features_are_those_of_the_model_and_are_made_once(sets, folder, monkeypatch):
    shown = []
    images = Embedder.images

    def count(self, dataset, regions=False):
        shown.append(len(dataset))
        return images(self, dataset, regions)

    monkeypatch.setattr(Embedder, "images", count)
    flags, results = ["--suite", sets / "sets.txt", "--output", sets / "out.json"], []
    for more in ([], ["--cache", sets / "kept"], ["--cache", sets / "kept"]):
        run(folder, *flags, *more)
        results.append(json.loads((sets / "out.json").read_text())["metrics"])
    assert shown == [4, 3, 4, 4] + [4, 4] and results[0] == results[1] == results[2]
    run(folder, *flags, "--cache", sets / "kept", "--weights", "raw")
    run(folder, *flags, "--cache", sets / "kept", "--image-size", 16)
    os.utime(folder / "images" / "2.png", (1, 1))
    run(folder, *flags, "--cache", sets / "kept")
    (sets / "coco.json").write_text((sets / "coco.json").read_text().replace("20, 20]", "9, 9]"))
    run(folder, *flags, "--cache", sets / "kept")
    assert shown[6:] == [4, 4, 4, 4, 1, 1, 4] and len(list((sets / "kept").iterdir())) == 2


def test_the_hash_of_weights_is_that_of_the_image_tower(model):
    other = FGCLIP(**model.config)
    other.load_state_dict(model.state_dict())
    assert weights_hash(other) == weights_hash(model)
    with torch.no_grad():
        other.text_projection.weight.add_(1)
        assert weights_hash(other) == weights_hash(model) != weights_hash(other, ("",))
        other.visual_projection.weight[0, 0] += 1
    assert weights_hash(other) != weights_hash(model) and len(IMAGE_PARTS) == 3


@pytest.mark.parametrize("name", ["short", "long"])
def test_clip_benchmark_gets_a_model_a_transform_and_a_tokenizer(folder, name):
    model, transform, tokenizer = clip_benchmark.load(name, str(folder / "run.pt"), cache_dir=None, device="cpu")
    own, own_tokenizer = load_model(folder / "run.pt")
    picture = Image.new("L", (40, 30), 100)
    pixels = torch.stack([transform(picture), transform(open_image(folder / "images" / "1.png"))])
    tokens = tokenizer(["the red", "red"])
    assert pixels.shape == (2, 3, 32, 32) and tokens.shape == (2, 100 if name == "long" else 40)
    with torch.no_grad():
        assert model.encode_image(pixels).equal(own.encode_image(pixels))
        assert model.encode_text(tokens).equal(own.encode_text(tokens, long=name == "long"))


def test_clip_benchmarks_command_knows_the_model(folder, monkeypatch):
    seen = {}
    models = types.SimpleNamespace(TYPE2FUNC={}, MODEL_TYPES=["open_clip"])
    cli = types.SimpleNamespace(main=lambda: seen.update(arguments=sys.argv[1:], **models.TYPE2FUNC))
    monkeypatch.setitem(sys.modules, "clip_benchmark", types.SimpleNamespace(cli=cli, models=models))
    monkeypatch.setattr(sys, "argv", ["fgclip.clip_benchmark", "eval", "--pretrained", "best.pt"])
    clip_benchmark.main()
    assert seen["arguments"] == ["eval", "--pretrained", "best.pt", "--model_type", "fgclip"]
    assert seen["fgclip"] is clip_benchmark.load and models.MODEL_TYPES == ["open_clip", "fgclip"]
    with pytest.raises(InputError, match="--model ViT-B-32: expected short, or long"):
        clip_benchmark.load("ViT-B-32", str(folder / "run.pt"))
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(InputError, match="pip install clip-benchmark"):
        clip_benchmark.main()
