"""Under autocast features, weights and embeddings may come in any dtype; coordinates and logits stay in float32."""

import pytest
import torch

import kernels

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def pooled():
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 4, 20, 30, generator=generator).requires_grad_()
    rois = torch.tensor([[0, 2.0, 2, 30, 30], [1, 5.0, 8, 50, 31]])
    weight = torch.randn(5, 4 * 9, generator=generator).requires_grad_()
    return feature, rois, weight


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("output_size", [1, 3])
def test_pooling_casts_features_and_trains_them(pooled, half, output_size):
    feature, rois, _ = pooled
    expected = kernels.multiscale_roi_align([feature], rois, scales=[0.5], output_size=output_size)
    for given in (feature, feature.to(half)):
        feature.grad = None
        with torch.autocast("cpu", dtype=half):
            found = kernels.multiscale_roi_align([given], rois, scales=[0.5], output_size=output_size)
        assert found.dtype == half
        torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.02)
        found.float().sum().backward()
        assert feature.grad.norm() > 0


@pytest.mark.parametrize("half", HALVES)
def test_projection_casts_features_and_weights(pooled, half):
    feature, rois, weight = pooled
    expected = kernels.roi_align_project([feature], rois, weight, scales=[0.5], output_size=3)
    with torch.autocast("cpu", dtype=half):
        found = kernels.roi_align_project([feature], rois, weight, scales=[0.5], output_size=3)
    assert found.dtype == half
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)
    found.float().sum().backward()
    assert feature.grad.norm() > 0 and weight.grad.norm() > 0


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bank_rows", [0, 300])
@pytest.mark.parametrize("with_stats", [False, True])
def test_logits_stay_in_float32(half, bank_rows, with_stats):
    generator = torch.Generator().manual_seed(0)
    query, key, bank = (torch.randn(rows, 8, generator=generator) for rows in (4, 6, bank_rows))
    results = []
    for enabled in (False, True):
        own = query.clone().requires_grad_()
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            loss = kernels.contrastive_loss(own, key, torch.tensor(10.0), bank=bank, with_stats=with_stats)
        loss = loss[0] if with_stats else loss
        loss.backward()
        results.append((loss, own.grad))
    assert results[1][0].dtype == torch.float32
    for alone, under_autocast in zip(*results, strict=True):
        assert torch.equal(alone, under_autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_query_at_all(dtype, reduction):
    query = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    key = torch.randn(3, 8, dtype=dtype)
    loss, stats = kernels.contrastive_loss(query, key, torch.tensor(10.0), reduction=reduction, with_stats=True)
    assert loss.sum() == 0 and stats.candidates.shape == (0,)
    loss.sum().backward()
    assert query.grad.shape == (0, 8)
