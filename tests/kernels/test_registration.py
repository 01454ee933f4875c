"""The operators as torch.library sees them: schemas, fake implementations, autograd, one graph under torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from kernels import contrastive_loss, multiscale_roi_align, products, roi_align_project

SCALES = [0.25, 0.125]
ROIS = torch.tensor([[0, 3.0, 4.0, 50.0, 60.0], [1, -9.0, 0.0, 500.0, 400.0], [0, 8.0, 8.0, 9.0, 9.0]])


def maps(memory_format=torch.contiguous_format, requires_grad=True):
    shapes = [(2, 4, 24, 20), (2, 4, 12, 10)]
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for shape in shapes]
    return [part.requires_grad_(requires_grad) for part in made]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sampling_ratio, output_size", [(2, [3, 2]), (0, [1, 1])])
def test_opcheck_pooling(memory_format, sampling_ratio, output_size):
    operator = torch.ops.macl_fgclip.multiscale_roi_align.default
    arguments = (maps(memory_format), ROIS, SCALES, output_size, sampling_ratio, False, "torch")
    torch.library.opcheck(operator, arguments)


def test_pooling_and_projection_compile_without_a_break():
    weight = torch.randn(5, 4 * 49, requires_grad=True)

    def model(features, rois, weight):
        pooled = multiscale_roi_align(features, rois, scales=SCALES, output_size=7)
        projected = roi_align_project(features, rois, weight, scales=SCALES, output_size=7)
        return pooled.sum() + projected.square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rois in (ROIS, ROIS[:1]):
        features = maps()
        inputs = [*features, weight]
        ours = torch.autograd.grad(compiled(features, rois, weight), inputs)
        expected = torch.autograd.grad(model(features, rois, weight), inputs)
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("onednn", [False, True])
def test_a_linear_layer_is_the_same_by_either_library(onednn, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", onednn)
    generator = torch.Generator().manual_seed(0)
    shapes = (320, 96), (300, 320), (300,)  # more multiplications than products.LARGE; rows transposed in memory
    rows, weight, bias = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    ours = products.linear(rows.T, weight, bias)
    assert ("product" in str(ours.grad_fn.next_functions)) == onednn
    doubles = [part.detach().double().requires_grad_() for part in (rows, weight, bias)]
    exact = F.linear(doubles[0].T, *doubles[1:])
    upstream = torch.tensor(0.3).expand(exact.shape)
    for a, b in zip(
        [ours, *torch.autograd.grad(ours, [rows, weight, bias], upstream)],
        [exact, *torch.autograd.grad(exact, doubles, upstream.double())],
        strict=True,
    ):
        assert (a - b).norm() <= 1e-6 * b.norm()
    torch.library.opcheck(torch.ops.macl_fgclip.product.default, (rows, rows))


def test_only_the_gradients_that_are_asked_for():
    weight = torch.randn(5, 4 * 49, requires_grad=True)
    features = maps(requires_grad=False)
    roi_align_project(features, ROIS, weight, scales=SCALES, output_size=7).sum().backward()
    assert weight.grad is not None and all(feature.grad is None for feature in features)


def test_a_second_derivative_is_refused():
    features = maps()
    pooled = multiscale_roi_align(features, ROIS, scales=SCALES, output_size=7)
    first = torch.autograd.grad(pooled.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(first[0].square().sum(), features)


def loss_arguments(**changes):
    generator = torch.Generator().manual_seed(0)
    query, key, bank = (torch.randn(rows, 8, generator=generator) for rows in (5, 6, 20))
    ids = dict(query_ids=torch.arange(5), key_ids=torch.arange(6), bank_ids=torch.arange(20))
    scale = torch.tensor(3.0, requires_grad=True)
    problem = dict(query=query.requires_grad_(), key=key.requires_grad_(), logit_scale=scale, target=torch.arange(5))
    return problem | dict(bank=bank, bank_valid=torch.tensor(17)) | ids | changes


@pytest.mark.parametrize("reduction, weight", [("mean", torch.ones(5)), ("sum", None), ("none", None)])
def test_opcheck_contrastive(reduction, weight):
    operator = torch.ops.macl_fgclip.contrastive_loss.default
    torch.library.opcheck(operator, (*loss_arguments().values(), weight, reduction, "torch"))
    bare = loss_arguments(bank=None, bank_valid=None, query_ids=None, key_ids=None, bank_ids=None)
    torch.library.opcheck(operator, (*bare.values(), weight, reduction, "torch"))


def test_the_loss_compiles_without_a_break():
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    arguments = loss_arguments()
    inputs = [arguments["query"], arguments["key"], arguments["logit_scale"]]
    for reduction in ("mean", "none"):
        ours, expected = (function(**arguments, reduction=reduction).sum() for function in (compiled, contrastive_loss))
        torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs))
