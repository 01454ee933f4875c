"""Everything of a run that moves while it trains: into a checkpoint and back, bit for bit."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from trainkit import checkpoint, distributed
from trainkit.errors import InputError
from trainkit.files import check_like, shown
from trainkit.sampler import ResumableSampler
from trainkit.step import TrainStep


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is put back is one sentence that begins with its path."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # what is missing from it or of another kind meets whatever uses it first
        lines = str(error).splitlines() or [""]
        raise InputError(f"{path} cannot be resumed: {type(error).__name__}: {' '.join(lines[:2])}") from error


def best_of(state: dict) -> tuple[float, float]:
    """What chose the best checkpoint so far, and what breaks ties; an older checkpoint holds the former alone."""
    best = state["best"] if isinstance(state["best"], list | tuple) else (state["best"], -math.inf)
    if len(best) != 2 or not all(isinstance(value, float) and not math.isnan(value) for value in best):
        raise InputError(f"best: expected two numbers, got {shown(best)}")
    return tuple(best)


@dataclass
class TrainingState:
    """The moving parts of a run of `script`; `model` is the bare one, `average` its EMA or None."""

    script: str
    model: nn.Module
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    stepper: TrainStep
    sampler: ResumableSampler

    def state_dict(self) -> dict:
        """Tensors and plain Python, with the random states of every rank. A collective."""
        return {
            "script": self.script,
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.module.state_dict(),
            "ema_updates": 0 if self.average is None else int(self.average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stepper": self.stepper.state_dict(),
            "sampler": self.sampler.state_dict(),
            "rng": distributed.gather_objects(checkpoint.rng_state()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Put the run back where `state` left it; call it within `restoring`.

        Raises InputError for a checkpoint of another script or model, and for anything that is not of the kind which
        `state_dict` gives.
        """
        if state.get("script") != self.script:
            raise InputError(f"written by {shown(state.get('script'))}, not by {self.script}; use --init-from")
        if (state["ema"] is None) != (self.average is None):
            raise InputError("--ema-decay: the checkpoint was trained otherwise; resume with the same")
        parts = ("model", "optimizer", "schedule", "stepper", "sampler")
        own = {name: getattr(self, name).state_dict() for name in parts}
        check_like(state["model"], own["model"], "model")
        self.model.load_state_dict(state["model"])
        check_like(state["ema_updates"], 0, "ema_updates")
        if self.average is not None:
            check_like(state["ema"], own["model"], "ema")
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(state["ema_updates"])
        self._check_optimizer(state["optimizer"], own["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        check_like(state["schedule"], own["schedule"], "schedule")
        self.schedule.load_state_dict(state["schedule"])
        for name in ("stepper", "sampler"):  # these two say themselves which flag to change
            getattr(self, name).load_state_dict(state[name])
            check_like(getattr(self, name).state_dict(), own[name], name)
        steps, updates = self.stepper.steps, state["ema_updates"] if self.average else self.stepper.steps
        if not steps == updates == self.schedule.last_epoch or self.sampler.position > self.sampler.steps_per_epoch:
            raise InputError("its parts are at different steps")
        if len(state["rng"]) == distributed.world_size():
            checkpoint.set_rng_state(state["rng"][distributed.rank()])

    def _check_optimizer(self, state: dict, own: dict) -> None:
        """The groups and, of every parameter that has been trained, what its kind of optimizer keeps beside it."""
        check_like(state["param_groups"], own["param_groups"], "optimizer: param_groups")
        parameters = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        for index, kept in state["state"].items():
            like = {"momentum_buffer": parameters[index]}
            if isinstance(self.optimizer, torch.optim.AdamW):
                like = {"step": torch.zeros(()), "exp_avg": parameters[index], "exp_avg_sq": parameters[index]}
            check_like(kept, like, f"optimizer: state: {index}")
