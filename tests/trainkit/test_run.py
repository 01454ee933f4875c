"""A run: what comes when, where a resumed run goes on, how a signal ends it, and kills at every place."""

import argparse
import os
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import equal, metrics
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from trainkit import checkpoint, distributed
from trainkit.errors import InputError
from trainkit.log import RunLog
from trainkit.optimizer import ema, lr_factor
from trainkit.run import Run
from trainkit.sampler import ResumableSampler
from trainkit.step import TrainStep


class Killed(BaseException):
    pass


class Toy:
    """A run of 3 epochs of 4 batches with everything a script has; it may be killed at any of its `moments`."""

    def __init__(self, folder: Path, *, samples: int = 8, amp: str = "none", **flags):
        self.folder, self.samples, self.amp = folder, samples, amp
        flags = dict(epochs=3, accumulate=1, max_steps=None, save_every=100, keep_every=0, validate_every=1) | flags
        self.flags = dict(log_every=100, validate_at=[], output=str(folder), device="cpu", init_from=None) | flags
        self.moments, self.end = 0, None
        self.events, self.steps = [], []  # checkpoints and validations; (epoch, keys) of each step
        self.signal_at = self.stop_before = None

    def moment(self):
        self.moments += 1
        if self.moments == self.end:
            raise Killed

    def save(self, name: str):
        self.events.append((name, self.run.train_step.steps, self.run.sampler.position))
        self.moment()
        Run.save(self.run, name)
        self.moment()

    def validate(self, epoch: int) -> float:
        loss = 0.0
        for key in range(2):  # draws, as no script does
            loss += (self.average.module(inputs([(9, key)])) + torch.rand(1)).square().item()
            if self.signal_at == f"validation {epoch}":
                signal.raise_signal(signal.SIGTERM)
            self.run.leave_if_asked()
            self.moment()
        self.events.append(("validation", epoch))
        return loss

    def __call__(self, resume: str | None = None) -> "Toy":
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.average, sampler = ema(model, 0.9), ResumableSampler(self.samples, 2, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        step = TrainStep(
            model, optimizer, forward=loss_of, weights={"loss": 1.0}, describe=list, device="cpu",
            average=self.average, amp=self.amp, clip_norm=1.0,
            schedule=LambdaLR(optimizer, partial(lr_factor, kind="cosine", total_steps=12)),
        )  # fmt: skip
        args = argparse.Namespace(resume=resume and str(self.folder / resume), **self.flags)
        self.run = run = Run(args, "toy", step, sampler, total_steps=12, constants={}, values={"first": None})
        run.save = self.save
        with run:
            for epoch in run.epochs():
                if epoch == self.stop_before:
                    break
                for batches in run.batches(sampler):
                    self.steps.append((epoch, [key for batch in batches for key in batch]))
                    result = step(batches)
                    self.moment()
                    run.log_step(result, images=2)
                    self.moment()
                    if self.signal_at == step.steps:
                        signal.raise_signal(signal.SIGINT)
                if run.validation_due():
                    loss = self.validate(epoch)
                    if epoch == 0:
                        run.values["first"] = loss
                    run.log_validation({"loss": loss}, "")
                    self.moment()
                    run.keep_best((-loss, 0.0), "loss")
        return self

    def validations(self):
        return [event for event in self.events if event[0] == "validation"]

    def left(self):
        """Checkpoints and log."""
        files = {path.name: checkpoint.load(path) for path in self.folder.glob("*.pt")}
        return files, metrics(self.folder, "train") + metrics(self.folder, "validation")


def inputs(keys) -> torch.Tensor:
    return torch.tensor([[epoch, index, 1.0] for epoch, index in keys])


def loss_of(model: nn.Module, keys) -> tuple[dict, dict]:
    shift = random.random() + np.random.rand()
    return {"loss": (model(inputs(keys)).float() - shift).square().mean()}, {}


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(RunLog, "_open_tensorboard", lambda log: None)


def test_batches_are_accumulated_and_the_rest_of_an_epoch_makes_a_step(tmp_path):
    toy = Toy(tmp_path, accumulate=3, epochs=2, save_every=1)()
    assert [(epoch, len(keys)) for epoch, keys in toy.steps] == [(1, 6), (1, 2), (2, 6), (2, 2)]
    for epoch in range(2):
        keys = [key for number, batch in toy.steps if number == epoch + 1 for key in batch]
        assert sorted(keys) == [(epoch, index) for index in range(8)]  # each comes once
    last = [event for event in toy.events if event[0] == "last.pt"]
    assert last[1:3] == [("last.pt", 1, 3), ("last.pt", 2, 4)]  # all of a step's batches count as done


def test_checkpoints_and_validations_come_when_they_are_due(tmp_path):
    events = Toy(tmp_path, save_every=3, keep_every=2, validate_every=2)().events
    assert [event for event in events if event[0] != "best.pt"] == [
        ("last.pt", 0, 0), ("validation", 0), ("last.pt", 3, 3),
        ("last.pt", 4, 0),  # an epoch that is over and validated leaves the start of the next
        ("last.pt", 6, 2), ("last.pt", 8, 4), ("validation", 2), ("epoch-2.pt", 8, 0), ("last.pt", 8, 0),
        ("last.pt", 9, 1), ("last.pt", 12, 4), ("validation", 3), ("last.pt", 12, 0),
    ]  # fmt: skip


def test_a_step_is_validated_once_whoever_asks_for_it(tmp_path):
    toy = Toy(tmp_path, validate_at=[0, 2, 4, 12])()
    assert toy.validations() == [("validation", epoch) for epoch in (0, 1, 1, 2, 3)]
    assert [keys for _, keys in toy.steps] == [keys for _, keys in Toy(tmp_path / "without")().steps]


def test_most_steps_end_the_run_with_a_validation(tmp_path):
    toy = Toy(tmp_path, max_steps=6, keep_every=1)()
    events = [event for event in toy.events if event[0] != "best.pt"]
    assert events[-3:] == [("last.pt", 6, 2), ("validation", 2), ("last.pt", 6, 2)]
    assert ("epoch-2.pt", 6, 2) not in events  # the epoch is not over
    assert not Toy(tmp_path, max_steps=6)("last.pt").steps


def test_a_loop_that_is_left_ends_the_run(tmp_path):
    toy = Toy(tmp_path)
    toy.stop_before = 2
    assert [event for event in toy().events if event[0] != "best.pt"][-2:] == [("validation", 1), ("last.pt", 4, 0)]
    assert len(toy.steps) == 4


@pytest.mark.parametrize(
    ("at", "status", "left"), [(2, 130, ("last.pt", 2, 2)), ("validation 0", 143, ("last.pt", 0, 0)),
                               ("validation 2", 143, ("last.pt", 8, 4))]
)  # fmt: skip
def test_a_signal_finishes_the_step_or_gives_up_the_validation(tmp_path, capsys, at, status, left):
    toy, before = Toy(tmp_path), signal.getsignal(signal.SIGINT)  # ignored where a shell starts the tests with &
    toy.signal_at = at
    with pytest.raises(SystemExit) as stopped:
        toy()
    assert stopped.value.code == status and toy.events[-1] == left
    assert capsys.readouterr().out.endswith(f"stopped at step {left[1]}; go on with --resume {tmp_path}\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rank_whose_launcher_is_gone_stops(tmp_path, monkeypatch):
    toy = Toy(tmp_path)
    monkeypatch.setattr(distributed, "_launcher", os.getppid())
    moment = toy.moment
    toy.moment = lambda: (monkeypatch.setattr(os, "getppid", lambda: 1) if toy.steps else None, moment())
    with pytest.raises(SystemExit) as stopped:
        toy()
    assert stopped.value.code == 143 and toy.events[-1] == ("last.pt", 1, 1)


def test_the_best_is_kept_and_validations_without_one_are_counted(tmp_path):
    run = Toy(tmp_path, max_steps=1)().run
    saved, run.save = [], lambda name: saved.append(name)
    run.best = (-float("inf"), 0.0)
    for value, kept, stale in [(-float("inf"), 1, 0), (0.5, 2, 0), (0.5, 2, 1), (0.4, 2, 2), (0.6, 3, 0)]:
        run.keep_best((value, 0.0), "ap")
        assert (len(saved), run.stale) == (kept, stale), value
    run.keep_best((0.6, 0.1), "ap")  # the second number breaks ties
    assert run.best == (0.6, 0.1) and set(saved) == {"best.pt"}


def test_a_run_killed_anywhere_and_resumed_leaves_what_an_uninterrupted_one_does(tmp_path):
    """In a step, before, in and after each validation, and around each checkpoint: no line lost, none twice."""
    flags = dict(samples=11, epochs=2, accumulate=2, save_every=2, keep_every=2, validate_at=[2])
    whole = Toy(tmp_path / "whole", **flags)()
    files, lines = whole.left()
    assert files.keys() == {"last.pt", "best.pt", "epoch-2.pt"} and files["last.pt"]["first"] > 0
    assert [line["step"] for line in lines] == [*range(1, 7), 0, 2, 3, 6]  # steps, then validations
    assert whole.moments > 40
    for end in range(1, whole.moments + 1):
        toy = Toy(tmp_path / f"killed-{end}", **flags)
        toy.end = end
        with pytest.raises(Killed):
            toy()
        toy.flags["output"] = None if (toy.folder / "last.pt").exists() else str(toy.folder)
        if toy.flags["output"]:
            for path in toy.folder.iterdir():
                path.unlink()
        toy("last.pt" if (toy.folder / "last.pt").exists() else None)
        others, again = toy.left()
        assert again == lines, end
        for name in files:
            assert equal(others[name], files[name]), (end, name)
    whole("best.pt")  # it knows of its own validation
    assert whole.left()[1] == lines and equal(whole.left()[0], files)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda state: state.pop("ema"), "cannot be resumed: KeyError: 'ema'"),
        (lambda state: state.update(ema=None), "--ema-decay: the checkpoint was trained otherwise"),
        (lambda state: state.update(script="other"), "written by 'other', not by toy"),
        (lambda state: state["stepper"].update(steps=3), "its parts are at different steps"),
        (lambda state: state.update(best=[1.0]), "best: expected 2 numbers"),
        (lambda state: state["model"].pop("0.bias"), "'0.bias' is missing"),
        (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "'exp_avg' is missing"),
        (lambda state: state["sampler"].update(seed=1), "its seed was 1, now it is 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_in_one_sentence(tmp_path, damage, sentence):
    Toy(tmp_path, max_steps=2)()
    state = checkpoint.load(tmp_path / "last.pt")
    damage(state)
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(InputError, match="last.pt") as refused:
        Toy(tmp_path)("last.pt")
    assert sentence in str(refused.value)
