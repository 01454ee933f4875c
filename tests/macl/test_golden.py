"""The formulas kept from the system this project follows hold to numbers recorded from it, where those are at hand."""

import math

import pytest
import torch

from macl.backbone import ModalityBatchNorm2d
from macl.contrast import MACLHead
from macl.fpn import FPN
from macl.msp import MSPReweight


def close(found, expected, rtol, atol):
    torch.testing.assert_close(found.detach(), expected, rtol=rtol, atol=atol)


MACL = {
    "macl_nonorm_n1": ("none", {}),
    "macl_nonorm_n2": ("none", {}),
    "macl_nonorm_n4": ("none", {}),
    "macl_nonorm_nlarge": ("none", {}),
    "macl_gn_n1": ("group", {"norm_groups": 4}),
    "macl_gn_n4": ("group", {"norm_groups": 4}),
    "macl_gn_nlarge": ("group", {"norm_groups": 4}),
    "macl_bn_n4": ("batch", {}),
    "macl_bn_nlarge": ("batch", {}),
    "macl_bn_eval_n1": ("batch", {"eval": True}),
    "macl_default_dims_f32": ("none", {}),
}


@pytest.mark.parametrize(
    ("golden", "norm", "options"), [(name, *rest) for name, rest in MACL.items()], indirect=["golden"]
)
def test_macl(golden, norm, options):
    weights = golden.under("w.proj.")
    widths = [w.shape[0] for name, w in weights.items() if name.endswith("weight") and w.dim() == 2]
    single = golden["z_vis"].dtype == torch.float32
    head = MACLHead(
        golden["z_vis"].shape[1],
        tuple(widths[:-1]),
        widths[-1],
        norm=norm,
        norm_groups=options.get("norm_groups", 32),
        direction="visible_to_infrared",
    ).to(golden["z_vis"].dtype)
    head.projector.load_state_dict(weights)
    with torch.no_grad():
        head.log_temperature.fill_(math.log(golden["w.tau"].item()))
    head.train(not options.get("eval", False))
    visible, infrared = (golden[name].clone().requires_grad_() for name in ("z_vis", "z_ir"))
    loss, _ = head(visible, infrared)
    loss.backward()

    rtol, atol = (2e-4, 2e-6) if single else (1e-5, 2e-6)
    close(loss, golden["loss_macl"].to(loss.dtype), rtol, atol)
    close(visible.grad, golden["grad_z_vis"], rtol, atol)
    close(infrared.grad, golden["grad_z_ir"], rtol, atol)
    close(head.log_temperature.grad, (golden["g.tau"] * golden["w.tau"]).to(loss.dtype), rtol * 10, atol)
    gradients = dict(head.projector.named_parameters())
    for name, expected in golden.under("g.proj.").items():
        close(gradients[name].grad, expected, rtol, atol)
    for name, expected in golden.under("g.norm.proj.").items():
        close(gradients[name].grad.norm(), expected.to(loss.dtype), rtol, atol)
    state = head.projector.state_dict()
    for name, expected in golden.under("after.proj.").items():
        close(state[name], expected, rtol, atol)
    head.eval()
    if norm != "batch":
        close(head.embed(golden["z_vis"]), golden["emb_vis"], rtol, atol)
        close(head.embed(golden["z_ir"]), golden["emb_ir"], rtol, atol)


def load_msp(msp, weights):
    """Two parallel 1x1 convolutions there, their sum here; there the gate is a sigmoid of alpha."""
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(msp.attention, part).copy_(weights[f"conv_avg.{part}"] + weights[f"conv_max.{part}"])
        msp.gate.copy_(torch.sigmoid(weights["alpha"][0]))


@pytest.mark.parametrize("golden", ["msp_multilevel", "msp_single_level_neg_alpha"], indirect=True)
def test_msp(golden):
    inputs = [x.clone().requires_grad_() for x in golden.list("in")]
    msp = MSPReweight(inputs[0].shape[1]).double()
    load_msp(msp, golden.under("w."))
    outputs = msp(inputs)
    sum((out * cot).sum() for out, cot in zip(outputs, golden.list("cot"), strict=True)).backward()
    for found, expected in zip(outputs, golden.list("out"), strict=True):
        close(found, expected, 1e-9, 1e-10)
    for found, expected in zip(inputs, golden.list("grad_in"), strict=True):
        close(found.grad, expected, 1e-9, 1e-10)
    slope = msp.gate.detach() * (1 - msp.gate.detach())
    close(msp.gate.grad * slope, golden["g.alpha"][0], 1e-9, 1e-10)
    for part in ("weight", "bias"):
        close(getattr(msp.attention, part).grad, golden[f"g.conv_avg.{part}"], 1e-9, 1e-10)


@pytest.mark.parametrize("golden", ["fpn_plain", "fpn_msp"], indirect=True)
def test_fpn(golden):
    inputs = [x.clone().requires_grad_() for x in golden.list("in")]
    channels = golden["out0"].shape[1]
    with_msp = "w.msp_module.alpha" in golden
    fpn = FPN(
        in_channels=[x.shape[1] for x in inputs],
        out_channels=channels,
        out_levels=len(golden.list("out")),
        msp=MSPReweight(channels) if with_msp else None,
    ).double()
    parts = [("lateral_convs", fpn.inner), ("fpn_convs", fpn.outer)]
    for name, convolutions in parts:
        for level, convolution in enumerate(convolutions):
            convolution.load_state_dict(golden.under(f"w.{name}.{level}.conv."))
    if with_msp:
        load_msp(fpn.msp, golden.under("w.msp_module."))
    outputs = fpn(inputs)
    sum((out * cot).sum() for out, cot in zip(outputs, golden.list("cot"), strict=True)).backward()
    for found, expected in zip(outputs, golden.list("out"), strict=True):
        close(found, expected, 1e-8, 1e-9)
    for found, expected in zip(inputs, golden.list("grad_in"), strict=True):
        close(found.grad, expected, 1e-8, 1e-9)
    for name, convolutions in parts:
        for level, convolution in enumerate(convolutions):
            close(convolution.weight.grad, golden[f"g.{name}.{level}.conv.weight"], 1e-8, 1e-9)


MODALITY_NORMS = ["man_visible_train", "man_infrared_train", "man_thermal_train", "man_lwir_eval", "man_visible_eval"]


@pytest.mark.parametrize(("golden", "name"), [(name, name) for name in MODALITY_NORMS], indirect=["golden"])
def test_modality_norm(golden, name):
    _, modality, mode = name.split("_")
    norm = ModalityBatchNorm2d(golden["x"].shape[1]).double().train(mode == "train")
    branches = {"visible": "bn_vis", "infrared": "bn_ir"}
    for own, theirs in branches.items():
        getattr(norm, own).load_state_dict(golden.under(f"w.{theirs}."))
    x = golden["x"].clone().requires_grad_()
    norm.set_layout([(modality, len(x))])
    y = norm(x)
    (y * golden["cot"]).sum().backward()
    close(y, golden["y"], 1e-9, 1e-10)
    close(x.grad, golden["grad_x"], 1e-9, 1e-10)
    for own, theirs in branches.items():
        for key, expected in golden.under(f"after.{theirs}.").items():
            close(getattr(norm, own).state_dict()[key], expected, 1e-9, 1e-10)
