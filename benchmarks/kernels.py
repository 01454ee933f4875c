"""How fast and how exact the operators of kernels/ are, against what one would use instead.

    python benchmarks/kernels.py                     every case of this machine
    python benchmarks/kernels.py --cases box_head    only cases whose name contains one of the words
    python benchmarks/kernels.py --write             also writes benchmarks/results/kernels-<device>.md

Forward and backward. The first provider of a case is the baseline. All take turns in a process that keeps freed memory,
as the training scripts do. On a GPU times are CUDA events, and the L2 cache is overwritten before every run.
Error: the largest relative Frobenius error of a gradient against float64.
Extra MiB: growth of the peak memory in one forward and backward; on a CPU of a fresh process that keeps none.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--memory-of" not in sys.argv:
    import trainkit.process_setup  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from benchmarks import common
from kernels import contrastive_loss, multiscale_roi_align, roi_align_project

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
L2_BYTES = 180 * 2**20  # three times the cache of an H200
LINEAR_ALONE = "the linear layer alone"  # what no pooling, however fast, gets below
COLUMNS = ["case", "provider", "ms (min)", "ms (median)", "baseline over it (all rounds)", "error", "extra MiB"]


class Case(NamedTuple):
    """One problem: `make()` gives the arguments of `providers`, which gives name -> function and the leaves."""

    name: str
    make: Callable[[], tuple]
    providers: Callable[..., tuple[dict[str, Callable[[], Tensor]], list[Tensor]]]


def box_head(device, dtype, images, rois, channels_last, outputs=0, size=(512, 640), channels=256):
    """A pyramid of the image size, `rois` boxes of 12 to 400 pixels dealt out to the images in turn, and, where there
    are outputs, weight and bias of the linear layer."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(images, channels, int(size[0] * s), int(size[1] * s), generator=generator) for s in SCALES]
    form = torch.channels_last if channels_last else torch.contiguous_format
    features = [part.to(device, dtype).contiguous(memory_format=form).requires_grad_() for part in features]
    limit = torch.tensor([size[1], size[0]])
    center = torch.rand(rois, 2, generator=generator) * limit
    half = torch.exp(torch.rand(rois, 2, generator=generator) * 3.5 + 2.5) / 2
    boxes = torch.cat([(center - half).clamp(min=0), torch.minimum(center + half, limit)], 1)
    image = torch.arange(rois) * images // rois  # in order, as torchvision returns them
    pyramid = features, torch.cat([image[:, None], boxes], 1).to(device)
    if not outputs:
        return pyramid
    weight = (torch.randn(outputs, channels * 49, generator=generator) * 0.01).to(device, dtype).requires_grad_()
    return *pyramid, weight, torch.zeros(outputs, device=device, dtype=dtype, requires_grad=True)


def pool_providers(features, rois, *linear):
    size = [(int(features[0].shape[2] / SCALES[0]), int(features[0].shape[3] / SCALES[0]))] * len(features[0])
    named = {str(level): feature for level, feature in enumerate(features)}
    boxes = [rois[rois[:, 0] == image, 1:].to(features[0].dtype) for image in range(len(features[0]))]
    pooler, pooling = MultiScaleRoIAlign(list(named), 7, 2), dict(scales=SCALES, output_size=7)
    if not linear:
        providers = {"torchvision": lambda: pooler(named, boxes, size)}
        providers["ours"] = lambda: multiscale_roi_align(features, rois, **pooling)
        return providers, list(features)
    rows = torch.randn(len(rois), linear[0].shape[1], device=rois.device).to(linear[0].dtype).requires_grad_()
    providers = {
        "torchvision": lambda: F.linear(pooler(named, boxes, size).flatten(1), *linear),
        "ours": lambda: roi_align_project(features, rois, *linear, **pooling),
        LINEAR_ALONE: lambda: F.linear(rows, *linear),
    }
    return providers, [*features, *linear]


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
    boxes = rois.to(feature.dtype)
    providers = {"torchvision": lambda: roi_align(feature, boxes, (1, 1), 1.0, -1, True)}
    providers["ours"] = lambda: multiscale_roi_align([feature], rois, **pooling)
    return providers, [feature]


def contrast_inputs(device, dtype, queries, bank_rows, dim=512):
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (queries, queries, bank_rows)]
    query, key, bank = (part.to(device, dtype) for part in rows)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    return query.requires_grad_(), key.requires_grad_(), scale, bank


def contrast_providers(query, key, scale, bank):
    def all_logits():
        logits = scale * (query @ torch.cat([key, bank]).T)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, torch.arange(len(query), device=query.device))

    providers = {"all logits": all_logits, "ours": lambda: contrastive_loss(query, key, scale, bank=bank)}
    return providers, [query, key, scale]


def cases(device):
    """The cases of a machine. A GPU takes half precision besides float32, and larger ones."""
    gpu = device != "cpu"
    for dtype in [torch.float32, torch.float16] if gpu else [torch.float32]:
        name, of = str(dtype)[6:], (device, dtype)
        shapes = [(1, 512), (2, 1024)] + ([(16, 8192)] if gpu else [])
        for (images, rois), last in itertools.product(shapes, (False, True)):
            shape = f"{name} B{images} R{rois} {'channels-last' if last else 'NCHW'}"
            for kind, outputs in (("box_head", 0), ("box_head+linear", 1024)):
                yield Case(f"{kind} {shape}", partial(box_head, *of, images, rois, last, outputs), pool_providers)
        for images, side, channels, rois in [(4, 14, 768, 64), (8, 24, 1024, 512)]:
            shape = f"{name} B{images} {side}x{side}x{channels} R{rois}"
            yield Case(f"regions {shape}", partial(regions, *of, images, side, channels, rois), region_providers)
        for queries, bank in [(4, 128), (256, 65536), (1024, 65536), (4096, 4096)] + ([(64, 65536)] if gpu else []):
            shape = f"{name} N{queries} K{bank} D512"
            yield Case(f"contrastive {shape}", partial(contrast_inputs, *of, queries, bank), contrast_providers)


def step(call, leaves):
    """A function of one forward and backward, with the same upstream gradient whatever the dtype."""
    output = call()
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).half().to(output)
    return lambda: torch.autograd.grad(call(), leaves, upstream, allow_unused=True)


def in_double(part):
    """The same argument in float64."""
    if isinstance(part, list):
        return [in_double(one) for one in part]
    return part.detach().double().requires_grad_(part.requires_grad)


def error(gradients, exact):
    """The largest relative Frobenius error."""
    pairs = zip(gradients, exact, strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def gpu_seconds(function):
    """Seconds of a call with an overwritten L2 cache."""
    torch.empty(L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def run_case(case, device, rounds):
    """A row of COLUMNS per provider."""
    arguments = case.make()
    providers, leaves = case.providers(*arguments)
    baseline, *_ = providers
    double, double_leaves = case.providers(*(in_double(part) for part in arguments))
    exact = step(double[baseline], double_leaves)()
    steps = {name: step(call, leaves) for name, call in providers.items()}
    seconds = common.wall_seconds if device == "cpu" else gpu_seconds
    times = common.take_turns(steps, rounds, seconds=seconds)
    for name, taken in times.items():
        memory = ""
        if device != "cpu":
            memory = f"{common.extra_memory(steps[name], device):.1f}"
        elif "K65536" in case.name:
            memory = f"{common.in_fresh_process('--memory-of', case.name, name):.1f}"
        wrong = "" if name == LINEAR_ALONE else f"{error(steps[name](), exact):.1e}"
        milliseconds = [f"{1e3 * value:.3f}" for value in (min(taken), statistics.median(taken))]
        yield [case.name, name, *milliseconds, common.ratio(times[baseline], taken), wrong, memory]


def memory_of(name, provider):
    """MiB that one forward and backward of a case adds to the peak, after a small case has loaded libraries."""
    small, (case,) = contrast_inputs("cpu", torch.float32, 4, 128), [one for one in cases("cpu") if one.name == name]
    for arguments in (small, case.make()):
        providers, leaves = case.providers(*arguments)
        used = common.extra_memory(lambda: torch.autograd.grad(providers[provider](), leaves), "cpu")  # noqa: B023
    return used


def main():
    parser = common.make_parser(__doc__, rounds=15)
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases whose name contains one of these")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print(memory_of(*args.memory_of))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [case for case in cases(device) if any(word in case.name for word in args.cases)]
    head = f"{common.machine(device, ('torchvision',))}; {args.rounds} rounds"
    rows = []
    for case in chosen:
        for row in run_case(case, device, args.rounds):
            print(*row, sep="  ", flush=True)
            rows.append(row)
    common.finish(["# Kernels", head, common.table(COLUMNS, rows)], f"kernels-{device}", args.write)


if __name__ == "__main__":
    main()
