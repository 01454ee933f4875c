"""Contrast in the detector: whose keys and scenes go with which box, crops of boxes, and what the loss trains."""

import pytest
import torch

from macl import detector as module
from macl.backbone import MODALITIES
from macl.data import SyntheticPairs, collate
from macl.teacher import KeyEncoder, Labeller

DHN = dict(dhn_size=32, dhn_k=8)


def keyed(batch, first=0):
    """The batch with a scene per image and a key per box."""
    generator, targets = torch.Generator().manual_seed(first), []
    for i, target in enumerate(batch["targets"]):
        keys = torch.randn(len(target["boxes"]), 2, 16, generator=generator).to(target["boxes"])
        targets.append(target | {"scene": torch.tensor(first + i), "keys": torch.nn.functional.normalize(keys, dim=2)})
    return batch | {"targets": targets}


@pytest.mark.parametrize("level", ["roi", "crop"])
def test_the_loss_has_a_gradient_at_the_backbone_and_the_keys_have_none(build, batch, level):
    model = build(macl_level=level, **DHN).train()
    model(**keyed(batch))
    later = keyed(batch, first=10)
    losses, metrics = model(**later, with_metrics=True)  # the bank now holds something
    plain = build(macl_level=level).train()(**batch)["loss_macl"]
    assert losses["loss_macl"] > plain > 0 and metrics["dhn_fill"] > 0
    weights = [model.backbone.conv1.weight, model.neck.inner[1].weight]
    assert all(part.norm() > 0 for part in torch.autograd.grad(losses["loss_macl"], weights))
    assert all(value.isfinite() and value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("level", ["roi", "crop"])
def test_keys_follow_their_boxes_whatever_is_left_out_or_of_another_size(build, unequal, level, monkeypatch):
    """Keys that are the embeddings themselves, so that a row out of order would be no positive."""
    model, plain = (build(macl_level=level, **kwargs).double().train() for kwargs in (DHN, {}))
    for i, target in enumerate(unequal["targets"]):
        boxes = torch.cat([target["boxes"], target["boxes"] + 3, target["boxes"] * 0.5])
        seen = torch.ones(3, 2, dtype=torch.bool)
        seen[i % 3, 1], ignore = False, torch.arange(3) == (i + 1) % 3
        target |= dict(boxes=boxes, labels=torch.ones(3).long(), visible_in=seen, ignore=ignore, scene=torch.tensor(i))
    monkeypatch.setattr(module, "jittered", lambda boxes: boxes)
    expected = plain(**unequal)["loss_macl"]
    with torch.no_grad():
        extracted = model.extract({name: unequal[name] for name in MODALITIES})
        rows = model.embed(extracted, [target["boxes"] for target in unequal["targets"]])
    for target, keys in zip(unequal["targets"], torch.stack(rows, 1).split(3), strict=True):
        target["keys"] = keys
    torch.testing.assert_close(model(**unequal)["loss_macl"], expected)
    kept = [(i + 2) % 3 for i in range(4)]
    for m, name in enumerate(MODALITIES):
        bank, order = model.macl.hard.banks[name], [0, 3, 1, 2]  # the last is of the size of the first
        expected = torch.stack([unequal["targets"][i]["keys"][kept[i], m] for i in order])
        torch.testing.assert_close(bank.features, expected.to(bank.features), rtol=0, atol=0)
        assert bank.ids.tolist() == order


def test_what_contrast_needs_is_asked_for(build, batch):
    without = {}
    for key in ("scene", "keys"):
        without[key] = [{k: v for k, v in target.items() if k != key} for target in keyed(batch)["targets"]]
    for changes, said in (
        ({"targets": without["scene"]}, "hard negatives need the scene of every row"),
        ({"targets": without["keys"]}, "keys of an averaged detector"),
        ({"infrared": None}, "both modalities in training"),
    ):
        with pytest.raises(ValueError, match=said):
            build(**DHN).train()(**keyed(batch) | changes)


def test_scenes_come_from_the_loader():
    samples = [SyntheticPairs(4, seed=1)[index] for index in (1, 3)]
    targets = collate([samples[0], samples[1] | {"domain": 1}])["targets"]
    assert [target["scene"].item() for target in targets] == [1, 3]
    assert "domain" not in targets[0] and targets[1]["domain"] == 1


@torch.no_grad()
def test_a_crop_shows_nothing_of_its_surroundings(build, batch):
    boxes, images = [target["boxes"] for target in batch["targets"]], {name: batch[name] for name in MODALITIES}
    beyond = {name: [1 - image for image in given] for name, given in images.items()}
    for name, given in images.items():
        for image, one, box in zip(given, beyond[name], boxes, strict=True):
            for x1, y1, x2, y2 in box.int().tolist():
                inside = slice(None), slice(y1 - 1, y2 + 1), slice(x1 - 1, x2 + 1)  # a pixel more, to interpolate
                one[inside] = image[inside]
    for level in ("crop", "roi"):
        model = build(macl_level=level).eval()
        embedded, other, again = (
            torch.cat(model.embed(model.extract(given), boxes)) for given in (images, beyond, images)
        )
        assert torch.equal(embedded, again) and torch.allclose(embedded, other, atol=1e-6) == (level == "crop")


@torch.no_grad()
def test_infrared_crops_move_in_training_only(build, batch):
    model, boxes = build(macl_level="crop"), [target["boxes"] for target in batch["targets"]]
    still = model.pooled_features(model.extract({name: batch[name] for name in MODALITIES}), boxes)
    seen = []
    model.macl.register_forward_pre_hook(lambda _, inputs: seen.append(list(map(torch.equal, inputs[:2], still))))
    for training in (True, False):
        extracted = model.train(training).extract({name: batch[name] for name in MODALITIES})
        model.contrast(extracted, batch["targets"])
    assert seen == [[True, False], [True, True]]


def test_crops_move_and_grow_by_a_tenth_of_the_box():
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 10, 30, 60]]).expand(4000, 4)
    moved = module.jittered(boxes)
    centres, sides = (moved[:, :2] + moved[:, 2:]) / 2 - torch.tensor([20, 35]), moved[:, 2:] - moved[:, :2]
    torch.testing.assert_close(centres.std(0), torch.tensor([2.0, 5.0]), rtol=0.05, atol=0)
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.full((4000,), 2.5))
    assert (sides[:, 0] / 20).log().std().item() == pytest.approx(0.1, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("level", ["roi", "crop"])
def test_each_modality_is_pooled_at_its_own_box(build, batch, level, monkeypatch):
    monkeypatch.setattr(module, "jittered", lambda boxes: boxes)
    model, seen = build(macl_level=level).train(), []
    model.macl.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    moved = [target["boxes"] + torch.tensor([3.0, 0, 3, 0]) for target in batch["targets"]]
    for target, boxes in zip(batch["targets"], moved, strict=True):
        target["own_boxes"] = torch.stack([target["boxes"], boxes], dim=1)
    features = model.extract({name: batch[name] for name in MODALITIES})
    model.losses(features, batch["targets"])
    here, there = (model.pooled_features(features, boxes) for boxes in ([t["boxes"] for t in batch["targets"]], moved))
    torch.testing.assert_close(seen[0], (here[0], there[1]))
    assert not torch.allclose(here[1], there[1])
    keys = KeyEncoder(model)(batch["visible"], batch["infrared"], batch["targets"])[0]["keys"]
    at_visible = KeyEncoder(model)(batch["visible"], batch["infrared"], [{"boxes": boxes} for boxes in moved])[0][
        "keys"
    ]
    assert torch.allclose(keys[:, 1], at_visible[:, 1]) and not torch.allclose(keys[:, 0], at_visible[:, 0])


@torch.no_grad()
def test_a_camera_that_is_absent_is_never_looked_at(build, batch):
    """By detection, the contrast, and the labels that an averaged detector gives."""
    model, black = build().eval(), [torch.zeros_like(image) for image in batch["infrared"]]
    alone = {"present": torch.tensor([True, False]), "domain": torch.tensor(0), "scene": torch.tensor(0)}
    for target in batch["targets"]:
        target |= alone | {"visible_in": alone["present"].expand(len(target["boxes"]), 2)}
    labelled = [Labeller(model, 0.0)(batch["visible"], other, batch["targets"]) for other in (black, batch["infrared"])]
    for first, second in zip(*labelled, strict=True):
        assert torch.equal(first["boxes"], second["boxes"]) and not first["visible_in"][:, 1].any()
    results = []
    for infrared in (black, batch["infrared"]):
        torch.manual_seed(0)
        results.append(model.train()(visible=batch["visible"], infrared=infrared, targets=batch["targets"]))
    assert results[0] == results[1] and results[0]["loss_macl"] == 0
