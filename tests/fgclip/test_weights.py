"""Every layout in and out again, and what a loader must refuse."""

import json
import sys
import zipfile

import pytest
import torch

from fgclip import FGCLIP, load_clip_weights, save_clip_weights
from fgclip.text import stretch_positions
from fgclip.weights import hugging_face_config
from trainkit.errors import InputError

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
TOKENS = torch.tensor([[512, 5, 6, 513, 0], [512, 513, 0, 0, 0]])
BOXES = [torch.tensor([[0.1, 0.1, 0.6, 0.7]]), torch.tensor([[0.0, 0.2, 1.0, 1.0]])]


def features(model):
    return dict(
        image=model.encode_image(PIXELS),
        text=model.encode_text(TOKENS),
        long=model.encode_text(TOKENS, long=True),
        regions=model.encode_regions(PIXELS, BOXES),
        **model.logit_scales(),
    )


def assert_same_features(model, expected, names=None):
    found = features(model)
    for name in names or expected:
        assert found[name].equal(expected[name]), name


ONLY_FGCLIP = ("position_embedding_res", "position_embedding_ori", "text_filip_projection")
ONLY_FGCLIP += ("logit_scale_finegraind", "logit_scale_hardneg")


def to_clip(state):
    return {k: v for k, v in state.items() if not any(name in k for name in ONLY_FGCLIP)}


def to_openai(state):
    """The inverse of the loader's mapping, written from OpenAI's side."""
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    own = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "token_embedding.weight": state[text + "token_embedding.weight"],
        "positional_embedding": state[text + "position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "visual.conv1.weight": state[vision + "patch_embedding.weight"],
        "visual.class_embedding": state[vision + "class_embedding"],
        "visual.positional_embedding": state[vision + "position_embedding.weight"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        own[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        own[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        own[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for prefix, tower, layers in (("visual.", "vision_model", 3), ("", "text_model", 2)):
            for i in range(layers):
                there, here = f"{prefix}transformer.resblocks.{i}.", f"{tower}.encoder.layers.{i}."
                own |= {f"{there}{a}.{kind}": state[f"{here}{b}.{kind}"] for a, b in names.items()}
                stacked = [state[f"{here}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                own[f"{there}attn.in_proj_{kind}"] = torch.cat(stacked)
    return own


def heads_of(model):
    return tuple(tower.encoder.layers[0].self_attn.heads for tower in (model.vision_model, model.text_model))


@pytest.mark.parametrize("roi_projection", [False, True])
def test_fgclip_layout_returns_bit_for_bit(small_model, tmp_path, roi_projection):
    model = small_model
    if roi_projection:
        text = small_model.config["text"] | dict(activation="gelu", eps=1e-6, eos_id=513)
        model = FGCLIP(**small_model.config | dict(roi_projection=True, text=text))
        torch.nn.init.normal_(model.roi_projection.weight)
    save_clip_weights(model, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    for path in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        again = load_clip_weights(path)
        assert_same_features(again, features(model))
        for name, tensor in model.state_dict().items():
            assert tensor.equal(again.state_dict()[name]), name
    assert again.load_report.notes == ["layout: FG-CLIP"] and not again.load_report.made
    assert len(again.load_report.loaded) == len(model.state_dict())
    assert FGCLIP(**again.config).state_dict().keys() == again.state_dict().keys()
    assert again.text_model.eos_id == model.text_model.eos_id


@pytest.mark.parametrize("layout", ["OpenAI CLIP", "Hugging Face CLIP"])
@pytest.mark.parametrize("kind", ["dict", "file"])
def test_clip_layouts_return_bit_for_bit(small_model, tmp_path, layout, kind):
    state = small_model.state_dict()
    source = to_openai(state) if layout == "OpenAI CLIP" else to_clip(state)
    config = hugging_face_config(small_model)
    if layout == "Hugging Face CLIP":
        source |= {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    if kind == "file":
        torch.save(source, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = load_clip_weights(tmp_path)
    else:
        model = load_clip_weights(source, config)
    assert_same_features(model, features(small_model), ["image", "text", "regions", "global"])
    report = model.load_report
    assert report.notes == [f"layout: {layout}"]
    assert set(report.made) == {k for k in state if any(name in k for name in ONLY_FGCLIP)}
    assert set(report.loaded) == set(to_clip(state)) and set(report.loaded).isdisjoint(report.made)
    assert len(report.skipped) == (layout == "Hugging Face CLIP")
    for said in (layout, "stretched", f"loaded {len(report.loaded)} tensors"):
        assert said in str(report)
    embeddings = model.text_model.embeddings
    stretched = stretch_positions(embeddings.position_embedding.weight)
    assert embeddings.position_embedding_res.weight.equal(stretched)
    assert embeddings.position_embedding_ori.weight.equal(stretched)
    assert model.text_filip_projection.weight.equal(small_model.text_projection.weight)
    assert model.logit_scale_hardneg.equal(small_model.logit_scale)


def test_loaded_parameters_are_float32_trainable_and_their_own(small_model):
    half = {k: v.half() for k, v in to_openai(small_model.state_dict()).items()}
    model = load_clip_weights(half, hugging_face_config(small_model))
    assert model.visual_projection.weight.equal(small_model.visual_projection.weight.half().float())
    for source in (half, small_model.state_dict()):
        model = load_clip_weights(source, hugging_face_config(small_model))
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.requires_grad and parameter.is_contiguous() and parameter.dtype == torch.float32
                parameter.zero_()
        assert all(t.abs().max() > 0 for t in source.values())


def test_without_a_config_only_published_sizes_are_guessed_and_that_is_said():
    """Of open_clip's ViT-S-32-alt, whose heads are 64 wide, as OpenAI's are."""
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=32, width=384, layers=12, heads=6, mlp_width=8)
    text = dict(vocab_size=514, context_length=24, width=256, layers=10, heads=4, mlp_width=8)
    model = FGCLIP(vision=vision, text=text, embed_dim=8)
    again = load_clip_weights(model.state_dict())
    assert again.encode_image(PIXELS).equal(model.encode_image(PIXELS))
    assert again.encode_text(TOKENS).equal(model.encode_text(TOKENS))
    said = "guessed: vision heads 6 (--heads), vision activation quick_gelu (--activation), text heads 4 (--heads)"
    assert said in str(again.load_report)
    other = load_clip_weights(model.state_dict(), heads=(12, 8), activation="gelu")
    assert "guessed" not in str(other.load_report)
    assert heads_of(other) == (12, 8) and other.config["text"]["activation"] == "gelu"


def test_sizes_of_no_published_model_need_heads(small_model):
    """Though 128 and 64 divide into heads of 64."""
    vision = dict(image_size=16, patch_size=8, width=128, layers=1, heads=2, mlp_width=64)
    text = dict(vocab_size=514, context_length=24, width=64, layers=1, heads=1, mlp_width=64)
    wide = FGCLIP(vision=vision, text=text, embed_dim=8)
    for model, heads in ((wide, (2, 1)), (small_model, (4, 3))):
        with pytest.raises(InputError, match="--heads VISION TEXT"):
            load_clip_weights(model.state_dict())
        again = load_clip_weights(model.state_dict(), heads=heads)
        assert again.encode_image(PIXELS).equal(model.encode_image(PIXELS))
        assert "activation quick_gelu" in str(again.load_report) and "vision heads" not in str(again.load_report)
    for flag, given in (("--heads", dict(heads=(4, 2))), ("--activation", dict(activation="gelu"))):
        with pytest.raises(InputError, match=f"{flag}: the config of the state dict says"):
            load_clip_weights(small_model.state_dict(), hugging_face_config(small_model), **given)


def open_clip_config(model):
    """Written from open_clip's side: heads by their width, GELU where quick_gelu is not said."""
    vision, text = model.config["vision"], model.config["text"]
    vision_cfg = dict(image_size=32, layers=3, width=32, patch_size=8, head_width=8, mlp_ratio=2.0)
    text_cfg = dict(context_length=24, vocab_size=514, width=24, heads=text["heads"], layers=2)
    quick = {} if vision.get("activation") == "gelu" else dict(quick_gelu=True)
    return dict(model_cfg=dict(embed_dim=16, vision_cfg=vision_cfg, text_cfg=text_cfg, **quick), preprocess_cfg={})


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_open_clip_config_beside_the_weights_is_read(small_model, tmp_path, activation):
    """For a training checkpoint of open_clip, a folder as it publishes them, and a file in Hugging Face's naming."""
    towers = {name: small_model.config[name] | dict(activation=activation) for name in ("vision", "text")}
    model = FGCLIP(**small_model.config | towers)
    model.load_state_dict(small_model.state_dict())
    expected = features(model)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(model)))
    own = to_openai(small_model.state_dict())
    torch.save(dict(epoch=3, state_dict={f"module.{k}": v for k, v in own.items()}), tmp_path / "epoch_3.pt")
    torch.save(own, tmp_path / "open_clip_pytorch_model.bin")
    torch.save(dict(model=to_clip(small_model.state_dict())), tmp_path / "last.pt")
    for path in ("epoch_3.pt", "", "last.pt"):
        found = load_clip_weights(tmp_path / path)
        assert_same_features(found, expected, ["image", "text", "regions"])
        assert heads_of(found) == (4, 3) and "guessed" not in str(found.load_report)
    (tmp_path / "config.json").write_text("{}")  # somebody else's
    assert_same_features(load_clip_weights(tmp_path / "epoch_3.pt"), expected, ["image"])


@pytest.mark.parametrize(
    ("tower", "change", "said"),
    [
        ("vision", dict(head_width=5), "width 32 is not a multiple of heads 6"),
        ("vision", dict(head_width=0), "head_width: expected a whole number"),
        ("vision", dict(width=64), r"with its config: .* expected \(.*\b64\b.* got \("),
        ("vision", dict(pool_type="avg"), "no model with pool_type = 'avg' is built here"),
        ("text", dict(no_causal_mask=True), "no model with no_causal_mask = True"),
        ("text", dict(heads="many"), "text_cfg, heads: expected a whole number"),
        ("text", None, "an object under the key text_cfg"),
    ],
)
def test_an_open_clip_config_of_another_model_is_refused(small_model, tmp_path, tower, change, said):
    config = open_clip_config(small_model)
    given = config["model_cfg"][f"{tower}_cfg"]
    config["model_cfg"][f"{tower}_cfg"] = change and given | change
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(to_openai(small_model.state_dict()), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=said):
        load_clip_weights(tmp_path / "weights.pt")


def test_sharded_directory(small_model, tmp_path):
    state = small_model.state_dict()
    names = list(state)
    torch.save({k: state[k] for k in names[:30]}, tmp_path / "one.bin")
    torch.save({k: state[k] for k in names[30:]}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    weight_map = {k: "one.bin" if i < 30 else "two.bin" for i, k in enumerate(names)}
    index.write_text(json.dumps(dict(weight_map=weight_map)))
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(small_model)))
    assert_same_features(load_clip_weights(tmp_path), features(small_model))
    for wrong in ("../one.bin", "..", ".", "", "/etc/passwd", index.name, "absent.bin", 3, None, ["one.bin"], {}):
        index.write_text(json.dumps(dict(weight_map={names[0]: wrong, names[1]: "one.bin"})))
        with pytest.raises(InputError, match="index.json|absent.bin"):
            load_clip_weights(tmp_path)


IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"
LAST = "text_model.final_layer_norm.bias"


@pytest.mark.parametrize(
    ("layout", "key", "tensor", "said"),
    [
        (to_openai, IN_PROJ, None, "vision_model.encoder.layers.1.self_attn.k_proj.weight' is missing"),
        (to_openai, IN_PROJ, torch.tensor(1.0), "vision_model.encoder.layers.1.self_attn.*"),
        (to_openai, "logit_scale", None, "logit_scale' is missing"),
        (to_openai, "positional_embedding", None, "no CLIP with a vision transformer.*position_embedding"),
        (to_openai, "visual.transformer.resblocks.0.attn.extra", torch.zeros(2), "attn.extra' has no place here"),
        (to_clip, "temporal_attention.0.weight", torch.zeros(2), "'temporal_attention.0.weight' has no place here"),
        (dict, LAST, None, f"'{LAST}' is missing"),
        (dict, LAST, torch.zeros(7), rf"{LAST}: expected \(24,\).*got \(7,\)"),
        (dict, LAST, torch.ones(24, dtype=torch.int64), f"{LAST}: expected .*float32, got .*int64"),
        (dict, LAST, torch.full((24,), torch.nan), f"{LAST} holds numbers that are not finite"),
        (dict, "vision_model.embeddings.patch_embedding.weight", torch.ones(2, 2), "no CLIP with a vision transformer"),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_wrong_is_named(small_model, layout, key, tensor, said):
    source = layout(small_model.state_dict())
    source.pop(key, None)
    with pytest.raises(InputError, match=f"the state dict.*{said}"):
        load_clip_weights(source if tensor is None else source | {key: tensor}, hugging_face_config(small_model))


@pytest.mark.parametrize(
    ("tower", "key", "value", "said"),
    [
        ("vision", "hidden_size", 768, r"expected \(.*\b768\b.* got \("),
        ("text", "num_hidden_layers", 1, "has no place here"),
        ("text", "num_hidden_layers", 10**9, "layers: expected a whole number"),
        ("vision", "image_size", 33, "image_size"),
        ("vision", "patch_size", 16, "(patch|position)_embedding"),
        ("text", "hidden_act", "relu", "activation 'relu' is not one of"),
        ("text", "num_attention_heads", 5, "width 24 is not a multiple of heads 5"),
        ("vision", "layer_norm_eps", "small", "eps: expected a number"),
        ("text", "eos_token_id", 1.5, "eos_id: expected a whole number"),
    ],
)
def test_a_config_of_another_model_is_refused(small_model, tower, key, value, said):
    config = hugging_face_config(small_model)
    config[f"{tower}_config"][key] = value
    with pytest.raises(InputError, match=f"the state dict with its config.*{said}"):
        load_clip_weights(small_model.state_dict(), config)


def test_other_files_are_refused_in_one_sentence(small_model, tmp_path):
    torch.save({"epoch": 3, "model": small_model.state_dict()}, tmp_path / "run.pt")
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pt")
    whole = (tmp_path / "run.pt").read_bytes()
    cases = {"empty.pt": b"", "zip.pt": b"PK\x05\x06" + bytes(18), "cut.pt": whole[: len(whole) // 2]}
    cases |= {"short.safetensors": b"\x05\x00\x00\x00\x00\x00\x00\x00{}"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in [*cases, "run.pt", "resnet.pt", "folder", "absent.pt"]:
        with pytest.raises(InputError) as caught:
            load_clip_weights(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value), name


def test_torchscript_is_recognised_without_loading_it(tmp_path):
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"anything")
        archive.writestr("archive/data.pkl", b"anything")
    with pytest.raises(InputError, match="--trust-torchscript"):
        load_clip_weights(path)
    with pytest.raises(InputError, match="not a readable TorchScript"), pytest.warns(Warning, match="deprecated"):
        load_clip_weights(path, trust_torchscript=True)


class Holder(torch.nn.Module):
    """A module whose state dict has the given dotted names."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_buffer(last, tensor)

    def forward(self, x):
        return x


def test_trusted_torchscript_loads_like_the_state_dict(small_model, tmp_path):
    source = to_openai(small_model.state_dict())
    facts = dict(input_resolution=torch.tensor(32), context_length=torch.tensor(24), vocab_size=torch.tensor(514))
    with pytest.warns(Warning, match="deprecated"):
        torch.jit.script(Holder(source | facts)).save(tmp_path / "ViT.pt")
    with pytest.warns(Warning, match="deprecated"):
        model = load_clip_weights(tmp_path / "ViT.pt", hugging_face_config(small_model), trust_torchscript=True)
    assert set(model.load_report.skipped) == set(facts)
    assert_same_features(model, features(small_model), ["image", "text", "regions", "global"])


def test_a_missing_safetensors_package_is_named(small_model, tmp_path, monkeypatch):
    save_clip_weights(small_model, tmp_path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"safetensors package.*\[text\]"):
        load_clip_weights(tmp_path)
