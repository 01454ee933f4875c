"""RoIAlign in plain PyTorch: a plan of taps, then one weighted gather.

All levels lie in one channels-last table of pixels (P, C). A RoI's bin is a bag of (pixel, weight) taps, so the forward
is one `embedding_bag` over the table. The backward is the transposed product: the same taps sorted by pixel make every
pixel a bag of bins, which is again one `embedding_bag`, without atomics and in a fixed order.
"""

import torch

from kernels.reference import assign_levels, coordinate_dtype, finite_rois, sample_axis


def forward(features, rois, pooling):
    """features, rois -> (R, C, ph, pw), channels-last in memory, in the features' dtype."""
    dtype, channels = coordinate_dtype(features), features[0].shape[1]
    pixel, weight, offset = _plan([feature.shape for feature in features], rois.to(dtype), pooling)
    sizes = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features]
    table = features[0].new_empty(sum(sizes), channels, dtype=dtype)
    for feature, rows in zip(features, table.split(sizes), strict=True):
        pixels = feature.permute(0, 2, 3, 1)
        rows.view(pixels.shape).copy_(pixels)
    pooled = _bag(table, pixel, offset, weight).to(features[0].dtype)  # (R * ph * pw, C)
    return pooled.view(len(rois), *pooling.output_size, channels).permute(0, 3, 1, 2)


def backward(grad, rois, shapes, pooling):
    """The sums over RoIs at every pixel, one (B, H, W, C) tensor per level, in float32 or float64.

    grad: (R, C, ph, pw); shapes: the levels' (B, C, H, W).
    """
    dtype, channels = coordinate_dtype([grad]), grad.shape[1]
    pixel, weight, offset = _plan(shapes, rois.to(dtype), pooling)
    bins = grad.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    owner = torch.repeat_interleave(torch.arange(len(bins), device=grad.device), offset.diff())
    pixel, order = torch.sort(pixel, stable=True)
    owner, weight = owner.to(pixel.dtype)[order], weight[order]
    gradients, first = [], 0
    for batch, _, height, width in shapes:  # a call per level: its output is the level's gradient, without a copy
        last = first + batch * height * width
        offset = torch.searchsorted(pixel, torch.arange(first, last + 1, dtype=pixel.dtype, device=pixel.device))
        rows = slice(int(offset[0]), int(offset[-1]))
        gradient = _bag(bins, owner[rows], offset - offset[0], weight[rows])
        gradients.append(gradient.view(batch, height, width, channels))
        first = last
    return gradients


def _bag(table, index, offset, weight):
    """Weighted sums of table rows: out[i] = sum of weight[t] * table[index[t]] over t in offset[i] : offset[i + 1]."""
    return torch.embedding_bag(table, index, offset.to(index.dtype), False, 0, False, weight, True)[0]


def _plan(shapes, rois, pooling):
    """The taps of every bin over the table of all levels, whose shapes are (B, C, H, W).

    Returns pixel (T,) int32 or int64, the row of the table; weight (T,); and offset (R * ph * pw + 1,): bin i owns the
    taps offset[i] : offset[i + 1].
    """
    level = assign_levels(rois, pooling.scales)
    sizes = torch.tensor([(shape[2], shape[3], shape[0] * shape[2] * shape[3]) for shape in shapes], device=rois.device)
    starts = sizes[:, 2].cumsum(0) - sizes[:, 2]
    pools = (level >= 0) & finite_rois(rois)
    level = level.clamp(min=0)
    height, width, _ = sizes[level].unbind(1)
    corners = torch.where(pools[:, None], rois[:, 1:], 0) * rois.new_tensor(pooling.scales)[level, None]
    x1, y1, x2, y2 = (corners - 0.5 * pooling.aligned).unbind(1)
    sampling = pooling.sampling_ratio, pooling.aligned
    y, weight_y, count_y = sample_axis(y1, y2, pooling.output_size[0], height, *sampling)
    x, weight_x, count_x = sample_axis(x1, x2, pooling.output_size[1], width, *sampling)
    weight_y = weight_y / (count_y * count_x).clamp(min=1)[:, None, None, None] * pools[:, None, None, None]
    y, weight_y, x, weight_x = (part.flatten(2) for part in (y, weight_y, x, weight_x))  # (R, bins, 2 S)
    if pooling.sampling_ratio <= 0:
        y, weight_y = _merge(y, weight_y)
        x, weight_x = _merge(x, weight_x)
    taps = y.shape[2] * x.shape[2]
    most = max(int(sizes[:, 2].sum()), len(rois) * y.shape[1] * x.shape[1] * taps)
    integer = torch.int32 if most < 2**31 else torch.int64
    row = (starts[level] + rois[:, 0].long() * height * width)[:, None, None] + y * width[:, None, None]
    pixel = row.to(integer)[:, :, None, :, None] + x.to(integer)[:, None, :, None, :]  # (R, ph, pw, I, J)
    weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
    pixel, weight = pixel.view(-1, taps), weight.view(-1, taps)
    if pooling.sampling_ratio > 0:
        return pixel.view(-1), weight.view(-1), torch.arange(0, pixel.numel() + 1, taps, device=rois.device)
    used = weight != 0  # adaptive grids differ from RoI to RoI: keep what counts
    count = used.sum(1)
    return pixel[used], weight[used], torch.cat([count.new_zeros(1), count.cumsum(0)])


def _merge(index, weight):
    """Add up the taps of an axis that fall on one pixel: (R, bins, S) -> (R, bins, pixels of the widest bin)."""
    low = torch.where(weight != 0, index, index.new_tensor(2**62)).amin(2, keepdim=True)
    shift = torch.where(weight != 0, index - low, 0)
    window = torch.arange(int(shift.max()) + 1, device=index.device)
    merged = weight.new_zeros(*index.shape[:2], len(window)).scatter_add_(2, shift, weight)
    return torch.where(merged != 0, low + window, 0), merged
