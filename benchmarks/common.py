"""What the benchmarks share: timing by turns, peak memory, the machine's description, and tables."""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from trainkit.device import AUTOCAST

RESULTS = Path(__file__).resolve().parent / "results"
TIME_COLUMNS = ["model", "median s", "min s", "max s", "time over ours (all rounds)"]


def make_parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count (default: {rounds})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    return parser


def add_step_flags(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The flags of benchmarks of a training step."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"images per step (default: {batch_size})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=tuple(AUTOCAST), default="none", help="dtype of autocast (default: none)")


def wall_seconds(function) -> float:
    """Seconds of one call, until the GPU is done where one is used."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(functions: dict, rounds: int, *, warmup: int = 1, seconds=wall_seconds) -> dict[str, list[float]]:
    """name -> seconds of each round; every round calls every function once, so that other load slows all of them down.

    functions: name -> function without arguments; warmup: rounds that do not count; seconds(function) measures a call.
    """
    times = {name: [] for name in functions}
    for round_ in range(warmup + rounds):
        for name, function in functions.items():
            taken = seconds(function)
            if round_ >= warmup:
                times[name].append(taken)
    return times


def ratio(times: list[float], reference: list[float]) -> str:
    """times / reference by round: the median, and the range in brackets."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def time_rows(times: dict[str, list[float]], reference: str) -> list[list[str]]:
    """Rows for TIME_COLUMNS; times as from `take_turns`."""
    rows = []
    for name, taken in times.items():
        seconds = [f"{value:.3f}" for value in (statistics.median(taken), min(taken), max(taken))]
        rows.append([name, *seconds, ratio(taken, times[reference])])
    return rows


def memory(device: str, peak: bool = False) -> float:
    """MiB that this process holds now or held at its peak: in PyTorch's GPU allocator, or resident (Linux)."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    # Not ru_maxrss, which a process inherits from the one that started it (getrusage(2), Linux).
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10


def extra_memory(function, device: str) -> float:
    """MiB by which a call raises the peak above what the process held before. On a CPU only the first call tells."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = memory(device)
    function()
    return memory(device, peak=True) - before


def in_fresh_process(*flags: str) -> float:
    """The number that this script prints last when it is run again with its own flags and these."""
    run = subprocess.run([sys.executable, *sys.argv, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout.split()[-1])


def processor() -> str:
    """The CPU's model."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return model.group(1) if model else platform.processor() or platform.machine()


def machine(device: str = "cpu", packages: tuple[str, ...] = ()) -> str:
    """Processor or GPU, threads, versions, date and load, for the head of a report."""
    cpu = f"{processor()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    chip = torch.cuda.get_device_name() if device == "cuda" else cpu
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return f"{chip}; {versions}; {datetime.date.today()}; {load}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def finish(paragraphs: list[str], name: str, write: bool) -> None:
    """Print a report, and write it to results/{name}.md where asked."""
    report = "\n\n".join(paragraphs)
    print(report)
    if write:
        (RESULTS / f"{name}.md").write_text(report + "\n", encoding="utf-8")
