"""The figures of FG-CLIP's evaluations: retrieval, regions among hard negatives, boxes and images by class names.

Each function returns rows of figures by name, shares in 0..1, and a sentence about what was looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fgclip.batches import usable_regions
from fgclip.data import Record, Region
from fgclip.embedding import Embedder, Views
from fgclip.metrics import choice_hits, retrieval_recall, topk_accuracy
from fgclip.prompts import class_embeddings, class_prompts
from fgclip.regions import BoxStatistics
from trainkit.errors import InputError


def retrieval_figures(embedder: Embedder, records: Sequence[Record], views: Views, long: bool = False):
    """Recall at 1, 5 and 10 in both directions, of all short captions or, with `long`, of the one long caption.

    Karpathy and Fei-Fei 2015; a wrong answer that scores as high as the right one counts against it.
    """
    if long and embedder.model.text_model.long_context_length is None:
        raise InputError("--task long-retrieval: these weights have no long text path")
    captions = [(record.long,) if long else record.short for record in records]
    for record, texts in zip(records, captions, strict=True):
        if not texts or not texts[0]:
            raise InputError(f"{record.source}: expected a {'long' if long else 'short'} caption")
    owner = torch.arange(len(records)).repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    image, _ = embedder.images(views)
    text = embedder.texts([text for texts in captions for text in texts], long=long)
    said = f"{len(image)} images with {len(text)} {'long' if long else 'short'} captions"
    return recall_rows(image, text, owner), said


def recall_rows(image: Tensor, text: Tensor, owner: Tensor, prefix: str = "") -> dict[str, dict[str, float]]:
    """`retrieval_recall` as a row for each direction."""
    rows = {}
    for name, value in retrieval_recall(image, text, owner).items():
        direction, _, k = name.rpartition("_")
        rows.setdefault(prefix + direction, {})[k] = value
    return rows


def usable(records: Sequence[Record]) -> tuple[list[Region], str]:
    """The regions whose boxes `Views` gives, in order, and a sentence about all. InputError where none is left."""
    statistics = BoxStatistics()
    regions = [region for record in records for region in usable_regions(record, statistics=statistics)[1]]
    if not regions:
        raise InputError(f"{records[0].source}: no region here or in what follows has a usable box; {statistics}")
    amiss = f"; {statistics}" if statistics.invalid or statistics.clipped else ""
    return regions, f"{len(regions)} regions in {len(records)} images{amiss}"


def choice_figures(embedder: Embedder, records: Sequence[Record], views: Views, name: str):
    """FG-OVD (Bianchi et al. 2024): the share of regions that score their phrase above each of its alterations.

    A tie is a miss. Beside it the accuracy of guessing, the mean of 1 / candidates. name: what the row is called.
    """
    regions, said = usable(records)
    _, region = embedder.images(views, regions=True)
    text = embedder.texts([text for r in regions for text in (r.phrases[0], *r.negatives)])
    counts = torch.tensor([1 + len(r.negatives) for r in regions])
    figures = dict(
        accuracy=choice_hits(region, text, counts).double().mean().item(),
        chance=(1 / counts.double()).mean().item(),
        regions=len(regions),
        negatives=int((counts - 1).sum()),
    )
    return {name: figures}, f"{name}: {said}"


def class_vectors(embedder: Embedder, categories: Sequence[str], templates: Sequence[str]) -> Tensor:
    """A unit vector for each class (C, D)."""
    return class_embeddings(embedder.texts(class_prompts(categories, templates)), len(categories))


def class_figures(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, of more than five classes, top-5 accuracy over all rows, and the mean of the classes' own top-1.

    scores (N, C), labels (N,). Classes without a row are left out of the mean.
    """
    ks = (1, 5) if scores.shape[1] > 5 else (1,)
    own = [topk_accuracy(scores[labels == label], labels[labels == label], (1,))["top1"] for label in labels.unique()]
    return topk_accuracy(scores, labels, ks) | dict(class_mean=sum(own) / len(own))


def box_figures(
    embedder: Embedder, records: Sequence[Record], views: Views, categories: Sequence[str], templates: Sequence[str]
):
    """Every box among the names of all categories; a region's first phrase is its category."""
    regions, said = usable(records)
    _, region = embedder.images(views, regions=True)
    number = {name: i for i, name in enumerate(categories)}
    labels = torch.tensor([number[r.phrases[0]] for r in regions])
    figures = class_figures(region @ class_vectors(embedder, categories, templates).T, labels)
    return {"boxes": figures}, f"{len(categories)} categories in {len(templates)} templates; {said}"


def folder_figures(
    embedder: Embedder, records: Sequence[Record], views: Views, categories: Sequence[str], templates: Sequence[str]
):
    """Every image among the names of all classes; a record's label is the number of its class."""
    image, _ = embedder.images(views)
    labels = torch.tensor([record.label for record in records])
    figures = class_figures(image @ class_vectors(embedder, categories, templates).T, labels)
    said = f"{len(categories)} classes in {len(templates)} templates; {len(records)} images of {len(labels.unique())}"
    return {"images": figures}, said
