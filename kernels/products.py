"""Matrix products and transposed copies, fast on the CPU too.

Which library is fast there depends on the processor. On an AMD processor with AVX-512, which MKL leaves unused there,
oneDNN took 0.6 to 0.9 of the time of MKL, which is behind `torch.mm`; on one without AVX-512 1.1 to 1.4 of it.
Half-precision products run in float32, since most processors have no fast ones.
"""

import torch
import torch.nn.functional as F

from kernels.implementation import uncast

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"
LARGE = 2**23  # multiplications that make up for what oneDNN needs to start
COLUMNS = 2048  # transposed at once, so that the copy in between stays in the cache


def linear(rows, weight, bias=None):
    """(M, K), (N, K), (N,) or None -> rows @ weight.T + bias, (M, N). Autograd does not see it."""
    if rows.is_cpu and rows.dtype in (torch.float16, torch.bfloat16):
        return linear(rows.float(), weight.float(), None if bias is None else bias.float()).to(rows.dtype)
    large = rows.is_cpu and rows.dtype == torch.float32 and rows.shape[0] * weight.numel() >= LARGE
    with uncast(rows):
        if large and ONEDNN and torch.backends.mkldnn.enabled:
            return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # as compiled models call it
        return F.linear(rows, weight, bias)


@torch.library.custom_op("macl_fgclip::product", mutates_args=())
def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(M, K), (N, K) -> rows @ weight.T, (M, N), for backward passes: it refuses to be differentiated itself."""
    return linear(rows, weight)


@product.register_fake
def _(rows, weight):
    return rows.new_empty(rows.shape[0], weight.shape[0])


def transposed(matrices):
    """(N, A, B) -> (N, B, A), contiguous; the same memory where that is how it lies already.

    Taking the A channel groups of one pixel apart is this transposition, and for it PyTorch has vectorised code on the
    CPU: it took 0.4 to 0.6 of the time of a strided copy.
    """
    turned = matrices.transpose(1, 2)
    if turned.is_contiguous() or not matrices.is_cpu:
        return turned.contiguous()
    count, groups, size = matrices.shape
    pixels = matrices.contiguous().view(1, count, 1, groups * size)
    shuffled = torch.channel_shuffle(pixels.permute(0, 3, 1, 2), groups)  # (1, B * A, N, 1), channels-last
    return shuffled.permute(0, 2, 3, 1).reshape(count, size, groups)


def transpose_into(out, matrix):
    """Writes matrix (A, B) to out (B, A) of any dtype, some columns at a time, shared out among the threads."""
    if matrix.stride(0) == 1:
        out.copy_(matrix.t())
        return
    threads = torch.get_num_threads()
    for rows, columns in zip(out.split(COLUMNS), matrix.split(COLUMNS, 1), strict=True):
        parts = threads if len(rows) % threads == 0 else 1
        columns = columns.unflatten(1, (parts, -1)).transpose(0, 1)  # (parts, A, COLUMNS / parts)
        rows.unflatten(0, (parts, -1)).copy_(transposed(columns))
