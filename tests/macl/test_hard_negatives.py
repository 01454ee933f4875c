"""Hard negatives: which rows of the bank are chosen, what becomes of them, and what the bank holds."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from macl.contrast import HARD_MODES, MACLHead, choose, hard_negative_loss, hard_negatives, in_denominator


def features(rows, seed=0):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows, seed=0, dim=8):
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def head(**kwargs):
    torch.manual_seed(0)
    return MACLHead(12, (10,), 8, **{"bank_size": 20, "hard_k": 5} | kwargs).double()


def filled(rows=14, **kwargs):
    """A head whose banks hold `rows` rows, row i of scene 100 + i."""
    model = head(**kwargs)
    for i, bank in enumerate(model.hard.banks.values()):
        bank.enqueue(unit(rows, seed=10 + i), torch.arange(rows) + 100)
    return model


def test_the_hardest_rows_come_first_and_masked_ones_never():
    query, bank = unit(4), unit(9, seed=1)
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    indices = hard_negatives(query, bank, 20, mask)
    assert indices.shape == (4, 9)
    for row, allowed, similarity in zip(indices, ~mask, query @ bank.T, strict=True):
        expected = [i for i in similarity.argsort(descending=True).tolist() if allowed[i]]
        assert row.tolist() == expected + [-1] * (9 - len(expected))
    assert hard_negatives(query[:0], bank, 3).shape == (0, 3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        hard_negatives(query, bank, 0)


@pytest.mark.parametrize("direction", ["both", "visible_to_infrared"])
def test_in_the_denominator_they_are_columns_of_one_cross_entropy(direction):
    """Loss and every gradient, that of the temperature included, are those of the logits side by side."""
    model, inputs = filled(direction=direction).eval(), [features(6, seed).requires_grad_() for seed in (0, 1)]
    losses, _, _ = model.compare(*inputs, torch.arange(6))
    assert set(losses) == {"loss_macl"}
    embedded = dict(zip(("visible", "infrared"), map(model.embed, inputs), strict=True))
    expected = []
    for query, key in model.directions:
        hard = (embedded[query] @ model.hard.banks[key].features.T).topk(5).values
        logits = torch.cat([embedded[query] @ embedded[key].T, hard], dim=1) / model.temperature
        expected.append(F.cross_entropy(logits, torch.arange(6)))
    results = [losses["loss_macl"], torch.stack(expected).mean()]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(loss, [*inputs, *model.parameters()]) for loss in results])


def test_a_loss_near_zero_keeps_its_precision():
    """One column at e^-70, one hard negative at e^-60: in float32 the loss is their sum, not 0."""
    losses = torch.tensor([math.exp(-70)], requires_grad=True)
    similarity = torch.tensor([[0.4]], requires_grad=True)
    loss = in_denominator(losses, torch.tensor([100.0]), similarity, torch.tensor(0.01))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.exp(-70) + math.exp(-60), rel=1e-4, abs=0)
    assert similarity.grad.item() == pytest.approx(math.exp(-60) / 0.01, rel=1e-4, abs=0)


def test_the_separate_term_is_the_mean_softplus_of_the_chosen_rows():
    model, visible, infrared = filled(hard_mode="softplus").eval(), features(6), features(6, 1)
    losses, _, embedded = model.compare(visible, infrared, torch.arange(6))
    torch.testing.assert_close(losses["loss_macl"], head(bank_size=0)(visible, infrared)[0])
    expected = [
        F.softplus((embedded[query] @ model.hard.banks[key].features.T).topk(5).values / 0.07).mean()
        for query, key in model.directions
    ]
    torch.testing.assert_close(losses["loss_dhn"], torch.stack(expected).mean())


def test_the_separate_term_counts_only_rows_that_exist():
    query, bank = unit(3), unit(4, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1:] = True  # one row is left to the first query, all four to the others
    expected = F.softplus((query @ bank.T)[~mask] / 0.1).mean()
    torch.testing.assert_close(hard_negative_loss(query, bank, 10, 0.1, mask), expected)


@pytest.mark.parametrize("mode", HARD_MODES)
@pytest.mark.parametrize("case", ["empty bank", "own scene only", "none in use", "no rows", "one row"])
def test_without_negatives_the_loss_is_the_plain_one(mode, case):
    rows = {"no rows": 0, "one row": 1}.get(case, 4)
    model = head(hard_mode=mode) if case in ("empty bank", "one row") else filled(hard_mode=mode)
    scenes = torch.arange(rows)
    if case == "own scene only":
        scenes[:] = 7
        for bank in model.hard.banks.values():
            bank.id_buffer.fill_(7)
    model.hard.active = 0 if case == "none in use" else 20
    visible, infrared = features(rows).requires_grad_(), features(rows, 1).requires_grad_()
    losses, metrics, _ = model.compare(visible, infrared, scenes)
    torch.testing.assert_close(losses["loss_macl"], head(bank_size=0)(visible, infrared)[0])
    assert losses.get("loss_dhn", 0) == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (*model.parameters(), visible, infrared))
    assert all(value.isfinite() for value in metrics.values())


def test_the_positive_is_never_among_the_negatives():
    """The same people come back in every step, embedded alike in both modalities: a row of theirs would score 1."""
    model, people = head(bank_size=64, hard_k=64), features(8)
    query, scenes = model.embed(people), torch.arange(8) // 2 + 10  # four scenes of two
    for step in range(4):
        for name in model.hard.banks:
            similarity, exists, _ = model.hard.choose(query, name, scenes)
            assert exists.sum() == 8 * 6 * step  # all rows of the other three scenes, of every step so far
            assert similarity.max() < 1 - 1e-6
        model.compare(people, people, scenes)
    assert model.hard.choose(query, "visible", scenes + 50)[0].max().item() == pytest.approx(1)
    model.hard.banks["visible"].id_buffer[:3] = -1
    assert model.hard.choose(query, "visible", torch.full((8,), -1))[1].sum() == 8 * 32  # unknown masks nothing


def test_only_the_newest_rows_take_part():
    model = head(bank_size=6, hard_k=6)
    bank, rows = model.hard.banks["visible"], unit(9, seed=3)
    for first, stop in ((0, 4), (4, 9)):  # the second batch wraps around
        bank.enqueue(rows[first:stop])
        for active in (1, 3, 6):
            model.hard.active = active
            similarity, exists, _ = model.hard.choose(rows, "visible", torch.full((9,), -1))
            in_use = rows[max(0, stop - active) : stop]
            expected = (rows @ in_use.T).sort(dim=1, descending=True).values
            torch.testing.assert_close(similarity[:, : len(in_use)], expected)
            assert (exists.sum(dim=1) == len(in_use)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_enter_the_bank_of_their_modality_after_the_loss_and_in_training_only(momentum):
    model, scenes = head(hard_momentum=momentum), torch.tensor([4, 4, 6])
    inputs = features(3), features(3, 1)
    model.eval().compare(*inputs, scenes)
    assert [len(bank) for bank in model.hard.banks.values()] == [0, 0]
    losses, _, embedded = model.train().compare(*inputs, scenes)
    torch.testing.assert_close(losses["loss_macl"], head(bank_size=0)(*inputs)[0])
    for name, bank in model.hard.banks.items():
        torch.testing.assert_close(bank.features, embedded[name].detach(), rtol=0, atol=1e-15)
        assert torch.equal(bank.ids, scenes) and not bank.buffer.requires_grad
    resumed = head(hard_momentum=momentum)  # a saved bank goes on where it was
    resumed.load_state_dict(model.state_dict())
    again, other = (each.compare(*inputs, scenes + 10)[0]["loss_macl"] for each in (model, resumed))
    assert again > losses["loss_macl"]  # the hardest negative is now the positive's twin
    assert torch.equal(again, other)
    assert set(head(direction="visible_to_infrared").hard.banks) == {"infrared"}
    with pytest.raises(ValueError, match="scene of every row"):
        model.compare(*inputs)


def test_a_bank_overwritten_before_the_backward_changes_no_gradient():
    query, gradients = unit(4).requires_grad_(), []
    for overwrite in (False, True):
        bank = unit(6, seed=1)
        similarity, _ = choose(query, bank, 3)
        if overwrite:
            bank.zero_()
        gradients += torch.autograd.grad(similarity.square().sum(), query)
    assert torch.equal(*gradients)


def test_the_key_projector_follows_slowly_and_makes_the_rows():
    model = head(hard_momentum=0.9, dropout=0.5, norm="batch").train()
    keys = model.hard.key_projector
    assert not any(parameter.requires_grad for parameter in keys.parameters())
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(1.0)
        model.projector[1].running_mean.add_(3.0)
    before = copy.deepcopy(list(keys.parameters()))
    model.compare(features(3), features(3, 1), torch.arange(3))
    for average, old, live in zip(keys.parameters(), before, model.projector.parameters(), strict=True):
        torch.testing.assert_close(average, old * 0.9 + live * 0.1)
    torch.testing.assert_close(keys[1].running_mean, model.projector[1].running_mean)
    expected = F.normalize(keys.eval()(features(3)), dim=1)  # without dropout
    torch.testing.assert_close(model.hard.banks["visible"].features, expected)
    assert "hard.key_projector.0.weight" in model.state_dict()


def test_the_metrics_of_hard_negatives():
    model, scenes = filled(14, direction="visible_to_infrared"), torch.tensor([100, 101, 7])
    losses, metrics, embedded = model.compare(features(3), features(3, 1), scenes)
    similarity = embedded["visible"].detach() @ unit(14, seed=10).T
    similarity[0, 0] = similarity[1, 1] = -math.inf
    assert metrics["dhn_fill"].item() == pytest.approx(14 / 20)
    assert metrics["dhn_masked"].item() == pytest.approx(2 / (3 * 14))
    torch.testing.assert_close(metrics["dhn_hardest"], similarity.max(dim=1).values.mean())
    plain, known = head(bank_size=0, direction="visible_to_infrared")(features(3), features(3, 1))
    torch.testing.assert_close(metrics["macl_relative"], known["macl_relative"])  # of the batch's own keys alone
    assert losses["loss_macl"] > plain


def test_autocast_leaves_the_similarities_in_float32():
    cosine = torch.linspace(0.9, 0.901, 20)  # all the same in bfloat16
    bank = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
    model = head(hard_k=20).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = hard_negatives(torch.tensor([[1.0, 0.0]]), bank, 20)
        _, _, embedded = model.compare(features(3).float(), features(3, 1).float(), torch.arange(3))
        similarity, _, _ = model.hard.choose(embedded["visible"], "infrared", torch.full((3,), -1))
    assert indices[0].tolist() == list(range(19, -1, -1)) and similarity.dtype == torch.float32
    exact = embedded["visible"].double() @ model.hard.banks["infrared"].features.double().T
    expected = exact.sort(descending=True).values
    torch.testing.assert_close(similarity[:, :3].double(), expected, atol=1e-6, rtol=0)
