"""Retrieval, choice among candidates, and the geometry of embeddings. Pure functions of features; a tie is a miss."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1024  # rows of a similarity matrix held at once


def _require_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite, which no ranking can place")


def retrieval_ranks(image: Tensor, text: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """How many wrong answers score at least as high as the best right one, for every image and for every text.

    image (N, D), text (M, D): unit vectors; image_of_text (M,): the row of each text's image; an image may have any
    number of texts, at least one. Returns (N,) and (M,) int64; 0 is a hit at one. Holds no N x M matrix.
    Raises ValueError on an image without texts and on values that are not finite.
    """
    _require_finite(image=image, text=text)
    if len(image_of_text) != len(text) or len(torch.unique(image_of_text)) != len(image):
        raise ValueError(f"the {len(text)} texts do not name each of the {len(image)} images")
    image_ranks, text_ranks = [], []
    for first in range(0, len(image), CHUNK):
        rows = torch.arange(first, min(first + CHUNK, len(image)), device=image.device)
        scores = image[rows] @ text.T  # (n, M)
        right = image_of_text == rows[:, None]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append(((scores >= best) & ~right).sum(dim=1))
    for first in range(0, len(text), CHUNK):
        own = image_of_text[first : first + CHUNK, None]
        scores = text[first : first + CHUNK] @ image.T  # (m, N)
        text_ranks.append((scores >= scores.gather(1, own)).sum(dim=1) - 1)
    return torch.cat(image_ranks), torch.cat(text_ranks)


def retrieval_recall(
    image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k in both directions, in 0..1: image_to_text_R@k and text_to_image_R@k. Arguments: `retrieval_ranks`.

    An image is a hit at k when one of its texts is among the k highest (Karpathy and Fei-Fei 2015).
    """
    ranks = dict(zip(("image_to_text", "text_to_image"), retrieval_ranks(image, text, image_of_text), strict=True))
    return {f"{name}_R@{k}": (r < k).double().mean().item() for name, r in ranks.items() for k in ks}


def choice_hits(query: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Whether each query scores its own candidate above all its others: (K,) bool. FG-OVD (Bianchi et al. 2024).

    query (K, D); candidates (H, D), query after query, the right one first; counts (K,): candidates of each, 2 or more.
    """
    _require_finite(query=query, candidates=candidates)
    if len(counts) != len(query) or counts.sum() != len(candidates) or (counts < 2).any():
        raise ValueError(
            f"counts must be {len(query)} numbers of 2 or more that sum to {len(candidates)}, got {counts.tolist()}"
        )
    owner = torch.repeat_interleave(counts)
    scores = (query[owner] * candidates).sum(-1)  # (H,)
    first = counts.cumsum(0) - counts
    scores_of_right = scores[first]
    beaten = (scores >= scores_of_right[owner]).to(torch.int64)
    beaten[first] = 0
    return torch.zeros_like(counts).index_add(0, owner, beaten) == 0


def choice_accuracy(query: Tensor, candidates: Tensor, counts: Tensor) -> float:
    """The share of hits in 0..1. Arguments: `choice_hits`."""
    return choice_hits(query, candidates, counts).double().mean().item()


def topk_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Accuracy at k in 0..1 of class scores (N, C) for labels (N,): top1, top5, ..."""
    _require_finite(scores=scores)
    ranks = (scores >= scores.gather(1, labels[:, None])).sum(dim=1) - 1
    return {f"top{k}": (ranks < k).double().mean().item() for k in ks}


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), between 1 and D.

    features (N, D) as they are, not centred: rows that all point one way have rank 1.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def pair_cosines(image: Tensor, text: Tensor, ids: Tensor | None = None) -> dict[str, float]:
    """Mean cosine of the pairs (`matched`) and of all others (`unmatched`), of unit vectors (N, D), N at least 2.

    ids (N,) int64: rows that carry the same one are no unmatched pair, as in `fgclip.losses`; -1: none.
    """
    cosines = image @ text.T  # (N, N)
    other = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    if ids is not None:
        other &= (ids[:, None] != ids) | (ids[:, None] == -1)
    return {"matched": cosines.diagonal().mean().item(), "unmatched": cosines[other].mean().item()}
