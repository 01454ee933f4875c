"""multiscale_roi_align and roi_align_project against torchvision and the plain twins: values, levels and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align

from kernels import multiscale_roi_align, reference, roi_align_project

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
IMAGE = (96, 128)


def pyramid(batch=2, channels=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(int(IMAGE[0] * scale), int(IMAGE[1] * scale)) for scale in SCALES]
    maps = [torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return [part.to(dtype).requires_grad_() for part in maps]


def random_rois(count, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 140 - 10
    size = torch.exp(torch.rand(count, 2, generator=generator, dtype=torch.float64) * 5.5)
    image = torch.randint(batch, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + size], 1).to(dtype)


def torchvision_multiscale(features, rois, output_size=7, sampling_ratio=2, image=IMAGE):
    names = [str(level) for level in range(len(features))]
    pooler = MultiScaleRoIAlign(names, output_size, sampling_ratio)
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(features[0].shape[0])]
    pooled = pooler(dict(zip(names, features, strict=True)), boxes, [image] * len(boxes))
    order = torch.argsort(rois[:, 0], stable=True)
    return torch.empty_like(pooled).index_copy(0, order, pooled)


def with_gradients(output, inputs):
    """The output, and the gradients of its product with fixed random numbers."""
    upstream = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def assert_as_exact(ours, eager, exact, tolerance):
    """Error against float64 no larger than that of eager PyTorch, but for a rounding of the result."""
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - true).norm() <= (theirs.double() - true).norm() + tolerance * true.norm()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("output_size, sampling_ratio", [(7, 2), ((3, 5), 1), (7, 0), (1, 3), (1, -1)])
def test_a_pyramid_pools_as_torchvision(output_size, sampling_ratio, channels_last):
    features, rois = pyramid(), random_rois(60)
    laid = [part.contiguous(memory_format=torch.channels_last) for part in features] if channels_last else features
    pooled = multiscale_roi_align(laid, rois, scales=SCALES, output_size=output_size, sampling_ratio=sampling_ratio)
    expected = torchvision_multiscale(features, rois, output_size, sampling_ratio)
    ours, right = with_gradients(pooled, [*features, *laid]), with_gradients(expected, features)
    torch.testing.assert_close(ours[:5], right, rtol=1e-10, atol=1e-10)
    assert all(part.stride() == like.stride() for part, like in zip(ours[5:], laid, strict=True))


@pytest.mark.parametrize("side", [111.99999, 112.0, 112.00001, 223.9999, 224.0, 224.0002, 448.0, 447.9998])
def test_levels_switch_where_torchvision_switches(side):
    features = [torch.full((2, 1, 40 >> level, 40 >> level), float(level + 1)) for level in range(4)]
    rois = torch.tensor([[0, 3.0, 5.0, 3.0 + side, 5.0 + side]])
    ours = multiscale_roi_align(features, rois, scales=SCALES, output_size=2)
    torch.testing.assert_close(ours, torchvision_multiscale(features, rois, 2, image=(160, 160)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("output_size, sampling_ratio", [((7, 7), 2), ((1, 1), -1), ((3, 5), 0), ((14, 14), 1)])
@pytest.mark.parametrize("aligned", [False, True])
def test_one_map_pools_as_exactly_as_torchvision(dtype, tolerance, output_size, sampling_ratio, aligned):
    feature, rois = pyramid(dtype=dtype)[0], random_rois(25, dtype=torch.float32)
    pooling = dict(output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    double = feature.detach().double().requires_grad_()
    exact = reference.multiscale_roi_align([double], rois.double(), scales=[0.25], **pooling)
    ours = multiscale_roi_align([feature], rois, scales=[0.25], **pooling)
    eager = roi_align(feature.float(), rois, output_size, 0.25, sampling_ratio, aligned).to(dtype)
    results = with_gradients(ours, feature), with_gradients(eager, feature), with_gradients(exact, double)
    assert_as_exact(*results, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("count", [25, 0])
def test_a_projection_is_the_pooling_and_a_linear_layer(dtype, tolerance, count):
    generator = torch.Generator().manual_seed(4)
    features, rois = pyramid(dtype=dtype), random_rois(count, dtype=torch.float32)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((6, 5 * 9), (6,)))
    inputs, pooling = [*features, weight, bias], dict(scales=SCALES, output_size=(3, 3))
    doubles = [part.detach().double().requires_grad_() for part in inputs]
    ours = roi_align_project(features, rois, weight, bias, **pooling)
    eager = F.linear(reference.multiscale_roi_align(features, rois, **pooling).flatten(1), weight, bias)
    exact = reference.roi_align_project(doubles[:4], rois.double(), *doubles[4:], **pooling)
    results = with_gradients(ours, inputs), with_gradients(eager, inputs), with_gradients(exact, doubles)
    assert_as_exact(*results, tolerance)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, None])
def test_autocast_casts_features_and_weight_and_keeps_box_precision(half, given):
    features, rois = pyramid(dtype=given or half), random_rois(40, dtype=torch.float32)
    weight = torch.randn(6, 5 * 9, requires_grad=True)
    with torch.autocast("cpu", dtype=half):
        pooled = multiscale_roi_align(features, rois, scales=SCALES, output_size=7)
        projected = roi_align_project(features, rois, weight, scales=SCALES, output_size=3)
    assert pooled.dtype == projected.dtype == half
    rounded = [feature.to(half).double() for feature in features]
    exact = multiscale_roi_align(rounded, rois.double(), scales=SCALES, output_size=7)
    assert (pooled.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    (pooled.float().sum() + projected.float().sum()).backward()
    assert all(part.grad.norm() > 0 and part.grad.dtype == part.dtype for part in (*features[:2], weight))


@pytest.mark.parametrize("index", [-1.0, -0.5, 2.0, float("nan")])
def test_an_image_index_out_of_range_is_an_error(index):
    rois = torch.tensor([[1, 0, 0, 10, 10], [index, 0, 0, 10, 10], [0, 0, 0, 10, 10]])
    with pytest.raises(ValueError, match=r"image index.*\[0, 2\)"):
        multiscale_roi_align(pyramid(), rois, scales=SCALES, output_size=7)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rois=torch.zeros(2, 5, requires_grad=True)), "detach"),
        (dict(rois=torch.zeros(2, 4)), "rois must be"),
        (dict(scales=SCALES[:3]), "one scale per level"),
        (dict(scales=(1 / 4, 1 / 8, 1 / 8, 1 / 32)), "halve"),
        (dict(output_size=(0, 3)), "output_size"),
        (dict(features=[*pyramid()[:3], torch.zeros(2, 5, 0, 3, dtype=torch.float64)]), "channels and pixels"),
        (dict(features=[*pyramid()[:3], torch.zeros(2, 4, 3, 3, dtype=torch.float64)]), "every level must be"),
        (dict(weight=torch.zeros(6, 44, dtype=torch.float64)), "weight must be"),
        (dict(bias=torch.zeros(5, dtype=torch.float64)), "bias must be"),
        (dict(implementation="cuda"), "implementation"),
        (dict(implementation="triton"), "float64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(features=pyramid(), rois=torch.zeros(2, 5), weight=torch.zeros(6, 45, dtype=torch.float64))
    arguments |= dict(scales=SCALES, output_size=3)
    with pytest.raises(ValueError, match=message):
        roi_align_project(**(arguments | change))


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
@pytest.mark.parametrize("output_size, sampling_ratio", [((2, 3), 2), ((2, 2), 0), ((1, 1), -1), ((1, 1), 99)])
def test_odd_boxes(aligned, output_size, sampling_ratio):
    feature = pyramid()[0]
    pooling = dict(scales=[0.25], output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    ours = multiscale_roi_align([feature], ODD, **pooling)
    zero = [0, 1, -4, -3, -2, -1]
    assert (ours[zero] == 0).all()
    expected = roi_align(feature, ODD[:6].double(), output_size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(ours[:6], expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(ours[zero].sum(), feature)
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 9), (2, 17, 9, 1)])
def test_maps_of_one_row_or_column(shape):
    feature = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, 0.0, 0, 3, 3], [shape[0] - 1, -1, 2, 7, 5]], dtype=torch.float64)
    ours = multiscale_roi_align([feature], rois, scales=[1.0], output_size=2, sampling_ratio=-1)
    torch.testing.assert_close(ours, roi_align(feature, rois, 2, 1.0, -1))


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
