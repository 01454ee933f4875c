"""What averaged detectors fill in: keys of the boxes, and labels of the domain that has none."""

import copy

import pytest
import torch

from macl.backbone import MODALITIES
from macl.teacher import DECAY, UNSURE, KeyEncoder, Labeller

FOUND = {"boxes": torch.tensor([[5.0, 5, 20, 40], [30, 8, 50, 55]]), "labels": torch.tensor([1, 2])}


@pytest.fixture
def taught(build, unequal):
    """A detector in training with hard negatives, and the batch's images and targets."""
    for i, target in enumerate(unequal["targets"]):
        target |= {"scene": torch.tensor(i), "domain": torch.tensor(i % 2)}
    student = build(dhn_size=32, dhn_k=8).double().train()
    return student, {name: unequal[name] for name in MODALITIES}, unequal["targets"]


def test_keys_are_the_averages_embeddings_and_reach_the_loss_and_the_bank(taught):
    student, images, targets = taught
    encoder = KeyEncoder(student)
    average = encoder.average.module
    with torch.no_grad():
        for parameter in average.macl.projector.parameters():
            parameter.normal_()
    filled = encoder(**images, targets=targets)
    assert not average.training and student.training
    with torch.no_grad():
        for i, target in enumerate(filled):
            own = average.extract({name: given[i : i + 1] for name, given in images.items()})
            expected = torch.stack(average.embed(own, [targets[i]["boxes"]]), dim=1)
            torch.testing.assert_close(target["keys"], expected)
            assert target.keys() - targets[i].keys() == {"keys"} and not target["keys"].requires_grad
    student(**images, targets=filled)["loss_macl"].backward()
    assert student.backbone.conv1.weight.grad is not None and all(part.grad is None for part in average.parameters())
    for m, name in enumerate(MODALITIES):
        expected = torch.cat([filled[i]["keys"][:, m] for i in (0, 3, 1, 2)])
        torch.testing.assert_close(student.macl.hard.banks[name].features, expected.float().to(expected))
        assert len(average.macl.hard.banks[name]) == 0


def test_the_average_decays_at_one_rate_from_the_first_step_on(build):
    student, weights = build().double().train(), []
    encoder = KeyEncoder(student)
    for step in range(4):
        with torch.no_grad():
            student.rpn.head.cls_logits.bias.fill_(step)
        encoder.update(student)
        weights.append(encoder.average.module.rpn.head.cls_logits.bias[0].item())
    old, new = DECAY, 1 - DECAY
    expected = [0, new, old * new + 2 * new, old**2 * new + 2 * old * new + 3 * new]
    assert weights == pytest.approx(expected) and not encoder.average.module.training


def test_detections_are_the_labels_of_the_new_domain_and_of_no_other(taught, monkeypatch):
    average, images, targets = taught
    targets[0] |= {"visible_in": torch.ones(1, 2).bool(), "ignore": torch.ones(1).bool()}
    found, asked = FOUND | {"scores": torch.tensor([0.7, 0.6999])}, []
    monkeypatch.setattr(average, "detect", lambda _, given, **options: asked.append(options) or [found] * 4)
    filled = Labeller(average, 0.7)(**images, targets=copy.deepcopy(targets))
    assert asked == [{"score_threshold": UNSURE, "least": UNSURE}] and UNSURE == 0.3 and not average.training
    for before, after in zip(targets, filled, strict=True):
        if before["domain"] == 0:
            assert after["ignore"].tolist() == [False, True]
            before = {**FOUND, "ignore": after["ignore"], "scene": before["scene"], "domain": before["domain"]}
        assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
