"""Damaged annotations, configs, merges and checkpoints: read sanely, or refused in a line that names the file."""

import gzip
import json

import pytest
import torch
from mutants import hunt
from PIL import Image

from fgclip import FGCLIP, Tokenizer, load_model, save_clip_weights
from fgclip.data.benchmarks import DCI, COCOBoxes, Flickr30k, ShareGPT4V
from fgclip.data.collate import Collate
from fgclip.data.dataset import RegionDataset, data_statistics
from fgclip.data.records import COCO, FGOVD, FineHARD

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


def use(opened, folder):
    """What training and evaluation make of what was read."""
    if isinstance(opened, Tokenizer):
        assert (opened(["a red car", "cab"]) < opened.vocab_size).all()
        return
    records = [opened[i] for i in range(len(opened))]
    data_statistics(records)
    if records:
        samples = [RegionDataset(records, folder, image_size=16)[i] for i in range(len(records))]
        assert all(sample.pixels.isfinite().all() for sample in samples)
        if all(sample.short is not None for sample in samples):
            Collate(Tokenizer("bytes"))(samples)
        boxes = torch.cat([sample.boxes for sample in samples])
        assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_stands_in_a_file_is_read_or_refused(files, name, count):
    folder, kept = files
    hunt(folder / name, kept[name], lambda path: use(READERS[name][1](path), folder), count)


@pytest.mark.parametrize("packed", [False, True])
def test_whatever_stands_in_a_list_of_merges_is_read_or_refused(tmp_path, packed):
    sound = b"#version: 0.2\na b</w>\nc a\nca r</w>\n"
    path = tmp_path / ("merges.txt.gz" if packed else "merges.txt")
    hunt(path, gzip.compress(sound, mtime=0) if packed else sound, lambda path: use(Tokenizer(path), tmp_path), 200)
