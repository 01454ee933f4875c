"""Unit features of the images, boxes and texts of a whole data set, the work shared among the processes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import trainkit.distributed as distributed
from fgclip.batches import Sample, Texts, usable_regions
from fgclip.data import Record
from fgclip.images import preprocess
from fgclip.model import FGCLIP, unit
from fgclip.tokenizer import Tokenizer
from trainkit.device import autocast, to_device
from trainkit.errors import InputError
from trainkit.loader import make_loader


class Views(Dataset):
    """What a model looks at in each record: pixels (3, S, S) and the usable boxes (n, 4) of its regions.

    crop: scale the short side and keep the centre, as CLIP does, instead of squashing the image; then without boxes.
    """

    def __init__(self, records: Sequence[Record], image_root: str | Path, *, image_size: int, crop: bool = False):
        self.records, self.image_root = records, Path(image_root)
        self.image_size, self.crop = image_size, crop

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        record = self.records[index]
        boxes = torch.empty(0, 4) if self.crop else usable_regions(record)[0]
        return preprocess(record.picture(self.image_root), self.image_size, self.crop), boxes


def collate(samples: Sequence[Sample | tuple[Tensor, Tensor]]) -> dict:
    """The part of `FGCLIP.forward`'s batch that comes from images."""
    pairs = [(s.pixels, s.boxes) if isinstance(s, Sample) else s for s in samples]
    return dict(pixels=torch.stack([pixels for pixels, _ in pairs]), boxes=[boxes for _, boxes in pairs])


class Embedder:
    """A model that looks at data sets. Every method returns float32 on the CPU, the same on every process.

    batch_size: images or texts at once. workers: loading processes. amp: a key of AUTOCAST.
    """

    def __init__(
        self,
        model: FGCLIP,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        workers: int = 0,
        amp: str = "none",
    ):
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, torch.device(device)
        self.batch_size, self.workers, self.amp = batch_size, workers, amp
        self.truncated = 0  # distinct texts that were cut

    def autocast(self):
        return autocast(self.amp, self.device)

    @torch.inference_mode()
    def images(self, dataset: Dataset, regions: bool = False) -> tuple[Tensor, Tensor]:
        """Unit features of the images (N, D) and, with `regions`, of their boxes (R, D), images in order.

        dataset: `Views`, or of samples. Each image is read and encoded on one process.
        """
        own = torch.arange(distributed.rank(), len(dataset), distributed.world_size())
        batches = [part.tolist() for part in own.split(self.batch_size)] if len(own) else []
        images, boxes, counts = [self.nothing()], [self.nothing()], []
        for batch in make_loader(dataset, batches, collate, workers=self.workers, device=self.device):
            inputs = dict(pixels=to_device(batch["pixels"], self.device))
            if regions:
                inputs["boxes"] = batch["boxes"]
                counts += map(len, batch["boxes"])
            with self.autocast():
                features = self.model(inputs)
            images.append(unit(features["image"]).cpu())
            if regions:
                boxes.append(unit(features["regions"]).cpu())
        owner = own.repeat_interleave(torch.tensor(counts)) if counts else own[:0]
        image, region = _in_order(torch.cat(images), own), _in_order(torch.cat(boxes), owner)
        return self.finite(image, "images"), self.finite(region, "boxes")

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], long: bool = False) -> Tensor:
        """Unit features (M, D), each distinct text encoded once, so that equal texts are exactly equal.

        long: use the long path. Texts beyond its length are cut and counted in `truncated`.
        """
        tower = self.model.text_model
        distinct = Texts()
        rows = distinct.index(texts)  # (M,)
        before = self.tokenizer.truncated
        tokens, _ = distinct.tokens(self.tokenizer, tower.long_context_length if long else tower.context_length)
        self.truncated += self.tokenizer.truncated - before
        ends = (tokens == self.tokenizer.eos_id).int().argmax(dim=1)
        order = ends.argsort(stable=True)  # texts of like length together, so that little padding is encoded
        own, found = order[distributed.rank() :: distributed.world_size()], [self.nothing()]
        for part in own.split(self.batch_size):
            with self.autocast():
                features = self.model.encode_text(tokens[part, : int(ends[part].max()) + 1].to(self.device), long=long)
            found.append(unit(features).cpu())
        return self.finite(_in_order(torch.cat(found), own)[rows], "texts")

    def nothing(self) -> Tensor:
        return torch.empty(0, self.model.visual_projection.out_features)

    def finite(self, features: Tensor, what: str) -> Tensor:
        if not features.isfinite().all():
            source = self.model.load_report.source if hasattr(self.model, "load_report") else "the model"
            raise InputError(
                f"{source}: the features of some {what} are not finite; the weights are damaged, or --amp is too narrow"
            )
        return features


def _in_order(rows: Tensor, places: Tensor) -> Tensor:
    """The rows (n, D) of every process, sorted by their places (n,)."""
    return distributed.gather(rows)[distributed.gather(places).argsort(stable=True)]
