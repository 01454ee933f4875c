"""Damaged annotations, configs, merges and checkpoints: read sanely, or refused in a line that names the file."""

import copy
import gzip
import io
import json
import random
import warnings

import pytest
import torch
from PIL import Image

from fgclip import FGCLIP, Tokenizer, load_model, save_clip_weights
from fgclip.data.benchmarks import DCI, COCOBoxes, Flickr30k, ShareGPT4V
from fgclip.data.collate import Collate
from fgclip.data.dataset import RegionDataset
from fgclip.data.records import COCO, FGOVD, FineHARD
from fgclip.data.statistics import data_statistics
from trainkit.errors import InputError

NAME, REGION = "a/1.png", dict(short_expr="b", long_expr="c", flag_short_neg=1, short_expr_negs={"0": "d"})
FINEHARD = [dict(f_path=NAME, caption="a", short_caption="b", label=1, bbox_info=[REGION | dict(bbox=[0, 0.1, 1, 1])])]
IMAGES = dict(images=[dict(id=1, file_name=NAME, width=32, height=24)])
CAPTIONS = IMAGES | dict(annotations=[dict(id=i, image_id=1, caption="a") for i in range(2)])
BOXES = [dict(id=i, image_id=1, category_id=1, iscrowd=0, bbox=[3, 4, 10, 15]) for i in range(2)]
INSTANCES = IMAGES | dict(annotations=BOXES, categories=[dict(id=1, name="cat")])
OVD = [dict(img_path=NAME, bbox=[3, 4, 10, 15], width=32, height=24, pos_expression=["a"], neg_expression=["b"])]
KARPATHY = dict(images=[dict(filename="1.png", filepath="a", split="test", sentences=[dict(raw="a")])])
SHARE = [dict(image=NAME, conversations=[dict(value="q"), dict(value="a")])]
READERS = {  # the file, what it holds, and what reads it
    "finehard.json": (FINEHARD, FineHARD),
    "captions_x.json": (CAPTIONS, COCO),
    "instances_x.json": (INSTANCES, COCOBoxes),
    "ovd.json": (OVD, FGOVD),
    "karpathy.json": (KARPATHY, Flickr30k),
    "share.json": (SHARE, ShareGPT4V),
    "dci/one.json": (dict(image=NAME, extra_caption="a", short_caption="b"), lambda path: DCI(path.parent)),
    "tokenizer.json": (dict(model=dict(merges=["a b", ["c", "d"]])), Tokenizer),
    "hf/config.json": (None, lambda path: load_model(path.parent, vocab="bytes")[1]),
    "oc/open_clip_config.json": (None, lambda path: load_model(path.parent / "clip.pt", vocab="bytes")[1]),
    "run.pt": (None, lambda path: load_model(path)[1]),
}
VALUES = [None, True, 0, -1, 1.5, 10**9, 10**30, 1e300, float("nan"), float("-inf"), "", "..", "/etc/passwd", "\ud800"]
VALUES += ["a\nb", "x" * 70000, "9" * 5000, [], {}, [[]], {"a": 1}, [None], [1, 2, 3, 4], "../b", 2, 32, "1"]
SPOILT = [b"", b"\0", b"[" * 10**5, b"{}", b"[]", b"\xff\xfe[", b'{"a":' * 10**5, b"\n" * 70000 + b"[", b"9" * 5000]


def places(value):
    """(container, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutant(rng, value, values):
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(list(places(value)))
        if rng.random() < 0.15:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice([*values, [container[key]], key]))  # else values hold each other
        if not any(places(value)):
            break
    return value


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder with a sound file of each kind, and what they hold."""
    folder = tmp_path_factory.mktemp("fuzz")
    for path in ("a", "dci", "hf", "oc"):
        (folder / path).mkdir()
    Image.new("RGB", (32, 24)).save(folder / NAME)
    tower = dict(width=8, layers=1, heads=1, mlp_width=8)
    model = FGCLIP(vision=dict(image_size=16, patch_size=8, **tower), text=dict(vocab_size=514, **tower), embed_dim=8)
    save_clip_weights(model, folder / "hf")
    torch.save(model.state_dict(), folder / "oc" / "clip.pt")
    kept = {name: content for name, (content, _) in READERS.items() if content is not None}
    kept["hf/config.json"] = json.loads((folder / "hf" / "config.json").read_text())
    towers = dict(vision_cfg=dict(width=8, layers=1, head_width=8), text_cfg=dict(width=8, layers=1, heads=1))
    kept["oc/open_clip_config.json"] = dict(model_cfg=towers | dict(quick_gelu=True))
    kept["run.pt"] = dict(
        script="fgclip", model_kwargs=model.config, model=dict(model.state_dict()), ema=None, merges=[]
    )
    return folder, kept


def encoded(name, value) -> bytes:
    if not name.endswith(".pt"):
        return json.dumps(value).encode()
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def use(opened, folder):
    """What training and evaluation make of what was read."""
    if isinstance(opened, Tokenizer):
        assert (opened(["a red car", "cab"]) < opened.vocab_size).all()
        return
    records = [opened[i] for i in range(len(opened))]
    data_statistics(records, Tokenizer("bytes"))
    if records:
        samples = [RegionDataset(records, folder, image_size=16)[i] for i in range(len(records))]
        assert Collate(Tokenizer("bytes"))(samples)["pixels"].isfinite().all()
        boxes = torch.cat([sample.boxes for sample in samples])
        assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_stands_in_a_file_is_read_or_refused(files, name, count):
    folder, kept = files
    path, reader = folder / name, READERS[name][1]
    path.write_bytes(encoded(name, kept[name]))
    use(reader(path), folder)
    outcomes = set()
    for i in range(count):
        rng = random.Random(f"{name} {i}")
        values = [*VALUES, torch.zeros(1).expand(10**9), torch.ones(2)] if name.endswith(".pt") else VALUES
        content = encoded(name, mutant(rng, kept[name], values)) if i >= len(SPOILT) else SPOILT[i]
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content) + 1)] + rng.randbytes(rng.choice((0, 9)))
        path.write_bytes(content)
        with warnings.catch_warnings(action="error"):
            try:
                use(reader(path), folder)
                outcomes.add("read")
            except InputError as error:
                said = str(error)
                assert said.isprintable() and len(said) <= 500 and str(folder) in said, (i, said)
                outcomes.add("refused")
    path.unlink()
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("name", ["merges.txt", "merges.txt.gz"])
def test_whatever_stands_in_a_list_of_merges_is_read_or_refused(tmp_path, name):
    sound = b"#version: 0.2\na b</w>\nc a\nca r</w>\n"
    for i in range(200):
        rng = random.Random(i)
        content = bytearray(gzip.compress(sound, mtime=0) if name.endswith("gz") and i % 2 else sound)
        for _ in range(rng.randrange(4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = content[: rng.choice((len(content), rng.randrange(len(content))))]
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") and not i % 2 else content)
        try:
            use(Tokenizer(tmp_path / name), tmp_path)
        except InputError as error:
            assert name in str(error) and str(error).isprintable()
