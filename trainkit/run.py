"""A training run: its folder, log and checkpoints, the best model so far, and a clean end on Ctrl-C or SIGTERM."""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from trainkit import checkpoint, distributed
from trainkit.errors import InputError
from trainkit.files import MAX_ID, check_like, number, numbers, shown
from trainkit.log import RunLog, Throughput, peak_memory
from trainkit.run_folder import prepare_run
from trainkit.sampler import ResumableSampler
from trainkit.signals import Signals
from trainkit.step import StepResult, TrainStep


class Run:
    """The book-keeping of a training loop.

        run = Run(args, "stage1", train_step, sampler, total_steps=1000, constants={"model_kwargs": model.kwargs})
        with run:
            for epoch in run.epochs():
                for batches in run.batches(loader):
                    run.log_step(train_step(batches), images=8)
                if run.validation_due():
                    run.log_validation(metrics, text)
                    run.keep_best((metrics["ap"], 0.0), "AP")

    train_step: brings model, optimizer, schedule, EMA and gradient scaler.
    total_steps: length of the schedule; --max-steps may end the run earlier.
    constants: plain values that every checkpoint holds beside the state.
    parts: modules whose state belongs to the run's, such as memory banks.
    values: plain numbers or None that the script changes; saved and restored.
    validate_first: whether to validate before the first step.
    may_change: flags, besides `run_folder.MAY_CHANGE`, that may change when a run is resumed.
    shorten: makes of a whole state what best.pt and epoch-N.pt hold.

    last.pt is written every --save-every steps, and before and after each validation; epoch-N.pt every --keep-every
    epochs. A resumed run does what an uninterrupted one did, bit for bit on the CPU, wherever it was ended.

    Raises InputError where the folder is in use, or where the checkpoint to resume does not fit.
    """

    def __init__(
        self, args: argparse.Namespace, script: str, train_step: TrainStep, sampler: ResumableSampler, *,
        total_steps: int, constants: Mapping[str, object], parts: Mapping[str, nn.Module] | None = None,
        values: Mapping[str, float | None] | None = None, validate_first: bool = True, may_change: Iterable[str] = (),
        shorten: Callable[[dict], dict] | None = None,
    ):  # fmt: skip
        self.args, self.script, self.train_step, self.sampler = args, script, train_step, sampler
        self.constants, self.parts, self.values = dict(constants), dict(parts or {}), dict(values or {})
        self.shorten, self.validate_first, self.validate_at = shorten, validate_first, getattr(args, "validate_at", ())
        self.best, self.stale = (-math.inf, -math.inf), 0  # best value so far, validations since
        self.epoch, self._written, self._stream = 0, None, None
        self.folder = prepare_run(args, script, may_change=may_change)
        if args.resume:
            state = checkpoint.load(args.resume)
            with checkpoint.restoring(args.resume):
                self.load_state_dict(state)
        self.log = RunLog(
            self.folder, total_steps=total_steps if args.max_steps is None else min(args.max_steps, total_steps),
            resume_step=train_step.steps if args.resume else None, validated=train_step.validated,
            every=args.log_every,
        )  # fmt: skip
        self.throughput, self.signals = Throughput(), Signals()

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        self.log.say(f"writing to {self.folder}")
        if self.args.resume:
            place = f"step {self.train_step.steps}, epoch {self.sampler.epoch}"
            self.log.say(f"resumed from {self.args.resume} at {place}")
        return self

    def __exit__(self, kind, *_) -> None:
        self.signals.__exit__()
        self.log.close()
        if kind is None or kind is SystemExit:
            distributed.stop()

    def say(self, *lines: str) -> None:
        """Print lines on rank 0."""
        for line in lines:
            self.log.say(line)

    def epochs(self) -> Iterator[int]:
        """The number of the epoch: 0 before the first step, for a validation, then 1, 2, ... up to --epochs.

        An epoch comes once more after each of its validations at the steps of --validate-at.
        """
        if self.train_step.steps == 0 and self.validate_first:
            yield 0
        while not self._over():
            self.epoch = self.sampler.epoch + 1
            yield self.epoch
            if len(self.sampler) == 0:
                self.sampler.set_epoch(self.epoch)  # a run resumed here begins the next epoch
                if self.args.keep_every and self.epoch % self.args.keep_every == 0:
                    self.save(f"epoch-{self.epoch}.pt")
            self._save_last()
            if not self._over():
                self.leave_if_asked()

    def batches(self, loader: Iterable) -> Iterator[list]:
        """Lists of --accumulate batches, each for one optimizer step, until the epoch ends or a validation is due.

        The sampler counts the batches of a step as done when they are handed out.
        """
        if self.epoch == 0 or len(self.sampler) == 0 or self._out_of_steps() or self._validates_here():
            return
        if self._stream is None:
            self._stream = _grouped(loader, self.args.accumulate)
        self.throughput.restart()
        for batches in self._stream:
            self.sampler.advance(len(batches))
            before = self.train_step.steps
            yield batches
            if before < self.train_step.steps and self.train_step.steps % self.args.save_every == 0:
                self._save_last()
            self.leave_if_asked()
            if self._out_of_steps() or (self._validates_here() and len(self.sampler)):
                return
        self._stream = None

    def validation_due(self) -> bool:
        """Whether to validate now. Writes last.pt first, so that a validation that is given up loses nothing."""
        step, epoch_ends = self.train_step, len(self.sampler) == 0
        last = self._out_of_steps() or (epoch_ends and self.epoch == self.args.epochs)
        due = step.steps == 0 or last or self._validates_here()
        due = due or (epoch_ends and self.epoch % self.args.validate_every == 0)
        if step.steps == step.validated or not due:
            return False
        self._save_last()
        return True

    def log_step(self, result: StepResult, *, images: int, metrics: dict | None = None, hidden: dict | None = None):
        """Log a step that moved the parameters.

        images: of this step, over all ranks.
        metrics: numbers beside those of `result`. hidden: numbers that the console does not get.
        """
        if result.skipped:
            return
        step = self.train_step.steps
        values = {"epoch": self.epoch, "loss": result.total, **result.losses, "lr": result.lr}
        values |= {"grad_norm": result.grad_norm, **result.metrics, **(metrics or {})}
        values["images_per_second"], seconds_per_step = self.throughput.update(images)
        unprinted = {"memory_gib": peak_memory(self.train_step.device), **(hidden or {})}
        self.log.train(step, values, unprinted=unprinted, seconds_per_step=seconds_per_step)

    def log_validation(self, metrics: dict, text: str) -> None:
        """Log the metrics of a validation, `text` on the console, and count the validation as done."""
        step = self.train_step.validated = self.train_step.steps
        self.log.write("validation", step, {"epoch": self.epoch, **metrics})
        self.log.say(f"validation after step {step}  {text}")

    def keep_best(self, value: tuple[float, float], name: str) -> None:
        """Write best.pt where `value` is the highest so far. value: what is compared, and what breaks ties.

        As long as there was nothing to measure, -inf, the newest model is kept.
        """
        self.stale += 1
        if value > self.best or not math.isfinite(self.best[0]):
            self.best, self.stale = value, 0
            self.save("best.pt")
            best = f"{abs(value[0]):.4f}" if math.isfinite(value[0]) else "none to measure"
            self.log.say(f"best {name} so far: {best}, kept in {self.folder}/best.pt")

    def leave_if_asked(self) -> None:
        """After a signal on any rank, or without `torchrun`: write last.pt and raise SystemExit. A collective."""
        if self.signals.stop_requested():
            self._save_last()
            self.log.say(f"stopped at step {self.train_step.steps}; go on with --resume {self.folder}")
            raise SystemExit(self.signals.exit_status)

    def _over(self) -> bool:
        return self.sampler.epoch >= self.args.epochs or (self.epoch > 0 and self._out_of_steps())

    def _out_of_steps(self) -> bool:
        return self.args.max_steps is not None and self.train_step.steps >= self.args.max_steps

    def _validates_here(self) -> bool:
        return self.train_step.steps in self.validate_at and self.train_step.validated != self.train_step.steps

    def _save_last(self) -> None:
        step, sampler = self.train_step, self.sampler
        place = step.steps, step.validated, sampler.epoch, sampler.position
        if place != self._written:
            self.save("last.pt")
            self._written = place

    def save(self, name: str) -> None:
        """Write a checkpoint into the folder. A collective."""
        state = self.state_dict()
        checkpoint.save(self.folder / name, self.shorten(state) if self.shorten and name != "last.pt" else state)

    def _parts(self) -> dict:
        """What is saved by its own state dict, and put back where that is like it is now."""
        average = self.train_step.average
        parts = {"model": self.train_step.bare_model, "schedule": self.train_step.schedule, **self.parts}
        return parts if average is None else parts | {"ema": average.module}

    def state_dict(self) -> dict:
        """Everything that moves while the run trains, as tensors and plain Python. A collective."""
        step, average = self.train_step, self.train_step.average
        parts = self._parts() | {"optimizer": step.optimizer, "stepper": step, "sampler": self.sampler}
        place = {"script": self.script, "best": self.best, "stale": self.stale, **self.values, **self.constants}
        place |= {"ema": None, "ema_updates": 0 if average is None else int(average.n_averaged)}
        place |= {"rng": distributed.gather_objects(checkpoint.rng_state())}
        return place | {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        """Put the run back where `state` left it. Raises InputError for a checkpoint of another script or model."""
        if state.get("script") != self.script:
            raise InputError(f"written by {shown(state.get('script'))}, not by {self.script}; use --init-from")
        if "optimizer" not in state:
            raise InputError("holds weights alone; resume last.pt")
        step, average = self.train_step, self.train_step.average
        if (state["ema"] is None) != (average is None):
            raise InputError("--ema-decay: the checkpoint was trained otherwise; resume with the same")
        if average is not None:
            average.n_averaged.fill_(number(state["ema_updates"], "ema_updates", 0, MAX_ID, whole=True))
        for name, part in self._parts().items():
            check_like(state[name], part.state_dict(), name)
            part.load_state_dict(state[name])
        _check_optimizer(step.optimizer, state["optimizer"])
        step.optimizer.load_state_dict(state["optimizer"])
        for name, part in {"stepper": step, "sampler": self.sampler}.items():
            before = part.state_dict()
            part.load_state_dict(state[name])  # says itself which flag to change
            check_like(part.state_dict(), before, name)
        updates = step.steps if average is None else average.n_averaged
        if not step.steps == updates == step.schedule.last_epoch or len(self.sampler) < 0:
            raise InputError("its parts are at different steps")
        best = state["best"] if isinstance(state["best"], list | tuple) else (state["best"], -math.inf)  # older ones
        self.best = numbers(best, "best", 2, -math.inf, math.inf)
        self.stale = number(state.get("stale", 0), "stale", 0, whole=True)  # absent in older checkpoints
        for name in self.values:
            self.values[name] = None if state[name] is None else number(state[name], name)
        if len(state["rng"]) == distributed.world_size():
            checkpoint.set_rng_state(state["rng"][distributed.rank()])


def _grouped(loader: Iterable, size: int) -> Iterator[list]:
    """The loader's batches in lists of `size`; what is left at the end of an epoch makes a smaller last list."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        yield group


def _check_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The groups and, of every parameter that has been trained, what its kind of optimizer keeps beside it."""
    check_like(state["param_groups"], optimizer.state_dict()["param_groups"], "optimizer: param_groups")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for index, kept in state["state"].items():
        like = {"momentum_buffer": parameters[index]}
        if isinstance(optimizer, torch.optim.AdamW):
            like = {"step": torch.zeros(()), "exp_avg": parameters[index], "exp_avg_sq": parameters[index]}
        check_like(kept, like, f"optimizer: state: {index}")
