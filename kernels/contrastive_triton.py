"""The contrastive loss in Triton, without the N x (M + K) logits, deterministic and without host synchronisation.

Float32 logits of a chunk of rows by cuBLAS, one kernel per row that turns them into the coefficients of the gradient,
and two more products. Half-precision inputs are multiplied as they are with float32 sums. Coefficients are rounded to
the inputs' precision only after the row's own factor, tiny where the loss is tiny, is taken out, so that float16 does
not lose them.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.contrastive_cpu import empty_row_stats

NO_NEGATIVE = tl.constexpr(-1e30)
UNIT = tl.constexpr(32768.0)  # coefficients of at most 1 times this use float16's whole range
CHUNK_BYTES = 256 * 2**20  # logits and coefficients held at a time
ROW_BLOCK, ROW_WARPS = 2048, 16


@triton.jit
def _differ(ids, others):
    """Whether two ids are not the same, where -1 is nobody's."""
    return (ids != others) | (ids == -1)


@triton.jit
def _store_row(stats_out, n, lse, positive, largest, count):
    """Stores a row's loss and statistics; lse, largest, count: of its negatives. Returns sigmoid(lse - positive)."""
    loss_out, logsumexp_out, positive_out, largest_out, count_out = stats_out
    margin = lse - positive
    # softplus and sigmoid without overflow: e^-|x| is at most 1.
    small = tl.exp(-tl.abs(margin))
    log1p = tl.where(small < 1e-4, small - 0.5 * small * small, tl.log(1.0 + small))
    loss = tl.where(count > 0, tl.maximum(margin, 0.0) + log1p, 0.0 * positive)
    tl.store(loss_out + n, loss)
    tl.store(logsumexp_out + n, positive + loss)
    tl.store(positive_out + n, positive)
    tl.store(largest_out + n, tl.where(count > 0, largest, float("-inf")))
    tl.store(count_out + n, (count + 1).to(tl.int64))
    return tl.where(count > 0, tl.where(margin >= 0, 1.0, small) / (1.0 + small), 0.0 * positive)


@triton.jit(do_not_specialize=["keys"])
def finish_rows(products, inputs, weight, coefficient, row_grad_out, stats_out, keys, bank_rows, BLOCK: tl.constexpr):
    """One row of float32 products with keys and bank: loss, statistics, and the row's part in the gradient.

    That is row_grad times the coefficients: UNIT times the negatives' softmax, and -UNIT for the target.
    """
    key_products, bank_products = products
    scale, target, bank_valid, query_ids, key_ids, bank_ids = inputs
    n = tl.program_id(0).to(tl.int64)
    columns = keys + bank_rows
    key_row = key_products + n * keys
    bank_row = bank_products + n * bank_rows
    multiplier = tl.load(scale).to(tl.float32)
    own = tl.load(target + n)
    exists = (own >= 0) & (own < keys)
    positive = tl.load(key_row + tl.where(exists, own, 0)) * multiplier + tl.where(exists, 0.0, float("nan"))
    my_id = tl.zeros_like(own) - 1
    if query_ids is not None:
        my_id = tl.load(query_ids + n)
    limit = columns
    if bank_valid is not None:
        limit = tl.minimum(limit, keys + tl.load(bank_valid).to(tl.int32))
    maximum = NO_NEGATIVE
    total = 0.0
    count = 0
    for start in range(0, columns, BLOCK):
        m = start + tl.arange(0, BLOCK)
        negative = _is_negative(m, own, my_id, limit, keys, key_ids, bank_ids)
        values = tl.where(negative, _row_logits(key_row, bank_row, multiplier, m, keys, columns), NO_NEGATIVE)
        higher = tl.maximum(maximum, tl.max(values, axis=0))
        total = total * tl.exp(maximum - higher)
        total += tl.sum(tl.where(negative, tl.exp(values - higher), 0.0), axis=0)
        count += tl.sum(negative.to(tl.int32), axis=0)
        maximum = higher
    safe = tl.where(count > 0, total, 1.0)
    sigmoid = _store_row(stats_out, n, maximum + tl.log(safe), positive, maximum, count)
    if weight is not None:
        tl.store(row_grad_out + n, tl.load(weight + n) * sigmoid / UNIT)
        for start in range(0, columns, BLOCK):
            m = start + tl.arange(0, BLOCK)
            negative = _is_negative(m, own, my_id, limit, keys, key_ids, bank_ids)
            values = tl.where(negative, _row_logits(key_row, bank_row, multiplier, m, keys, columns), maximum)
            share = tl.where(negative, tl.exp(values - maximum) / safe, tl.where(m == own, -1.0, 0.0)) * UNIT
            tl.store(coefficient + n * columns + m, share.to(coefficient.dtype.element_ty), mask=m < columns)


@triton.jit
def _row_logits(key_row, bank_row, multiplier, m, keys, columns):
    """The logits of a row at the columns m of [key; bank]."""
    products = tl.load(key_row + m, mask=m < keys, other=0.0)
    products += tl.load(bank_row + (m - keys), mask=(m >= keys) & (m < columns), other=0.0)
    return products * multiplier


@triton.jit
def _is_negative(m, own, my_id, limit, keys, key_ids, bank_ids):
    """Which columns of [key; bank] are negatives of a row."""
    negative = (m < limit) & (m != own)
    if key_ids is not None:
        negative &= _differ(tl.load(key_ids + m, mask=m < keys, other=-1), my_id)
    if bank_ids is not None:
        negative &= _differ(tl.load(bank_ids + (m - keys), mask=(m >= keys) & (m < limit), other=-1), my_id)
    return negative


def _product(left, right):
    """left @ right in float32, from half-precision operands without rounding in between."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def contrast(inputs, weight=None):
    """As `contrastive_cpu.contrast`."""
    query, key, bank = inputs.query, inputs.key, inputs.bank
    sides = [query, key] if bank is None else [query, key, bank]
    dtype = functools.reduce(torch.promote_types, [side.dtype for side in sides])
    query, *sides = (side.to(dtype).contiguous() for side in sides)
    bank_rows = 0 if bank is None else len(bank)
    valid, bank_ids = (inputs.bank_valid, inputs.bank_ids) if bank_rows else (None, None)
    ids = (inputs.query_ids, inputs.key_ids, bank_ids) if inputs.query_ids is not None else (None, None, None)
    columns = len(key) + bank_rows
    stats = empty_row_stats(query, torch.float32)
    size = max(16, CHUNK_BYTES // (max(1, columns) * 6))
    coefficient = row_grad = None
    if weight is not None:
        weight = weight.float().contiguous()
        for_query = torch.empty_like(query, dtype=torch.float32)
        for_key = torch.zeros_like(sides[0], dtype=torch.float32)
        coefficient = query.new_empty(min(size, len(query)), columns)
        row_grad = query.new_empty(len(query), dtype=torch.float32)
    for start in range(0, len(query), size):
        part = slice(start, min(start + size, len(query)))
        products = [_product(query[part], side.T) for side in sides]
        of_rows = (inputs.target, ids[0], weight, row_grad)
        target, row_ids, row_weight, factor = (None if rows is None else rows[part] for rows in of_rows)
        finish_rows[(len(target),)](
            (products[0], products[-1]), (inputs.logit_scale, target, valid, row_ids, *ids[1:]), row_weight,
            coefficient, factor, tuple(stat[part] for stat in stats), len(key), bank_rows,
            BLOCK=min(ROW_BLOCK, triton.next_power_of_2(columns)), num_warps=ROW_WARPS,
        )  # fmt: skip
        if weight is not None:
            used, factor = coefficient[: len(target)].split([len(key), bank_rows], dim=1), factor[:, None]
            total = _product(used[0], sides[0])
            for share, side in zip(used[1:], sides[1:], strict=False):  # the bank, where there is one
                total.add_(_product(share, side))
            torch.mul(total, factor, out=for_query[part])
            largest = factor.abs().amax().clamp(min=1e-30)  # relative to it, float16 coefficients do not underflow
            relative = (query[part] * (factor / largest)).to(dtype)
            for_key.addcmul_(_product(used[0].T, relative), largest)
    if weight is None:
        return stats, None
    for_scale = (for_query * query).sum()
    return stats, (for_query.mul_(inputs.logit_scale), for_key.mul_(inputs.logit_scale), for_scale)
