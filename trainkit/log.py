"""What a run says of itself: console, metrics.jsonl and TensorBoard; written by the main rank alone."""

import collections
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
from trainkit.files import read_text, whole_file, writing
from trainkit.gradients import GradientReport
from trainkit.run_files import step_record


class RunLog:
    """Writes a run's numbers, on rank 0; on the others every method does nothing.

    folder/metrics.jsonl gets a json object a line, {"step": 3, "epoch": 1, "kind": "train", **values}, with null for
    what is not finite; the kinds are train, validation and gradients. The console gets every `every`-th step, each
    validation and each gradient report, and, where it is a terminal, a progress bar with the time left. TensorBoard's
    files, where it is installed, lie in the folder.

    total_steps: steps at which the run ends.
    resume_step: the step of the checkpoint that is resumed; later lines of metrics.jsonl are removed, as they will come
    again, and validations after the step `validated`, the last one that the checkpoint knows of. None begins the file
    anew. Raises InputError where the file to resume is not what this class writes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int,
        resume_step: int | None = None,
        validated: int = -1,
        tensorboard: bool = True,
        every: int = 20,
    ):
        self._file = self._bar = self._writer = None
        self._folder, path = Path(folder), Path(folder) / "metrics.jsonl"
        if not distributed.is_main():
            return
        if resume_step is not None and os.path.lexists(path):
            _cut(path, resume_step, validated)
        self._total, self._first, self._every = total_steps, resume_step or 0, every
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
        if self._file is None:
            return
        self._write("train", step, values | (unprinted or {}))
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self._every == 0 or step in (self._first + 1, self._total):
            left = f"  left {_clock(seconds_per_step * (self._total - step))}" if seconds_per_step else ""
            self.say(f"step {step}/{self._total}{left}  {_line(values)}")

    def validation(self, step: int, values: dict, text: str | None = None) -> None:
        """Log what validation after `step` steps gave, `values` as for `train`; the console gets `text` instead."""
        if self._file is None:
            return
        self._write("validation", step, values)
        self.say(f"validation after step {step}  {_line(values) if text is None else text}")

    def gradients(self, step: int, epoch: int, report: GradientReport) -> None:
        """Log what each loss added to the gradient of the `step`-th step."""
        if self._file is None:
            return
        self._write("gradients", step, {"epoch": epoch, **report.record()})
        self.say(f"gradients of step {step}, by loss: norm and cosines\n{report.text()}")

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

    def _write(self, kind: str, step: int, values: dict) -> None:
        values = _plain(values)
        record = {"step": step, "epoch": values.get("epoch"), "kind": kind, **values}
        data = (json.dumps(record, allow_nan=False) + "\n").encode()
        with writing(self._file.name):
            while data:  # a nearly full disk takes a part of it
                data = data[self._file.write(data) :]
        with writing(self._folder):  # TensorBoard's file
            for name, value in _flat(values) if self._writer is not None else ():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._writer.add_scalar(f"{kind}/{name}", value, step)


def _plain(value):
    """`value` as json has it: numbers of numpy and torch as Python's, null for NaN and infinities."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, (bool, int, float, str, type(None))):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict, before: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}/")
        else:
            yield before + str(name), value


def _line(values: dict) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in _flat(values)
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _cut(path: Path, last_step: int, validated: int) -> None:
    """Remove the lines after `last_step`, validations after `validated`, and a last line that was left unfinished."""
    lines = read_text(path, "the log of a run").split("\n")
    with whole_file(path, "w") as file:
        for place, line in enumerate(lines, 1):
            record = step_record(line)
            if record is None and place < len(lines):
                raise InputError(f"{path}: line {place} is not a json object with a step.")
            if record is not None and record["step"] <= (
                validated if record.get("kind") == "validation" else last_step
            ):
                file.write(line + "\n")


class Throughput:
    """Samples per second over the last `window` steps; `restart()` after a pause such as validation."""

    def __init__(self, window: int = 20):
        self._counts: collections.deque[int] = collections.deque(maxlen=window)
        self._times: collections.deque[float] = collections.deque(maxlen=window + 1)
        self._first = True
        self.restart()

    def restart(self) -> None:
        self._counts.clear()
        self._times.clear()
        self._times.append(time.perf_counter())

    def update(self, samples: int) -> float:
        """Count a step of so many samples (of all ranks together) and return samples per second.

        The first step of a process, which warms up, does not count in later ones.
        """
        self._counts.append(samples)
        self._times.append(time.perf_counter())
        rate = sum(self._counts) / (self._times[-1] - self._times[0])
        if self._first:
            self._first = False
            self.restart()
        return rate

    @property
    def seconds_per_step(self) -> float | None:
        """Over the same steps; None before there is one."""
        return (self._times[-1] - self._times[0]) / len(self._counts) if self._counts else None


def peak_memory(device: torch.device) -> float:
    """The largest memory so far in GiB: what torch held on the GPU, or all that this process held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB, on macOS in bytes (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
