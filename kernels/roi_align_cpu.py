"""RoIAlign in plain PyTorch, fast on the CPU: a plan of taps, then one weighted gather.

All levels lie in one channels-last table of pixels (P, C). A RoI's bin is a bag of (pixel, weight) taps, so the forward
is one `embedding_bag` over the table. The backward is the transposed product: the same taps sorted by pixel make every
pixel a bag of bins, which is again one `embedding_bag`, without atomics and in a fixed order.

Where each RoI pools to a single bin, as FG-CLIP's regions do, most pixels of the map carry weight and a dense matrix
product is faster: (R, H W) weights, the outer product of both axes, times the (H W, C) map of each image.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch

from kernels.products import transpose_into, transposed
from kernels.reference import assign_levels, coordinate_dtype, finite_rois, sample_axis

KEPT = 2**27  # bytes of the largest table whose memory a thread keeps


class Taps(NamedTuple):
    """Bags of taps: bin i of the R * ph * pw owns the taps offset[i] : offset[i + 1]."""

    pixel: torch.Tensor  # (T,) int32 or int64, row of the table
    weight: torch.Tensor  # (T,)
    offset: torch.Tensor  # (R * ph * pw + 1,) as pixel
    owner: torch.Tensor | int  # (T,) bin of each tap, or how many taps every bin has


def gather(features, rois, pooling):
    """features, rois -> (R, C, ph, pw), channels-last in memory, in the features' dtype."""
    shapes, dtype = [feature.shape for feature in features], coordinate_dtype(features)
    channels, (height, width) = shapes[0][1], pooling.output_size
    rois = rois.to(dtype)
    if plan := plan_dense(shapes, rois, pooling):
        return gather_dense(features[0], plan)
    if len(rois) == 0:
        pooled = features[0].new_zeros(0, height, width, channels)
    else:
        taps = _plan(shapes, rois, pooling)
        pooled = _bag(_table(features, dtype), taps.pixel, taps.offset, taps.weight)  # (R * ph * pw, C)
        pooled = pooled.to(features[0].dtype)
    return pooled.view(len(rois), height, width, channels).permute(0, 3, 1, 2)


def scatter(grad, rois, shapes, pooling):
    """The sums over RoIs at every pixel, one (B, H, W, C) tensor a level, in float32 or float64.

    grad: (R, C, ph, pw); shapes: the levels' (B, C, H, W).
    """
    dtype, channels = coordinate_dtype([grad]), grad.shape[1]
    rois = rois.to(dtype)
    if len(rois) == 0:
        return [grad.new_zeros(batch, height, width, channels, dtype=dtype) for batch, _, height, width in shapes]
    if plan := plan_dense(shapes, rois, pooling):
        return [_scatter_dense(grad.flatten(1), plan, *shapes[0][2:])]
    taps = _plan(shapes, rois, pooling)
    bins = _bins(grad.flatten(2), dtype)
    pixel, order = torch.sort(taps.pixel, stable=True)
    weight = taps.weight[order]
    owner = taps.owner[order] if isinstance(taps.owner, torch.Tensor) else order // taps.owner
    sizes = [batch * height * width for batch, _, height, width in shapes]
    offset = torch.searchsorted(pixel, torch.arange(sum(sizes) + 1, dtype=pixel.dtype, device=pixel.device))
    gradients, base = [], 0
    for (batch, _, height, width), size in zip(shapes, sizes, strict=True):
        level = offset[base : base + size + 1]
        rows = slice(int(level[0]), int(level[-1]))
        gradient = _bag(bins, owner[rows], level - level[0], weight[rows])  # (B * H * W, C)
        gradients.append(gradient.view(batch, height, width, channels))
        base += size
    return gradients


def _bag(table, index, offset, weight):
    """Weighted sums of table rows: out[i] = sum of weight[t] * table[index[t]] over t in offset[i] : offset[i + 1]."""
    return torch.embedding_bag(table, index, offset.to(index.dtype), False, 0, False, weight, True)[0]


def _table(features, dtype):
    """The pixels of all levels as rows, (P, C): no copy where one channels-last level has the dtype already."""
    channels = features[0].shape[1]
    if len(features) == 1 and features[0].stride(1) == 1:
        return features[0].permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    sizes = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features]
    table = _scratch(features[0], sum(sizes), channels, dtype)
    for feature, rows in zip(features, table.split(sizes), strict=True):
        for image, pixels in zip(feature, rows.chunk(len(feature)), strict=True):
            transpose_into(pixels, image.flatten(1))
    return table


def _bins(grad, dtype):
    """The gradients of all bins as rows, (R, C, bins) -> (R * bins, C): no copy where they lie so already."""
    rois, channels, bins = grad.shape
    rows = grad.transpose(1, 2)
    if rows.is_contiguous():
        return rows.flatten(0, 1).to(dtype)
    table = _scratch(grad, rois * bins, channels, dtype)
    step = max(1, 2**19 // grad[0].numel())  # a few megabytes at a time
    for target, part in zip(table.view(rois, bins, channels).split(step), grad.split(step), strict=True):
        target.copy_(transposed(part))
    return table


class _Kept(threading.local):
    """Memory for tables, one for each thread. As new memory, which the system clears page by page, a table took up to
    half of the forward's time."""

    memory = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def _scratch(like, rows, channels, dtype):
    """An uninitialised (rows, channels) on the device of `like`, which the next call on this thread overwrites."""
    size = rows * channels * dtype.itemsize
    if not like.is_cpu or size > KEPT:
        return like.new_empty(rows, channels, dtype=dtype)
    if size > len(_kept.memory):
        _kept.memory = torch.empty(size, dtype=torch.uint8)
    return _kept.memory[:size].view(dtype).view(rows, channels)


def _plan(shapes, rois, pooling):
    """The taps of every bin over the table of all levels. shapes: the levels' (B, C, H, W)."""
    level = assign_levels(rois, pooling.scales)
    sizes = torch.tensor([(shape[2], shape[3], shape[0] * shape[2] * shape[3]) for shape in shapes], device=rois.device)
    starts = sizes[:, 2].cumsum(0) - sizes[:, 2]
    known = (level >= 0) & finite_rois(rois)
    level = level.clamp(min=0)
    height, width, _ = sizes[level].unbind(1)
    y, weight_y, x, weight_x = _both_axes(rois, rois.new_tensor(pooling.scales)[level], height, width, pooling)
    weight_y = weight_y * known[:, None, None]
    total = int(sizes[:, 2].sum())
    most_taps = len(rois) * y[0].numel() * x[0].numel()
    integer = torch.int32 if max(total, most_taps) < 2**31 else torch.int64
    base = starts[level] + rois[:, 0].long() * height * width
    row = (base[:, None, None] + y * width[:, None, None]).to(integer)  # (R, ph, I)
    pixel, weight = _pairs(torch.add, row, x.to(integer)), _pairs(torch.mul, weight_y, weight_x)
    bins, taps = pixel.shape
    if pooling.sampling_ratio > 0:
        offset = torch.arange(0, bins * taps + 1, taps, dtype=integer, device=rois.device)
        return Taps(pixel.view(-1), weight.view(-1), offset, taps)
    used = weight != 0  # adaptive grids differ from RoI to RoI: keep what counts
    count = used.sum(1)
    offset = torch.cat([count.new_zeros(1), count.cumsum(0)]).to(integer)
    return Taps(
        pixel[used], weight[used], offset, torch.repeat_interleave(torch.arange(bins, device=rois.device), count)
    )


def _pairs(combine, y, x):
    """`combine` of every y (R, ph, I) with every x (R, pw, J) of its RoI: (R * ph * pw, I * J)."""
    taps = y.shape[2], x.shape[2]
    y, x = (part.expand(-1, -1, *taps).flatten(2) for part in (y[:, :, :, None], x[:, :, None, :]))
    return combine(y[:, :, None], x[:, None]).flatten(0, 2)  # the pairs of a bin lie together: one long inner loop


def _both_axes(rois, scale, height, width, pooling):
    """Taps of both axes, y (R, ph, I), weight_y, x (R, pw, J), weight_x; the division by the samples is in weight_y."""
    corners = torch.where(rois[:, 1:].isfinite(), rois[:, 1:], 0)
    x1, y1, x2, y2 = (corners * scale.to(rois.dtype)[:, None] - 0.5 * pooling.aligned).unbind(1)
    ratio, aligned = pooling.sampling_ratio, pooling.aligned
    y, weight_y, count_y = sample_axis(y1, y2, pooling.output_size[0], height, ratio, aligned)
    x, weight_x, count_x = sample_axis(x1, x2, pooling.output_size[1], width, ratio, aligned)
    weight_y = weight_y / (count_y * count_x).clamp(min=1)[:, None, None, None]
    if ratio <= 0:
        y, weight_y = _merge(y.flatten(2), weight_y.flatten(2))
        x, weight_x = _merge(x.flatten(2), weight_x.flatten(2))
    return y.flatten(2), weight_y.flatten(2), x.flatten(2), weight_x.flatten(2)


def _merge(index, weight):
    """Add up the taps of an axis that fall on one pixel: (R, bins, S) -> (R, bins, pixels of the widest bin)."""
    low = torch.where(weight != 0, index, index.new_tensor(2**62)).amin(2, keepdim=True)
    shift = torch.where(weight != 0, index - low, 0)
    window = torch.arange(int(shift.max()) + 1, device=index.device)
    merged = weight.new_zeros(*index.shape[:2], len(window)).scatter_add_(2, shift, weight)
    return torch.where(merged != 0, low + window, 0), merged


class DensePlan(NamedTuple):
    """Single bins on one small map as a matrix product: every image has the same number of rows, some of them empty."""

    weight: torch.Tensor  # (B, rows, H * W), what a pixel weighs in a RoI
    row: torch.Tensor  # (R,) int64, where a RoI stands in (B * rows)


def plan_dense(shapes, rois, pooling):
    """The DensePlan of RoIs on the CPU. None where the gather is faster: several bins or levels, a large map, or one
    image with so many more RoIs than the others that the product would be one of zeros. None too where an image index
    is outside [0, B), which the operators refuse.

    The arrays are tiny, and what NumPy needs to start an operation is a fraction of what PyTorch needs.
    """
    (batch, _, height, width), *others = shapes
    if others or pooling.output_size != (1, 1) or height * width > 64 * 64 or not rois.is_cpu or len(rois) == 0:
        return None
    rois = rois.numpy()
    order = np.argsort(rois[:, 0], kind="stable")
    if not (rois[order[0], 0] >= 0 and rois[order[-1], 0] < batch):  # nan comes last
        return None
    image = rois[:, 0].astype(np.int64)
    counts = np.bincount(image, minlength=batch)
    rows = int(counts.max())
    if batch * rows > 2 * len(rois) + 64:
        return None
    row = np.empty_like(order)
    row[order] = np.arange(len(rois))  # the RoI's place in the order of images ...
    row += image * rows - (np.cumsum(counts) - counts)[image]  # ... where every image takes `rows` places
    side = max(height, width) + 1  # one pixel more takes the zeros beyond the last
    pixel, beyond, weight = _samples_along_axes(rois, height, width, pooling)
    cell = ((2 * row[:, None] + [0, 1])[..., None] * side + pixel).ravel()
    beyond, cells = (beyond * weight).ravel(), batch * rows * 2 * side
    along = np.bincount(cell, weight.ravel() - beyond, cells) + np.bincount(cell + 1, beyond, cells)
    along = along.astype(rois.dtype).reshape(-1, 2, side)  # what each pixel of an axis, x and y, weighs in a row
    weight = along[:, 1, :height, None] * along[:, 0, None, :width]
    return DensePlan(torch.from_numpy(weight.reshape(batch, rows, -1)), torch.from_numpy(row))


def _samples_along_axes(rois, height, width, pooling):
    """Where the samples of a single bin lie on both axes, x and y: the pixel below each, int64, how far beyond that one
    it lies, and its weight in the mean, (R, 2, S) each. The rules are those of `sample_axis`.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # boxes that are huge or not finite
        corners = (rois[:, 1:] * pooling.scales[0] - 0.5 * pooling.aligned)[..., None]
        low, size = corners[:, :2], corners[:, 2:] - corners[:, :2]  # (R, 2, 1)
        if not pooling.aligned:
            size = np.maximum(size, 1)
        adaptive = pooling.sampling_ratio <= 0
        count = np.ceil(size) if adaptive else np.full_like(size, pooling.sampling_ratio)
        divisor = np.fmax(count, 1)
        step = size / divisor
        extent = np.array([[width], [height]], rois.dtype)
        most, first = count.max(), 0
        if adaptive and not most <= 2 * max(height, width) + 6:  # of a huge box, only what can lie on the map
            most = np.fmin(count, 2 * extent + 6).max()
            first = np.maximum(np.ceil((-1 - low) / np.maximum(step, 1e-6) - 0.5) - 1, 0)
        sample = first + np.arange(max(1, int(most)), dtype=rois.dtype)
        position = low + (sample + 0.5) * step
        inside = (sample < count) & (position >= -1) & (position <= extent)
        weight = inside * (np.isfinite(corners).all(1, keepdims=True) / divisor)
    position = np.fmin(np.fmax(position, 0), extent - 1)
    pixel = position.astype(np.int64)
    return pixel, position - pixel, weight


def gather_dense(feature, plan):
    """(B, C, H, W) -> (R, C, 1, 1) as one batched product, (B, rows, H * W) @ (B, H * W, C), open to autograd."""
    pooled = torch.bmm(plan.weight, feature.flatten(2).transpose(1, 2).to(plan.weight.dtype))
    pooled = pooled.flatten(0, 1).index_select(0, plan.row)
    return pooled.to(feature.dtype)[:, :, None, None]


def _scatter_dense(grad, plan, height, width):
    """(R, C) -> (B, H, W, C), its transposed product."""
    batch, rows, _ = plan.weight.shape
    upstream = plan.weight.new_zeros(batch * rows, grad.shape[1]).index_copy_(0, plan.row, grad.to(plan.weight.dtype))
    return torch.bmm(plan.weight.transpose(1, 2), upstream.view(batch, rows, -1)).view(batch, height, width, -1)
