"""What the Triton kernels need to know of the machine."""

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
