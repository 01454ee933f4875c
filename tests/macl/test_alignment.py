"""Agreement of the modalities' embeddings."""

import math

import pytest
import torch

from macl.metrics import alignment
from macl.metrics.alignment import CHUNK, MEASURES
from trainkit.errors import InputError


def test_two_rows_by_hand():
    result = alignment(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))  # of any length
    assert result["r1"] == 1 and result["gallery"] == 2
    assert result["alignment"] == pytest.approx((0 + 0.4) / 2)
    assert result["modality_gap"] == pytest.approx(math.hypot(0.3, 0.1))
    unmatched = (math.sqrt(0.8) + math.sqrt(2)) / 2
    assert result["distance_ratio"] == pytest.approx(math.sqrt(0.4) / 2 / unmatched)
    assert result["uniformity"] == pytest.approx((-4 - 2 * 0.8) / 2)


@pytest.mark.parametrize("noise", [0, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_embeddings_find_nothing(noise, dtype):
    torch.manual_seed(0)
    assert alignment(torch.zeros(5, 3), torch.zeros(5, 3))["r1"] == 0
    x = torch.randn(1, 64).expand(300, 64).to(dtype)
    result = alignment(x + noise * torch.randn(300, 64), x)
    assert result["r1_visible_to_infrared"] == result["r1_infrared_to_visible"] == 0
    assert result["distance_ratio"] is None
    assert result["uniformity"] == pytest.approx(0, abs=1e-9)


def test_more_rows_than_a_chunk_equal_the_plain_formulas():
    torch.manual_seed(1)
    visible = torch.randn(CHUNK + 76, 16, dtype=torch.float64)
    infrared = visible + 0.8 * torch.randn_like(visible)
    result = alignment(visible, infrared)
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (visible, infrared))
    cosine = x @ y.T
    assert result["r1_visible_to_infrared"] == (cosine.argmax(1) == torch.arange(len(x))).double().mean()
    assert result["r1_infrared_to_visible"] == (cosine.argmax(0) == torch.arange(len(x))).double().mean()
    directions = [result[name] for name in ("r1_visible_to_infrared", "r1_infrared_to_visible")]
    assert 0.1 < min(directions) < max(directions) < 0.9 and result["r1"] == sum(directions) / 2
    other = ~torch.eye(len(x), dtype=bool)
    ratio = (x - y).norm(dim=1).mean() / torch.cdist(x, y)[other].mean()
    assert result["distance_ratio"] == pytest.approx(ratio.item())
    uniformity = sum(torch.pdist(rows).square().mul(-2).exp().mean().log() for rows in (x, y)) / 2
    assert result["uniformity"] == pytest.approx(uniformity.item())


def test_fewer_than_two_rows_say_nothing_and_wrong_ones_are_refused():
    for count in (0, 1):
        result = alignment(torch.ones(count, 4), torch.ones(count, 4))
        assert result == {**dict.fromkeys(MEASURES), "gallery": count}
    with pytest.raises(ValueError, match=r"embeddings are \(2, 3\) and \(3, 3\)"):
        alignment(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match="not finite"):
        alignment(torch.full((2, 3), float("nan")), torch.ones(2, 3))
