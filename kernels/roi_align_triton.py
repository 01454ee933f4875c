"""RoIAlign in Triton: all levels in one launch each way, no atomics, no host synchronisation, bitwise reproducible.

forward   a program takes one bin row of one RoI and a block of channels, and sums its taps in float32.
backward  RoIAlign is separable, so the gradient of an 8 x 8 tile of pixels is a sum over RoIs of small matrix products,
          dF[64, C] += (A x B)[64, bins] dY[bins, C]. A program owns a tile, scans the RoIs of its image for those that
          touch it, always in the same order, and writes every pixel once.

The kernels keep to what triton 3.6 and 3.9 share and to what its interpreter computes rightly: matrix products of half
precision run in float32 there (`UPCAST`), because the interpreter multiplies bfloat16 bit patterns.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu import PRODUCTS, Launch, launch_for
from kernels.reference import assign_levels

TILE = 8  # pixels per side of a backward tile
SCAN = 256  # RoIs looked at together in the backward

# Measured on an H100 (sm_90). Elsewhere what compiles without spills (tests/kernels/test_ahead_of_time.py).
FORWARD = Launch(channels=256, warps=4, stages=2)
FORWARD_ONE_BIN = Launch(channels=256, warps=1, stages=2)  # 8 channels per thread: 16-byte loads
# Of half-precision gradients; float32 ones, three products each, take the default everywhere.
BACKWARD = dict(default=Launch(channels=32, warps=4, stages=1), sm_90=Launch(channels=128, warps=4, stages=1))
BACKWARD_ONE_BIN = dict(default=Launch(channels=64, warps=4, stages=1), sm_90=Launch(channels=256, warps=4, stages=1))
BACKWARD_ONE_BIN |= dict(sm_100=Launch(channels=128, warps=8, stages=1))


@triton.jit
def _select(values, level, LEVELS: tl.constexpr):
    """values[level] where the level is known at run time only."""
    chosen = values[0]
    for index in tl.static_range(1, LEVELS):
        chosen = tl.where(level == index, values[index], chosen)
    return chosen


@triton.jit
def _box(rois, row, known, thresholds, batch, LEVELS: tl.constexpr):
    """Image, level, corners in image pixels, whether it pools to something, and whether its image exists."""
    number = tl.load(rois + row * 5, mask=known, other=0.0)
    x1 = tl.load(rois + row * 5 + 1, mask=known, other=0.0)
    y1 = tl.load(rois + row * 5 + 2, mask=known, other=0.0)
    x2 = tl.load(rois + row * 5 + 3, mask=known, other=0.0)
    y2 = tl.load(rois + row * 5 + 4, mask=known, other=0.0)
    exists = (number >= 0) & (number < batch)
    image = tl.where(exists, number, 0.0).to(tl.int64)
    infinity = float("inf")
    finite = (tl.abs(x1) < infinity) & (tl.abs(y1) < infinity) & (tl.abs(x2) < infinity) & (tl.abs(y2) < infinity)
    x1 = tl.where(finite, x1, 0.0)
    y1 = tl.where(finite, y1, 0.0)
    x2 = tl.where(finite, x2, 0.0)
    y2 = tl.where(finite, y2, 0.0)
    area = (x2 - x1) * (y2 - y1)
    level = tl.zeros_like(image).to(tl.int32)
    if LEVELS > 1:
        finite = finite & (area >= 0)  # torchvision leaves rows without a level at zero
        for index in tl.static_range(1, LEVELS):
            level += (area >= thresholds[index]).to(tl.int32)
    return image, level, x1, y1, x2, y2, finite, exists


@triton.jit
def _map_of(maps, image, level, LEVELS: tl.constexpr):
    """Pointer to an image's map of a level, the map's height, width and strides (c, h, w), and its scale."""
    features, heights, widths, strides_b, strides_c, strides_h, strides_w, scales, _ = maps
    base = _select(features, level, LEVELS) + image * _select(strides_b, level, LEVELS).to(tl.int64)
    height = _select(heights, level, LEVELS)
    width = _select(widths, level, LEVELS)
    stride_c = _select(strides_c, level, LEVELS).to(tl.int64)
    stride_h = _select(strides_h, level, LEVELS).to(tl.int64)
    stride_w = _select(strides_w, level, LEVELS).to(tl.int64)
    return base, height, width, stride_c, stride_h, stride_w, _select(scales, level, LEVELS)


@triton.jit
def _axis(low, high, scale, extent, BINS: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr):
    """An axis of a RoI on its map, as in `reference.sample_axis`.

    Returns the lower edge, the length of a bin, its samples (at least 1), how many of them can lie on the map, and its
    samples as they are.
    """
    shift = 0.5 if ALIGNED else 0.0
    low = low * scale - shift
    size = high * scale - shift - low
    if not ALIGNED:
        size = tl.maximum(size, 1.0)
    length = tl.div_rn(size, tl.zeros_like(size) + BINS)  # a plain division is off by a bit on a GPU: ceil(3.0000002)
    if SAMPLES > 0:
        count = tl.zeros_like(length) + SAMPLES
        steps = tl.zeros_like(length) + SAMPLES
    else:
        count = tl.ceil(length)
        steps = tl.minimum(count, 2.0 * extent + 6.0)
    return low, length, tl.maximum(count, 1.0), tl.maximum(steps, 0.0).to(tl.int32), count


@triton.jit
def _first(start, length, count, SAMPLES: tl.constexpr):
    """The first sample of a bin that can lie on the map."""
    if SAMPLES > 0:
        first = tl.zeros_like(start)
    else:
        step = tl.maximum(length / count, 1e-6)
        first = tl.maximum(tl.ceil((-1.0 - start) / step - 0.5) - 1.0, 0.0)
    return first


@triton.jit
def _position(start, length, count, total, sample, extent):
    """Where a sample lies on an axis, clamped to the map, and whether it counts."""
    position = start + tl.div_rn((sample + 0.5) * length, count)
    inside = (sample < total) & (position >= -1.0) & (position <= extent)
    return tl.minimum(tl.maximum(tl.where(inside, position, 0.0), 0.0), extent - 1.0), inside


@triton.jit
def _add_sample(total, origin, y, x, height, width, stride_h, stride_w, mask):
    """total (N, C) plus the bilinear interpolation at y, x (N,). origin: the channels' pointers; mask: (N, C)."""
    y_low = tl.floor(y)
    x_low = tl.floor(x)
    y_part = y - y_low
    x_part = x - x_low
    lower = y_low.to(tl.int64) * stride_h
    upper = tl.minimum(y_low + 1.0, height - 1.0).to(tl.int64) * stride_h
    left = x_low.to(tl.int64) * stride_w
    right = tl.minimum(x_low + 1.0, width - 1.0).to(tl.int64) * stride_w
    tap = tl.load(origin + (lower + left)[:, None], mask=mask, other=0.0).to(tl.float32)
    total += tap * ((1 - y_part) * (1 - x_part))[:, None]
    tap = tl.load(origin + (lower + right)[:, None], mask=mask, other=0.0).to(tl.float32)
    total += tap * ((1 - y_part) * x_part)[:, None]
    tap = tl.load(origin + (upper + left)[:, None], mask=mask, other=0.0).to(tl.float32)
    total += tap * (y_part * (1 - x_part))[:, None]
    tap = tl.load(origin + (upper + right)[:, None], mask=mask, other=0.0).to(tl.float32)
    total += tap * (y_part * x_part)[:, None]
    return total


@triton.jit(do_not_specialize=["batch"])
def pool_forward(
    maps, rois, out, batch, channels, LEVELS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PW_PAD: tl.constexpr,
    SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (R, PH, PW, C): one bin row of one RoI, BLOCK_C channels."""
    row = (tl.program_id(0) // PH).to(tl.int64)
    p = tl.program_id(0) % PH
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, level, x1, y1, x2, y2, finite, exists = _box(rois, row, True, maps[-1], batch, LEVELS)
    base, height, width, stride_c, stride_h, stride_w, scale = _map_of(maps, image, level, LEVELS)
    offset_c = c.to(tl.int64)
    if not CHANNELS_LAST:
        offset_c *= stride_c
    y1, length_y, count_y, steps_y, total_y = _axis(y1, y2, scale, height, PH, SAMPLES, ALIGNED)
    x1, length_x, count_x, steps_x, total_x = _axis(x1, x2, scale, width, PW, SAMPLES, ALIGNED)
    start_x = x1 + tl.arange(0, PW_PAD) * length_x  # (PW_PAD,)
    start_y = tl.zeros_like(start_x) + (y1 + p * length_y)
    steps_y = tl.where(finite, steps_y, 0)
    first_y = _first(start_y, length_y, count_y, SAMPLES)
    first_x = _first(start_x, length_x, count_x, SAMPLES)
    live = (c < channels)[None, :] & (tl.arange(0, PW_PAD) < PW)[:, None]
    total = tl.zeros((PW_PAD, BLOCK_C), dtype=tl.float32)
    for i in range(0, steps_y):
        y, inside_y = _position(start_y, length_y, count_y, total_y, first_y + i, height)
        for j in range(0, steps_x):
            x, inside_x = _position(start_x, length_x, count_x, total_x, first_x + j, width)
            mask = live & (inside_x & inside_y)[:, None]
            total = _add_sample(total, base + offset_c[None, :], y, x, height, width, stride_h, stride_w, mask)
    total = total / (count_y * count_x) + tl.where(exists, 0.0, float("nan"))
    place = out + ((row * PH + p) * PW + tl.arange(0, PW_PAD))[:, None] * channels + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _axis_weights(pixel, low, length, count, total, steps, bins, extent, SAMPLES: tl.constexpr):
    """(8, bins) sums of the bilinear weights of a bin's samples at each pixel of an axis."""
    start = low + bins * length
    first = _first(start, length, count, SAMPLES)
    weight = tl.zeros((pixel.shape[0], bins.shape[0]), dtype=tl.float32)
    for i in range(0, steps):
        position, inside = _position(start, length, count, total, first + i, extent)
        hat = tl.maximum(1.0 - tl.abs(pixel[:, None] - position[None, :]), 0.0)
        weight += tl.where(inside[None, :], hat, 0.0)
    return weight


@triton.jit
def _tiles(extent, TILE: tl.constexpr):
    """How many tiles cover an axis."""
    return (tl.cast(extent, tl.int32) + TILE - 1) // TILE


@triton.jit(do_not_specialize=["count_rois", "batch"])
def pool_backward(
    maps, rois, grad, count_rois, batch, channels, LEVELS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PW_PAD: tl.constexpr, BIN_ROWS: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, SCAN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gradients[l] (B, H, W, C) from grad (R, PH, PW, C): one tile of one image and level, BLOCK_C channels."""
    gradients, heights, widths, scales, thresholds = maps
    tile = tl.program_id(0)
    my_level = 0
    ahead = 0  # tiles of the levels before
    skipped = 0
    for index in tl.static_range(1, LEVELS):
        ahead += batch * _tiles(heights[index - 1], TILE) * _tiles(widths[index - 1], TILE)
        my_level += (tile >= ahead).to(tl.int32)
        skipped = tl.where(tile >= ahead, ahead, skipped)
    tile -= skipped
    extent_y = _select(heights, my_level, LEVELS)
    extent_x = _select(widths, my_level, LEVELS)
    scale = _select(scales, my_level, LEVELS)
    across = _tiles(extent_x, TILE)
    down = _tiles(extent_y, TILE)
    my_image = tile // (across * down)
    top = (tile % (across * down)) // across * TILE
    left = tile % across * TILE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = 0.5 if ALIGNED else 0.0
    pixel_y = (top + tl.arange(0, TILE)).to(tl.float32)
    pixel_x = (left + tl.arange(0, TILE)).to(tl.float32)
    q = tl.arange(0, PW_PAD)
    total = tl.zeros((TILE * TILE, BLOCK_C), dtype=tl.float32)
    for start in range(0, count_rois, SCAN):
        lane = tl.arange(0, SCAN)
        rows = (start + lane).to(tl.int64)
        image, level, x1, y1, x2, y2, finite, exists = _box(rois, rows, rows < count_rois, thresholds, batch, LEVELS)
        x1 = x1 * scale - shift
        y1 = y1 * scale - shift
        x2 = x2 * scale - shift
        y2 = y2 * scale - shift
        if not ALIGNED:
            x2 = tl.maximum(x2, x1 + 1.0)
            y2 = tl.maximum(y2, y1 + 1.0)
        hit = (rows < count_rois) & finite & exists & (image == my_image) & (level == my_level)
        # A pixel of slack on either side; what is let in wrongly weighs nothing.
        hit &= (tl.minimum(y1, y2) < top + TILE + 1.0) & (tl.maximum(y1, y2) > top - 2.0)
        hit &= (tl.minimum(x1, x2) < left + TILE + 1.0) & (tl.maximum(x1, x2) > left - 2.0)
        hits = tl.sum(hit.to(tl.int32), axis=0)
        for _ in range(0, hits):
            chosen = tl.min(tl.where(hit, lane, SCAN), axis=0)
            hit &= lane != chosen
            row = (start + chosen).to(tl.int64)
            _, _, low_x, low_y, high_x, high_y, _, _ = _box(rois, row, True, thresholds, batch, LEVELS)
            low_y, length_y, count_y, steps_y, total_y = _axis(low_y, high_y, scale, extent_y, PH, SAMPLES, ALIGNED)
            low_x, length_x, count_x, steps_x, total_x = _axis(low_x, high_x, scale, extent_x, PW, SAMPLES, ALIGNED)
            along_x = _axis_weights(pixel_x, low_x, length_x, count_x, total_x, steps_x, q, extent_x, SAMPLES)
            along_x = along_x / (count_y * count_x)
            for p_start in range(0, PH, BIN_ROWS):
                p = p_start + tl.arange(0, BIN_ROWS)
                along_y = _axis_weights(pixel_y, low_y, length_y, count_y, total_y, steps_y, p, extent_y, SAMPLES)
                weight = along_y[:, None, :, None] * along_x[None, :, None, :]
                weight = tl.reshape(weight, (TILE * TILE, BIN_ROWS * PW_PAD))
                lanes = tl.arange(0, BIN_ROWS * PW_PAD)
                bin_y = p_start + lanes // PW_PAD
                bin_x = lanes % PW_PAD
                mask = ((bin_y < PH) & (bin_x < PW))[:, None] & (c < channels)[None, :]
                place = grad + ((row * PH + bin_y) * PW + bin_x)[:, None] * channels + c[None, :]
                upstream = tl.load(place, mask=mask, other=0.0)  # (bins, BLOCK_C)
                if UPCAST:
                    total = tl.dot(weight, upstream.to(tl.float32), total, input_precision="ieee")
                elif upstream.dtype == tl.float32:
                    total = tl.dot(weight, upstream, total, input_precision=PRECISION)
                else:  # the weight as the sum of two half-precision numbers keeps its error below 2^-16
                    high = weight.to(upstream.dtype)
                    low = (weight - high.to(tl.float32)).to(upstream.dtype)
                    total = tl.dot(high, upstream, total)
                    total = tl.dot(low, upstream, total)
    lanes = tl.arange(0, TILE * TILE)
    y = top + lanes // TILE
    x = left + lanes % TILE
    height = tl.cast(extent_y, tl.int32)
    width = tl.cast(extent_x, tl.int32)
    mask = ((y < height) & (x < width))[:, None] & (c < channels)[None, :]
    out = _select(gradients, my_level, LEVELS)
    place = out + ((my_image.to(tl.int64) * height + y) * width + x)[:, None] * channels + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@functools.cache
def level_thresholds(scales):
    """The smallest float32 area of each level; torchvision's rounding of the logarithm is found by bisection."""
    thresholds = [0.0]
    for level in range(1, len(scales)):
        low, high = 0, 0x7F7FFFFF  # bit patterns of positive float32 numbers are in their order
        while low < high:
            middle = (low + high) // 2
            area = torch.tensor([middle], dtype=torch.int32).view(torch.float32)
            box = torch.stack([area * 0, area * 0, area * 0, area, area * 0 + 1], 1)
            low, high = (low, middle) if assign_levels(box, scales)[0] >= level else (middle + 1, high)
        thresholds.append(float(torch.tensor([low], dtype=torch.int32).view(torch.float32)))
    return tuple(thresholds)


def _sizes(shapes):
    """Heights and widths of the levels, for the kernels as floats: whole numbers in a tuple would be compiled for anew
    whenever one becomes or ceases to be a multiple of 16, as they do in training on images of several sizes."""
    return tuple(tuple(float(shape[axis]) for shape in shapes) for axis in (2, 3))


def _maps(features, scales):
    """The kernels' `maps`: a tuple of pointers, heights, widths, strides (b, c, h, w), scales and thresholds."""
    strides = [tuple(feature.stride(axis) for feature in features) for axis in range(4)]
    scales = tuple(scales)
    return tuple(features), *_sizes([part.shape for part in features]), *strides, scales, level_thresholds(scales)


def _options(pooling, launch):
    """The constants that all kernels share."""
    height, width = pooling.output_size
    sizes = dict(LEVELS=len(pooling.scales), PH=height, PW=width, SAMPLES=max(0, pooling.sampling_ratio))
    return sizes | dict(ALIGNED=pooling.aligned, num_warps=launch.warps, num_stages=launch.stages)


def forward(features, rois, pooling):
    """features, rois -> (R, C, ph, pw), channels-last in memory, in the features' dtype."""
    channels, (height, width) = features[0].shape[1], pooling.output_size
    out = features[0].new_empty(len(rois), height, width, channels)
    launch = FORWARD_ONE_BIN if width == 1 else FORWARD
    block = min(launch.channels, triton.next_power_of_2(channels))
    pool_forward[(len(rois) * height, triton.cdiv(channels, block))](
        _maps(features, pooling.scales), rois.float().contiguous(), out, features[0].shape[0], channels,
        CHANNELS_LAST=all(feature.stride(1) == 1 for feature in features), PW_PAD=triton.next_power_of_2(width),
        BLOCK_C=block, **_options(pooling, launch),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def backward(grad, rois, shapes, pooling):
    """The sums over RoIs at every pixel, one (B, H, W, C) tensor per level, in the gradient's dtype."""
    batch, channels = shapes[0][:2]
    gradients = tuple(grad.new_empty(batch, height, width, channels) for _, _, height, width in shapes)
    tiles = sum(batch * triton.cdiv(shape[2], TILE) * triton.cdiv(shape[3], TILE) for shape in shapes)
    padded, scales = triton.next_power_of_2(pooling.output_size[1]), tuple(pooling.scales)
    table = BACKWARD_ONE_BIN if padded == 1 else BACKWARD
    launch = table["default"] if grad.dtype == torch.float32 else launch_for(table, grad.device)
    block = max(16, min(launch.channels, triton.next_power_of_2(channels)))
    pool_backward[(tiles, triton.cdiv(channels, block))](
        (gradients, *_sizes(shapes), scales, level_thresholds(scales)), rois.float().contiguous(),
        grad.permute(0, 2, 3, 1).contiguous(), len(rois), batch, channels, PW_PAD=padded,
        BIN_ROWS=bin_rows(pooling.output_size), TILE=TILE, SCAN=SCAN, BLOCK_C=block, **_options(pooling, launch),
        **PRODUCTS,
    )  # fmt: skip
    return gradients


def bin_rows(output_size):
    """Bin rows of one matrix product in the backward: up to 64 bins, at least the 16 a tensor core wants."""
    height, width = (triton.next_power_of_2(size) for size in output_size)
    return max(1, 16 // width, min(height, 64 // width))
