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
    return product(rows, weight) if bias is None else product(rows, weight) + bias


@torch.library.custom_op("macl_fgclip::product", mutates_args=())  # Inductor takes the bare call for constants only
def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(M, K), (N, K) -> rows @ weight.T, (M, N), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


@product.register_fake
def _(rows, weight):
    return rows.new_empty(rows.shape[0], weight.shape[0])


def _gradients(ctx, grad):
    rows, weight = ctx.saved_tensors
    for_rows = product(grad, weight.T) if ctx.needs_input_grad[0] else None
    return for_rows, product(grad.T, rows.T) if ctx.needs_input_grad[1] else None


product.register_autograd(_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
