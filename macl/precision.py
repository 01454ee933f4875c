"""Where autocast must not reach: losses, logits and coordinates stay in float32."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
