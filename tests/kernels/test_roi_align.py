"""multiscale_roi_align and roi_align_project against torchvision, in values, levels and gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align

from kernels import multiscale_roi_align, roi_align_cpu, roi_align_project

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
IMAGE = (96, 128)


def pyramid(batch=2, channels=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(int(IMAGE[0] * scale), int(IMAGE[1] * scale)) for scale in SCALES]
    return [torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def random_rois(count, batch=2, extent=600.0, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 140 - 10
    size = torch.exp(torch.rand(count, 2, generator=generator, dtype=torch.float64) * 5.5)
    image = torch.randint(batch, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + size.clamp(max=extent)], 1).to(dtype)


def torchvision_multiscale(features, rois, output_size=7, sampling_ratio=2):
    names = [str(level) for level in range(len(features))]
    pooler = MultiScaleRoIAlign(names, output_size, sampling_ratio)
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(features[0].shape[0])]
    pooled = pooler(dict(zip(names, features, strict=True)), boxes, [IMAGE] * len(boxes))
    order = torch.argsort(rois[:, 0], stable=True)
    return torch.empty_like(pooled).index_copy(0, order, pooled)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("output_size, sampling_ratio", [(7, 2), ((3, 5), 1), (7, 0), (1, 3)])
def test_multiscale_equals_torchvision(dtype, tolerance, output_size, sampling_ratio):
    features, rois = pyramid(dtype=dtype), random_rois(60, dtype=dtype)
    ours = multiscale_roi_align(features, rois, scales=SCALES, output_size=output_size, sampling_ratio=sampling_ratio)
    expected = torchvision_multiscale(features, rois, output_size, sampling_ratio)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", [111.99999, 112.0, 112.00001, 223.9999, 224.0, 224.0002, 448.0, 447.9998])
def test_levels_switch_where_torchvision_switches(side):
    features = [torch.full((1, 1, 40 >> level, 40 >> level), float(level + 1)) for level in range(4)]
    rois = torch.tensor([[0, 3.0, 5.0, 3.0 + side, 5.0 + side]])
    ours = multiscale_roi_align(features, rois, scales=SCALES, output_size=2)
    names = [str(level) for level in range(4)]
    pooler = MultiScaleRoIAlign(names, 2, 2)
    expected = pooler(dict(zip(names, features, strict=True)), [rois[:, 1:]], [(160, 160)])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 3])
def test_one_level_equals_roi_align(aligned, sampling_ratio):
    feature, rois = pyramid()[0], random_rois(40)
    ours = multiscale_roi_align(
        [feature], rois, scales=[0.25], output_size=(4, 3), sampling_ratio=sampling_ratio, aligned=aligned
    )
    expected = roi_align(feature, rois, (4, 3), 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_feature_gradients_equal_torchvision():
    features, rois = [feature.requires_grad_() for feature in pyramid()], random_rois(30)
    upstream = torch.randn(30, 5, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(
        (multiscale_roi_align(features, rois, scales=SCALES, output_size=7) * upstream).sum(), features
    )
    expected = torch.autograd.grad((torchvision_multiscale(features, rois) * upstream).sum(), features)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_projection_equals_pool_then_linear_with_all_gradients():
    generator = torch.Generator().manual_seed(4)
    features, rois = [feature.requires_grad_() for feature in pyramid()], random_rois(20)
    weight = torch.randn(6, 5 * 9, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = roi_align_project(features, rois, weight, bias, scales=SCALES, output_size=3)
    expected = F.linear(torchvision_multiscale(features, rois, 3).flatten(1), weight, bias)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    inputs = [*features, weight, bias]
    ours, expected = (torch.autograd.grad(out.square().sum(), inputs) for out in (ours, expected))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)


def test_no_rois_give_empty_output_and_zero_gradients():
    features = [feature.requires_grad_() for feature in pyramid()]
    pooled = multiscale_roi_align(features, torch.zeros(0, 5), scales=SCALES, output_size=7)
    assert pooled.shape == (0, 5, 7, 7)
    gradients = torch.autograd.grad(pooled.sum(), features)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("index", [-1.0, -0.5, 2.0, float("nan")])
def test_an_image_index_out_of_range_is_an_error(index):
    rois = torch.tensor([[1, 0, 0, 10, 10], [index, 0, 0, 10, 10], [0, 0, 0, 10, 10]])
    for levels, size in ((4, 7), (1, 1)):
        with pytest.raises(ValueError, match=r"image index.*\[0, 2\)"):
            multiscale_roi_align(pyramid()[:levels], rois, scales=SCALES[:levels], output_size=size)


def test_boxes_get_no_gradient():
    with pytest.raises(ValueError, match="detach"):
        multiscale_roi_align(pyramid(), random_rois(2).requires_grad_(), scales=SCALES, output_size=7)


def test_autocast_casts_features_and_weight_and_keeps_box_precision():
    features, rois = pyramid(dtype=torch.float32), random_rois(10, dtype=torch.float32)
    weight = torch.randn(6, 5 * 49)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = multiscale_roi_align(features, rois, scales=SCALES, output_size=7)
        projected = roi_align_project(features, rois, weight, scales=SCALES, output_size=7)
    assert pooled.dtype == projected.dtype == torch.bfloat16
    rounded = [feature.bfloat16().double() for feature in features]
    exact = multiscale_roi_align(rounded, rois.double(), scales=SCALES, output_size=7)
    assert (pooled.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("images", [[0, 1, 2, 1, 0, 2, 2], [1] * 200 + [0]])
def test_one_bin_plainly_by_the_operator_and_by_torchvision(images):
    """The batched product, or where images are very uneven the gather, in eager mode and in the operator."""
    feature = pyramid(batch=3)[2].requires_grad_()
    rois = random_rois(len(images), batch=1)
    rois[:, 0] = torch.tensor(images)
    settings = dict(scales=[1 / 16], output_size=1, sampling_ratio=-1, aligned=True)
    plain = multiscale_roi_align([feature], rois, **settings)
    operator = torch.ops.macl_fgclip.multiscale_roi_align
    registered = operator([feature], rois, [1 / 16], [1, 1], -1, True, "torch")
    assert (plain.grad_fn.name() != registered.grad_fn.name()) == (len(images) < 100)
    expected = roi_align(feature, rois, 1, 1 / 16, -1, True)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (right,) = torch.autograd.grad(expected, feature, upstream)
    for pooled in (plain, registered):
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(pooled, feature, upstream)[0], right, rtol=1e-10, atol=1e-10)


def test_one_bin_is_differentiated_twice():
    """In eager mode on the CPU; the registered operator refuses."""
    feature = pyramid()[3].requires_grad_()

    def pool(feature):
        return multiscale_roi_align([feature], random_rois(3), scales=[1 / 32], output_size=1, sampling_ratio=-1)

    assert torch.autograd.gradcheck(pool, feature) and torch.autograd.gradgradcheck(pool, feature)


def pool_and_differentiate(features):
    features = [feature.clone().requires_grad_() for feature in features]
    pooled = multiscale_roi_align(features, random_rois(30, dtype=features[0].dtype), scales=SCALES, output_size=7)
    return pooled.detach(), *torch.autograd.grad(pooled.square().sum(), features)


def test_memory_kept_between_calls_is_part_of_no_result(monkeypatch):
    """In a thread of its own, whose first memory comes from inference mode."""
    problems = [pyramid(seed=0, dtype=torch.float32), pyramid(seed=1), pyramid(seed=2, dtype=torch.float32)]
    monkeypatch.setattr(roi_align_cpu, "KEPT", 0)
    expected = [pool_and_differentiate(features) for features in problems]
    monkeypatch.undo()

    def all_again():
        with torch.inference_mode():
            multiscale_roi_align(problems[0], random_rois(3), scales=SCALES, output_size=7)
        return [pool_and_differentiate(features) for features in problems], roi_align_cpu._kept.memory

    with ThreadPoolExecutor(1) as executor:
        found, kept = executor.submit(all_again).result()
    assert len(kept) >= sum(feature.nbytes for feature in problems[1])
    assert kept is not roi_align_cpu._kept.memory
    for parts, rights in zip(found, expected, strict=True):
        assert all(torch.equal(part, right) for part, right in zip(parts, rights, strict=True))
