import math

import pytest
import torch
from torch import nn

from trainkit import distributed
from trainkit.arguments import add_recipe_flags, make_parser
from trainkit.optimizer import build_optimisation, ema, lr_factor, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.head = nn.ModuleDict({"box": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.logit_scale = nn.Parameter(torch.ones(1, 1))
        self.embedding = nn.Parameter(torch.ones(5, 4))
        self.backbone[0].requires_grad_(False)


def names_by_group(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_every_trainable_parameter_is_in_the_group_it_belongs_to():
    model = Model()
    scales, spared = {"backbone": 0.1, "head.box": 2}, ("logit_scale", "embedding")
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, no_decay=spared, lr_scale=scales)
    assert names_by_group(model, groups) == {
        "base, no decay": {"logit_scale", "embedding", "head.norm.weight", "head.norm.bias"},
        "backbone, decay": {"backbone.2.weight"},
        "backbone, no decay": {"backbone.1.weight", "backbone.1.bias", "backbone.2.bias"},
        "head.box, decay": {"head.box.weight"},
        "head.box, no decay": {"head.box.bias"},
    }
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings["base, no decay"] == (1.0, 0.0) and settings["head.box, decay"] == (2.0, 0.1)
    assert settings["backbone, decay"] == (0.1, 0.1) and settings["backbone, no decay"] == (0.1, 0.0)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, trainable)) == sorted(id(p) for group in groups for p in group["params"])


def test_the_longest_prefix_wins_and_a_shared_parameter_counts_once():
    model = Model()
    model.head["same"] = model.head["box"]
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, lr_scale={"head": 0.5, "head.box": 2.0})
    assert names_by_group(model, groups)["head.box, decay"] == {"head.box.weight"}
    assert sum(len(group["params"]) for group in groups) == 10


def rates(steps: int, kind: str, **options) -> list[float]:
    return [lr_factor(step, kind, total_steps=steps, **options) for step in range(steps + 1)]


def test_the_rate_rises_and_then_follows_its_course():
    assert rates(4, "constant", warmup_steps=2, warmup_factor=0.5) == [0.5, 0.75, 1.0, 1.0, 1.0]
    seen = rates(8, "multistep", warmup_steps=2, warmup_factor=0.5, milestones=(1, 4, 6), gamma=0.1)
    assert seen == pytest.approx([0.5, 0.075, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001])
    seen = rates(10, "cosine", warmup_steps=2, warmup_factor=0.0, final_factor=0.2)
    assert [seen[i] for i in (0, 1, 2, 6, 10)] == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])
    assert all(before > after for before, after in zip(seen[2:], seen[3:], strict=False))


def test_ema_warms_up_and_copies_buffers():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = ema(model, decay=0.5)
    expected = None
    for n, value in enumerate(2.0**n for n in range(11)):
        nn.init.constant_(model[0].weight, value)
        model[1].running_mean.fill_(value)
        model[1].num_batches_tracked.fill_(n)
        average.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
        assert average.module[0].weight.item() == pytest.approx(expected)
        assert average.module[1].running_mean.item() == value
        assert average.module[1].num_batches_tracked.item() == n
    assert decay == 0.5


def build(flags: str, model: nn.Module):
    parser = make_parser("a script")
    add_recipe_flags(parser, "script")
    return build_optimisation(parser.parse_args(flags.split()), model, 5)


def advance(optimizer, schedule, steps: int) -> float:
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0]["lr"]


def test_flags_become_optimizer_and_schedule(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    flags = "--epochs 4 --batch-size 8 --optimizer sgd --momentum 0.8 --lr 0.1 --lr-base-batch 4 --accumulate 3 "
    flags += "--schedule multistep --milestones 3,2 --gamma 0.5 "
    flags += "--lr-scale body=0.1 absent=1"
    model = nn.ModuleDict(dict(body=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    optimizer, schedule = build(flags, model)
    rates = {group["name"].split(",")[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"body": 0.12, "base": 1.2})  # 8 * 3 * 2 samples per step instead of 4
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.8
    assert advance(optimizer, schedule, 9) == pytest.approx(1.2)  # the last step of two epochs of 5
    assert advance(optimizer, schedule, 1) == pytest.approx(0.6)
    assert build("--momentum 0.8", model)[0].param_groups[0]["betas"] == (0.8, 0.999)


def test_schedule_resumes_at_its_step_with_the_flags_of_the_new_run():
    optimizer, schedule = build("--lr 1 --epochs 2 --warmup-steps 3", nn.Linear(1, 1))
    rate = advance(optimizer, schedule, 5)
    for epochs in (2, 4):
        resumed, again = build(f"--lr 1 --epochs {epochs} --warmup-steps 3", nn.Linear(1, 1))
        resumed.load_state_dict(optimizer.state_dict())
        again.load_state_dict(schedule.state_dict())
        assert resumed.param_groups[0]["lr"] == rate
        done = (6 - 3) / (epochs * 5 - 3)
        assert advance(resumed, again, 1) == pytest.approx((1 + math.cos(math.pi * done)) / 2)
