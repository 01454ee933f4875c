"""Metrics by hand and against sorting, with ties counted as misses."""

import math

import pytest
import torch

from fgclip import metrics
from fgclip.model import l2_normalize
from fgclip.prompts import TEMPLATES, read_templates
from trainkit.errors import InputError


def brute_force_recall(image, text, owner, k):
    scores = image @ text.T
    best = scores.topk(k, dim=1).indices
    to_text = [any(owner[j] == i for j in best[i]) for i in range(len(image))]
    best = scores.T.topk(k, dim=1).indices
    to_image = [owner[j] in best[j] for j in range(len(text))]
    return sum(to_text) / len(to_text), sum(to_image) / len(to_image)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_retrieval_against_sorting(monkeypatch, chunk):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    torch.manual_seed(0)
    owner = torch.cat([torch.arange(10).repeat(2), torch.tensor([3, 3, 7])])[torch.randperm(23)]
    image = l2_normalize(torch.randn(10, 6))
    text = l2_normalize(0.5 * image[owner] + 0.4 * torch.randn(23, 6))
    recall = metrics.retrieval_recall(image, text, owner)
    for k in (1, 5, 10):
        expected = brute_force_recall(image, text, owner, k)
        assert [row[f"R@{k}"] for row in recall.values()] == pytest.approx(expected), k
    assert 0 < recall["text_to_image"]["R@1"] < recall["text_to_image"]["R@5"] < 1


def test_retrieval_ties_are_misses():
    """Features that say nothing retrieve nothing, whatever the order of the rows."""
    same = l2_normalize(torch.ones(4, 3))
    assert metrics.ranks(same, same, torch.arange(4), torch.arange(4)).tolist() == [3] * 4
    image = torch.eye(2)
    text = torch.eye(2)[[0, 0, 1]]  # two right answers for the first image tie with each other: no wrong one
    owner, rows = torch.tensor([0, 0, 1]), torch.arange(2)
    assert not metrics.ranks(image, text, rows, owner).any() and not metrics.ranks(text, image, owner, rows).any()


def test_choice_among_a_variable_number():
    query = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]])
    candidates = torch.tensor(
        [[0.9, 0], [0.8, 0], [0.1, 0.0]]  # hit
        + [[0, 0.5], [0, 0.6]]  # miss
        + [[0.5, 0], [0.1, 0], [0.5, 0], [0, 0]]  # tie: miss
        + [[0.9, 0.1], [0, -0.5]]  # hit
    )
    row = metrics.choice_metrics(query, candidates, torch.tensor([3, 2, 4, 2]))
    assert row == dict(accuracy=0.5, chance=pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4), count=4, negatives=7)


def test_classes():
    features, classes = torch.eye(6)[[0, 0, 0, 1, 2]], torch.eye(6)
    row = metrics.class_metrics(features, classes, torch.tensor([0, 0, 0, 2, 2]))
    assert row == dict(top1=4 / 5, top5=4 / 5, class_mean=(1 + 1 / 2) / 2)  # a tie is a miss
    assert "top5" not in metrics.class_metrics(features, classes[:5], torch.tensor([0, 0, 0, 1, 2]))


def test_effective_rank():
    assert metrics.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert metrics.effective_rank(torch.ones(8, 5)) == pytest.approx(1, abs=1e-6)
    shares = (0.75, 0.25)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert metrics.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_cosines_of_pairs_and_others():
    image = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0]])
    text = torch.tensor([[0.6, 0.8], [0, 1.0], [0.6, 0.8]])
    row = metrics.region_metrics(image, text, torch.tensor([4, 1, 4]), 1.0)
    assert row["cosine"] == pytest.approx((0.6 + 1 + 0.6) / 3)
    assert row["cosine_unmatched"] == pytest.approx((0 + 0.8 + 0.8 + 0) / 4)


@pytest.mark.parametrize(("captions", "expected"), [(180, 131), (40, 39), (1, 0)])
def test_candidates_have_distinct_captions(captions, expected):
    ids = torch.randint(0, captions, (500,), generator=torch.Generator().manual_seed(0)) * 7
    others = metrics.distinct_candidates(ids)
    assert others.shape == (500, expected) and others.equal(metrics.distinct_candidates(ids))
    for own, drawn in zip(ids, ids[others], strict=True):
        assert len(set(drawn.tolist()) - {own.item()}) == expected
    if expected:
        assert len(torch.unique(others)) > 400  # of several regions with a caption it is not always the same


UNITS = torch.eye(200)


def test_regions_that_are_told_apart_and_such_that_are_not():
    ids = torch.arange(200)
    told = metrics.region_metrics(UNITS, UNITS, ids, 10.0)
    assert told["candidates"] == 132 and told["count"] == 200 and told["effective_rank"] == pytest.approx(200)
    assert told["r1"] == told["region_to_text_r1"] == told["text_to_region_r1"] == told["cosine"] == 1
    assert told["loss"] == pytest.approx(math.log(1 + 131 * math.exp(-10)), rel=1e-3)
    same = metrics.region_metrics(UNITS[:1].expand(200, -1), UNITS[:1].expand(200, -1), ids, 10.0)
    assert same["relative"] == pytest.approx(1) and same["r1"] == 0  # a tie is a miss


def test_one_direction_can_fail_alone():
    """Every text is nearest to its region, but all regions are nearest to text 0."""
    row = metrics.region_metrics(l2_normalize(UNITS + 2 * UNITS[0]), UNITS, torch.arange(200), 1.0)
    assert row["text_to_region_r1"] == 1 and row["region_to_text_r1"] < 0.6
    assert row["r1"] == pytest.approx((1 + row["region_to_text_r1"]) / 2)


def test_prompts(tmp_path):
    assert len(set(TEMPLATES)) == len(TEMPLATES) and all(t.count("{}") == 1 for t in TEMPLATES)
    path = tmp_path / "templates.txt"
    path.write_text("a {} here\n\nthe {}\n")
    assert read_templates(path) == ("a {} here", "the {}")
    for content in ("a dog", "{} {}", "\n"):
        path.write_text(content)
        with pytest.raises(InputError, match="templates.txt: expected lines such as .* each with one {}"):
            read_templates(path)
    with pytest.raises(InputError, match="absent.txt"):
        read_templates(tmp_path / "absent.txt")
