"""contrastive_loss against the plain twin and against F.cross_entropy of the whole matrix of logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import MemoryBank, contrastive_loss, reference, sigmoid, sigmoid_loss


def rows(count, dim=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def problem(n, m, k=0, dim=16, dtype=torch.float64, ids=False, **more):
    """The arguments of a loss whose query, key and scale take gradients."""
    generator = torch.Generator().manual_seed(5)
    arguments = dict(query=rows(n, dim, 0, dtype).requires_grad_(), key=rows(m, dim, 1, dtype).requires_grad_())
    arguments |= dict(logit_scale=torch.tensor(14.3, dtype=dtype, requires_grad=True))
    arguments |= dict(target=torch.randperm(m, generator=generator)[:n], bank=rows(k, dim, 2, dtype) if k else None)
    if ids:
        sides = dict(query_ids=n, key_ids=m) | (dict(bank_ids=k) if k else {})
        arguments |= {name: torch.randint(-1, 4, (count,), generator=generator) for name, count in sides.items()}
    return arguments | more


def with_gradients(loss, arguments, upstream=None):
    return loss, *torch.autograd.grad(loss, [arguments[name] for name in ("query", "key", "logit_scale")], upstream)


@pytest.mark.parametrize("n, m, k", [(1, 1, 0), (1, 1, 5), (7, 7, 0), (5, 9, 33), (40, 50, 3000), (600, 650, 1500)])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("reduction, recompute", [("mean", False), ("mean", True), ("sum", False), ("none", False)])
def test_loss_statistics_and_gradients_equal_the_twin(n, m, k, ids, reduction, recompute):
    arguments = problem(n, m, k, ids=ids, reduction=reduction, with_stats=True)
    ours, stats = contrastive_loss(**arguments, recompute=recompute)
    expected, right_stats = reference.contrastive_loss(**arguments)
    upstream = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, expected = (with_gradients(loss, arguments, upstream) for loss in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tuple(stats), right_stats, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [contrastive_loss, reference.contrastive_loss])
@pytest.mark.parametrize("valid", [None, 0, 3, torch.tensor(0), torch.tensor(3)])
def test_the_loss_is_cross_entropy_over_keys_and_the_valid_rows_of_the_bank(loss, valid):
    arguments = problem(5, 9, 33, bank_valid=valid)
    used = arguments["bank"] if valid is None else arguments["bank"][: int(valid)]
    logits = arguments["logit_scale"] * arguments["query"] @ torch.cat([arguments["key"], used]).T
    expected = with_gradients(F.cross_entropy(logits, arguments["target"]), arguments)
    torch.testing.assert_close(with_gradients(loss(**arguments), arguments), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", [contrastive_loss, reference.contrastive_loss])
def test_equal_ids_are_left_out_but_never_the_target_and_never_minus_one(loss):
    query, key, bank = rows(3), rows(4, seed=1), rows(5, seed=2)
    ids = dict(query_ids=torch.tensor([7, -1, 8]), key_ids=torch.tensor([7, -1, 7, -1]))
    ids |= dict(bank_ids=torch.tensor([8, 7, -1, -1, 8]))
    ours, stats = loss(query, key, 10.0, bank=bank, reduction="none", with_stats=True, **ids)
    masked = torch.zeros(3, 9, dtype=torch.bool)
    masked[0, [2, 5]] = masked[2, [4, 8]] = True
    logits = (10 * query @ torch.cat([key, bank]).T).masked_fill(masked, -float("inf"))
    torch.testing.assert_close(ours, F.cross_entropy(logits, torch.arange(3), reduction="none"))
    assert stats[3].tolist() == (~masked).sum(1).tolist()
    torch.testing.assert_close(stats[0], logits.logsumexp(1))


def test_the_bank_gets_no_gradient():
    assert not contrastive_loss(rows(3), rows(3, seed=1), 10.0, bank=rows(5, seed=2).requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("keys", [0, 3])
def test_no_query_at_all(dtype, reduction, keys):
    query, key = torch.zeros(0, 8, dtype=dtype, requires_grad=True), torch.randn(keys, 8, dtype=dtype)
    loss, stats = contrastive_loss(query, key, torch.tensor(10.0), reduction=reduction, with_stats=True)
    assert loss.sum() == 0 and stats.candidates.shape == (0,)
    loss.sum().backward()
    assert query.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries, bank_rows", [(8, 50), (40, 3000)])
def test_gradients_are_as_exact_as_eager(dtype, queries, bank_rows):
    arguments = problem(queries, queries, bank_rows, dim=32, dtype=dtype, logit_scale=torch.tensor(100.0))
    query, key, bank, target = (arguments[name] for name in ("query", "key", "bank", "target"))
    doubles = [part.detach().double().requires_grad_() for part in (query, key)]

    def naive(query, key, bank):
        return F.cross_entropy(100 * query @ torch.cat([key, bank]).T, target)

    ours = torch.autograd.grad(contrastive_loss(**arguments), [query, key])
    eager = torch.autograd.grad(naive(query, key, bank), [query, key])
    right = torch.autograd.grad(naive(*doubles, bank.double()), doubles)
    for mine, theirs, true in zip(ours, eager, right, strict=True):
        assert (mine.double() - true).norm() <= (theirs.double() - true).norm() + 1e-5 * true.norm()


def test_the_gradient_of_a_tiny_loss_is_exact():
    """Queries that hold their key so closely that the loss is near 1e-9 at scale 100."""
    key, bank = rows(8, 64, seed=1), rows(200, 64, seed=2)
    query = F.normalize(0.5 * key + 0.5 * rows(8, 64, seed=3), dim=1)
    gradients = {}
    for dtype in (torch.float32, torch.float64):  # of the same numbers
        inputs = [part.float().to(dtype).requires_grad_() for part in (query, key)]
        scale = torch.tensor(100.0, dtype=dtype, requires_grad=True)
        loss = contrastive_loss(*inputs, scale, bank=bank.float().to(dtype))
        gradients[dtype] = torch.autograd.grad(loss, [*inputs, scale])
    assert 1e-12 < loss < 1e-7
    for a, b in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("bank_rows", [10, 40000])
def test_finite_at_scale_1000(bank_rows):
    arguments = problem(30, 30, bank_rows, dim=32, dtype=torch.float32, logit_scale=torch.tensor(1000.0))
    loss, expected = contrastive_loss(**arguments), reference.contrastive_loss(**arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, arguments["query"])[0].isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bank_rows", [0, 3000])
def test_autocast_changes_no_bit(half, bank_rows):
    arguments = problem(40, 40, bank_rows, dim=32, dtype=torch.float32)
    alone = with_gradients(contrastive_loss(**arguments), arguments)
    with torch.autocast("cpu", dtype=half):
        loss = contrastive_loss(**arguments)
    assert loss.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(alone, with_gradients(loss, arguments), strict=True))


def test_the_bank_may_change_before_the_backward_but_not_where_that_recomputes():
    bank = MemoryBank(8, 16)
    bank.enqueue(rows(8, seed=2))
    arguments = problem(3, 3, dtype=torch.float32, bank=bank.buffer, bank_valid=bank.valid)
    expected = with_gradients(reference.contrastive_loss(**arguments | dict(bank=bank.buffer.clone())), arguments)
    loss, again = contrastive_loss(**arguments), contrastive_loss(**arguments, recompute=True)
    bank.enqueue(rows(5, seed=9))
    torch.testing.assert_close(with_gradients(loss, arguments), expected)
    with pytest.raises(RuntimeError, match="inplace"):
        again.backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.tensor([0, 1, 4])), "target"),
        (dict(target=torch.zeros(3)), "target must be .*int64"),
        (dict(query=rows(5)), "5 queries and 4 keys"),
        (dict(bank=rows(3, 8)), "bank must be"),
        (dict(key=torch.ones(4, 16, dtype=torch.int64)), "floating point"),
        (dict(bank=rows(3), bank_valid=-1), "bank_valid"),
        (dict(reduction="average"), "reduction"),
        (dict(query_ids=torch.zeros(2, dtype=torch.int64)), "query_ids must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(query=rows(3), key=rows(4, seed=1), logit_scale=10.0) | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


@pytest.mark.parametrize("n, m, k", [(0, 3, 0), (1, 1, 0), (1, 1, 5), (5, 9, 33), (600, 650, 1500)])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("reduction, valid", [("mean", None), ("sum", 3), ("sum", torch.tensor(0))])
def test_the_sigmoid_loss_equals_its_twin_and_the_formula(n, m, k, ids, reduction, valid, monkeypatch):
    """Over several blocks of rows, with gradients of query, key, scale and bias."""
    monkeypatch.setitem(sigmoid.CHUNK, "cpu", 40 * 1500)
    arguments = problem(n, m, k, ids=ids, reduction=reduction, bank_valid=valid if k else None)
    arguments["logit_bias"] = torch.tensor(-3.7, dtype=torch.float64, requires_grad=True)
    ours, expected = sigmoid_loss(**arguments), reference.sigmoid_loss(**arguments)
    inputs = [arguments[name] for name in ("query", "key", "logit_scale", "logit_bias")]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    found, right = (torch.autograd.grad(3 * loss, inputs) for loss in (ours, expected))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    if not ids and not k:
        signs = torch.full((n, m), -1.0, dtype=torch.float64).scatter(1, arguments["target"][:, None], 1)
        logits = arguments["logit_scale"] * arguments["query"] @ arguments["key"].T + arguments["logit_bias"]
        loss = -F.logsigmoid(signs * logits).sum()
        torch.testing.assert_close(ours, loss if reduction == "sum" else loss / max(n, 1), rtol=1e-10, atol=1e-12)


def test_the_sigmoid_loss_never_holds_all_logits(monkeypatch):
    """No tensor of its forward and backward is larger than a block of 16 rows; autocast changes nothing."""
    monkeypatch.setitem(sigmoid.CHUNK, "cpu", 16 * 500)
    arguments = problem(200, 500, dtype=torch.float32, reduction="sum")
    arguments["logit_bias"] = torch.tensor(-1.0)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Sizes():
        loss = sigmoid_loss(**arguments)
        loss.backward()
    assert max(sizes) == 16 * 500
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sigmoid_loss(**arguments), loss, rtol=0, atol=0)
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        sigmoid_loss(**arguments | dict(reduction="none"))
