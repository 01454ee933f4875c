"""Which parts of a model moved."""

import pytest
import torch
from torch import nn

from trainkit.parameter_drift import ParameterDrift


def test_what_moved_since_it_was_last_asked():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model[1][1].requires_grad_(False)
    movement = ParameterDrift(model)
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
    movement.since()
    with torch.no_grad():
        model[0].weight[0, 0] = 3
    assert movement.since() == {"0": (pytest.approx(1.0), 1, 2), "1.0": (0.0, 0, 2)}
    assert movement.since()["0"] == (0.0, 0, 2)
