import pytest
import torch

from trainkit import distributed
from trainkit.errors import InputError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone_every_collective_is_a_no_op():
    assert distributed.start("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_objects(3) == [3]
    assert distributed.all_reduce_any(True) is True and distributed.all_reduce_any(False) is False
    assert distributed.run_on_main(lambda: 4) == 4
    distributed.stop()


def test_alone_gather_passes_the_gradient_and_sum_is_a_copy():
    x = torch.randn(3, 2, requires_grad=True)
    distributed.gather_and_place(x)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    total = distributed.all_reduce_sum(x)
    assert torch.equal(total, x) and not total.requires_grad
    total.zero_()
    assert x.abs().sum() > 0
    assert not distributed.gather(x).requires_grad


@pytest.mark.parametrize("count", [4, torch.tensor(4)])
def test_alone_global_mean_is_the_mean(count):
    x = torch.arange(4.0, requires_grad=True)
    mean = distributed.global_mean(x.sum(), count)
    assert mean.item() == 1.5 and mean.dtype == torch.float32
    mean.backward()
    assert x.grad.tolist() == [0.25] * 4


def test_the_mean_of_nothing_is_a_connected_zero_and_nan_stays_nan():
    x = torch.ones(2, requires_grad=True)
    mean = distributed.global_mean(x[:0].sum(), 0)
    mean.backward()
    assert mean.item() == 0.0 and x.grad.tolist() == [0.0, 0.0]
    assert distributed.global_mean(torch.tensor(float("nan")), 0).isnan()


def test_a_device_that_is_not_there_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: this machine has no"):
        distributed.start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 has no GPU, 2 are visible"):
        distributed.start("cuda")


def test_all_ranks_meet_before_they_leave(monkeypatch):
    """A rank whose DDP still talks to one that is gone aborts, but only now and then."""
    calls = []
    monkeypatch.setattr(distributed, "_together", lambda: True)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(distributed.dist, name, lambda name=name: calls.append(name))
    distributed.stop()
    assert calls == ["barrier", "destroy_process_group"]
