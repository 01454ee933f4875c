"""Features and gradients against vectors from Hugging Face's CLIP, OpenAI's CLIP and the official FG-CLIP."""

import pytest
import torch
import torch.nn.functional as F

from fgclip import load_clip_weights
from fgclip.model import l2_normalize
from fgclip.regions import boxes_to_rois
from fgclip.text import stretch_positions
from fgclip.vision import interpolate_positions
from kernels import roi_align_project

OUTPUTS = dict(rtol=1e-4, atol=2e-5)
GRADIENTS = dict(rtol=1e-3, atol=5e-5)


def hugging_face(config):
    return dict(text_config=config["text"], vision_config=config["vision"], projection_dim=config["projection_dim"])


@pytest.mark.parametrize("name", ["hf_clip_a", "hf_clip_b"])
def test_hugging_face_clip(golden, name):
    g = golden(name)
    model = load_clip_weights(g.state(), hugging_face(g.config))
    mask = g["attention_mask"] if g.config["uses_attention_mask"] else None
    image = model.encode_image(g["pixel_values"])
    text = model.encode_text(g["input_ids"], attention_mask=mask)
    logits = model.logit_scale.exp() * l2_normalize(image) @ l2_normalize(text).T
    torch.testing.assert_close(image, g["image_features_unnorm_f64"].float(), **OUTPUTS)
    torch.testing.assert_close(l2_normalize(image), g["image_embeds"], **OUTPUTS)
    torch.testing.assert_close(l2_normalize(text), g["text_embeds"], **OUTPUTS)
    torch.testing.assert_close(logits, g["logits_per_image"], **OUTPUTS)
    if "loss" in g.arrays:
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.testing.assert_close(loss, g["loss"], rtol=1e-5, atol=1e-5)
        for key, gradient in g.state("grad/").items():
            torch.testing.assert_close(model.get_parameter(key).grad, gradient, **GRADIENTS, msg=key)


def test_openai_clip(golden):
    g = golden("openai_clip")
    heads = {f"{t}_config": dict(num_attention_heads=g.config[f"{n}_heads"]) for t, n in TOWERS.items()}
    model = load_clip_weights(g.state(), heads)
    assert model.load_report.notes == ["layout: OpenAI CLIP"] and not model.load_report.skipped
    image, text = model.encode_image(g["pixel_values"]), model.encode_text(g["input_ids"])
    torch.testing.assert_close(image, g["image_features"], **OUTPUTS)
    torch.testing.assert_close(text, g["text_features"], **OUTPUTS)
    torch.testing.assert_close(model.logit_scale, g["sd/logit_scale"])


TOWERS = dict(text="transformer", vision="vision")


def fgclip_config(c):
    text = dict(num_attention_heads=c["tha"], hidden_act=c["act"], eos_token_id=c["eos"])
    return dict(text_config=text, vision_config=dict(num_attention_heads=c["vha"], hidden_act=c["act"]))


@pytest.fixture
def published(golden):
    g = golden("fgclip_features")
    return g, load_clip_weights(g.state(), fgclip_config(g.config))


def test_fgclip_features(published):
    g, model = published
    pixels = g["pixel_values"]
    assert model.load_report.notes == ["layout: FG-CLIP"] and not model.load_report.made
    torch.testing.assert_close(model.encode_image(pixels), g["image_features"], **OUTPUTS)
    torch.testing.assert_close(model.encode_text(g["ids_short"]), g["text_short"], **OUTPUTS)
    torch.testing.assert_close(model.encode_text(g["ids_long"], long=True), g["text_long"], **OUTPUTS)
    torch.testing.assert_close(model.dense_features(pixels).flatten(2).mT, g["dense_features"], **OUTPUTS)
    regions = model.encode_regions(pixels, list(g["boxes_norm"]))
    torch.testing.assert_close(regions, g["roi_features"], **OUTPUTS)


def test_text_positions(golden, published):
    g = golden("pos_embed")
    torch.testing.assert_close(stretch_positions(g["table77"]), g["table248"], rtol=1e-6, atol=1e-6)
    embeddings = load_clip_weights(*_with_tables(published[0], g)).text_model.embeddings
    torch.testing.assert_close(embeddings(g["ids248"], True), g["emb_long"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(embeddings(g["ids77"], False), g["emb_short"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(embeddings(g["ids9"], False), g["emb_short9"], rtol=1e-6, atol=1e-6)


def _with_tables(published, g):
    tables = dict(
        position_embedding=g["table77"],
        position_embedding_res=g["res_trained"],
        position_embedding_ori=g["ori_trained"],
        token_embedding=g["token_embedding"],
    )
    tables = {f"text_model.embeddings.{k}.weight": v for k, v in tables.items()}
    return published.state() | tables, fgclip_config(published.config)


@pytest.mark.parametrize("size", [(6, 6), (8, 7), (3, 5)])
def test_vision_positions(golden, size):
    g = golden("pos_embed")
    table = interpolate_positions(g["vision_table"], size)
    torch.testing.assert_close(table, g[f"vision_interp_{size[0]}x{size[1]}"][0], **OUTPUTS)


@pytest.mark.parametrize("case", range(3))
def test_region_pooling(golden, case):
    g = golden("roi_align")
    features, weight = g[f"c{case}/feature_map"].requires_grad_(), g[f"c{case}/proj_weight"].requires_grad_()
    rois = boxes_to_rois(list(g[f"c{case}/boxes_norm"]), features.shape[-2:])
    torch.testing.assert_close(rois[:, 1:], g[f"c{case}/boxes_feat"].flatten(0, 1), rtol=0, atol=1e-5)
    out = roi_align_project([features], rois, weight, scales=[1.0], output_size=1, sampling_ratio=-1, aligned=True)
    torch.testing.assert_close(out, g[f"c{case}/proj_out"], **OUTPUTS)
    out.backward(g[f"c{case}/proj_cotangent"])
    torch.testing.assert_close(features.grad, g[f"c{case}/proj_grad_feature_map"], **GRADIENTS)
    torch.testing.assert_close(weight.grad, g[f"c{case}/proj_grad_weight"], **GRADIENTS)
