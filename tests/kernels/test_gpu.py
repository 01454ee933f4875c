"""What only a GPU can show: the compiled kernels at real sizes, repeats, synchronisation, graphs, huge maps."""

import pytest
import torch
import torch.nn.functional as F

from kernels import MemoryBank, contrastive_loss, multiscale_roi_align, reference, roi_align_project

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def problem(dtype, channels_last=True, rois=512, channels=256):
    generator = torch.Generator().manual_seed(0)
    form = torch.channels_last if channels_last else torch.contiguous_format
    sizes = [(int(512 * scale), int(640 * scale)) for scale in SCALES]
    maps = [torch.randn(2, channels, *size, generator=generator) for size in sizes]
    maps = [part.to("cuda", dtype).contiguous(memory_format=form).requires_grad_() for part in maps]
    corner = torch.rand(rois, 2, generator=generator) * 500
    size = torch.exp(torch.rand(rois, 2, generator=generator) * 3.5 + 2.5)
    boxes = torch.cat([torch.randint(2, (rois, 1), generator=generator), corner, corner + size], 1)
    return maps, boxes.cuda()


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_at_real_size(dtype, channels_last):
    maps, boxes = problem(dtype, channels_last)
    doubles = [part.detach().double().requires_grad_() for part in maps]
    ours = multiscale_roi_align(maps, boxes, scales=SCALES, output_size=7)
    exact = multiscale_roi_align(doubles, boxes.double(), scales=SCALES, output_size=7)
    assert error(ours, exact) <= TOLERANCE[dtype]
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, maps, upstream)
    right = torch.autograd.grad(exact, doubles, upstream.double())
    assert all(error(a, b) <= TOLERANCE[dtype] for a, b in zip(gradients, right, strict=True))


def test_adaptive_grids_of_whole_bins():
    """Bins of whole pixels have as many samples; a division that is off by a bit has one more."""
    maps, _ = problem(torch.float32)
    side = torch.arange(1, 33, device="cuda") * 7.0
    corner = torch.full_like(side, 8)
    boxes = torch.stack([torch.zeros_like(side), corner, corner, corner + side, corner + side], 1)
    pooling = dict(scales=[1.0], output_size=7, sampling_ratio=-1, aligned=True)
    ours = multiscale_roi_align(maps[:1], boxes, **pooling)
    exact = multiscale_roi_align([maps[0].detach().double()], boxes.double(), **pooling)
    for row, right in zip(ours, exact, strict=True):
        assert error(row, right) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("output_size, dim", [(7, 1024), (1, 64)])
def test_projection_and_its_gradients(output_size, dim):
    maps, boxes = problem(torch.bfloat16)
    weight = (torch.randn(dim, 256 * output_size**2, device="cuda") * 0.01).bfloat16().requires_grad_()
    ours = roi_align_project(maps, boxes, weight, scales=SCALES, output_size=output_size)
    doubles = [part.detach().double().requires_grad_() for part in (*maps, weight)]
    pooling = dict(scales=SCALES, output_size=(output_size, output_size))
    exact = reference.roi_align_project(doubles[:-1], boxes.double(), doubles[-1], **pooling)
    assert error(ours, exact) <= 1e-2
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, [*maps, weight], upstream)
    right = torch.autograd.grad(exact, doubles, upstream.double())
    assert all(error(a, b) <= 1.5e-2 for a, b in zip(gradients, right, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries, bank_rows", [(4, 65536), (64, 5000), (700, 5000)])
def test_loss_at_real_size(dtype, queries, bank_rows):
    rows = [F.normalize(torch.randn(n, 512, device="cuda"), dim=1).to(dtype) for n in (queries, queries, bank_rows)]
    inputs = [part.requires_grad_() for part in rows[:2]]
    doubles = [part.detach().double().requires_grad_() for part in rows]
    ours = contrastive_loss(*inputs, 20.0, bank=rows[2].detach())
    exact = contrastive_loss(*doubles[:2], 20.0, bank=doubles[2].detach())
    assert abs(ours.item() - exact.item()) <= 1e-5 * exact.item()
    gradients = torch.autograd.grad(ours, inputs), torch.autograd.grad(exact, doubles[:2])
    assert all(error(a, b) <= TOLERANCE[dtype] for a, b in zip(*gradients, strict=True))


def test_twenty_repeats_are_the_same_bits():
    maps, boxes = problem(torch.bfloat16)
    upstream = torch.randn(len(boxes), 256, 7, 7, device="cuda", dtype=torch.bfloat16)
    query, bank = (torch.randn(rows, 512, device="cuda").half() for rows in (64, 20000))
    query.requires_grad_()

    def once():
        pooled = multiscale_roi_align(maps, boxes, scales=SCALES, output_size=7)
        loss = contrastive_loss(query, query.detach(), 0.05, bank=bank)
        return [*torch.autograd.grad(pooled, maps, upstream), *torch.autograd.grad(loss, query), pooled, loss]

    first = once()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_nothing_waits_for_the_gpu():
    maps, boxes = problem(torch.bfloat16)
    bank = MemoryBank(4096, 128, dtype=torch.float16, device="cuda")
    query = torch.randn(16, 128, device="cuda").half().requires_grad_()

    def step():
        pooled = multiscale_roi_align(maps, boxes, scales=SCALES, output_size=7)
        loss = contrastive_loss(query, query.detach(), 1.0, bank=bank.buffer, bank_valid=bank.valid)
        (pooled.float().sum() + loss).backward()
        bank.enqueue(query.detach())

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pooling_is_captured_in_a_graph():
    maps, boxes = problem(torch.bfloat16)
    maps = [part.detach() for part in maps]
    expected = multiscale_roi_align(maps, boxes, scales=SCALES, output_size=7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiscale_roi_align(maps, boxes, scales=SCALES, output_size=7)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    feature = torch.zeros(9, 256, 1000, 1000, device="cuda", dtype=torch.float16)
    feature = feature.contiguous(memory_format=torch.channels_last)
    feature[8] = 3
    boxes = torch.tensor([[8, 900.0, 900, 990, 990]], device="cuda")
    assert (multiscale_roi_align([feature], boxes, scales=[1.0], output_size=7) == 3).all()


def test_operators_are_registered_right():
    maps, boxes = problem(torch.float16, rois=8, channels=32)
    operator = torch.ops.macl_fgclip.multiscale_roi_align.default
    torch.library.opcheck(operator, (maps, boxes, SCALES, [7, 7], 2, False, "triton"))
