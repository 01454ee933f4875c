"""How fast and how exact the operators of kernels/ are, against what one would use instead.

    python benchmarks/kernels.py                     every case of this machine; table and csv in benchmarks/results/
    python benchmarks/kernels.py --cases box_head    only cases whose name contains one of the words
    python benchmarks/kernels.py --tune              on a GPU: block sizes of the kernels, best first

Providers of a case take turns, round after round, so that what else runs on the machine hits all of them; a case whose
baseline spreads by more than 20 % is run again, at most twice. On a GPU the L2 cache is overwritten before every run,
and times are CUDA events. Gradients state their error against float64 beside their time.
"""

import argparse
import csv
import datetime
import itertools
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import torchvision
from torchvision.ops import MultiScaleRoIAlign, roi_align

from kernels import contrastive_loss, multiscale_roi_align, roi_align_project

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
SPREAD = 1.2
L2_BYTES = 180 * 2**20


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


def pool_providers(features, rois, *linear):
    """name -> function that pools (and projects), and the inputs whose gradients are taken."""
    size = [(int(features[0].shape[2] / SCALES[0]), int(features[0].shape[3] / SCALES[0]))] * len(features[0])
    named = {str(level): feature for level, feature in enumerate(features)}
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(len(features[0]))]
    pooler = MultiScaleRoIAlign(list(named), 7, 2)
    pooling = dict(scales=SCALES, output_size=7)
    if not linear:
        providers = {
            "torchvision": lambda: pooler(named, boxes, size),
            "ours": lambda: multiscale_roi_align(features, rois, **pooling),
        }
        return providers, list(features)
    providers = {
        "torchvision": lambda: F.linear(pooler(named, boxes, size).flatten(1), *linear),
        "ours": lambda: roi_align_project(features, rois, *linear, **pooling),
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
    providers = {
        "torchvision": lambda: roi_align(feature, rois.to(feature.dtype), (1, 1), 1.0, -1, True),
        "ours": lambda: multiscale_roi_align([feature], rois, **pooling),
    }
    return providers, [feature]


def contrast_inputs(device, dtype, queries, bank_rows, dim=512):
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (queries, queries, bank_rows)]
    query, key, bank = (part.to(device, dtype) for part in rows)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    return query.requires_grad_(), key.requires_grad_(), scale, bank if bank_rows else None


def naive_contrast(query, key, scale, bank):
    candidates = key if bank is None else torch.cat([key, bank])
    logits = scale * (query @ candidates.T)
    return F.cross_entropy(logits.float(), torch.arange(len(query), device=query.device))


def contrast_providers(query, key, scale, bank):
    providers = {
        "naive": lambda: naive_contrast(query, key, scale, bank),
        "ours": lambda: contrastive_loss(query, key, scale, bank=bank),
    }
    return providers, [query, key, scale]


def cases(device):
    """(name, function that makes providers and inputs, its arguments). A GPU takes bfloat16 besides float32."""
    gpu = device != "cpu"
    dtypes = [torch.float32, torch.bfloat16] if gpu else [torch.float32]
    boxes = [(1, 512), (2, 1024), (1, 64)] + ([(16, 1024), (16, 8192)] if gpu else [])
    for dtype, (images, rois), last in itertools.product(dtypes, boxes, (False, True)):
        kind = f"{str(dtype)[6:]} B{images} R{rois} {'channels-last' if last else 'NCHW'}"
        make = lambda dtype=dtype, images=images, rois=rois, last=last: box_head(device, dtype, images, rois, last)  # noqa: E731
        yield f"box_head {kind}", pool_providers, make
        yield (
            f"box_head+linear {kind}",
            pool_providers,
            lambda make=make, dtype=dtype: (*make(), *linear(device, dtype)),
        )
    maps = [(4, 14, 768, 64), (4, 37, 768, 64), (8, 24, 1024, 512)] + ([(64, 24, 1024, 1024)] if gpu else [])
    for dtype, shape in itertools.product(dtypes, maps):
        name = "regions {} B{} {}x{}x{} R{}".format(str(dtype)[6:], shape[0], shape[1], shape[1], *shape[2:])
        yield name, region_providers, lambda dtype=dtype, shape=shape: regions(device, dtype, *shape)
    losses = [(4, 128), (16, 4096), (64, 16384), (256, 65536), (1024, 65536), (4096, 0)]
    losses += [(4, 65536), (64, 65536), (4096, 65536), (32768, 128)] if gpu else []
    for dtype, shape in itertools.product(dtypes, losses):
        name = "contrastive {} N{} K{} D512".format(str(dtype)[6:], *shape)
        yield name, contrast_providers, lambda dtype=dtype, shape=shape: contrast_inputs(device, dtype, *shape)


def linear(device, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(1024, 256 * 49, generator=generator) * 0.01).to(device, dtype).requires_grad_()
    return weight, torch.zeros(1024, device=device, dtype=dtype, requires_grad=True)


def with_gpu_baselines(providers):
    """The baseline compiled (graph breaks allowed) and, for pooling, in torchvision's deterministic mode."""
    name, eager = next(iter(providers.items()))
    providers = providers | {f"{name}, compiled": torch.compile(eager)}
    if name == "torchvision":

        def deterministic():
            torch.use_deterministic_algorithms(True)
            result = eager()
            torch.use_deterministic_algorithms(False)
            return result

        providers |= {"torchvision, deterministic": deterministic}
    return providers


def steps(providers, inputs):
    """Per pass, name -> function: the forward alone, and forward with all gradients."""

    def forward(function):
        with torch.no_grad():
            return function()

    def training(function):
        output = function()
        generator = torch.Generator().manual_seed(2)
        upstream = torch.randn(output.shape, generator=generator) if output.ndim else torch.ones(())
        upstream = upstream.to(output)
        return lambda: torch.autograd.grad(function(), inputs, upstream)

    yield "forward", {name: lambda function=function: forward(function) for name, function in providers.items()}
    yield "forward+backward", {name: training(function) for name, function in providers.items()}


def measure(functions, device):
    """name -> seconds of every round, providers taking turns."""
    start = time.perf_counter()
    for function in functions.values():
        function()
    rounds = int(min(300, max(5, 3 / (time.perf_counter() - start))))
    flush = None if device == "cpu" else torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    times = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(rounds), functions.items()):
        times[name].append(seconds(function, flush))
    return times


def seconds(function, flush):
    if flush is None:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def in_double(parts):
    """The same arguments in float64, gradients included."""
    return [
        in_double(part)
        if isinstance(part, list)
        else (None if part is None else part.detach().double().requires_grad_(part.requires_grad))
        for part in parts
    ]


def errors(functions, exact):
    """name -> the largest relative Frobenius error of its results (gradients) against `exact`."""
    found = {}
    for name, function in functions.items():
        pairs = zip(function(), exact, strict=True)
        found[name] = max(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)
    return found


def extra_memory(name, provider):
    """Bytes by which one forward and backward raises the peak of a fresh process (CPU)."""
    command = [sys.executable, __file__, "--memory-of", name, provider]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def report_memory(name, provider):
    _, providers, make = next(case for case in cases("cpu") if case[0] == name)
    functions, inputs = providers(*make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(functions[provider](), inputs)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def run_case(name, providers, make, device):
    """One row a pass and provider."""
    arguments = make()
    functions, inputs = providers(*arguments)
    baseline = next(iter(functions))
    exact_functions, exact_inputs = providers(*in_double(arguments))
    exact = next(
        function for kind, function in steps({"": exact_functions[baseline]}, exact_inputs) if kind != "forward"
    )
    exact = exact[""]()
    functions = functions if device == "cpu" else with_gpu_baselines(functions)
    for kind, timed in steps(functions, inputs):
        for _ in range(3):
            times = measure(timed, device)
            middle = statistics.median(times[baseline])
            spread = statistics.quantiles(times[baseline], n=5)[-1] / min(times[baseline])
            if spread <= SPREAD:
                break
        error = errors(timed, exact) if kind != "forward" else {}
        for provider, taken in times.items():
            row = dict(case=name, kind=kind, provider=provider, milliseconds=min(taken) * 1e3)
            row |= dict(median=statistics.median(taken) * 1e3, ratio=min(times[baseline]) / min(taken))
            row |= dict(median_ratio=middle / statistics.median(taken), baseline_spread=spread)
            row |= dict(error=error.get(provider, ""), extra_megabytes="")
            if kind != "forward" and name.startswith("contrastive") and "K65536" in name and device == "cpu":
                row["extra_megabytes"] = round(extra_memory(name, provider) / 1e6, 1)
            yield row


def machine(device):
    """What a reader needs to place the figures; no names of hosts."""
    chip = torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    load = f"load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{chip}, {torch.get_num_threads()} threads, {versions}, {datetime.date.today()}, {load}"


def tune(device):
    """Time of every block size of the RoIAlign kernels on this GPU, best first, to be written into their tables."""
    from kernels import roi_align_triton as triton_kernels

    features, rois = box_head(device, torch.bfloat16, 2, 1024, True)
    providers, inputs = pool_providers(features, rois)
    timed = dict(steps({"ours": providers["ours"]}, inputs))
    results = []
    for channels, warps in itertools.product((32, 64, 128, 256), (4, 8)):
        launch = triton_kernels.Launch(rows=0, columns=0, channels=channels, warps=warps, stages=1)
        triton_kernels.FORWARD = launch
        forward = min(measure(timed["forward"], device)["ours"])
        triton_kernels.BACKWARD = {"default": launch}
        results.append((min(measure(timed["forward+backward"], device)["ours"]) - forward, forward, launch))
    for place, name in ((1, "FORWARD"), (0, "BACKWARD")):
        for row in sorted(results, key=lambda row: row[place]):
            print(f"{name:9} {row[place] * 1e6:8.1f} us  {row[2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases whose name contains one of these")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    parser.add_argument(
        "--note", default="", help="a sentence for the head of the table, such as who shared the machine"
    )
    parser.add_argument("--tune", action="store_true", help="GPU only: time the block sizes of the kernels")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.memory_of:
        return report_memory(*arguments.memory_of)
    if arguments.tune:
        if device == "cpu":
            parser.error("--tune needs a GPU")
        return tune(device)
    head, rows = machine(device), []
    print(head)
    for case in cases(device):
        if any(word in case[0] for word in arguments.cases):
            for row in run_case(*case, device):
                rows.append(row)
                print(line(row), flush=True)
            write(arguments.output / f"kernels-{device}", head, arguments.note, rows)  # what stands survives a Ctrl-C
    if not rows:
        parser.error(f"--cases: no case contains {arguments.cases!r}")


def line(row):
    error = f"{row['error']:.1e}" if row["error"] != "" else ""
    figures = f"{row['milliseconds']:.2f} | {row['median']:.2f} | {row['ratio']:.2f} | {row['median_ratio']:.2f}"
    tail = f"{row['baseline_spread']:.2f} | {error} | {row['extra_megabytes']}"
    return f"| {row['case']} | {row['kind']} | {row['provider']} | {figures} | {tail} |"


def write(path, head, note, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    title = (
        "| case | pass | provider | ms (min) | ms (median) | ratio (min) | ratio (median) | spread | error | extra MB |"
    )
    explanation = (
        "Ratio: the baseline's time over the provider's. Spread: the baseline's 80th percentile over its minimum. "
        "Error: the largest relative Frobenius error of a gradient against float64. Extra MB: growth of the peak "
        "memory of a fresh process in one forward and backward."
    )
    text = [
        "# Kernels",
        head + (f". {note}" if note else ""),
        explanation,
        "\n".join([title, "|---" * 10 + "|", *map(line, rows)]),
    ]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
