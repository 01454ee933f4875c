"""Batches from loading processes: each comes in one piece of shared memory, behind one file descriptor.

torch takes a descriptor per tensor: 256 for 32 image pairs, where a process may usually have 1024.
"""

import functools
import io
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.errors import LOST_PROCESS, InputError, lost_process

ALIGNMENT = 64  # bytes; where a tensor may begin
SMALL = 2**16  # bytes; smaller tensors are copied out, so that who keeps one does not keep its whole batch


def ignore_signals(worker: int) -> None:
    """Workers ignore SIGINT and SIGTERM of terminals and batch systems, and exit only when their parent says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    loading = multiprocessing.parent_process().pid  # not the parent where a server forks the workers

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (loading, os.getppid()):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def make_loader(
    dataset: Dataset, batches: Iterable[list], collate: Callable[[list], object], *, workers: int = 0,
    device: torch.device | str = "cpu",
) -> DataLoader:  # fmt: skip
    """Loads `batches`, lists of the data set's keys, in `workers` processes that live as long as the loader.

    collate: a list of samples to a batch. Iterating does not change the caller's random state. Raises InputError where
    a process is lost.
    """
    return _Loader(
        dataset, batch_sampler=batches, collate_fn=functools.partial(_pack, collate) if workers else collate,
        num_workers=workers, persistent_workers=workers > 0, worker_init_fn=ignore_signals,
        pin_memory=torch.device(device).type == "cuda", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


class _Loader(DataLoader):
    def __iter__(self) -> Iterator:
        try:
            # Processes start with the signals blocked: one that came before `ignore_signals` would end them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            try:
                batches = super().__iter__()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for batch in batches:
                yield _Unpickler(batch).load() if isinstance(batch, _Packed) else batch
        except Exception as error:
            if not self.num_workers or (sentence := lost_process(error)) is None:
                raise
            raise InputError(sentence) from error


class _Packed(NamedTuple):
    """A batch as bytes: its tensors in `buffer`, all else, and where each tensor lies, in `structure`."""

    structure: bytes
    buffer: Tensor  # (bytes,) uint8

    def pin_memory(self) -> "_Packed":
        return _Packed(self.structure, self.buffer.pin_memory())


def _pack(collate: Callable[[list], object], samples: list) -> _Packed:
    pickler = _Pickler()
    pickler.dump(collate(samples))
    buffer = _shared_memory(pickler.size)
    for place, tensor in pickler.tensors:
        _view(buffer, place, tensor.dtype, tensor.shape).copy_(tensor)
    return _Packed(pickler.file.getvalue(), buffer)


class _Pickler(pickle.Pickler):
    """Leaves tensors out: `tensors`, with their places in a buffer of `size` bytes."""

    def __init__(self):
        self.file, self.tensors, self.size = io.BytesIO(), [], 0
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, value):
        if type(value) is not Tensor or value.layout is not torch.strided:
            return None
        place = self.size
        self.tensors.append((place, value))
        self.size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        return place, value.dtype, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: _Packed):
        super().__init__(io.BytesIO(packed.structure))
        self.buffer = packed.buffer

    def persistent_load(self, key: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        tensor = _view(self.buffer, *key)
        return tensor.clone() if tensor.nbytes < SMALL else tensor


def _view(buffer: Tensor, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return buffer[place : place + size].view(dtype).view(shape)


def _shared_memory(size: int) -> Tensor:
    """(size,) uint8, not initialised. Raises InputError where there is no room for it."""
    try:
        storage = torch.UntypedStorage._new_shared(max(size, 1))  # as torch's own collate function does
        if torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
            os.posix_fallocate(storage._share_fd_cpu_()[0], 0, size or 1)  # else writing to what is not there kills
    except (OSError, RuntimeError, MemoryError) as error:
        raise InputError(LOST_PROCESS.format(f"no shared memory for a batch of {size / 2**20:.0f} MiB")) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)[:size]
