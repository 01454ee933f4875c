"""Domain alignment: the discrepancy, the reversed gradient, and the losses that the detector takes from them."""

import pytest
import torch
import torch.nn.functional as F

from macl.domain import DomainAlignment, DomainClassifier, gradient_reversal, grl_schedule, mmd, pool


def normal(rows, seed=0, dim=6):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(a, b, sigmas):
    squared = ((a[:, None] - b) ** 2).sum(2)
    return torch.stack([torch.exp(-squared / (2 * sigma**2)) for sigma in sigmas]).mean(0)


@pytest.mark.parametrize("form", ["biased", "unbiased", "paired"])
def test_mmd_is_the_sum_over_pairs(form):
    x, y, sigmas = normal(5), normal(5 if form == "paired" else 7, 1), [0.5, 2.0]
    result = mmd(x, y, sigmas, unbiased=form != "biased", paired=form == "paired")
    within = [kernel(z, z, sigmas) for z in (x, y)]
    cross = kernel(x, y, sigmas)
    if form == "biased":
        expected = within[0].mean() + within[1].mean() - 2 * cross.mean()
    else:
        off = [matrix[~torch.eye(len(matrix), dtype=torch.bool)].mean() for matrix in within]
        between = cross.mean() if form == "unbiased" else cross[~torch.eye(5, dtype=torch.bool)].mean()
        expected = off[0] + off[1] - 2 * between
    torch.testing.assert_close(result, expected)


def test_the_paired_form_is_unbiased_for_dependent_pairs_and_the_other_is_not():
    """x_i and y_i of one distribution but nearly equal: the mean over many draws should be 0."""
    estimates = {True: [], False: []}
    for seed in range(400):
        x = normal(4, seed, dim=2)
        y = x + 0.1 * normal(4, seed + 1000, dim=2)
        for paired, values in estimates.items():
            values.append(mmd(x, y, [1.0], paired=paired))
    means = {paired: torch.stack(values).mean().item() for paired, values in estimates.items()}
    assert abs(means[True]) < 0.01 and means[False] < -0.2
    for wrong in ({"y": normal(4)}, {"unbiased": False}):
        with pytest.raises(ValueError, match="paired form"):
            mmd(**{"x": normal(3), "y": normal(3, 1), "sigmas": [1.0], "paired": True} | wrong)


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


def alignment(**kwargs):
    torch.manual_seed(0)
    known = dict(pooled_dim=6, mmd_level="embedding", mmd_sigmas=None, mmd_unbiased=True, adversary="none", domains=1)
    return DomainAlignment(**known | kwargs).double()


def test_the_median_heuristic_follows_the_scale_of_the_features():
    """At a hundred times the distances the fixed bandwidths see nothing; the median ones see what they saw."""
    x, y = normal(8), normal(8, 1) + 1
    domains = torch.zeros(8, dtype=torch.int64)
    for factor in (1.0, 100.0):
        features = {"visible": (x * factor).requires_grad_(), "infrared": y * factor}
        losses, metrics = alignment().mmd_loss(features, domains)
        distances = torch.cdist(*[torch.cat(list(features.values()))] * 2)
        median = distances[torch.ones(16, 16).triu(1).bool()].median().detach()
        torch.testing.assert_close(metrics["mmd_bandwidth"], median)
        expected = mmd(*features.values(), median * torch.tensor([0.5, 1.0, 2.0]), paired=True)
        torch.testing.assert_close(losses["loss_mmd"], expected)
        gradients = [torch.autograd.grad(loss, features["visible"]) for loss in (losses["loss_mmd"], expected)]
        torch.testing.assert_close(*gradients)  # none flows through the bandwidth
    assert losses["loss_mmd"] > 0.1 and metrics["mmd_rows"] == 8
    fixed, metrics = alignment(mmd_sigmas=(1.0, 2.0, 4.0)).mmd_loss(features, domains)
    assert fixed["loss_mmd"] == 0 and metrics["mmd_bandwidth"] == 2


def test_data_sets_are_compared_within_each_modality():
    """Three data sets of which the last has a single row: only the first two can be compared."""
    features = {"visible": normal(9), "infrared": normal(9, 1)}
    domains = torch.tensor([0, 1, 0, 1, 1, 2, 0, 1, 0])
    losses, _ = alignment(domains=3, mmd_sigmas=(1.0,)).mmd_loss(features, domains)
    expected = [mmd(rows[domains == 0], rows[domains == 1], [1.0]) for rows in features.values()]
    torch.testing.assert_close(losses["loss_mmd_domains"], torch.stack(expected).mean())
    alone = {name: rows.requires_grad_() for name, rows in features.items()}
    losses, _ = alignment(domains=3).mmd_loss(alone, torch.zeros(9, dtype=torch.int64))
    assert losses["loss_mmd_domains"] == 0 and losses["loss_mmd_domains"].requires_grad
    assert "loss_mmd_domains" not in alignment().mmd_loss(alone, torch.zeros(9, dtype=torch.int64))[0]


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


@pytest.mark.parametrize(("progress", "scale"), [(0, 0), (0.1, 0.46211716), (0.5, 0.98661430), (1, 0.99990920)])
def test_the_published_schedule(progress, scale):
    assert grl_schedule(progress) == pytest.approx(scale)


@pytest.mark.parametrize("adversary", ["modality", "dataset"])
def test_the_adversary_guesses_what_it_is_asked(adversary):
    model = alignment(adversary=adversary, domains=3).eval()
    pooled, domains = {"visible": normal(4), "infrared": normal(4, 1)}, torch.tensor([0, 2, 1, 1])
    losses, metrics = model.adversarial_loss(pooled, domains, 1.0)
    logits = model.classifier(torch.cat(list(pooled.values())))
    labels = torch.tensor([0, 2, 1, 1] * 2 if adversary == "dataset" else [0] * 4 + [1] * 4)
    assert logits.shape[1] == (3 if adversary == "dataset" else 2)
    torch.testing.assert_close(losses["loss_adversary"], F.cross_entropy(logits, labels))
    assert metrics["adversary_accuracy"] == (logits.argmax(1) == labels).double().mean()


def test_pooling_leaves_the_padding_out():
    pyramid = [torch.randn(2, 3, 16, 24), torch.randn(2, 3, 8, 12)]
    rows = pool(pyramid, [(64, 96), (32, 50)], (64, 96))
    assert rows.shape == (2, 6)
    torch.testing.assert_close(rows[0], torch.cat([level[0].mean(dim=(1, 2)) for level in pyramid]))
    torch.testing.assert_close(rows[1, :3], pyramid[0][1, :, :8, :13].mean(dim=(1, 2)))  # 12.5 columns: 13
    torch.testing.assert_close(rows[1, 3:], pyramid[1][1, :, :4, :7].mean(dim=(1, 2)))
