"""Retrieval, choice among candidates, and the geometry of embeddings.

Pure functions of unit vectors, finite as `Embedder` gives them. A tie is a miss.
"""

import torch
from torch import Tensor

CANDIDATES = 132  # captions that a region is held against, its own among them
CHUNK = 256  # rows held against their candidates at once


def retrieval_ranks(image: Tensor, text: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """How many wrong answers score at least as high as the best right one, for every image and for every text.

    image (N, D), text (M, D), image_of_text (M,): the row of each text's image; an image may have any number of texts,
    at least one. Returns (N,) and (M,) int64; 0 is a hit at one. Holds no N x M matrix.
    """
    image_ranks, text_ranks = [], []
    for rows in torch.arange(len(image)).split(CHUNK):
        scores = image[rows] @ text.T  # (n, M)
        right = image_of_text == rows[:, None]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append(((scores >= best) & ~right).sum(dim=1))
    for rows in torch.arange(len(text)).split(CHUNK):
        text_ranks.append(_ranks(text[rows] @ image.T, image_of_text[rows]))
    return torch.cat(image_ranks), torch.cat(text_ranks)


def _ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many wrong columns score at least as high as the right one: scores (N, C), labels (N,) to (N,)."""
    return (scores >= scores.gather(1, labels[:, None])).sum(dim=1) - 1


def retrieval_recall(image: Tensor, text: Tensor, image_of_text: Tensor) -> dict[str, dict[str, float]]:
    """R@1, R@5 and R@10 of image_to_text and text_to_image, in 0..1. Arguments: `retrieval_ranks`.

    An image is a hit at k when one of its texts is among the k highest (Karpathy and Fei-Fei 2015).
    """
    ranks = zip(("image_to_text", "text_to_image"), retrieval_ranks(image, text, image_of_text), strict=True)
    return {name: {f"R@{k}": (r < k).double().mean().item() for k in (1, 5, 10)} for name, r in ranks}


def choice_metrics(query: Tensor, candidates: Tensor, counts: Tensor) -> dict[str, float]:
    """The share of queries that score their own candidate above all their others. FG-OVD (Bianchi et al. 2024).

    query (K, D); candidates (H, D), query after query, the right one first; counts (K,): candidates of each, 2 or more.
    -> accuracy; chance, the mean of 1 / candidates; count K; negatives, how many in all.
    """
    owner, first = torch.repeat_interleave(counts), counts.cumsum(0) - counts
    scores = (query[owner] * candidates).sum(-1)  # (H,)
    beaten = (scores >= scores[first][owner]).int()  # by itself once
    hits = torch.zeros_like(counts).int().index_add(0, owner, beaten) == 1
    return dict(
        accuracy=hits.double().mean().item(),
        chance=(1 / counts.double()).mean().item(),
        count=len(query),
        negatives=len(candidates) - len(query),
    )


def class_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and, of more than five classes, top5 accuracy over all rows; class_mean, the mean of the classes' own top1.

    scores (N, C), labels (N,). Classes without a row are left out of the mean.
    """
    ranks = _ranks(scores, labels)
    per_class = [(ranks[labels == label] < 1).double().mean() for label in labels.unique()]
    ks = (1, 5) if scores.shape[1] > 5 else (1,)
    top = {f"top{k}": (ranks < k).double().mean().item() for k in ks}
    return top | dict(class_mean=torch.stack(per_class).mean().item())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), between 1 and D.

    features (N, D) as they are, not centred: rows that all point one way have rank 1.
    """
    values = torch.linalg.svdvals(features.double())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def pair_cosines(image: Tensor, text: Tensor, ids: Tensor) -> tuple[float, float]:
    """Mean cosine of the pairs, and of all others whose ids (N,) differ, of (N, D) and (N, D)."""
    cosines = image @ text.T  # (N, N)
    return cosines.diagonal().mean().item(), cosines[ids[:, None] != ids].mean().item()


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
    candidates; count N; cosine, cosine_unmatched; effective_rank, and that of the texts.
    """
    others = distinct_candidates(ids)
    losses, hits = [], []
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
    matched, unmatched = pair_cosines(region, text, ids)
    return dict(
        loss=loss,
        relative=loss / torch.tensor(float(candidates)).log().item(),
        r1=sum(hits) / 2,
        region_to_text_r1=hits[0],
        text_to_region_r1=hits[1],
        candidates=candidates,
        count=len(region),
        cosine=matched,
        cosine_unmatched=unmatched,
        effective_rank=effective_rank(region),
        effective_rank_texts=effective_rank(text),
    )
