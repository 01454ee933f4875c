"""What detectors can be built, and how optional parts are made and loaded."""

import pytest
import torch

import macl
from macl.build import CHOICES, load_initial_weights

DHN = dict(dhn_size=32, dhn_k=8)
IMPOSSIBLE = [
    *[({name: "x"}, f"{name} 'x' is none of {', '.join(options)}") for name, options in CHOICES.items()],
    (DHN | {"macl_level": "none"}, "needs the embeddings of boxes, and macl_level is 'none'"),
    (DHN | {"macl_level": "image"}, "needs the embeddings of boxes, and macl_level is 'image'"),
    ({"fpn_levels": 2}, "fpn_levels is 2"),
    ({"modality_dropout": (0.7, 0.4)}, "their sum at most 1"),
    ({"macl_temperature": 3.0}, "temperature 3.0 is outside"),
    (DHN | {"dhn_size": 4}, "8 hard negatives from a bank of 4 rows"),
    (DHN | {"dhn_k": 0}, "0 hard negatives"),
]


@pytest.mark.parametrize(("wrong", "message"), IMPOSSIBLE)
def test_impossible_detectors_are_refused(build, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_optional_parts_leave_the_first_weights_of_the_others_alone(build):
    plain = build(msp=False, macl_level="none").state_dict()
    for parts in (dict(macl_level="none"), dict(msp=False), DHN | dict(macl_level="crop")):
        more = build(**parts).state_dict()
        assert len(more) > len(plain) and all(torch.equal(value, more[name]) for name, value in plain.items())


def save(source, path, **others):
    torch.save({"model_kwargs": source.kwargs, "model": source.state_dict(), "ema": None} | others, path)
    return path


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (dict(msp=False, macl_level="none"), DHN, "newly made: neck.msp; newly made: macl.hard; newly made: macl"),
        (DHN, dict(msp=False, macl_level="none"), "left out: neck.msp; left out: macl.hard; left out: macl"),
        (DHN, dict(dhn_size=64), "newly made: macl.hard"),
        (DHN, dict(macl_level="crop"), "left out: macl.hard; newly made: macl"),
        (DHN, DHN, ""),
    ],
)
def test_a_checkpoint_starts_a_detector_with_other_parts(build, tmp_path, before, after, said):
    """What both have in one form is the checkpoint's, all else as it was made."""
    source, model, first = build(**before), build(**after), build(**after).state_dict()
    with torch.no_grad():
        for value in source.state_dict().values():
            value.add_(1)
    path = save(source, tmp_path / "last.pt")
    assert load_initial_weights(model, path).split(" tensors")[1].lstrip("; ") == said
    loaded = source.state_dict()
    made = tuple(f"{part.split(': ')[1]}." for part in said.split("; ") if "newly" in part)
    for name, value in model.state_dict().items():
        assert torch.equal(value, first[name] if made and name.startswith(made) else loaded[name]), name


def test_anything_else_that_differs_is_refused(build, tmp_path):
    source = build(**DHN)
    with pytest.raises(macl.InputError, match="another detector"):
        load_initial_weights(build(**DHN, fpn_channels=16), save(source, tmp_path / "stage2.pt"))
    incomplete = source.state_dict()
    del incomplete["macl.projector.0.weight"]
    with pytest.raises(macl.InputError, match="macl.projector.0.weight' is missing"):
        load_initial_weights(source, save(source, tmp_path / "incomplete.pt", model=incomplete))


def test_rows_of_a_class_go_by_its_name(build, tmp_path):
    source = build(classes=("car", "person"))
    model = build(classes=("person", "dog"), aspect_ratios=(0.5, 1.0, 3.0, 5.0))
    made = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    said = load_initial_weights(model, save(source, tmp_path / "last.pt"))
    for layer in ("cls_score", "bbox_pred"):
        states = (source.state_dict(), model.state_dict(), made)
        loaded, own, first = (state[f"roi_head.{layer}.weight"].unflatten(0, (3, -1)) for state in states)
        assert torch.equal(own[0], loaded[0]) and torch.equal(own[1], loaded[2]) and torch.equal(own[2], first[2])
    assert torch.equal(model.rpn.head.conv.weight, source.rpn.head.conv.weight)
    assert "newly made: the rows of dog; left out: the rows of car" in said and "rpn.head.cls_logits" in said


def test_a_plain_norm_initialises_that_of_both_modalities(build, tmp_path):
    source, model = build(norm="batch"), build(norm="modality_batch")
    torch.nn.init.uniform_(source.backbone.bn1.weight)
    load_initial_weights(model, save(source, tmp_path / "stage1.pt"))
    for norm in (model.backbone.bn1.visible, model.backbone.bn1.infrared):
        assert torch.equal(norm.weight, source.backbone.bn1.weight)
