"""Batches of paired samples: lists, since images of a batch may differ in size until the model pads them."""

from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader, Dataset

from macl.data.sample import PER_BOX


def collate(samples: list[dict]) -> dict:
    """Turns samples into a batch, a dict of lists with one entry a sample.

    visible, infrared: (3, H_i, W_i) float32 images, what a detector takes as keywords of these names
    targets: dicts of what belongs to the boxes (boxes, labels, ignore and, where known, visible_in, occlusion), and as
        () int64 the scene and, of samples that have one, the domain
    image_id, path, scene, daytime: as in the samples; daytime is None where it is not known
    """
    batch = {key: [sample[key] for sample in samples] for key in ("visible", "infrared", "image_id", "path", "scene")}
    batch["daytime"] = [sample.get("daytime") for sample in samples]
    batch["targets"] = [
        {key: sample[key] for key in PER_BOX if key in sample}
        | {key: torch.tensor(sample[key]) for key in ("scene", "domain") if key in sample}
        for sample in samples
    ]
    return batch


def make_loader(
    dataset: Dataset,
    batches: Iterable[list],
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader:
    """Loads `batches`, lists of the data set's keys, in `workers` processes that live as long as the loader.

    Memory is pinned for a CUDA device. The loader draws from a generator of its own, so that iterating it does not
    change the caller's random state; the data sets of this package draw from their own seeds alone.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=worker_init_fn,
        generator=torch.Generator().manual_seed(0),
    )
