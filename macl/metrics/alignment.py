"""How well the embeddings of the two modalities agree: retrieval, alignment, uniformity, modality gap."""

import math

import torch
from torch.nn.functional import normalize

from trainkit.errors import InputError

TIE = 1e-9  # cosines (float64) closer than this are equal: a collapsed embedding must not win by rounding
CHUNK = 1024  # rows of the similarity matrix in memory at a time
MEASURES = ("r1_visible_to_infrared", "r1_infrared_to_visible", "r1", "alignment", "uniformity", "modality_gap")
MEASURES += ("cosine_unmatched", "distance_ratio")


@torch.no_grad()
def alignment(visible_embeddings, infrared_embeddings) -> dict:
    """Agreement of two sets of embeddings (N, D) of which row i of both shows the same object.

    Tensors of any float dtype and device; rows are L2-normalised here, in float64. Returns floats:

    r1_visible_to_infrared, r1_infrared_to_visible, r1: share of rows that are strictly nearer to their counterpart than
        to every other row of the gallery (a tie is a miss, so collapsed embeddings score 0), and the mean of both
    alignment, uniformity: mean squared distance of matched rows; log of the mean of exp(-2 |x - y|^2) over the pairs
        within a modality, mean of both modalities. Lower is better. Wang and Isola, "Understanding Contrastive
        Representation Learning through Alignment and Uniformity" (ICML 2020), alpha 2, t 2.
    modality_gap: distance between the modalities' mean embeddings. Liang et al., "Mind the Gap" (NeurIPS 2022).
    cosine_unmatched: mean cosine across the modalities of different objects; near 1 the embeddings have collapsed
    distance_ratio: mean distance of matched over that of unmatched rows; None where all rows coincide

    and gallery, the number of rows. With fewer than two rows the floats are None. Raises ValueError for shapes that
    differ and InputError for embeddings that are not finite.
    """
    visible, infrared = (torch.as_tensor(rows).double() for rows in (visible_embeddings, infrared_embeddings))
    if visible.ndim != 2 or visible.shape != infrared.shape:
        raise ValueError(f"embeddings are {tuple(visible.shape)} and {tuple(infrared.shape)}, expected (N, D) twice")
    if not (visible.isfinite().all() and infrared.isfinite().all()):
        raise InputError("the embeddings hold values that are not finite: are the weights broken, or --amp too coarse?")
    count = len(visible)
    if count < 2:
        return {**dict.fromkeys(MEASURES), "gallery": count}
    visible, infrared = normalize(visible, dim=1), normalize(infrared.to(visible.device), dim=1)
    matched = (visible - infrared).norm(dim=1)  # (N,)
    others = count * (count - 1)
    cosine_unmatched = (visible.sum(0) @ infrared.sum(0) - (visible * infrared).sum()) / others
    unmatched = (sum(torch.cdist(part, infrared).sum() for part in visible.split(CHUNK)) - matched.sum()) / others
    r1_visible, r1_infrared = _recall_at_1(visible, infrared), _recall_at_1(infrared, visible)
    return {
        "r1_visible_to_infrared": r1_visible,
        "r1_infrared_to_visible": r1_infrared,
        "r1": (r1_visible + r1_infrared) / 2,
        "alignment": matched.square().mean().item(),
        "uniformity": (_uniformity(visible) + _uniformity(infrared)) / 2,
        "modality_gap": (visible.mean(0) - infrared.mean(0)).norm().item(),
        "cosine_unmatched": cosine_unmatched.item(),
        "distance_ratio": (matched.mean() / unmatched).item() if unmatched > math.sqrt(2 * TIE) else None,
        "gallery": count,
    }


def _recall_at_1(query: torch.Tensor, gallery: torch.Tensor) -> float:
    hits = 0
    for column in torch.arange(len(query), device=query.device)[:, None].split(CHUNK):  # (chunk, 1)
        cosine = query[column[:, 0]] @ gallery.T  # (chunk, N)
        best_other = cosine.scatter(1, column, -torch.inf).amax(1)
        hits += int((cosine.gather(1, column)[:, 0] > best_other + TIE).sum())
    return hits / len(query)


def _uniformity(rows: torch.Tensor) -> float:
    """Over the pairs of different rows: each row's pair with itself, exp(0) = 1, is taken out."""
    count = len(rows)
    total = sum(torch.cdist(part, rows).square().mul(-2).exp().sum() for part in rows.split(CHUNK)) - count
    return (total / (count * (count - 1))).log().item()
