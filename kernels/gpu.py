"""What the Triton kernels need to know of the machine."""

from typing import NamedTuple

import torch
import triton

# How products run. UPCAST: in float32, for the interpreter. PRECISION, of float32: three TensorFloat-32 passes keep its
# accuracy; AMD's processors have exact products alone.
PRODUCTS = dict(UPCAST=triton.knobs.runtime.interpret, PRECISION="ieee" if torch.version.hip else "tf32x3")


class Launch(NamedTuple):
    """Block sizes of a kernel."""

    channels: int
    warps: int
    stages: int


def launch_for(table, device):
    """The entry of a table by architecture ("sm_90", "gfx942") for a device, "default" where it has none of its own."""
    if device.type != "cuda":
        return table["default"]
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return table.get(name, table["default"])
