"""The towers against torch.nn's transformer, and what the model promises about its features."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgclip import FGCLIP, Tokenizer
from fgclip.model import MAX_LOGIT_SCALE, l2_normalize
from fgclip.text import stretch_positions
from fgclip.transformer import MLP

SHORT_TEXTS = ["a red square", "two", "the left half is green", ""]


@pytest.fixture
def tokens():
    return Tokenizer("bytes")(SHORT_TEXTS, 24)


def torch_twin(encoder, width, heads, activation):
    """The same blocks as torch.nn.TransformerEncoderLayer, which has its own attention code."""
    layers = []
    for block in encoder.layers:
        attention = block.self_attn
        twin = nn.TransformerEncoderLayer(
            width, heads, block.mlp.fc1.out_features, 0.0, activation, batch_first=True, norm_first=True
        ).double()
        state = {}
        for kind in ("weight", "bias"):
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            state[f"self_attn.in_proj_{kind}"] = torch.cat([getattr(p, kind) for p in projections])
            state[f"self_attn.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            for i in (1, 2):
                state[f"linear{i}.{kind}"] = getattr(getattr(block.mlp, f"fc{i}"), kind)
                state[f"norm{i}.{kind}"] = getattr(getattr(block, f"layer_norm{i}"), kind)
        twin.load_state_dict(state)
        layers.append(twin)
    return layers


def test_image_tower_equals_torch_transformer(small_model):
    model = small_model.double()
    vision = model.vision_model
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = F.unfold(pixels, 8, stride=8).mT @ vision.embeddings.patch_embedding.weight.flatten(1).T
    x = torch.cat([vision.embeddings.class_embedding.expand(2, 1, -1), patches], dim=1)
    x = vision.pre_layrnorm(x + vision.embeddings.position_embedding.weight)
    for layer in torch_twin(vision.encoder, 32, 4, lambda x: x * torch.sigmoid(1.702 * x)):
        x = layer(x)
    expected = vision.post_layernorm(x[:, 0]) @ model.visual_projection.weight.T
    torch.testing.assert_close(model.encode_image(pixels), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_text_tower_equals_torch_transformer(small_model, tokens, padded):
    model = small_model.double()
    text = model.text_model
    padding = tokens == 0
    if padded:  # masking the middle of a text changes it, so the mask must arrive
        padding[:, 2] = tokens[:, 3] != 0
    x = text.embeddings.token_embedding(tokens) + text.embeddings.position_embedding.weight
    causal = nn.Transformer.generate_square_subsequent_mask(24, dtype=torch.float64)
    key_padding = torch.zeros(4, 24, dtype=torch.float64).masked_fill(padding, -torch.inf) if padded else None
    for layer in torch_twin(text.encoder, 24, 3, lambda x: x * torch.sigmoid(1.702 * x)):
        x = layer(x, src_mask=causal, src_key_padding_mask=key_padding)
    x = x[torch.arange(4), (tokens == 513).int().argmax(1)]
    expected = text.final_layer_norm(x) @ model.text_projection.weight.T
    found = model.encode_text(tokens, attention_mask=~padding if padded else None)
    torch.testing.assert_close(found, expected)
    if padded:
        assert not torch.allclose(found, model.encode_text(tokens))


def test_gelu_is_the_exact_one():
    mlp, x = MLP(8, 8, "gelu"), torch.randn(5, 8)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
    with pytest.raises(ValueError, match="relu"):
        MLP(8, 8, "relu")


def test_value_path_is_attention_to_oneself(small_model):
    block = small_model.vision_model.encoder.layers[-1]
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(block.value_path(x), block(x, torch.eye(5, dtype=torch.bool)[None, None]))


def test_text_features_do_not_depend_on_padding(small_model, tokens):
    """Neither on its length nor on its id, so that batches may be cut to their longest text."""
    features = small_model.encode_text(tokens)
    torch.testing.assert_close(small_model.encode_text(tokens[1:2, :6]), features[1:2])
    with_end = torch.where((tokens == 513).cumsum(1) > 0, 513, tokens)
    torch.testing.assert_close(small_model.encode_text(with_end), features)


def test_end_token_by_id_and_by_size(tokens):
    text = dict(vocab_size=514, context_length=24, width=8, layers=1, heads=1, mlp_width=8)
    tower = FGCLIP(text=text, vision=dict(width=8, layers=1, heads=1)).text_model
    by_size = tower(tokens)
    tower.eos_id = 513
    assert tower(tokens).equal(by_size)
    tower.eos_id = 3
    torch.testing.assert_close(tower(torch.tensor([[1, 3, 9, 3]])), tower(torch.tensor([[1, 3]])))


def test_long_path_has_its_own_positions_and_projection(small_model):
    tokens = Tokenizer("bytes")(["x" * 30], 36)
    assert small_model.text_model.long_context_length == 36
    before = small_model.encode_text(tokens, long=True)
    assert small_model.encode_text(tokens[:, :33], long=True).allclose(before, atol=1e-6)
    embeddings = small_model.text_model.embeddings
    with torch.no_grad():  # rows that the path does not read
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding_ori.weight[20:] = 0
        embeddings.position_embedding_res.weight[:20] = 0
    assert small_model.encode_text(tokens, long=True).equal(before)
    with pytest.raises(ValueError, match="at most 24"):
        small_model.encode_text(tokens)
    with pytest.raises(ValueError, match="at most 36"):
        small_model.encode_text(torch.zeros(1, 37, dtype=torch.int64), long=True)


def test_stretch_keeps_and_interpolates():
    table = torch.arange(77.0)[:, None] ** 2
    long = stretch_positions(table)
    assert len(long) == 248 and long[:20].equal(table[:20]) and long[20::4].equal(table[20:])
    assert long[21] == 0.75 * 400 + 0.25 * 441 and long[-1] == 76**2 + 0.75 * (76**2 - 75**2)


def test_other_image_sizes(small_model):
    pixels = torch.randn(2, 3, 24, 40)
    assert small_model.encode_image(pixels).shape == (2, 16)
    dense = small_model.dense_features(pixels)
    assert dense.shape == (2, 16, 3, 5)
    whole = [torch.tensor([[0.0, 0, 1, 1], [0.6, 0, 1, 1]]), torch.tensor([[0.2, 1 / 3, 0.4, 2 / 3]])]
    regions = small_model.encode_regions(pixels, whole)
    torch.testing.assert_close(regions[0], dense[0].mean((1, 2)))
    torch.testing.assert_close(regions[1], dense[0, :, :, 3:].mean((1, 2)))  # the two columns on the right
    torch.testing.assert_close(regions[2], dense[1, :, 1, 1])
    with pytest.raises(ValueError, match="divides"):
        small_model.encode_image(torch.randn(1, 3, 30, 32))


def test_a_model_for_another_image_size_sees_such_images_as_before(small_model):
    model, pixels = small_model.with_image_size(48), torch.randn(2, 3, 48, 48)
    assert model.vision_model.image_size == model.config["vision"]["image_size"] == 48
    assert len(model.vision_model.embeddings.position_embedding.weight) == 1 + (48 // 8) ** 2
    torch.testing.assert_close(model.encode_image(pixels), small_model.encode_image(pixels))
    torch.testing.assert_close(model.log_scales(), small_model.log_scales())
    FGCLIP(**model.config).load_state_dict(model.state_dict())


def test_regions_of_none_one_and_outside(small_model):
    pixels = torch.randn(2, 3, 32, 32)
    none = small_model.encode_regions(pixels, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert none.shape == (0, 16)
    outside = small_model.encode_regions(pixels, [torch.zeros(0, 4), torch.tensor([[2.0, 2, 3, 3]])])
    l2_normalize(outside).sum().backward()
    assert outside.abs().max() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in small_model.parameters())
    with pytest.raises(ValueError, match="1 lists of boxes for 2 images"):
        small_model.encode_regions(pixels, [torch.zeros(0, 4)])


def test_roi_projection_starts_as_the_images(small_model):
    torch.manual_seed(0)
    model = small_model.with_roi_projection()
    assert model.config == small_model.config | dict(roi_projection=True)
    pixels, boxes = torch.randn(1, 3, 32, 32), [torch.tensor([[0.1, 0.2, 0.7, 0.9]])]
    before = small_model.encode_regions(pixels, boxes)
    assert model.encode_regions(pixels, boxes).equal(before) and model.encode_image(pixels).any()
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    assert model.encode_regions(pixels, boxes).equal(before)
    with torch.no_grad():
        model.roi_projection.weight.mul_(2)
    torch.testing.assert_close(model.encode_regions(pixels, boxes), 2 * before)


def make_batch(model, tokens):
    return dict(
        pixels=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        short_texts=tokens,
        short=torch.tensor([1, 0]),
        region=torch.tensor([2, 2, 0]),
        hard=torch.tensor([2, 0, 1, 3]),
        long_texts=Tokenizer("bytes")(["z" * 28, "y"], 36),
        long=torch.tensor([1, 0]),
        boxes=[torch.tensor([[0.0, 0, 0.5, 1], [0.2, 0.2, 0.4, 0.9]]), torch.tensor([[0.0, 0, 1, 1]])],
    )


def test_forward_equals_the_single_encoders(small_model, tokens):
    batch = make_batch(small_model, tokens)
    features = small_model(batch)
    short = small_model.encode_text(tokens)
    expected = dict(
        image=small_model.encode_image(batch["pixels"]),
        regions=small_model.encode_regions(batch["pixels"], batch["boxes"]),
        short=short[[1, 0]],
        region_texts=short[[2, 2, 0]],
        hard_texts=short[[2, 0, 1, 3]],
        long=small_model.encode_text(batch["long_texts"], long=True)[[1, 0]],
        scale_global=small_model.logit_scale.exp(),
        scale_region=small_model.logit_scale_finegraind.exp(),
        scale_hard=small_model.logit_scale_hardneg.exp(),
    )
    assert features.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(features[name], expected[name], msg=name)
    for name in ("short", "region_texts", "hard_texts", "long"):  # of indexing, repeats add up as a CPU's threads come
        assert features[name].grad_fn.name() == "EmbeddingBackward0", name
    assert small_model(dict(pixels=batch["pixels"])).keys() == {"image", "scale_global", "scale_region", "scale_hard"}


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(small_model, tokens):
    batch = make_batch(small_model, tokens)
    gradients, runs = [], []
    first = small_model.vision_model.encoder.layers[0]
    first.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for enabled in (False, True):
        small_model.set_checkpointing(enabled)
        small_model.zero_grad()
        sum(f.square().sum() for f in small_model(batch).values()).backward()
        gradients.append({k: p.grad for k, p in small_model.named_parameters()})
    assert len(runs) == 3  # once, then once in the forward and once more in the backward
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert gradient.equal(gradients[1][name]), name


def test_scales_are_clamped_on_the_parameter(small_model):
    assert FGCLIP(**small_model.config).logit_scale.item() == pytest.approx(4.6052, abs=1e-4)
    names = ("logit_scale", "logit_scale_finegraind", "logit_scale_hardneg")
    with torch.no_grad():
        for name, value in zip(names, (9.0, -2.0, 3.0), strict=True):
            getattr(small_model, name).fill_(value)
    small_model.clamp_logit_scales()
    assert [getattr(small_model, n).item() for n in names] == pytest.approx([MAX_LOGIT_SCALE, 0, 3])
    sum(small_model.logit_scales().values()).backward()
    assert small_model.logit_scale.grad == pytest.approx(100)


def test_l2_normalize_of_a_zero_row_is_zero_without_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    found = l2_normalize(x)
    assert found.tolist() == [[0, 0], pytest.approx([0.6, 0.8])]
    found.sum().backward()
    assert x.grad[0].tolist() == [0, 0] and x.grad[1].abs().min() > 0
    assert l2_normalize(x.bfloat16()).dtype == torch.float32 and l2_normalize(x.double()).dtype == torch.float64


def test_the_published_base_size_is_the_default():
    with torch.device("meta"):
        base = FGCLIP()
    assert len(base.state_dict()) == 403
    assert base.text_model.long_context_length == 248
