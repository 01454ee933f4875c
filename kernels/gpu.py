"""What the Triton kernels need to know of the machine."""

import functools

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
# How float32 products run: three TensorFloat-32 passes keep float32's accuracy; AMD's processors have exact ones alone.
PRECISION = "ieee" if torch.version.hip else "tf32x3"


def architecture(device):
    """A GPU's architecture as compilers name it, "sm_90" or "gfx942"; "default" for any other device."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def launch_for(table, device):
    """The entry of a table by architecture for a device, "default" where it has none of its own."""
    return table.get(architecture(device), table["default"])


def on_its_device(function):
    """A function that launches kernels, which Triton does on the current GPU, on that of its first argument instead:
    a tensor, or a list or tuple that starts with one."""

    @functools.wraps(function)
    def launch(first, *others, **options):
        with torch.cuda.device_of(first if isinstance(first, torch.Tensor) else first[0]):
            return function(first, *others, **options)

    return launch
