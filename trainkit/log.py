"""The log of a run: console, metrics.jsonl and TensorBoard; written by rank 0 alone."""

import collections
import datetime
import json
import math
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch

from trainkit import distributed
from trainkit.errors import InputError
from trainkit.files import MAX_ID, number, parse_json, read_text, whole_file, writing


class RunLog:
    """Writes a run's numbers, on rank 0; on the others every method does nothing.

    folder/metrics.jsonl gets a json object per line, {"step": 3, "epoch": 1, "kind": "train", **values}, with null for
    what is not finite; the kinds are train and validation. The console gets every `every`-th step, each
    validation and each gradient report and, where it is a terminal, a progress bar. TensorBoard's files, where it is
    installed, lie in the folder.

    total_steps: steps at which the run ends.
    resume_step: the step of the resumed checkpoint; later lines of metrics.jsonl are removed, as they will come again.
        None begins the file anew.
    validated: the last validation that the checkpoint knows of; later ones are removed, too.

    Raises InputError where the file to resume is not what this class writes.
    """

    def __init__(
        self, folder: str | Path, *, total_steps: int, resume_step: int | None = None, validated: int = -1,
        tensorboard: bool = True, every: int = 20,
    ):  # fmt: skip
        self._file = self._bar = self._writer = None
        self._total, self._first, self._every = total_steps, resume_step or 0, every
        self._folder, path = Path(folder), Path(folder) / "metrics.jsonl"
        if not distributed.is_main():
            return
        if resume_step is not None and os.path.lexists(path):
            _cut(path, resume_step, validated)
        with writing(path):
            self._file = path.open("wb" if resume_step is None else "ab", buffering=0)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=self._first, unit="step", dynamic_ncols=True)
        if tensorboard:
            self._writer = self._open_tensorboard()

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("tensorboard is not installed; metrics.jsonl has the same numbers")
            return None
        hook = threading.excepthook  # what TensorBoard's thread could not write, its next write tells us
        threading.excepthook = lambda told: isinstance(told.exc_value, OSError) or hook(told)
        with writing(self._folder):
            return SummaryWriter(self._folder, purge_step=self._first + 1)

    def train(
        self, step: int, values: dict, *, unprinted: dict | None = None, seconds_per_step: float | None = None
    ) -> None:
        """Log the `step`-th step, from 1; `values` maps names (one is "epoch") to numbers, or to more such dicts.

        unprinted: values that the files get but the console does not. seconds_per_step: for the time left.
        """
        self.write("train", step, values | (unprinted or {}))
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self._every == 0 or step in (self._first + 1, self._total):
            left = ""
            if seconds_per_step is not None:
                left = f"  left {datetime.timedelta(seconds=round(seconds_per_step * (self._total - step)))}"
            texts = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in _flat(values))
            self.say(f"step {step}/{self._total}{left}  {'  '.join(texts)}")

    def say(self, text: str) -> None:
        """Print a line on standard output, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._file is not None:
            print(text, flush=True)

    def close(self) -> None:
        with writing(self._folder):
            for target in (self._bar, self._file, self._writer):
                if target is not None:
                    target.close()
        self._file = self._bar = self._writer = None

    def write(self, kind: str, step: int, values: dict) -> None:
        """A line of metrics.jsonl, and the same numbers for TensorBoard. kind: train or validation."""
        if self._file is None:
            return
        values = plain(values)
        record = {"step": step, "epoch": values.get("epoch"), "kind": kind, **values}
        data = (json.dumps(record, allow_nan=False) + "\n").encode()
        with writing(self._file.name):
            while data:  # a nearly full disk takes a part of it
                data = data[self._file.write(data) :]
        with writing(self._folder):  # TensorBoard's file
            for name, value in _flat(values) if self._writer is not None else ():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._writer.add_scalar(f"{kind}/{name}", value, step)


def plain(value):
    """`value` as json has it: numbers of numpy and torch as Python's, null for NaN and infinities."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if not isinstance(value, (bool, int, float, str, type(None))):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict, before: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}/")
        else:
            yield before + str(name), value


def step_record(line: str) -> dict | None:
    """A line of metrics.jsonl, with a number of at least 0 as its "step"; None where it is something else."""
    try:
        record = parse_json(line, "")
        step = None if isinstance(record["step"], str) else record["step"]
        return record | {"step": number(step, "", 0, MAX_ID)}
    except (InputError, KeyError, TypeError):
        return None


def _cut(path: Path, last_step: int, validated: int) -> None:
    """Remove the lines after `last_step`, validations after `validated`, and a last line that was left unfinished."""
    lines = read_text(path, "the log of a run").split("\n")
    with whole_file(path, "w") as file:
        for place, line in enumerate(lines, 1):
            record = step_record(line)
            if record is None and place < len(lines):
                raise InputError(f"{path}: line {place} is not a json object with a step.")
            if record is not None:
                last = validated if record.get("kind") == "validation" else last_step
                file.write(f"{line}\n" if record["step"] <= last else "")


class Throughput:
    """Rates over the last `window` steps; `restart()` after a pause such as validation."""

    def __init__(self, window: int = 20):
        self._steps: collections.deque[tuple[float, int]] = collections.deque(maxlen=window)  # seconds, samples
        self._first = True
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def update(self, samples: int) -> tuple[float, float | None]:
        """Count a step of so many samples (of all ranks) -> samples per second, seconds per step.

        The first step of a process warms up: later rates leave it out, and it gives no seconds per step.
        """
        before, self._last = self._last, time.perf_counter()
        if self._first:
            self._first = False
            return samples / (self._last - before), None
        self._steps.append((self._last - before, samples))
        seconds, counts = map(sum, zip(*self._steps, strict=True))
        return counts / seconds, seconds / len(self._steps)


def peak_memory(device: torch.device) -> float:
    """The largest memory so far in GiB: what torch held on the GPU, or all that this process held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
