"""The contrastive loss in plain PyTorch, fast on the CPU, without the N x (M + K) logits.

Rows go in chunks. A chunk streams over the bank in blocks of columns with the running maximum, sum and weighted mean of
an online softmax (Milakov and Gimelshein, 2018), so that one pass gives both the loss and the query's gradient; then it
sees all in-batch keys at once, which settles its normaliser and gives the keys' gradient.

Exponentials are powers of two, of logits times log2(e): `exp2` took a third of the time of `exp`, and a fortieth where
results underflow, as most do for a trained model (an AMD processor, where `exp` is MKL's).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.implementation import uncast
from kernels.products import linear
from kernels.reference import NO_NEGATIVE

COARSE = 0.01  # mean loss above which the rounding of softmax - 1 is far below the gradient
SMALL = 2**27  # multiplications up to which logits are left to autograd, where that is exact,
SMALL_COLUMNS = 2**21  # and numbers in keys and bank, which autograd copies
CHUNK = 2**21  # logits held at a time
LN_2 = math.log(2)


class Problem(NamedTuple):
    """The arguments of the loss; None where there is no bank, no valid count, no id."""

    query: torch.Tensor  # (N, D)
    key: torch.Tensor  # (M, D)
    logit_scale: torch.Tensor  # ()
    target: torch.Tensor  # (N,)
    bank: torch.Tensor | None  # (K, D)
    bank_valid: torch.Tensor | None  # ()
    query_ids: torch.Tensor | None  # (N,)
    key_ids: torch.Tensor | None  # (M,)
    bank_ids: torch.Tensor | None  # (K,)

    @property
    def dtype(self):
        """Of logits and sums."""
        return torch.float64 if torch.float64 in (self.query.dtype, self.key.dtype) else torch.float32


class Running(NamedTuple):
    """An online softmax over the negatives so far: maximum, sum of exponentials, weighted sum of columns or None."""

    maximum: torch.Tensor  # (n,), in units of log(2)
    total: torch.Tensor  # (n,)
    mean: torch.Tensor | None  # (n, D), not yet divided by the total
    count: torch.Tensor  # (n,)


class Rows(NamedTuple):
    """What the loss says of each row, (N,) each."""

    loss: torch.Tensor
    logsumexp: torch.Tensor
    positive: torch.Tensor
    largest_negative: torch.Tensor
    candidates: torch.Tensor


class Gradients(NamedTuple):
    """Of the weighted sum of the rows' losses, in float32 or float64."""

    query: torch.Tensor  # (N, D)
    key: torch.Tensor  # (M, D)
    logit_scale: torch.Tensor  # ()


def contrast(problem, weight=None):
    """Rows, and with weight, a (N,) tensor of row weights, the Gradients of their weighted sum (None without)."""
    dtype, count = problem.dtype, len(problem.query)
    problem = _in_use(problem)
    query, key, scale = problem.query.to(dtype), problem.key.to(dtype), problem.logit_scale.to(dtype)
    for_query = for_key = None
    if weight is not None:
        weight, for_query = weight.to(dtype), torch.empty_like(query)
        for_key = torch.zeros_like(key)
    size = max(16, min(512, CHUNK // max(1, len(key))))
    chunks = []
    for start in range(0, count, size):
        rows = slice(start, start + size)
        ids = None if problem.query_ids is None else problem.query_ids[rows]
        scaled = query[rows] * (scale / LN_2)
        running = None if problem.bank is None else _stream(scaled, ids, problem, weight is not None)
        part, coefficient = _settle(scaled, key, problem.target[rows], ids, problem.key_ids, running, weight, rows)
        chunks.append(part)
        if weight is not None:
            coefficient, rest = coefficient
            for_query[rows] = linear(coefficient, key.T) if running is None else rest.add_(linear(coefficient, key.T))
            for_key += linear(coefficient.T, query[rows].T)
    if chunks:
        result = Rows(*map(torch.cat, zip(*chunks, strict=True)))
    else:  # five tensors: outputs of an operator may not alias
        result = Rows(*(query.new_zeros(0) for _ in range(4)), query.new_zeros(0, dtype=torch.int64))
    if weight is None:
        return result, None
    for_scale = torch.dot(query.reshape(-1), for_query.view(-1))
    return result, Gradients(for_query.mul_(scale), for_key.mul_(scale), for_scale)


def small_loss(problem, reduction):
    """The loss by autograd from all logits at once, where that costs less than an operator that never holds them.

    None elsewhere, and where softmax - 1 would round the gradient away.
    """
    if not problem.query.is_cpu or torch.compiler.is_compiling():
        return None
    if problem.bank_valid is not None:
        problem = _in_use(problem)
    query, key, logit_scale, target, bank, _, query_ids, *_ = problem
    columns = key.numel() if bank is None else key.numel() + bank.numel()
    if not 0 < query.shape[0] * columns <= SMALL or (columns > SMALL_COLUMNS and torch.is_grad_enabled()):
        return None
    if not (query.dtype is key.dtype is torch.float32 and (bank is None or bank.dtype is torch.float32)):
        return None
    scaled = logit_scale * query
    logits = torch.mm(scaled, key.t())
    if logits.dtype is not torch.float32:  # seen here, autocast costs nothing where it is off
        with uncast(query):
            return small_loss(problem, reduction)
    if bank is not None:
        kept = bank.clone() if torch.is_grad_enabled() else bank  # autograd keeps it; it may change before the backward
        logits = torch.cat([logits, torch.mm(scaled, kept.t())], 1)  # (N, M + K)
    same = None if query_ids is None else _same_ids(problem)
    if same is not None:
        logits = logits.masked_fill(same.scatter_(1, target[:, None], False), -torch.inf)
    loss = F.cross_entropy(logits, target, reduction=reduction)
    return loss if loss.item() > COARSE * (1 if reduction == "mean" else query.shape[0]) else None


def _same_ids(problem):
    """Which columns carry the row's id, (N, M + K) bool, or None where no ids are given."""
    ids, rows = _joined_ids(problem), problem.query_ids
    return None if ids is None else (rows[:, None] == ids) & (rows[:, None] != -1)


def _in_use(problem):
    """The problem with the rows of the bank that are in use; no bank where that is none."""
    if problem.bank is None or (problem.bank_valid is None and problem.bank.shape[0]):
        return problem
    used = 0 if problem.bank_valid is None else int(problem.bank_valid)
    if used <= 0 or problem.bank.shape[0] == 0:
        return problem._replace(bank=None, bank_ids=None)
    ids = None if problem.bank_ids is None else problem.bank_ids[:used]
    return problem._replace(bank=problem.bank[:used], bank_ids=ids)


def _joined_ids(problem):
    """One list of ids for keys and bank, -1 where a side has none."""
    if problem.query_ids is None or (problem.key_ids is None and problem.bank_ids is None):
        return None
    sides = [(problem.key_ids, problem.key), (problem.bank_ids, problem.bank)]
    return torch.cat(
        [
            rows.new_full((len(rows),), -1, dtype=torch.int64) if ids is None else ids
            for ids, rows in sides
            if rows is not None
        ]
    )


def _mask(logits, row_ids, column_ids):
    """Drop the columns that carry the row's id, in place; returns how many columns stay, (n,)."""
    left = torch.full((len(logits),), logits.shape[1], device=logits.device)
    if row_ids is None or column_ids is None:
        return left
    same = (row_ids[:, None] == column_ids) & (row_ids[:, None] != -1)
    logits.masked_fill_(same, NO_NEGATIVE)
    return left - same.sum(1)


def _stream(scaled, ids, problem, with_mean):
    """One pass of a chunk of queries, already multiplied by the scale in units of log(2), over the bank."""
    rows, dim = scaled.shape
    maximum, total = scaled.new_full((rows,), NO_NEGATIVE), scaled.new_zeros(rows)
    mean, count = (
        (scaled.new_zeros(rows, dim) if with_mean else None),
        torch.zeros(rows, dtype=torch.int64, device=scaled.device),
    )
    width = max(512, min(2048, CHUNK // 8 // rows))  # at most a megabyte: several passes go over it
    for start in range(0, len(problem.bank), width):
        block = problem.bank[start : start + width].to(scaled.dtype)
        logits = linear(scaled, block)
        block_ids = None if problem.bank_ids is None else problem.bank_ids[start : start + width]
        count += _mask(logits, ids, block_ids)
        higher = torch.maximum(maximum, logits.amax(1))
        shrink = torch.exp2(maximum - higher)
        logits.sub_(higher[:, None]).exp2_()
        total.mul_(shrink).add_(logits.sum(1))
        if with_mean:
            mean.mul_(shrink[:, None]).add_(linear(logits, block.T))
        maximum = higher
    return Running(maximum, total, mean, count)


def _settle(scaled, key, target, ids, key_ids, running, weight, rows):
    """The rows' results from the in-batch keys and what the bank gave, and their coefficients.

    The coefficients are those of the keys in the gradient, (n, columns), and the bank's share of it, (n, D) or None.
    """
    logits = linear(scaled, key)  # (n, columns)
    column = target[:, None]
    positive = logits.gather(1, column).squeeze(1)
    count = _mask(logits, ids, key_ids)
    masked_target = logits.gather(1, column).squeeze(1) == NO_NEGATIVE
    count = count + masked_target  # the target is a candidate whatever its id
    logits.scatter_(1, column, NO_NEGATIVE)
    maximum = logits.amax(1)
    if running is not None:
        maximum, count = torch.maximum(maximum, running.maximum), count + running.count
    logits.sub_(maximum[:, None]).exp2_()
    total, shrink = logits.sum(1), None
    if running is not None:
        shrink = torch.exp2(running.maximum - maximum)
        total = total + running.total * shrink
    lse = maximum + total.log2()
    margin, lse, positive = (part * LN_2 for part in (lse - positive, lse, positive))
    largest = torch.where(maximum <= NO_NEGATIVE / 2, -torch.inf, maximum * LN_2)
    result = Rows(F.softplus(margin, threshold=50), torch.logaddexp(lse, positive), positive, largest, count)
    if weight is None:
        return result, None
    pull = weight[rows] * torch.sigmoid(margin)  # what the negatives push together, and the positive pulls
    logits.mul_((pull / total)[:, None]).scatter_(1, column, -pull[:, None])
    rest = None if running is None else running.mean.mul_((pull * shrink / total)[:, None])
    return result, (logits, rest)
