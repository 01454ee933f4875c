"""The contrastive loss in Triton, without the N x (M + K) logits, deterministic and without host synchronisation.

Two engines. "stream" is for few queries in half precision, where reading the bank once is the cost: a program keeps a
block of queries and passes over one share of the columns with an online softmax whose weighted mean of columns is the
query's gradient; a second kernel combines the shares in a fixed order, a third gives the in-batch keys their gradient.
"chunked" is for many queries, where the products are the cost, and for float32: float32 logits of a chunk of rows by
cuBLAS, one kernel a row that turns them into the coefficients of the gradient, and two more products.

Half-precision inputs are multiplied as they are with float32 sums. Coefficients of the gradient are rounded to the
inputs' precision only after the row's own factor, tiny where the loss is tiny, is taken out, so that float16 does not
lose them. As elsewhere, `UPCAST` is for the interpreter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.contrastive_cpu import Gradients, Rows
from kernels.gpu import INTERPRETED, PRECISION, launch_for, on_its_device

NO_NEGATIVE = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
UNIT = tl.constexpr(32768.0)  # coefficients of at most 1 times this use float16's whole range
CHUNK_BYTES = 256 * 2**20  # logits and coefficients held at a time by the chunked engine


class Launch(NamedTuple):
    """Block sizes of a kernel."""

    rows: int
    columns: int
    warps: int
    stages: int


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


@triton.jit(do_not_specialize=["rows", "keys", "key_splits", "blocks_a_split"])
def stream(
    query,
    key,
    bank,
    scale,
    target,
    bank_valid,
    query_ids,
    key_ids,
    bank_ids,
    maximum_out,
    total_out,
    count_out,
    mean_out,
    rows,
    keys,
    bank_rows,
    dim,
    key_splits,
    blocks_a_split,
    HAS_VALID: tl.constexpr,
    KEY_IDS: tl.constexpr,
    BANK_IDS: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries over one share of the keys (the first key_splits shares) or of the bank."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    multiplier = tl.load(scale).to(tl.float32)
    block = _load_rows(query, n, rows, dim, BLOCK_D)
    own = tl.load(target + n, mask=n < rows, other=-1)
    my_id = tl.zeros_like(own) - 1
    if KEY_IDS or BANK_IDS:
        my_id = tl.load(query_ids + n, mask=n < rows, other=-1)
    in_bank = split >= key_splits
    used = tl.minimum(bank_rows, tl.load(bank_valid).to(tl.int32)) if HAS_VALID else bank_rows
    first = tl.where(in_bank, split - key_splits, split) * blocks_a_split * BLOCK_M
    last = tl.minimum(first + blocks_a_split * BLOCK_M, tl.where(in_bank, used, keys))
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
        if KEY_IDS:
            ids = tl.load(key_ids + m, mask=m < tl.where(in_bank, 0, last), other=-1)
            negative &= (ids[None, :] != my_id[:, None]) | (my_id == -1)[:, None]
        if BANK_IDS:
            ids = tl.load(bank_ids + m, mask=m < tl.where(in_bank, last, 0), other=-1)
            negative &= (ids[None, :] != my_id[:, None]) | (my_id == -1)[:, None]
        logits = tl.where(negative, logits, NO_NEGATIVE)
        higher = tl.maximum(maximum, tl.max(logits, axis=1))
        shrink = tl.exp2(maximum - higher)
        weight = tl.where(negative, tl.exp2(logits - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        count += tl.sum(negative.to(tl.int32), axis=1)
        if WITH_MEAN:
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
    if WITH_MEAN:
        d = tl.arange(0, BLOCK_D)
        mask = (n < rows)[:, None] & (d < dim)[None, :]
        mean = mean if UPCAST else mean / UNIT
        tl.store(mean_out + out[:, None] * dim + d[None, :], mean, mask=mask)


@triton.jit(do_not_specialize=["rows", "keys", "splits"])
def combine(
    query,
    key,
    scale,
    target,
    weight,
    maximum_in,
    total_in,
    count_in,
    mean_in,
    loss_out,
    logsumexp_out,
    positive_out,
    largest_out,
    count_out,
    query_grad,
    scale_grad,
    lse_out,
    pull_out,
    rows,
    keys,
    dim,
    splits,
    WITH_MEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row: the shares of its negatives become loss, statistics and the query's gradient, in the order of shares."""
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
    count = 1
    mean = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for split in range(0, splits):
        shrink = tl.exp2(tl.load(maximum_in + split * rows + n) - maximum)
        total += tl.load(total_in + split * rows + n) * shrink
        count += tl.load(count_in + split * rows + n)
        if WITH_MEAN:
            mean += tl.load(mean_in + (split * rows + n) * dim + d, mask=d < dim, other=0.0) * shrink
    any_negative = count > 1
    safe = tl.where(any_negative, total, 1.0)
    lse = maximum * LN_2 + tl.log(safe)
    margin = lse - positive
    # softplus and sigmoid without overflow: e^-|x| is at most 1.
    small = tl.exp(-tl.abs(margin))
    log1p = tl.where(small < 1e-4, small - 0.5 * small * small, tl.log(1.0 + small))
    loss = tl.where(any_negative, tl.maximum(margin, 0.0) + log1p, 0.0 * positive)
    tl.store(loss_out + n, loss)
    tl.store(positive_out + n, positive)
    tl.store(logsumexp_out + n, positive + loss)
    tl.store(largest_out + n, tl.where(any_negative, maximum * LN_2, float("-inf")))
    tl.store(count_out + n, count.to(tl.int64))
    if WITH_MEAN:
        sigmoid = tl.where(margin >= 0, 1.0, small) / (1.0 + small)
        pull = tl.where(any_negative, tl.load(weight + n) * sigmoid, 0.0 * positive)
        tl.store(pull_out + n, pull)
        tl.store(lse_out + n, lse * LOG2_E)
        direction = (mean / safe - wanted) * pull
        tl.store(scale_grad + n, tl.sum(direction * mine, axis=0))
        tl.store(query_grad + n * dim + d, direction * multiplier, mask=d < dim)


@triton.jit(do_not_specialize=["rows", "keys"])
def key_gradient(
    query,
    key,
    scale,
    target,
    query_ids,
    key_ids,
    lse,
    pull,
    key_grad,
    rows,
    keys,
    dim,
    KEY_IDS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of in-batch keys over all queries."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    multiplier = tl.load(scale).to(tl.float32)
    mine = _load_rows(key, m, keys, dim, BLOCK_D)
    if KEY_IDS:
        my_id = tl.load(key_ids + m, mask=m < keys, other=-1)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        part = _load_rows(query, n, rows, dim, BLOCK_D)
        logits = _logits(mine, part, multiplier, UPCAST, PRECISION)  # (BLOCK_M, BLOCK_N)
        own = tl.load(target + n, mask=n < rows, other=-1)
        row_lse = tl.load(lse + n, mask=n < rows, other=0.0)
        row_pull = tl.load(pull + n, mask=n < rows, other=0.0)
        positive = own[None, :] == m[:, None]
        live = (n < rows)[None, :] & (m < keys)[:, None]
        negative = live & (own[None, :] != m[:, None])
        if KEY_IDS:
            ids = tl.load(query_ids + n, mask=n < rows, other=-1)
            negative &= (ids[None, :] != my_id[:, None]) | (ids == -1)[None, :]
        share = tl.where(negative, tl.exp2(tl.where(negative, logits - row_lse[None, :], 0.0)), 0.0)
        share = tl.where(positive & live, -1.0, share) * row_pull[None, :]
        if UPCAST:
            total = tl.dot(share, part.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot((share * UNIT).to(part.dtype), part, total, input_precision=PRECISION)
    total = total if UPCAST else total / UNIT
    d = tl.arange(0, BLOCK_D)
    mask = (m < keys)[:, None] & (d < dim)[None, :]
    tl.store(key_grad + m.to(tl.int64)[:, None] * dim + d[None, :], total * multiplier, mask=mask)


@triton.jit(do_not_specialize=["keys"])
def settle_rows(
    key_products,
    bank_products,
    scale,
    coefficient,
    target,
    weight,
    bank_valid,
    query_ids,
    key_ids,
    bank_ids,
    loss_out,
    logsumexp_out,
    positive_out,
    largest_out,
    count_out,
    pull_out,
    unit,
    keys,
    bank_rows,
    HAS_VALID: tl.constexpr,
    KEY_IDS: tl.constexpr,
    BANK_IDS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of float32 products with keys and bank: loss, statistics, and the row's part in the gradient.

    That is the weight `pull` times the coefficients / unit: the negatives' softmax, and -1 for the target.
    """
    n = tl.program_id(0).to(tl.int64)
    columns = keys + bank_rows
    key_row = key_products + n * keys
    bank_row = bank_products + n * bank_rows
    multiplier = tl.load(scale).to(tl.float32)
    own = tl.load(target + n)
    exists = (own >= 0) & (own < keys)
    positive = tl.load(key_row + tl.where(exists, own, 0)) * multiplier + tl.where(exists, 0.0, float("nan"))
    my_id = tl.zeros_like(own) - 1
    if KEY_IDS or BANK_IDS:
        my_id = tl.load(query_ids + n)
    limit = columns
    if HAS_VALID:
        limit = tl.minimum(limit, keys + tl.load(bank_valid).to(tl.int32))
    maximum = NO_NEGATIVE
    total = 0.0
    count = 0
    for start in range(0, columns, BLOCK):
        m = start + tl.arange(0, BLOCK)
        negative = _is_negative(m, own, my_id, limit, keys, key_ids, bank_ids, KEY_IDS, BANK_IDS)
        values = tl.where(negative, _row_logits(key_row, bank_row, multiplier, m, keys, columns), NO_NEGATIVE)
        higher = tl.maximum(maximum, tl.max(values, axis=0))
        total = total * tl.exp(maximum - higher)
        total += tl.sum(tl.where(negative, tl.exp(values - higher), 0.0), axis=0)
        count += tl.sum(negative.to(tl.int32), axis=0)
        maximum = higher
    any_negative = count > 0
    safe = tl.where(any_negative, total, 1.0)
    margin = maximum + tl.log(safe) - positive
    small = tl.exp(-tl.abs(margin))
    log1p = tl.where(small < 1e-4, small - 0.5 * small * small, tl.log(1.0 + small))
    loss = tl.where(any_negative, tl.maximum(margin, 0.0) + log1p, 0.0 * positive)
    tl.store(loss_out + n, loss)
    tl.store(positive_out + n, positive)
    tl.store(logsumexp_out + n, positive + loss)
    tl.store(largest_out + n, tl.where(any_negative, maximum, float("-inf")))
    tl.store(count_out + n, (count + 1).to(tl.int64))
    if WITH_GRADIENT:
        sigmoid = tl.where(margin >= 0, 1.0, small) / (1.0 + small)
        tl.store(pull_out + n, tl.where(any_negative, tl.load(weight + n) * sigmoid, 0.0 * positive))
        for start in range(0, columns, BLOCK):
            m = start + tl.arange(0, BLOCK)
            negative = _is_negative(m, own, my_id, limit, keys, key_ids, bank_ids, KEY_IDS, BANK_IDS)
            values = tl.where(negative, _row_logits(key_row, bank_row, multiplier, m, keys, columns), maximum)
            share = tl.where(negative, tl.exp(values - maximum) / safe, tl.where(m == own, -1.0, 0.0)) * unit
            tl.store(coefficient + n * columns + m, share.to(coefficient.dtype.element_ty), mask=m < columns)


@triton.jit
def _row_logits(key_row, bank_row, multiplier, m, keys, columns):
    """The logits of a row at the columns m of [key; bank]."""
    products = tl.load(key_row + m, mask=m < keys, other=0.0)
    products += tl.load(bank_row + (m - keys), mask=(m >= keys) & (m < columns), other=0.0)
    return products * multiplier


@triton.jit
def _is_negative(m, own, my_id, limit, keys, key_ids, bank_ids, KEY_IDS: tl.constexpr, BANK_IDS: tl.constexpr):
    """Which columns of [key; bank] are negatives of a row."""
    negative = (m < limit) & (m != own)
    if KEY_IDS:
        ids = tl.load(key_ids + m, mask=m < keys, other=-1)
        negative &= (ids != my_id) | (ids == -1)
    if BANK_IDS:
        ids = tl.load(bank_ids + (m - keys), mask=(m >= keys) & (m < limit), other=-1)
        negative &= (ids != my_id) | (ids == -1)
    return negative


def engine(rows, dim, dtype):
    """Which engine serves a shape; a guess until it is measured (see STREAM)."""
    small = rows <= STREAM_ROWS and dim <= max(STREAM["default"])
    return "stream" if small and dtype != torch.float32 else "chunked"


@on_its_device
def contrast(problem, weight=None, engine_name=None):
    """As `contrastive_cpu.contrast`: Rows, and the Gradients of the weighted sum of losses where weight is given."""
    operands = [problem.query, problem.key] + ([] if problem.bank is None else [problem.bank])
    common = operands[0].dtype
    for part in operands[1:]:
        common = torch.promote_types(common, part.dtype)
    query, key, *bank = (part.to(common).contiguous() for part in operands)
    problem = problem._replace(query=query, key=key, bank=bank[0] if bank else None)
    weight = None if weight is None else weight.float().contiguous()
    if len(query) == 0:
        rows = _empty_rows(query)
        if weight is None:
            return rows, None
        for_query, for_key = (torch.zeros_like(part, dtype=torch.float32) for part in (query, key))
        return rows, Gradients(for_query, for_key, for_query.sum())
    name = engine_name or engine(*query.shape, common)
    return (_stream if name == "stream" else _chunked)(problem, weight)


def _flags(problem):
    """Which optional inputs there are, and something to point at where one is missing."""
    with_ids = problem.query_ids is not None
    key_ids, bank_ids = with_ids and problem.key_ids is not None, with_ids and problem.bank_ids is not None
    pointers = dict(
        bank_valid=problem.target if problem.bank_valid is None else problem.bank_valid,
        query_ids=problem.query_ids if with_ids else problem.target,
        key_ids=problem.key_ids if key_ids else problem.target,
        bank_ids=problem.bank_ids if bank_ids else problem.target,
    )
    return pointers, dict(KEY_IDS=key_ids, BANK_IDS=bank_ids and problem.bank is not None)


def _empty_rows(query):
    stats = [query.new_empty(len(query), dtype=torch.float32) for _ in range(4)]
    return Rows(*stats, query.new_empty(len(query), dtype=torch.int64))


def _stream(problem, weight):
    query, key, bank = problem.query, problem.key, problem.bank
    rows, dim = query.shape
    bank_rows = 0 if bank is None else len(bank)
    padded = max(16, triton.next_power_of_2(dim))
    launch = launch_for(STREAM, query.device)[max(64, padded)]
    blocks = [triton.cdiv(count, launch.columns) for count in (len(key), bank_rows)]
    a_split = max(1, triton.cdiv(sum(blocks), SPLITS))
    key_splits, bank_splits = (triton.cdiv(count, a_split) for count in blocks)
    splits = key_splits + bank_splits
    with_gradient = weight is not None
    shares = [query.new_empty(splits, rows, dtype=torch.float32) for _ in range(2)]
    counts = query.new_empty(splits, rows, dtype=torch.int32)
    means = query.new_empty((splits, rows, dim) if with_gradient else (1,), dtype=torch.float32)
    pointers, flags = _flags(problem)
    tile = dict(UPCAST=INTERPRETED, PRECISION=PRECISION, BLOCK_N=launch.rows, BLOCK_M=launch.columns, BLOCK_D=padded)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    stream[(triton.cdiv(rows, launch.rows), splits)](
        query,
        key,
        key if bank is None else bank,
        problem.logit_scale,
        problem.target,
        *pointers.values(),
        *shares,
        counts,
        means,
        rows,
        len(key),
        bank_rows,
        dim,
        key_splits,
        a_split,
        HAS_VALID=problem.bank_valid is not None,
        WITH_MEAN=with_gradient,
        **flags,
        **tile,
        **options,
    )
    result = _empty_rows(query)
    for_query = query.new_empty(rows, dim, dtype=torch.float32)
    for_scale, lse, pull = (query.new_empty(rows, dtype=torch.float32) for _ in range(3))
    combine[(rows,)](
        query,
        key,
        problem.logit_scale,
        problem.target,
        weight if with_gradient else lse,
        *shares,
        counts,
        means,
        *result,
        for_query,
        for_scale,
        lse,
        pull,
        rows,
        len(key),
        dim,
        splits,
        WITH_MEAN=with_gradient,
        BLOCK_D=padded,
    )
    if not with_gradient:
        return result, None
    for_key = key.new_empty(key.shape, dtype=torch.float32)
    largest = pull.abs().amax().clamp(min=1e-30)  # relative to it, float16 coefficients do not underflow
    key_gradient[(triton.cdiv(len(key), launch.columns),)](
        query,
        key,
        problem.logit_scale,
        problem.target,
        pointers["query_ids"],
        pointers["key_ids"],
        lse,
        pull / largest,
        for_key,
        rows,
        len(key),
        dim,
        KEY_IDS=flags["KEY_IDS"],
        **tile,
        **options,
    )
    return result, Gradients(for_query, for_key.mul_(largest), for_scale.sum())


def _product(left, right):
    """left @ right in float32, from half-precision operands without rounding in between."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def _chunked(problem, weight):
    query, key, bank = problem.query, problem.key, problem.bank
    rows, dim = query.shape
    columns = len(key) + (0 if bank is None else len(bank))
    with_gradient = weight is not None
    unit = UNIT.value
    size = min(rows, max(16, CHUNK_BYTES // (columns * 6)))
    scale = problem.logit_scale.float()
    result = _empty_rows(query)
    coefficient = query.new_empty((size, columns) if with_gradient else (1,), dtype=query.dtype)
    pull = query.new_empty(rows, dtype=torch.float32)
    for_query = query.new_empty(rows, dim, dtype=torch.float32)
    for_key = key.new_zeros(key.shape, dtype=torch.float32)
    pointers, flags = _flags(problem)
    sides = [(key, slice(0, len(key)))] + ([] if bank is None else [(bank, slice(len(key), columns))])
    for start in range(0, rows, size):
        part = slice(start, min(rows, start + size))
        count = part.stop - start
        products = [_product(query[part], side.T) for side, _ in sides]
        settle_rows[(count,)](
            products[0],
            products[-1],
            scale,
            coefficient,
            problem.target[part],
            weight[part] if with_gradient else scale,
            pointers["bank_valid"],
            pointers["query_ids"][part],
            pointers["key_ids"],
            pointers["bank_ids"],
            *(stat[part] for stat in result),
            pull[part],
            unit,
            len(key),
            columns - len(key),
            HAS_VALID=problem.bank_valid is not None,
            WITH_GRADIENT=with_gradient,
            BLOCK=min(ROW_BLOCK, triton.next_power_of_2(columns)),
            num_warps=ROW_WARPS,
            **flags,
        )
        if with_gradient:
            used, factor = coefficient[:count], pull[part, None]
            for_query[part] = sum(_product(used[:, where], side) for side, where in sides).mul_(factor / unit)
            largest = factor.abs().amax().clamp(min=1e-30)
            pulled = (query[part] * (factor / largest)).to(query.dtype)
            for_key.add_(_product(used[:, : len(key)].T, pulled).mul_(largest / unit))
    if not with_gradient:
        return result, None
    for_scale = (for_query * query).sum()
    return result, Gradients(for_query * scale, for_key * scale, for_scale)
