"""Features of images and boxes that are kept in a folder, so that another task on the images need not make them."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fgclip.data import RegionDataset, Sample
from fgclip.embedding import Embedder
from fgclip.weights import IMAGE_PARTS, weights_hash  # noqa: F401
from trainkit import distributed
from trainkit.files import read_torch, regular_file, whole_file


class CachedEmbedder(Embedder):
    """`Embedder` with the features of pictures in `folder`/HASH OF THE WEIGHTS/*.pt; new ones are added there.

    A picture is known by its path, size and time of change, with the side and cut in which it is shown, and boxes.
    """

    def __init__(self, *arguments, folder: str | Path, **options):
        super().__init__(*arguments, **options)
        self.folder, self.rows = Path(folder) / weights_hash(self.model), {}
        for path in distributed.run_on_main(lambda: sorted(self.folder.glob("*.pt"))):
            content = read_torch(path, "features of images")
            self.rows |= dict(zip(content["keys"], content["rows"].split(content["counts"]), strict=True))

    def key(self, data: RegionDataset, sample: Sample, boxes: bool) -> str:
        path = os.path.realpath(data.image_root / sample.record.image)
        state = regular_file(path, f"a picture, named by {sample.record.source}").stat()
        shown = f"{data.image_size} {data.crop} {self.amp} {sample.boxes.tolist() if boxes else ''}"
        return hashlib.sha256(f"{path} {state.st_size} {state.st_mtime_ns} {shown}".encode()).hexdigest()

    def images(self, dataset: Dataset, regions: bool = False) -> tuple[Tensor, Tensor]:
        """As `Embedder.images`, but of kept embeddings where there are some."""
        if not isinstance(dataset, RegionDataset):
            return super().images(dataset, regions)
        samples = [dataset.describe(i) for i in range(len(dataset))]
        kinds = (False, True) if regions else (False,)
        keys = [[self.key(dataset, sample, kind) for sample in samples] for kind in kinds]
        missing = [i for i in range(len(samples)) if any(names[i] not in self.rows for names in keys)]
        if missing:
            found = super().images(Subset(dataset, missing), regions)
            counts = ([1] * len(missing), [len(samples[i].boxes) for i in missing])
            for names, rows, count in zip(keys, found, counts, strict=False):
                self.keep([names[i] for i in missing], rows, count)
        whole = [torch.cat([self.rows[name] for name in names]) for names in keys]
        return whole[0], whole[1] if regions else whole[0][:0]

    def keep(self, keys: list[str], rows: Tensor, counts: list[int]) -> None:
        """Adds rows (sum of counts, D) to what is known, and writes them."""
        self.rows |= dict(zip(keys, rows.split(counts), strict=True))
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(" ".join(keys).encode()).hexdigest()
            with whole_file(self.folder / f"{name}.pt") as file:
                torch.save(dict(keys=keys, rows=rows, counts=counts), file)
