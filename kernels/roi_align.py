"""Multi-level RoIAlign, and RoIAlign followed by a linear projection.

The public functions check, apply autocast and pick the implementation; the operators behind them are registered with
`torch.library`, so that torch.compile sees one node each.
"""

import math
from typing import NamedTuple

import torch

from kernels import roi_align_cpu
from kernels.dispatch import no_autocast, resolve_backend
from kernels.products import linear


class Pooling(NamedTuple):
    """The constants of a pooling, as the operators take them."""

    scales: list[float]
    output_size: tuple[int, int]
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
    Raises ValueError or TypeError on wrong shapes, dtypes or devices, when `rois` asks for a gradient, and, on the CPU,
    when an image index is outside [0, B); on a GPU such a row comes out as NaN, since looking would stall it.
    """
    features, output_size = _checked(features, rois, scales, output_size)
    pooling = Pooling([float(scale) for scale in scales], output_size, sampling_ratio, aligned)
    with no_autocast(rois):  # its casts are done
        return _pool(features, rois.detach(), *pooling, resolve_backend(implementation, features))


def roi_align_project(
    features,
    rois,
    weight,
    bias=None,
    *,
    scales,
    output_size,
    sampling_ratio=2,
    aligned=False,
    implementation="auto",
):
    """RoIAlign and the linear layer on its flattened output: features, rois -> (R, D).

    weight: (D, C * ph * pw), flattened in the order (C, ph, pw); bias: (D,) or None; both are cast like the features
    under autocast and must have their dtype otherwise. Everything else, and what is raised, as in
    `multiscale_roi_align`.
    """
    features, output_size = _checked(features, rois, scales, output_size)
    if weight.ndim != 2 or weight.shape[1] != features[0].shape[1] * output_size[0] * output_size[1]:
        expected = f"(D, {features[0].shape[1]} * {output_size[0]} * {output_size[1]})"
        raise ValueError(f"weight must be {expected}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    weight, bias = (None if part is None else _autocast(part) for part in (weight, bias))
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (part.dtype != features[0].dtype or part.device != features[0].device):
            expected = f"{features[0].dtype} on {features[0].device}"
            raise TypeError(f"{name} must be {expected} like the features, got {part.dtype} on {part.device}")
    backend, rois = resolve_backend(implementation, features), rois.detach()
    pooling = Pooling([float(scale) for scale in scales], output_size, sampling_ratio, aligned)
    with no_autocast(rois):
        # The fused kernel is for one bin and few outputs; beyond that it would repeat the gather per block of outputs.
        # Expected, not measured; `python benchmarks/kernels.py` compares both on a GPU.
        if backend == "triton" and output_size == (1, 1) and len(weight) <= 256:
            return _pool_project(features, rois, weight, bias, *pooling)
        return linear(_pool(features, rois, *pooling, backend).flatten(1), weight, bias)


def _autocast(tensor):
    """The tensor as autocast would hand it to a matrix product."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _checked(features, rois, scales, output_size):
    """The features after autocast and the output size as a pair; raises on arguments that do not fit together."""
    features = list(features)
    if not features or len(features) != len(scales):
        raise ValueError(f"one scale per level is needed, got {len(features)} features and {len(scales)} scales")
    first = features[0]
    for feature in features:
        if feature.ndim != 4 or feature.shape[:2] != first.shape[:2]:
            expected = f"(B, C, H, W) with B, C = {tuple(first.shape[:2])}"
            raise ValueError(f"every level must be {expected}, got {tuple(feature.shape)}")
        if not feature.is_floating_point() or feature.dtype != first.dtype or feature.device != first.device:
            expected = f"{first.dtype} on {first.device}, floating point"
            raise TypeError(f"every level must be {expected}, got {feature.dtype} on {feature.device}")
        if 0 in feature.shape[1:]:
            raise ValueError(f"a level must have channels and pixels, got {tuple(feature.shape)}")
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5) = image index, x1, y1, x2, y2, got {tuple(rois.shape)}")
    if not rois.is_floating_point() or rois.device != first.device:
        raise TypeError(f"rois must be floating point on {first.device}, got {rois.dtype} on {rois.device}")
    if rois.requires_grad and torch.is_grad_enabled():
        raise ValueError("rois get no gradient: detach them")
    exponents = [-math.log2(scale) for scale in scales]
    if any(round(exponent) != round(exponents[0]) + level for level, exponent in enumerate(exponents)):
        raise ValueError(f"scales must halve from level to level, got {list(scales)}")
    output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(output_size) != 2 or min(output_size) < 1:
        raise ValueError(f"output_size must be a positive int or pair, got {output_size}")
    return [_autocast(feature) for feature in features], output_size


@torch.library.custom_op("macl_fgclip::multiscale_roi_align", mutates_args=())
def _pool(
    features: list[torch.Tensor],
    rois: torch.Tensor,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    aligned: bool,
    backend: str,
) -> torch.Tensor:
    images = features[0].shape[0]
    if rois.is_cpu and not ((rois[:, 0] >= 0) & (rois[:, 0] < images)).all():
        raise ValueError(f"the image index of every roi must be in [0, {images})")
    return _engine(backend).forward(features, rois, Pooling(scales, tuple(output_size), sampling_ratio, aligned))


@_pool.register_fake
def _(features, rois, scales, output_size, sampling_ratio, aligned, backend):
    return features[0].new_empty(rois.shape[0], *output_size, features[0].shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("macl_fgclip::multiscale_roi_align_backward", mutates_args=())
def _pool_backward(
    grad: torch.Tensor,
    rois: torch.Tensor,
    shapes: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    backend: str,
) -> list[torch.Tensor]:
    """The gradients of the features, (B, H, W, C) each. shapes: (B, C, H, W) of all levels in one list."""
    pooling = Pooling(scales, tuple(grad.shape[2:]), sampling_ratio, aligned)
    shapes = [tuple(shapes[start : start + 4]) for start in range(0, len(shapes), 4)]
    return [pixels.to(grad.dtype) for pixels in _engine(backend).backward(grad, rois, shapes, pooling)]


@_pool_backward.register_fake
def _(grad, rois, shapes, scales, sampling_ratio, aligned, backend):
    levels = zip(shapes[0::4], shapes[1::4], shapes[2::4], shapes[3::4], strict=True)
    return [grad.new_empty(batch, height, width, channels) for batch, channels, height, width in levels]


def _save_pool(ctx, inputs, output):
    features, rois, scales, _, sampling_ratio, aligned, backend = inputs
    ctx.save_for_backward(rois)
    ctx.maps = _maps(features)
    ctx.pooling = scales, sampling_ratio, aligned, backend


def _maps(features):
    """What the backward knows of the features: their shapes in one list, and which lie channels-last in memory."""
    return [size for feature in features for size in feature.shape], [feature.stride(1) == 1 for feature in features]


def _feature_gradients(grad, rois, maps, pooling):
    """The gradients of the features, in the features' memory format."""
    shapes, channels_last = maps
    gradients = [pixels.permute(0, 3, 1, 2) for pixels in _pool_backward(grad, rois, shapes, *pooling)]
    return [part if last else part.contiguous() for part, last in zip(gradients, channels_last, strict=True)]


def _pool_gradients(ctx, grad):
    return _feature_gradients(grad, *ctx.saved_tensors, ctx.maps, ctx.pooling), *[None] * 6


_pool.register_autograd(_pool_gradients, setup_context=_save_pool)


@torch.library.custom_op("macl_fgclip::roi_align_project", mutates_args=())
def _pool_project(
    features: list[torch.Tensor],
    rois: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """The projection (R, D) in one Triton launch; its backward pools again."""
    pooling = Pooling(scales, tuple(output_size), sampling_ratio, aligned)
    return _engine("triton").project(features, rois, weight, bias, pooling)


@_pool_project.register_fake
def _(features, rois, weight, bias, scales, output_size, sampling_ratio, aligned):
    return weight.new_empty(rois.shape[0], weight.shape[0])


def _save_projection(ctx, inputs, output):
    features, rois, weight, _, *pooling = inputs
    ctx.save_for_backward(rois, weight, *features)
    ctx.pooling = pooling


def _projection_gradients(ctx, grad):
    rois, weight, *features = ctx.saved_tensors
    need_features, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    for_features, for_weight, for_bias = [None] * len(features), None, None
    scales, output_size, *sampling = ctx.pooling
    if any(need_features):
        for_bins = (grad @ weight).view(len(rois), -1, *output_size)  # (R, C, ph, pw)
        for_features = _feature_gradients(for_bins, rois, _maps(features), (scales, *sampling, "triton"))
    if need_weight:
        for_weight = grad.T @ _pool(features, rois, *ctx.pooling, "triton").flatten(1)
    if need_bias:
        for_bias = grad.sum(0)
    return for_features, None, for_weight, for_bias, None, None, None, None


_pool_project.register_autograd(_projection_gradients, setup_context=_save_projection)


def _engine(backend):
    """The module with `forward` and `backward`; triton is imported only where it is used."""
    if backend == "torch":
        return roi_align_cpu
    from kernels import roi_align_triton

    return roi_align_triton
