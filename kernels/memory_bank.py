"""The ring buffer of negatives (He et al., MoCo, section 3.2), without its random first content."""

import torch
from torch import nn


class MemoryBank(nn.Module):
    """The last `size` rows that were enqueued, oldest overwritten first.

    buffer: (size, dim) of `dtype`, zero until written; id_buffer: (size,) int64, -1 where no id was given; valid: 0-d
    int64, how many rows hold something, always the first ones. All three are fixed in shape and live on the device, so
    `contrastive_loss(bank=m.buffer, bank_valid=m.valid, bank_ids=m.id_buffer)` neither recompiles nor synchronises.
    The content is part of the state dict. Does no communication: under DDP the caller gathers, every rank enqueues the
    same rows in rank order, and buffers are not broadcast.
    """

    def __init__(self, size, dim, *, dtype=torch.float32, device=None):
        """size: rows; dim: width of a row. Raises ValueError when one is less than 1."""
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a memory bank needs a positive size and dim, got size={size}, dim={dim}")
        self.register_buffer("buffer", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("id_buffer", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("valid", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def enqueue(self, features, ids=None):
        """Write rows over the oldest ones. features: (B, dim), any B, cast to the buffer's dtype; ids: (B,) integers or
        None for -1. Of a batch larger than the bank the last `size` rows stay. Raises ValueError on other shapes."""
        size, dim = self.buffer.shape
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features must be (B, {dim}), got {tuple(features.shape)}")
        if ids is not None and (ids.shape != features.shape[:1] or ids.is_floating_point()):
            raise ValueError(f"ids must be ({len(features)},) integers, got {tuple(ids.shape)} {ids.dtype}")
        count = len(features)
        kept = min(count, size)
        row = (self.position + torch.arange(count - kept, count, device=self.buffer.device)) % size
        self.buffer.index_copy_(0, row, features[count - kept :].to(self.buffer))
        ids = self.id_buffer.new_full((kept,), -1) if ids is None else ids[count - kept :].to(self.id_buffer)
        self.id_buffer.index_copy_(0, row, ids)
        self.position.add_(count).remainder_(size)
        self.valid.add_(count).clamp_(max=size)

    @property
    def features(self):
        """A copy of the rows in use, (len(self), dim), in storage order."""
        return self.buffer[: len(self)].clone()

    @property
    def ids(self):
        """A copy of their ids, (len(self),) int64."""
        return self.id_buffer[: len(self)].clone()

    def __len__(self):
        return int(self.valid)
