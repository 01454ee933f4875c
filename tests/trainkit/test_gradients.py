"""Norms and cosines of the losses' gradients: by hand, on the way of a step, and in two gloo processes."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit import distributed
from trainkit.gradients import LossGradients, gradient_tables
from trainkit.step import TrainStep

WEIGHTS = {"square": 2.0, "mean": 0.5, "head": 1.0}


class Net(nn.Module):
    """Two linear layers; the losses see both, the head alone, or one with gradients of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Linear(3, 4).double()
        self.neck = nn.Linear(4, 4).double()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.neck(self.backbone(x).tanh())
        return {
            "square": self.head(hidden).square().mean(),
            "mean": hidden.mean(),
            "head": self.head(hidden.detach()).mean(),
        }

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "neck": self.neck}


def reported(losses: dict, weights: dict, parts: dict):
    gradients = LossGradients(parts)
    gradients.add({name: weights[name] * loss for name, loss in losses.items() if weights.get(name)})
    return gradients.report()


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def stepper(model: nn.Module, *, amp: str = "none", losses_of=lambda model, x: model(x), weights=None) -> TrainStep:
    step = TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), weights=weights or WEIGHTS,
        forward=lambda model, x: (losses_of(model, x), {}), describe=lambda batch: ["a.png"], device="cpu", amp=amp,
        clip_norm=0.5,
    )  # fmt: skip
    step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=amp == "fp16")  # 65536 overflows here
    return step


def contrastive(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses over the rows of all ranks; the second rank has none of its own, nor a graph to the parameters."""
    losses = model(x)
    rows = losses["rows"] if distributed.is_main() else torch.zeros(0, 4, dtype=torch.float64)
    everyone = distributed.all_gather_with_grad(rows)
    contrast = (rows @ everyone.T).square().sum() + 0 * everyone.sum()
    return {"square": losses["square"], "contrast": distributed.global_mean(contrast, len(rows))}


class Rows(Net):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.neck(self.backbone(x).tanh())
        return {"rows": rows, "square": self.head(rows).square().mean()}


def test_two_losses_whose_gradients_are_known():
    part = nn.Linear(2, 1, bias=False)
    along, across = part(torch.tensor([3.0, 4.0])).squeeze(), part(torch.tensor([4.0, -3.0])).squeeze()
    losses = {"along": along, "across": across, "against": -along - across}
    report = reported(losses, {"along": 1.0, "across": 0.1, "against": 2.0}, {"part": part})
    assert report["part"]["norm"] == pytest.approx({"along": 5.0, "across": 0.5, "against": 2 * math.sqrt(50)})
    half = pytest.approx(-math.sqrt(0.5), abs=1e-6)
    expected = {"along": {"across": pytest.approx(0, abs=1e-6), "against": half}, "across": {"against": half}}
    assert report["part"]["cosine"] == expected
    assert part.weight.grad is None
    (along + across).backward()  # the graph is still there


def test_no_path_no_gradient_and_a_frozen_part():
    model = Net()
    model.backbone.requires_grad_(False)
    model.neck.bias.requires_grad_(False)
    losses = model(inputs(4)) | {"flat": model.neck.weight.sum() * 0, "constant": torch.tensor(2.0)}
    weights = WEIGHTS | {"flat": 1.0, "constant": 1.0, "absent": 1.0, "square": 0.0}
    report = reported(losses, weights, model.parts)
    assert report["backbone"]["norm"] == dict.fromkeys(("mean", "head", "flat", "constant"))
    norms = report["neck"]["norm"]
    assert norms["mean"] > 0 and norms["flat"] == 0.0 and norms["head"] is None and norms["constant"] is None
    for part in report.values():
        assert {value for row in part["cosine"].values() for value in row.values()} == {None}


def test_a_table_holds_every_pair_once():
    model = Net()
    report = reported(model(inputs(4)), WEIGHTS, model.parts)
    norms, cosine = report["neck"]["norm"], report["neck"]["cosine"]["square"]["mean"]
    titles, square, mean, head = (line.split() for line in gradient_tables(report).splitlines()[-4:])
    assert titles == ["gradient", "at", "neck", "norm", "square", "mean"]
    assert square == ["square", f"{norms['square']:.3g}"] and mean[-1] == f"{cosine:+.3f}"
    assert head == ["head", "none", "-", "-"]


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_step_is_the_same_bit_for_bit_and_the_report_is_of_its_gradient(amp):
    plain, watched = Net().float(), Net().float()
    plain_step, watched_step = stepper(plain, amp=amp), stepper(watched, amp=amp)
    for rows in (4, 6):
        batches = list(inputs(rows).float().split(3))
        expected = plain_step(batches)
        result = watched_step(batches, parts=watched.parts)
        assert (result.losses, result.total, result.grad_norm) == (expected.losses, expected.total, expected.grad_norm)
        assert expected.gradients is None
        assert all(map(torch.equal, plain.parameters(), watched.parameters()))
    whole = Net().float()
    alone = stepper(whole, amp=amp)
    alone.clip_norm = None
    report = alone([inputs(4).float()[:2], inputs(4).float()[2:]], keep_gradients=True, parts=whole.parts).gradients
    for part, module in whole.parts.items():
        total = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))
        square, mean = report[part]["norm"]["square"], report[part]["norm"]["mean"]
        added = square**2 + mean**2 + 2 * square * mean * report[part]["cosine"]["square"]["mean"]
        assert math.sqrt(added) == pytest.approx(total, rel=1e-5 if amp == "none" else 0.02)


def test_an_overflow_is_reported_as_such():
    model = Net().float()
    step = stepper(model, amp="fp16", losses_of=lambda model, x: model(x) | {"mean": model(x)["mean"].float() * 1e20})
    result = step([inputs(4).float()], parts=model.parts)
    neck = result.gradients["neck"]
    assert result.skipped and not math.isfinite(neck["norm"]["mean"]) and math.isfinite(neck["norm"]["square"])
    assert neck["cosine"] == {"square": dict.fromkeys(["mean", "head"]), "mean": {"head": None}}


def observe() -> dict:
    own = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
    model = Net()
    reduced = []
    step = stepper(
        DistributedDataParallel(model),
        losses_of=lambda model, x: reduced.append(model.require_backward_grad_sync) or model(x),
    )
    micro = list(inputs(8)[own].split(2))
    results = [step(micro, parts=model.parts), step(micro)]
    seen = {"ddp": [(result.gradients, result.grad_norm, result.losses, result.total) for result in results]}
    seen["reduced"] = reduced
    model = Rows()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    step = stepper(wrapped, losses_of=contrastive, weights={"square": 1.0, "contrast": 1.0})
    return seen | {"no graph": step([inputs(8)[own]], parts=model.parts).gradients}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    torch.save(observe(), Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def seen(tmp_path_factory, two_ranks) -> list[dict]:
    return two_ranks(__file__, tmp_path_factory.mktemp("two-ranks"))


def test_two_ranks_report_what_one_process_does(seen):
    assert seen[0]["ddp"] == seen[1]["ddp"]
    model = Net()
    step = stepper(model)
    assert seen[0]["reduced"] == [False, True] * 2  # once a step, not once a micro-batch
    for parts, (report, *numbers) in zip((model.parts, None), seen[0]["ddp"], strict=True):
        result = step([inputs(8)], parts=parts)
        for number, own in zip(numbers, (result.grad_norm, result.losses, result.total), strict=True):
            assert number == pytest.approx(own)
        for part in parts or ():
            own, theirs = result.gradients[part], report[part]
            assert own["norm"].pop("head") is theirs["norm"].pop("head") is None
            assert theirs["norm"] == pytest.approx(own["norm"], rel=1e-9)
            assert theirs["cosine"]["square"]["mean"] == pytest.approx(own["cosine"]["square"]["mean"], abs=1e-9)


def test_a_rank_without_a_graph_to_the_parts_keeps_nobody_waiting(seen):
    assert seen[0]["no graph"] == seen[1]["no graph"]
    model = Rows()
    rows = model(inputs(8)[:4])["rows"]
    contrast = (rows @ rows.T).square().sum() / 4
    expected = reported({"contrast": contrast}, {"contrast": 1.0}, model.parts)
    for part in model.parts:
        norm = seen[0]["no graph"][part]["norm"]["contrast"]
        assert norm == pytest.approx(expected[part]["norm"]["contrast"], rel=1e-9)
