"""Batches from loading processes: few descriptors, any structure, a lost process."""

import os
import resource
import signal

import pytest
import torch
from scripts import equal

from trainkit import loader
from trainkit.device import to_device
from trainkit.errors import InputError, one_sentence
from trainkit.loader import make_loader


class Samples(torch.utils.data.Dataset):
    """Samples of ten tensors of several kinds; those of 98 and 99 leave no room, and kill their process."""

    def __getitem__(self, index: int) -> dict:
        if index == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 98:  # no shared memory larger than this, as in a container
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return {"image": torch.full((3, 40, 41 + index % 3), index % 7, dtype=torch.uint8), "name": f"é{index}",
                "many": [torch.arange(index % 5, dtype=torch.float64), (torch.tensor(index), torch.zeros(0, 4))],
                "others": {kind: torch.ones(3, dtype=kind) for kind in (torch.bool, torch.bfloat16)}}  # fmt: skip


def test_a_batch_arrives_as_it_was_packed_and_is_ones_own():
    batches = [[0, 1, 2], [3], [4, 5]]
    here, there = (list(make_loader(Samples(), batches, list, workers=workers)) for workers in (0, 2))
    assert equal(here, there) and there[0][0]["others"][torch.bfloat16].dtype == torch.bfloat16
    there[0][0]["image"].add_(1)
    assert there[0][1]["image"].float().mean() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_does_not_lose_it(monkeypatch, number):
    ignore = loader.ignore_signals
    monkeypatch.setattr(loader, "ignore_signals", lambda worker: os.kill(os.getpid(), number) or ignore(worker))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(list(make_loader(Samples(), [[0], [1]], list, workers=1))) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_large_batches_of_many_workers_pass_through_few_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
    try:
        loader = make_loader(Samples(), [list(range(90))] * 12, list, workers=2)
        kept = list(loader)  # as validation keeps what it found
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(kept) == 12 and len(kept[-1]) == 90


def test_to_device_reaches_nested_tensors():
    moved = to_device({"a": [torch.zeros(2), {"b": torch.ones(1)}], "c": "text"}, "meta")
    assert moved["a"][0].is_meta and moved["a"][1]["b"].is_meta and moved["c"] == "text"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("batches", "sentence"),
    [([[0], [99], [1]], "lost .*fewer --workers"), ([[98] * 150], "no shared memory for a batch of 1 MiB")],
)
def test_a_lost_process_and_full_shared_memory_are_one_sentence(batches, sentence):
    with pytest.raises(InputError, match=sentence):
        list(make_loader(Samples(), batches, list, workers=1))


def test_small_tensors_do_not_keep_their_batch():
    ((sample,),) = make_loader(Samples(), [[1]], list, workers=1)
    assert sample["others"][torch.bool].untyped_storage().nbytes() == 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lost (DataLoader worker (pid 7)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),  # the process itself
        (MemoryError(), "not enough memory: a smaller --batch-size, image or model needs less (MemoryError)"),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_a_lost_process_or_full_memory_during_a_step_is_one_sentence(error, told, capsys):
    """A parent hears of a lost process by a signal, not when it next asks for a batch."""
    with pytest.raises(RuntimeError if told is None else SystemExit), one_sentence():
        raise error
    assert (told or "") in capsys.readouterr().err
