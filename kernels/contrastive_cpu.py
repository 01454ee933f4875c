"""The contrastive loss in plain PyTorch, without the N x (M + K) logits.

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

from kernels.reference import NO_NEGATIVE, logit_dtype, same_id

CHUNK = 2**21  # logits held at a time
LN_2 = math.log(2)


class LossInputs(NamedTuple):
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


def empty_row_stats(query, dtype):
    """Loss and the four statistics, (N,) each, unfilled. Five tensors: outputs of an operator may not alias."""
    numbers = [query.new_empty(query.shape[0], dtype=dtype) for _ in range(4)]
    return *numbers, query.new_empty(query.shape[0], dtype=torch.int64)


def contrast(inputs, weight=None):
    """The row statistics, and the gradients of query, key and logit_scale, or None without weight.

    weight: (N,), the rows' factors in the sum of losses that is differentiated. Gradients: float32 or float64.
    """
    dtype = logit_dtype(inputs.query, inputs.key)
    query, key, scale = inputs.query.to(dtype), inputs.key.to(dtype), inputs.logit_scale.to(dtype)
    result = empty_row_stats(query, dtype)
    for_query, for_key = torch.empty_like(query), torch.zeros_like(key)
    size = max(16, min(512, CHUNK // max(1, len(key))))
    for start in range(0, len(query), size):
        rows = slice(start, start + size)
        ids = None if inputs.query_ids is None else inputs.query_ids[rows]
        scaled, target = query[rows] * (scale / LN_2), inputs.target[rows]
        bank, mean = accumulate_bank(scaled, ids, inputs, with_mean=weight is not None)
        stats, margin, share, bank_share = finish_rows(scaled, key, target, ids, inputs.key_ids, *bank)
        for whole, part in zip(result, stats, strict=True):
            whole[rows] = part
        if weight is not None:
            row_grad = (weight[rows].to(dtype) * torch.sigmoid(margin))[:, None]
            coefficient = share.mul_(row_grad).scatter_(1, target[:, None], -row_grad)  # (n, M)
            for_query[rows] = torch.addmm(mean * (bank_share[:, None] * row_grad), coefficient, key)
            for_key.addmm_(coefficient.T, query[rows])
    if weight is None:
        return result, None
    for_scale = (query * for_query).sum()
    return result, (for_query.mul_(scale), for_key.mul_(scale), for_scale)


def accumulate_bank(scaled, ids, inputs, with_mean):
    """The softmax of a chunk of queries over the bank: ((maximum, total, count), (n,) each, mean (n, D)).

    scaled: the queries times the scale in units of log(2). total: of the exponentials. mean: of the bank's rows, not
    yet divided by the total.
    """
    rows, dim = scaled.shape
    maximum, total = scaled.new_full((rows,), NO_NEGATIVE), scaled.new_zeros(rows)
    mean, count = scaled.new_zeros(rows, dim), scaled.new_zeros(rows, dtype=torch.int64)
    used = 0 if inputs.bank is None else len(inputs.bank)
    if used and inputs.bank_valid is not None:
        used = int(inputs.bank_valid)
    width = max(512, min(2048, CHUNK // 8 // rows))  # at most a megabyte: several passes go over it
    for start in range(0, used, width):
        columns = slice(start, min(start + width, used))
        block = inputs.bank[columns].to(scaled.dtype)
        logits = scaled @ block.T
        count += _mask(logits, ids, None if inputs.bank_ids is None else inputs.bank_ids[columns])
        higher = torch.maximum(maximum, logits.amax(1))
        shrink = torch.exp2(maximum - higher)
        logits.sub_(higher[:, None]).exp2_()
        total.mul_(shrink).add_(logits.sum(1))
        if with_mean:
            mean.mul_(shrink[:, None]).addmm_(logits, block)
        maximum = higher
    return (maximum, total, count), mean


def finish_rows(scaled, key, target, ids, key_ids, bank_maximum, bank_total, bank_count):
    """The statistics of a chunk's rows from the in-batch keys and the bank's softmax, and the parts of the gradients:

    margin (n,): logsumexp of the negatives - positive.
    share (n, M): softmax of the negatives among the keys, 0 at the target.
    bank_share (n,): the factor that makes the bank's mean its part in that softmax.
    """
    logits = scaled @ key.T  # (n, M)
    column = target[:, None]
    positive = logits.gather(1, column).squeeze(1)
    count = bank_count + _mask(logits, ids, key_ids)
    count += logits.gather(1, column).squeeze(1) == NO_NEGATIVE  # the target is a candidate whatever its id
    logits.scatter_(1, column, NO_NEGATIVE)
    maximum = torch.maximum(logits.amax(1), bank_maximum)
    shrink = torch.exp2(bank_maximum - maximum)
    logits.sub_(maximum[:, None]).exp2_()
    total = logits.sum(1) + bank_total * shrink
    lse = maximum + total.log2()
    margin, lse, positive = (part * LN_2 for part in (lse - positive, lse, positive))
    largest = torch.where(maximum <= NO_NEGATIVE / 2, -torch.inf, maximum * LN_2)
    loss = F.softplus(margin, threshold=50)
    stats = loss, torch.logaddexp(lse, positive), positive, largest, count
    return stats, margin, logits.div_(total[:, None]), shrink / total


def _mask(logits, row_ids, column_ids):
    """Set the logits of columns with the row's id to NO_NEGATIVE; returns how many columns stay, (n,) or an int."""
    if row_ids is None or column_ids is None:
        return logits.shape[1]
    same = same_id(row_ids, column_ids)
    logits.masked_fill_(same, NO_NEGATIVE)
    return logits.shape[1] - same.sum(1)
