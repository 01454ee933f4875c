"""Multi-level RoIAlign, and RoIAlign followed by a linear projection."""

import math

import torch

from kernels import reference
from kernels.implementation import choose


def multiscale_roi_align(
    features, rois, *, scales, output_size, sampling_ratio=2, aligned=False, implementation="auto"
):
    """Pool every RoI from its pyramid level to a fixed size (torchvision's `MultiScaleRoIAlign` and `roi_align`).

    features: list of (B, C, H_l, W_l) tensors, finest first, float64, float32, float16 or bfloat16, in NCHW or
        channels-last memory; sums run in float32 (float64 for float64). Under autocast they are cast to its dtype.
    rois: (R, 5) floats = image index, x1, y1, x2, y2 in pixels of the image; coordinates stay in float32 (float64 with
        float64 features) and get no gradient. A box with a coordinate that is not finite pools to zero.
    scales: one float a level, feature pixels per image pixel; several levels halve from one to the next, and a RoI's
        level is clamp(floor(4 + log2(sqrt(area) / 224) + 1e-6)) (Lin et al., FPN, eq. 1, as torchvision rounds it).
    output_size: int or (ph, pw). sampling_ratio: samples a bin and axis; 0 or less: adaptive, ceil(size / bins).
    aligned: shift coordinates by half a pixel and do not force boxes to at least one pixel.
    implementation: "auto" (Triton on a GPU, PyTorch elsewhere), "triton" or "torch".

    Returns (R, C, ph, pw) in the features' dtype, a new tensor, channels-last in memory. Deterministic.
    Raises ValueError or TypeError on wrong shapes, dtypes or devices, when `rois` asks for a gradient, and, on the CPU,
    when an image index is outside [0, B); on a GPU such a row comes out as NaN, since looking would stall it.
    """
    features, output_size = _checked(features, rois, scales, output_size)
    choose(implementation, features[0].device)
    _check_image_index(features, rois)
    pooling = dict(output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    return reference.multiscale_roi_align(features, rois.detach(), scales=scales, **pooling)


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
    """RoIAlign and the linear layer on its flattened output as one operator: features, rois -> (R, D).

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
    choose(implementation, features[0].device)
    _check_image_index(features, rois)
    pooling = dict(output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    return reference.roi_align_project(features, rois.detach(), weight, bias, scales=scales, **pooling)


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
        raise ValueError(f"one scale a level is needed, got {len(features)} features and {len(scales)} scales")
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


def _check_image_index(features, rois):
    images = features[0].shape[0]
    if rois.device.type == "cpu" and not ((rois[:, 0] >= 0) & (rois[:, 0] < images)).all():
        raise ValueError(f"the image index of every roi must be in [0, {images})")
