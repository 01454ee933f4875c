"""A small FG-CLIP, and the golden vectors as tensors."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fgclip import FGCLIP

SMALL = dict(
    vision=dict(image_size=32, patch_size=8, width=32, layers=3, heads=4, mlp_width=64),
    text=dict(vocab_size=514, context_length=24, width=24, layers=2, heads=3, mlp_width=48),
    embed_dim=16,
)


def random_model(**sizes):
    """Every parameter random, so that no zero bias or equal table hides a mistake."""
    torch.manual_seed(0)
    model = FGCLIP(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def small_model():
    return random_model(**SMALL)


@pytest.fixture
def small_batch():
    """Two images with a region each for `small_model`."""
    torch.manual_seed(1)
    tokens, boxes = torch.randint(1, 512, (4, 9)), [torch.tensor([[0.1, 0.1, 0.8, 0.9]])] * 2
    batch = dict(pixels=torch.randn(2, 3, 32, 32), boxes=boxes, short_texts=tokens, long_texts=tokens)
    return batch | dict(short=torch.tensor([0, 1]), region=torch.tensor([2, 3]), long=torch.tensor([0, 3]))


@pytest.fixture(scope="session")
def model():
    """What the checkpoint in `folder` holds, its scales 20 for images and 10 for regions."""
    tower = dict(width=32, layers=2, heads=4, mlp_width=64)
    text = dict(vocab_size=518, context_length=40, **tower)
    model = random_model(vision=dict(image_size=32, patch_size=8, **tower), text=text, embed_dim=16)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
        model.logit_scale_finegraind.fill_(math.log(10.0))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model):
    """A run's checkpoint, whose average is another model, and four images of different sizes."""
    folder = tmp_path_factory.mktemp("run")
    average = {k: v + 0.01 for k, v in model.state_dict().items()}
    merges = [["t", "h"], ["th", "e</w>"], ["r", "e"], ["re", "d</w>"]]
    run = dict(script="fgclip", model_kwargs=model.config, model=model.state_dict(), ema=average, merges=merges)
    torch.save(run, folder / "run.pt")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (30, 40 + i, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    return folder


class Golden:
    """One file of golden vectors: g["name"] is a tensor, g.config its JSON, g.state("sd/") a state dict."""

    def __init__(self, path):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {k: arrays[k] for k in arrays.files}

    def __getitem__(self, name):
        return torch.from_numpy(np.array(self.arrays[name]))

    @property
    def config(self):
        return json.loads(str(self.arrays["config_json"]))

    def state(self, prefix="sd/"):
        return {k.removeprefix(prefix): self[k] for k in self.arrays if k.startswith(prefix)}


@pytest.fixture
def golden(shared):
    """Opens a file of golden vectors by its name."""
    return lambda name: Golden(shared / "golden" / "fgclip" / f"{name}.npz")
