"""One optimizer step: autocast, accumulation, loss weights, finite checks, scaler, clipping, schedule and EMA."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit import distributed
from trainkit.device import at_least_float32, autocast
from trainkit.errors import InputError

# The scaler halves its scale at each skipped step: after so many in a row the scale is not what is wrong.
MAX_SKIPPED_IN_A_ROW = 24
MAX_IMAGES_NAMED = 16


@dataclass(frozen=True)
class StepResult:
    """What one step did. Floats, averaged over the micro-batches and then over the ranks; losses are unweighted."""

    losses: dict[str, float]
    total: float  # the weighted sum, the very number that was differentiated
    grad_norm: float  # 2-norm over all parameters, before clipping; not finite where the step was skipped
    lr: float  # of the first parameter group, as used in this step
    skipped: bool  # fp16 only: a gradient overflowed, so neither parameters nor schedule nor EMA moved
    metrics: dict[str, float]  # what else the forwards returned


class TrainStep:
    """Makes optimizer steps and counts them: `steps` moved the parameters, `skipped` did not (fp16 overflows).

    `validated`: the steps before the last validation, -1 before the first; `Run` sets it.

    model: what is trained, wrapped in DDP or not.
    forward(model, batch): named, unweighted scalar losses (), and named scalars () for the log, the same names each
        time; called under autocast.
    weights: loss name -> factor, applied here and nowhere else. A loss of weight 0 is switched off: it may be absent,
        and is logged but not differentiated where it is not.
    describe(batch): list of image ids or paths, for the sentence about a number that is not finite.
    schedule, average: are stepped or updated after each step that moved the parameters.
    amp: a key of `device.AUTOCAST`; fp16 brings a gradient scaler.
    clip_norm: largest gradient norm; None or 0 does not clip.

    Raises InputError where a loss with a weight is absent, where a loss has no weight, and where one has neither a path
    to the parameters nor the value 0.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *,
        forward: Callable[..., tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]], weights: dict[str, float],
        describe: Callable[..., list], device: torch.device | str,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        average: torch.optim.swa_utils.AveragedModel | None = None, amp: str = "none", clip_norm: float | None = None,
    ):  # fmt: skip
        if not any(weights.values()):
            raise InputError(f"none of the losses {sorted(weights)} has a weight above 0, nothing would be learnt.")
        self.model, self.optimizer, self.schedule, self.average = model, optimizer, schedule, average
        self.forward, self.describe, self.weights = forward, describe, dict(weights)
        self._metric_names: list[str] = []
        self.device, self.amp, self.clip_norm = torch.device(device), amp, clip_norm
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.steps = self.skipped = self._skipped_in_a_row = 0
        self.validated = -1

    @property
    def bare_model(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def __call__(self, batches: list, *, keep_gradients: bool = False) -> StepResult:
        """One step over a list of micro-batches, each of which counts the same.

        keep_gradients: leave the clipped gradients for `module_gradient_norms`.

        Raises InputError on every rank, before a parameter has moved, where on any rank a loss, or without fp16 a
        gradient, is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        rows = [self._backward(batch, len(batches), i == len(batches)) for i, batch in enumerate(batches, 1)]
        rows = torch.stack(rows)  # (micro-batches, 2 * losses + metrics)
        norm = self._measure_and_clip()
        lr = float(self.optimizer.param_groups[0]["lr"])

        # One all-reduce and one transfer carry all that the host wants to know; NaN and inf survive a sum.
        report = distributed.all_reduce_sum(torch.cat([rows.mean(0), norm.to(rows)[None]])) / distributed.world_size()
        *means, grad_norm = report.tolist()
        losses = dict(zip(self.weights, means, strict=False))
        metrics = dict(zip(self._metric_names, means[2 * len(losses) :], strict=True))
        self._check_losses(means, rows, batches)
        self._check_gradient(grad_norm, batches)
        self._update(grad_norm)
        if not keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        total = sum(weight * losses[name] for name, weight in self.weights.items() if weight)
        present = {name: value for name, value in losses.items() if self.weights[name] or not math.isnan(value)}
        return StepResult(present, total, grad_norm, lr, not math.isfinite(grad_norm), metrics)

    def _backward(self, batch, count: int, last: bool) -> torch.Tensor:
        """Differentiate one micro-batch's share.

        -> its losses (NaN where absent), then what has no graph of each, then its metrics.
        """
        wait = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if wait else contextlib.nullcontext():
            with autocast(self.amp, self.device):
                losses, metrics = self.forward(self.model, batch)
            self._check_names(losses)
            enabled = {name: losses[name] for name, weight in self.weights.items() if weight}
            weighted = {name: self.weights[name] * at_least_float32(loss) for name, loss in enabled.items()}
            total = sum(weighted.values())
            if total.requires_grad:
                self.scaler.scale(total / count).backward()
            elif distributed.world_size() > 1:
                raise ValueError("no loss of this rank has a graph, the other ranks would wait for its gradients.")
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        values = [losses[name].detach().double() if name in losses else zero + math.nan for name in self.weights]
        connected = [name not in enabled or enabled[name].requires_grad for name in self.weights]
        off_graph = [zero if fine else value.abs() for fine, value in zip(connected, values, strict=True)]
        self._metric_names = list(metrics)
        return torch.stack([*values, *off_graph, *(value.detach().double() for value in metrics.values())])

    def _check_names(self, losses: dict[str, torch.Tensor]) -> None:
        if absent := [name for name, weight in self.weights.items() if weight and name not in losses]:
            raise InputError(f"enabled loss absent: {', '.join(absent)} has a weight, the model gave {sorted(losses)}.")
        if unknown := [name for name in losses if name not in self.weights]:
            raise InputError(f"unknown loss: {', '.join(unknown)} has no weight among {sorted(self.weights)}.")

    def _gradients(self) -> list[nn.Parameter]:
        """The parameters that have a gradient."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _measure_and_clip(self) -> torch.Tensor:
        """The 2-norm () of the whole gradient, unscaled, before clipping."""
        parameters = self._gradients()
        if parameters:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return norm

    def _check_losses(self, means: list[float], rows: torch.Tensor, batches: list) -> None:
        """Raise on every rank alike: `means` of the rows are over all ranks, and the same on each."""
        names = list(self.weights)
        bad = [i for i, name in enumerate(names) if self.weights[name] and not math.isfinite(means[i])]
        if bad:
            finite = torch.isfinite(rows[:, bad]).all(1).tolist()
            guilty = [batch for batch, fine in zip(batches, finite, strict=True) if not fine]
            values = ", ".join(f"{names[i]} is {means[i]}" for i in bad)
            raise self._error(f"{values}, not a finite number, for the images {self._images(guilty)}.")
        if off_graph := [name for name, value in zip(names, means[len(names) :], strict=False) if value]:
            raise self._error(f"{', '.join(off_graph)} is not 0 but has no path to the parameters, so that its weight "
                              "has no effect.")  # fmt: skip

    def _check_gradient(self, grad_norm: float, batches: list) -> None:
        if math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            return
        if not self.scaler.is_enabled():
            grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            bad = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
            where = f"of {bad[0]} and {len(bad) - 1} more parameters" if bad else "norm"
            images = self._images(batches)
            raise self._error(f"the losses are finite, but the gradient {where} is not, for the images {images}.")
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise self._error(
                f"the gradient overflowed fp16 {self._skipped_in_a_row} times in a row, last for the images "
                f"{self._images(batches)}; use --amp bf16 or none, or a smaller learning rate."
            )

    def _error(self, sentence: str) -> InputError:
        return InputError(f"step {self.steps + 1}: {sentence}")

    def _images(self, batches: list) -> str:
        """What `describe` says of these batches of all ranks. A collective."""
        local = [str(image) for batch in batches for image in self.describe(batch)]
        images = [image for images in distributed.gather_objects(local) for image in images]
        return ", ".join(images[:MAX_IMAGES_NAMED]) + (" ..." if len(images) > MAX_IMAGES_NAMED else "")

    def _update(self, grad_norm: float) -> None:
        scaled = self.scaler.is_enabled() and bool(self._gradients())
        if math.isfinite(grad_norm):
            if scaled:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.steps += 1
        if scaled:
            self.scaler.update()

    def state_dict(self) -> dict:
        counts = {"steps": self.steps, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        return {**counts, "validated": self.validated, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises InputError where the checkpoint was trained with a scaler (fp16) and this run has none, or reverse."""
        if bool(state["scaler"]) != self.scaler.is_enabled():
            trained = "fp16" if state["scaler"] else "none or bf16"
            raise InputError(f"--amp {self.amp}: the checkpoint was trained with {trained}; resume with the same.")
        self.scaler.load_state_dict(state["scaler"])
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.validated = state.get("validated", self.steps)  # checkpoints of before it was counted were validated


def module_gradient_norms(model: nn.Module, depth: int = 2) -> dict[str, float | None]:
    """2-norm of the gradient of every module `depth` names deep, for --check; call it after a step that kept gradients.

    None where a module has trainable parameters and none of them got a gradient; wholly frozen modules are left out.
    """
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = ".".join(name.split(".")[:-1][:depth]) or name
            gradients.setdefault(module, []).extend([] if parameter.grad is None else [parameter.grad])
    return {name: nn.utils.get_total_norm(grads).item() if grads else None for name, grads in gradients.items()}


def print_step(train_step: TrainStep, batches: list, model: nn.Module) -> None:
    """For --check: the losses of a step, and the norm of the gradient of every module."""
    result = train_step(batches, keep_gradients=True)
    print("losses: " + ", ".join(f"{name} {value:.4f}" for name, value in result.losses.items()))
    for name, norm in module_gradient_norms(model).items():
        print(f"gradient norm of {name}: " + ("no gradient" if norm is None else f"{norm:.4g}"))
