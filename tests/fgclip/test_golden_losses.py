"""Losses, their gradients and the memory bank against vectors from the official FG-CLIP and from its fork."""

import pytest
import torch

from fgclip import load_clip_weights
from fgclip.losses import PairBank, global_loss, hard_negative_loss, region_loss
from fgclip.model import l2_normalize
from fgclip.objective import FGCLIPLoss

LOSSES = dict(rtol=1e-5, atol=1e-5)
GRADIENTS = dict(rtol=1e-3, atol=5e-5)


def assert_gradients(g, prefix, **tensors):
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, g[f"{prefix}/grad_{name}"], **GRADIENTS, msg=f"{prefix} {name}")


@pytest.mark.parametrize(
    ("prefix", "loss_of", "texts"),
    [(f"g{case}", global_loss, ("text_long", "text_short")) for case in range(2)]
    + [(f"r{case}", region_loss, ("text",)) for case in range(3)]
    + [(f"h{case}", hard_negative_loss, ("text",)) for case in range(2)],
)
def test_loss(golden, prefix, loss_of, texts):
    g = golden("losses")
    own = {name: g[f"{prefix}/{name}"].requires_grad_() for name in ("image", *texts, "logit_scale")}
    total = 0.0
    options = {}
    if loss_of is hard_negative_loss:
        options["counts"] = torch.full((len(own["image"]),), len(own["text"]) // len(own["image"]))
    for name in texts:
        loss = loss_of(own["image"], own[name], own["logit_scale"].exp(), **options)
        torch.testing.assert_close(loss, g[f"{prefix}/{name.replace('text', 'loss')}"], **LOSSES)
        total = total + loss
    total.backward()
    assert_gradients(g, prefix, **own)


def test_total_loss(golden):
    """The fork's padded layout as a batch. Its hard groups have boxes of their own."""
    weights, g = golden("fgclip_features"), golden("fgclip_total_loss")
    c = weights.config
    text = dict(num_attention_heads=c["tha"], eos_token_id=c["eos"])
    config = dict(text_config=text, vision_config=dict(num_attention_heads=c["vha"]))
    model = load_clip_weights(weights.state(), config)
    with torch.no_grad():
        for parameter, value in zip(model.log_scales().values(), g["logit_scales"], strict=True):
            parameter.copy_(value)
    boxes, hard_boxes = (
        [rows[:n] for rows, n in zip(g[f"{kind}_infos"], g[f"{kind}_nums"], strict=True)] for kind in ("box", "hard")
    )
    phrases = torch.cat(
        [rows[: len(b)] for rows, b in zip(g["box_texts"].split(g["box_infos"].shape[1]), boxes, strict=True)]
    )
    count, texts = len(g["text_short"]), torch.cat([g["text_short"], phrases])
    batch = dict(pixels=g["pixel_values"], boxes=boxes, sources=[""] * count, truncated=0, labels=None)
    batch |= dict(short_texts=texts, short_ids=torch.arange(len(texts)), region_labels=None)
    batch |= dict(short=torch.arange(count), region=torch.arange(count, len(texts)))
    batch |= dict(long_texts=g["text_long"], long_ids=torch.arange(count), long=torch.arange(count))
    objective = FGCLIPLoss(model, names=["long", "short", "region"], banks={}, device="cpu")
    objective.begin([batch])
    losses = objective(batch)
    hard_regions = l2_normalize(model.encode_regions(batch["pixels"], hard_boxes))
    hard_texts = l2_normalize(model.encode_text(g["hard_texts"]))
    counts = torch.full((len(hard_regions),), len(hard_texts) // len(hard_regions))
    hard = hard_negative_loss(hard_regions, hard_texts, model.logit_scales()["hard"], counts=counts)
    torch.testing.assert_close(losses["loss_long"] + losses["loss_short"], g["loss_global"], **LOSSES)
    torch.testing.assert_close(losses["loss_region"], g["loss_region"], **LOSSES)
    torch.testing.assert_close(hard, g["loss_hard"], **LOSSES)
    total = losses["loss_long"] + losses["loss_short"] + 0.1 * losses["loss_region"] + 0.5 * hard
    torch.testing.assert_close(total, g["loss_total"], **LOSSES)
    total.backward()
    for name, gradient in g.state("grad/").items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **GRADIENTS, msg=name)


@pytest.mark.parametrize(("name", "classes"), [("single", 1), ("two", 2)])
def test_loss_with_bank(golden, name, classes):
    g = golden(f"memory_bank_{name}_queue")
    for case in range(int(g["nce/n"])):
        prefix = f"nce/{case}"
        bank = PairBank(128, 16, classes=classes)
        # Which of two classes the earlier rows were of is not told, nor does the loss depend on it.
        image, text = g[f"{prefix}/queue_image"], g[f"{prefix}/queue_text"]
        bank.enqueue(image, text, labels=torch.arange(len(image)) % 2)
        names = ("region_image_raw", "region_text_raw", "logit_scale")
        x, y, scale = (g[f"{prefix}/{name}"].requires_grad_() for name in names)
        a, b = l2_normalize(x), l2_normalize(y)
        loss = region_loss(a, b, scale.exp(), bank=bank)
        bank.enqueue(a, b, labels=g[f"{prefix}/labels"])  # before the backward, as any trainer may
        torch.testing.assert_close(loss, g[f"{prefix}/loss_region"].float(), **LOSSES)
        loss.backward()
        assert_gradients(g, prefix, region_image_raw=x, region_text_raw=y, logit_scale=scale)
