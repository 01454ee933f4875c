"""How a weight comes to its full size."""

import numpy as np
import pytest

from trainkit.ramp import RAMPS, ramped


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_rises_to_its_target_and_stays_there(kind):
    values = [ramped(0.3, kind, step, 30) for step in range(1, 41)]
    assert all(0 < value <= 0.3 for value in values)  # never 0: the loss keeps its graph
    assert all(one <= other for one, other in zip(values, values[1:], strict=False))
    assert values[29:] == [0.3] * 11
    assert ramped(0.3, kind, 1, 0) == 0.3 and ramped(0.0, kind, 5, 10) == 0.0


def test_kinds():
    assert [ramped(2.0, "linear", step, 4) for step in (1, 4, 8)] == [0.5, 2, 2]
    assert ramped(1.0, "exponential", 1, 2) == pytest.approx((1 - np.exp(-2.5)) / (1 - np.exp(-5)))
    stairs = [ramped(1.0, "progressive", step, 100) for step in (1, 32, 34, 70)]
    assert stairs == pytest.approx([1 / 2.25, 1 / 2.25, 1 / 1.5, 1])
