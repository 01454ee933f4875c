"""The detector is held to torchvision's `fasterrcnn_resnet50_fpn`: same weights and image, same proposals, detections
and losses. In float64: in float32 the rounding of two convolution layouts swaps near-equal scores.
"""

import re

import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

import macl


@pytest.fixture(scope="module")
def theirs():
    """A torchvision detector whose random weights find something: wide logits, small offsets."""
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
    return model.double().eval()


@pytest.fixture(scope="module")
def ours(theirs):
    classes = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])
    sizes = dict(min_size=96, max_size=160)
    model = macl.build_detector(classes=classes, norm="batch", macl_level="none", fusion="visible", **sizes).double()
    report = macl.load_torchvision_weights(model, theirs.state_dict())
    assert not report.skipped and not report.missing
    return model.eval()


@pytest.fixture
def image():
    return torch.rand(3, 150, 210, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, check_dtype=False)


def test_proposals_and_detections_are_torchvisions(ours, theirs, image):
    with torch.no_grad():
        batch, _ = theirs.transform([image])
        (expected,), _ = theirs.rpn(batch, theirs.backbone(batch.tensors))
        (features,) = ours.extract({"visible": [image]})
        (found,), _ = ours.rpn(ours.fusion(features.pyramids), features.sizes, features.batch_size, None)
        assert len(expected) > 100
        close(found, expected)
        expected, found = theirs([image])[0], ours(visible=[image])[0]
    assert len(expected["boxes"]) > 5 and torch.equal(found["labels"], expected["labels"])
    close(found, expected)


BOXES = torch.tensor([[20.0, 30, 90, 140], [100, 10, 160, 100], [5, 5, 30, 40]], dtype=torch.float64)


@pytest.mark.parametrize("count", [3, 0])
def test_losses_and_gradients_are_torchvisions(ours, theirs, image, count):
    targets = [{"boxes": BOXES[:count], "labels": torch.tensor([1, 18, 44])[:count]}]
    results = []
    for model, inputs in ((theirs, {"images": [image]}), (ours, {"visible": [image]})):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        model.zero_grad()
        torch.manual_seed(3)  # both samplers draw the same permutations
        if model is ours:
            torch.rand(1)  # theirs draws its training size first
        losses = model(**inputs, targets=targets)
        sum(losses.values()).backward()
        results.append(dict(losses))
        model.eval()
    expected, found = results
    close(found, expected)
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
    whole = {key: value.float() for key, value in theirs.state_dict().items()}
    state = {key: value for key, value in whole.items() if not key.endswith("num_batches_tracked")}
    assert len(state) == 295 and len(whole) == 348
    old = {
        re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key.replace("head.conv.0.0.", "head.conv.")): value
        for key, value in state.items()
    }
    models = []
    for source, notes in ((state, 0), (old, 1)):
        model = macl.build_detector(norm="frozen_batch", macl_level="none")
        report = macl.load_torchvision_weights(model, source)
        assert not report.skipped and not report.missing and len(report.notes) == notes  # of the missing eps
        assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
        models.append(dict(model.state_dict()))
    torch.testing.assert_close(*models, rtol=0, atol=0)
    # The person's row (class 1) is kept for a one-class detector, the background's stays first.
    assert torch.equal(models[0]["roi_head.cls_score.weight"], state["roi_heads.box_predictor.cls_score.weight"][:2])
    assert torch.equal(models[0]["roi_head.bbox_pred.bias"], state["roi_heads.box_predictor.bbox_pred.bias"][:8])
    # A name that is not COCO's keeps its own rows; capitals are no hindrance.
    model = macl.build_detector(classes=("lamp", "Person"), macl_level="none")
    model.roi_head.cls_score.bias.data.fill_(7)
    report = macl.load_torchvision_weights(model, state)
    bias = state["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(model.roi_head.cls_score.bias, torch.stack([bias[0], torch.tensor(7.0), bias[1]]))
    assert not report.skipped and "but for lamp" in str(report)
