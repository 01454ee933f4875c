"""Losses that align the distributions of two domains' features, for a loop of your own.

The training scripts use neither: no run showed either to help (docs/detector.md). They adapt to a domain without labels
by self-training (`macl.teacher`).
"""

import torch
from torch import Tensor, nn

from trainkit.device import at_least_float32


def mmd(x: Tensor, y: Tensor, sigmas: list[float] | Tensor, unbiased: bool = True) -> Tensor:
    """Squared maximum mean discrepancy between two samples (Gretton et al., JMLR 2012).

    x: (N, D). y: (M, D).
    sigmas: bandwidths in the units of x; the kernel is the mean of exp(-|a - b|^2 / (2 sigma^2)) over them.
    unbiased: MMD_u^2 (equation 3), which may be negative; else MMD_b^2 (equation 5).

    -> (), float32 at least; exactly 0 but connected with fewer than two rows (biased: one) on either side.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    if min(len(x), len(y)) < (2 if unbiased else 1):
        return (x.sum() + y.sum()) * 0
    scales = 2 * torch.as_tensor(sigmas, dtype=x.dtype, device=x.device).square()

    def mean_kernel(a: Tensor, b: Tensor, *, without_diagonal: bool) -> Tensor:
        squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        kernel = sum((-squared / scale).exp() for scale in scales) / len(scales)  # (len(a), len(b))
        if not without_diagonal:
            return kernel.mean()
        return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))

    within = mean_kernel(x, x, without_diagonal=unbiased) + mean_kernel(y, y, without_diagonal=unbiased)
    return within - 2 * mean_kernel(x, y, without_diagonal=False)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return -ctx.scale * gradient, None


def gradient_reversal(x: Tensor, scale: float) -> Tensor:
    """x as it is; its gradient times -scale (Ganin et al., JMLR 2016, section 4.2). x: any shape."""
    return _Reverse.apply(x, scale)


class DomainClassifier(nn.Module):
    """Classifier of domains behind a gradient reversal, which makes the features lose what it uses."""

    def __init__(self, in_dim: int, hidden: int = 128, domains: int = 2, dropout: float = 0.5):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, domains))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x: (N, in_dim), or (N, in_dim, H, W) to be averaged. scale: of the reversed gradient. -> (N, domains)."""
        if x.dim() == 4:
            x = x.mean(dim=(2, 3))
        return self.fc(gradient_reversal(x, scale))
