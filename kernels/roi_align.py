"""Multi-level RoIAlign, and RoIAlign followed by a linear projection.

The public functions check, apply autocast and pick the implementation; the operators behind them are registered with
`torch.library`, so that torch.compile sees one node each.
"""

import math
from typing import NamedTuple

import torch

from kernels.dispatch import described, engine, operator, resolve_backend
from kernels.products import linear


class Pooling(NamedTuple):
    """The constants of a pooling, as the operators take them."""

    scales: list[float]
    output_size: list[int]  # ph, pw
    sampling_ratio: int
    aligned: bool


def multiscale_roi_align(
    features, rois, *, scales, output_size, sampling_ratio=2, aligned=False, implementation="auto"
):
    """Pool every RoI from its pyramid level to a fixed size (torchvision's `MultiScaleRoIAlign` and `roi_align`).

    features: list of (B, C, H_l, W_l) tensors, finest first, float64, float32, float16 or bfloat16, in NCHW or
        channels-last memory; sums run in float32 (float64 for float64). Under autocast they are cast to its dtype.
    rois: (R, 5) floats = image index, x1, y1, x2, y2 in pixels of the image; coordinates stay in float32 (float64 with
        float64 features) and get no gradient. A box with a coordinate that is not finite pools to zero.
    scales: one float per level, feature pixels per image pixel; several levels halve from one to the next, and a RoI's
        level is clamp(floor(4 + log2(sqrt(area) / 224) + 1e-6)) (Lin et al., FPN, eq. 1, as torchvision rounds it).
    output_size: int or (ph, pw). sampling_ratio: samples per bin and axis; 0 or less: adaptive, ceil(size / bins).
    aligned: shift coordinates by half a pixel and do not force boxes to at least one pixel.
    implementation: "auto" (Triton on a GPU, PyTorch elsewhere), "triton" or "torch".

    Returns (R, C, ph, pw) in the features' dtype, a new tensor, channels-last in memory. Deterministic.
    Raises ValueError on shapes, dtypes or devices that do not fit, when `rois` asks for a gradient, and, on the CPU,
    when an image index is outside [0, B); on a GPU such a row comes out as NaN, since looking would stall it.
    """
    features, pooling = _checked(features, rois, scales, output_size, sampling_ratio, aligned)
    return _pool(features, rois.detach(), *pooling, resolve_backend(implementation, features))


def roi_align_project(
    features, rois, weight, bias=None, *, scales, output_size, sampling_ratio=2, aligned=False, implementation="auto"
):
    """RoIAlign and the linear layer on its flattened output: features, rois -> (R, D).

    weight: (D, C * ph * pw), flattened in the order (C, ph, pw); bias: (D,) or None; both are cast like the features
    under autocast and must have their dtype otherwise. Everything else, and what is raised, as in
    `multiscale_roi_align`.
    """
    features, pooling = _checked(features, rois, scales, output_size, sampling_ratio, aligned)
    height, width = pooling.output_size
    weight, bias = (None if part is None else _autocast(part) for part in (weight, bias))
    shapes = dict(weight=(len(weight), features[0].shape[1] * height * width), bias=weight.shape[:1])
    for name, part in dict(weight=weight, bias=bias).items():
        if part is None:
            continue
        if part.shape != shapes[name] or part.dtype != features[0].dtype or part.device != features[0].device:
            expected = f"{tuple(shapes[name])}, {features[0].dtype}, on {features[0].device}"
            raise ValueError(f"{name} must be {expected}, got {described(part)}")
    backend, rois = resolve_backend(implementation, features), rois.detach()
    pooled = _pool(features, rois, *pooling, backend)  # (R, C, ph, pw), the channels innermost in memory
    if backend == "triton" and len(rois) > len(weight):  # the smaller of the two is put into the other's order
        weight = weight.unflatten(1, pooled.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        pooled = pooled.permute(0, 2, 3, 1)
    return linear(pooled.flatten(1), weight, bias)


def _autocast(tensor):
    """The tensor as autocast would hand it to a matrix product."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _checked(features, rois, scales, output_size, sampling_ratio, aligned):
    """The features after autocast and the Pooling; raises ValueError on arguments that do not fit together."""
    features = list(features)
    if not features or len(features) != len(scales):
        raise ValueError(f"one scale per level is needed, got {len(features)} features and {len(scales)} scales")
    first = features[0]
    for feature in features:
        like = feature.shape[:2] == first.shape[:2] and feature.dtype == first.dtype and feature.device == first.device
        if not like or feature.ndim != 4 or 0 in feature.shape[1:] or not feature.is_floating_point():
            expected = f"(B, C, H, W), with channels and pixels, floating point, like the first: {described(first)}"
            raise ValueError(f"every level must be {expected}; got {described(feature)}")
    if rois.ndim != 2 or rois.shape[1] != 5 or not rois.is_floating_point() or rois.device != first.device:
        expected = f"(R, 5) = image index, x1, y1, x2, y2, floating point, on {first.device}"
        raise ValueError(f"rois must be {expected}, got {described(rois)}")
    if rois.requires_grad and torch.is_grad_enabled():
        raise ValueError("rois get no gradient: detach them")
    exponents = [-math.log2(scale) for scale in scales]
    if any(round(exponent) != round(exponents[0]) + level for level, exponent in enumerate(exponents)):
        raise ValueError(f"scales must halve from level to level, got {list(scales)}")
    output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(output_size) != 2 or min(output_size) < 1:
        raise ValueError(f"output_size must be a positive int or pair, got {output_size}")
    pooling = Pooling([float(scale) for scale in scales], output_size, sampling_ratio, aligned)
    return [_autocast(feature) for feature in features], pooling


@operator(
    "multiscale_roi_align",
    "(Tensor[] features, Tensor rois, float[] scales, SymInt[] output_size, SymInt sampling_ratio, "
    "bool aligned, str backend) -> Tensor",
)
def _pool(features, rois, scales, output_size, sampling_ratio, aligned, backend):
    images, channels = features[0].shape[:2]
    if rois.is_cpu and not ((rois[:, 0] >= 0) & (rois[:, 0] < images)).all():
        raise ValueError(f"the image index of every roi must be in [0, {images})")
    if len(rois) == 0:
        return features[0].new_empty(0, *output_size, channels).permute(0, 3, 1, 2)
    pooling = Pooling(scales, output_size, sampling_ratio, aligned)
    with torch.cuda.device_of(rois):  # Triton launches on the current GPU
        return engine("roi_align", backend).forward(features, rois, pooling)


@torch.library.register_fake(_pool)
def _(features, rois, scales, output_size, sampling_ratio, aligned, backend):
    return features[0].new_empty(rois.shape[0], *output_size, features[0].shape[1]).permute(0, 3, 1, 2)


@operator(
    "multiscale_roi_align_backward",
    "(Tensor grad, Tensor rois, SymInt[] shapes, float[] scales, SymInt sampling_ratio, "
    "bool aligned, str backend) -> Tensor[]",
)
def _pool_backward(grad, rois, shapes, scales, sampling_ratio, aligned, backend):
    """The gradients of the features, (B, H, W, C) each. shapes: (B, C, H, W) of all levels in one list."""
    shapes = [tuple(shapes[start : start + 4]) for start in range(0, len(shapes), 4)]
    if len(rois) == 0:
        return [grad.new_zeros(batch, height, width, channels) for batch, channels, height, width in shapes]
    pooling = Pooling(scales, grad.shape[2:], sampling_ratio, aligned)
    with torch.cuda.device_of(rois):
        gradients = engine("roi_align", backend).backward(grad, rois, shapes, pooling)
    return [pixels.to(grad.dtype) for pixels in gradients]


@torch.library.register_fake(_pool_backward)
def _(grad, rois, shapes, scales, sampling_ratio, aligned, backend):
    levels = zip(shapes[0::4], shapes[1::4], shapes[2::4], shapes[3::4], strict=True)
    return [grad.new_empty(batch, height, width, channels) for batch, channels, height, width in levels]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("the backward of multiscale_roi_align has no derivative")


torch.library.register_autograd(_pool_backward, _no_second_derivative)


def _save_pool(ctx, inputs, output):
    features, rois, scales, _, *others = inputs
    ctx.save_for_backward(rois)
    ctx.pooling = scales, *others
    ctx.shapes = [size for feature in features for size in feature.shape]
    ctx.channels_last = [feature.stride(1) == 1 for feature in features]


def _pool_gradients(ctx, grad):
    """The gradients of the features, in the features' memory format."""
    gradients = [
        part.permute(0, 3, 1, 2) for part in _pool_backward(grad, *ctx.saved_tensors, ctx.shapes, *ctx.pooling)
    ]
    pairs = zip(gradients, ctx.channels_last, strict=True)
    return [part if last else part.contiguous() for part, last in pairs], *[None] * 6


torch.library.register_autograd(_pool, _pool_gradients, setup_context=_save_pool)
