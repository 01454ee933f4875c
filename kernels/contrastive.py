"""Contrastive loss over in-batch keys and memory-bank negatives."""

from typing import NamedTuple

import torch

from kernels import reference
from kernels.implementation import choose


class ContrastiveStats(NamedTuple):
    """Per-row figures for logging, (N,) each, without gradient.

    logsumexp, positive and largest_negative: float32 (float64 for float64 inputs) logits, the last -inf where a row
    has no negative; candidates: int64, the target and the negatives that were not masked.
    """

    logsumexp: torch.Tensor
    positive: torch.Tensor
    largest_negative: torch.Tensor
    candidates: torch.Tensor


def contrastive_loss(
    query,
    key,
    logit_scale,
    *,
    target=None,
    bank=None,
    bank_valid=None,
    query_ids=None,
    key_ids=None,
    bank_ids=None,
    reduction="mean",
    recompute=False,
    with_stats=False,
    implementation="auto",
):
    """InfoNCE (van den Oord et al., CPC, eq. 4) with a memory bank (He et al., MoCo, eq. 1):
    the cross-entropy of logit_scale * query @ [key; bank].T, one row a query.

    query: (N, D), key: (M, D), any floating dtype, also mixed; logits and loss are float32 (float64 when query or key
        is), with or without autocast. The caller normalises.
    logit_scale: 0-d tensor (or a number), the multiplier itself; takes a gradient.
    target: (N,) int64, the key column of each query; default arange(N), which needs N <= M.
    bank: (K, D) or None, more negatives, gets no gradient and may be overwritten before the backward;
        bank_valid: how many of its first rows are in use, an int or a 0-d int64 tensor, default all.
    query_ids (N,), key_ids (M,), bank_ids (K,): int64. Where both sides are given, every column other than the target
        that carries the query's id is left out (a false negative); -1 stands for none and masks nothing.
    reduction: "mean", "sum" or "none". A row without negatives has loss 0; so has the mean of no rows.
    recompute: save one number a row instead of the gradients and compute the logits again in the backward; needs less
        memory between the two passes, more time, and a bank that did not change meanwhile (RuntimeError otherwise).
    with_stats: return (loss, ContrastiveStats).
    implementation: "auto" (Triton on a GPU, PyTorch elsewhere), "triton" or "torch".

    Raises ValueError or TypeError on shapes, dtypes or devices that do not fit, and, on the CPU, on a target outside
    [0, M); on a GPU such a row's loss is NaN, since looking would stall it.
    """
    _check(query, key, target, bank, query_ids, key_ids, bank_ids, reduction)
    choose(implementation, query.device)
    if target is None:
        target = torch.arange(len(query), device=query.device)
    elif target.device.type == "cpu" and not ((target >= 0) & (target < len(key))).all():
        raise ValueError(f"every target must be a row of key, in [0, {len(key)})")
    logit_scale = torch.as_tensor(logit_scale, device=query.device)
    bank = None if bank is None else bank.detach().clone()
    masks = dict(bank=bank, bank_valid=bank_valid, query_ids=query_ids, key_ids=key_ids, bank_ids=bank_ids)
    with torch.autocast(query.device.type, enabled=False):
        loss, stats = reference.contrastive_rows(query, key, logit_scale, target=target, **masks)
        loss = reference.reduce_rows(loss, reduction)
    return (loss, ContrastiveStats(*stats)) if with_stats else loss


def _check(query, key, target, bank, query_ids, key_ids, bank_ids, reduction):
    rows = {"query": query, "key": key} | ({} if bank is None else {"bank": bank})
    for name, tensor in rows.items():
        if tensor.ndim != 2 or tensor.shape[1] != query.shape[1]:
            raise ValueError(f"{name} must be (rows, D) with D = {query.shape[-1]}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if target is None and len(query) > len(key):
        raise ValueError(f"without target, query i belongs to key i: got {len(query)} queries and {len(key)} keys")
    columns = {"target": (target, query), "query_ids": (query_ids, query), "key_ids": (key_ids, key)}
    if bank is not None:
        columns["bank_ids"] = (bank_ids, bank)
    for name, (tensor, side) in columns.items():
        if tensor is not None and tensor.shape != side.shape[:1]:
            raise ValueError(f"{name} must be ({len(side)},), got {tuple(tensor.shape)}")
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
    given = [*rows.values(), *(tensor for tensor, _ in columns.values() if tensor is not None)]
    if any(tensor.device != query.device for tensor in given):
        raise TypeError(f"all tensors must be on {query.device}, got {[str(tensor.device) for tensor in given]}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
