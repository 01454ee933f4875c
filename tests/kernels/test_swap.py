"""Swapped into torchvision's Faster R-CNN, the operators give its outputs and gradients."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from kernels import multiscale_roi_align, roi_align_project

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def as_arguments(features, boxes):
    """torchvision's dict of maps and list of boxes an image as (maps, RoIs)."""
    index = torch.cat([box.new_full((len(box), 1), image) for image, box in enumerate(boxes)])
    return [features[name] for name in "0123"], torch.cat([index, torch.cat(boxes)], 1)


class Pool(nn.Module):
    """In the place of `box_roi_pool`."""

    def forward(self, features, boxes, image_sizes):
        return multiscale_roi_align(*as_arguments(features, boxes), scales=SCALES, output_size=7)


class Keep(nn.Module):
    """In the place of `box_roi_pool` where the head pools for itself."""

    def forward(self, features, boxes, image_sizes):
        return as_arguments(features, boxes)


class Head(nn.Module):
    """In the place of `box_head`: pooling and fc6 in one operator."""

    def __init__(self, box_head):
        super().__init__()
        self.fc6, self.fc7 = box_head.fc6, box_head.fc7

    def forward(self, arguments):
        hidden = roi_align_project(*arguments, self.fc6.weight, self.fc6.bias, scales=SCALES, output_size=7)
        return self.fc7(hidden.relu()).relu()


def swapped(model, operator):
    heads = model.roi_heads
    heads.box_roi_pool = Pool() if operator == "pool" else Keep()
    if operator == "project":
        heads.box_head = Head(heads.box_head)
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((90, 120), (96, 80))]


def detector():
    """torchvision's detector with random weights under which it finds something, in float64: in float32 the rounding
    of two summation orders swaps near-equal scores."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = FasterRCNN(backbone, num_classes=5, min_size=96, max_size=128)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.05)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)
    return model.double()


def outputs_and_gradients(model, images):
    box = torch.tensor([[10.0, 20, 60, 80], [30, 5, 75, 70]], dtype=torch.float64)
    targets = [{"boxes": box, "labels": torch.tensor([1, 3])}] * 2
    with torch.no_grad():
        found = model.eval()(images)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(3)
    losses = model(images, targets)
    sum(losses.values()).backward()
    return found, losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def theirs(images):
    return outputs_and_gradients(detector(), images)


@pytest.mark.parametrize("operator", ["pool", "project"])
def test_the_detector_is_the_same(operator, theirs, images):
    found, losses, gradients = outputs_and_gradients(swapped(detector(), operator), images)
    assert all(len(image["boxes"]) > 5 for image in theirs[0])
    for ours, expected in zip(found, theirs[0], strict=True):
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(losses, theirs[1], rtol=1e-7, atol=1e-9)
    assert gradients.keys() == theirs[2].keys()
    for name, expected in theirs[2].items():
        assert (gradients[name] - expected).norm() <= 1e-7 * expected.norm() + 1e-12, name
