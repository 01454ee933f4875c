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
