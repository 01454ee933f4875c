"""Losses that align two domains: the discrepancy and the reversed gradient."""

import pytest
import torch
import torch.nn.functional as F

from macl.domain import DomainClassifier, gradient_reversal, mmd


def normal(rows, seed=0, dim=6):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(a, b, sigmas):
    squared = ((a[:, None] - b) ** 2).sum(2)
    return torch.stack([torch.exp(-squared / (2 * sigma**2)) for sigma in sigmas]).mean(0)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_the_sum_over_pairs(unbiased):
    x, y, sigmas = normal(5), normal(7, 1), [0.5, 2.0]
    within, cross = [kernel(z, z, sigmas) for z in (x, y)], kernel(x, y, sigmas)
    if unbiased:
        within = [matrix[~torch.eye(len(matrix), dtype=torch.bool)] for matrix in within]
    expected = within[0].mean() + within[1].mean() - 2 * cross.mean()
    torch.testing.assert_close(mmd(x, y, sigmas, unbiased=unbiased), expected)


@pytest.mark.parametrize("rows", [(0, 0), (1, 1), (1, 4), (4, 0)])
def test_too_few_rows_give_exactly_zero_and_stay_connected(rows):
    x, y = (normal(count, i).requires_grad_() for i, count in enumerate(rows))
    loss = mmd(x, y, [1.0])
    loss.backward()
    assert loss == 0 and x.grad.norm() == 0 and y.grad.norm() == 0
    assert mmd(normal(1), normal(1, 1), [1.0], unbiased=False) > 0


def test_equal_rows_have_a_finite_gradient():
    x = normal(4).requires_grad_()
    mmd(x, x.detach().clone(), [1.0], unbiased=False).backward()
    assert x.grad.isfinite().all()


def test_the_gradient_is_reversed_for_the_features_and_not_for_the_classifier():
    x, cotangent = normal(5).requires_grad_(), normal(5, 1)
    y = gradient_reversal(x, 0.3)
    assert torch.equal(y, x)
    (y * cotangent).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * cotangent)

    classifier, labels = DomainClassifier(6, 4, 3).double().eval(), torch.tensor([0, 2, 1, 1, 0])
    losses = [F.cross_entropy(classifier(x, scale), labels) for scale in (0.5, -1.0)]  # -1 undoes the reversal
    reversed_, plain = (torch.autograd.grad(loss, [x, *classifier.parameters()]) for loss in losses)
    torch.testing.assert_close(reversed_[0], -0.5 * plain[0])
    torch.testing.assert_close(reversed_[1:], plain[1:])
