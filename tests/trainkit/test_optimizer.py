import math

import pytest
import torch
from torch import nn

from trainkit.arguments import add_recipe_flags, make_parser
from trainkit.errors import InputError
from trainkit.optimizer import build_optimisation, build_optimizer, build_schedule, ema, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.head = nn.ModuleDict({"box": nn.Linear(4, 4), "norm": nn.LayerNorm((2, 4))})
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


def test_groups_without_effect_are_refused():
    with pytest.raises(ValueError, match="lr_scale"):
        parameter_groups(Model(), lr=1.0, weight_decay=0.0, lr_scale={"backbon": 0.1})
    with pytest.raises(ValueError, match="trainable"):
        parameter_groups(Model().requires_grad_(False), lr=1.0, weight_decay=0.0)


def test_optimizers_take_the_groups():
    groups = parameter_groups(Model(), lr=0.5, weight_decay=0.1)
    assert build_optimizer("sgd", groups, momentum=0.8).param_groups[0]["momentum"] == 0.8
    assert build_optimizer("adamw", groups).param_groups[0]["betas"] == (0.9, 0.999)
    with pytest.raises(InputError, match="--momentum 1.0"):
        build_optimizer("adamw", groups, momentum=1.0)


def rates(steps: int, kind: str, **options) -> list[float]:
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 0.5}])
    schedule = build_schedule(optimizer, kind, total_steps=steps, **options)
    seen = []
    for _ in range(steps + 1):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 2)
        seen.append(first)
        optimizer.step()
        schedule.step()
    return seen


def test_constant_stays():
    assert rates(4, "constant", warmup_steps=2, warmup_factor=0.5) == [0.5, 0.75, 1.0, 1.0, 1.0]


def test_multistep_milestones_are_not_shifted_by_the_warm_up():
    seen = rates(8, "multistep", warmup_steps=2, warmup_factor=0.5, milestones=(1, 4, 6), gamma=0.1)
    assert seen == pytest.approx([0.5, 0.075, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001])


def test_cosine_starts_after_the_warm_up_and_ends_with_the_run():
    seen = rates(10, "cosine", warmup_steps=2, warmup_factor=0.0, final_factor=0.2)
    assert seen[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert seen[6] == pytest.approx(0.6) and seen[10] == pytest.approx(0.2)
    assert all(before > after for before, after in zip(seen[2:], seen[3:], strict=False))


def test_one_cycle_is_torchs():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=21, pct_start=7 / 21, div_factor=25)
    expected = []
    for _ in range(21):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        if len(expected) < 21:
            theirs.step()
    # torch's total_steps counts both ends: its peak lies at pct_start * 21 - 1 = 6 and its end at step 20.
    ours = rates(20, "one-cycle", warmup_steps=6, warmup_factor=1 / 25, final_factor=1 / 25 / 1e4)
    assert ours == pytest.approx(expected)
    assert rates(20, "one-cycle").index(1.0) == 6


def test_schedule_resumes_at_its_step_with_the_arguments_of_the_new_run(tmp_path):
    def build(total_steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, build_schedule(optimizer, "cosine", total_steps=total_steps, warmup_steps=3)

    optimizer, schedule = build(10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    for total_steps in (10, 20):
        resumed, again = build(total_steps)
        states = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed.load_state_dict(states[0])
        again.load_state_dict(states[1])
        assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        resumed.step()
        again.step()
        done = (6 - 3) / (total_steps - 3)
        assert resumed.param_groups[0]["lr"] == pytest.approx((1 + math.cos(math.pi * done)) / 2)


def test_milestones_out_of_order_are_refused():
    with pytest.raises(InputError, match="--milestones"):
        rates(4, "multistep", milestones=(5, 3))


def test_ema_warms_up_and_copies_buffers():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = ema(model, decay=0.5)
    expected = None
    for n, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0]):
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
    with pytest.raises(InputError, match="--ema-decay"):
        ema(model, decay=1.0)


def test_flags_become_optimizer_and_schedule():
    parser = make_parser("a script")
    add_recipe_flags(parser, "script")
    parser.set_defaults(epochs=4, batch_size=8)
    flags = "--optimizer sgd --lr 0.1 --lr-base-batch 4 --accumulate 3 --schedule multistep --milestones 2 --gamma 0.5"
    model = nn.ModuleDict(dict(body=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    optimizer, schedule = build_optimisation(parser.parse_args(flags.split()), model, 5, lr_scale={"body": 0.1})
    rates = {group["name"].split(",")[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"body": 0.06, "base": 0.6})  # 8 * 3 samples a step instead of 4
    for _ in range(10):  # two epochs of 5 steps
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.6)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
