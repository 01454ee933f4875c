"""Hard negatives: which rows of the bank are chosen, what becomes of them, and what the bank holds."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from macl.contrast import HARD_MODES, HardNegatives, MACLHead, hard_negative_loss, hard_negatives
from macl.hard_negatives import Chosen, choose, in_denominator


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


def state_of(hard):
    return {name: value.clone() for name, value in hard.state_dict().items()}


def test_the_hardest_rows_come_first_and_masked_ones_never():
    query, bank = unit(4), unit(9, seed=1)
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    indices = hard_negatives(query, bank, 20, mask)
    assert indices.shape == (4, 9)
    for row, allowed, similarity in zip(indices, ~mask, query @ bank.T, strict=True):
        expected = [i for i in similarity.argsort(descending=True).tolist() if allowed[i]]
        assert row.tolist() == expected + [-1] * (9 - len(expected))
    assert torch.equal(hard_negatives(query, bank, 3), (query @ bank.T).topk(3).indices)
    assert hard_negatives(query[:0], bank, 3).shape == (0, 3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        hard_negatives(query, bank, 0)


@pytest.mark.parametrize("direction", ["both", "visible_to_infrared"])
def test_in_the_denominator_they_are_columns_of_one_cross_entropy(direction):
    """Loss and every gradient, that of the temperature included, are those of the logits laid side by side."""
    model, visible, infrared = (
        filled(direction=direction),
        features(6).requires_grad_(),
        features(6, 1).requires_grad_(),
    )
    twin = copy.deepcopy(model)
    found = model.compare(visible, infrared, torch.arange(6))
    assert set(found.losses) == {"loss_macl"}
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(found.losses["loss_macl"], [visible, infrared, *parameters.values()])

    embedded = {"visible": twin.embed(visible), "infrared": twin.embed(infrared)}
    expected = []
    for query, key in twin.directions:
        rows = twin.hard.banks[key].features
        hard = (embedded[query] @ rows.T).topk(5).values
        logits = torch.cat([embedded[query] @ embedded[key].T, hard], dim=1) / twin.temperature
        expected.append(F.cross_entropy(logits, torch.arange(6)))
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(found.losses["loss_macl"], expected)
    wanted = torch.autograd.grad(expected, [visible, infrared, *dict(twin.named_parameters()).values()])
    for name, own, other in zip(["visible", "infrared", *parameters], gradients, wanted, strict=True):
        torch.testing.assert_close(own, other, msg=lambda text, name=name: f"{name}: {text}")


def test_a_loss_near_zero_keeps_its_precision():
    """One column at e^-70, one hard negative at e^-60: in float32 the loss is their sum, not 0."""
    losses = torch.tensor([math.exp(-70)], requires_grad=True)
    similarity = torch.tensor([[0.4]], requires_grad=True)
    chosen = Chosen(similarity, torch.tensor([[True]]))
    loss = in_denominator(losses, torch.tensor([100.0]), chosen, torch.tensor(0.01))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.exp(-70) + math.exp(-60), rel=1e-4, abs=0)
    assert similarity.grad.item() == pytest.approx(math.exp(-60) / 0.01, rel=1e-4, abs=0)


def test_the_separate_term_is_the_mean_softplus_of_what_was_chosen():
    model, visible, infrared = filled(hard_mode="softplus"), features(6), features(6, 1)
    found = model.compare(visible, infrared, torch.arange(6))
    plain = head(bank_size=0).compare(visible, infrared)
    torch.testing.assert_close(found.losses["loss_macl"], plain.losses["loss_macl"])
    expected = [
        F.softplus((query @ model.hard.banks[name].features[:14].T).topk(5).values / 0.07).mean()
        for query, name in ((found.visible, "infrared"), (found.infrared, "visible"))
    ]
    torch.testing.assert_close(found.losses["loss_dhn"], torch.stack(expected).mean())


def test_the_separate_term_counts_only_rows_that_exist():
    query, bank = unit(3), unit(4, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1:] = True  # one row is left to the first query, all four to the others
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    similarity = query @ bank.T
    expected = torch.cat([similarity[0, :1], similarity[1:].flatten()]).div(0.1)
    loss = hard_negative_loss(query, bank, 10, temperature, mask)
    torch.testing.assert_close(loss, F.softplus(expected).mean())
    loss.backward()
    torch.testing.assert_close(temperature.grad, (-torch.sigmoid(expected) * expected / 0.1).mean())


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
    found = model.compare(visible, infrared, scenes)
    torch.testing.assert_close(found.losses["loss_macl"], head(bank_size=0)(visible, infrared)[0])
    assert found.losses.get("loss_dhn", 0) == 0
    sum(found.losses.values()).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.isfinite(parameter.grad).all() for parameter in (*trained, visible, infrared))
    assert all(value.isfinite() for value in found.statistics.values())


def test_the_positive_is_never_among_the_negatives():
    """The same people come back in every step, embedded alike in both modalities: a row of theirs would score 1."""
    model = head(bank_size=64, hard_k=64)
    people = features(8)
    for step in range(4):
        scenes = torch.arange(8) // 2 + 10  # four scenes of two
        query = model.embed(people)
        for name in model.hard.banks:
            chosen, _ = model.hard.choose(query, name, scenes)
            assert chosen.found.sum() == 8 * 6 * step  # all rows of the other three scenes, of every step so far
            assert chosen.similarity.max() < 1 - 1e-6
        model.compare(people, people, scenes)
    assert model.hard.choose(query, "visible", scenes + 50)[0].similarity.max().item() == pytest.approx(1)
    assert (model.hard.choose(query, "visible", torch.full((8,), -1))[0].found.sum(dim=1) == 32).all()


def test_unknown_scenes_mask_nothing():
    model = head()
    model.compare(features(3), features(3, 1), torch.tensor([-1, -1, 4]))
    chosen, _ = model.hard.choose(unit(3), "visible", torch.tensor([-1, 4, 9]))
    assert chosen.found.sum(dim=1).tolist() == [3, 2, 3]


def test_only_the_newest_rows_take_part():
    model = head(bank_size=6, hard_k=6)
    bank = model.hard.banks["visible"]
    rows = unit(9, seed=3)
    for first, stop in ((0, 4), (4, 9)):  # the second batch wraps around
        bank.enqueue(rows[first:stop])
        for active in (1, 3, 6):
            model.hard.active = active
            chosen, _ = model.hard.choose(rows, "visible", torch.full((9,), -1))
            in_use = rows[max(0, stop - min(active, 6)) : stop]
            expected = (rows @ in_use.T).sort(dim=1, descending=True).values
            torch.testing.assert_close(chosen.similarity[:, : len(in_use)], expected)
            assert (chosen.found.sum(dim=1) == len(in_use)).all()


def test_rows_enter_the_bank_of_their_modality_after_the_loss_and_in_training_only():
    model, visible, infrared, scenes = head(), features(3), features(3, 1), torch.tensor([4, 4, 6])
    model.eval().compare(visible, infrared, scenes)
    assert [len(bank) for bank in model.hard.banks.values()] == [0, 0]
    found = model.train().compare(visible, infrared, scenes)
    torch.testing.assert_close(found.losses["loss_macl"], head(bank_size=0)(visible, infrared)[0])
    for name, embedded in (("visible", found.visible), ("infrared", found.infrared)):
        bank = model.hard.banks[name]
        assert torch.equal(bank.features, embedded.detach()) and not bank.buffer.requires_grad
        assert torch.equal(bank.ids, scenes)
    again = model.compare(visible, infrared, scenes + 10)
    assert again.losses["loss_macl"] > found.losses["loss_macl"]  # the hardest negative is now the positive's twin
    assert set(head(direction="visible_to_infrared").hard.banks) == {"infrared"}
    with pytest.raises(ValueError, match="scene of every row"):
        model.compare(visible, infrared)


def test_a_bank_overwritten_before_the_backward_changes_no_gradient():
    query, gradients = unit(4).requires_grad_(), []
    for overwrite in (False, True):
        bank = unit(6, seed=1)
        similarity = choose(query, bank, 3).similarity
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
    before = copy.deepcopy(dict(keys.named_parameters()))
    model.compare(features(3), features(3, 1), torch.arange(3))
    assert not keys.training
    for (name, own), live in zip(keys.named_parameters(), model.projector.parameters(), strict=True):
        torch.testing.assert_close(own, before[name] * 0.9 + live * 0.1)
        assert own.grad is None
    torch.testing.assert_close(keys[1].running_mean, model.projector[1].running_mean)
    expected = F.normalize(keys(features(3)), dim=1)
    torch.testing.assert_close(model.hard.banks["visible"].features, expected)
    assert "key_projector.0.weight" in state_of(model.hard)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_saved_bank_goes_on_where_it_was(momentum):
    model, again = (head(hard_momentum=momentum, norm="layer") for _ in range(2))
    model.compare(features(3), features(3, 1), torch.arange(3))
    again.load_state_dict(model.state_dict())
    losses = [m.compare(features(4, 2), features(4, 3), torch.arange(4)).losses["loss_macl"] for m in (model, again)]
    assert torch.equal(*losses)
    for name, value in state_of(model.hard).items():
        assert torch.equal(value, again.hard.state_dict()[name]), name


def test_what_the_log_says():
    model = filled(14, direction="visible_to_infrared")
    scenes = torch.tensor([100, 101, 7])
    found = model.compare(features(3), features(3, 1), scenes)
    similarity = found.visible @ unit(14, seed=10).T
    similarity[0, 0] = similarity[1, 1] = -math.inf
    said = found.statistics
    assert said["dhn_fill"].item() == pytest.approx(14 / 20)
    assert said["dhn_masked"].item() == pytest.approx(2 / (3 * 14))
    torch.testing.assert_close(said["dhn_hardest"], similarity.max(dim=1).values.mean().detach())
    plain, known = head(bank_size=0, direction="visible_to_infrared")(features(3), features(3, 1))
    torch.testing.assert_close(said["macl_relative"], known["macl_relative"])  # of the batch's own keys alone
    assert found.losses["loss_macl"] > plain


def test_autocast_leaves_the_similarities_in_float32():
    cosine = torch.linspace(0.9, 0.901, 20)  # all the same in bfloat16
    bank = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = hard_negatives(torch.tensor([[1.0, 0.0]]), bank, 20)
    assert indices[0].tolist() == list(range(19, -1, -1))
    torch.manual_seed(0)
    model = MACLHead(12, (10,), 8, bank_size=20, hard_k=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.compare(features(3).float(), features(3, 1).float(), torch.arange(3))
        chosen, _ = model.hard.choose(found.visible, "infrared", torch.full((3,), -1))
    assert chosen.similarity.dtype == torch.float32
    similarity = found.visible.double() @ model.hard.banks["infrared"].features.double().T
    torch.testing.assert_close(
        chosen.similarity[:, :3].double(), similarity.sort(descending=True).values, atol=1e-6, rtol=0
    )


def test_values_that_make_no_sense_are_refused():
    for wrong, said in (
        ({"mode": "numerator"}, "numerator"),
        ({"k": 0}, "0 hard negatives"),
        ({"k": 9}, "9 hard negatives from a bank of 8 rows"),
        ({"momentum": 1.0}, "momentum 1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            HardNegatives(torch.nn.Linear(4, 4), **{"size": 8, "dim": 4, "k": 4} | wrong)
