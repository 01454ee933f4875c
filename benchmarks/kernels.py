"""How fast and how exact the operators of kernels/ are, against what one would use instead.

    python benchmarks/kernels.py                     every case of this machine; table and csv in benchmarks/results/
    python benchmarks/kernels.py --cases box_head    only cases whose name contains one of the words
    python benchmarks/kernels.py --keep-memory       in a process that keeps freed memory, as the training scripts do
    python benchmarks/kernels.py --no-compiled       without torch.compile, which takes most of the time on a GPU
    python benchmarks/kernels.py --tune              on a GPU: block sizes of the kernels, best first
    pip install memeff inf_cl siglip-kernel liger-kernel     to have these in the table (GPU; each is optional)

Providers of a case take turns, round after round, so that what else runs on the machine hits all of them; a case whose
baseline spreads by more than 20 % is run again, at most twice. On a GPU times are CUDA events, the L2 cache is
overwritten before every run but those of `warm L2`, and what can be captured is also replayed as a CUDA graph, without
the host's share. First of all the machine's own ceilings are measured, copies and matrix products; `roofline` is the
least time that a pass needs by them, for its products or for touching every tensor once, over the time taken. Gradients
state their error against float64 beside their time.
"""

import argparse
import csv
import datetime
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.kernel_cases import RIVALS, Provider, cases
from kernels.products import linear

SPREAD = 1.2
L2_BYTES = 180 * 2**20  # three times the cache of an H200
CACHED_BYTES = 8 * 2**20  # of a copy that stays in the last cache
MEMORY_PEAK = Path("/proc/self/clear_refs")
EXPLANATION = (
    "Ratio: the baseline's time over the provider's (min and median). Spread: the 80th percentile of the provider's "
    "times over their minimum. Warm L2, graph: medians without overwriting that cache, and of a CUDA graph's replays. "
    "Roofline: see the script's head. Error: the largest relative Frobenius error of a gradient against float64. Extra "
    "MB: growth of the peak memory in one pass (on a CPU of a fresh process, after a small case has loaded libraries)."
)


def with_compiled(providers, deterministic_too):
    """The baseline compiled too (graph breaks allowed) and, where asked, in PyTorch's deterministic mode."""
    name, eager = next(iter(providers.items()))
    providers = providers | {f"{name}, compiled": eager._replace(call=torch.compile(eager.call), waits=True)}
    if deterministic_too:

        def deterministic():
            torch.use_deterministic_algorithms(True)
            try:
                return eager.call()
            finally:
                torch.use_deterministic_algorithms(False)

        providers |= {f"{name}, deterministic": eager._replace(call=deterministic, waits=True)}
    return providers


def able(providers, inputs):
    """The baseline, ours, and whoever else gets through a forward and backward here; of the others is said why not."""
    kept = {name: provider for index, (name, provider) in enumerate(providers.items()) if index == 0 or name == "ours"}
    for name, provider in providers.items():
        if name in kept:
            continue
        try:
            torch.autograd.grad(provider.call().sum(), provider.inputs or inputs, allow_unused=provider.twin)
            kept[name] = provider
        except RuntimeError as error:  # out of memory, or what it does not support
            print(f"left out: {name}: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
    return kept


def passes(providers, inputs):
    """Per pass, name -> function: the forward alone, and forward with all gradients."""

    def forward(provider):
        with torch.no_grad():
            return provider.call()

    def training(provider):
        output = provider.call()
        generator = torch.Generator().manual_seed(2)
        upstream = torch.randn(output.shape, generator=generator) if output.ndim else torch.ones(())
        upstream = upstream.bfloat16()  # the same numbers whatever the dtype of a pass
        upstream, wanted = upstream.to(output), provider.inputs or inputs
        return lambda: torch.autograd.grad(provider.call(), wanted, upstream, allow_unused=provider.twin)

    yield "forward", {name: lambda provider=provider: forward(provider) for name, provider in providers.items()}
    yield "forward+backward", {name: training(provider) for name, provider in providers.items()}


def measure(functions, device, cold=True):
    """name -> seconds of every round, providers taking turns. cold: with the L2 cache of a GPU overwritten before."""

    def once():
        for function in functions.values():
            function()
        if device != "cpu":
            torch.cuda.synchronize()

    once()  # compiles
    start = time.perf_counter()
    once()
    budget = 3 if device == "cpu" else 0.5  # seconds: a GPU's times spread less, and there are more cases
    rounds = int(min(300, max(5, budget / (time.perf_counter() - start))))
    flush = None if device == "cpu" else torch.empty(L2_BYTES if cold else 0, dtype=torch.int8, device=device)
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


def replayed(function, flush, rounds=50):
    """Median seconds of a CUDA graph of the function."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return statistics.median(seconds(graph.replay, flush) for _ in range(rounds))


def ceilings(device):
    """Bytes a second of a copy, and floating-point operations a second of a matrix product by dtype."""
    gpu = device != "cpu"
    source = torch.empty(2**30 if gpu else 2**28, dtype=torch.int8, device=device)
    side = 8192 if gpu else 2048
    target = torch.empty_like(source)
    cached = source[:CACHED_BYTES], target[:CACHED_BYTES]
    functions = {"copy": lambda: target.copy_(source)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if gpu else (torch.float32,):
        square = torch.randn(side, side, device=device).to(dtype)
        functions[dtype] = lambda square=square: linear(square, square)
    best = {name: min(taken) for name, taken in measure(functions, device).items()}
    limits = {name: (2 * source.numel() if name == "copy" else 2 * side**3) / taken for name, taken in best.items()}
    within = measure({"cached copy": lambda: cached[1].copy_(cached[0])}, device, cold=False)["cached copy"]
    return {"cached copy": 2 * CACHED_BYTES / min(within), **limits}


def touched(arguments, output, kind):
    """Bytes of every tensor of a pass once: arguments and output, and in the backward their gradients."""
    flat = [part for argument in arguments for part in (argument if isinstance(argument, list) else [argument])]
    flat = [part for part in flat if part is not None]
    total = sum(part.numel() * part.element_size() for part in (*flat, output))
    if kind == "forward":
        return total
    return total + sum(part.numel() * part.element_size() for part in (*flat, output) if part.requires_grad)


def floor(case, arguments, output, kind, limits):
    """The least seconds that the machine's ceilings allow for a pass."""
    first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    return max(touched(arguments, output, kind) / limits["copy"], case.products(*arguments)[kind] / limits[first.dtype])


def in_double(parts):
    """The same arguments in float64, gradients included."""
    return [
        in_double(part)
        if isinstance(part, list)
        else (None if part is None else part.detach().double().requires_grad_(part.requires_grad))
        for part in parts
    ]


def exact_gradients(case, arguments):
    providers, inputs = case.providers(*in_double(arguments))
    name, baseline = next(iter(providers.items()))
    return dict(passes({name: baseline}, inputs))["forward+backward"][name]()


def error(gradients, exact):
    """The largest relative Frobenius error."""
    pairs = zip(gradients, exact, strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def extra_memory(case, provider, function, device):
    """Bytes by which one forward and backward raises the peak: on a GPU here, on a CPU that of a fresh process."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--memory-of", case.name, provider]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def report_memory(name, provider):
    found = list(cases("cpu"))
    case = next(case for case in found if case.name == name)
    first = next(other for other in found if other.name.split()[0] == name.split()[0])  # a small one, to load libraries
    for each in (first, case):
        providers, inputs = each.providers(*each.make())
        MEMORY_PEAK.write_text("5")  # the peak starts again from what is in use now
        before = resident("VmRSS")
        torch.autograd.grad(providers[provider].call(), inputs)
    print(resident("VmHWM") - before)


def resident(field):
    """A figure of this process's memory in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(field))


def run_case(case, device, limits, compiled):
    """One row a pass and provider."""
    torch.compiler.reset()  # or the cases together exceed the recompilations that it allows a function
    arguments = case.make()
    providers, inputs = case.providers(*arguments)
    exact = exact_gradients(case, arguments)
    baseline = next(iter(providers))
    with torch.no_grad():
        output = providers["ours"].call().requires_grad_()
    if compiled:
        providers = with_compiled(providers, deterministic_too="box_head" in case.name)
    providers = able(providers, inputs)
    for kind, timed in passes(providers, inputs):
        least = floor(case, arguments, output, kind, limits)
        for _ in range(3):
            times = measure(timed, device)
            if spread(times[baseline]) <= SPREAD:
                break
        warm = measure(timed, device, cold=False) if device != "cpu" else None
        for name, taken in times.items():
            row = dict(case=case.name, kind=kind, provider=name)
            row |= figures(taken, times[baseline], least, providers[name])
            row |= dict(error="", extra_megabytes="", graph="", warm="")
            if kind != "forward":
                if not providers[name].twin:
                    row["error"] = error(timed[name](), exact)
                if device != "cpu" or ("K65536" in case.name and name in ("naive", "ours") and MEMORY_PEAK.exists()):
                    row["extra_megabytes"] = round(extra_memory(case, name, timed[name], device) / 1e6, 1)
            if warm:
                row["warm"] = statistics.median(warm[name]) * 1e3
            if device != "cpu" and not providers[name].waits and not providers[name].twin:
                flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
                row["graph"] = replayed(timed[name], flush) * 1e3
            yield row


def spread(taken):
    return statistics.quantiles(taken, n=5)[-1] / min(taken)


def figures(taken, baseline, least, provider: Provider):
    middle = statistics.median(taken)
    return dict(
        milliseconds=min(taken) * 1e3,
        median=middle * 1e3,
        ratio=min(baseline) / min(taken),
        median_ratio=statistics.median(baseline) / middle,
        spread=spread(taken),
        roofline="" if provider.twin else least / middle,
    )


def machine(device):
    """What a reader needs to place the figures; no names of hosts."""
    processor = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    chip = torch.cuda.get_device_name() if device != "cpu" else processor
    packages = ["torch", "torchvision", "triton", *(package for name, package in RIVALS.items() if find_spec(name))]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    load = f"load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{chip}, {torch.get_num_threads()} threads, {versions}, {datetime.date.today()}, {load}"


def describe(limits):
    products = {name: rate for name, rate in limits.items() if isinstance(name, torch.dtype)}
    rates = ", ".join(f"{str(name)[6:]} {rate / 1e12:.3g} TFLOP/s" for name, rate in products.items())
    copies, cached = (limits[name] / 1e9 for name in ("copy", "cached copy"))
    return f"Ceilings: copies {copies:.4g} GB/s ({cached:.4g} GB/s within the last cache), products {rates}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="only cases (or tuned tables) whose name contains one of these"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    parser.add_argument(
        "--note", default="", help="a sentence for the head of the table, such as who shared the machine"
    )
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compiled and deterministic baselines too (default: on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-memory", action="store_true", help="freed memory stays with the process, as in the training scripts"
    )
    parser.add_argument("--tune", action="store_true", help="GPU only: time the block sizes of the kernels")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        import trainkit.process_setup  # noqa: F401  importing it is what it is for
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.memory_of:
        return report_memory(*arguments.memory_of)
    if arguments.tune:
        if device == "cpu":
            parser.error("--tune needs a GPU")
        from benchmarks.kernel_tuning import tune  # needs triton

        flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
        return tune(lambda function: replayed(function, flush), device, arguments.cases)
    chosen = [case for case in cases(device) if any(word in case.name for word in arguments.cases)]
    if not chosen:
        parser.error(f"--cases: no case contains {arguments.cases!r}")
    limits, rows = ceilings(device), []
    name = f"kernels-{device}-keep-memory" if arguments.keep_memory else f"kernels-{device}"
    note = ["The process keeps freed memory"] if arguments.keep_memory else []
    head = [". ".join([machine(device), *note, *([arguments.note] if arguments.note else [])]), describe(limits)]
    if device != "cpu":
        absent = [package for name, package in RIVALS.items() if not find_spec(name)]
        head += [f"Not installed and left out: {', '.join(absent)}"] if absent else []
    print("\n".join(head))
    for case in chosen:
        for row in run_case(case, device, limits, compiled=arguments.compiled):
            rows.append(row)
            print(line(row), flush=True)
        write(arguments.output / name, head, rows)  # what stands survives a Ctrl-C


def line(row):
    def short(name, form):
        return f"{row[name]:{form}}" if row[name] != "" else ""

    numbers = [short(name, ".3f") for name in ("milliseconds", "median", "warm", "graph")]
    numbers += [short(name, ".2f") for name in ("ratio", "median_ratio", "spread", "roofline")]
    cells = [row["case"], row["kind"], row["provider"], *numbers, short("error", ".1e"), str(row["extra_megabytes"])]
    return "| " + " | ".join(cells) + " |"


def write(path, head, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = "case, pass, provider, ms (min), ms (median), ms (warm L2), ms (graph), ratio (min), ratio (median), "
    columns = (columns + "spread, roofline, error, extra MB").split(", ")
    table = "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *map(line, rows)])
    path.with_suffix(".md").write_text("\n\n".join(["# Kernels", *head, EXPLANATION, table]) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
