"""Retrieval, choice among candidates, and the geometry of embeddings.

Pure functions of unit vectors, finite as `Embedder` gives them. A tie is a miss.
"""

import torch
from torch import Tensor

CANDIDATES = 132  # captions that a region is held against, its own among them
CHUNK = 256  # rows held against their candidates at once


def ranks(query: Tensor, key: Tensor, query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """How many wrong keys score at least as high as the best right one, per query (N,) int64; 0 is a hit at one.

    query (N, D), key (M, D). ids (N,) and (M,): keys with the query's id are right, at least one per query.
    """
    counts = []
    for rows in torch.arange(len(query)).split(CHUNK):
        scores = query[rows] @ key.T  # (n, M)
        right = key_ids == query_ids[rows, None]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        counts.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(counts)


def retrieval_recall(image: Tensor, text: Tensor, image_of_text: Tensor) -> dict[str, dict[str, float]]:
    """R@1, R@5 and R@10 of image_to_text and text_to_image, in 0..1.

    image (N, D), text (M, D), image_of_text (M,): the row of each text's image; every image has at least one text.
    An image is a hit at k when one of its texts is among the k highest (Karpathy and Fei-Fei 2015).
    """
    rows = torch.arange(len(image))
    found = dict(
        image_to_text=ranks(image, text, rows, image_of_text), text_to_image=ranks(text, image, image_of_text, rows)
    )
    return {name: {f"R@{k}": (r < k).double().mean().item() for k in (1, 5, 10)} for name, r in found.items()}


def choice_metrics(query: Tensor, candidates: Tensor, counts: Tensor) -> dict[str, float]:
    """The share of queries that score their own candidate above all their others. FG-OVD (Bianchi et al. 2024).

    query (K, D); candidates (H, D), query after query, the right one first; counts (K,): candidates per query, >= 2.
    -> accuracy; chance, the mean of 1 / candidates; count K; negatives, how many in all.
    """
    owner, first = torch.repeat_interleave(counts), counts.cumsum(0) - counts
    scores = (query[owner] * candidates).sum(-1)  # (H,)
    beaten = (scores >= scores[first][owner]).int()  # by itself once
    hits = torch.zeros_like(counts).int().index_add(0, owner, beaten) == 1
    return dict(
        accuracy=hits.double().mean().item(), chance=(1 / counts.double()).mean().item(),
        count=len(query), negatives=len(candidates) - len(query),
    )  # fmt: skip


def class_metrics(features: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and, of more than five classes, top5 accuracy; class_mean, the mean top1 of the classes that have rows.

    features (N, D), classes (C, D), labels (N,).
    """
    found = ranks(features, classes, labels, torch.arange(len(classes)))
    top = {f"top{k}": (found < k).double().mean().item() for k in (1, 5) if k == 1 or len(classes) > k}
    per_class = [(found[labels == label] < 1).double().mean() for label in labels.unique()]
    return top | dict(class_mean=torch.stack(per_class).mean().item())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007) of features (N, D), between 1 and D."""
    values = torch.linalg.svdvals(features.double())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def distinct_candidates(ids: Tensor, count: int = CANDIDATES, seed: int = 0) -> Tensor:
    """For every row count - 1 other rows whose ids differ from its own and from each other: (N, count - 1) int64.

    ids (N,) int64, of U distinct values; where U is below `count`, there are U - 1. Drawn from the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    values, group, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    scores = torch.rand(len(ids), len(values), generator=generator)
    scores[torch.arange(len(ids)), group] = -1
    others = scores.topk(min(count, len(values)) - 1, dim=1).indices  # (N, count - 1) of the distinct values
    member = (torch.rand(others.shape, generator=generator) * sizes[others]).long()
    return torch.argsort(group, stable=True)[(sizes.cumsum(0) - sizes)[others] + member]


def region_metrics(region: Tensor, text: Tensor, ids: Tensor, logit_scale: float) -> dict[str, float]:
    """Each region against its own phrase and 131 others of distinct captions, and each phrase against their regions.

    region, text (N, D), ids (N,) of at least two captions. -> loss, the mean cross-entropy of both directions;
    relative, that over ln(candidates), 1 is chance; r1, both directions; region_to_text_r1 and text_to_region_r1;
    candidates; count N; mean cosine of the pairs, cosine_unmatched of all others whose ids differ; effective_rank of
    the regions, and of the texts.
    """
    others = distinct_candidates(ids)
    losses, hits, cosines = [], [], region @ text.T  # (N, N)
    for query, key in ((region, text), (text, region)):
        parts = []
        for rows in torch.arange(len(region)).split(CHUNK):
            own = (query[rows] * key[rows]).sum(-1, keepdim=True)  # (n, 1)
            rest = torch.einsum("nd,nmd->nm", query[rows], key[others[rows]])
            loss = (logit_scale * torch.cat([own, rest], dim=1)).logsumexp(1) - logit_scale * own[:, 0]
            parts.append(torch.stack([loss, (own > rest).all(1).to(loss)]))
        loss, hit = torch.cat(parts, dim=1).double().mean(1).tolist()
        losses.append(loss)
        hits.append(hit)
    loss, candidates = sum(losses) / 2, others.shape[1] + 1
    return dict(
        loss=loss, relative=loss / torch.tensor(float(candidates)).log().item(),
        r1=sum(hits) / 2, region_to_text_r1=hits[0], text_to_region_r1=hits[1], candidates=candidates,
        count=len(region), cosine=cosines.diagonal().mean().item(),
        cosine_unmatched=cosines[ids[:, None] != ids].mean().item(),
        effective_rank=effective_rank(region), effective_rank_texts=effective_rank(text),
    )  # fmt: skip
