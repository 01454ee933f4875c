"""Linear layers by the library that is fast on this processor.

PyTorch multiplies float32 by MKL. On an AMD processor with AVX-512, which MKL leaves unused there, oneDNN took 0.4 to
0.7 of its time (a detector's step without it: docs/speed.md); on one without AVX-512 1.1 to 1.4 of it.
"""

import torch
import torch.nn.functional as F

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
LARGE = 2**23  # multiplications that make up for what oneDNN needs to start


def linear(rows, weight, bias=None):
    """(M, K), (N, K), (N,) or None -> rows @ weight.T + bias, (M, N), as `F.linear`."""
    large = rows.shape[0] * weight.numel() >= LARGE
    if not (ONEDNN and large and rows.is_cpu and rows.dtype == torch.float32):
        return F.linear(rows, weight, bias)
    product = Product.apply(rows, weight)
    return product if bias is None else product + bias


class Product(torch.autograd.Function):
    """(M, K), (N, K) -> rows @ weight.T, (M, N), by oneDNN."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")  # as compiled models call it

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        for_rows = Product.apply(grad, weight.T) if ctx.needs_input_grad[0] else None
        return for_rows, Product.apply(grad.T, rows.T) if ctx.needs_input_grad[1] else None
