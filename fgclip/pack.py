"""Pack annotations and their pictures into shards: tar files of KEY.json and KEY.jpg, which WebDataset reads too.

python -m fgclip.pack --annotations FineHARD/jsonfiles --image-root FineHARD --output shards
python train_fgclip.py --shards 'shards/data-{000000..001199}.tar' --init-from WEIGHTS

KEY is the number of the item in the annotations. Pictures are copied as they are.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fgclip.data.records import FineHARD
from fgclip.data.shards import save_index
from trainkit.arguments import make_parser, non_negative_int, positive_int
from trainkit.errors import InputError, one_sentence
from trainkit.files import inside, is_image, picture_size, whole_file


def samples(
    records: FineHARD, indices: Iterable[int], args: argparse.Namespace, damaged: list[str]
) -> Iterator[dict[str, bytes]]:
    """The files of each item by their names. What is wrong with an item goes to `damaged`."""
    for index in indices:
        try:
            item, source = records.items[index]
            path = inside(Path(args.image_root), records.record(item, source).image, source)
            if not is_image(path):
                raise InputError(f"{source}: {path} has no suffix of a picture")
            picture_size(path)
        except InputError as error:
            damaged.append(str(error))
            if len(damaged) > args.max_damaged:
                raise InputError(f"{error}; --max-damaged {args.max_damaged}") from error
            continue
        yield {f"{index:09}.json": json.dumps(item).encode(), f"{index:09}{path.suffix.lower()}": path.read_bytes()}


def write_shard(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    """A tar file of the samples' files, whole or not at all, with its index beside it."""
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for sample in samples:
            for name, content in sample.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    save_index(path)


def pack(args: argparse.Namespace) -> tuple[int, list[str]]:
    """Writes all shards. Returns their number, and what is wrong with the items that were left out."""
    records, damaged = FineHARD(args.annotations), []
    order = np.random.default_rng(args.seed).permutation(len(records))
    shards = np.array_split(order, -(-len(order) // args.per_shard) or 1)
    indices = iter(tqdm(order.tolist(), unit="item", dynamic_ncols=True, disable=None))
    for number, part in enumerate(shards):
        found = samples(records, islice(indices, len(part)), args, damaged)
        write_shard(Path(args.output) / f"data-{number:06}.tar", found)
    return len(shards), damaged


def main(arguments: list[str] | None = None) -> None:
    """Pack, and say what was left out. arguments: without the program's name."""
    parser = make_parser(__doc__)
    # fmt: off
    add = parser.add_argument
    add("--annotations", required=True, metavar="PATH", help="file, folder or list of files in FineHARD's form")
    add("--image-root", required=True, metavar="PATH", help="folder that the paths in the annotations start from")
    add("--output", required=True, metavar="DIR", help="folder to write data-000000.tar, ... to, with an index of each")
    add("--per-shard", type=positive_int, default=10_000, metavar="N", help="samples in a shard, at most")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="seed of the order in which items are packed")
    add("--max-damaged", type=non_negative_int, default=0, metavar="N", help="items that may be left out, because "
        "their picture cannot be read or they have another form")
    # fmt: on
    args = parser.parse_args(arguments)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: expected a new or an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    count, damaged = pack(args)
    print("".join(f"left out: {sentence}\n" for sentence in damaged), end="")
    print(f"train with --shards '{output}/data-{{000000..{count - 1:06}}}.tar'")


if __name__ == "__main__":
    with one_sentence():
        main()
