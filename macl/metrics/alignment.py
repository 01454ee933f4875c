"""How well the embeddings of the two modalities agree: retrieval, alignment, uniformity, modality gap."""

import math

import torch

from trainkit.errors import InputError

TIE = 1e-9  # cosines (float64) closer than this are equal: a collapsed embedding must not win by rounding
CHUNK = 1024  # rows of the similarity matrix in memory at a time
MEASURES = (
    "r1_visible_to_infrared",
    "r1_infrared_to_visible",
    "alignment",
    "uniformity",
    "modality_gap",
    "cosine_matched",
    "cosine_unmatched",
    "distance_ratio",
)


@torch.no_grad()
def alignment(visible_embeddings, infrared_embeddings, *, rows=None) -> dict:
    """Agreement of two sets of embeddings (N, D) of which row i of both shows the same object.

    Tensors of any float dtype and device; rows are L2-normalised here, in float64, and a zero row stays zero.

    Returns, as floats:

    * r1_visible_to_infrared, r1_infrared_to_visible: the share of queries whose own counterpart is strictly nearer than
      every other of the N rows of the gallery. A tie is a miss, so collapsed embeddings score 0. ``rows``, a (N,) bool
      mask, limits the queries, never the gallery, and touches no other figure; queries and gallery are the two counts.
    * alignment: mean squared distance of matched rows (lower is better), and uniformity: log of the mean of
      exp(-2 |x - y|^2) over the pairs within a modality, mean of both modalities (lower is better). Wang and Isola,
      "Understanding Contrastive Representation Learning through Alignment and Uniformity" (ICML 2020), alpha 2, t 2.
    * modality_gap: distance between the two modalities' mean embeddings. Liang et al., "Mind the Gap" (NeurIPS 2022).
    * cosine_matched, cosine_unmatched: mean cosine across the modalities of the same object, of different objects.
    * distance_ratio: mean distance of matched over mean distance of unmatched rows. Below 1 is good: an object is
      nearer to itself in the other modality than to others.

    What cannot be said is None: everything with fewer than two rows, R@1 without queries, distance_ratio where all rows
    coincide. Raises ValueError for shapes that differ, and InputError for embeddings that are not finite.
    """
    visible, infrared, queries = _checked(visible_embeddings, infrared_embeddings, rows)
    count = len(visible)
    result = dict.fromkeys(MEASURES)
    result |= {"queries": int(queries.sum()), "gallery": count}
    if count < 2:
        return result
    matched = (visible - infrared).norm(dim=1)  # (N,)
    cosine_matched = (visible * infrared).sum(1)  # (N,)
    others = count * (count - 1)
    cosine_unmatched = (visible.sum(0) @ infrared.sum(0) - cosine_matched.sum()) / others
    unmatched = (sum(part.sum() for part in _distances(visible, infrared)) - matched.sum()) / others
    if queries.any():
        result["r1_visible_to_infrared"] = _recall_at_1(visible, infrared, queries)
        result["r1_infrared_to_visible"] = _recall_at_1(infrared, visible, queries)
    return result | {
        "alignment": matched.square().mean().item(),
        "uniformity": (_uniformity(visible) + _uniformity(infrared)) / 2,
        "modality_gap": (visible.mean(0) - infrared.mean(0)).norm().item(),
        "cosine_matched": cosine_matched.mean().item(),
        "cosine_unmatched": cosine_unmatched.item(),
        "distance_ratio": (matched.mean() / unmatched).item() if unmatched > math.sqrt(2 * TIE) else None,
    }


def _checked(visible, infrared, rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    visible, infrared = (torch.as_tensor(rows).detach().double() for rows in (visible, infrared))
    if visible.ndim != 2 or visible.shape != infrared.shape:
        raise ValueError(f"embeddings are {tuple(visible.shape)} and {tuple(infrared.shape)}, expected (N, D) twice")
    if not (visible.isfinite().all() and infrared.isfinite().all()):
        raise InputError("the embeddings hold values that are not finite: are the weights broken, or --amp too coarse?")
    queries = torch.as_tensor([True] * len(visible) if rows is None else rows, dtype=torch.bool, device=visible.device)
    if queries.shape != visible.shape[:1]:
        raise ValueError(f"the mask of rows is {tuple(queries.shape)}, expected {tuple(visible.shape[:1])}")
    normalise = torch.nn.functional.normalize
    return normalise(visible, dim=1), normalise(infrared.to(visible.device), dim=1), queries


def _recall_at_1(query: torch.Tensor, gallery: torch.Tensor, queries: torch.Tensor) -> float:
    hits = 0
    for own in queries.nonzero().squeeze(1).split(CHUNK):
        cosine = query[own] @ gallery.T  # (chunk, N)
        column = own[:, None]
        best_other = cosine.scatter(1, column, -torch.inf).amax(1)
        hits += int((cosine.gather(1, column).squeeze(1) > best_other + TIE).sum())
    return hits / int(queries.sum())


def _distances(first: torch.Tensor, second: torch.Tensor):
    """Euclidean distances (chunk, M) of every row of ``first`` to every row of ``second``, chunk by chunk."""
    for part in first.split(CHUNK):
        yield torch.cdist(part, second)


def _uniformity(rows: torch.Tensor) -> float:
    """Over the pairs of different rows: each row's pair with itself, exp(0) = 1, is taken out."""
    count = len(rows)
    total = sum(distance.square().mul(-2).exp().sum() for distance in _distances(rows, rows)) - count
    return (total / (count * (count - 1))).log().item()
