"""contrastive_loss against the cross-entropy of the whole logit matrix in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import MemoryBank, contrastive_loss


def rows(count, dim=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def cross_entropy(query, key, scale, *, target=None, bank=None, masked=None, reduction="mean"):
    candidates = key if bank is None else torch.cat([key, bank])
    logits = scale * query @ candidates.T
    if masked is not None:
        logits = logits.masked_fill(masked, -float("inf"))
    target = torch.arange(len(query)) if target is None else target
    return F.cross_entropy(logits, target, reduction=reduction)


@pytest.mark.parametrize("n, m, k", [(1, 1, 0), (1, 1, 5), (7, 7, 0), (5, 9, 33), (6, 6, 100)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_equal_cross_entropy(n, m, k, reduction):
    query, key = rows(n).requires_grad_(), rows(m, seed=1).requires_grad_()
    bank = rows(k, seed=2) if k else None
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    target = torch.randperm(m, generator=torch.Generator().manual_seed(5))[:n]
    ours = contrastive_loss(query, key, scale, target=target, bank=bank, reduction=reduction)
    expected = cross_entropy(query, key, scale, target=target, bank=bank, reduction=reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    inputs = [query, key, scale]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("valid", [0, 3, *map(torch.tensor, (0, 3, 10))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32 takes the way of small losses
def test_only_the_valid_rows_of_the_bank_count(valid, dtype):
    query, key, bank = (rows(count, seed=seed, dtype=dtype) for seed, count in enumerate((4, 4, 10)))
    ours = contrastive_loss(query, key, 10.0, bank=bank, bank_valid=valid)
    torch.testing.assert_close(ours, cross_entropy(query, key, 10.0, bank=bank[: int(valid)]))


def test_equal_ids_are_left_out_but_never_the_target_and_never_minus_one():
    query, key, bank = rows(3), rows(4, seed=1), rows(5, seed=2)
    query_ids, key_ids = torch.tensor([7, -1, 8]), torch.tensor([7, -1, 7, -1])
    bank_ids = torch.tensor([8, 7, -1, -1, 8])
    masked = (query_ids[:, None] == torch.cat([key_ids, bank_ids])) & (query_ids[:, None] != -1)
    masked[torch.arange(3), torch.arange(3)] = False
    ids = dict(query_ids=query_ids, key_ids=key_ids, bank_ids=bank_ids)
    ours, stats = contrastive_loss(query, key, 10.0, bank=bank, reduction="none", with_stats=True, **ids)
    torch.testing.assert_close(ours, cross_entropy(query, key, 10.0, bank=bank, masked=masked, reduction="none"))
    assert stats.candidates.tolist() == (~masked).sum(1).tolist()


def test_statistics():
    query, key, bank = rows(3), rows(3, seed=1), rows(5, seed=2)
    loss, stats = contrastive_loss(query, key, 10.0, bank=bank, reduction="none", with_stats=True)
    logits = 10 * query @ torch.cat([key, bank]).T
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(1))
    torch.testing.assert_close(stats.positive, logits.diagonal())
    torch.testing.assert_close(stats.largest_negative, logits.masked_fill(torch.eye(3, 8).bool(), -1e9).amax(1))
    torch.testing.assert_close(loss, stats.logsumexp - stats.positive)


def test_a_row_without_negatives_costs_nothing_and_pulls_nowhere():
    query, key = rows(1).requires_grad_(), rows(1, seed=1).requires_grad_()
    loss, stats = contrastive_loss(query, key, 10.0, with_stats=True)
    assert loss == 0 and stats.candidates == 1 and stats.largest_negative == -float("inf")
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [query, key]))


def small_loss_problem(dtype):
    """Queries that hold their key so closely that the loss is near 1e-9 at scale 100."""
    key, bank = rows(8, 64, seed=1), rows(200, 64, seed=2)
    query = F.normalize(0.5 * key + 0.5 * rows(8, 64, seed=3), dim=1)
    return [part.to(dtype) for part in (query, key, bank)]


def test_the_gradient_of_a_tiny_loss_is_exact():
    query, key, bank = small_loss_problem(torch.float32)
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        inputs = [query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()]
        scale = torch.tensor(100.0, dtype=dtype, requires_grad=True)
        loss = contrastive_loss(*inputs, scale, bank=bank.to(dtype))
        gradients[dtype] = torch.autograd.grad(loss, [*inputs, scale])
    assert 1e-12 < loss < 1e-7
    for a, b in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_the_bank_may_change_before_the_backward():
    bank = MemoryBank(8, 16)
    bank.enqueue(rows(8, seed=2, dtype=torch.float32))
    query = rows(3, dtype=torch.float32).requires_grad_()
    loss = contrastive_loss(query, rows(3, seed=1, dtype=torch.float32), 10.0, bank=bank.buffer, bank_valid=bank.valid)
    expected = torch.autograd.grad(loss, query, retain_graph=True)[0].clone()
    bank.enqueue(rows(5, seed=9, dtype=torch.float32))
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.tensor([0, 1, 4])), "target"),
        (dict(query=rows(5)), "5 queries and 4 keys"),
        (dict(bank=rows(3, 8)), "bank must be"),
        (dict(reduction="average"), "reduction"),
        (dict(query_ids=torch.zeros(2, dtype=torch.int64)), "query_ids must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(query=rows(3), key=rows(4, seed=1), logit_scale=10.0) | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


@pytest.mark.parametrize("n, m, k", [(40, 50, 3000), (700, 700, 0), (600, 650, 1500)])
@pytest.mark.parametrize("recompute, reduction", [(False, "mean"), (True, "mean"), (False, "none")])
def test_streaming_in_chunks_equals_cross_entropy(n, m, k, recompute, reduction):
    query, key = rows(n).requires_grad_(), rows(m, seed=1).requires_grad_()
    bank = rows(k, seed=2) if k else None
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    upstream = torch.rand(n, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7, dtype=torch.float64)
    target = torch.randperm(m, generator=torch.Generator().manual_seed(5))[:n]
    ours = contrastive_loss(query, key, scale, target=target, bank=bank, reduction=reduction, recompute=recompute)
    expected = cross_entropy(query, key, scale, target=target, bank=bank, reduction=reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    inputs = [query, key, scale]
    ours, expected = (torch.autograd.grad(loss, inputs, upstream) for loss in (ours, expected))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_recomputing_refuses_a_changed_bank():
    query, bank = rows(40).requires_grad_(), rows(3000, seed=2)
    loss = contrastive_loss(query, rows(40, seed=1), 10.0, bank=bank, recompute=True)
    bank[0] += 1
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("rows_of_bank", [10, 40000])
def test_finite_at_scale_1000(rows_of_bank):
    query, key, bank = (rows(count, 32, seed, torch.float32) for seed, count in enumerate((30, 30, rows_of_bank)))
    query.requires_grad_()
    loss = contrastive_loss(query, key, 1000.0, bank=bank)
    expected = cross_entropy(query.double(), key.double(), 1000.0, bank=bank.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


@pytest.mark.parametrize("bank_rows", [10, 3000])
def test_autocast_leaves_the_logits_in_float32(bank_rows):
    query, key, bank = (rows(count, 32, seed, torch.float32) for seed, count in enumerate((40, 40, bank_rows)))
    query.requires_grad_()
    expected = contrastive_loss(query, key, 100.0, bank=bank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(query, key, 100.0, bank=bank)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
