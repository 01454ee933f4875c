"""Low-rank adapters: what learns, that they merge exactly, and a run with them that is resumed, evaluated and saved."""

import pytest
import torch
from scripts import FGCLIP as TINY
from scripts import equal, load, metrics, refused, run

import train_fgclip
from fgclip import evaluate, load_model, save_clip_weights
from fgclip.freezing import freeze, train_unfrozen
from fgclip.lora import TARGETS, add_lora
from fgclip.weights import build

LORA = [*TINY, *"--lora-rank 2 --lora-alpha 6 --lora-dropout 0.3 --lora-targets q_proj v_proj fc2".split()]


def adapted(model, targets, dropout=0.0):
    add_lora(model, targets, rank=2, alpha=6.0, dropout=dropout)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_up"):
            assert not parameter.any()  # the model is the same at first
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj",)])
def test_merged_weights_are_base_plus_product(small_model, small_batch, tmp_path, targets):
    base = {name: value.clone() for name, value in small_model.state_dict().items()}
    model = adapted(small_model, targets).eval()
    state, whole = model.state_dict(), build(small_model.config, model.state_dict(), "here")
    for name, value in whole.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = base[name]
        if f"{layer}.lora_up" in state:
            expected = expected + 6.0 / 2 * (state[f"{layer}.lora_up"] @ state[f"{layer}.lora_down"])
        assert (layer.rpartition(".")[2] in targets and name.endswith("weight")) == (f"{layer}.lora_up" in state)
        assert value.equal(expected), name
    plain = whole.eval()(small_batch)
    for name, feature in model(small_batch).items():
        torch.testing.assert_close(feature, plain[name], rtol=1e-4, atol=1e-5, msg=name)
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_clip_weights(model, tmp_path)
    assert equal(load_file(tmp_path / "model.safetensors"), dict(whole.state_dict()))


def test_what_learns_and_what_drops_out(small_model, small_batch):
    freeze(small_model, ["vision:2"])
    model = adapted(small_model, ["q_proj", "fc1"], dropout=0.5)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = ("vision_model.encoder.layers.2", "text_model.encoder.layers.0", "text_model.encoder.layers.1")
    expected = {f"{block}.{layer}.lora" for block in blocks for layer in ("self_attn.q_proj", "mlp.fc1")}
    assert {name.partition("_down")[0].partition("_up")[0] for name in learning if "lora" in name} == expected
    assert len(learning) == 2 * len(expected) + len(model.log_scales())
    train_unfrozen(model)
    assert not model(small_batch)["image"].equal(model(small_batch)["image"])
    assert model.eval()(small_batch)["image"].equal(model(small_batch)["image"])


def test_a_run_with_adapters(tmp_path, monkeypatch, capsys):
    """Its checkpoints hold base and adapters; it is resumed exactly, validated without dropout, and loaded merged."""
    modes, validate = [], train_fgclip.validation_metrics

    def validation(embedder, *args, **kwargs):
        modes.extend(module.training for module in embedder.model.modules())
        return validate(embedder, *args, **kwargs)

    monkeypatch.setattr(train_fgclip, "validation_metrics", validation)
    whole = run(train_fgclip, LORA, tmp_path / "whole", "--ema-decay", 0, "--max-steps", 5)
    halves = run(train_fgclip, LORA, tmp_path / "halves", "--ema-decay", 0, "--max-steps", 2)
    before = load(halves)["model"]
    train_fgclip.main(["--resume", str(halves), "--max-steps", "5", "--device", "cpu"])
    assert modes and not any(modes)
    state, model = load(halves)["model"], load_model(halves / "last.pt")[0].state_dict()
    assert equal(state, load(whole)["model"]) and metrics(halves) == metrics(whole)
    for name, value in state.items():
        learns = "lora_up" in name or "lora_down" in name or name.startswith("logit_scale")
        assert value.equal(before[name]) != learns, name
    layer = "text_model.encoder.layers.1.mlp.fc2"
    product = 6 / 2 * state[f"{layer}.lora_up"] @ state[f"{layer}.lora_down"]
    torch.testing.assert_close(model[f"{layer}.weight"], state[f"{layer}.weight"] + product)
    assert product.any() and model.keys() == {name for name in state if "lora_" not in name}
    # Another run goes on from the merged weights, at the rate of adapters.
    more = "--lora-rank 1 --max-steps 1 --synthetic-train 8 --synthetic-val 4 --batch-size 4 --device cpu --workers 0"
    flags = ["--init-from", halves / "last.pt", *more.split(), "--warmup-steps", 0, "--clip-norm", 0]
    again = load(run(train_fgclip, flags, tmp_path / "again"))
    assert equal(again["model"][f"{layer}.weight"], model[f"{layer}.weight"])
    assert again["schedule"]["base_lrs"][0] == 1e-4
    damaged = load(halves)
    del damaged["model"][f"{layer}.lora_down"]
    torch.save(damaged, tmp_path / "damaged.pt")
    flags = ["--device", "cpu", "--init-from", tmp_path / "damaged.pt"]
    assert "lora_down" in refused(capsys, train_fgclip.main, *flags)
    flags = [*LORA, *"--freeze vision:2 text:2 --output".split(), tmp_path / "none"]
    assert "nothing but the logit scales" in refused(capsys, train_fgclip.main, *flags)


@pytest.mark.parametrize("flags", ["--lora-rank 2 --roi-projection --image-size 48", "--freeze vision"])
def test_a_checkpoint_beside_base_weights(tmp_path, capsys, flags):
    """best.pt holds what was trained alone and is read whole with its base, which is known by its hash."""
    base, tiny = tmp_path / "base.pt", TINY[TINY.index("--synthetic-train") :]
    (run(train_fgclip, TINY, tmp_path / "base", "--max-steps", 1) / "last.pt").rename(base)
    tiny = [*tiny, *flags.split(), *"--batch-size 16 --keep-every 1 --max-steps 2 --init-from".split(), base]
    whole = run(train_fgclip, tiny, tmp_path / "whole") / "best.pt"
    folder = run(train_fgclip, [*tiny, "--base", base], tmp_path / "parts")
    for weights in ("ema", "raw"):
        expected, tokenizer = load_model(whole, weights=weights)
        model, own = load_model(folder / "best.pt", weights=weights)
        assert equal(dict(model.state_dict()), dict(expected.state_dict())) and own.merges == tokenizer.merges
    known, state = load(tmp_path, "base.pt")["ema"], load(folder, "best.pt")
    assert not any(name in known and value.equal(known[name]) for name, value in state["model"].items())
    assert any("vision_model" in name for name in state["model"]) == ("lora" in flags) and "optimizer" not in state
    assert equal(state, load(folder, "epoch-1.pt")) and "optimizer" in load(folder)
    assert "resume last.pt" in refused(capsys, train_fgclip.main, "--device", "cpu", "--resume", folder / "best.pt")
    torch.save(state | dict(base=[]), tmp_path / "damaged.pt")

    def say(checkpoint, *more):
        return refused(capsys, evaluate.main, "--device", "cpu", "--count", 2, "--checkpoint", checkpoint, *more)

    assert "is damaged: base" in say(tmp_path / "damaged.pt")
    assert "best.pt is whole" in say(whole, "--base", base)
    assert "holds other weights" in say(folder / "best.pt", "--base", whole)
    base.rename(tmp_path / "moved.pt")
    assert "alone: --base: " in say(folder / "best.pt")
    model, _ = load_model(folder / "best.pt", weights="raw", base=tmp_path / "moved.pt")
    assert equal(dict(model.state_dict()), dict(expected.state_dict()))
