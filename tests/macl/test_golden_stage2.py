"""Hard negatives and domain alignment hold to numbers recorded from the system this project follows, where at hand."""

import pytest
import torch
import torch.nn.functional as F

from macl.contrast import hard_negative_loss, hard_negatives
from macl.domain import DomainClassifier, mmd


@pytest.mark.parametrize("golden", ["dhn_select"], indirect=True)
def test_hard_negatives(golden):
    indices = hard_negatives(golden["query"], golden["queue"], int(golden["top_k"]))
    assert torch.equal(indices, golden["indices_desc"])
    golden.close(golden["queue"][indices], "hard_negatives", 0, 1e-12)


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
