"""The loop of a run: what is called when, where a resumed run goes on, and how Ctrl-C ends it."""

import argparse
import os
import signal
from types import SimpleNamespace

import pytest

from training.loop import run_epochs
from training.sampler import ResumableSampler


class Run:
    """A run of 3 epochs of 4 batches that notes what it is asked to do."""

    def __init__(self, **flags):
        flags = dict(epochs=3, accumulate=1, max_steps=None, save_every=100, keep_every=0, validate_every=1) | flags
        self.args = argparse.Namespace(output="folder", **flags)
        self.sampler = ResumableSampler(8, 2, seed=0)
        self.stepper, self.log = SimpleNamespace(steps=0), SimpleNamespace(say=self.say, close=lambda: None)
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

    def validate(self, epoch):
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
    assert run.others()[:2] == [("last.pt", 1, 3), ("last.pt", 2, 4)]  # all of a step's batches count as done


def test_checkpoints_and_validation_come_when_they_are_due():
    assert Run(save_every=3, keep_every=2, validate_every=2)().others() == [
        ("last.pt", 3, 3), ("last.pt", 4, 0),  # an epoch that is over and validated leaves the start of the next
        ("last.pt", 6, 2), ("validation", 2), ("last.pt", 8, 0), ("epoch-2.pt", 8, 0),
        ("last.pt", 9, 1), ("last.pt", 12, 4), ("validation", 3), ("last.pt", 12, 0),
    ]  # fmt: skip


def test_most_steps_end_the_run_with_a_validation():
    assert Run(max_steps=6)().others()[-2:] == [("validation", 2), ("last.pt", 6, 2)]


def test_an_epoch_that_may_not_begin_ends_the_run():
    run = Run()
    run.last_epoch = 1
    assert run().others() == [("validation", 1), ("last.pt", 4, 0)]
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


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint():
    run = Run()
    run.interrupt_at = 2
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 130
    assert run.others() == [("last.pt", 2, 2)]
    assert run.said == ["stopped at step 2; go on with --resume folder"]
