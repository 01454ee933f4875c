"""The pairwise sigmoid loss over in-batch keys and memory-bank negatives, without the N x (M + K) logits."""

import torch

from kernels import reference
from kernels.contrastive import loss_inputs

CHUNK = dict(cpu=2**20, cuda=2**25)  # logits held at a time, and a few times as much beside them


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
    """The twin, block of rows by block of rows. Each block's gradients are made with it, and kept for the backward."""

    @staticmethod
    def forward(ctx, query, key, scale, target, bank, bank_valid, query_ids, key_ids, bank_ids, bias):
        dtype = reference.logit_dtype(query, key)
        query, *rest = leaves = [part.detach().to(dtype).requires_grad_() for part in (query, key, scale, bias)]
        columns = dict(bank=bank, bank_valid=bank_valid, key_ids=key_ids, bank_ids=bank_ids, reduction="sum")
        total = torch.zeros((), dtype=torch.float64, device=query.device)
        size = max(16, CHUNK[query.device.type] // max(1, len(key) + (0 if bank is None else len(bank))))
        for start in range(0, len(query) or 1, size):
            rows = slice(start, start + size)
            ids = None if query_ids is None else query_ids[rows]
            with torch.enable_grad():
                loss = reference.sigmoid_loss(query[rows], *rest, target=target[rows], query_ids=ids, **columns)
            loss.backward()
            total += loss.detach()
        ctx.save_for_backward(*(leaf.grad for leaf in leaves))
        return total.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *first, bias = (grad * part for part in ctx.saved_tensors)  # autograd casts to the inputs' dtypes
        return *first, *[None] * 6, bias
