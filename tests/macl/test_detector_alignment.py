"""Hard negatives and domain alignment in the detector: what each loss trains, and how the new parts are loaded."""

import pytest
import torch

import macl
from macl.build import CHOICES, load_initial_weights
from macl.data import SyntheticPairs, collate

DHN = dict(dhn_size=32, dhn_k=8)
CONFIGURATIONS = {
    "denominator": (DHN, {"loss_macl"}),
    "softplus": (DHN | {"dhn_mode": "softplus", "dhn_momentum": 0.9}, {"loss_macl", "loss_dhn"}),
    "embedding": (dict(mmd_level="embedding", domains=2), {"loss_macl", "loss_mmd", "loss_mmd_domains"}),
    "pyramid": (dict(macl_level="none", mmd_level="pyramid", mmd_unbiased=False), {"loss_mmd"}),
    "modality": (dict(macl_level="none", adversary="modality"), {"loss_adversary"}),
    "dataset": (
        dict(**DHN, mmd_level="pyramid", mmd_sigmas=[0.1, 1.0], mmd_unbiased=False, adversary="dataset", domains=2),
        {"loss_macl", "loss_mmd", "loss_mmd_domains", "loss_adversary"},
    ),
    "images": (dict(**DHN, macl_level="image", mmd_level="embedding"), {"loss_macl", "loss_mmd"}),
}


@pytest.fixture
def labelled(batch):
    """Two boxes in each of two images: of two scenes, and of two data sets."""
    box = torch.tensor([[60.0, 5, 75, 40]])
    first, second = batch["targets"]
    boxes = [first["boxes"][:2], torch.cat([second["boxes"], box])]
    labels, number = torch.ones(2, dtype=torch.int64), [torch.tensor(i) for i in range(2)]
    targets = [{"boxes": b, "labels": labels, "scene": i, "domain": i} for b, i in zip(boxes, number, strict=True)]
    return batch | {"targets": targets}


def of_other_scenes(batch):
    return batch | {"targets": [target | {"scene": target["scene"] + 10} for target in batch["targets"]]}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_loss_has_a_gradient_at_the_backbone(build, labelled, name):
    kwargs, expected = CONFIGURATIONS[name]
    model = build(**kwargs).train()
    model(**labelled)
    losses, metrics = model(**of_other_scenes(labelled), with_metrics=True)  # the bank now holds something
    assert {key for key in losses if key in ("loss_macl", "loss_dhn") or "mmd" in key or "adversary" in key} == expected
    weights = [model.backbone.conv1.weight, model.neck.outer[0].weight]
    for key in expected:
        assert losses[key] != 0, key
        for gradient in torch.autograd.grad(losses[key], weights, retain_graph=True):
            assert gradient.norm() > 0, key
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    assert metrics
    assert all(value.isfinite() and value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("level", ["roi", "image"])
def test_the_people_of_a_picture_are_never_its_negatives(build, labelled, level):
    """The same pictures in every step: in training with hard negatives the loss is as if there were none."""
    with_bank, without = build(**DHN, macl_level=level).train(), build(macl_level=level).train()
    labelled["targets"][0]["visible_in"] = torch.tensor([[True, False], [True, True]])
    labelled["targets"][1]["ignore"] = torch.tensor([True, False])
    for _ in range(3):
        labelled["targets"][1]["scene"] = torch.tensor(0)
        losses, metrics = with_bank(**labelled, with_metrics=True)
        plain = without(**labelled)["loss_macl"]
        torch.testing.assert_close(losses["loss_macl"], plain)
    assert metrics["dhn_masked"] == 1 and metrics["dhn_hardest"] == 0
    assert with_bank(**of_other_scenes(labelled))["loss_macl"] > plain


def test_rows_of_the_bank_carry_the_scene_of_their_picture(build, labelled):
    model = build(**DHN).train()
    labelled["targets"][0]["visible_in"] = torch.tensor([[True, False], [True, True]])
    labelled["targets"][1]["scene"] = torch.tensor(5)
    model(**labelled)
    model.eval()(visible=labelled["visible"], infrared=labelled["infrared"])
    assert [bank.ids.tolist() for bank in model.macl.hard.banks.values()] == [[0, 5, 5]] * 2


def test_scenes_come_from_the_loader(build):
    samples = [SyntheticPairs(4, seed=1)[index] for index in (1, 3)]
    batch = collate([samples[0], samples[1] | {"domain": 1}])
    assert [target["scene"].item() for target in batch["targets"]] == [1, 3]
    assert "domain" not in batch["targets"][0] and batch["targets"][1]["domain"] == 1
    model = build(**DHN).train()
    model(visible=batch["visible"], infrared=batch["infrared"], targets=batch["targets"])
    assert set(model.macl.hard.banks["visible"].ids.tolist()) == {1, 3}


def test_the_schedule_reaches_the_reversed_gradient(build, labelled):
    model = build(adversary="modality", macl_level="none").train()
    model.alignment.classifier.eval()  # without dropout
    gradients = {}
    for scale in (0.0, 0.5, 1.0):
        model.set_schedule(reversal_scale=scale)
        model.zero_grad()
        model(**labelled)["loss_adversary"].backward()
        gradients[scale] = [model.backbone.conv1.weight.grad, model.alignment.classifier.fc[0].weight.grad]
    assert gradients[0.0][0].norm() == 0
    torch.testing.assert_close(gradients[0.5][0] * 2, gradients[1.0][0])
    torch.testing.assert_close(gradients[0.0][1], gradients[1.0][1])


def test_the_schedule_reaches_the_hard_negatives(build, labelled):
    model, plain = build(**DHN).train(), build().train()
    model(**labelled)
    model.set_schedule(hard_k=1, hard_active=1)
    model.set_schedule(reversal_scale=0.5)  # what is not named stays as it is
    assert (model.macl.hard.k, model.macl.hard.active) == (1, 1)
    later = of_other_scenes(labelled)
    (losses, metrics), alone = model(**later, with_metrics=True), plain(**later)
    assert metrics["dhn_masked"] == 0 and losses["loss_macl"] > alone["loss_macl"]
    model.set_schedule(hard_active=0)
    torch.testing.assert_close(model(**later)["loss_macl"], alone["loss_macl"])


def test_the_new_parts_leave_the_first_weights_of_the_others_alone(build):
    plain = build().state_dict()
    everything = build(**DHN, dhn_momentum=0.9, mmd_level="pyramid", adversary="modality").state_dict()
    for name, value in plain.items():
        assert torch.equal(value, everything[name]), name


def test_targets_that_lack_a_label_are_refused(build, labelled):
    bare = [{key: target[key] for key in ("boxes", "labels")} for target in labelled["targets"]]
    far = [target | {"domain": torch.tensor(2)} for target in labelled["targets"]]
    for kwargs, changes, said in (
        (DHN, {"targets": bare}, "every target needs 'scene'"),
        (dict(mmd_level="pyramid", domains=2), {"targets": bare}, "every target needs 'domain'"),
        (dict(mmd_level="pyramid", domains=2), {"targets": far}, "domain is 2; expected less than domains=2"),
        (dict(macl_level="none", adversary="modality"), {"infrared": None}, "both modalities in training"),
    ):
        with pytest.raises(ValueError, match=said):
            build(**kwargs).train()(**labelled | changes)
    build(mmd_level="pyramid").train()(**labelled | {"targets": bare})  # one data set needs no label


IMPOSSIBLE = [
    *[({name: "x"}, f"{name} 'x' is none of {', '.join(options)}") for name, options in CHOICES.items()],
    (DHN | {"macl_level": "none"}, "need the contrastive head"),
    ({"mmd_level": "embedding", "macl_level": "none"}, "need the contrastive head"),
    ({"fpn_levels": 2}, "fpn_levels is 2"),
    ({"modality_dropout": (0.7, 0.4)}, "their sum at most 1"),
    ({"macl_temperature": 3.0}, "temperature 3.0 is outside"),
    (DHN | {"dhn_size": 4}, "8 hard negatives from a bank of 4 rows"),
    (DHN | {"dhn_k": 0}, "0 hard negatives"),
    (DHN | {"dhn_momentum": 1.0}, "momentum 1.0"),
    ({"mmd_level": "embedding", "mmd_sigmas": (1.0, 0.0)}, "mmd_sigmas"),
    ({"mmd_level": "embedding", "mmd_sigmas": ()}, "mmd_sigmas"),
    ({"adversary": "dataset"}, "two data sets apart at least"),
]


@pytest.mark.parametrize(("wrong", "message"), IMPOSSIBLE)
def test_impossible_detectors_are_refused(build, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def save(source, path, **others):
    torch.save({"model_kwargs": source.kwargs, "model": source.state_dict(), "ema": None} | others, path)
    return path


def test_a_checkpoint_without_the_new_parts_initialises_a_detector_with_them(build, tmp_path):
    source = build()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    path = save(source, tmp_path / "stage1.pt")
    model = build(**DHN, dhn_momentum=0.9, adversary="modality")
    first = model.alignment.classifier.fc[0].weight.clone()
    said = load_initial_weights(model, path)
    assert said == (
        f"all {len(source.state_dict())} tensors loaded; newly made: alignment.classifier; newly made: "
        "macl.hard.banks.infrared; newly made: macl.hard.banks.visible; newly made: macl.hard.key_projector"
    )
    state = model.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(state[name], value), name
    for name, value in model.macl.projector.state_dict().items():
        assert torch.equal(state[f"macl.hard.key_projector.{name}"], value), name
    assert torch.equal(model.alignment.classifier.fc[0].weight, first)


def test_a_plain_norm_initialises_that_of_both_modalities(build, tmp_path):
    source, model = build(norm="batch"), build(norm="modality_batch")
    torch.nn.init.uniform_(source.backbone.bn1.weight)
    load_initial_weights(model, save(source, tmp_path / "stage1.pt"))
    for norm in (model.backbone.bn1.visible, model.backbone.bn1.infrared):
        assert torch.equal(norm.weight, source.backbone.bn1.weight)


def test_a_bank_of_another_size_starts_empty(build, labelled, tmp_path):
    source = build(**DHN).train()
    source(**labelled)
    path = save(source, tmp_path / "stage2.pt")
    same, larger = build(**DHN), build(dhn_size=64, dhn_k=8)
    assert load_initial_weights(same, path) == f"all {len(source.state_dict())} tensors loaded"
    assert torch.equal(same.macl.hard.banks["visible"].features, source.macl.hard.banks["visible"].features)
    said = load_initial_weights(larger, path)
    assert said.endswith("; newly made: macl.hard.banks.infrared; newly made: macl.hard.banks.visible")
    assert said.startswith(f"all {len(source.state_dict()) - 8} tensors loaded")
    assert len(larger.macl.hard.banks["visible"]) == 0
    again = macl.load_detector(path)
    assert again.macl.hard.banks["visible"].ids.tolist() == [0, 0, 1, 1]


def test_anything_else_that_differs_is_refused(build, tmp_path):
    path = save(build(**DHN), tmp_path / "stage2.pt")
    assert "left out: macl.hard.banks.visible" in load_initial_weights(build(), path)
    for kwargs in (DHN | {"macl_dim": 8}, DHN | {"fpn_channels": 16}):
        with pytest.raises(macl.InputError, match="another detector"):
            load_initial_weights(build(**kwargs), path)
    whole = build()
    incomplete = whole.state_dict()
    del incomplete["macl.projector.0.weight"]
    with pytest.raises(macl.InputError, match="macl.projector.0.weight' is missing"):
        load_initial_weights(build(**DHN), save(whole, tmp_path / "incomplete.pt", model=incomplete))
