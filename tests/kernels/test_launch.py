"""Which block sizes and which GPU a kernel gets, and what it is compiled for."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kernels import roi_align_triton
from kernels.gpu import launch_for

TABLE = {"default": 0, "sm_90": 1, "gfx942": 2}


@pytest.mark.parametrize(
    ("hip", "capability", "name", "launch"),
    [
        (None, (9, 0), "", 1),
        (None, (8, 6), "", 0),
        ("6.4", None, "gfx942:sramecc+:xnack-", 2),
        ("6.4", None, "gfx90a", 0),
    ],
)
def test_a_gpu_gets_the_launch_of_its_architecture(monkeypatch, hip, capability, name, launch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert launch_for(TABLE, torch.device("cuda")) == launch
    assert launch_for(TABLE, torch.device("cpu")) == 0  # the interpreter


MAPS, ROWS = [torch.ones(1, 2, 4, 4)], torch.ones(3, 2)
POOLING = [1.0], [1, 1], 2, False
OPERATORS = dict(
    multiscale_roi_align=(MAPS, torch.zeros(3, 5), *POOLING, "torch"),
    multiscale_roi_align_backward=(torch.ones(3, 2, 1, 1), torch.zeros(3, 5), [1, 2, 4, 4], [1.0], 2, False, "torch"),
    contrastive_loss=(ROWS, ROWS, torch.ones(()), torch.arange(3), *[None] * 6, "mean", "torch"),
)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_launches_on_the_device_of_its_arguments(monkeypatch, name):
    def device_of(tensor):
        raise InterruptedError(f"asked for the device of {len(tensor)} rows")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with pytest.raises(InterruptedError, match="3 rows"):
        getattr(torch.ops.macl_fgclip, name)(*OPERATORS[name])


def compiled_for(value):
    """What of an argument Triton compiles a kernel for: of a whole number whether it is 1 and a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(map(compiled_for, value))
    return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


def test_images_of_another_size_do_not_compile_again():
    def maps(height, width):
        shapes = [(2, 256, height // stride, width // stride) for stride in (4, 8, 16, 32)]
        features = [torch.zeros(shape).contiguous(memory_format=torch.channels_last) for shape in shapes]
        return roi_align_triton._maps(features, (1 / 4, 1 / 8, 1 / 16, 1 / 32))

    assert compiled_for(maps(128, 160)) == compiled_for(maps(96, 224))
