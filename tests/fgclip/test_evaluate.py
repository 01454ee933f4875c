"""A model out of a file with its tokenizer, and `python -m fgclip.evaluate` as a person runs it.

In two processes, too: this file starts itself for that.
"""

import json
import os
import shutil
import sys

import pytest
import torch
from pairs import write
from scripts import equal, refused

from fgclip import FGCLIP, Tokenizer, evaluate, load_model, save_clip_weights
from fgclip.data import Record, RegionDataset
from fgclip.embedding import Embedder
from fgclip.images import preprocess
from fgclip.metrics import class_metrics, retrieval_recall
from fgclip.model import l2_normalize
from fgclip.tasks import retrieval
from trainkit.errors import InputError
from trainkit.files import open_image

MERGES = [["t", "h"], ["th", "e</w>"], ["r", "e"], ["re", "d</w>"]]
VOCAB = 514 + len(MERGES)
IMAGES = 4


def run_state(own, **changes):
    """What a checkpoint of train_fgclip.py holds of model and tokenizer; the average is another model."""
    average = {k: v + 0.01 for k, v in own.state_dict().items()}
    kept = dict(script="fgclip", model_kwargs=own.config, model=own.state_dict(), ema=average, merges=MERGES)
    return {k: v for k, v in (kept | changes).items() if v is not None}


def command(folder, checkpoint="run.pt"):
    return ["--checkpoint", folder / checkpoint, "--device", "cpu", "--workers", 0]


def run(folder, *flags, **kwargs):
    evaluate.main([str(part) for part in [*command(folder, **kwargs), *flags]])


def results(folder, tmp_path, *flags, **kwargs):
    """What a command writes to its json file."""
    run(folder, *flags, "--output", tmp_path / "results.json", **kwargs)
    return json.loads((tmp_path / "results.json").read_text())


def refusal(capsys, folder, *flags, **kwargs) -> str:
    return refused(capsys, evaluate.main, *command(folder, **kwargs), *flags)


def pixels(folder, size=32, crop=False):
    """The four images as the model reads them."""
    return torch.stack([preprocess(open_image(folder / "images" / f"{i}.png"), size, crop) for i in range(IMAGES)])


def dataset(records, folder):
    return RegionDataset(records, folder / "images", image_size=32, max_regions=None)


def text_features(model, texts, long=False):
    tokens = Tokenizer(MERGES)(texts, 100 if long else 40)
    return l2_normalize(model.encode_text(tokens, long=long))


# ---- the model and its tokenizer


def same(one, other):
    return equal(dict(one.state_dict()), dict(other.state_dict()))


def test_a_run_brings_weights_and_tokenizer(folder, tmp_path, model):
    raw, tokenizer = load_model(folder / "run.pt", weights="raw")
    assert same(raw, model) and not raw.training
    assert tokenizer("the red", 4).tolist() == [[VOCAB - 2, 513, 515, VOCAB - 1]]
    average, _ = load_model(folder / "run.pt")
    assert torch.equal(average.logit_scale, model.logit_scale + 0.01)
    torch.save(run_state(model, ema=None), tmp_path / "run.pt")
    assert same(load_model(tmp_path / "run.pt")[0], model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(script="stage1"), "a checkpoint of train_stage1.py"),
        (dict(merges=None), "lacks merges"),
        (dict(model_kwargs=dict(embed_dim=8)), "another version of the model"),
        (dict(model_kwargs=dict(depth=8)), "another version of the model"),
        (dict(model_kwargs=[1]), "describes no model that can be built"),
        (dict(model_kwargs=dict(vision=3)), "describes no model that can be built"),
        (dict(model_kwargs=dict(embed_dim=2**62)), "describes no model that can be built"),
        (dict(model_kwargs=dict(text=dict(context_length=1))), "context_length"),
        (dict(merges=3), "merges: expected a list of pairs, got 3"),
        (dict(merges=[["t", torch.ones(2)]]), "merges: expected two symbols"),
        (dict(merges=[["a", "b"]] * 9), "more merges than the model's 518 tokens"),
        (dict(model=3, ema=None), "holds no state dict"),
        (dict(ema=dict(logit_scale=torch.ones(2))), "another version of the model"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, model, changes, said):
    if isinstance(changes.get("model_kwargs"), dict):
        changes = dict(model_kwargs=model.config | changes["model_kwargs"])
    torch.save(run_state(model, **changes), tmp_path / "run.pt")
    with pytest.raises(InputError, match=said):
        load_model(tmp_path / "run.pt")


def test_published_weights_take_the_merges_beside_them(tmp_path, model):
    pytest.importorskip("safetensors")
    save_clip_weights(model, tmp_path)
    merges = "\n".join(["#version: 0.2", *map(" ".join, MERGES)])
    (tmp_path / "other.txt").write_text(merges + "\na b\n")
    with pytest.raises(InputError, match="--vocab"):
        load_model(tmp_path)  # nothing beside them
    with pytest.raises(InputError, match=f"vocabulary of {VOCAB} tokens, but there are {VOCAB + 1} here"):
        load_model(tmp_path, vocab=tmp_path / "other.txt")
    assert load_model(tmp_path, vocab="bytes")[1].eos_id == VOCAB - 1
    (tmp_path / "merges.txt").write_text(merges + "\n")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded, tokenizer = load_model(path)
        assert same(loaded, model) and tokenizer.encode("red the") == [515, 513]
    with pytest.raises(InputError, match="brings its own tokenizer"):
        torch.save(run_state(model), tmp_path / "run.pt")
        load_model(tmp_path / "run.pt", vocab="bytes")


# ---- features of whole data sets


def test_equal_texts_have_equal_features(model):
    embedder = Embedder(model, Tokenizer(MERGES), batch_size=1)
    texts = ["red", "a much longer text", "the", "red", "a"]
    found = embedder.texts(texts)
    torch.testing.assert_close(found, text_features(model, texts), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[3])


def test_features_that_are_not_finite_are_refused(tmp_path, model):
    broken = FGCLIP(**model.config)
    torch.nn.init.constant_(broken.text_projection.weight, torch.inf)
    with pytest.raises(InputError, match="the model: the features of some texts are not finite"):
        Embedder(broken, Tokenizer(MERGES)).texts(["a"])
    torch.save(run_state(model, model={k: torch.full_like(v, 1e17) for k, v in broken.state_dict().items()}, ema=None),
               tmp_path / "big.pt")  # fmt: skip
    with pytest.raises(InputError, match="big.pt: the features of some texts are not finite"):
        Embedder(*load_model(tmp_path / "big.pt")).texts(["a"])


# ---- the tasks


CAPTIONS = [["red the", "a"], ["the"], ["blue thing", "red", "one", "two", "three", "four"], ["last one here"]]


def coco(folder, captions=CAPTIONS, **changes):
    images = [dict(id=10 + i, file_name=f"{i}.png", width=40 + i, height=30) for i in range(IMAGES)]
    annotations = [dict(image_id=10 + i, caption=text) for i, texts in enumerate(captions) for text in texts]
    return write(folder / "captions.json", dict(images=images, annotations=annotations) | changes)


def test_retrieval(folder, tmp_path, model, capsys):
    """Of the first five captions of each image."""
    flags = ("--task", "retrieval", "--annotations", coco(tmp_path), "--image-root", folder / "images")
    found = results(folder, tmp_path, *flags, "--weights", "raw")
    assert "4 images with 9 short captions" in capsys.readouterr().out
    owner = [i for i, texts in enumerate(CAPTIONS) for _ in texts[:5]]
    text = text_features(model, [text for texts in CAPTIONS for text in texts[:5]])
    image = l2_normalize(model.encode_image(pixels(folder)))
    assert found["metrics"] == retrieval_recall(image, text, torch.tensor(owner))
    found = results(folder, tmp_path, *flags, "--captions", 1, "--limit", 3)
    assert found["data"] == ["3 images with 3 short captions"]


def test_long_captions_take_the_long_path(folder, model):
    records = [Record(f"{i}.png", (), "word " * (10 + i) + f"the end {i}") for i in range(IMAGES)]
    embedder = Embedder(model, Tokenizer(MERGES))
    rows, sentence = retrieval(embedder, dataset(records, folder), long=True)
    text = text_features(model, [record.long for record in records], long=True)
    scores = l2_normalize(model.encode_image(pixels(folder))) @ text.T
    assert rows["image_to_text"]["R@1"] == (scores.argmax(1) == torch.arange(IMAGES)).double().mean()
    assert embedder.truncated == 0 and sentence == "4 images with 4 long captions"
    retrieval(embedder, dataset([Record("0.png", (), "word " * 60)], folder), long=True)
    assert embedder.truncated == 1


def fgovd(path, changes=()):
    """Three regions on two images, with two, four and one negatives; the last is the positive itself."""
    line = dict(bbox=[2, 3, 20, 15], pos_expression=["the red"], width=40, height=30)
    lines = [
        line | dict(img_path="0.png", neg_expression=["a", "b"]),
        line | dict(img_path="1.png", neg_expression=["a", "b", "c", "d"], bbox=[0, 0, 30, 30], width=41),
        line | dict(img_path="0.png", neg_expression=["the red"], bbox=[10, 10, 10, 10]),
    ]
    return write(path, "\n".join(json.dumps(one | dict(changes)) for one in lines) + "\n")


def test_fgovd(folder, tmp_path, model, capsys):
    """Variable numbers of negatives, a tie is a miss, one row per file."""
    for name in ("shuffle_negatives_llava.jsonl", "h_attributes_llava.jsonl", "mine.jsonl"):
        fgovd(tmp_path / "fgovd" / name)
    flags = ("--task", "fg-ovd", "--annotations", tmp_path / "fgovd", "--image-root", folder / "images")
    found = results(folder, tmp_path, *flags, "--weights", "raw")
    assert list(found["metrics"]) == ["hard", "trivial", "mine"]
    assert "hard: 3 regions in 2 images" in capsys.readouterr().out
    text = text_features(model, ["the red", "a", "b", "c", "d"])
    boxes = [(0, 0.05, 0.1, 0.55, 0.6), (1, 0.0, 0.0, 30 / 41, 1.0), (0, 0.25, 1 / 3, 0.5, 2 / 3)]
    region = [model.encode_regions(pixels(folder)[i : i + 1], [torch.tensor([box])]) for i, *box in boxes]
    region = [l2_normalize(features)[0] for features in region]
    hits = [bool((region[0] @ text[:3].T).argmax() == 0), bool((region[1] @ text.T).argmax() == 0), False]
    row = dict(accuracy=sum(hits) / 3, chance=(1 / 3 + 1 / 5 + 1 / 2) / 3, count=3, negatives=7)
    assert found["metrics"]["mine"] == pytest.approx(row)


def instances(folder):
    images = [dict(id=10 + i, file_name=f"{i}.png", width=40 + i, height=30) for i in range(IMAGES)]
    categories = [dict(id=5 * i, name=name) for i, name in enumerate("the red thing a b c d".split())]
    boxes = [(10, 0, [0, 0, 20, 20]), (10, 5, [5, 5, 10, 10]), (12, 30, [0, 0, 42, 30]), (12, 0, [9, 9, 0, 4])]
    crowd = dict(image_id=11, category_id=0, bbox=[0, 0, 5, 5], iscrowd=1)
    annotations = [dict(image_id=i, category_id=c, bbox=b, iscrowd=0) for i, c, b in boxes] + [crowd]
    return write(folder / "instances.json", dict(images=images, annotations=annotations, categories=categories))


def test_boxes(folder, tmp_path, model, capsys):
    (tmp_path / "templates.txt").write_text("{}\nred {}\n")
    flags = ("--task", "boxes", "--annotations", instances(tmp_path), "--image-root", folder / "images")
    found = results(folder, tmp_path, *flags, "--templates", tmp_path / "templates.txt", "--weights", "raw")
    assert "7 classes in 2 templates; 3 regions in 2 images; 4 boxes, 1 (25.00%) dropped" in capsys.readouterr().out
    names = "the red thing a b c d".split()
    text = text_features(model, [t for name in names for t in (name, f"red {name}")])
    classes = l2_normalize(text.view(7, 2, -1).mean(dim=1))
    boxes = [torch.tensor([[0, 0, 0.5, 20 / 30], [0.125, 5 / 30, 0.375, 0.5]]), torch.tensor([[0.0, 0, 1, 1]])]
    region = l2_normalize(model.encode_regions(pixels(folder)[[0, 2]], boxes))
    assert found["metrics"]["boxes"] == class_metrics(region, classes, torch.tensor([0, 1, 6]))


def test_folder_of_classes(folder, tmp_path, model):
    root = tmp_path / "root"
    for label, names in (("b_two", "01"), ("a_one", "23")):
        (root / label).mkdir(parents=True)
        for name in names:
            shutil.copy(folder / "images" / f"{name}.png", root / label)
    (root / "a_one" / "notes.txt").write_text("no image")
    found = results(folder, tmp_path, "--task", "folder", "--image-root", root, "--crop", "--weights", "raw")
    assert found["data"] == ["2 classes in 14 templates; 4 images of 2"]
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfthe red\r\nsomething else\r\n")  # as Windows' editors write
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfa {} b\r\n")
    named = ("--class-names", tmp_path / "names.txt", "--templates", tmp_path / "one.txt")
    found = results(folder, tmp_path, "--task", "folder", "--image-root", root, *named, "--weights", "raw")
    classes = text_features(model, ["a the red b", "a something else b"])
    best = (l2_normalize(model.encode_image(pixels(folder))) @ classes.T).argmax(dim=1).tolist()
    expected = sum(a == b for a, b in zip(best, [1, 1, 0, 0], strict=True)) / 4
    assert found["metrics"]["images"]["top1"] == expected
    assert found["data"][0].endswith("4 images of 2; folders: a_one = the red, b_two = something else")
    found = results(folder, tmp_path, "--task", "folder", "--image-root", root, "--limit", 2)
    assert found["data"][0].endswith("2 images of 2")  # one of each class


def test_a_guess_about_published_weights_is_printed(folder, tmp_path, monkeypatch, capsys, model):
    save_clip_weights(model, tmp_path)
    (tmp_path / "config.json").unlink()
    flags = ("--vocab", "bytes", "--count", 2)
    assert "--heads VISION TEXT" in refusal(capsys, tmp_path, *flags, checkpoint="")
    run(tmp_path, *flags, "--heads", 4, 4, checkpoint="")
    assert "guessed: vision activation quick_gelu (--activation)" in capsys.readouterr().err
    run(tmp_path, *flags, "--heads", 4, 4, "--activation", "gelu", checkpoint="")
    assert "guessed" not in capsys.readouterr().err


def test_synthetic_scenes_are_the_default(folder, tmp_path, capsys):
    found = results(folder, tmp_path, "--count", 12)
    assert found["task"] == "synthetic" and found["data"][0] == "12 drawn scenes of seed 20000, grid"
    rows = found["metrics"]
    assert rows.keys() == {"region", "hard", "short", "long"} and rows["hard"]["count"] == 48
    assert rows["region"]["candidates"] == 40 and rows["region"]["count"] == 48
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert lines[-7:] == "region region hard short long short long".split()


# ---- bad input: one sentence that names it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image-root x", "--task is missing"),
        ("--task retrieval --image-root x", "--task retrieval needs --annotations"),
        ("--task long-retrieval --annotations x --image-root x", "--task long-retrieval needs --format"),
        ("--task boxes --annotations x --image-root x --crop", "--crop has no part in --task boxes"),
        ("--task folder --image-root x --count 3", "--count has no part in --task folder"),
        ("--task retrieval --annotations a b --image-root x", "takes one path, got 2"),
        ("--output none/x.json", "expected a file in a folder that exists"),
        ("--image-size 20", "--image-size 20: expected a multiple of the patch size, 8"),
    ],
)
def test_bad_flags_are_refused(folder, capsys, flags, message):
    assert message in refusal(capsys, folder, *flags.split())


def test_bad_data_is_refused(folder, tmp_path, capsys):
    def say(task, annotations, *flags, root=folder / "images"):
        return refusal(capsys, folder, "--task", task, "--annotations", annotations, "--image-root", root, *flags)

    assert "at least one record, found none" in say("retrieval", coco(tmp_path, annotations=[]))
    assert "does not exist" in say("retrieval", coco(tmp_path), root=tmp_path)
    share = write(tmp_path / "s.json", [dict(image="0.png", conversations=[{}, dict(value="v")])])
    assert "s.json, item 0: expected a short caption" in say("retrieval", share, "--format", "sharegpt4v")
    assert "no region here" in say("fg-ovd", fgovd(tmp_path / "e.jsonl", dict(bbox=[5, 5, 0, 0])))
    assert "at least two" in refusal(capsys, folder, "--task", "folder", "--image-root", folder)
    assert "expected a file or folder of weights" in refusal(capsys, folder, checkpoint="nothing.pt")
    assert "0.png was not written by torch.save" in refusal(capsys, folder, checkpoint="images/0.png")


@pytest.mark.parametrize("flags", [[], ["--image-size", 64], ["--crop"]])
def test_what_the_model_is_shown(folder, tmp_path, monkeypatch, flags):
    """Images in the size of the weights or of --image-size, squashed or with --crop cut out of the middle."""
    seen, forward = [], FGCLIP.forward
    monkeypatch.setattr(FGCLIP, "forward", lambda self, batch: seen.append(batch["pixels"]) or forward(self, batch))
    data = ("--task", "retrieval", "--annotations", coco(tmp_path), "--image-root", folder / "images")
    run(folder, *data, *flags)
    assert torch.cat(seen).equal(pixels(folder, 64 if "--image-size" in flags else 32, "--crop" in flags))


def test_two_processes_share_the_images_and_agree(folder, tmp_path, two_ranks):
    """Of three scenes, so that one process has one more."""
    shutil.copy(folder / "run.pt", tmp_path)
    alone = results(tmp_path, tmp_path, "--count", 3, "--batch-size", 2)["metrics"]
    encoded = [rank["images"] for rank in two_ranks(__file__, tmp_path)]
    together = json.loads((tmp_path / "together.json").read_text())["metrics"]
    assert encoded == [2, 1] and together.keys() == alone.keys()
    for name, row in alone.items():
        assert together[name] == pytest.approx(row, rel=1e-4), name


def test_real_sample(shared, folder, tmp_path):
    data = shared / "data" / "fgclip"
    flags = ("--task", "fg-ovd", "--annotations", data / "fgovd", "--image-root", data / "coco")
    found = results(folder, tmp_path, *flags)
    assert [row["count"] for row in found["metrics"].values()] == [59, 50, 23, 59] and found["truncated"] > 0


if __name__ == "__main__":
    folder, images = sys.argv[1], 0
    encode = FGCLIP.forward

    def counted(self, batch):
        global images
        images += len(batch["pixels"])
        return encode(self, batch)

    FGCLIP.forward = counted
    torch.set_num_threads(1)
    common = ["--checkpoint", f"{folder}/run.pt", "--device", "cpu", "--workers", "0", "--count", "3"]
    evaluate.main([*common, "--batch-size", "2", "--output", f"{folder}/together.json"])
    torch.save(dict(images=images), f"{folder}/rank{os.environ['RANK']}.pt")
