"""Hard negatives: which rows of the bank are chosen, what becomes of them, and what the bank holds."""

import math

import pytest
import torch
import torch.nn.functional as F

from macl.contrast import MACLHead, choose, hard_negative_loss, hard_negatives, in_denominator


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


def keys(rows):
    return {"visible": unit(rows, seed=20), "infrared": unit(rows, seed=21)}


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
@pytest.mark.parametrize("given", [True, False])
def test_they_and_the_keys_are_columns_of_one_cross_entropy(direction, given):
    """Loss and every gradient, that of the temperature included, are those of the logits side by side."""
    model, inputs = filled(direction=direction).eval(), [features(6, seed).requires_grad_() for seed in (0, 1)]
    loss, _ = model(*inputs, torch.arange(6), keys(6) if given else None)
    embedded = dict(zip(("visible", "infrared"), map(model.embed, inputs), strict=True))
    columns, expected = keys(6) if given else embedded, []
    for query, key in model.directions:
        hard = (embedded[query] @ model.hard.banks[key].features.T).topk(5).values
        logits = torch.cat([embedded[query] @ columns[key].T, hard], dim=1) / model.temperature
        expected.append(F.cross_entropy(logits, torch.arange(6)))
    results = [loss, torch.stack(expected).mean()]
    torch.testing.assert_close(*results)
    leaves = [*inputs, *model.parameters()]
    torch.testing.assert_close(*[torch.autograd.grad(one, leaves, materialize_grads=True) for one in results])


def test_a_loss_near_zero_keeps_its_precision():
    """One column at e^-70, one hard negative at e^-60: in float32 the loss is their sum, not 0."""
    losses = torch.tensor([math.exp(-70)], requires_grad=True)
    similarity = torch.tensor([[0.4]], requires_grad=True)
    loss = in_denominator(losses, torch.tensor([100.0]), similarity, torch.tensor(0.01))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.exp(-70) + math.exp(-60), rel=1e-4, abs=0)
    assert similarity.grad.item() == pytest.approx(math.exp(-60) / 0.01, rel=1e-4, abs=0)


def test_the_loss_of_their_own_counts_only_rows_that_exist():
    query, bank = unit(3), unit(4, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1:] = True  # one row is left to the first query, all four to the others
    expected = F.softplus((query @ bank.T)[~mask] / 0.1).mean()
    torch.testing.assert_close(hard_negative_loss(query, bank, 10, 0.1, mask), expected)


@pytest.mark.parametrize("case", ["empty bank", "own scene only", "no rows", "one row"])
def test_without_negatives_the_loss_is_the_plain_one(case):
    rows = {"no rows": 0, "one row": 1}.get(case, 4)
    model = filled() if case == "own scene only" else head()
    scenes = torch.arange(rows)
    if case == "own scene only":
        scenes[:] = 7
        for bank in model.hard.banks.values():
            bank.id_buffer.fill_(7)
    inputs = features(rows).requires_grad_(), features(rows, 1).requires_grad_()
    loss, metrics = model(*inputs, scenes, keys(rows))
    torch.testing.assert_close(loss, head(bank_size=0)(*inputs, keys=keys(rows))[0])
    assert rows > 1 or loss == 0
    loss.backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (*model.parameters(), *inputs))
    assert all(value.isfinite() for value in metrics.values())


def test_the_positive_is_never_among_the_negatives():
    """The same people come back in every step, embedded alike in both modalities: a row of theirs would score 1."""
    model, people = head(bank_size=64, hard_k=64), features(8)
    query, scenes = model.embed(people).detach(), torch.arange(8) // 2 + 10  # four scenes of two
    for step in range(4):
        for name in model.hard.banks:
            similarity, exists, _ = model.hard.choose(query, name, scenes)
            assert exists.sum() == 8 * 6 * step  # all rows of the other three scenes, of every step so far
            assert similarity.max() < 1 - 1e-6
        model(people, people, scenes, {"visible": query, "infrared": query})
    assert model.hard.choose(query, "visible", scenes + 50)[0].max().item() == pytest.approx(1)
    model.hard.banks["visible"].id_buffer[:3] = -1
    assert model.hard.choose(query, "visible", torch.full((8,), -1))[1].sum() == 8 * 32  # unknown masks nothing


def test_keys_enter_the_bank_of_their_modality_after_the_loss_and_in_training_only():
    model, scenes, inputs = head(), torch.tensor([4, 4, 6]), (features(3), features(3, 1))
    model.eval()(*inputs, scenes)
    assert [len(bank) for bank in model.hard.banks.values()] == [0, 0]
    loss, _ = model.train()(*inputs, scenes, keys(3))
    torch.testing.assert_close(loss, head(bank_size=0)(*inputs, keys=keys(3))[0])
    for name, bank in model.hard.banks.items():
        assert torch.equal(bank.features, keys(3)[name]) and torch.equal(bank.ids, scenes)
        assert not bank.buffer.requires_grad
    resumed = head()  # a saved bank goes on where it was
    resumed.load_state_dict(model.state_dict())
    again, other = (each(*inputs, scenes + 10, keys(3))[0] for each in (model, resumed))
    assert again > loss  # the positive's own key is now a negative, too
    assert torch.equal(again, other)
    torch.testing.assert_close(model.state_dict(), resumed.state_dict(), rtol=0, atol=0)
    assert set(head(direction="visible_to_infrared").hard.banks) == {"infrared"}
    for lacking in ((None, keys(3)), (scenes, None)):
        with pytest.raises(ValueError, match="scene of every row, and keys of an averaged detector"):
            model(*inputs, *lacking)


def test_a_bank_overwritten_before_the_backward_changes_no_gradient():
    query, gradients = unit(4).requires_grad_(), []
    for overwrite in (False, True):
        bank = unit(6, seed=1)
        similarity, _ = choose(query, bank, 3)
        if overwrite:
            bank.zero_()
        gradients += torch.autograd.grad(similarity.square().sum(), query)
    assert torch.equal(*gradients)


def test_the_metrics_of_hard_negatives():
    model, scenes = filled(14, direction="visible_to_infrared"), torch.tensor([100, 101, 7])
    loss, metrics = model(features(3), features(3, 1), scenes, keys(3))
    similarity = model.embed(features(3)).detach() @ unit(14, seed=10).T
    similarity[0, 0] = similarity[1, 1] = -math.inf
    assert metrics["dhn_fill"].item() == pytest.approx(14 / 20)
    assert metrics["dhn_masked"].item() == pytest.approx(2 / (3 * 14))
    torch.testing.assert_close(metrics["dhn_hardest"], similarity.max(dim=1).values.mean())
    plain, known = head(bank_size=0, direction="visible_to_infrared")(features(3), features(3, 1), keys=keys(3))
    torch.testing.assert_close(metrics["macl_relative"], known["macl_relative"])  # of the batch's own keys alone
    assert loss > plain


def test_autocast_leaves_the_similarities_in_float32():
    cosine = torch.linspace(0.9, 0.901, 20)  # all the same in bfloat16
    bank = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
    model = filled().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = hard_negatives(torch.tensor([[1.0, 0.0]]), bank, 20)
        embedded = model.embed(features(3).float())
        similarity, _, _ = model.hard.choose(embedded, "infrared", torch.full((3,), -1))
    assert indices[0].tolist() == list(range(19, -1, -1)) and similarity.dtype == torch.float32
    expected = (embedded.double() @ model.hard.banks["infrared"].features.double().T).topk(5).values
    torch.testing.assert_close(similarity.double(), expected, atol=1e-6, rtol=0)
