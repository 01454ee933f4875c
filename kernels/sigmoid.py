"""The pairwise sigmoid loss over in-batch keys and memory-bank negatives, without the N x (M + K) logits."""

import torch
import torch.nn.functional as F

from kernels.contrastive import loss_inputs
from kernels.reference import logit_dtype, same_id

CHUNK = dict(cpu=2**21, cuda=2**26)  # logits held at a time


def sigmoid_loss(query, key, logit_scale, logit_bias, *, reduction="mean", **others):
    """The sum over all columns of -log sigmoid(z (logit_scale * query @ [key; bank].T + logit_bias)), in which z is 1
    at a query's target and -1 elsewhere (Zhai et al. 2023, SigLIP, eq. 1); its mean over the queries, or their sum.

    logit_bias: 0-d tensor; takes a gradient, as query, key and logit_scale do.
    others: target, bank, bank_valid, query_ids, key_ids, bank_ids as in `contrastive_loss`, whose dtypes and errors
        hold here too. There is no reduction "none".
    """
    inputs = loss_inputs(query, key, logit_scale, reduction=reduction, **others)
    if reduction == "none":
        raise ValueError('reduction must be "mean" or "sum"')
    with torch.autocast(query.device.type, enabled=False):  # logits are at least float32
        total = _SigmoidLoss.apply(*inputs, logit_bias)
    return total / max(1, len(query)) if reduction == "mean" else total


class _SigmoidLoss(torch.autograd.Function):
    """The gradients are made with the logits, block of rows by block of rows, and kept for the backward."""

    @staticmethod
    def forward(ctx, query, key, scale, target, bank, bank_valid, query_ids, key_ids, bank_ids, bias):
        ctx.dtypes = [part.dtype for part in (query, key, scale, bias)]
        dtype, used = logit_dtype(query, key), 0
        if bank is not None:
            used = len(bank) if bank_valid is None else int(bank_valid)
        rows, keys, scale, bias = (part.to(dtype) for part in (query, key, scale, bias))
        sides = [(keys, key_ids)]
        if used:
            sides.append((bank[:used].to(dtype), None if bank_ids is None else bank_ids[:used]))
        loss, for_bias = (torch.zeros((), dtype=torch.float64, device=rows.device) for _ in range(2))
        for_query, for_key = torch.zeros_like(rows), torch.zeros_like(keys)
        size = max(16, CHUNK[rows.device.type] // max(1, len(keys), used))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            for side, ids in sides:
                logits = (rows[part] * scale) @ side.T + bias  # (n, M) or (n, K)
                column, positive = target[part, None], None
                if side is keys:
                    positive = logits.gather(1, column)
                    logits.scatter_(1, column, -torch.inf)
                    loss += F.softplus(-positive, threshold=50).sum()
                if query_ids is not None and ids is not None:
                    logits.masked_fill_(same_id(query_ids[part], ids), -torch.inf)
                loss += F.softplus(logits, threshold=50).sum()
                slope = logits.sigmoid_()
                if side is keys:
                    slope.scatter_(1, column, -torch.sigmoid(-positive))
                    for_key.addmm_(slope.T, rows[part])
                for_query[part].addmm_(slope, side)
                for_bias += slope.sum()
        for_scale = (rows * for_query).sum()
        ctx.save_for_backward(for_query.mul_(scale), for_key.mul_(scale), for_scale, for_bias.to(dtype))
        return loss.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *first, bias = ((grad * part).to(dtype) for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *first, *[None] * 6, bias
