"""What the paired detector does with two cameras, one camera, no boxes, frozen parts and its own checkpoints."""

import pytest
import torch
from torchvision.models import resnet18, resnet50

import macl
from macl.backbone import MODALITIES, NORMS
from macl.fusion import FUSIONS, Fusion
from trainkit import distributed

DETECTION_LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def detect(model, **images):
    with torch.no_grad():
        return model.eval()(**images)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_reaches_every_trainable_parameter(build, batch, norm):
    model = build(norm=norm)
    losses = model.train()(**batch)
    assert losses.keys() == DETECTION_LOSSES | {"loss_macl"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # MSP starts as the identity: at gate 0 only the gate itself is moved.
        assert (parameter.grad.norm() > 0) != name.startswith("neck.msp.attention"), name


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_frozen_stages_have_no_gradient_and_keep_their_statistics(build, batch, stages):
    model = build(norm="batch", frozen_stages=stages).train().train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    sum(model(**batch).values()).backward()
    frozen = tuple(f"layer{stage}" for stage in range(1, stages + 1)) + (("conv1", "bn1") if stages else ())
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)
    for name, value in model.backbone.state_dict().items():
        if "running_mean" in name:
            assert torch.equal(value, before[name]) == name.startswith(frozen), name
    model.backbone.freeze(0)
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
    assert model.backbone.bn1.training


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", MODALITIES)
def test_one_camera_alone(build, batch, fusion, name):
    model = build(fusion=fusion, score_threshold=0.0)
    if fusion in MODALITIES and fusion != name:
        with pytest.raises(ValueError, match=f"{fusion} images alone"):
            detect(model, **{name: batch[name]})
    else:
        assert len(detect(model, **{name: batch[name]})) == 2


def test_a_masked_modality_leaves_no_trace(monkeypatch):
    torch.manual_seed(0)
    fusion, visible, infrared = Fusion("mean", dropout=(0.3, 0.3)), torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    pyramids, present = {"visible": [visible], "infrared": [infrared]}, torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    monkeypatch.setattr(fusion, "sample_modality_mask", lambda count: present)
    (fused,), (free,) = fusion(pyramids), fusion.eval()(pyramids)
    assert torch.equal(free, (visible + infrared) / 2) and torch.equal(fused[0], free[0])
    assert torch.equal(fused[1], visible[1]) and torch.equal(fused[2], infrared[2])


def test_modality_dropout_masks_one_modality_at_its_rate_and_never_both(build):
    present = build(modality_dropout=(0.3, 0.2)).fusion.sample_modality_mask(20000)
    assert present.any(dim=1).all()
    torch.testing.assert_close(present.float().mean(dim=0), torch.tensor([0.7, 0.8]), atol=0.02, rtol=0)


def test_ignored_boxes_are_neither_positive_nor_negative(build, batch):
    """They leave no positives behind, and fewer negatives than if they were absent."""
    ignored = [t | {"ignore": torch.ones(len(t["boxes"]), dtype=torch.bool)} for t in batch["targets"]]
    absent = [{name: value[:0] for name, value in target.items()} for target in batch["targets"]]
    model = build(rpn_samples=10**6, roi_samples=10**6).train()
    losses, others = (model(**batch | {"targets": targets}) for targets in (ignored, absent))
    assert losses["loss_box_reg"] == 0 and losses["loss_macl"] == 0
    assert all(losses[name] != others[name] for name in ("loss_objectness", "loss_classifier"))


def test_resizing_gives_detections_in_pixels_of_the_given_image(build, batch):
    model = build(min_size=(48, 64), max_size=96, score_threshold=0.0).eval()
    extracted = model.extract({"visible": batch["visible"]})
    assert [group.sizes for group in extracted] == [[(64, 96), (64, 85)]]  # the last of several sizes
    model.train()
    torch.manual_seed(0)
    drawn = [model.extract({"visible": batch["visible"][:1] * 3})[0].sizes for _ in range(9)]
    assert {min(size) for sizes in drawn for size in sizes} == {48, 64}
    assert all(len(set(sizes)) == 1 for sizes in drawn)  # one for the batch
    large = [torch.nn.functional.interpolate(image[None], scale_factor=4)[0] for image in batch["visible"]]
    for output, image in zip(detect(model, visible=large), large, strict=True):
        assert output["boxes"][:, 2].max() > image.shape[-1] * 0.9
        assert output["boxes"].min() >= 0 and output["boxes"][:, 3].max() <= image.shape[-2]


@torch.no_grad()
def test_boxes_are_embedded_where_they_are_in_the_resized_image(build):
    model, plain = (build(min_size=size).eval() for size in (64, None))
    given = {name: [torch.rand(3, 32, 32)] for name in MODALITIES}
    resized = {name: [model.resize(image, 64) for image in images] for name, images in given.items()}
    box = torch.tensor([[4.0, 6.0, 20.0, 30.0]])
    expected = plain.embed(plain.extract(resized), [2 * box])
    torch.testing.assert_close(model.embed(model.extract(given), [box]), expected)


def alone(batch):
    """The images of a batch, each as a batch."""
    return [{name: given[i : i + 1] for name, given in batch.items()} for i in range(len(batch["targets"]))]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("level", ["roi", "crop", "image"])
def test_an_image_is_seen_as_it_is_alone_whatever_the_batch_holds(build, unequal, norm, level):
    model = build(norm=norm, macl_level=level, fpn_levels=5, score_threshold=0.0).double().eval()
    torch.nn.init.constant_(model.neck.msp.gate, 0.7)

    @torch.no_grad()
    def seen(visible, infrared, targets):
        extracted = model.extract({"visible": visible, "infrared": infrared})
        embedded = model.embed(extracted, [target["boxes"] for target in targets])
        return model.detect(extracted), list(zip(*embedded, strict=True))

    each = [seen(**one) for one in alone(unequal)]
    detections, embeddings = seen(**unequal)
    assert min(len(found["boxes"]) for found in detections) > 5
    torch.testing.assert_close(detections, [found for (found,), _ in each], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(embeddings, [pair for _, (pair,) in each], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group", "modality_batch"])
def test_an_image_trains_as_it_does_alone(build, unequal, norm, monkeypatch):
    """Every anchor and RoI is in the losses, whose sums are looked at: none may lie in another image's padding."""
    monkeypatch.setattr(distributed, "global_mean", lambda total, count: torch.stack([total, total * 0 + count]))
    unequal = {name: given[:3] for name, given in unequal.items()}  # statistics of a batch are of one size
    everything = dict(rpn_samples=10**6, roi_samples=10**6, rpn_positive_fraction=1.0, roi_positive_fraction=1.0)
    model = build(norm=norm, macl_level="none", fpn_levels=5, **everything).double().train()
    each = [model(**one) for one in alone(unequal)]
    for name, total in model(**unequal).items():
        torch.testing.assert_close(total, sum(losses[name] for losses in each), rtol=1e-6, atol=1e-6)


def test_synchronised_norms_make_as_many_passes_on_every_process(build, unequal, monkeypatch):
    """Crops are one pass per modality, however many sizes there are."""
    model, forwards, backwards = build(norm="sync_batch", macl_level="crop").double().train(), [], []

    def count(_, inputs, out):
        forwards.append(len(out))
        out.register_hook(lambda gradient: backwards.append(len(gradient)))

    model.backbone.bn1.register_forward_hook(count)
    monkeypatch.setattr(distributed, "gather", lambda own: torch.cat([own, own + 2]))  # elsewhere are two sizes more
    extracted = model.extract({name: unequal[name] for name in MODALITIES})
    sum(group.pyramids["visible"][0].sum() for group in extracted).backward()
    assert forwards == [4, 2, 2, 0, 0] and backwards == forwards[::-1]  # in one order
    model.pooled_features(extracted, [target["boxes"] for target in unequal["targets"]])
    assert forwards[5:] == [4, 4]


def test_pairs_of_different_size_or_form_are_refused(build, batch):
    model = build()
    for images, message in (
        ({"visible": batch["visible"], "infrared": batch["infrared"][:1]}, "differ in number or size"),
        ({"visible": batch["visible"], "infrared": batch["infrared"][::-1]}, "differ in number or size"),
        ({}, "visible= or infrared="),
        ({"visible": [torch.zeros(3, 64, 64, dtype=torch.uint8)]}, "floats in 0..1"),
        ({"visible": [torch.zeros(64, 64)]}, "floats in 0..1"),
    ):
        with pytest.raises(ValueError, match=message):
            detect(model, **images)
    bad = {"boxes": torch.tensor([[5.0, 5, 5, 9]]), "labels": torch.ones(1, dtype=torch.int64)}
    for targets, message in (([bad, bad], "x1 < x2"), ([bad], "one for each image"), (None, "one for each image")):
        with pytest.raises(ValueError, match=message):
            model.train()(**batch | {"targets": targets})


def test_a_checkpoint_rebuilds_the_detector_with_averaged_weights_or_the_raw_ones(build, batch, tmp_path):
    model = build(fusion="mean", modality_dropout=(0.1, 0.2), visible_mean=(0.1, 0.2, 0.3), score_threshold=0.0)
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save({"model_kwargs": model.kwargs, "model": model.state_dict(), "ema": average}, tmp_path / "last.pt")
    raw = macl.load_detector(tmp_path / "last.pt", weights="raw")
    assert raw.kwargs == model.kwargs
    outputs = [detect(detector, visible=batch["visible"]) for detector in (model, raw)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    torch.testing.assert_close(dict(macl.load_detector(tmp_path / "last.pt").state_dict()), average)


DAMAGED = {
    "is not a checkpoint": lambda whole: {"weight": torch.zeros(3)},
    "another version of the detector": lambda whole: whole | {"model_kwargs": {"colour": "red"}},
    "msp: expected a bool, got 1": lambda whole: of_kwargs(whole, msp=1),
    "rpn_pre_nms: 0: expected a whole number": lambda whole: of_kwargs(whole, rpn_pre_nms=["many", 3]),
    "nms_iou: expected a number": lambda whole: of_kwargs(whole, nms_iou=float("nan")),
    "build no detector: fpn_levels is 9": lambda whole: of_kwargs(whole, fpn_levels=9),
    "build no detector": lambda whole: of_kwargs(whole, visible_mean=[0.5, 0.5]),
    "model: .*: expected .* got": lambda whole: of_kwargs(whole, fpn_channels=16),
    "ema: 'backbone.bn1.bias' is missing": lambda whole: whole | {"ema": {}},
    "model: neck.msp.gate holds numbers that are not finite": lambda whole: (
        whole | {"model": whole["model"] | {"neck.msp.gate": torch.tensor(float("nan"))}}
    ),
}


def of_kwargs(whole, **changes):
    return whole | {"model_kwargs": whole["model_kwargs"] | changes}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_checkpoint_is_one_sentence_that_names_it(build, tmp_path, message):
    model = build()
    whole = {"model_kwargs": model.kwargs, "model": dict(model.state_dict()), "ema": None}
    torch.save(DAMAGED[message](whole), tmp_path / "last.pt")
    with pytest.raises(macl.InputError, match=f"last.pt.*{message}"):
        macl.load_detector(tmp_path / "last.pt")


def test_imagenet_weights_fill_the_backbone_and_both_modality_norms(build):
    source = resnet18(weights=None)
    torch.nn.init.uniform_(source.bn1.weight)
    model = build(norm="modality_batch", fpn_levels=4, anchor_sizes=(16, 32, 64, 128))
    report = macl.load_torchvision_weights(model, source.state_dict())
    assert set(report.skipped) == {"fc.weight", "fc.bias"}
    assert all(not name.startswith("backbone") for name in report.missing)
    assert torch.equal(model.backbone.bn1.visible.weight, source.bn1.weight)
    assert torch.equal(model.backbone.bn1.infrared.weight, source.bn1.weight)
    assert "no such part in this detector: fc.weight, fc.bias" in str(report)
    for wrong, message in (
        ({"a.weight": torch.zeros(3)}, "looks like no ResNet and fills 0 of the"),
        (resnet50(weights=None).state_dict(), "looks like resnet50 and fills .* backbone, resnet18"),
        ({"a": 3}, "no state dict"),
    ):
        with pytest.raises(macl.InputError, match=f"the state dict .*{message}"):
            macl.load_torchvision_weights(model, wrong)
