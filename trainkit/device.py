"""Where a batch is computed, and in which number format."""

import contextlib

import torch
from torch import Tensor

AUTOCAST = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # what --amp takes


def autocast(amp: str, device: torch.device | str):
    """The context of a forward pass. amp: a key of AUTOCAST."""
    dtype = AUTOCAST[amp]
    return torch.autocast(torch.device(device).type, dtype=dtype) if dtype else contextlib.nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others unchanged: losses, logits and coordinates."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device(batch, device: torch.device | str):
    """The batch with its tensors, also those in dicts and lists, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, list) else batch
