"""Hard negatives and domain alignment hold to numbers recorded from the system this project follows, where at hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import MemoryBank
from macl.contrast import MACLHead, hard_negative_loss, hard_negatives
from macl.domain import DomainClassifier, gradient_reversal, mmd


def close(found, expected, rtol, atol):
    torch.testing.assert_close(found.detach(), expected.to(found.dtype), rtol=rtol, atol=atol)


def head_of(golden, **kwargs):
    """A head with the recorded projector and temperature, and the recorded features as leaves."""
    weights = golden.under("w.proj.")
    widths = [w.shape[0] for name, w in weights.items() if name.endswith("weight") and w.dim() == 2]
    head = MACLHead(
        golden["z_vis"].shape[1], tuple(widths[:-1]), widths[-1], direction="visible_to_infrared", **kwargs
    ).double()
    head.projector.load_state_dict(weights)
    with torch.no_grad():
        head.log_temperature.fill_(math.log(golden["w.tau"].item()))
    return head, *(golden[name].clone().requires_grad_() for name in ("z_vis", "z_ir"))


def check_gradients(golden, head, visible, infrared):
    close(visible.grad, golden["grad_z_vis"], 1e-4, 1e-6)
    close(infrared.grad, golden["grad_z_ir"], 1e-4, 1e-6)
    close(head.log_temperature.grad, golden["g.tau"] * golden["w.tau"], 1e-4, 1e-6)
    for name, parameter in head.projector.named_parameters():
        close(parameter.grad, golden[f"g.proj.{name}"], 1e-4, 1e-6)


@pytest.mark.parametrize("golden", ["dhn_select"], indirect=True)
def test_hard_negatives(golden):
    indices = hard_negatives(golden["query"], golden["queue"], int(golden["top_k"]))
    assert torch.equal(indices, golden["indices_desc"])
    close(golden["queue"][indices], golden["hard_negatives"], 0, 1e-12)


@pytest.mark.parametrize("golden", [f"dhn_enqueue_{case}" for case in ("plain", "exact_fill", "wrap")], indirect=True)
def test_enqueue(golden):
    bank = MemoryBank(*golden["queue_before"].shape, dtype=torch.float64)
    bank.buffer.copy_(golden["queue_before"])
    bank.position.copy_(golden["ptr_before"])
    bank.enqueue(F.normalize(golden["features"], dim=1))
    close(bank.buffer, golden["queue_after"], 0, 1e-7)
    assert bank.position == golden["ptr_after"]


@pytest.mark.parametrize("golden", ["macl_dhn_fixedqueue_a", "macl_dhn_fixedqueue_b"], indirect=True)
def test_contrast_with_a_separate_term_of_hard_negatives(golden):
    queue, k = golden["w.dhn_sampler.queue"], int(golden["top_k"])
    head, visible, infrared = head_of(golden, norm="none", bank_size=len(queue), hard_k=k, hard_mode="softplus")
    head.hard.banks["infrared"].enqueue(queue, torch.full((len(queue),), 7))
    scenes = torch.arange(len(visible)) + 100
    losses = head.compare(visible, infrared, scenes).losses
    close(losses["loss_macl"], golden["loss_pos"], 1e-4, 1e-6)
    close(losses["loss_dhn"], golden["loss_neg"], 1e-4, 1e-6)
    (losses["loss_macl"] + 0.1 * losses["loss_dhn"]).backward()
    check_gradients(golden, head, visible, infrared)

    query = golden["emb_vis"]
    indices = hard_negatives(query, queue, k)
    assert torch.equal(indices, golden["hard_negative_indices_desc"])
    close((query @ queue.T).gather(1, indices), golden["hard_negative_sims_desc"], 1e-9, 1e-12)
    close(hard_negative_loss(query, queue, k, golden["w.tau"]), golden["loss_neg"], 1e-4, 1e-6)


@pytest.mark.parametrize("golden", ["DEFECT_dhn_positive_in_negatives"], indirect=True)
def test_where_the_positive_was_recorded_as_hardest_negative_it_is_none_here(golden):
    """There the batch's own keys were stored first, and came back; here the same calls never see them."""
    before, visible, infrared = golden["queue_before"], golden["z_vis"], golden["z_ir"]
    head = MACLHead(8, (), 8, bank_size=len(before), hard_k=4, direction="visible_to_infrared").double()
    with torch.no_grad():
        head.projector[0].weight.copy_(torch.eye(8))
        head.projector[0].bias.zero_()
    head.hard.banks["infrared"].enqueue(before)
    found = head.compare(visible, infrared, torch.arange(len(visible)))
    scale = 1 / head.temperature.detach()
    in_batch = found.visible @ found.infrared.T * scale
    hard = (found.visible @ before.T * scale).topk(4, dim=1).values
    expected = F.cross_entropy(torch.cat([in_batch, hard], dim=1), torch.arange(len(visible)))
    close(found.losses["loss_macl"], expected.detach(), 1e-9, 1e-12)
    stored = head.hard.banks["infrared"].buffer
    assert torch.equal(
        hard_negatives(found.visible, stored, 1)[:, 0] < len(visible), golden["upstream_top1_is_own_positive"]
    )


CONTRAST_AND_MMD = {
    "macl_domain_n4": ({"norm": "none"}, 0.1, [1.0, 2.0, 4.0]),
    "macl_domain_nlarge": ({"norm": "group", "norm_groups": 4}, 0.08, [0.5, 1.0, 2.0]),
}


@pytest.mark.parametrize(
    ("golden", "kwargs", "weight", "sigmas"),
    [(name, *rest) for name, rest in CONTRAST_AND_MMD.items()],
    indirect=["golden"],
)
def test_contrast_with_discrepancy(golden, kwargs, weight, sigmas):
    head, visible, infrared = head_of(golden, **kwargs)
    found = head.compare(visible, infrared)
    discrepancy = mmd(found.visible, found.infrared, sigmas)
    close(discrepancy, golden["loss_domain"], 1e-4, 1e-6)
    loss = found.losses["loss_macl"] + weight * discrepancy
    close(loss, golden["loss_macl"], 1e-4, 1e-6)
    loss.backward()
    check_gradients(golden, head, visible, infrared)


MMD = {"mmd_unbiased_equal": (True, 1.0), "mmd_unbiased_unequal": (True, 0.1), "mmd_biased": (False, 0.5)}


@pytest.mark.parametrize(
    ("golden", "unbiased", "weight"), [(name, *rest) for name, rest in MMD.items()], indirect=["golden"]
)
def test_mmd(golden, unbiased, weight):
    x, y = (golden[name].clone().requires_grad_() for name in "xy")
    loss = weight * mmd(x, y, golden["kernels"], unbiased=unbiased)
    loss.backward()
    close(loss, golden["loss"], 1e-8, 1e-10)
    close(x.grad, golden["grad_x"], 1e-8, 1e-10)
    close(y.grad, golden["grad_y"], 1e-8, 1e-10)


@pytest.mark.parametrize("golden", ["domain_aligner_dict"], indirect=True)
def test_mmd_of_pooled_maps_by_modality(golden):
    maps = golden["fpn_p3"].clone().requires_grad_()
    pooled, infrared = maps.mean(dim=(2, 3)), golden["modality"] == 1
    loss = 0.1 * mmd(pooled[~infrared], pooled[infrared], [1.0, 2.0, 4.0])
    loss.backward()
    close(loss, golden["loss_domain"], 1e-8, 1e-10)
    close(maps.grad, golden["grad_fpn_p3"], 1e-8, 1e-10)


@pytest.mark.parametrize("golden", ["grl"], indirect=True)
def test_gradient_reversal(golden):
    x = golden["x"].clone().requires_grad_()
    y = gradient_reversal(x, float(golden["lambda"]))
    (y * golden["cot"]).sum().backward()
    close(y, golden["y"], 0, 1e-12)
    close(x.grad, golden["grad_x"], 0, 1e-12)


@pytest.mark.parametrize("golden", ["domain_classifier_2d", "domain_classifier_4d"], indirect=True)
def test_domain_classifier(golden):
    hidden, in_dim = golden["w.fc.0.weight"].shape
    classifier = DomainClassifier(in_dim, hidden, len(golden["w.fc.3.bias"])).double().eval()
    classifier.fc.load_state_dict(golden.under("w.fc."))
    x = golden["x"].clone().requires_grad_()
    logits = classifier(x, float(golden["lambda"]))
    loss = F.cross_entropy(logits, golden["labels"])
    loss.backward()
    close(logits, golden["logits"], 1e-9, 1e-11)
    close(loss, golden["loss_ce"], 1e-9, 1e-11)
    close(x.grad, golden["grad_x"], 1e-9, 1e-11)
    for name, parameter in classifier.fc.named_parameters():
        close(parameter.grad, golden[f"g.fc.{name}"], 1e-9, 1e-11)
