"""Which samples come when: the same order on every rank and after every resume."""

from collections.abc import Iterator

import numpy as np

from trainkit import distributed
from trainkit.errors import InputError


class ResumableSampler:
    """Batches of `(epoch, index)` keys for `DataLoader(batch_sampler=...)`, from any place in an epoch.

    The order of an epoch is a permutation drawn from (seed, epoch). Each step takes the next batch_size * world_size
    entries of it, and each rank its slice of them. The key carries the epoch to the data set, whose augmentation is to
    draw from (seed, epoch, index). Give the DataLoader a `generator` of its own: each new iterator draws a number from
    it, and from the global one a run resumed within an epoch would draw one more than a run in one go.

        loader = DataLoader(data, batch_sampler=sampler, generator=torch.Generator())
        for epoch in range(sampler.epoch, epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                ...
                sampler.advance()

    Only `advance` moves the position that `state_dict` tells: what workers fetched ahead was not trained on yet.
    After the last batch of an epoch the position stays at its end, so that a run resumed there validates first.

    drop_last=False shares the remainder of an epoch out evenly, at least one entry a rank. With drop_last a set smaller
    than one global batch is repeated to fill one rather than giving none.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
    ):
        if length < 1:
            raise InputError("the training set is empty; expected at least one sample.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.epoch = self.position = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return max(1, whole) if self.drop_last else whole + bool(rest)

    def __len__(self) -> int:
        """Batches left in this epoch, which is what the next iteration gives."""
        return self.steps_per_epoch - self.position

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def advance(self, batches: int = 1) -> None:
        """Count batches that were trained on."""
        if self.position + batches > self.steps_per_epoch:
            raise ValueError(f"an epoch has {self.steps_per_epoch} batches, {self.position + batches} were counted.")
        self.position += batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self._order()
        for step in range(self.position, self.steps_per_epoch):
            size = self.batch_size * self.world_size
            entries = order[step * size : (step + 1) * size]
            first, last = (r * len(entries) // self.world_size for r in (self.rank, self.rank + 1))
            yield [(epoch, int(index)) for index in entries[first:last]]

    def _order(self) -> np.ndarray:
        """Dataset indices of this epoch, wrapped round where the last step would lack some."""
        order = self._shuffled() if self.shuffle else np.arange(self.length)
        size = self.batch_size * self.world_size
        if self.drop_last:
            return np.resize(order, max(self.length, size))
        rest = self.length % size
        return np.resize(order, self.length + max(0, self.world_size - rest)) if rest else order

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.length)

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position, **self._recipe()}

    def _recipe(self) -> dict:
        names = ("length", "seed", "batch_size", "world_size", "shuffle", "drop_last")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Go to the place that `state` tells. Raises InputError where it belongs to another order of the data."""
        for name, value in self._recipe().items():
            if state.get(name) != value:
                raise InputError(
                    f"the checkpoint's place in the data cannot be found again: its {name.replace('_', ' ')} was "
                    f"{state.get(name)}, now it is {value}; resume with the same, or begin a new run with --init-from."
                )
        self.epoch, self.position = state["epoch"], state["position"]


class BalancedSampler(ResumableSampler):
    """ResumableSampler over two data sets laid end to end, of which every batch holds the same shares.

    An epoch is one pass over the first data set, `lengths[0]` entries, among which those of the second are spread
    evenly, so that they make up `share` of each stretch of the order. They go on, epoch after epoch, through one
    permutation of the second data set after another, however large or small it is.
    """

    def __init__(self, lengths: tuple[int, int], batch_size: int, *, share: float, seed: int, **options):
        """options: rank, world_size and drop_last of ResumableSampler; the order is always shuffled."""
        if not 0 < share < 1:
            raise ValueError(f"share must be above 0 and below 1, not {share}.")
        self.lengths, self.share = tuple(lengths), share
        self.others = max(1, round(lengths[0] * share / (1 - share)))  # entries of the second data set an epoch
        super().__init__(lengths[0] + self.others, batch_size, seed=seed, **options)

    def _shuffled(self) -> np.ndarray:
        first, second = self.lengths
        own = np.random.default_rng((self.seed, self.epoch)).permutation(first)
        start = self.epoch * self.others
        passes = range(start // second, (start + self.others - 1) // second + 1)
        stream = [np.random.default_rng((self.seed, number, second)).permutation(second) for number in passes]
        others = np.concatenate(stream)[start - passes[0] * second :][: self.others] + first
        places = np.arange(1, self.length + 1) * self.others // self.length  # others up to and with each place
        order = np.empty(self.length, dtype=np.int64)
        is_other = np.diff(places, prepend=0).astype(bool)
        order[is_other], order[~is_other] = others, own
        return order

    def _recipe(self) -> dict:
        return super()._recipe() | {"lengths": list(self.lengths), "share": self.share}


def evaluation_indices(length: int) -> list[int]:
    """This rank's share of 0 .. length - 1; over all ranks each index exactly once, unpadded."""
    return list(range(distributed.rank(), length, distributed.world_size()))
