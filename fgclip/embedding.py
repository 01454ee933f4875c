"""Unit features of the images, boxes and texts of a whole data set, the work shared among the processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

import trainkit.distributed as distributed
from fgclip.data import Sample, Texts
from fgclip.model import FGCLIP, l2_normalize
from fgclip.tokenizer import Tokenizer
from trainkit.device import autocast, to_device
from trainkit.errors import InputError
from trainkit.loader import make_loader


def collate(samples: Sequence[Sample]) -> dict:
    """The part of `FGCLIP.forward`'s batch that comes from images."""
    return dict(pixels=torch.stack([s.pixels for s in samples]), boxes=[s.boxes for s in samples])


class Embedder:
    """A model that looks at data sets. Every method returns float32 on the CPU, the same on every process.

    batch_size: images or texts at once. workers: loading processes. amp: a key of AUTOCAST.
    between: called after every batch, see `distributed.in_step`.
    """

    def __init__(
        self, model: FGCLIP, tokenizer: Tokenizer, *, device: torch.device | str = "cpu", batch_size: int = 32,
        workers: int = 0, amp: str = "none", between: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, torch.device(device)
        self.batch_size, self.workers, self.amp, self.between = batch_size, workers, amp, between
        self.truncated = 0  # distinct texts that were cut

    @torch.inference_mode()
    def images(self, dataset: Dataset, regions: bool = False) -> tuple[Tensor, Tensor]:
        """Unit features of the images (N, D) and, with `regions`, of their boxes (R, D), images in order."""
        local = torch.arange(distributed.rank(), len(dataset), distributed.world_size())
        batches = [part.tolist() for part in local.split(self.batch_size)] if len(local) else []
        images, boxes, owner = [], [], []
        loader = make_loader(dataset, batches, collate, workers=self.workers, device=self.device)
        for indices, batch in zip(batches, distributed.in_step(loader, len(batches), self.between), strict=True):
            batch = to_device(batch, self.device)
            with autocast(self.amp, self.device):
                features = self.model(batch if regions else dict(pixels=batch["pixels"]))
            images.append(features["image"])
            if regions:
                boxes.append(features["regions"])
                owner += [index for index, rows in zip(indices, batch["boxes"], strict=True) for _ in rows]
        return self.together(images, local, "images"), self.together(boxes, local.new_tensor(owner), "boxes")

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], long: bool = False) -> Tensor:
        """Unit features (M, D), each distinct text encoded once, so that equal texts are exactly equal.

        long: use the long path. Texts beyond its length are cut and counted in `truncated`.
        """
        tower, before, distinct = self.model.text_model, self.tokenizer.truncated, Texts()
        rows = distinct.index(texts)  # (M,)
        tokens, _ = distinct.tokens(self.tokenizer, tower.long_context_length if long else tower.context_length)
        self.truncated += self.tokenizer.truncated - before
        ends = (tokens == self.tokenizer.eos_id).int().argmax(dim=1)
        order = ends.argsort(stable=True)  # texts of like length together, so that little padding is encoded
        local, features = order[distributed.rank() :: distributed.world_size()], []
        parts = local.split(self.batch_size) if len(local) else []
        for part in distributed.in_step(parts, len(parts), self.between):
            part = tokens[part, : int(ends[part].max()) + 1].to(self.device)
            with autocast(self.amp, self.device):
                features.append(self.model.encode_text(part, long=long))
        return self.together(features, local, "texts")[rows]

    def together(self, features: list[Tensor], places: Tensor, what: str) -> Tensor:
        """The unit rows of every process, sorted by their places (n,)."""
        none = torch.empty(0, self.model.visual_projection.out_features)
        rows = distributed.gather(torch.cat([none, *(l2_normalize(part).cpu() for part in features)]))
        if not rows.isfinite().all():
            source = self.model.load_report.source if hasattr(self.model, "load_report") else "the model"
            raise InputError(f"{source}: the features of some {what} are not finite: damaged weights or narrow --amp")
        return rows[distributed.gather(places).argsort(stable=True)]
