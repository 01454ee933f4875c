"""What is frozen: no graph, no gradient, no optimizer, no DDP, evaluation mode; and a resumed run."""

import pytest
import torch
from scripts import FGCLIP as TINY
from scripts import equal, load, metrics, refused, run

import train_fgclip
from fgclip.freezing import freeze, train_unfrozen
from trainkit import distributed

BELOW = {"vision": ("vision_model.embeddings", "vision_model.pre_layrnorm"), "text": ("text_model.embeddings",)}


def blocks(tower, count):
    return (*BELOW[tower], *(f"{tower}_model.encoder.layers.{i}" for i in range(count)))


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        ([], ()),
        (["vision"], ("vision_model", "visual_projection")),
        (["text", "vision:2"], ("text_model", "text_projection", "text_filip_projection", *blocks("vision", 2))),
        (["text:1", "vision:3"], (*blocks("text", 1), *blocks("vision", 3))),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_parts_have_no_graph_and_are_in_eval(small_model, small_batch, parts, frozen, checkpointing):
    small_model.set_checkpointing(checkpointing)
    names = tuple(f"{name}." for name in frozen)
    freeze(small_model, parts)
    train_unfrozen(small_model)
    for name, module in small_model.named_modules():
        if list(module.parameters(recurse=False)):
            assert module.training != f"{name}.".startswith(names), name
    with_graph = {}
    for name, block in small_model.named_modules():
        if name.count(".") == 3:  # a block of a tower
            calls = with_graph.setdefault(f"{name}.", [])
            block.layer_norm1.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
    features = small_model(small_batch)
    for name, calls in with_graph.items():
        assert calls and all(calls) != name.startswith(names), name
    for name, tower in dict(image="vision", regions="vision", short="text", long="text").items():
        assert features[name].requires_grad == (tower not in parts)
    sum(feature.sum() for feature in features.values()).backward()
    for name, parameter in small_model.named_parameters():
        assert (parameter.grad is None) == name.startswith(names), name


@pytest.mark.parametrize("decay", [0, 0.9])
def test_a_run_with_frozen_parts(tmp_path, monkeypatch, decay):
    """They keep their weights through validations and a resume; DDP and optimizer see them frozen."""
    wrapped = []

    def parallel(model):
        wrapped.append((model, [p for p in model.parameters() if p.requires_grad]))
        return model

    monkeypatch.setattr(distributed, "parallel", parallel)
    flags = [*TINY, "--freeze", "text", "vision:1", "--ema-decay", decay]
    whole = load(run(train_fgclip, flags, tmp_path / "whole", "--max-steps", 5))
    ((model, learning),) = wrapped
    assert len(whole["optimizer"]["state"]) == len(learning) < len(list(model.parameters()))
    frozen = ("text", *blocks("vision", 1))
    assert {name.startswith(frozen) for name, p in model.named_parameters() if not p.requires_grad} == {True}
    assert model.training and not model.text_model.training  # after a validation too
    halves = run(train_fgclip, flags, tmp_path / "halves", "--max-steps", 2)
    first = load(halves)["model"]
    train_fgclip.main(["--resume", str(halves), "--max-steps", "5", "--device", "cpu"])
    last = load(halves)
    assert equal(last["model"], whole["model"]) and metrics(halves) == metrics(tmp_path / "whole")
    for name, value in first.items():
        assert value.equal(last["model"][name]) == name.startswith(frozen), name
        assert not decay or not name.startswith(frozen) or value.equal(last["ema"][name])


def test_wrong_parts_end_in_one_sentence(tmp_path, capsys):
    for parts, sentence in {
        "audio": "--freeze audio: expected vision, text",
        "vision:3": "at most vision:2 or text:2",
        "text:": "--freeze text:",
        "vision text": "nothing but the logit scales would learn",
    }.items():
        assert sentence in refused(capsys, train_fgclip.main, *TINY, "--freeze", *parts.split(), "--output", tmp_path)
