"""Products of the CPU paths: whichever library computes them, the same product."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import products, roi_align_project
from kernels.products import linear, product, transpose_into, transposed

LARGE = dict(rows=96, inputs=320, outputs=300)  # multiplications: more than products.LARGE
SMALL = dict(rows=3, inputs=5, outputs=4)


def problem(rows, inputs, outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("size", [LARGE, SMALL, dict(rows=0, inputs=5, outputs=4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
def test_linear(size, dtype, onednn, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", products.HAS_ONEDNN and onednn)
    rows, weight, bias = problem(**size, dtype=dtype)
    exact = rows.double() @ weight.double().T
    rounding = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
    for found, expected in ((linear(rows, weight), exact), (linear(rows, weight, bias), exact + bias.double())):
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=16 * rounding)


def test_large_products_go_to_onednn(monkeypatch):
    if not products.HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "ONEDNN", True)
    seen = []
    theirs = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: seen.append(1) or theirs(*given))
    linear(*problem(**SMALL))
    assert not seen
    linear(*problem(**LARGE))
    assert seen
    monkeypatch.setattr(products, "ONEDNN", False)  # as on a processor without AVX-512
    linear(*problem(**LARGE))
    assert len(seen) == 1


def test_without_avx512_onednn_is_left_alone():
    code = "from kernels import products; print(products.ONEDNN)"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | dict(ATEN_CPU_CAPABILITY="avx2")  # what PyTorch then takes the processor for
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("onednn", [True, False])
def test_strides(onednn, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", products.HAS_ONEDNN and onednn)
    rows, weight, _ = problem(**LARGE)
    exact = rows.double() @ weight.double().T
    transposed, sliced = rows.T.contiguous().T, torch.stack([weight, weight], 1)[:, 1]
    for left, right in ((transposed, weight), (rows, sliced), (transposed, sliced)):
        torch.testing.assert_close(linear(left, right).double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(5, 49, 24), (1, 30, 7), (2, 1, 6), (2, 6, 1), (0, 3, 4), (3, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_transposed(shape, dtype):
    count, height, width = shape
    whole = torch.randn(count, height, width + 1).to(dtype)
    layouts = (
        whole[..., 1:],  # strided
        whole[..., 1:].contiguous(),
        whole[..., 1:].transpose(1, 2).contiguous().transpose(1, 2),  # lies transposed already
        whole[:, :1, :1].expand(shape) if height else whole[..., 1:],  # the gradient of a sum
    )
    for matrices in layouts:
        turned = transposed(matrices)
        assert turned.is_contiguous() and turned.dtype == dtype
        assert torch.equal(turned, matrices.transpose(1, 2))


def test_float32_stays_float32_under_autocast():
    rows, weight, bias = problem(**LARGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(rows, weight, bias)
    torch.testing.assert_close(found, linear(rows, weight, bias))
    assert found.dtype == torch.float32


def test_opcheck():
    rows, weight, _ = problem(**SMALL)
    torch.library.opcheck(torch.ops.macl_fgclip.product.default, (rows, weight))


def test_a_second_derivative_of_a_projection_is_refused():
    feature, weight = torch.randn(1, 4, 16, 16, requires_grad=True), torch.randn(3, 4 * 9, requires_grad=True)
    rois = torch.tensor([[0, 4.0, 4.0, 40.0, 50.0]])
    projected = roi_align_project([feature], rois, weight, scales=[1 / 4], output_size=3)
    (first,) = torch.autograd.grad(projected.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="macl_fgclip.product"):
        torch.autograd.grad(first.square().sum(), weight)
    assert product(weight.detach(), weight.detach()).shape == (3, 3)


@pytest.mark.parametrize("shape", [(3, 50), (3, 17), (1, 20), (20, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_transpose_into(shape, threads, monkeypatch):
    """In blocks that do and do not divide the columns, and the columns among the threads."""
    monkeypatch.setattr(products, "COLUMNS", 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    matrix = torch.randn(shape)
    for layout in (matrix, matrix.t().contiguous().t(), torch.stack([matrix, matrix], 2)[..., 1]):
        out = torch.full(shape[::-1], float("nan"), dtype=torch.float64)
        transpose_into(out, layout)
        assert torch.equal(out, matrix.t().double())
