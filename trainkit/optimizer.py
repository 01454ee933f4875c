"""Parameter groups, optimizer, learning-rate schedule and weight averaging."""

import argparse
import bisect
import functools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit import distributed
from trainkit.errors import InputError


def parameter_groups(
    module: nn.Module, *, lr: float, weight_decay: float, no_decay: Sequence[str] = (), lr_scale: dict | None = None
) -> list[dict]:
    """Every trainable parameter of `module` in exactly one group of an optimizer; frozen ones in none.

    No weight decay on parameters of at most one dimension, as those of norms and biases are.

    no_decay: dotted names, or their ends, of parameters without weight decay.
    lr_scale: beginning of a dotted name ("backbone", "head.box") -> factor on `lr`; the longest that fits wins.

    Each group has params, lr, weight_decay and a name such as "backbone, no decay".
    """
    lr_scale = lr_scale or {}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        prefixes = [prefix for prefix in lr_scale if f"{name}.".startswith(f"{prefix}.")]
        spared = parameter.dim() <= 1 or any(f".{name}".endswith(f".{suffix}") for suffix in no_decay)
        if parameter.requires_grad:
            members.setdefault((max(prefixes, key=len, default=""), spared), []).append(parameter)
    return [
        dict(params=parameters, lr=lr * lr_scale.get(prefix, 1.0), weight_decay=0.0 if spared else weight_decay,
             name=f"{prefix or 'base'}, {'no decay' if spared else 'decay'}")
        for (prefix, spared), parameters in sorted(members.items(), key=lambda item: item[0])
    ]  # fmt: skip


def lr_factor(
    step: int, kind: str, *, total_steps: int, warmup_steps: int = 0, warmup_factor: float = 0.001,
    milestones: Sequence[int] = (), gamma: float = 0.1, final_factor: float = 0.0, restart: int = 0,
) -> float:  # fmt: skip
    """The factor on each group's learning rate after `step` optimizer steps.

    It rises linearly from `warmup_factor` to 1 over `warmup_steps` and then follows `kind`:
    "constant": 1. "multistep": times `gamma` at each of `milestones`, rising steps from the start of the run.
    "cosine": half a cosine from 1 down to `final_factor` at `total_steps` (Loshchilov and Hutter 2017, equation 5).
    restart: the step at which a first course has ended and a second one begins; 0 for one alone.
    """
    if restart:
        step, total_steps = (step, restart) if step < restart else (step - restart, total_steps - restart)
    rise = course = 1.0
    if step < warmup_steps:
        rise = warmup_factor + (1 - warmup_factor) * (step / warmup_steps)
    if kind == "multistep":
        course = gamma ** bisect.bisect_right(milestones, step)
    elif kind == "cosine":
        done = min(max((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0), 1.0)
        course = final_factor + (1 - final_factor) * (1 + math.cos(math.pi * done)) / 2
    return rise * course


def build_optimisation(
    args: argparse.Namespace, model: nn.Module, steps_per_epoch: int, *, no_decay: Sequence[str] = (),
    restart_epochs: int = 0,
):  # fmt: skip
    """Optimizer of all that `model` trains, and its schedule, as the flags of `add_recipe_flags` say.

    --lr-base-batch scales --lr with the samples per step (Goyal et al. 2017, 2.1). no_decay: see `parameter_groups`.
    restart_epochs: after which the schedule begins anew. The schedule is stepped after each optimizer step. Raises
    InputError where --lr-scale names no parameter.
    """
    lr_scale = {name: float(factor) for name, factor in (text.split("=") for text in args.lr_scale)}
    for name, factor in lr_scale.items():  # a recipe may name parts at 1 that not every model has
        if factor != 1 and not any(f"{known}.".startswith(f"{name}.") for known, _ in model.named_parameters()):
            parts = ", ".join(part for part, _ in model.named_children())
            raise InputError(f"--lr-scale {name}: no parameter's name begins so; the model's parts are {parts}")
    lr = args.lr
    if args.lr_base_batch:
        lr = lr * args.batch_size * distributed.world_size() * args.accumulate / args.lr_base_batch
    groups = parameter_groups(model, lr=lr, weight_decay=args.weight_decay, no_decay=no_decay, lr_scale=lr_scale)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(args.momentum, 0.999))
    # LambdaLR saves the attributes of a callable object; a partial has none, so that a resumed run brings its own.
    factor = functools.partial(
        lr_factor, kind=args.schedule, total_steps=args.epochs * steps_per_epoch, warmup_steps=args.warmup_steps,
        warmup_factor=args.warmup_factor, milestones=sorted(epoch * steps_per_epoch for epoch in args.milestones),
        gamma=args.gamma, final_factor=args.final_factor, restart=restart_epochs * steps_per_epoch,
    )  # fmt: skip
    return optimizer, LambdaLR(optimizer, factor)


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the parameters of `model` (the bare one, on its device); buffers are copied.

    Call `update_parameters(model)` after each step; `.module` is the averaged model. The first update copies; the n-th
    after it decays by min(decay, (1 + n) / (10 + n)), so that a short run does not keep its random start (as
    TensorFlow's num_updates).
    """

    def update(averages, current, _) -> None:
        n = int(average.n_averaged)  # lies on the CPU: nothing waits for a GPU
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, current, None)

    average = AveragedModel(model, multi_avg_fn=update)  # buffers are copied, not averaged
    return average
