"""What a step will take, reckoned from the model and the shapes of a batch before anything is computed.

The model runs on tensors without memory. Multiplications are counted as they would be made, forward and backward, and
the bytes of what autograd would keep between the two.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import stateless
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fgclip.model import FGCLIP
from trainkit.device import autocast

PEAK = dict(none=67e12, bf16=989e12, fp16=989e12)  # dense operations a second of an H100 SXM5, as NVIDIA states them
UTILISATION = 0.4  # the share of them that is assumed
STATE = dict(adamw=2, sgd=1)  # numbers that an optimizer keeps per parameter
INPUTS = ("pixels", "boxes", "short_texts", "short", "region", "hard", "long_texts", "long")
IMAGE_BYTES = 100_000  # that are assumed of a picture with its item


def cost(model: FGCLIP, batch: Mapping, *, amp: str, cached: bool = False) -> tuple[int, int]:
    """Floating-point operations of forward and backward, and the bytes kept between them.

    cached: as in `--cached-negatives`, in which the towers run twice.
    """
    fake, kept, counter = FakeTensorMode(), {}, FlopCounterMode(display=False)
    own = dict((*model.named_parameters(), *model.named_buffers()))
    with fake:
        state = {name: torch.empty(p.shape, dtype=p.dtype).requires_grad_(p.requires_grad) for name, p in own.items()}
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        inputs = tree_map_only(Tensor, lambda part: torch.empty(part.shape, dtype=part.dtype), inputs)
    weights = {tensor.untyped_storage()._cdata for tensor in state.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    without_memory = stateless._reparametrize_module(model, state)
    with fake, counter, without_memory, saved_tensors_hooks(keep, lambda tensor: tensor), autocast(amp, "cpu"):
        features = model([inputs] if cached else inputs)
        total = sum(feature.sum() for name, feature in features.items() if not name.startswith(("scale", "bias")))
        if total.requires_grad:
            total.backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def reckoning(
    model: FGCLIP, batch: Mapping, *, images: int, batches: int, world_size: int, amp: str,
    optimizer: str, average: bool, bank_bytes: int, cached: bool,
) -> list[str]:  # fmt: skip
    """Sentences on memory and time of a process with one H100 that trains on such batches.

    images: of an epoch. batches: micro-batches of a step. average: whether one of the weights is kept.
    """
    size, side = len(batch["pixels"]), batch["pixels"].shape[-1]
    texts = sum(batch[name].numel() for name in ("short_texts", "long_texts") if name in batch)
    tokens = (side // model.vision_model.patch_size) ** 2 + 1 + texts / size
    operations, kept = cost(model, batch, amp=amp)
    operations = cost(model, batch, amp=amp, cached=True)[0] if cached else operations
    whole = 4 * sum(p.numel() for p in model.parameters())
    learning = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = dict(weights=whole, average=whole * average, gradients=learning * (1 + (world_size > 1)))
    memory |= {optimizer: learning * STATE[optimizer], "banks": bank_bytes, "kept for the backward": kept}
    parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
    rate = UTILISATION * PEAK[amp] / (operations / size) * world_size  # images a second
    together = size * batches * world_size
    return [
        f"reckoned by the shapes of one batch, not measured: {tokens:.0f} tokens and {operations / size / 1e9:.1f} "
        "GFLOP per image",
        f"memory of a process in GiB: {parts}; {sum(memory.values()) / 2**30:.1f} together, beside what is computed in "
        "passing",
        f"at {UTILISATION:.0%} of an H100's {PEAK[amp] / 1e12:.0f} TFLOP/s, times {world_size}: {rate:.4g} images and "
        f"{rate * tokens:.4g} tokens a second, {rate * IMAGE_BYTES / 1e6:.4g} MB/s of data at 100 kB an image",
        f"an epoch of {images} images: {max(1, images // together)} steps of {together}, {images / rate / 3600:.3g} "
        "hours",
    ]
