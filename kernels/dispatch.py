"""Which backend an operator runs on, and with which casts."""

from contextlib import nullcontext
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def resolve_backend(implementation, tensors):
    """ "triton" or "torch" for the `implementation` argument of an operator on `tensors`; raises where it cannot run.

    Triton's kernels sum in float32, so float64 always takes PyTorch.
    """
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f'implementation must be "auto", "triton" or "torch", got {implementation!r}')
    device = tensors[0].device.type
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if implementation == "auto":
        return "triton" if device == "cuda" and HAS_TRITON and not double else "torch"
    if implementation == "triton":
        if not HAS_TRITON:
            raise ValueError('implementation="triton" needs the triton package, which is not installed here')
        if double:
            raise TypeError('implementation="triton" sums in float32 and takes no float64 tensors')
        if device != "cuda" and not _interpreted():
            raise ValueError(f'implementation="triton" needs tensors on a GPU, got {device}')
    return implementation


def no_autocast(tensor):
    """A context in which autocast leaves everything on the tensor's device as it is."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _interpreted():
    """Whether Triton runs its kernels in its interpreter, which takes tensors of the CPU."""
    import triton

    return triton.knobs.runtime.interpret
