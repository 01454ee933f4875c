"""How well regions and phrases find each other in scenes that were not trained on."""

import torch
from torch import Tensor

from fgclip.batches import usable_regions
from fgclip.embedding import Embedder
from fgclip.metrics import choice_accuracy, effective_rank, pair_cosines, retrieval_ranks
from fgclip.synthetic import SyntheticRegions
from fgclip.zero_shot import recall_rows
from kernels import contrastive_loss

CANDIDATES = 132  # a batch of 4 regions beside a bank of 128


def distinct_groups(ids: Tensor, size: int) -> Tensor:
    """Rows (G, size) of `ids` (N,) int64, such that no id stands twice in a group; every row in one group at most.

    G is 0 where there are fewer distinct ids.
    """
    _, inverse = ids.unique(return_inverse=True)
    order = inverse.argsort(stable=True)
    counts = inverse.bincount()
    first = (counts.cumsum(0) - counts)[inverse[order]]
    earlier = torch.empty_like(order)
    earlier[order] = torch.arange(len(ids)) - first  # how often the id came before
    groups = [(earlier == i).nonzero().squeeze(1) for i in range(int(counts.max()))]
    return torch.stack([rows[:size] for rows in groups if len(rows) >= size] or [ids.new_empty(0)]).view(-1, size)


def region_figures(region: Tensor, text: Tensor, ids: Tensor, logit_scale: Tensor, size: int = CANDIDATES) -> dict:
    """Each region against its own phrase and size - 1 other distinct ones, and each phrase against as many regions.

    region, text (N, D): unit vectors, row i a pair; ids (N,) tell phrases apart; logit_scale 0-d, the multiplier.
    Returns loss (mean of both directions), region_to_text_R@1, text_to_region_R@1, groups, candidates; a tie is a miss.
    With fewer than `size` distinct phrases all there are make one group.
    """
    size = min(size, len(ids.unique()))
    groups = distinct_groups(ids, size)
    losses, hits = [], []
    for rows in groups:
        r, t = region[rows], text[rows]
        losses.append((contrastive_loss(r, t, logit_scale) + contrastive_loss(t, r, logit_scale)) / 2)
        hits.append([(ranks == 0).double().mean() for ranks in retrieval_ranks(r, t, torch.arange(size))])
    forward, back = torch.tensor(hits).mean(dim=0).tolist()
    return {
        "loss": torch.stack(losses).mean().item(),
        "region_to_text_R@1": forward,
        "text_to_region_R@1": back,
        "groups": len(groups),
        "candidates": size,
    }


def held_out_figures(embedder: Embedder, data: SyntheticRegions) -> dict[str, dict]:
    """regions: `region_figures`, with matched and unmatched (mean cosines) and effective_rank of the regions' features;
    hard: accuracy among each phrase and its alterations; and rows of recall of whole scenes by short and long captions."""
    records = [data.record(i) for i in range(len(data))]
    image, region = embedder.images(data, regions=True)
    regions = [kept for record in records for kept in usable_regions(record)[1]]
    phrases = [r.phrases[0] for r in regions]
    distinct = {phrase: i for i, phrase in enumerate(dict.fromkeys(phrases))}
    ids = torch.tensor([distinct[phrase] for phrase in phrases])
    text = embedder.texts(phrases)
    scale = embedder.model.logit_scales()["region"].detach().cpu()
    hard = embedder.texts([text for r in regions for text in (r.phrases[0], *r.negatives)])
    counts = torch.tensor([1 + len(r.negatives) for r in regions])
    figures = dict(
        regions=region_figures(region, text, ids, scale)
        | pair_cosines(region, text, ids)
        | dict(effective_rank=effective_rank(region), count=len(regions), phrases=len(distinct)),
        hard=dict(accuracy=choice_accuracy(region, hard, counts), regions=len(regions)),
    )
    own = torch.arange(len(image))
    figures |= recall_rows(image, embedder.texts([r.short[0] for r in records]), own, "short_")
    if embedder.model.text_model.long_context_length is not None:
        figures |= recall_rows(image, embedder.texts([r.long for r in records], long=True), own, "long_")
    return figures
