"""RoIAlign in plain PyTorch, fast on the CPU: a plan of taps, then one weighted gather.

All levels lie in one channels-last table of pixels (P, C). A RoI's bin is a bag of (pixel, weight) taps, so the forward
is one `embedding_bag` over the table. The backward is the transposed product: the same taps sorted by pixel make every
pixel a bag of bins, which is again one `embedding_bag`, without atomics and in a fixed order.

Where each RoI pools to a single bin, as FG-CLIP's regions do, most pixels of the map carry weight and a dense matrix
product is faster: (R, H W) weights, the outer product of both axes, times the (H W, C) map of each image.
"""

from typing import NamedTuple

import torch

from kernels.reference import assign_levels, coordinate_dtype, finite_rois, sample_axis


class Taps(NamedTuple):
    """Bags of taps: bin i of the R * ph * pw owns the taps offset[i] : offset[i + 1]."""

    pixel: torch.Tensor  # (T,) int32 or int64, row of the table
    weight: torch.Tensor  # (T,)
    offset: torch.Tensor  # (R * ph * pw + 1,) as pixel
    owner: torch.Tensor | int  # (T,) bin of each tap, or how many taps every bin has


def gather(features, rois, pooling):
    """features, rois -> (R, C, ph, pw), channels-last in memory, in the features' dtype."""
    channels, (height, width) = features[0].shape[1], pooling.output_size
    if len(rois) == 0:
        pooled = features[0].new_zeros(0, height, width, channels)
    elif is_dense([feature.shape for feature in features], pooling):
        pooled = _gather_dense(features[0], rois, pooling)
    else:
        dtype = coordinate_dtype(features)
        taps = _plan([feature.shape for feature in features], rois.to(dtype), pooling)
        pooled = _bag(_table(features, dtype), taps.pixel, taps.offset, taps.weight)  # (R * ph * pw, C)
        pooled = pooled.to(features[0].dtype)
    return pooled.view(len(rois), height, width, channels).permute(0, 3, 1, 2)


def scatter(grad, rois, shapes, pooling):
    """The sums over RoIs at every pixel, one (B, H, W, C) tensor a level, in float32 or float64.

    grad: (R, C, ph, pw); shapes: the levels' (B, C, H, W).
    """
    dtype, channels = coordinate_dtype([grad]), grad.shape[1]
    if len(rois) == 0:
        return [grad.new_zeros(batch, height, width, channels, dtype=dtype) for batch, _, height, width in shapes]
    if is_dense(shapes, pooling):
        return [_scatter_dense(grad, rois, shapes[0], pooling)]
    taps = _plan(shapes, rois.to(dtype), pooling)
    bins = grad.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)  # (R * ph * pw, C)
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
    table = features[0].new_empty(sum(sizes), channels, dtype=dtype)
    for feature, rows in zip(features, table.split(sizes), strict=True):
        for image, pixels in zip(feature, rows.chunk(len(feature)), strict=True):
            pixels.copy_(image.flatten(1).T)  # two-dimensional transposes have a fast path of their own
    return table


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


def is_dense(shapes, pooling):
    """One bin on one small map: a matrix product beats the gather."""
    return len(shapes) == 1 and pooling.output_size == (1, 1) and shapes[0][2] * shapes[0][3] <= 64 * 64


def _dense_axes(rois, height, width, pooling):
    """What each pixel of an axis weighs in a single bin: x and y, (R, 2, max(H, W)); the mean's division is in x."""
    finite = finite_rois(rois)
    edges = torch.where(finite[:, None], rois[:, 1:] * pooling.scales[0] - 0.5 * pooling.aligned, 0).view(-1, 2, 2)
    low, high = edges[:, 0].reshape(-1), edges[:, 1].reshape(-1)  # x and y of a RoI side by side
    extent = rois.new_tensor([width, height]).repeat(len(rois))
    index, weight, samples = sample_axis(low, high, 1, extent, pooling.sampling_ratio, pooling.aligned)
    along = rois.new_zeros(len(low), max(height, width)).scatter_add_(1, index.flatten(1), weight.flatten(1))
    along = along.view(len(rois), 2, -1)
    along[:, 0] *= (finite / samples.view(-1, 2).prod(1).clamp(min=1))[:, None]
    return along


def _dense_weights(along, height, width):
    """(R, H * W) weights of a single bin, the outer product of both axes."""
    return (along[:, 1, :height, None] * along[:, 0, None, :width]).flatten(1)


def _by_image(rois, batch):
    """The order of the RoIs by image, (R,) int64, and how many each image has."""
    image = rois[:, 0].long()
    return torch.argsort(image, stable=True), torch.bincount(image, minlength=batch).tolist()


def _gather_dense(feature, rois, pooling):
    dtype, (_, channels, height, width) = coordinate_dtype([feature]), feature.shape
    order, counts = _by_image(rois, len(feature))
    weight = _dense_weights(_dense_axes(rois[order].to(dtype), height, width, pooling), height, width)
    pooled = weight.new_empty(len(rois), channels)
    for pixels, own, out in zip(feature, weight.split(counts), pooled.split(counts), strict=True):
        torch.mm(own, pixels.flatten(1).T.to(dtype), out=out)  # (r, H W) @ (H W, C)
    return torch.empty_like(pooled).index_copy_(0, order, pooled).to(feature.dtype)


def _scatter_dense(grad, rois, shape, pooling):
    dtype, (batch, channels, height, width) = coordinate_dtype([grad]), shape
    order, counts = _by_image(rois, batch)
    weight = _dense_weights(_dense_axes(rois[order].to(dtype), height, width, pooling), height, width)
    grad = grad.flatten(1)[order].to(dtype)  # (R, C)
    gradient = grad.new_empty(batch, height * width, channels)
    for own, upstream, out in zip(weight.split(counts), grad.split(counts), gradient, strict=True):
        torch.mm(own.T, upstream, out=out)  # (H W, r) @ (r, C): zeros where an image has no RoI
    return gradient.view(batch, height, width, channels)


def pool_dense(feature, rois, pooling):
    """(B, C, H, W), (R, 5) -> (R, C, 1, 1) as one batched product, (B, most, H W) @ (B, H W, C).

    Made of operations that PyTorch differentiates itself, which on the CPU costs less than an operator of our own.
    None where one image has so many more RoIs than the others that it would be a product of zeros.
    """
    dtype, (batch, channels, height, width) = coordinate_dtype([feature]), feature.shape
    image = rois[:, :1].long()
    rank = (image == torch.arange(batch)).cumsum(0)  # (R, B), how many RoIs of each image up to this one
    most = int(rank[-1].max())  # every image gets room for as many RoIs
    if batch * most > 2 * len(rois) + 64:
        return None
    place = (image * most + rank.gather(1, image) - 1).squeeze(1)
    along = _dense_axes(rois.to(dtype), height, width, pooling)
    along = along.new_zeros(batch * most, *along.shape[1:]).index_copy_(0, place, along)
    weight = _dense_weights(along, height, width).view(batch, most, -1)
    pooled = torch.bmm(weight, feature.flatten(2).transpose(1, 2).to(dtype)).flatten(0, 1)
    return pooled.index_select(0, place).to(feature.dtype).view(len(rois), channels, 1, 1)
