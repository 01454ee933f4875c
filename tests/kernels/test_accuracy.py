"""Errors against float64 are no larger than those of eager PyTorch in the same dtype; properties of any input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from kernels import contrastive_loss, multiscale_roi_align, reference, roi_align_project

SCALES = [0.25, 0.125]


def maps(dtype=torch.float32, batch=2, channels=6):
    generator = torch.Generator().manual_seed(0)
    sizes = ((30, 41), (15, 20))
    return [torch.randn(batch, channels, *size, generator=generator).to(dtype) for size in sizes]


def boxes(count, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 160 - 10
    size = torch.exp(torch.rand(count, 2, generator=generator) * 5)
    image = torch.randint(batch, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + size], 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("output_size, sampling_ratio", [((7, 7), 2), ((1, 1), -1), ((3, 5), 0), ((14, 14), 1)])
def test_pooling_is_as_exact_as_torchvision(dtype, tolerance, output_size, sampling_ratio):
    feature, rois = maps(dtype)[0].requires_grad_(), boxes(25)
    pooling = dict(output_size=output_size, sampling_ratio=sampling_ratio, aligned=True)
    exact_feature = feature.detach().double().requires_grad_()
    exact = reference.multiscale_roi_align([exact_feature], rois.double(), scales=[0.25], **pooling)
    ours = multiscale_roi_align([feature], rois, scales=[0.25], **pooling)
    eager = roi_align(feature.float(), rois, output_size, 0.25, sampling_ratio, True).to(dtype)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = [(out, *torch.autograd.grad(out, feature, upstream)) for out in (ours, eager)]
    right = (exact, *torch.autograd.grad(exact, exact_feature, upstream.double()))
    for mine, theirs, true in zip(*results, right, strict=True):
        limit = (theirs.double() - true).norm() + tolerance * true.norm()
        assert (mine.double() - true).norm() <= limit


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_projection_is_as_exact_as_eager(dtype, tolerance):
    features, rois = [part.requires_grad_() for part in maps(dtype)], boxes(25)
    weight = torch.randn(8, 6 * 49, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    doubles = [part.detach().double().requires_grad_() for part in (*features, weight)]
    pooling = dict(scales=SCALES, output_size=(7, 7))
    ours = roi_align_project(features, rois, weight, **pooling)
    exact = reference.roi_align_project(doubles[:2], rois.double(), doubles[2], **pooling)
    eager = F.linear(reference.multiscale_roi_align(features, rois, **pooling).flatten(1), weight)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = [(out, *torch.autograd.grad(out, [*features, weight], upstream)) for out in (ours, eager)]
    right = (exact, *torch.autograd.grad(exact, doubles, upstream.double()))
    for mine, theirs, true in zip(*results, right, strict=True):
        assert (mine.double() - true).norm() <= (theirs.double() - true).norm() + tolerance * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries, bank_rows", [(8, 50), (40, 3000)])
def test_loss_is_as_exact_as_eager(dtype, queries, bank_rows):
    generator = torch.Generator().manual_seed(0)
    query, key, bank = (
        F.normalize(torch.randn(count, 32, generator=generator), dim=1).to(dtype)
        for count in (queries, queries, bank_rows)
    )
    query, key = query.requires_grad_(), key.requires_grad_()

    def naive(query, key, bank):
        return F.cross_entropy(100 * query @ torch.cat([key, bank]).T, torch.arange(queries))

    doubles = [part.detach().double().requires_grad_() for part in (query, key)]
    right = torch.autograd.grad(naive(*doubles, bank.double()), doubles)
    ours = torch.autograd.grad(contrastive_loss(query, key, 100.0, bank=bank), [query, key])
    eager = torch.autograd.grad(naive(query, key, bank), [query, key])
    for mine, theirs, true in zip(ours, eager, right, strict=True):
        assert (mine.double() - true).norm() <= (theirs.double() - true).norm() + 1e-5 * true.norm()


ODD = torch.tensor(
    [
        [0, -50.0, -50, -20, -20],  # outside
        [0, 400, 400, 500, 500],
        [1, 10, 10, 10, 10],  # no area
        [1, 40, 30, 20, 10],  # corners swapped
        [0, -5, -5, 30, 30],  # across an edge
        [1, -300, -200, 2000, 1000],  # most of its samples beside the map
        [0, 0, 0, 1e6, 1e6],  # far larger than the map
        [0, torch.nan, 0, 9, 9],
        [1, 0, -torch.inf, 9, 9],
        [1, 0, 0, 9, -torch.inf],
        [0, 0, 0, torch.inf, 9],
    ]
)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "output_size, sampling_ratio", [((2, 3), 2), ((2, 2), 0), ((1, 1), -1), ((1, 1), 2), ((1, 1), 99)]
)
def test_odd_boxes(aligned, output_size, sampling_ratio):
    feature = maps(torch.float64)[0].requires_grad_()
    pooling = dict(scales=[0.25], output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    ours = multiscale_roi_align([feature], ODD, **pooling)
    zero = [0, 1, -4, -3, -2, -1]
    assert (ours[zero] == 0).all()
    regular = ODD[:6].double()
    expected = roi_align(feature, regular, output_size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(ours[:6], expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(ours[zero].sum(), feature)
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 9), (2, 17, 9, 1)])
@pytest.mark.parametrize("output_size", [(1, 1), (2, 2)])
def test_maps_of_one_row_or_column(shape, output_size):
    feature = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, 0.0, 0, 3, 3], [shape[0] - 1, -1, 2, 7, 5]], dtype=torch.float64)
    ours = multiscale_roi_align([feature], rois, scales=[1.0], output_size=output_size, sampling_ratio=-1)
    torch.testing.assert_close(ours, roi_align(feature, rois, output_size, 1.0, -1))


@pytest.mark.parametrize("output_size", [1, 3])
def test_a_view_of_tokens_pools_like_a_copy_and_outputs_do_not_alias(output_size):
    tokens = torch.randn(2, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view = tokens[:, 1:].transpose(1, 2).unflatten(2, (7, 7))
    rois = torch.tensor([[0, 0.0, 0, 5, 6], [1, 1, 2, 3, 3]], dtype=torch.float64)
    arguments = dict(scales=[1.0], output_size=output_size, sampling_ratio=-1, aligned=True)
    pooled = multiscale_roi_align([view], rois, **arguments)
    torch.testing.assert_close(pooled, multiscale_roi_align([view.contiguous()], rois, **arguments))
    before = tokens.clone()
    pooled.fill_(0)
    assert torch.equal(tokens, before)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from([((2, 2), 2), ((3, 1), 0), ((1, 1), -1)]))
def test_pooling_is_linear_and_follows_the_order_of_the_boxes(seed, factor, case):
    rois = boxes(6, seed=seed)
    pooling = dict(scales=SCALES, output_size=case[0], sampling_ratio=case[1])
    a, b = maps(torch.float64), [part.flip(1) for part in maps(torch.float64)]
    mixed = multiscale_roi_align([x + factor * y for x, y in zip(a, b, strict=True)], rois, **pooling)
    apart = multiscale_roi_align(a, rois, **pooling) + factor * multiscale_roi_align(b, rois, **pooling)
    torch.testing.assert_close(mixed, apart, rtol=1e-9, atol=1e-9)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = multiscale_roi_align(a, rois[order], **pooling)
    torch.testing.assert_close(moved, multiscale_roi_align(a, rois, **pooling)[order])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 40), st.integers(0, 10**6))
def test_the_loss_forgets_the_order_of_the_bank_and_masked_columns(n, extra, k, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, bank = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (n, n + extra, k))
    loss = contrastive_loss(query, key, 3.0, bank=bank)
    shuffled = bank[torch.randperm(k, generator=generator)]
    torch.testing.assert_close(loss, contrastive_loss(query, key, 3.0, bank=shuffled))
    longer = torch.cat([bank, torch.randn(3, 8, generator=generator, dtype=torch.float64)])
    torch.testing.assert_close(loss, contrastive_loss(query, key, 3.0, bank=longer, bank_valid=torch.tensor(k)))
    ids = torch.cat([torch.full((k,), -1), torch.full((3,), 5)])
    masked = dict(query_ids=torch.full((n,), 5), bank_ids=ids)
    torch.testing.assert_close(loss, contrastive_loss(query, key, 3.0, bank=longer, **masked))
