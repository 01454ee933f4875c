"""Hard negatives and domain alignment hold to numbers recorded from the system this project follows, where at hand."""

import pytest
import torch
import torch.nn.functional as F

from kernels import MemoryBank
from macl.contrast import MACLHead, hard_negative_loss, hard_negatives
from macl.domain import DomainClassifier, gradient_reversal, mmd


@pytest.mark.parametrize("golden", ["dhn_select"], indirect=True)
def test_hard_negatives(golden):
    indices = hard_negatives(golden["query"], golden["queue"], int(golden["top_k"]))
    assert torch.equal(indices, golden["indices_desc"])
    golden.close(golden["queue"][indices], "hard_negatives", 0, 1e-12)


@pytest.mark.parametrize("golden", [f"dhn_enqueue_{case}" for case in ("plain", "exact_fill", "wrap")], indirect=True)
def test_enqueue(golden):
    bank = MemoryBank(*golden["queue_before"].shape, dtype=torch.float64)
    bank.buffer.copy_(golden["queue_before"])
    bank.position.copy_(golden["ptr_before"])
    bank.enqueue(F.normalize(golden["features"], dim=1))
    golden.close(bank.buffer, "queue_after", 0, 1e-7)
    assert bank.position == golden["ptr_after"]


@pytest.mark.parametrize("golden", ["macl_dhn_fixedqueue_a", "macl_dhn_fixedqueue_b"], indirect=True)
def test_contrast_with_a_separate_term_of_hard_negatives(golden):
    queue, k = golden["w.dhn_sampler.queue"], int(golden["top_k"])
    head, visible, infrared = golden.head(norm="none", bank_size=len(queue), hard_k=k, hard_mode="softplus")
    head.hard.banks["infrared"].enqueue(queue, torch.full((len(queue),), 7))
    losses, _, _ = head.compare(visible, infrared, torch.arange(len(visible)) + 100)
    golden.close(losses["loss_macl"], "loss_pos", 1e-4, 1e-6)
    golden.close(losses["loss_dhn"], "loss_neg", 1e-4, 1e-6)
    (losses["loss_macl"] + 0.1 * losses["loss_dhn"]).backward()
    golden.gradients_are_close(head, visible, infrared, 1e-4, 1e-6)

    query = golden["emb_vis"]
    indices = hard_negatives(query, queue, k)
    assert torch.equal(indices, golden["hard_negative_indices_desc"])
    golden.close((query @ queue.T).gather(1, indices), "hard_negative_sims_desc", 1e-9, 1e-12)
    golden.close(hard_negative_loss(query, queue, k, golden["w.tau"]), "loss_neg", 1e-4, 1e-6)


@pytest.mark.parametrize("golden", ["DEFECT_dhn_positive_in_negatives"], indirect=True)
def test_where_the_positive_was_recorded_as_hardest_negative_it_is_none_here(golden):
    """There the batch's own keys were stored first, and came back; here the same calls never see them."""
    before, visible, infrared = golden["queue_before"], golden["z_vis"], golden["z_ir"]
    head = MACLHead(8, (), 8, bank_size=len(before), hard_k=4, direction="visible_to_infrared").double()
    head.projector[0].load_state_dict({"weight": torch.eye(8), "bias": torch.zeros(8)})
    head.hard.banks["infrared"].enqueue(before)
    target = torch.arange(len(visible))
    losses, _, embedded = head.compare(visible, infrared, target)
    query = embedded["visible"].detach()
    hard = (query @ before.T).topk(4, dim=1).values
    logits = torch.cat([query @ embedded["infrared"].T, hard], dim=1) / head.temperature
    torch.testing.assert_close(losses["loss_macl"], F.cross_entropy(logits, target), rtol=1e-9, atol=1e-12)
    positive_first = hard_negatives(query, head.hard.banks["infrared"].buffer, 1)[:, 0] < len(visible)
    assert torch.equal(positive_first, golden["upstream_top1_is_own_positive"])


CONTRAST_AND_MMD = [
    ("macl_domain_n4", {"norm": "none"}, 0.1, [1.0, 2.0, 4.0]),
    ("macl_domain_nlarge", {"norm": "group", "norm_groups": 4}, 0.08, [0.5, 1.0, 2.0]),
]


@pytest.mark.parametrize(("golden", "kwargs", "weight", "sigmas"), CONTRAST_AND_MMD, indirect=["golden"])
def test_contrast_with_discrepancy(golden, kwargs, weight, sigmas):
    head, visible, infrared = golden.head(**kwargs)
    losses, _, embedded = head.compare(visible, infrared)
    discrepancy = mmd(embedded["visible"], embedded["infrared"], sigmas)
    golden.close(discrepancy, "loss_domain", 1e-4, 1e-6)
    loss = losses["loss_macl"] + weight * discrepancy
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


@pytest.mark.parametrize("golden", ["domain_aligner_dict"], indirect=True)
def test_mmd_of_pooled_maps_by_modality(golden):
    maps = golden["fpn_p3"].clone().requires_grad_()
    pooled, infrared = maps.mean(dim=(2, 3)), golden["modality"] == 1
    loss = 0.1 * mmd(pooled[~infrared], pooled[infrared], [1.0, 2.0, 4.0])
    loss.backward()
    golden.close(loss, "loss_domain", 1e-8, 1e-10)
    golden.close(maps.grad, "grad_fpn_p3", 1e-8, 1e-10)


@pytest.mark.parametrize("golden", ["grl"], indirect=True)
def test_gradient_reversal(golden):
    x = golden["x"].clone().requires_grad_()
    y = gradient_reversal(x, float(golden["lambda"]))
    (y * golden["cot"]).sum().backward()
    golden.close(y, "y", 0, 1e-12)
    golden.close(x.grad, "grad_x", 0, 1e-12)


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
