"""Which implementation an operator runs on."""

from importlib import import_module
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def resolve_backend(implementation, tensors):
    """ "triton" or "torch" for the `implementation` argument of an operator on `tensors`; raises where it cannot run.

    Triton's kernels sum in float32, so float64 always takes PyTorch.
    """
    device = tensors[0].device.type
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if implementation == "auto":
        return "triton" if device == "cuda" and HAS_TRITON and not double else "torch"
    if implementation not in ("triton", "torch"):
        raise ValueError(f'implementation must be "auto", "triton" or "torch", got {implementation!r}')
    if implementation == "triton":
        if double:
            raise ValueError('implementation="triton" sums in float32 and takes no float64 tensors')
        import triton

        if device != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(f'implementation="triton" needs tensors on a GPU, got {device}')
    return implementation


def engine(operator, backend):
    """The module of an operator's backend; triton is imported only where it is used."""
    return import_module(f"kernels.{operator}_{'cpu' if backend == 'torch' else backend}")


def operator(name, schema):
    """Registers a function as the operator macl_fgclip::name of a schema "(...) -> ...", and returns the operator.

    As `torch.library.custom_op`, without its check of every call for aliases, which headed a profile on an H100's host.
    """

    def register(function):
        torch.library.define(f"macl_fgclip::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"macl_fgclip::{name}", "default", function)
        return getattr(torch.ops.macl_fgclip, name).default

    return register


def described(tensor):
    """Shape, dtype and device of a tensor for an error message."""
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
