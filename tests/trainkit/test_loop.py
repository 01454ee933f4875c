"""The loop of a run: what is called when, where a resumed run goes on, how Ctrl-C ends it, and kills at every place."""

import argparse
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainkit import checkpoint, distributed
from trainkit.log import RunLog
from trainkit.loop import run_epochs
from trainkit.optimizer import build_optimizer, build_schedule, ema, parameter_groups
from trainkit.sampler import ResumableSampler
from trainkit.state import TrainingState
from trainkit.step import TrainStep


class Run:
    """A run of 3 epochs of 4 batches that notes what it is asked to do."""

    def __init__(self, **flags):
        flags = dict(epochs=3, accumulate=1, max_steps=None, save_every=100, keep_every=0, validate_every=1) | flags
        self.args = argparse.Namespace(output="folder", **flags)
        self.sampler = ResumableSampler(8, 2, seed=0)
        self.stepper = SimpleNamespace(steps=0, validated=-1)
        self.log = SimpleNamespace(say=self.say, close=lambda: None)
        self.events, self.said, self.interrupt_at, self.last_epoch = [], [], None, None

    def say(self, text):
        self.said.append(text)

    def step(self, batches, epoch):
        self.stepper.steps += 1
        self.events.append((epoch, [key for batch in batches for key in batch]))
        if self.stepper.steps == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    def save(self, name):
        self.events.append((name, self.stepper.steps, self.sampler.position))

    def validate(self, epoch, between):
        if self.interrupt_at == f"validation {epoch}":
            os.kill(os.getpid(), signal.SIGTERM)
        between()
        self.events.append(("validation", epoch))

    def begin_epoch(self, epoch):
        return self.last_epoch is None or epoch <= self.last_epoch

    def __call__(self):
        hooks = dict(step=self.step, validate=self.validate, save=self.save, begin_epoch=self.begin_epoch)
        run_epochs(self.args, self.sampler, self.sampler, self.stepper, self.log, **hooks)
        return self

    def steps(self):
        return [event for event in self.events if isinstance(event[0], int)]

    def others(self):
        return [event for event in self.events if not isinstance(event[0], int)]


def test_every_batch_of_every_epoch_comes_once():
    steps = Run()().steps()
    assert [epoch for epoch, _ in steps] == [1] * 4 + [2] * 4 + [3] * 4
    for epoch in range(3):
        keys = [key for number, batch in steps if number == epoch + 1 for key in batch]
        assert sorted(keys) == [(epoch, index) for index in range(8)]


def test_batches_are_accumulated_and_the_rest_of_an_epoch_makes_a_step():
    run = Run(accumulate=3, epochs=2, save_every=1)()
    assert [len(keys) for _, keys in run.steps()] == [6, 2, 6, 2]
    assert run.others()[2:4] == [("last.pt", 1, 3), ("last.pt", 2, 4)]  # all of a step's batches count as done


def test_checkpoints_and_validation_come_when_they_are_due():
    assert Run(save_every=3, keep_every=2, validate_every=2)().others() == [
        ("last.pt", 0, 0), ("validation", 0), ("last.pt", 3, 3),
        ("last.pt", 4, 0),  # an epoch that is over and validated leaves the start of the next
        ("last.pt", 6, 2), ("last.pt", 8, 4), ("validation", 2), ("epoch-2.pt", 8, 0), ("last.pt", 8, 0),
        ("last.pt", 9, 1), ("last.pt", 12, 4), ("validation", 3), ("last.pt", 12, 0),
    ]  # fmt: skip


def test_a_step_is_validated_once_whoever_asks_for_it():
    validations = [event for event in Run(validate_at=[0, 2, 4, 12])().others() if event[0] == "validation"]
    assert validations == [("validation", epoch) for epoch in (0, 1, 1, 2, 3)]


def test_most_steps_end_the_run_with_a_validation():
    run = Run(max_steps=6, keep_every=1)()
    assert run.others()[-3:] == [("last.pt", 6, 2), ("validation", 2), ("last.pt", 6, 2)]
    assert ("epoch-2.pt", 6, 2) not in run.others()  # the epoch is not over
    steps = len(run.steps())
    assert len(run().steps()) == steps and run.others()[-1] == ("last.pt", 6, 2)  # resumed with the same flag


def test_an_epoch_that_may_not_begin_ends_the_run():
    run = Run()
    run.last_epoch = 1
    assert run().others()[-2:] == [("validation", 1), ("last.pt", 4, 0)]
    assert len(run.steps()) == 4


@pytest.mark.parametrize("done", [3, 4, 5])
def test_a_run_goes_on_where_its_checkpoint_stands(done):
    whole, rest = Run()(), Run()
    rest.stepper.steps = done
    # A checkpoint written in the last step of an epoch stands at its end: it has yet to be validated.
    rest.sampler.epoch, rest.sampler.position = (done - 1) // 4, (done - 1) % 4 + 1
    rest()
    assert rest.steps() == whole.steps()[done:]
    assert [event for event in rest.others() if event[0] == "validation"] == [
        ("validation", epoch) for epoch in (1, 2, 3) if epoch > (done - 1) // 4
    ]


@pytest.mark.parametrize(
    ("at", "status", "left"), [(2, 130, ("last.pt", 2, 2)), ("validation 0", 143, ("last.pt", 0, 0)),
                               ("validation 2", 143, ("last.pt", 8, 4))]
)  # fmt: skip
def test_a_signal_finishes_the_step_or_gives_up_the_validation(at, status, left):
    run = Run()
    run.interrupt_at = at
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == status
    assert run.others()[-1] == left
    assert run.said == [f"stopped at step {left[1]}; go on with --resume folder"]


def test_a_rank_whose_launcher_is_gone_stops(monkeypatch):
    run = Run()
    monkeypatch.setattr(distributed, "_launcher", os.getppid())
    run.begin_epoch = lambda epoch: monkeypatch.setattr(os, "getppid", lambda: 1) is None
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 143 and run.others()[-1] == ("last.pt", 1, 1)


class Killed(BaseException):
    pass


class Toy:
    """A run of 2 epochs of 3 steps with everything a script has, that may be killed at any of its `moments`."""

    FLAGS = dict(epochs=2, accumulate=2, max_steps=None, save_every=2, keep_every=2, validate_every=1, validate_at=[2])

    def __init__(self, folder: Path):
        self.folder, self.moments, self.end = folder, 0, None

    def moment(self):
        self.moments += 1
        if self.moments == self.end:
            raise Killed

    def __call__(self, resume: str | None = None):
        args = argparse.Namespace(output=self.folder, **self.FLAGS)
        self.folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        average, sampler = ema(model, 0.9), ResumableSampler(11, 2, seed=0)
        optimizer = build_optimizer("adamw", parameter_groups(model, lr=0.05, weight_decay=0.1))
        stepper = TrainStep(
            model, optimizer, losses_of=lambda keys: {"loss": model(inputs(keys)).square().mean()},
            weights={"loss": 1.0}, describe=list, device="cpu", average=average,
            schedule=build_schedule(optimizer, "cosine", total_steps=6),
        )  # fmt: skip
        state = TrainingState("toy", model, average, optimizer, stepper.schedule, stepper, sampler)
        best = math.inf
        if resume is not None:
            loaded = checkpoint.load(self.folder / resume)
            state.load_state_dict(loaded)
            best = loaded["best"]
        at = stepper.steps if resume else None
        log = RunLog(self.folder, total_steps=6, resume_step=at, validated=stepper.validated, tensorboard=False)

        def save(name):
            self.moment()
            checkpoint.save(self.folder / name, state.state_dict() | {"best": best})
            self.moment()

        def step(batches, epoch):
            result = stepper(batches)
            self.moment()
            log.train(stepper.steps, {"epoch": epoch, "loss": result.total})
            self.moment()

        def validate(epoch, between):
            nonlocal best
            loss = 0.0
            for key in range(2):
                loss += (average.module(inputs([(9, key)])) + torch.rand(1)).square().item()  # draws, as no script does
                between()
                self.moment()
            log.validation(stepper.steps, {"epoch": epoch, "loss": loss})
            self.moment()
            if loss < best:
                best = loss
                return f"best {loss}"

        try:
            run_epochs(args, sampler, sampler, stepper, log, step=step, validate=validate, save=save)
        finally:
            log.close()
        return self

    def left(self):
        files = {path.name: checkpoint.load(path) for path in self.folder.glob("*.pt")}
        return files, [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def inputs(keys) -> torch.Tensor:
    return torch.tensor([[epoch, index, 1.0] for epoch, index in keys])


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_killed_anywhere_and_resumed_leaves_what_an_uninterrupted_one_does(tmp_path):
    """In a step, before, in and after each validation, and around each checkpoint: no line lost, none twice."""
    whole = Toy(tmp_path / "whole")()
    files, lines = whole.left()
    assert files.keys() == {"last.pt", "best.pt", "epoch-2.pt"}
    assert [(line["step"], line["kind"]) for line in lines if line["kind"] == "validation" or line["step"] == 1] == [
        (0, "validation"), (1, "train"), (2, "validation"), (3, "validation"), (6, "validation"),
    ]  # fmt: skip
    assert whole.moments > 40
    for end in range(1, whole.moments + 1):
        run = Toy(tmp_path / f"killed-{end}")
        run.end = end
        with pytest.raises(Killed):
            run()
        run("last.pt" if (run.folder / "last.pt").exists() else None)
        found, again = run.left()
        assert again == lines, end
        for name in files:
            assert equal(found[name], files[name]), (end, name)
    Toy(tmp_path / "whole")("best.pt")  # it knows of its own validation
    assert whole.left()[1] == lines and equal(whole.left()[0], files)
