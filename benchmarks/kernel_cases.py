"""The cases of kernels.py: their inputs, the least work they are, and who can do it."""

import itertools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from kernels import contrastive_loss, multiscale_roi_align, roi_align_project

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
RIVALS = dict(memeff="memeff", inf_cl="inf_cl", siglip_kernel="siglip-kernel", liger_kernel="liger-kernel")


class Case(NamedTuple):
    """One problem. The first provider is the baseline; `make` gives the arguments of `providers`, lists or tensors."""

    name: str
    make: Callable[[], tuple]
    providers: Callable[..., tuple[dict, list]]  # -> name -> function, and the inputs whose gradients are taken
    products: Callable[..., dict]  # arguments -> the floating-point operations of each pass


class Provider(NamedTuple):
    """A way to do it. twin: of something else of the same size, whose result says nothing about ours; waits: looks at
    results on the host, so that no CUDA graph can hold it; inputs: to take gradients of instead of the case's."""

    call: Callable[[], Tensor]
    twin: bool = False
    waits: bool = False
    inputs: list | None = None


def box_head(device, dtype, images, rois, channels_last, size=(512, 640), channels=256):
    """A pyramid of the image size and `rois` boxes of 12 to 400 pixels, dealt out to the images in turn."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(images, channels, int(size[0] * s), int(size[1] * s), generator=generator) for s in SCALES]
    form = torch.channels_last if channels_last else torch.contiguous_format
    features = [part.to(device, dtype).contiguous(memory_format=form).requires_grad_() for part in features]
    center = torch.rand(rois, 2, generator=generator) * torch.tensor([size[1], size[0]])
    half = torch.exp(torch.rand(rois, 2, generator=generator) * 3.5 + 2.5) / 2
    limit = torch.tensor([size[1], size[0]])
    boxes = torch.cat([(center - half).clamp(min=0), torch.minimum(center + half, limit)], 1)
    image = torch.arange(rois) * images // rois  # in order, as torchvision returns them
    return features, torch.cat([image[:, None], boxes], 1).to(device)


def linear(device, dtype, channels=256, outputs=1024):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(outputs, channels * 49, generator=generator) * 0.01).to(device, dtype).requires_grad_()
    return weight, torch.zeros(outputs, device=device, dtype=dtype, requires_grad=True)


def as_torchvision(function, sample):
    """torchvision takes no bfloat16 maps: under autocast it casts them to float32 itself, as a training run would."""
    if sample.dtype != torch.bfloat16:
        return function

    def under_autocast():
        with torch.autocast(sample.device.type, sample.dtype):
            return function()

    return under_autocast


def as_torchvision_boxes(boxes, sample):
    """torchvision wants boxes in the dtype of the maps, except under autocast."""
    return boxes if sample.dtype == torch.bfloat16 else boxes.to(sample.dtype)


def pool_providers(features, rois, *linear):
    size = [(int(features[0].shape[2] / SCALES[0]), int(features[0].shape[3] / SCALES[0]))] * len(features[0])
    named = {str(level): feature for level, feature in enumerate(features)}
    boxes = [as_torchvision_boxes(rois[rois[:, 0] == image, 1:], features[0]) for image in range(len(features[0]))]
    pooler, pooling = MultiScaleRoIAlign(list(named), 7, 2), dict(scales=SCALES, output_size=7)
    if not linear:
        providers = {
            "torchvision": Provider(as_torchvision(lambda: pooler(named, boxes, size), features[0]), waits=True),
            "ours": Provider(lambda: multiscale_roi_align(features, rois, **pooling)),
        }
        return providers, list(features)
    theirs = as_torchvision(lambda: F.linear(pooler(named, boxes, size).flatten(1), *linear), features[0])
    rows = torch.randn(len(rois), linear[0].shape[1], device=rois.device).to(features[0].dtype).requires_grad_()
    providers = {
        "torchvision": Provider(theirs, waits=True),
        "ours": Provider(lambda: roi_align_project(features, rois, *linear, **pooling)),
        # What no pooling, however fast, gets below.
        "the linear layer alone": Provider(lambda: F.linear(rows, *linear), twin=True, inputs=[rows, *linear]),
    }
    return providers, [*features, *linear]


def pool_products(features, rois, *linear):
    one = 2 * len(rois) * linear[0].numel() if linear else 0
    return {"forward": one, "forward+backward": 3 * one}


def regions(device, dtype, images, side, channels, rois):
    """A map in a vision transformer's memory order, tokens first, and boxes of random corners."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(images, side * side + 1, channels, generator=generator).to(device, dtype)
    feature = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)).requires_grad_()
    corners = torch.rand(rois, 2, 2, generator=generator) * side
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    return feature, torch.cat([(torch.arange(rois) % images)[:, None], boxes], 1).to(device)


def region_providers(feature, rois):
    pooling = dict(scales=[1.0], output_size=1, sampling_ratio=-1, aligned=True)
    boxes = as_torchvision_boxes(rois, feature)
    theirs = as_torchvision(lambda: roi_align(feature, boxes, (1, 1), 1.0, -1, True), feature)
    ours = Provider(lambda: multiscale_roi_align([feature], rois, **pooling))
    return {"torchvision": Provider(theirs), "ours": ours}, [feature]


def contrast_inputs(device, dtype, queries, bank_rows, dim=512):
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (queries, queries, bank_rows)]
    query, key, bank = (part.to(device, dtype) for part in rows)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    return query.requires_grad_(), key.requires_grad_(), scale, bank if bank_rows else None


def candidates(key, bank):
    return key if bank is None else torch.cat([key, bank])


def naive_contrast(query, key, scale, bank):
    logits = scale * (query @ candidates(key, bank).T)
    target = torch.arange(len(query), device=query.device)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def contrast_providers(query, key, scale, bank):
    providers = {
        "naive": Provider(lambda: naive_contrast(query, key, scale, bank)),
        "ours": Provider(lambda: contrastive_loss(query, key, scale, bank=bank)),
    }
    if query.is_cuda and query.dtype != torch.float64:
        providers |= rivals(query, key, scale, bank)
    return providers, [query, key, scale]


def rivals(query, key, scale, bank):
    """Other packages' losses, where they are installed: of the same size, and of the same meaning unless a twin."""
    found, target = {}, torch.arange(len(query), device=query.device)
    if find_spec("liger_kernel"):
        fused = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        call = lambda: fused(candidates(key, bank), (scale * query).to(query.dtype), target)  # noqa: E731
        found["Liger"] = Provider(call, waits=True)
    if find_spec("inf_cl") and query.shape[1] % 256 == 0:
        flash = import_module("inf_cl").cal_flash_loss
        found["inf_cl"] = Provider(lambda: flash(query, candidates(key, bank), target, scale).mean())
    if find_spec("memeff") and bank is None:  # both directions, a fixed temperature
        both = import_module("memeff").MemoryEfficientCLIPLoss(1 / scale.item(), normalized_inputs=True, stable=False)
        found["memeff, both directions"] = Provider(lambda: both(query, key), twin=True)
    if find_spec("siglip_kernel") and bank is None:  # sigmoids instead of a softmax: the same products
        sigmoid, bias = import_module("siglip_kernel").fused_siglip_loss, torch.zeros((), device=query.device)
        found["siglip-kernel"] = Provider(lambda: sigmoid(query, key, scale.log(), bias), twin=True)
    return found


def contrast_products(query, key, scale, bank):
    """The logits; and again for the query's gradient, and for the in-batch keys'."""
    columns = len(key) + (0 if bank is None else len(bank))
    one = 2 * len(query) * columns * query.shape[1]
    return {"forward": one, "forward+backward": 2 * one + 2 * len(query) * len(key) * query.shape[1]}


def cases(device):
    """The cases of a machine. A GPU takes half precision besides float32, and larger ones."""
    gpu = device != "cpu"
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if gpu else [torch.float32]
    boxes = [(1, 512), (2, 1024), (1, 64)] + ([(16, 1024), (16, 8192)] if gpu else [])
    for dtype, (images, rois), last in itertools.product(dtypes, boxes, (False, True)):
        kind = f"{str(dtype)[6:]} B{images} R{rois} {'channels-last' if last else 'NCHW'}"

        def make(dtype=dtype, images=images, rois=rois, last=last):
            return box_head(device, dtype, images, rois, last)

        def make_both(make=make, dtype=dtype):
            return *make(), *linear(device, dtype)

        yield Case(f"box_head {kind}", make, pool_providers, pool_products)
        yield Case(f"box_head+linear {kind}", make_both, pool_providers, pool_products)
    maps = [(4, 14, 768, 64), (4, 37, 768, 64), (4, 37, 1024, 64), (8, 24, 1024, 512)]
    maps += [(64, 14, 768, 1024), (64, 24, 1024, 1024), (64, 37, 1024, 4096)] if gpu else []
    for dtype, shape in itertools.product(dtypes, maps):
        name = "regions {} B{} {}x{}x{} R{}".format(str(dtype)[6:], shape[0], shape[1], shape[1], *shape[2:])
        made = lambda dtype=dtype, shape=shape: regions(device, dtype, *shape)  # noqa: E731
        yield Case(name, made, region_providers, lambda *_: {"forward": 0, "forward+backward": 0})
    losses = [(4, 128), (16, 4096), (64, 16384), (256, 65536), (1024, 65536), (4096, 0), (4096, 4096)]
    losses += [(4, 65536), (64, 65536), (1024, 4096), (4096, 65536), (32768, 0), (32768, 128)] if gpu else []
    for dtype, shape in itertools.product(dtypes, losses):
        name = "contrastive {} N{} K{} D512".format(str(dtype)[6:], *shape)
        made = lambda dtype=dtype, shape=shape: contrast_inputs(device, dtype, *shape)  # noqa: E731
        yield Case(name, made, contrast_providers, contrast_products)
