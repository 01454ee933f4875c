"""The detector is held to torchvision's `fasterrcnn_resnet50_fpn`: same weights and image, same proposals,
detections, losses.
"""

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

import macl


@pytest.fixture(scope="module")
def theirs():
    """A torchvision detector with random weights that find something: wide objectness and class logits, small
    offsets.
    """
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91, min_size=96, max_size=160)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if name.endswith("bn3"):
                    module.weight.mul_(0.3)
        model.rpn.head.cls_logits.weight.normal_(0, 0.05, generator=generator)
        model.rpn.head.bbox_pred.weight.normal_(0, 0.02, generator=generator)
        model.roi_heads.box_predictor.cls_score.weight.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs):
    coco = list(macl.weights.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    model = macl.build_detector(
        classes=tuple(coco[1:]), norm="batch", macl_level="none", fusion="visible", min_size=96, max_size=160
    )
    report = macl.load_torchvision_weights(model, theirs.state_dict())
    assert not report.skipped and not report.missing
    return model.eval()


@pytest.fixture
def in_float64(ours, theirs):
    """Both models in float64 for a while: in float32 the rounding of two convolution layouts swaps near-equal
    scores.
    """
    ours.double(), theirs.double()
    yield
    ours.float(), theirs.float()


@pytest.fixture
def image():
    return torch.rand(3, 150, 210, generator=torch.Generator().manual_seed(2))


def targets():
    boxes = torch.tensor([[20.0, 30.0, 90.0, 140.0], [100.0, 10.0, 160.0, 100.0], [5.0, 5.0, 30.0, 40.0]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 18, 44])}]


def test_detections_are_torchvisions(ours, theirs, image):
    with torch.no_grad():
        expected, found = theirs([image])[0], ours(visible=[image])[0]
    assert len(expected["boxes"]) > 5
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-4, rtol=1e-4)


def test_proposals_are_torchvisions(ours, theirs, image, in_float64):
    image = image.double()
    with torch.no_grad():
        batch, _ = theirs.transform([image])
        expected, _ = theirs.rpn(batch, theirs.backbone(batch.tensors))
        (extracted,) = ours.extract({"visible": [image]})
        found, _ = ours.rpn(ours.fusion(extracted.pyramids), extracted.sizes, extracted.batch_size, None)
    assert len(expected[0]) > 100
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("boxes", ["some", "none"])
def test_losses_and_gradients_are_torchvisions(ours, theirs, image, in_float64, boxes):
    image, target = image.double(), targets()
    target[0]["boxes"] = target[0]["boxes"].double()
    if boxes == "none":
        target = [{"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0, dtype=torch.int64)}]
    results = {}
    for name, model, call in [
        ("theirs", theirs, lambda m: m([image], target)),
        ("ours", ours, lambda m: m(visible=[image], targets=target)),
    ]:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        model.zero_grad()
        torch.manual_seed(3)  # both samplers draw the same permutations
        if name == "ours":
            torch.rand(1)  # theirs draws its training size first
        losses = call(model)
        sum(losses.values()).backward()
        results[name] = losses
        model.eval()
    assert results["ours"].keys() == results["theirs"].keys()
    for name, expected in results["theirs"].items():
        torch.testing.assert_close(results["ours"][name], expected, atol=1e-4, rtol=1e-4, check_dtype=False)
    for own, other in [
        (ours.backbone.conv1, theirs.backbone.body.conv1),
        (ours.neck.inner[2], theirs.backbone.fpn.inner_blocks[2][0]),
        (ours.rpn.head.conv, theirs.rpn.head.conv[0][0]),
        (ours.roi_head.fc6, theirs.roi_heads.box_head.fc6),
        (ours.roi_head.bbox_pred, theirs.roi_heads.box_predictor.bbox_pred),
    ]:
        expected = other.weight.grad
        assert (own.weight.grad - expected).norm() <= 1e-3 * expected.norm() + 1e-6


def test_frozen_form_and_older_names_load(theirs):
    """The 295-key form (FrozenBatchNorm, no num_batches_tracked) and the key names of 2019."""
    state = {key: value for key, value in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) == 295 and len(theirs.state_dict()) == 348
    old = {}
    for key, value in state.items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for blocks in ("inner_blocks", "layer_blocks"):
            for level in range(4):
                key = key.replace(f"{blocks}.{level}.0.", f"{blocks}.{level}.")
        old[key] = value
    models = []
    for source in (state, old):
        model = macl.build_detector(norm="frozen_batch", macl_level="none")
        report = macl.load_torchvision_weights(model, source)
        assert not report.skipped and not report.missing
        assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
        models.append(model.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    # The person's row (class 1) is kept for a one-class detector, the background's stays first.
    assert torch.equal(models[0]["roi_head.cls_score.weight"], state["roi_heads.box_predictor.cls_score.weight"][:2])
    assert torch.equal(models[0]["roi_head.bbox_pred.bias"], state["roi_heads.box_predictor.bbox_pred.bias"][:8])
