"""Where autocast must not reach: losses, logits and coordinates stay in float32. And what is no number at all."""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainkit.errors import InputError


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raises InputError unless all values are finite: of NaN a detector silently finds nothing."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{what} are not finite; the run has diverged, or --amp fp16 is too narrow for its values")
