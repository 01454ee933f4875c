import math

import numpy
import pytest
import torch

import macl
from macl.backbone import MODALITIES
from macl.contrast import MACLHead

SMALL = dict(
    backbone="resnet18", norm="group", fpn_channels=32, fpn_levels=3, anchor_sizes=(16, 32, 64),
    aspect_ratios=(1.5, 2.5), head_width=32, rpn_pre_nms=(100, 50), rpn_post_nms=(50, 25), roi_samples=32,
    macl_hidden=(32,), macl_dim=16, msp=True,
)  # fmt: skip


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
    images = {name: [torch.rand(3, *size, generator=generator) for size in ((64, 96), (60, 80))] for name in MODALITIES}
    boxes = [
        torch.tensor([[5.0, 5, 25, 50], [40, 10, 60, 55], [70, 20, 85, 60]]),
        torch.tensor([[20.0, 10, 40, 55]]),
    ]
    targets = [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes]
    return images | {"targets": targets}


@pytest.fixture
def unequal():
    """Four images, the first and the last of one padded size, a box each; boxes of people grow with the image."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((64, 96), (97, 60), (32, 130), (60, 80))
    images = {name: [torch.rand(3, *size, generator=generator).double() for size in sizes] for name in MODALITIES}
    boxes = [torch.tensor([[w / 3, 2, w / 2, h - 1]], dtype=torch.float64) for h, w in sizes]
    return images | {"targets": [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64)} for box in boxes]}


class Golden:
    """The arrays of a file of recorded numbers, by name or by prefix."""

    def __init__(self, path):
        self.name = path.stem
        self.arrays = {name: torch.as_tensor(value) for name, value in numpy.load(path).items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def under(self, prefix):
        return {name[len(prefix) :]: value for name, value in self.arrays.items() if name.startswith(prefix)}

    def list(self, prefix):
        return [self[f"{prefix}{i}"] for i in range(len(self.arrays)) if f"{prefix}{i}" in self]

    def close(self, actual, name, rtol, atol):
        torch.testing.assert_close(actual.detach(), self[name].to(actual.dtype), rtol=rtol, atol=atol)

    def all_close(self, actual, prefix, rtol, atol):
        for name in self.under(prefix):
            self.close(actual[name], prefix + name, rtol, atol)

    def head(self, **kwargs):
        """A head with the recorded projector and temperature, and the recorded features as leaves."""
        weights, features = self.under("w.proj."), [self[name] for name in ("z_vis", "z_ir")]
        widths = [w.shape[0] for name, w in weights.items() if name.endswith("weight") and w.dim() == 2]
        sizes = features[0].shape[1], widths[:-1], widths[-1]
        head = MACLHead(*sizes, direction="visible_to_infrared", **kwargs).to(features[0].dtype)
        head.projector.load_state_dict(weights)
        with torch.no_grad():
            head.log_temperature.fill_(math.log(self["w.tau"].item()))
        return head, *(feature.clone().requires_grad_() for feature in features)

    def gradients_are_close(self, head, visible, infrared, rtol, atol):
        self.close(visible.grad, "grad_z_vis", rtol, atol)
        self.close(infrared.grad, "grad_z_ir", rtol, atol)
        expected = self["g.tau"] * self["w.tau"]  # recorded of the temperature; here it is of its logarithm
        torch.testing.assert_close(head.log_temperature.grad, expected.to(visible.dtype), rtol=rtol, atol=atol)
        assert self.under("g.proj.") or self.under("g.norm.proj.")
        gradients = {name: parameter.grad for name, parameter in head.projector.named_parameters()}
        self.all_close(gradients, "g.proj.", rtol, atol)
        norms = {name: gradient.norm() for name, gradient in gradients.items()}
        self.all_close(norms, "g.norm.proj.", rtol, atol)


@pytest.fixture
def golden(shared, request):
    """The recorded numbers that the test's parameter names."""
    return Golden(shared / "golden" / "detector" / f"{request.param}.npz")
