"""Several processes as one: start-up, and the few collectives that training needs.

Without a process group every function returns what one process alone would see, so that callers need no second path.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from trainkit.device import at_least_float32
from trainkit.errors import InputError

_launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # the process of `torchrun`


def start(device: str, patience: timedelta | None = None) -> torch.device:
    """Join the process group that `torchrun` announces (nccl for cuda, gloo for cpu) and return this process's device.

    Without `torchrun` nothing is joined. patience: how long processes wait for each other, if not as long as torch has
    it. Raises InputError where `--device cuda` finds no GPU for this process.
    """
    place = torch.device(device)
    if device == "cuda":
        place, count = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this machine has no usable CUDA GPU; use --device cpu.")
        if place.index >= count:
            raise InputError(f"--device cuda: process {place.index} has no GPU, {count} are visible; use a smaller "
                             "--nproc-per-node.")  # fmt: skip
        torch.cuda.set_device(place)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        kind = dict(backend="nccl", device_id=place) if device == "cuda" else dict(backend="gloo")
        dist.init_process_group(**kind, timeout=patience)
    return place


def stop() -> None:
    """Leave the process group, where there is one. All ranks leave together."""
    if _together():
        dist.barrier()  # a rank whose DDP still talks to one that is gone aborts at its exit, now and then
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> bool:
    """Whether `torchrun` started this process."""
    return _launcher is not None


def orphaned() -> bool:
    """Whether the `torchrun` that started this process is gone. It can be killed so that it tells nobody."""
    return launched() and os.getppid() != _launcher


def rank() -> int:
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def parallel(model: nn.Module) -> nn.Module:
    """`model` in DistributedDataParallel, where there are several processes.

    Of its buffers only the running statistics of batch norms are sent from rank 0 before each forward. Others, such as
    memory banks, are the same on every rank already.
    """
    if not _together():
        return model
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    sent = {id(buffer) for norm in norms for buffer in norm.buffers()}
    # `broadcast_buffers` would be all or nothing, and is called otherwise from version to version.
    model._ddp_params_and_buffers_to_ignore = [name for name, it in model.named_buffers() if id(it) not in sent]
    return DistributedDataParallel(model)


def _wire() -> torch.device:
    """The device on which the backend moves tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_objects(obj) -> list:
    """Every rank's `obj` in rank order, on every rank; they travel pickled."""
    if not _together():
        return [obj]
    objects = [None] * world_size()
    dist.all_gather_object(objects, obj)
    return objects


def run_on_main(decide: Callable):
    """What `decide()` returns on rank 0, on every rank; its InputError or OSError is raised on every rank too.

    For questions to the file system, which two processes may see at different moments.
    """
    answer, error = None, None
    if is_main():
        try:
            answer = decide()
        except (InputError, OSError) as raised:
            error = raised
    if _together():
        box = [(answer, error)]
        dist.broadcast_object_list(box, src=0, device=_wire())
        answer, error = box[0]
    if error is not None:
        raise error
    return answer


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, as a new tensor of the same shape, dtype and device, without gradient."""
    if not _together():
        return tensor.detach().clone()
    total = tensor.detach().to(_wire(), copy=True).contiguous()
    dist.all_reduce(total)
    return total.to(tensor.device)


def all_reduce_any(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    return bool(all_reduce_sum(torch.tensor(int(flag))) > 0)


def in_step(batches: Iterable, count: int, between: Callable[[], None] | None) -> Iterator:
    """This rank's `count` batches, with `between()` after each, a collective: equally often on every rank.

    `between` may raise to end the work on all ranks at once. None: nothing is called.
    """
    between = between or (lambda: None)
    longest = max(gather_objects(count))
    for batch in batches:
        yield batch
        between()
    for _ in range(longest - count):
        between()


def gather(x: torch.Tensor) -> torch.Tensor:
    """The rows of every rank in rank order, without gradient: (n_r, ...) -> (sum of n_r, ...).

    The number of rows may differ between ranks and be 0; the other sizes and the dtype may not.
    """
    return gather_and_place(x.detach())[0]


def gather_and_place(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`gather` through which the gradient flows back, and which of the rows is this rank's first.

    Backward sums the gradient over the ranks and hands each rank its own rows. With losses as `global_mean` makes them,
    DistributedDataParallel's average is then the single process's gradient. Every rank takes part in backward, also one
    whose rows have no graph: the result must enter the loss on every rank, if only with a zero.
    """
    if not _together():
        return x, 0
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    header = torch.tensor([len(x), wants_gradient], device=_wire())
    headers = [torch.empty_like(header) for _ in range(world_size())]
    dist.all_gather(headers, header)
    counts, wanted = torch.stack(headers).T.tolist()
    first = sum(counts[: rank()])
    if not any(wanted):
        return _gather(x.detach(), counts), first
    return _GatherWithGradient.apply(x if wants_gradient else x.detach().requires_grad_(), counts), first


def _gather(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(n_r, ...) -> (sum of counts, ...): padded to the longest rank for the way, as a collective wants equal sizes."""
    padded = torch.zeros((max(counts), *x.shape[1:]), dtype=x.dtype, device=_wire())
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(x.device)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        return _gather(x, counts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        first = sum(ctx.counts[: rank()])
        total = all_reduce_sum(at_least_float32(gradient))  # else many half-precision gradients lose the small ones
        return total[first : first + ctx.counts[rank()]].to(gradient.dtype), None


def global_mean(total: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """The local sum times world size over the all-reduced count, so that unequal ranks average right under DDP.

    total: this rank's sum () with its graph. count: its number of terms, a number or a 0-d tensor.
    Where no rank has a term the result is an exact zero that is still connected to the graph of `total`.
    """
    terms = all_reduce_sum(torch.as_tensor(count, dtype=torch.float64, device=total.device))
    factor = torch.where(terms > 0, world_size() / terms, 0.0)
    return total * factor.to(total.dtype)
