"""Contrastive loss over in-batch keys and memory-bank negatives."""

from typing import NamedTuple

import torch

from kernels.contrastive_cpu import LossInputs, empty_row_stats
from kernels.dispatch import described, engine, operator, resolve_backend
from kernels.reference import logit_dtype, reduce_rows


class ContrastiveStats(NamedTuple):
    """Statistics per query, (N,) each, without gradient.

    logsumexp, positive and largest_negative: logits, float32 (float64 for float64 inputs). largest_negative is -inf
        where a row has no negative.
    candidates: int64, the target and the negatives that were not masked.
    """

    logsumexp: torch.Tensor
    positive: torch.Tensor
    largest_negative: torch.Tensor
    candidates: torch.Tensor


def contrastive_loss(
    query, key, logit_scale, *, target=None, bank=None, bank_valid=None, query_ids=None, key_ids=None, bank_ids=None,
    reduction="mean", recompute=False, with_stats=False, implementation="auto",
):  # fmt: skip
    """InfoNCE (van den Oord et al., CPC, eq. 4) with a memory bank (He et al., MoCo, eq. 1):
    the cross-entropy of logit_scale * query @ [key; bank].T, one row per query.

    query: (N, D), key: (M, D), any floating dtype, also mixed; logits and loss are float32 (float64 when query or key
        is), with or without autocast. The caller normalises.
    logit_scale: 0-d tensor (or a number), the multiplier itself; takes a gradient.
    target: (N,) int64, the key column of each query; default arange(N), which needs N <= M.
    bank: (K, D) or None, more negatives, gets no gradient and may be overwritten before the backward;
        bank_valid: how many of its first rows are in use, an int or a 0-d int64 tensor, default all.
    query_ids (N,), key_ids (M,), bank_ids (K,): int64. Where both sides are given, every column other than the target
        that carries the query's id is left out (a false negative); -1 stands for none and masks nothing.
    reduction: "mean", "sum" or "none". A row without negatives has loss 0; so has the mean of no rows.
    recompute: compute the gradients in the backward from new logits instead of keeping them from the forward; needs
        less memory between the passes, more time, and a bank that did not change meanwhile (RuntimeError otherwise).
        reduction="none" always does, since the keys' gradient depends on every row's upstream gradient.
    with_stats: return (loss, ContrastiveStats).
    implementation: "auto" (Triton on a GPU, PyTorch elsewhere), "triton" or "torch".

    Raises ValueError on shapes, dtypes or devices that do not fit, and, on the CPU, on a target outside [0, M); on a
    GPU such a row's loss is NaN, since looking would stall it.
    """
    others = dict(target=target, bank=bank, bank_valid=bank_valid)
    others |= dict(query_ids=query_ids, key_ids=key_ids, bank_ids=bank_ids)
    inputs = loss_inputs(query, key, logit_scale, reduction=reduction, **others)
    backend = resolve_backend(implementation, [query, key])
    weight = None
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in inputs[:3])
    if wanted and not recompute and reduction != "none":
        row = 1 / max(1, query.shape[0]) if reduction == "mean" else 1.0
        weight = torch.full_like(query[:, 0], row, dtype=logit_dtype(query, key))
    with torch.autocast(query.device.type, enabled=False):  # logits are float32
        loss, *stats = _contrast(*inputs, weight, reduction, backend)[:5]
    return (loss, ContrastiveStats(*stats)) if with_stats else loss


@operator(
    "contrastive_loss",
    "(Tensor query, Tensor key, Tensor logit_scale, Tensor target, Tensor? bank, Tensor? bank_valid, "
    "Tensor? query_ids, Tensor? key_ids, Tensor? bank_ids, Tensor? weight, str reduction, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _contrast(*arguments):
    """Loss, four statistics, and the gradients of query, key and logit_scale.

    The gradients are those of the sum of the rows' losses times weight (N,); empty tensors without weight.
    """
    *tensors, weight, reduction, backend = arguments
    inputs = LossInputs(*tensors)
    keys, target = len(inputs.key), inputs.target
    if target.is_cpu and not ((target >= 0) & (target < keys)).all():
        raise ValueError(f"every target must be a row of key, in [0, {keys})")
    with torch.cuda.device_of(target):  # Triton launches on the current GPU
        (loss, *stats), gradients = engine("contrastive", backend).contrast(inputs, weight)
    if gradients is None:
        gradients = [loss.new_empty(0) for _ in range(3)]
    return reduce_rows(loss, reduction), *stats, *gradients


@torch.library.register_fake(_contrast)
def _(query, key, *others):
    *_, weight, reduction, _ = others
    loss, *stats = empty_row_stats(query, logit_dtype(query, key))
    shapes = [0, 0, 0] if weight is None else [query.shape, key.shape, ()]
    return reduce_rows(loss, reduction), *stats, *(loss.new_empty(shape) for shape in shapes)


def _save(ctx, inputs, output):
    *tensors, weight, ctx.reduction, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.kept, ctx.dtypes = weight is not None, [part.dtype for part in tensors[:3]]
    ctx.save_for_backward(*(output[5:] if ctx.kept else tensors))


def _gradients(ctx, grad, *_):
    if ctx.kept:
        gradients = [grad * part for part in ctx.saved_tensors]
    else:
        rows = ctx.saved_tensors[0].shape[0]
        weight = (grad / max(1, rows) if ctx.reduction == "mean" else grad).expand(rows).contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            gradients = _contrast(*ctx.saved_tensors, weight, "none", ctx.backend)[5:]
    gradients = [part.to(dtype) for part, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return *gradients, *[None] * 9


torch.library.register_autograd(_contrast, _gradients, setup_context=_save)


def loss_inputs(
    query, key, logit_scale, *, reduction, target=None, bank=None, bank_valid=None, query_ids=None, key_ids=None,
    bank_ids=None,
):  # fmt: skip
    """The arguments of `contrastive_loss`, checked, with what stands for those that are not given."""
    _check(query, key, target, bank, query_ids, key_ids, bank_ids, reduction)
    if target is None:
        target = torch.arange(query.shape[0], device=query.device)
    if not isinstance(logit_scale, torch.Tensor):
        logit_scale = torch.full((), logit_scale, device=query.device)
    if bank_valid is not None and not isinstance(bank_valid, torch.Tensor):  # a number only cuts the view
        if bank_valid < 0:
            raise ValueError(f"bank_valid must not be negative, got {bank_valid}")
        bank, bank_ids = (None if part is None else part[:bank_valid] for part in (bank, bank_ids))
        bank_valid = None
    bank = None if bank is None else bank.detach()
    return LossInputs(query, key, logit_scale, target, bank, bank_valid, query_ids, key_ids, bank_ids)


def _check(query, key, target, bank, query_ids, key_ids, bank_ids, reduction):
    device, dim = query.device, query.shape[-1]
    for name, rows in dict(query=query, key=key, bank=bank).items():
        if rows is None:
            continue
        if rows.ndim != 2 or rows.shape[1] != dim or not rows.is_floating_point() or rows.device != device:
            raise ValueError(f"{name} must be (rows, {dim}), floating point, on {device}, got {described(rows)}")
    if target is None and query.shape[0] > key.shape[0]:
        raise ValueError(f"without target, query i belongs to key i: got {len(query)} queries and {len(key)} keys")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    bank_ids = None if bank is None else bank_ids
    for name, ids in dict(target=target, query_ids=query_ids, key_ids=key_ids, bank_ids=bank_ids).items():
        if ids is None:
            continue
        rows = dict(key_ids=key, bank_ids=bank).get(name, query)
        if ids.shape != rows.shape[:1] or ids.dtype != torch.int64 or ids.device != device:
            raise ValueError(f"{name} must be ({len(rows)},), int64, on {device}, got {described(ids)}")
