import numpy
import pytest
import torch

import macl

SMALL = dict(
    backbone="resnet18",
    norm="group",
    fpn_channels=32,
    fpn_levels=3,
    anchor_sizes=(16, 32, 64),
    aspect_ratios=(1.5, 2.5),
    head_width=32,
    rpn_pre_nms=(100, 50),
    rpn_post_nms=(50, 25),
    roi_samples=32,
    macl_hidden=(32,),
    macl_dim=16,
    msp=True,
)


@pytest.fixture
def build():
    """A small detector; keywords replace its own."""

    def build(**kwargs) -> macl.PairedFasterRCNN:
        torch.manual_seed(0)
        return macl.build_detector(**SMALL | kwargs)

    return build


@pytest.fixture
def batch():
    """Two registered pairs of unequal size with three and one boxes."""
    generator = torch.Generator().manual_seed(1)
    images = {
        name: [torch.rand(3, *size, generator=generator) for size in ((64, 96), (60, 80))]
        for name in ("visible", "infrared")
    }
    boxes = [
        torch.tensor([[5.0, 5, 25, 50], [40, 10, 60, 55], [70, 20, 85, 60]]),
        torch.tensor([[20.0, 10, 40, 55]]),
    ]
    targets = [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes]
    return images | {"targets": targets}


class Golden:
    """The arrays of a file of recorded numbers, by name or by the beginning of it."""

    def __init__(self, path):
        self.arrays = {name: torch.as_tensor(value) for name, value in numpy.load(path).items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def under(self, prefix):
        return {name[len(prefix) :]: value for name, value in self.arrays.items() if name.startswith(prefix)}

    def list(self, prefix):
        return [self[f"{prefix}{i}"] for i in range(len(self.arrays)) if f"{prefix}{i}" in self]


@pytest.fixture
def golden(shared, request):
    """The recorded numbers that the test's parameter names."""
    return Golden(shared / "golden" / "detector" / f"{request.param}.npz")
