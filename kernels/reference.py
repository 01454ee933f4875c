"""Plain-PyTorch twins of the operators: the definition that tests hold every kernel to.

They are written for reading, differentiable by autograd, and exact in float64; nothing here is fast.
"""

import math

import torch
import torch.nn.functional as F

NO_NEGATIVE = -1e30  # stands in for the logsumexp of no candidate: finite, so that its gradients are 0 and not NaN


def coordinate_dtype(features):
    """float64 when the features are, float32 otherwise: RoI coordinates and sums never run in half precision."""
    return torch.float64 if features[0].dtype == torch.float64 else torch.float32


def assign_levels(rois, scales):
    """Pyramid level of each RoI, torchvision's `LevelMapper` (Lin et al., FPN, eq. 1): 4 + log2(sqrt(area) / 224).

    rois: (R, 5) floats; scales: one float per level, each about half of the one before. Returns (R,) int64 indices into
    `scales`, or -1 where the area is not a number (torchvision leaves those rows at zero).
    """
    if len(scales) == 1:
        return torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    finest, coarsest = (round(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    rois = rois.float() if rois.dtype in (torch.float16, torch.bfloat16) else rois
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    level = torch.floor(4 + torch.log2(torch.sqrt(area) / 224) + 1e-6)
    level = level.clamp(finest, coarsest) - finest
    return torch.where(level.isnan(), -1, level).long()


def sample_axis(low, high, bins, extent, sampling_ratio, aligned):
    """The bilinear taps of one axis: where each RoI samples and with which weights.

    low, high: (R,) edges of the RoIs in feature pixels (already shifted when `aligned`).
    extent: (R,) pixels of the axis.

    Returns index (R, bins, S, 2) int64, weight (R, bins, S, 2) and count (R,), the samples per bin. Samples outside
    [-1, extent] weigh nothing. An adaptive grid lists only those that can lie inside: a huge box costs no more than
    the map.
    """
    size = high - low
    if not aligned:
        size = size.clamp(min=1)
    extent = extent.to(low.dtype)[:, None]
    bin_size = (size / bins)[:, None]
    bin_start = low[:, None] + torch.arange(bins, device=low.device, dtype=low.dtype) * bin_size  # (R, bins)
    if sampling_ratio > 0:
        count, most, first = torch.full_like(bin_size, sampling_ratio), sampling_ratio, bin_start.new_zeros(())
        step = bin_size / sampling_ratio
    else:
        count = bin_size.ceil()
        step = bin_size / count.clamp(min=1)  # longer than half a pixel, which bounds the samples on the map
        on_map = torch.minimum(torch.nan_to_num(count, nan=0, posinf=0, neginf=0), 2 * extent + 6)
        most = max(1, int(on_map.max())) if len(on_map) else 1
        first = ((-1 - bin_start) / step.clamp(min=1e-6) - 0.5).ceil().sub(1).clamp(min=0)
    sample = first[..., None] + torch.arange(most, device=low.device, dtype=low.dtype)
    position = bin_start[..., None] + (sample + 0.5) * step[..., None]  # (R, bins, S)
    inside = (sample < count[..., None]) & (position >= -1) & (position <= extent[..., None])
    last = extent[..., None] - 1
    position = torch.where(inside, position, 0).clamp(min=0).minimum(last)
    lower, inside = position.floor(), inside.to(low.dtype)
    beyond = (position - lower) * inside
    index = torch.stack([lower, torch.minimum(lower + 1, last)], -1).long()
    return index, torch.stack([inside - beyond, beyond], -1), count.squeeze(1)


def finite_rois(rois):
    """Whether all four coordinates are finite, (R,): a box that is not pools to zero."""
    return rois[:, 1:].isfinite().all(dim=1)


def _roi_align_level(feature, rois, scale, output_size, sampling_ratio, aligned):
    """RoIAlign (He et al., Mask R-CNN, section 3) on one map: (B, C, H, W), (R, 5) -> (R, C, ph, pw)."""
    height, width = feature.shape[-2:]
    image = rois[:, 0].long()
    x1, y1, x2, y2 = (torch.where(finite_rois(rois)[:, None], rois[:, 1:], 0) * scale - 0.5 * aligned).unbind(1)
    extent = torch.ones_like(x1)
    y, weight_y, count_y = sample_axis(y1, y2, output_size[0], extent * height, sampling_ratio, aligned)
    x, weight_x, count_x = sample_axis(x1, x2, output_size[1], extent * width, sampling_ratio, aligned)
    count = (count_y * count_x).clamp(min=1) if sampling_ratio <= 0 else count_y * count_x
    y, x, weight_y, weight_x = (taps.flatten(2) for taps in (y, x, weight_y, weight_x))  # (R, bins, 2 S)
    tap = feature.permute(0, 2, 3, 1)[image[:, None, None, None, None], y[:, :, :, None, None], x[:, None, None]]
    pooled = torch.einsum("rpi,rqj,rpiqjc->rcpq", weight_y, weight_x, tap.to(weight_x.dtype))
    return pooled * (finite_rois(rois) / count)[:, None, None, None]


def multiscale_roi_align(features, rois, *, scales, output_size, sampling_ratio=2, aligned=False):
    """Twin of `kernels.multiscale_roi_align`; the argument meanings are given there."""
    dtype = coordinate_dtype(features)
    level = assign_levels(rois, scales)
    rois = rois.to(dtype)
    pooled = torch.zeros(len(rois), features[0].shape[1], *output_size, dtype=dtype, device=rois.device)
    for index, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        row = torch.nonzero(level == index).squeeze(1)
        part = _roi_align_level(feature, rois[row], scale, output_size, sampling_ratio, aligned)
        pooled = pooled.index_add(0, row, part)
    return pooled.to(features[0].dtype)  # (R, C, ph, pw)


def roi_align_project(features, rois, weight, bias=None, **pooling):
    """Twin of `kernels.roi_align_project`: RoIAlign, flatten in the order (C, ph, pw), linear layer."""
    return F.linear(multiscale_roi_align(features, rois, **pooling).flatten(1), weight, bias)  # (R, D)


def logit_dtype(query, key):
    """float64 when one of them is, float32 otherwise: of logits, sums and losses."""
    return torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32


def same_id(query_ids, ids):
    """Which columns carry the row's id, (N, K) bool; -1 is nobody's."""
    return (query_ids[:, None] == ids) & (query_ids[:, None] != -1)


def all_logits(
    query, key, logit_scale, *, target=None, bank=None, bank_valid=None, query_ids=None, key_ids=None, bank_ids=None
):
    """Of the rows of query and the columns [key; bank]: the logits (N, M + K), which of them are negatives, and the
    logits of the targets (N,)."""
    dtype, rows, keys = logit_dtype(query, key), len(query), len(key)
    target = torch.arange(rows, device=query.device) if target is None else target
    columns = key if bank is None else torch.cat([key.to(dtype), bank.detach().to(dtype)])
    logits = logit_scale * (query.to(dtype) @ columns.to(dtype).T)  # (N, M + K)
    index = torch.arange(len(columns), device=query.device)
    negative = index != target[:, None]  # all but the target,
    if bank_valid is not None:
        negative = negative & (index < keys + bank_valid)  # the unused rows of the bank,
    for ids, part in ((key_ids, slice(keys)), (bank_ids, slice(keys, None))):
        if query_ids is not None and ids is not None:
            negative[:, part] &= ~same_id(query_ids, ids)  # and what carries the query's id
    return logits, negative, logits.gather(1, target[:, None]).squeeze(1)


def contrastive_loss(query, key, logit_scale, *, reduction="mean", with_stats=False, **others):
    """Twin of `kernels.contrastive_loss`; the argument meanings are given there. Statistics: a tuple in their order.

    Cross-entropy (van den Oord et al., CPC, eq. 4), the positive split off: softplus(lse_negatives - positive) keeps
    its gradient where the loss is below the rounding of the logits.
    """
    logits, negative, positive = all_logits(query, key, logit_scale, **others)
    lse = torch.logsumexp(torch.where(negative, logits, NO_NEGATIVE), 1)
    loss = reduce_rows(F.softplus(lse - positive, threshold=50), reduction)
    if not with_stats:
        return loss
    largest = torch.where(negative, logits, -math.inf).amax(1)
    total = torch.logaddexp(torch.where(negative.any(1), lse, -math.inf), positive)
    return loss, (total.detach(), positive.detach(), largest.detach(), negative.sum(1) + 1)


def sigmoid_loss(query, key, logit_scale, logit_bias, *, reduction="mean", **others):
    """Twin of `kernels.sigmoid_loss`."""
    logits, negative, positive = all_logits(query, key, logit_scale, **others)
    of_negatives = torch.where(negative, F.softplus(logits + logit_bias, threshold=50), 0.0).sum(1)
    return reduce_rows(of_negatives + F.softplus(-(positive + logit_bias), threshold=50), reduction)


def reduce_rows(loss, reduction):
    """(N,) per-row losses to "none", "sum" or "mean"; the mean of no rows is 0."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.shape[0], 1)
