"""How well regions and phrases find each other in scenes that were not trained on."""

import torch

from fgclip.batches import usable_regions
from fgclip.embedding import Embedder
from fgclip.metrics import choice_accuracy, effective_rank, pair_cosines
from fgclip.synthetic import SyntheticRegions
from fgclip.validation import region_figures
from fgclip.zero_shot import recall_rows


def held_out_metrics(embedder: Embedder, data: SyntheticRegions) -> dict[str, dict]:
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
