"""Which block sizes a GPU gets: those of its architecture, by the name that compilers give it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kernels.contrastive_triton import contrast
from kernels.gpu import launch_for, on_its_device
from kernels.roi_align_triton import _maps, _sizes, gather, project, scatter

TABLE = {"default": 0, "sm_90": 1, "gfx942": 2}


@pytest.mark.parametrize(("capability", "launch"), [((9, 0), 1), ((8, 6), 0)])
def test_nvidia(monkeypatch, capability, launch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch_for(TABLE, torch.device("cuda")) == launch


@pytest.mark.parametrize(("name", "launch"), [("gfx942:sramecc+:xnack-", 2), ("gfx90a", 0)])
def test_amd(monkeypatch, name, launch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert launch_for(TABLE, torch.device("cuda")) == launch


def test_the_interpreter_has_the_default():
    assert launch_for(TABLE, torch.device("cpu")) == 0


@pytest.mark.parametrize("wrap", [lambda tensor: tensor, lambda tensor: [tensor]])
def test_a_launch_is_on_the_device_of_its_first_argument(monkeypatch, wrap):
    seen, tensor = [], torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "device_of", lambda of: seen.append(of) or contextlib.nullcontext())
    assert on_its_device(lambda first, other: other)(wrap(tensor), other=3) == 3
    assert seen == [tensor]


@pytest.mark.parametrize("function", [gather, scatter, project, contrast])
def test_every_launching_function_looks_for_its_device(monkeypatch, function):
    class Asked(Exception):
        pass

    def device_of(tensor):
        raise Asked

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with pytest.raises(Asked):
        function([torch.zeros(1)])


def compiled_for(value):
    """What of an argument Triton compiles a kernel for: of a whole number whether it is 1 and a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(map(compiled_for, value))
    return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


def test_images_of_another_size_do_not_compile_again():
    def pyramid(height, width):
        shapes = [(2, 256, height // stride, width // stride) for stride in (4, 8, 16, 32)]
        return [torch.zeros(shape).contiguous(memory_format=torch.channels_last) for shape in shapes]

    one, other = pyramid(128, 160), pyramid(96, 224)
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    assert compiled_for(_maps(one, scales)) == compiled_for(_maps(other, scales))
    assert _sizes([part.shape for part in other]) == ((24, 12, 6, 3), (56, 28, 14, 7))
