"""FineHARD's items with their pictures in shards: tar files in the form of WebDataset, read by place.

A sample is KEY.json, an item of docs/fgclip.md, and KEY.jpg or another picture. So each sample has an index, and the
order of an epoch, what each process reads, and where a resumed run goes on are those of `trainkit.sampler`.
"""

import contextlib
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from fgclip.data.dataset import RegionDataset, Sample
from fgclip.data.records import FineHARD, JsonItems, Record
from trainkit.errors import InputError
from trainkit.files import is_image, reason, regular_file, whole_file

EXPECTED = "a shard, a tar file that is not compressed"


def expand(pattern: str) -> list[Path]:
    """ "data-{000..007}.tar" to eight paths."""
    before, *braces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern, maxsplit=1)
    if not braces:
        return [Path(pattern)]
    first, last, after = braces
    numbers = range(int(first), int(last) + 1)
    return [path for n in numbers for path in expand(f"{before}{n:0{len(first)}}{after}")]


def index_shard(path: Path) -> np.ndarray:
    """Offset and length in bytes of the item and of the picture of every sample, (n, 4) int64; 0 what is not there.

    Read from the .index.npy beside the shard where that is of a file of this size. Raises InputError, which names the
    shard, where it is no tar file or not whole.
    """
    size, beside = regular_file(path, EXPECTED).stat().st_size, path.with_suffix(".index.npy")
    with contextlib.suppress(OSError, ValueError, EOFError, IndexError):  # not there or damaged: it is made anew
        saved = np.load(beside)
        if saved.dtype == np.int64 and saved.shape[1:] == (4,) and saved[0, 0] == size:
            return saved[1:]
    samples = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.size < 0:
                    raise tarfile.ReadError("a length below 0")
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if member.isreg() and (kind == "json" or is_image(f"a.{kind}")):
                    place = 0 if kind == "json" else 2
                    samples.setdefault((folder, key), [0] * 4)[place : place + 2] = member.offset_data, member.size
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut short at byte {archive.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read to its end ({reason(error)}); expected {EXPECTED}") from error
    return np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4)


def save_index(path: Path) -> None:
    """Writes the index of a shard beside it."""
    index = index_shard(path)
    with whole_file(path.with_suffix(".index.npy")) as file:
        np.save(file, np.concatenate([[[path.stat().st_size, 0, 0, 0]], index]))


class Shards(FineHARD):
    """The records in shards that are named by patterns of `expand`. A damaged one has no image, its source says why."""

    def __init__(self, patterns: Sequence[str]):
        self.items = JsonItems([path for pattern in patterns for path in expand(pattern)], index_shard)

    def __getitem__(self, index: int) -> Record:
        path, span, _ = self.items.locate(index)
        try:
            return replace(super().__getitem__(index), stored=(path, *span[2:].tolist()))
        except InputError as error:
            return Record("", source=str(error))

    def image(self, index: int) -> str:
        """The place of a sample, each of which counts as an image of its own."""
        return self.items.locate(index)[2]


def lengths_of(records: Shards | Subset) -> list[int]:
    """How many of the records of `Shards` each shard has."""
    whole = records if isinstance(records, Shards) else records.dataset
    return np.histogram(getattr(records, "indices", range(len(records))), whole.items.starts)[0].tolist()


def sound(records: Sequence[Record]) -> list[Record]:
    """Those whose pictures can be read."""
    kept = []
    for index in range(len(records)):
        with contextlib.suppress(InputError):
            record = records[index]
            record.picture(Path())
            kept.append(record)
    return kept


class ShardDataset(RegionDataset):
    """`RegionDataset` in which the place of a damaged sample is taken by the InputError that says why."""

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | InputError:
        try:
            return super().__getitem__(key)
        except InputError as error:
            return error
