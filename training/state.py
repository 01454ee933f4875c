"""Everything of a run that moves while it trains: into a checkpoint and back, bit for bit."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from training import checkpoint, distributed
from training.errors import InputError
from training.sampler import ResumableSampler
from training.step import Stepper


@dataclass
class TrainingState:
    """The moving parts of a run of `script`; `model` is the bare one, `average` its EMA or None."""

    script: str
    model: nn.Module
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    stepper: Stepper
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
        """Put the run back where `state` left it. Raises InputError for a checkpoint of another script or model."""
        if state.get("script") != self.script:
            raise InputError(
                f"--resume: the checkpoint was written by {state.get('script')}, not by {self.script}; use --init-from"
            )
        if (state["ema"] is None) != (self.average is None):
            raise InputError("--ema-decay: the checkpoint was trained otherwise; resume with the same")
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.module.load_state_dict(state["ema"])
                self.average.n_averaged.fill_(state["ema_updates"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            first = [line.strip() for line in str(error).splitlines()[1:2]] or [str(error)]
            raise InputError(f"--resume: the checkpoint is of another model: {first[0]}") from error
        self.schedule.load_state_dict(state["schedule"])
        self.stepper.load_state_dict(state["stepper"])
        self.sampler.load_state_dict(state["sampler"])
        if len(state["rng"]) == distributed.world_size():
            checkpoint.set_rng_state(state["rng"][distributed.rank()])
