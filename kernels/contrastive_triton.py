"""The contrastive loss in Triton, without the N x (M + K) logits, deterministic and without host synchronisation.

Two engines. "stream" is for few queries in half precision, where reading the bank once is the cost: a program keeps a
block of queries and passes over one share of the columns with an online softmax whose weighted mean of columns is the
query's gradient; a second kernel combines the shares in a fixed order, a third gives the in-batch keys their gradient.
"chunked" is for many queries, where the products are the cost, and for float32: float32 logits of a chunk of rows by
cuBLAS, one kernel per row that turns them into the coefficients of the gradient, and two more products.

Half-precision inputs are multiplied as they are with float32 sums. Coefficients of the gradient are rounded to the
inputs' precision only after the row's own factor, tiny where the loss is tiny, is taken out, so that float16 does not
lose them. `inputs` of a kernel is the LossInputs as a tuple.
"""

import torch
import triton
import triton.language as tl

from kernels.contrastive_cpu import empty_row_stats
from kernels.gpu import PRODUCTS, Launch, launch_for

NO_NEGATIVE = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
UNIT = tl.constexpr(32768.0)  # coefficients of at most 1 times this use float16's whole range
CHUNK_BYTES = 256 * 2**20  # logits and coefficients held at a time by the chunked engine

# Expected, not measured: what compiles without spills (tests/kernels/test_ahead_of_time.py), by the padded width of a
# row. Wider rows go to the chunked engine.
STREAM = {
    "default": {
        64: Launch(rows=64, columns=32, warps=8, stages=2),
        128: Launch(rows=64, columns=32, warps=8, stages=2),
        256: Launch(rows=32, columns=32, warps=8, stages=2),
        512: Launch(rows=32, columns=32, warps=8, stages=2),
    },
    "gfx942": dict.fromkeys((64, 128, 256, 512), Launch(rows=32, columns=32, warps=4, stages=1)),
}
STREAM["sm_90"] = STREAM["default"] | {256: Launch(rows=64, columns=32, warps=8, stages=2)}
STREAM["sm_100"] = STREAM["sm_90"] | {128: Launch(rows=64, columns=64, warps=8, stages=2)}
STREAM_ROWS = 128  # queries up to which reading the bank, not multiplying, is expected to be the cost
SPLITS = 128  # shares of the columns, about one a multiprocessor
ROW_BLOCK, ROW_WARPS = 2048, 16


@triton.jit
def _load_rows(rows, index, limit, dim, BLOCK_D: tl.constexpr):
    """A block of (BLOCK, BLOCK_D) rows, zero outside [0, limit) x [0, dim)."""
    d = tl.arange(0, BLOCK_D)
    mask = (index < limit)[:, None] & (d < dim)[None, :]
    return tl.load(rows + index.to(tl.int64)[:, None] * dim + d[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(query, block, scale, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """scale * query @ block.T in float32, times log2(e)."""
    if UPCAST:
        product = tl.dot(query.to(tl.float32), tl.trans(block.to(tl.float32)), input_precision="ieee")
    else:
        product = tl.dot(query, tl.trans(block), input_precision=PRECISION)
    return product * (scale * LOG2_E)


@triton.jit
def _differ(ids, others):
    """Whether two ids are not the same, where -1 is nobody's."""
    return (ids != others) | (ids == -1)


@triton.jit(do_not_specialize=["rows", "keys", "key_splits", "blocks_per_split"])
def stream(
    inputs,
    partial_out,
    rows,
    keys,
    bank_rows,
    dim,
    key_splits,
    blocks_per_split,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries over one share of the keys (the first key_splits shares) or of the bank."""
    query, key, scale, target, bank, bank_valid, query_ids, key_ids, bank_ids = inputs
    maximum_out, total_out, count_out, mean_out = partial_out
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    multiplier = tl.load(scale).to(tl.float32)
    block = _load_rows(query, n, rows, dim, BLOCK_D)
    own = tl.load(target + n, mask=n < rows, other=-1)
    my_id = tl.zeros_like(own) - 1
    if query_ids is not None:
        my_id = tl.load(query_ids + n, mask=n < rows, other=-1)
    in_bank = split >= key_splits
    used = bank_rows
    if bank_valid is not None:
        used = tl.minimum(bank_rows, tl.load(bank_valid).to(tl.int32))
    first = tl.where(in_bank, split - key_splits, split) * blocks_per_split * BLOCK_M
    last = tl.minimum(first + blocks_per_split * BLOCK_M, tl.where(in_bank, used, keys))
    columns = tl.where(in_bank, bank, key)
    maximum = tl.full((BLOCK_N,), NO_NEGATIVE, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    count = tl.zeros((BLOCK_N,), dtype=tl.int32)
    mean = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        part = _load_rows(columns, m, last, dim, BLOCK_D)
        logits = _logits(block, part, multiplier, UPCAST, PRECISION)
        place = m + tl.where(in_bank, keys, 0)  # column of [key; bank]
        negative = (m < last)[None, :] & (place[None, :] != own[:, None])
        if key_ids is not None:
            ids = tl.load(key_ids + m, mask=m < tl.where(in_bank, 0, last), other=-1)
            negative &= _differ(ids[None, :], my_id[:, None])
        if bank_ids is not None:
            ids = tl.load(bank_ids + m, mask=m < tl.where(in_bank, last, 0), other=-1)
            negative &= _differ(ids[None, :], my_id[:, None])
        logits = tl.where(negative, logits, NO_NEGATIVE)
        higher = tl.maximum(maximum, tl.max(logits, axis=1))
        shrink = tl.exp2(maximum - higher)
        weight = tl.where(negative, tl.exp2(logits - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        count += tl.sum(negative.to(tl.int32), axis=1)
        if mean_out is not None:
            mean *= shrink[:, None]
            if UPCAST:
                mean = tl.dot(weight, part.to(tl.float32), mean, input_precision="ieee")
            else:
                mean = tl.dot((weight * UNIT).to(part.dtype), part, mean, input_precision=PRECISION)
        maximum = higher
    out = split.to(tl.int64) * rows + n
    tl.store(maximum_out + out, maximum, mask=n < rows)
    tl.store(total_out + out, total, mask=n < rows)
    tl.store(count_out + out, count, mask=n < rows)
    if mean_out is not None:
        d = tl.arange(0, BLOCK_D)
        mask = (n < rows)[:, None] & (d < dim)[None, :]
        mean = mean if UPCAST else mean / UNIT
        tl.store(mean_out + out[:, None] * dim + d[None, :], mean, mask=mask)


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


@triton.jit(do_not_specialize=["rows", "keys", "splits"])
def combine(inputs, weight, partial, stats_out, gradients_out, rows, keys, dim, splits, BLOCK_D: tl.constexpr):
    """One row: the shares of its negatives become loss, statistics and the query's gradient, in the order of shares."""
    query, key, scale, target, _, _, _, _, _ = inputs
    maximum_in, total_in, count_in, mean_in = partial
    query_grad, scale_grad, lse_out, row_grad_out = gradients_out
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    multiplier = tl.load(scale).to(tl.float32)
    own = tl.load(target + n)
    exists = (own >= 0) & (own < keys)
    mine = tl.load(query + n * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    wanted = tl.load(key + tl.where(exists, own, 0) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    positive = tl.sum(mine * wanted, axis=0) * multiplier + tl.where(exists, 0.0, float("nan"))
    maximum = tl.load(maximum_in + n)
    for split in range(1, splits):
        maximum = tl.maximum(maximum, tl.load(maximum_in + split * rows + n))
    total = 0.0
    count = 0
    mean = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for split in range(0, splits):
        shrink = tl.exp2(tl.load(maximum_in + split * rows + n) - maximum)
        total += tl.load(total_in + split * rows + n) * shrink
        count += tl.load(count_in + split * rows + n)
        if weight is not None:
            mean += tl.load(mean_in + (split * rows + n) * dim + d, mask=d < dim, other=0.0) * shrink
    safe = tl.where(count > 0, total, 1.0)
    lse = maximum * LN_2 + tl.log(safe)
    sigmoid = _store_row(stats_out, n, lse, positive, maximum * LN_2, count)
    if weight is not None:
        row_grad = tl.load(weight + n) * sigmoid
        tl.store(row_grad_out + n, row_grad)
        tl.store(lse_out + n, lse * LOG2_E)
        direction = (mean / safe - wanted) * row_grad
        tl.store(scale_grad + n, tl.sum(direction * mine, axis=0))
        tl.store(query_grad + n * dim + d, direction * multiplier, mask=d < dim)


@triton.jit(do_not_specialize=["rows", "keys"])
def key_gradient(
    inputs,
    lse,
    row_grad,
    key_grad,
    rows,
    keys,
    dim,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of in-batch keys over all queries."""
    query, key, scale, target, _, _, query_ids, key_ids, _ = inputs
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    multiplier = tl.load(scale).to(tl.float32)
    mine = _load_rows(key, m, keys, dim, BLOCK_D)
    if key_ids is not None:
        my_id = tl.load(key_ids + m, mask=m < keys, other=-1)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        part = _load_rows(query, n, rows, dim, BLOCK_D)
        logits = _logits(mine, part, multiplier, UPCAST, PRECISION)  # (BLOCK_M, BLOCK_N)
        own = tl.load(target + n, mask=n < rows, other=-1)
        lse_of_row = tl.load(lse + n, mask=n < rows, other=0.0)
        grad_of_row = tl.load(row_grad + n, mask=n < rows, other=0.0)
        live = (n < rows)[None, :] & (m < keys)[:, None]
        positive = live & (own[None, :] == m[:, None])
        negative = live & (own[None, :] != m[:, None])
        if key_ids is not None:
            ids = tl.load(query_ids + n, mask=n < rows, other=-1)
            negative &= _differ(ids[None, :], my_id[:, None])
        share = tl.where(negative, tl.exp2(tl.where(negative, logits - lse_of_row[None, :], 0.0)), 0.0)
        share = tl.where(positive, -1.0, share) * grad_of_row[None, :]
        if UPCAST:
            total = tl.dot(share, part.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot((share * UNIT).to(part.dtype), part, total, input_precision=PRECISION)
    total = total if UPCAST else total / UNIT
    d = tl.arange(0, BLOCK_D)
    mask = (m < keys)[:, None] & (d < dim)[None, :]
    tl.store(key_grad + m.to(tl.int64)[:, None] * dim + d[None, :], total * multiplier, mask=mask)


@triton.jit(do_not_specialize=["keys"])
def finish_rows(products, inputs, weight, coefficient, row_grad_out, stats_out, keys, bank_rows, BLOCK: tl.constexpr):
    """One row of float32 products with keys and bank: loss, statistics, and the row's part in the gradient.

    That is row_grad times the coefficients / UNIT: the negatives' softmax, and -1 for the target.
    """
    key_products, bank_products = products
    _, _, scale, target, _, bank_valid, query_ids, key_ids, bank_ids = inputs
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
        tl.store(row_grad_out + n, tl.load(weight + n) * sigmoid)
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


def engine(rows, dim, dtype):
    """Which engine serves a shape; a guess until it is measured (see STREAM)."""
    small = rows <= STREAM_ROWS and dim <= max(STREAM["default"])
    return "stream" if small and dtype != torch.float32 else "chunked"


def contrast(inputs, weight=None, engine_name=None):
    """As `contrastive_cpu.contrast`."""
    query, key, bank = inputs.query, inputs.key, inputs.bank
    dtype = torch.promote_types(query.dtype, key.dtype)
    dtype = dtype if bank is None else torch.promote_types(dtype, bank.dtype)
    query, key, bank = (None if part is None else part.to(dtype).contiguous() for part in (query, key, bank))
    inputs = inputs._replace(query=query, key=key, bank=bank)
    if bank is None:
        inputs = inputs._replace(bank_valid=None, bank_ids=None)
    if inputs.query_ids is None:
        inputs = inputs._replace(key_ids=None, bank_ids=None)
    stats, gradients = empty_row_stats(query, torch.float32), None
    if weight is not None:
        weight = weight.float().contiguous()
        gradients = [torch.zeros_like(part, dtype=torch.float32) for part in (query, key, inputs.logit_scale)]
    if len(query):
        run = _stream if (engine_name or engine(*query.shape, dtype)) == "stream" else _chunked
        gradients = run(inputs, weight, stats, gradients)
    return stats, gradients


def _stream(inputs, weight, stats, gradients):
    """Fills the stats; returns the gradients, None without weight."""
    query, (rows, dim), keys = inputs.query, inputs.query.shape, len(inputs.key)
    bank_rows = 0 if inputs.bank is None else len(inputs.bank)
    pointers = tuple(inputs if bank_rows else inputs._replace(bank=inputs.key))
    padded = max(16, triton.next_power_of_2(dim))
    launch = launch_for(STREAM, query.device)[max(64, padded)]
    blocks = [triton.cdiv(count, launch.columns) for count in (keys, bank_rows)]
    per_split = max(1, triton.cdiv(sum(blocks), SPLITS))
    key_splits, bank_splits = (triton.cdiv(count, per_split) for count in blocks)
    splits = key_splits + bank_splits
    maximum, total = (query.new_empty(splits, rows, dtype=torch.float32) for _ in range(2))
    count = query.new_empty(splits, rows, dtype=torch.int32)
    for_scale, lse, row_grad = (query.new_empty(rows, dtype=torch.float32) for _ in range(3))
    mean = for_query = None
    if weight is not None:
        mean = query.new_empty(splits, rows, dim, dtype=torch.float32)
        for_query, for_key, _ = gradients
    partial, row_gradients = (maximum, total, count, mean), (for_query, for_scale, lse, row_grad)
    options = PRODUCTS | dict(BLOCK_N=launch.rows, BLOCK_M=launch.columns, BLOCK_D=padded)
    options |= dict(num_warps=launch.warps, num_stages=launch.stages)
    grid = (triton.cdiv(rows, launch.rows), splits)
    stream[grid](pointers, partial, rows, keys, bank_rows, dim, key_splits, per_split, **options)
    combine[(rows,)](pointers, weight, partial, tuple(stats), row_gradients, rows, keys, dim, splits, BLOCK_D=padded)
    if weight is None:
        return None
    largest = row_grad.abs().amax().clamp(min=1e-30)  # relative to it, float16 coefficients do not underflow
    grid = (triton.cdiv(keys, launch.columns),)
    key_gradient[grid](pointers, lse, row_grad / largest, for_key, rows, keys, dim, **options)
    return for_query, for_key.mul_(largest), for_scale.sum()


def _product(left, right):
    """left @ right in float32, from half-precision operands without rounding in between."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def _chunked(inputs, weight, stats, gradients):
    """Fills the stats; returns the gradients, None without weight."""
    query, key, bank = inputs.query, inputs.key, inputs.bank
    sides = [(key, slice(0, len(key)))]
    if bank is not None:
        sides.append((bank, slice(len(key), len(key) + len(bank))))
    columns = sides[-1][1].stop
    size = min(len(query), max(16, CHUNK_BYTES // (columns * 6)))
    coefficient = row_grad = None
    if weight is not None:
        for_query, for_key, _ = gradients
        coefficient = query.new_empty(size, columns)
        row_grad = query.new_empty(len(query), dtype=torch.float32)
    for start in range(0, len(query), size):
        part = slice(start, min(len(query), start + size))
        products = [_product(query[part], side.T) for side, _ in sides]
        of_rows = (inputs.target, inputs.query_ids, weight, row_grad)
        target, ids, row_weight, factor = (None if rows is None else rows[part] for rows in of_rows)
        finish_rows[(len(target),)](
            (products[0], products[-1]),
            tuple(inputs._replace(target=target, query_ids=ids)),
            row_weight,
            coefficient,
            factor,
            tuple(stat[part] for stat in stats),
            len(key),
            columns - len(key),
            BLOCK=min(ROW_BLOCK, triton.next_power_of_2(columns)),
            num_warps=ROW_WARPS,
        )
        if weight is not None:
            used, factor = coefficient[: len(target)], factor[:, None]
            products = [_product(used[:, where], side) for side, where in sides]
            for_query[part] = sum(products).mul_(factor / UNIT.value)
            largest = factor.abs().amax().clamp(min=1e-30)
            relative = (query[part] * (factor / largest)).to(query.dtype)
            for_key.add_(_product(used[:, : len(key)].T, relative).mul_(largest / UNIT.value))
    if weight is None:
        return None
    scale = inputs.logit_scale.float()
    return for_query * scale, for_key * scale, (for_query * query).sum()
