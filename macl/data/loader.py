"""Batches of paired samples: lists, since images of a batch may differ in size until the model pads them."""

import torch

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
