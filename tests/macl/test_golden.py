"""The formulas kept from the system this project follows hold to numbers recorded from it, where those are at hand."""

import pytest
import torch
import torch.nn.functional as F

from macl.backbone import ModalityBatchNorm2d
from macl.contrast import hard_negative_loss, hard_negatives
from macl.domain import DomainClassifier, mmd
from macl.fpn import FPN
from macl.msp import MSPReweight

MACL = {
    **dict.fromkeys(("macl_nonorm_n1", "macl_nonorm_n2", "macl_nonorm_n4", "macl_nonorm_nlarge"), {"norm": "none"}),
    **dict.fromkeys(("macl_gn_n1", "macl_gn_n4", "macl_gn_nlarge"), {"norm": "group", "norm_groups": 4}),
    **dict.fromkeys(("macl_bn_n4", "macl_bn_nlarge", "macl_bn_eval_n1"), {"norm": "batch"}),
    "macl_default_dims_f32": {"norm": "none"},
}


@pytest.mark.parametrize(("golden", "kwargs"), MACL.items(), indirect=["golden"])
def test_macl(golden, kwargs):
    head, visible, infrared = golden.head(**kwargs)
    head.train("eval" not in golden.name)
    loss, _ = head(visible, infrared)
    loss.backward()
    rtol, atol = (2e-4, 2e-6) if loss.dtype == torch.float32 else (1e-5, 2e-6)
    golden.close(loss, "loss_macl", rtol, atol)
    golden.gradients_are_close(head, visible, infrared, rtol, atol)
    golden.all_close(head.projector.state_dict(), "after.proj.", rtol, atol)
    head.eval()
    if kwargs["norm"] != "batch":
        golden.close(head.embed(visible), "emb_vis", rtol, atol)
        golden.close(head.embed(infrared), "emb_ir", rtol, atol)


def load_msp(msp, weights):
    """Two parallel 1x1 convolutions there, their sum here; there the gate is a sigmoid of alpha."""
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(msp.attention, part).copy_(weights[f"conv_avg.{part}"] + weights[f"conv_max.{part}"])
        msp.gate.copy_(torch.sigmoid(weights["alpha"][0]))


def check_maps(golden, module, rtol, atol):
    """Outputs for the recorded inputs, and the gradients of both for the recorded cotangents."""
    inputs = [x.clone().requires_grad_() for x in golden.list("in")]
    outputs = module(inputs)
    sum((out * cot).sum() for out, cot in zip(outputs, golden.list("cot"), strict=True)).backward()
    torch.testing.assert_close(outputs, golden.list("out"), rtol=rtol, atol=atol)
    torch.testing.assert_close([x.grad for x in inputs], golden.list("grad_in"), rtol=rtol, atol=atol)


@pytest.mark.parametrize("golden", ["msp_multilevel", "msp_single_level_neg_alpha"], indirect=True)
def test_msp(golden):
    msp = MSPReweight(golden["in0"].shape[1]).double()
    load_msp(msp, golden.under("w."))
    check_maps(golden, msp, 1e-9, 1e-10)
    slope = msp.gate.detach() * (1 - msp.gate.detach())
    golden.close((msp.gate.grad * slope)[None], "g.alpha", 1e-9, 1e-10)
    for part in ("weight", "bias"):
        golden.close(getattr(msp.attention, part).grad, f"g.conv_avg.{part}", 1e-9, 1e-10)


@pytest.mark.parametrize("golden", ["fpn_plain", "fpn_msp"], indirect=True)
def test_fpn(golden):
    in_channels, channels = [x.shape[1] for x in golden.list("in")], golden["out0"].shape[1]
    msp = MSPReweight(channels) if "w.msp_module.alpha" in golden else None
    fpn = FPN(in_channels=in_channels, out_channels=channels, out_levels=len(golden.list("out")), msp=msp).double()
    convolutions = {f"lateral_convs.{level}.conv": layer for level, layer in enumerate(fpn.inner)}
    convolutions |= {f"fpn_convs.{level}.conv": layer for level, layer in enumerate(fpn.outer)}
    for name, convolution in convolutions.items():
        convolution.load_state_dict(golden.under(f"w.{name}."))
    if msp is not None:
        load_msp(fpn.msp, golden.under("w.msp_module."))
    check_maps(golden, fpn, 1e-8, 1e-9)
    for name, convolution in convolutions.items():
        golden.close(convolution.weight.grad, f"g.{name}.weight", 1e-8, 1e-9)


MODALITY_NORMS = ["man_visible_train", "man_infrared_train", "man_thermal_train", "man_lwir_eval", "man_visible_eval"]


@pytest.mark.parametrize("golden", MODALITY_NORMS, indirect=True)
def test_modality_norm(golden):
    norm = ModalityBatchNorm2d(golden["x"].shape[1]).double().train("train" in golden.name)
    branches = {"bn_vis": norm.visible, "bn_ir": norm.infrared}  # thermal and lwir are infrared
    for name, branch in branches.items():
        branch.load_state_dict(golden.under(f"w.{name}."))
    x = golden["x"].clone().requires_grad_()
    norm.layout = [("visible" if "visible" in golden.name else "infrared", len(x))]
    y = norm(x)
    (y * golden["cot"]).sum().backward()
    golden.close(y, "y", 1e-9, 1e-10)
    golden.close(x.grad, "grad_x", 1e-9, 1e-10)
    for name, branch in branches.items():
        golden.all_close(branch.state_dict(), f"after.{name}.", 1e-9, 1e-10)


@pytest.mark.parametrize("golden", ["dhn_select"], indirect=True)
def test_hard_negatives(golden):
    indices = hard_negatives(golden["query"], golden["queue"], int(golden["top_k"]))
    assert torch.equal(indices, golden["indices_desc"])
    golden.close(golden["queue"][indices], "hard_negatives", 0, 1e-12)


@pytest.mark.parametrize("golden", ["macl_dhn_fixedqueue_a", "macl_dhn_fixedqueue_b"], indirect=True)
def test_contrast_with_a_separate_term_of_hard_negatives(golden):
    queue, k = golden["w.dhn_sampler.queue"], int(golden["top_k"])
    head, visible, infrared = golden.head(norm="none")
    loss, _ = head(visible, infrared)
    hard = hard_negative_loss(head.embed(visible), queue, k, head.temperature)
    golden.close(loss, "loss_pos", 1e-4, 1e-6)
    golden.close(hard, "loss_neg", 1e-4, 1e-6)
    (loss + 0.1 * hard).backward()
    golden.gradients_are_close(head, visible, infrared, 1e-4, 1e-6)

    query = golden["emb_vis"]
    indices = hard_negatives(query, queue, k)
    assert torch.equal(indices, golden["hard_negative_indices_desc"])
    golden.close((query @ queue.T).gather(1, indices), "hard_negative_sims_desc", 1e-9, 1e-12)


CONTRAST_AND_MMD = [
    ("macl_domain_n4", {"norm": "none"}, 0.1, [1.0, 2.0, 4.0]),
    ("macl_domain_nlarge", {"norm": "group", "norm_groups": 4}, 0.08, [0.5, 1.0, 2.0]),
]


@pytest.mark.parametrize(("golden", "kwargs", "weight", "sigmas"), CONTRAST_AND_MMD, indirect=["golden"])
def test_contrast_with_discrepancy(golden, kwargs, weight, sigmas):
    head, visible, infrared = golden.head(**kwargs)
    discrepancy = mmd(head.embed(visible), head.embed(infrared), sigmas)
    golden.close(discrepancy, "loss_domain", 1e-4, 1e-6)
    loss = head(visible, infrared)[0] + weight * discrepancy
    golden.close(loss, "loss_macl", 1e-4, 1e-6)
    loss.backward()
    golden.gradients_are_close(head, visible, infrared, 1e-4, 1e-6)


MMD = [("mmd_unbiased_equal", True, 1.0), ("mmd_unbiased_unequal", True, 0.1), ("mmd_biased", False, 0.5)]


@pytest.mark.parametrize(("golden", "unbiased", "weight"), MMD, indirect=["golden"])
def test_mmd(golden, unbiased, weight):
    x, y = (golden[name].clone().requires_grad_() for name in "xy")
    loss = weight * mmd(x, y, golden["kernels"], unbiased=unbiased)
    loss.backward()
    golden.close(loss, "loss", 1e-8, 1e-10)
    golden.close(x.grad, "grad_x", 1e-8, 1e-10)
    golden.close(y.grad, "grad_y", 1e-8, 1e-10)


@pytest.mark.parametrize("golden", ["domain_classifier_2d", "domain_classifier_4d"], indirect=True)
def test_domain_classifier(golden):
    hidden, in_dim = golden["w.fc.0.weight"].shape
    classifier = DomainClassifier(in_dim, hidden, len(golden["w.fc.3.bias"])).double().eval()
    classifier.fc.load_state_dict(golden.under("w.fc."))
    x = golden["x"].clone().requires_grad_()
    logits = classifier(x, float(golden["lambda"]))
    loss = F.cross_entropy(logits, golden["labels"])
    loss.backward()
    golden.close(logits, "logits", 1e-9, 1e-11)
    golden.close(loss, "loss_ce", 1e-9, 1e-11)
    golden.close(x.grad, "grad_x", 1e-9, 1e-11)
    golden.all_close({name: p.grad for name, p in classifier.fc.named_parameters()}, "g.fc.", 1e-9, 1e-11)
