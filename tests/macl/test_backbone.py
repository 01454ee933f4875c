"""The backbone is torchvision's ResNet, also where frozen norms are folded into its convolutions."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from macl.backbone import Backbone


def randomise(module):
    for name, buffer in module.named_buffers():
        nn.init.uniform_(buffer, 0.5, 1.5)
        if name.endswith(("bias", "mean")):
            buffer.sub_(1)
    return module.double()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_maps_and_gradients_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = randomise(getattr(resnet, name)(norm_layer=FrozenBatchNorm2d))
    ours = Backbone(name, norm="frozen_batch").double()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    maps = ours(images, [("visible", 2)])
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    for stage, actual in enumerate(maps, 1):
        x = getattr(theirs, f"layer{stage}")(x)
        torch.testing.assert_close(actual, x)
    assert [part.shape[1] for part in maps] == ours.out_channels
    for last in (maps[-1], x):
        (last / last.detach().norm()).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad)
