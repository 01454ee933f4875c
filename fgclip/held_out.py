"""How well regions and phrases find each other in scenes that were not trained on."""

import math

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


def region_figures(region: Tensor, text: Tensor, ids: Tensor, logit_scale: float) -> dict[str, float]:
    """Each region against its own phrase and 131 other distinct ones, and each phrase against as many regions.

    region, text (N, D): unit vectors, row i a pair; ids (N,) int64 tell phrases apart; logit_scale: the multiplier.
    Returns loss, the mean cross-entropy of both directions; relative, that over ln(candidates), 1 is chance;
    region_to_text_r1 and text_to_region_r1, where a tie is a miss; candidates; count, the regions that were in a group.
    With fewer distinct phrases all there are make one group.
    """
    size = min(CANDIDATES, len(ids.unique()))
    groups = distinct_groups(ids, size)
    losses, hits = [], []
    for rows in groups:
        r, t = region[rows], text[rows]
        losses.append((contrastive_loss(r, t, logit_scale) + contrastive_loss(t, r, logit_scale)) / 2)
        hits.append([(ranks == 0).double().mean() for ranks in retrieval_ranks(r, t, torch.arange(size))])
    loss = torch.stack(losses).mean().item()
    to_text, to_region = torch.tensor(hits).mean(dim=0).tolist()
    return dict(
        loss=loss,
        relative=loss / math.log(size) if size > 1 else 0.0,
        region_to_text_r1=to_text,
        text_to_region_r1=to_region,
        candidates=size,
        count=groups.numel(),
    )


def held_out_figures(embedder: Embedder, data: SyntheticRegions) -> dict[str, dict]:
    """regions: `region_figures`; features: mean cosine of matched and unmatched pairs, effective rank of the regions';
    hard: accuracy among each phrase and its alterations; and recall of whole scenes by short and by long captions."""
    records = [data.record(i) for i in range(len(data))]
    image, region = embedder.images(data, regions=True)
    regions = [kept for record in records for kept in usable_regions(record)[1]]
    phrases = [r.phrases[0] for r in regions]
    distinct = {phrase: i for i, phrase in enumerate(dict.fromkeys(phrases))}
    ids = torch.tensor([distinct[phrase] for phrase in phrases])
    text = embedder.texts(phrases)
    scale = embedder.model.logit_scales()["region"].item()
    candidates = embedder.texts([text for r in regions for text in (r.phrases[0], *r.negatives)])
    counts = torch.tensor([1 + len(r.negatives) for r in regions])
    rank = effective_rank(region)
    figures = dict(
        regions=region_figures(region, text, ids, scale),
        features=pair_cosines(region, text, ids)
        | dict(effective_rank=rank, regions=len(region), phrases=len(distinct)),
        hard=dict(accuracy=choice_accuracy(region, candidates, counts), regions=len(regions)),
    )
    own = torch.arange(len(image))
    figures |= recall_rows(image, embedder.texts([r.short[0] for r in records]), own, "short_")
    if embedder.model.text_model.long_context_length is not None:
        figures |= recall_rows(image, embedder.texts([r.long for r in records], long=True), own, "long_")
    return figures
