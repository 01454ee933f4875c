"""Two gloo processes against one: this file starts itself twice, each process writes what it saw, the tests compare."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernels import MemoryBank
from trainkit import checkpoint, distributed
from trainkit.arguments import add_recipe_flags, make_parser
from trainkit.errors import InputError
from trainkit.log import RunLog
from trainkit.run_folder import prepare_run
from trainkit.signals import Signals
from trainkit.step import TrainStep


def linear() -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(3, 4).double()


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def non_finite() -> dict:
    model = DistributedDataParallel(linear())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = inputs(2)
    if not distributed.is_main():
        batch[1, 0] = float("inf")
    step = TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1), weights={"square": 2.0}, device="cpu",
        forward=lambda model, batch: ({"square": model(batch).square().mean()}, {}),
        describe=lambda batch: [f"rank{distributed.rank()}/{i}.png" for i in range(len(batch))],
    )  # fmt: skip
    with pytest.raises(InputError) as raised:
        step([inputs(2), batch])
    unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return {"sentence": str(raised.value), "unchanged": unchanged}


def run_folder(folder: Path) -> dict:
    parser = make_parser("A script.")
    add_recipe_flags(parser, "toy")
    args = parser.parse_args(["--device", "cpu"])
    os.chdir(folder)
    run = prepare_run(args, "toy")
    log = RunLog(run, total_steps=3, tensorboard=False)
    log.train(1, {"epoch": 0, "loss": float(distributed.rank())})
    log.close()
    checkpoint.save(run / "last.pt", {"rank": distributed.rank()})
    distributed.gather_objects(None)  # until it is written
    with pytest.raises(InputError) as raised:
        prepare_run(parser.parse_args(["--output", str(run)]), "toy")
    resume = prepare_run(parser.parse_args(["--device", "cpu", "--resume", "auto"]), "toy")
    return {"run": str(folder / run), "resume": str(folder / resume), "in use": str(raised.value)}


def asked_to_stop() -> list[bool]:
    with Signals() as signals:
        before = signals.stop_requested()
        if not distributed.is_main():
            signal.raise_signal(signal.SIGTERM)
        return [before, signals.stop_requested()]


def ended_between_batches() -> tuple[list, list]:
    """One rank has two batches and the other one."""
    batches, calls = range(2 - distributed.rank()), []
    between = lambda: calls.append(distributed.all_reduce_any(False))  # noqa: E731
    return list(distributed.in_step(batches, len(batches), between)), calls


def buffers() -> dict:
    """What is in the buffers of a model, the ranks having filled them otherwise, before and after a forward in DDP."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), MemoryBank(4, 2)).double()
    wrapped = distributed.parallel(model)
    mean, bank = model[0].running_mean, model[2].buffer
    mean += distributed.rank()
    bank += distributed.rank()
    model.eval()
    model.forward = lambda x: model[1](model[0](x))
    wrapped(inputs(2))
    return {"mean": mean, "bank": bank}


def gathered() -> list[torch.Tensor]:
    r = distributed.rank()
    ids = torch.arange(3 * r, dtype=torch.int64)
    half = torch.full((1 + r, 2), float(r), dtype=torch.bfloat16)
    rows, first = distributed.gather_and_place(half)
    assert torch.equal(rows, distributed.gather(half)) and first == r
    return [distributed.gather(ids), rows, distributed.gather(ids > 0)]


def means() -> list[float]:
    r = distributed.rank()
    x = torch.tensor([1.0, 2.0, 6.0] if r == 0 else [3.0], requires_grad=True)
    total = distributed.global_mean(x.sum(), len(x))
    nothing = distributed.global_mean(x[:0].sum(), 0)
    nothing.backward()
    return [total.item(), nothing.item(), x.grad.abs().max().item()]


def observe(folder: Path) -> dict:
    seen = {"means": means(), "gathered": gathered(), "non-finite": non_finite(), "folder": run_folder(folder)}
    seen |= {"stop": asked_to_stop(), "between": ended_between_batches(), "buffers": buffers()}
    seen["any"] = [distributed.all_reduce_any(distributed.rank() == 1), distributed.all_reduce_any(False)]
    seen["objects"] = [distributed.gather_objects(distributed.rank()), distributed.run_on_main(distributed.rank)]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    seen = observe(Path(sys.argv[1]))
    torch.save(seen, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def seen(tmp_path_factory, two_ranks) -> list[dict]:
    """What both ranks saw."""
    return two_ranks(__file__, tmp_path_factory.mktemp("two-ranks"))


def test_global_mean_counts_terms_and_not_ranks(seen):
    first, second = (rank["means"] for rank in seen)
    assert (first[0] + second[0]) / 2 == pytest.approx(3.0)
    assert first[1:] == second[1:] == [0.0, 0.0]


def test_gather_keeps_dtype_and_rank_order(seen):
    for rank in seen:
        ids, half, positive = rank["gathered"]
        assert ids.dtype == torch.int64 and ids.tolist() == [0, 1, 2]
        assert half.dtype == torch.bfloat16 and half.tolist() == [[0, 0], [1, 1], [1, 1]]
        assert positive.tolist() == [False, True, True]


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(seen):
    for rank in seen:
        sentence = rank["non-finite"]["sentence"]
        assert "square" in sentence and "rank1/0.png, rank1/1.png" in sentence and "rank0" not in sentence
        assert rank["non-finite"]["unchanged"]


def test_ranks_agree_on_the_folder_and_only_the_first_writes(seen):
    first, second = (rank["folder"] for rank in seen)
    assert first == second
    assert first["resume"] == first["run"] and "already holds files" in first["in use"]
    run = Path(first["run"])
    assert len(list(run.parent.iterdir())) == 1
    assert (run / "metrics.jsonl").read_text().count("\n") == 1
    assert checkpoint.load(run / "last.pt") == {"rank": 0}


def test_a_signal_to_one_rank_and_objects_reach_all(seen):
    for rank in seen:
        assert rank["stop"] == [False, True]
        assert rank["any"] == [True, False]
        assert rank["objects"] == [[0, 1], 0]


def test_ranks_pause_equally_often_between_their_batches(seen):
    assert [rank["between"] for rank in seen] == [([0, 1], [False] * 2), ([0], [False] * 2)]


def test_of_all_buffers_only_running_statistics_are_sent_to_the_other_ranks(seen):
    for number, rank in enumerate(seen):
        assert rank["buffers"]["mean"].abs().max() == 0 and rank["buffers"]["bank"].unique().tolist() == [number]
