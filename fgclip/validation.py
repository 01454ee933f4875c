"""What a model makes of held-out images: their captions, their regions among other captions, and hard negatives."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

import trainkit.distributed as distributed
from fgclip.batches import Collate
from fgclip.metrics import choice_accuracy, effective_rank, pair_cosines, retrieval_recall
from fgclip.model import FGCLIP, unit
from trainkit.device import autocast, to_device
from trainkit.loader import make_loader

CANDIDATES = 132  # captions that a region is held against, its own among them
CHUNK = 256  # rows held against their candidates at once


@torch.inference_mode()
def embed(
    model: FGCLIP,
    dataset: Dataset,
    collate: Collate,
    *,
    device: torch.device | str,
    batch_size: int = 32,
    workers: int = 0,
    amp: str = "none",
    between: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Unit vectors of all images, captions, regions and phrases of a data set; on every rank, each encoded by one.

    image (N, D), short and long (N, D); regions and region_texts (R, D), region_ids (R,), the `caption_ids` of their
    phrases; hard_regions and hard_texts (K, D) and (H, D), hard_counts (K,), as far as the batches have them; CPU.
    between: see `distributed.in_step`.
    """
    first, last = (len(dataset) * r // distributed.world_size() for r in (distributed.rank(), distributed.rank() + 1))
    batches = [list(range(i, min(i + batch_size, last))) for i in range(first, last, batch_size)]
    parts = []
    loader = make_loader(dataset, batches, collate, workers=workers, device=device)
    for batch in distributed.in_step(loader, len(batches), between):
        batch = to_device(batch, device)
        with autocast(amp, device):
            features = model(batch)
        names = ("image", "short", "long", "regions", "region_texts", "hard_texts")
        part = {name: unit(features[name]) for name in names if name in features}
        if "regions" in part:
            part["region_ids"] = batch["short_ids"][batch["region"]]
            part["hard_regions"] = part["regions"][batch["hard_regions"]]
            part["hard_counts"] = batch["hard_counts"]
        parts.append({name: value.cpu() for name, value in part.items()})
    parts = [part for own in distributed.gather_objects(parts) for part in own]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def distinct_candidates(ids: Tensor, count: int = CANDIDATES, seed: int = 0) -> Tensor:
    """For every row count - 1 other rows whose ids differ from its own and from each other: (N, count - 1) int64.

    ids (N,) int64, of U distinct values; where U is below `count`, there are U - 1. Drawn from the seed, the same
    everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    values, group, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    scores = torch.rand(len(ids), len(values), generator=generator)
    scores[torch.arange(len(ids)), group] = -1
    others = scores.topk(min(count, len(values)) - 1, dim=1).indices  # (N, count - 1) of the distinct values
    member = (torch.rand(others.shape, generator=generator) * sizes[others]).long()
    return torch.argsort(group, stable=True)[(sizes.cumsum(0) - sizes)[others] + member]


def region_figures(region: Tensor, text: Tensor, ids: Tensor, logit_scale: float) -> dict[str, float]:
    """Each region against its own phrase and 131 others of distinct captions, and each phrase against their regions.

    region, text (N, D) unit vectors, ids (N,) of at least two captions. -> loss, the mean cross-entropy of both
    directions; relative, that over ln(candidates), 1 is chance; r1, both directions; region_to_text_r1 and
    text_to_region_r1; candidates; count N. A tie is a miss.
    """
    others = distinct_candidates(ids)
    losses, hits = {}, {}
    for direction, query, key in (("region_to_text", region, text), ("text_to_region", text, region)):
        found = []
        for rows in torch.arange(len(region)).split(CHUNK):
            own = (query[rows] * key[rows]).sum(-1, keepdim=True)  # (n, 1)
            rest = torch.einsum("nd,nmd->nm", query[rows], key[others[rows]])
            loss = (logit_scale * torch.cat([own, rest], dim=1)).logsumexp(1) - logit_scale * own[:, 0]
            found.append(torch.stack([loss, (own > rest).all(1).to(loss)]))
        losses[direction], hits[direction] = torch.cat(found, dim=1).double().mean(1).tolist()
    loss, candidates = sum(losses.values()) / 2, others.shape[1] + 1
    return dict(
        loss=loss,
        relative=loss / torch.tensor(float(candidates)).log().item(),
        r1=sum(hits.values()) / 2,
        **{f"{direction}_r1": hit for direction, hit in hits.items()},
        candidates=candidates,
        count=len(region),
    )


def validation_metrics(found: dict[str, Tensor], logit_scale: float) -> dict[str, dict[str, float]]:
    """Figures of what `embed` found, as far as there is something to choose from.

    region: `region_figures` with the region's scale, cosine and cosine_unmatched, effective_rank and that of the
    phrases; hard: accuracy among each region's own phrase and its alterations, count; short and long: R@1, 5 and 10
    between images and captions, and r1, both directions of R@1.
    """
    figures = {}
    if "regions" in found and len(torch.unique(found["region_ids"])) > 1:
        region, text, ids = found["regions"], found["region_texts"], found["region_ids"]
        cosines = pair_cosines(region, text, ids)
        figures["region"] = region_figures(region, text, ids, logit_scale) | dict(
            cosine=cosines["matched"],
            cosine_unmatched=cosines["unmatched"],
            effective_rank=effective_rank(region),
            effective_rank_texts=effective_rank(text),
        )
    if len(found.get("hard_counts", ())):
        accuracy = choice_accuracy(found["hard_regions"], found["hard_texts"], found["hard_counts"])
        figures["hard"] = dict(accuracy=accuracy, count=len(found["hard_counts"]))
    for name in ("short", "long"):
        if name in found and len(found["image"]) > 1:
            recall = retrieval_recall(found["image"], found[name], torch.arange(len(found["image"])))
            r1 = (recall["image_to_text_R@1"] + recall["text_to_image_R@1"]) / 2
            figures[name] = {**recall, "r1": r1, "count": len(found["image"])}
    return figures


def validation_text(figures: dict[str, dict[str, float]]) -> str:
    """The figures for people, in one line."""
    said = []
    if "region" in figures:
        f = figures["region"]
        said.append(
            f"{f['count']} regions among {f['candidates']} captions: loss {f['loss']:.3f} ({f['relative']:.2f} of "
            f"chance), R@1 {f['r1']:.3f}, cosine {f['cosine']:.2f} (others {f['cosine_unmatched']:.2f}), "
            f"effective rank {f['effective_rank']:.0f}"
        )
    if "hard" in figures:
        said.append(f"hard negatives {figures['hard']['accuracy']:.3f} of {figures['hard']['count']}")
    for name in ("short", "long"):
        if name in figures:
            said.append(f"{name} captions R@1 {figures[name]['r1']:.3f} of {figures[name]['count']}")
    return "; ".join(said) or "nothing to choose from"


def best_metric(figures: dict[str, dict[str, float]], by: str) -> tuple[float, float]:
    """What chooses a checkpoint: R@1 of "region", accuracy of "hard", or R@1 of "captions", -1 without; and, to break
    ties, the regions' loss turned round."""
    tie = -figures["region"]["loss"] if "region" in figures else 0.0
    if by == "captions":
        found = [figures[name]["r1"] for name in ("short", "long") if name in figures]
        return sum(found) / len(found) if found else -1.0, tie
    return figures[by]["r1" if by == "region" else "accuracy"] if by in figures else -1.0, tie
