"""The Triton kernels in Triton's interpreter, on the CPU, against the plain twins in float64.

Collected by test_interpreter.py in a process with TRITON_INTERPRET=1. Outputs are NaN until written, inputs lie inside
larger buffers of NaN, and sizes leave a remainder in every block.
"""

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from kernels import contrastive_loss, contrastive_triton, multiscale_roi_align, reference, roi_align_project
from kernels import roi_align_triton as roi
from kernels.contrastive_cpu import LossInputs, contrast
from kernels.roi_align import Pooling

SCALES = [0.25, 0.125]
BOXES = [3.0, 4, 50, 60], [-9, 0, 125, 100], [8, 8, 9, 9], [30, 5, 20, 4], [90, 70, 130, 90], [1, 1, 9, torch.inf]
ROIS = torch.tensor([[index % 2, *box] for index, box in enumerate(BOXES)])
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch):
    """Loops to a run-time bound also with triton 3.6 and numpy 2.4, which no longer takes int() of a one-element array.

    Triton 3.9 squeezes the array itself.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that no kernel has written is NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        made = empty(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-(2**31))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(contrastive_triton, "CHUNK_BYTES", 1)  # 16 rows


def inside_nan(tensor):
    """The tensor as a view into a larger buffer of NaN, so that a read past its edge shows."""
    buffer = tensor.new_full([size + 2 for size in tensor.shape], float("nan"))
    view = buffer[tuple(slice(1, size + 1) for size in tensor.shape)]
    return view.copy_(tensor)


def pyramid(dtype, channels=19, last=False):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in ((18, 27), (9, 13))]
    if last:
        return [inside_nan(part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for part in maps]
    return [inside_nan(part) for part in maps]


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    "dtype, last, output_size, sampling_ratio, aligned",
    [
        (torch.float32, False, (7, 7), 2, False),
        (torch.float32, True, (3, 5), 1, True),
        (torch.float32, True, (1, 1), 0, True),
        (torch.float32, False, (2, 3), 0, False),
        (torch.float16, True, (7, 7), 2, False),
        (torch.bfloat16, True, (2, 2), 2, False),
    ],
)
def test_pooling_and_its_gradient(dtype, last, output_size, sampling_ratio, aligned):
    features = [part.requires_grad_() for part in pyramid(dtype, last=last)]
    exact_features = [part.detach().double().requires_grad_() for part in features]
    pooling = dict(scales=SCALES, output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    pooled = multiscale_roi_align(features, ROIS, **pooling, implementation="triton")
    exact = reference.multiscale_roi_align(exact_features, ROIS.double(), **pooling)
    assert error(pooled, exact) <= TOLERANCE[dtype]
    assert (pooled[-1] == 0).all()
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(pooled, features, upstream)
    expected = torch.autograd.grad(exact, exact_features, upstream.double())
    for ours, right in zip(gradients, expected, strict=True):
        assert error(ours, right) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rois", [ROIS, ROIS[:0]])
def test_the_projection_and_its_gradients(rois):
    """Fewer outputs than RoIs: the weight is put into the pooled features' order."""
    features = [part.requires_grad_() for part in pyramid(torch.float32, last=True)]
    weight, bias = torch.randn(5, 19 * 6, requires_grad=True), torch.randn(5, requires_grad=True)
    inputs = [*features, weight, bias]
    results = [
        roi_align_project(features, rois, weight, bias, scales=SCALES, output_size=(2, 3), implementation=name)
        for name in ("triton", "torch")
    ]
    ours, expected = (torch.autograd.grad(result.square().sum(), inputs) for result in results)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_image_shows_as_nan_and_touches_no_gradient():
    features = [part.requires_grad_() for part in pyramid(torch.float32)]
    rois = torch.tensor([[2, 0.0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, 0, 0, 9, 9]])
    pooling = Pooling(SCALES, (2, 2), 2, False)
    pooled = roi.forward([part.detach() for part in features], rois, pooling)
    assert pooled[:2].isnan().all() and pooled[2].isfinite().all()
    shapes = [tuple(part.shape) for part in features]
    gradients = roi.backward(torch.ones_like(pooled[:2]), rois[:2], shapes, pooling)
    assert all((part == 0).all() for part in gradients)


def loss_problem(n, m, k, dim, dtype, ids, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(count):
        return F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(dtype)

    def labels(count):
        return torch.randint(-1, 3, (count,), generator=generator) if ids else None

    target = torch.randperm(m, generator=generator)[:n]
    valid = torch.tensor(k - 7) if ids and k else None
    bank = rows(k) if k else None
    bank_ids = labels(k) if k else None
    return LossInputs(rows(n), rows(m), torch.tensor(20.0), target, bank, valid, labels(n), labels(m), bank_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, m, k, dim, ids", [(17, 20, 90, 40, True), (5, 5, 130, 16, False), (1, 1, 0, 64, False)])
def test_loss_statistics_and_gradients(dtype, n, m, k, dim, ids):
    problem = loss_problem(n, m, k, dim, dtype, ids)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(7))
    rows, gradients = contrastive_triton.contrast(problem, weight)
    exact = problem._replace(query=problem.query.double(), key=problem.key.double())
    right_rows, right_gradients = contrast(exact, weight)
    for ours, right in zip(rows, right_rows, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=1e-5, atol=5e-6)
    for ours, right in zip(gradients, right_gradients, strict=True):
        assert (ours - right).norm() <= TOLERANCE[dtype] * right.norm() + 1e-7


def test_the_gradient_of_a_tiny_loss_survives_half_precision():
    problem = loss_problem(6, 6, 60, 64, torch.float16, False)
    close = F.normalize(problem.query.float() + 0.3 * problem.key.float(), dim=1).half()
    problem = problem._replace(query=close, key=problem.query, logit_scale=torch.tensor(40.0), target=torch.arange(6))
    _, gradients = contrastive_triton.contrast(problem, torch.ones(6))
    rows, right = contrast(problem._replace(query=close.double(), key=problem.key.double()), torch.ones(6))
    assert rows[0].max() < 1e-6
    for ours, exact in zip(gradients, right, strict=True):
        assert (ours - exact).norm() <= 3e-3 * exact.norm()


def test_the_public_loss_takes_the_kernels():
    problem = loss_problem(9, 12, 33, 24, torch.float16, True)
    results = []
    for name in ("triton", "torch"):
        query, key = problem.query.clone().requires_grad_(), problem.key.clone().requires_grad_()
        arguments = problem._asdict() | dict(query=query, key=key)
        loss, stats = contrastive_loss(**arguments, with_stats=True, implementation=name)
        results.append([loss, *torch.autograd.grad(loss, [query, key]), stats.candidates])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-4)
