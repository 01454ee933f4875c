"""Parameter groups, optimizer, learning-rate schedule and weight averaging."""

import argparse
import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit import distributed
from trainkit.errors import InputError

# The parameters of all other norm layers have one dimension, and are spared for that.
_NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str] = ("log_temperature", "logit_scale"),
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict]:
    """Every trainable parameter of `module` in exactly one group of an optimizer; frozen ones in none.

    No weight decay on norm layers, biases, other parameters of at most one dimension, and those whose dotted name is or
    ends with one of `no_decay`. `lr_scale` maps the beginning of a dotted name ("backbone", "head.box") to a factor on
    `lr`; the longest that fits wins. Each group has params, lr, weight_decay and a name such as "backbone, no decay".

    Raises ValueError for a prefix that fits no parameter, a factor that is not above 0, and nothing to train.
    """
    lr_scale = dict(lr_scale or {})
    names = [name for name, _ in module.named_parameters()]
    for prefix, factor in lr_scale.items():
        if not any(_begins(name, prefix) for name in names):
            raise ValueError(f"lr_scale names {prefix!r}, which no parameter's name begins with.")
        if factor <= 0:
            raise ValueError(f"lr_scale of {prefix!r} must be above 0, not {factor}; freeze the parameters instead.")
    norms = {id(p) for layer in module.modules() if isinstance(layer, _NORM_LAYERS) for p in layer.parameters()}

    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in lr_scale if _begins(name, p)), key=len, default="")
        spared = id(parameter) in norms or parameter.dim() <= 1 or any(_ends(name, suffix) for suffix in no_decay)
        members.setdefault((prefix, not spared), []).append(parameter)
    if not members:
        raise ValueError("no parameter is trainable.")
    return [
        {
            "params": parameters,
            "lr": lr * lr_scale.get(prefix, 1.0),
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{prefix or 'base'}, {'decay' if decays else 'no decay'}",
        }
        for (prefix, decays), parameters in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def _begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def build_optimizer(
    kind: str, groups: list[dict], momentum: float = 0.9, beta2: float = 0.999
) -> torch.optim.Optimizer:
    """ "sgd" with `momentum`, or "adamw" with (momentum, beta2) as its betas."""
    if not 0 <= momentum < 1:
        raise InputError(f"--momentum {momentum}: expected at least 0 and below 1.")
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=(momentum, beta2))
    raise InputError(f"--optimizer {kind}: expected sgd or adamw.")


def scale_lr(lr: float, batch: int, world: int, accumulate: int, base_batch: int) -> float:
    """`lr`, meant for `base_batch` samples a step, for batch * world * accumulate of them (Goyal et al. 2017, 2.1)."""
    return lr * batch * world * accumulate / base_batch


def build_schedule(
    optimizer: torch.optim.Optimizer,
    kind: str,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    final_factor: float = 0.0,
) -> LambdaLR:
    """One schedule, stepped after each optimizer step, that multiplies each group's learning rate by a factor.

    The factor rises linearly from `warmup_factor` to 1 over `warmup_steps` and then follows `kind`:
    "constant": 1. "multistep": times `gamma` at each of `milestones`, counted in steps from the start of the run.
    "cosine": half a cosine from 1 down to `final_factor` at `total_steps` (Loshchilov and Hutter 2017, equation 5).
    "one-cycle": as cosine, but the rise is half a cosine too, and takes 30 % of the run where `warmup_steps` is 0
    (Smith and Topin 2018, as torch's OneCycleLR; momentum is left alone).

    Its state dict holds the place in the schedule and the base rates, not the arguments: on resume the schedule is
    rebuilt from the arguments and continues at its step. InputError for an unknown kind or milestones out of order.
    """
    if kind not in ("multistep", "cosine", "one-cycle", "constant"):
        raise InputError(f"--schedule {kind}: expected multistep, cosine, one-cycle or constant.")
    if list(milestones) != sorted(set(milestones)):
        raise InputError(f"--milestones {list(milestones)}: expected rising numbers.")
    if kind == "one-cycle" and not warmup_steps:
        warmup_steps = round(0.3 * total_steps)
    course = {
        "multistep": functools.partial(_multistep, milestones=tuple(milestones), gamma=gamma),
        "constant": functools.partial(_multistep, milestones=(), gamma=1.0),
    }.get(kind, functools.partial(_cosine, first=warmup_steps, last=total_steps, low=final_factor))
    rise = functools.partial(_rise, steps=warmup_steps, low=warmup_factor, smooth=kind == "one-cycle")
    # LambdaLR saves the attributes of a callable object; a partial has none, so that the arguments stay the run's own.
    return LambdaLR(optimizer, functools.partial(_factor, rise=rise, course=course))


def _factor(step: int, rise: Callable[[int], float], course: Callable[[int], float]) -> float:
    return rise(step) * course(step)


def _rise(step: int, steps: int, low: float, smooth: bool) -> float:
    if step >= steps:
        return 1.0
    done = step / steps
    return low + (1 - low) * ((1 - math.cos(math.pi * done)) / 2 if smooth else done)


def _multistep(step: int, milestones: tuple[int, ...], gamma: float) -> float:
    return gamma ** bisect.bisect_right(milestones, step)


def _cosine(step: int, first: int, last: int, low: float) -> float:
    done = min(max((step - first) / max(1, last - first), 0.0), 1.0)
    return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2


class _WarmedAverage(AveragedModel):
    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=False)  # False: buffers are copied, not averaged
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)  # lies on the CPU: nothing waits for a GPU
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        super().update_parameters(model)


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the parameters of `model` (the bare one, on its device); buffers are copied.

    Call `update_parameters(model)` after each step; `.module` is the averaged model. The first update copies; the n-th
    after it decays by min(decay, (1 + n) / (10 + n)), so that a short run does not keep its random start (as
    TensorFlow's num_updates).
    """
    if not 0 <= decay < 1:
        raise InputError(f"--ema-decay {decay}: expected at least 0 and below 1.")
    return _WarmedAverage(model, decay)


def build_optimisation(args: argparse.Namespace, model: nn.Module, steps_per_epoch: int, **grouping):
    """Optimizer of all that `model` trains, and its schedule, as the flags of `add_recipe_flags` say.

    grouping: lr_scale and no_decay of `parameter_groups`. The schedule is stepped after each optimizer step.
    """
    lr = args.lr
    if args.lr_base_batch:
        lr = scale_lr(lr, args.batch_size, distributed.world_size(), args.accumulate, args.lr_base_batch)
    groups = parameter_groups(model, lr=lr, weight_decay=args.weight_decay, **grouping)
    optimizer = build_optimizer(args.optimizer, groups, momentum=args.momentum)
    schedule = build_schedule(
        optimizer, args.schedule, total_steps=args.epochs * steps_per_epoch, warmup_steps=args.warmup_steps,
        warmup_factor=args.warmup_factor, milestones=[epoch * steps_per_epoch for epoch in args.milestones],
        gamma=args.gamma, final_factor=args.final_factor,
    )  # fmt: skip
    return optimizer, schedule
