"""A small FG-CLIP, and the golden vectors as tensors."""

import json

import numpy as np
import pytest
import torch

from fgclip import FGCLIP

torch.set_num_threads(1)

SMALL = dict(
    vision=dict(image_size=32, patch_size=8, width=32, layers=3, heads=4, mlp_width=64),
    text=dict(vocab_size=514, context_length=24, width=24, layers=2, heads=3, mlp_width=48),
    embed_dim=16,
)


@pytest.fixture
def small_model():
    """Every parameter random, so that no zero bias or equal table hides a mistake."""
    torch.manual_seed(0)
    model = FGCLIP(**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


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
