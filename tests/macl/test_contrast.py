import math

import pytest
import torch
import torch.nn.functional as F

from macl.contrast import MACLHead


def features(rows, seed=0):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(**kwargs):
    torch.manual_seed(0)
    return MACLHead(12, (10,), 8, **kwargs).double()


def test_symmetric_loss_is_the_mean_of_both_cross_entropies():
    model, visible, infrared = head(), features(6), features(6, 1)
    loss, metrics = model(visible, infrared)
    logits = model.embed(visible) @ model.embed(infrared).T / 0.07
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["macl_relative"], expected / math.log(6))
    hits = (logits.argmax(1) == target).double().mean() / 2 + (logits.argmax(0) == target).double().mean() / 2
    torch.testing.assert_close(metrics["macl_recall"], hits)
    assert metrics["macl_candidates"] == 6 and metrics["temperature"].item() == pytest.approx(0.07)
    one_way, _ = head(direction="visible_to_infrared")(visible, infrared)
    torch.testing.assert_close(one_way, F.cross_entropy(logits, target))


@pytest.mark.parametrize("norm", ["none", "layer", "group", "batch"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_pair_and_one_pair_give_exactly_zero_and_stay_connected(norm, rows):
    model = head(norm=norm, norm_groups=2)
    loss, metrics = model(features(rows), features(rows, 1))
    assert loss == 0 and metrics["macl_relative"] == 0
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_temperature_stays_in_its_bounds_and_comes_back_from_them():
    model = head()
    for start, bound in ((-9.0, 0.01), (4.0, 1.0)):
        with torch.no_grad():
            model.log_temperature.fill_(start)
        loss, _ = model(features(4), features(4, 1))
        assert model.temperature.item() == pytest.approx(bound)
        model.zero_grad()
        loss.backward()
        assert model.log_temperature.grad != 0


def test_a_hard_positive_keeps_its_gradient():
    """At temperature 0.01 a positive of probability below 1e-40 still pulls."""
    model, visible = head(temperature=0.01, norm="none"), features(3)
    infrared = (-visible).requires_grad_()
    loss, _ = model(visible, infrared)
    loss.backward()
    assert loss > 20 and infrared.grad.norm() > 0.1


def test_the_layers_of_the_projector():
    model = MACLHead(12, (10, 6), 8, norm="layer", dropout=0.5)
    hidden = ["Linear", "LayerNorm", "ReLU", "Dropout"]
    assert [type(layer).__name__ for layer in model.projector] == [*hidden, *hidden, "Linear"]
    assert model.embed(torch.randn(5, 12)).shape == (5, 8)
