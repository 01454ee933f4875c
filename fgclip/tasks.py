"""Metrics of a model on a data set, and a sentence about the data. Shares are in 0..1."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fgclip.data import RegionDataset, Sample, data_statistics
from fgclip.embedding import Embedder
from fgclip.losses import caption_ids
from fgclip.metrics import choice_metrics, class_metrics, region_metrics, retrieval_recall
from fgclip.model import l2_normalize
from trainkit.errors import InputError


def validation_metrics(
    embedder: Embedder, data: Dataset, *, regions: bool = True, long: bool = True
) -> dict[str, dict[str, float]]:
    """Metrics of samples that were not trained on, as far as there is something to choose from.

    region: `region_metrics` at the region's scale. hard: `choice_metrics` of each region's phrase and its alterations.
    short, long: `retrieval_recall` of images and captions; r1, the mean of both directions; count.
    """
    samples, metrics = [data.describe(i) for i in range(len(data))], {}
    image, region = embedder.images(data, regions)
    if regions:
        phrases, tokenizer = [phrase for s in samples for phrase in s.phrases], embedder.tokenizer
        ids = caption_ids(tokenizer(phrases, embedder.model.text_model.context_length), tokenizer.eos_id)
        if len(ids.unique()) > 1:
            scale = embedder.model.logit_scales()["region"].item()
            metrics["region"] = region_metrics(region, embedder.texts(phrases), ids, scale)
        if any(group for s in samples for group in s.hard):
            metrics["hard"] = hard_metrics(embedder, region, samples)
    if len(samples) > 1:
        for name in ("short", "long") if long else ("short",):
            text = embedder.texts([s.record.long if name == "long" else s.short for s in samples], long=name == "long")
            recall = retrieval_recall(image, text, torch.arange(len(image)))
            metrics[name] = {f"{way}_{k}": value for way, row in recall.items() for k, value in row.items()}
            metrics[name] |= dict(r1=sum(row["R@1"] for row in recall.values()) / 2, count=len(image))
    return metrics


def validation_text(metrics: dict[str, dict[str, float]]) -> str:
    """`validation_metrics` in one line."""
    texts = dict(
        region="{count} regions among {candidates} captions: loss {loss:.3f} ({relative:.2f} of chance), R@1 {r1:.3f}, "
        "cosine {cosine:.2f} (others {cosine_unmatched:.2f}), effective rank {effective_rank:.0f}",
        hard="hard negatives {accuracy:.3f} of {count}",
        short="short captions R@1 {r1:.3f} of {count}",
        long="long captions R@1 {r1:.3f} of {count}",
    )
    return "; ".join(texts[name].format(**row) for name, row in metrics.items()) or "nothing to choose from"


def best_metric(metrics: dict[str, dict[str, float]], by: str) -> tuple[float, float]:
    """R@1 of "region" or "captions", accuracy of "hard", -1 without; the negative loss of the regions breaks ties."""
    names = ("short", "long") if by == "captions" else (by,)
    values = [metrics[name]["accuracy" if name == "hard" else "r1"] for name in names if name in metrics]
    return sum(values) / len(values) if values else -1.0, -metrics["region"]["loss"] if "region" in metrics else 0.0


def hard_metrics(embedder: Embedder, region: Tensor, samples: Sequence[Sample]) -> dict[str, float]:
    """`choice_metrics` of the regions (R, D) that have alterations, each among these and its own phrase."""
    groups = [group for s in samples for group in s.hard]
    text = embedder.texts([text for group in groups for text in group])
    chosen = region[torch.tensor([bool(group) for group in groups])]
    return choice_metrics(chosen, text, torch.tensor([len(group) for group in groups if group]))


def retrieval(embedder: Embedder, data: RegionDataset, long: bool = False) -> tuple[dict, str]:
    """`retrieval_recall` of all short captions or, with `long`, of the one long caption."""
    if long and embedder.model.text_model.long_context_length is None:
        raise InputError("--task long-retrieval: these weights have no long text path")
    captions, kind = [(record.long,) if long else record.short for record in data.records], "long" if long else "short"
    for record, texts in zip(data.records, captions, strict=True):
        if not texts or not texts[0]:
            raise InputError(f"{record.source}: expected a {kind} caption")
    owner = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    image, _ = embedder.images(data)
    text = embedder.texts([text for texts in captions for text in texts], long=long)
    return retrieval_recall(image, text, owner), f"{len(image)} images with {len(text)} {kind} captions"


def usable_samples(data: RegionDataset) -> tuple[list[Sample], str]:
    """The samples without pixels, and a sentence about their boxes. Raises InputError where none is usable."""
    samples, statistics = [data.describe(i) for i in range(len(data))], data_statistics(data.records)
    if not statistics.regions:
        source = data.records[0].source
        raise InputError(f"{source}: no region here or in what follows has a usable box; {statistics.boxes}")
    return samples, f"{statistics.regions} regions in {len(samples)} images; {statistics.boxes}"


def choice(embedder: Embedder, data: RegionDataset) -> tuple[dict, str]:
    """FG-OVD: every region among its own phrase and its alterations."""
    samples, sentence = usable_samples(data)
    return hard_metrics(embedder, embedder.images(data, regions=True)[1], samples), sentence


def classify(
    embedder: Embedder, data: RegionDataset, categories: Sequence[str], templates: Sequence[str], boxes: bool
) -> tuple[dict, str]:
    """`class_metrics` of every box, whose phrase is its category, or of every image, labelled by its record.

    A class is the mean of the unit vectors of its prompts; underscores in its name are read as spaces.
    """
    if boxes:
        samples, sentence = usable_samples(data)
        labels = torch.tensor([categories.index(phrase) for s in samples for phrase in s.phrases])
    else:
        labels = torch.tensor([record.label for record in data.records])
        sentence = f"{len(labels)} images of {len(labels.unique())}"
    prompts = [template.replace("{}", name.replace("_", " ")) for name in categories for template in templates]
    classes = l2_normalize(embedder.texts(prompts).unflatten(0, (len(categories), -1)).mean(dim=1))  # (C, D)
    row = class_metrics(embedder.images(data, boxes)[boxes], classes, labels)
    return row, f"{len(categories)} classes in {len(templates)} templates; {sentence}"
