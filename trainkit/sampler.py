"""Which samples come when: the same order on every rank and after every resume."""

from collections.abc import Iterator, Sequence

import numpy as np

from trainkit import distributed
from trainkit.errors import InputError


class ResumableSampler:
    """Batches of `(epoch, index)` keys for `DataLoader(batch_sampler=...)`, from any place in an epoch.

    The order of an epoch is a permutation drawn from (seed, epoch). A step takes the next batch_size * world_size
    entries, and each rank its slice of them. What does not fill a step is left out; a smaller set is repeated to do so.
    The epoch in the key is for augmentation, which draws from (seed, epoch, index).

    Only `advance` moves the position in `state_dict`: what workers fetched ahead was not trained on yet. After an
    epoch's last batch the position stays at its end, so that a run resumed there validates first.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int):
        if length < 1:
            raise InputError("the training set is empty; expected at least one sample.")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.world_size = distributed.world_size()
        self.epoch = self.position = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return max(1, self.length // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        """Batches left in this epoch, which is what the next iteration gives."""
        return self.steps_per_epoch - self.position

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def advance(self, batches: int = 1) -> None:
        """Count batches that were trained on."""
        self.position += batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, size = self.epoch, self.batch_size * self.world_size
        order = np.resize(self._order(), max(self.length, size))
        for step in range(self.position, self.steps_per_epoch):
            entries = order[step * size + distributed.rank() * self.batch_size :][: self.batch_size]
            yield [(epoch, int(index)) for index in entries]

    def _order(self) -> np.ndarray:
        """The data set's indices in the order of this epoch."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.length)

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position, **self._recipe()}

    def _recipe(self) -> dict:
        return {name: getattr(self, name) for name in ("length", "seed", "batch_size", "world_size")}

    def load_state_dict(self, state: dict) -> None:
        """Go to the place in `state`. Raises InputError where it belongs to another order of the data."""
        for name, value in self._recipe().items():
            if state.get(name) != value:
                change = f"its {name.replace('_', ' ')} was {state.get(name)}, now it is {value}"
                raise InputError(f"the place in the data is lost: {change}; resume with the same, or use --init-from.")
        self.epoch, self.position = state["epoch"], state["position"]


class BalancedSampler(ResumableSampler):
    """ResumableSampler over two data sets laid end to end; every batch holds the same shares of both.

    An epoch is one pass over the first data set, with entries of the second spread evenly to make up `share` of it.
    These go through one permutation of the second data set after another, across epochs.
    """

    def __init__(self, lengths: tuple[int, int], batch_size: int, *, share: float, seed: int):
        self.lengths, self.share = tuple(lengths), share
        self.others = max(1, round(lengths[0] * share / (1 - share)))  # entries of the second data set per epoch
        super().__init__(lengths[0] + self.others, batch_size, seed=seed)

    def _order(self) -> np.ndarray:
        first, second = self.lengths
        start = self.epoch * self.others
        passes = range(start // second, (start + self.others - 1) // second + 1)
        stream = [np.random.default_rng((self.seed, number, second)).permutation(second) for number in passes]
        others = np.concatenate(stream)[start - passes[0] * second :][: self.others] + first
        places = np.arange(1, self.length + 1) * self.others // self.length  # others up to and with each place
        is_other = np.diff(places, prepend=0).astype(bool)
        order = np.empty(self.length, dtype=np.int64)
        order[is_other] = others
        order[~is_other] = np.random.default_rng((self.seed, self.epoch)).permutation(first)
        return order

    def _recipe(self) -> dict:
        return super()._recipe() | {"lengths": list(self.lengths), "share": self.share}


class AlternatingSampler(ResumableSampler):
    """ResumableSampler over samples of two labels that take turns. An epoch goes once through the rarer label.

    labels: whether each sample has the second label; with both there has to be at least one.
    """

    def __init__(self, labels: Sequence[bool], batch_size: int, *, seed: int):
        self.kinds = [np.flatnonzero(np.asarray(labels, dtype=bool) == kind) for kind in (False, True)]
        super().__init__(2 * min(map(len, self.kinds)), batch_size, seed=seed)

    def _order(self) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.epoch))
        return np.stack([rng.permutation(kind)[: self.length // 2] for kind in self.kinds], axis=1).ravel()

    def _recipe(self) -> dict:
        return super()._recipe() | {"labels": [len(kind) for kind in self.kinds]}


class ShardSampler(ResumableSampler):
    """ResumableSampler over files of so many samples each, laid end to end, that are read nearly in a row.

    The files come in an order drawn from (seed, epoch). Of the row of their samples each rank gets a share of its own,
    the same number for all, so that it reads whole files but for those where shares meet. Within its share a sample
    comes less than `buffer` places before or after its turn.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, buffer: int, seed: int):
        self.lengths, self.buffer = list(lengths), buffer
        super().__init__(sum(lengths), batch_size, seed=seed)

    def _order(self) -> np.ndarray:
        rng, size = np.random.default_rng((self.seed, self.epoch)), self.batch_size * self.world_size
        files = np.split(np.arange(self.length), np.cumsum(self.lengths)[:-1])
        row = np.concatenate([files[i] for i in rng.permutation(len(files))])
        shares = np.resize(row, max(self.length, size) // self.world_size * self.world_size)
        shares = shares.reshape(self.world_size, -1)
        turns = np.arange(shares.shape[1]) + rng.uniform(0, self.buffer, shares.shape)
        shares = np.take_along_axis(shares, turns.argsort(axis=1), axis=1)
        whole = self.steps_per_epoch * self.batch_size
        return shares[:, :whole].reshape(self.world_size, -1, self.batch_size).swapaxes(0, 1).ravel()

    def _recipe(self) -> dict:
        return super()._recipe() | {"buffer": self.buffer, "lengths": self.lengths}
