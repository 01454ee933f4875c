"""Metrics by hand and against sorting, with ties counted as misses."""

import math

import pytest
import torch

from fgclip import metrics
from fgclip.model import unit
from fgclip.prompts import PHOTO, TEMPLATES, class_embeddings, class_prompts, read_templates
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
    image = unit(torch.randn(10, 6))
    text = unit(0.5 * image[owner] + 0.4 * torch.randn(23, 6))
    recall = metrics.retrieval_recall(image, text, owner)
    for k in (1, 5, 10):
        expected = brute_force_recall(image, text, owner, k)
        found = recall[f"image_to_text_R@{k}"], recall[f"text_to_image_R@{k}"]
        assert found == pytest.approx(expected), k
    assert 0 < recall["text_to_image_R@1"] < recall["text_to_image_R@5"] < 1


def test_retrieval_ties_are_misses():
    """Features that say nothing retrieve nothing, whatever the order of the rows."""
    same = unit(torch.ones(4, 3))
    recall = metrics.retrieval_recall(same, same, torch.arange(4), ks=(1, 3, 4))
    assert list(recall.values()) == [0, 0, 1, 0, 0, 1]
    image = torch.eye(2)
    text = torch.eye(2)[[0, 0, 1]]  # two right answers for the first image tie with each other: no wrong one
    ranks = metrics.retrieval_ranks(image, text, torch.tensor([0, 0, 1]))
    assert [r.tolist() for r in ranks] == [[0, 0], [0, 0, 0]]


def test_retrieval_refuses_what_it_cannot_rank():
    image = torch.eye(2)
    with pytest.raises(ValueError, match="each of the 2 images"):
        metrics.retrieval_ranks(image, image, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="not finite"):
        metrics.retrieval_ranks(image, torch.tensor([[0.0, 1], [torch.nan, 0]]), torch.tensor([0, 1]))


def test_choice_among_a_variable_number():
    query = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]])
    candidates = torch.tensor(
        [[0.9, 0], [0.8, 0], [0.1, 0.0]]  # hit
        + [[0, 0.5], [0, 0.6]]  # miss
        + [[0.5, 0], [0.1, 0], [0.5, 0], [0, 0]]  # tie: miss
        + [[0.9, 0.1], [0, -0.5]]  # hit
    )
    counts = torch.tensor([3, 2, 4, 2])
    assert metrics.choice_hits(query, candidates, counts).tolist() == [True, False, False, True]
    assert metrics.choice_accuracy(query, candidates, counts) == 0.5
    for bad in ([3, 2, 4, 1], [11, 0, 0, 0], [3, 2, 4, 1, 1], [10, 1, 0, 0]):
        with pytest.raises(ValueError, match="sum to 11"):
            metrics.choice_hits(query, candidates, torch.tensor(bad))
    with pytest.raises(ValueError, match="not finite"):
        metrics.choice_hits(query * torch.nan, candidates, counts)


def test_topk_accuracy():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.2], [0.0, 0.1, 0.2]])
    assert metrics.topk_accuracy(scores, torch.tensor([1, 0, 0]), ks=(1, 2, 3)) == pytest.approx(
        dict(top1=1 / 3, top2=2 / 3, top3=1)
    )


def test_effective_rank():
    assert metrics.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert metrics.effective_rank(torch.ones(8, 5)) == pytest.approx(1, abs=1e-6)
    shares = (0.75, 0.25)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert metrics.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_pair_cosines():
    image = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0]])
    text = torch.tensor([[0.6, 0.8], [0, 1.0], [0.6, 0.8]])
    found = metrics.pair_cosines(image, text)
    assert found["matched"] == pytest.approx((0.6 + 1 + 0.6) / 3)
    assert found["unmatched"] == pytest.approx((0 + 0.6 + 0.8 + 0.8 + 0.6 + 0) / 6)
    masked = metrics.pair_cosines(image, text, torch.tensor([4, -1, 4]))
    assert masked["unmatched"] == pytest.approx((0 + 0.8 + 0.8 + 0) / 4)


def test_prompts(tmp_path):
    assert len(set(TEMPLATES)) == len(TEMPLATES) and all(t.count("{}") == 1 for t in TEMPLATES)
    assert class_prompts(["hot_dog", "cat"], [PHOTO, "my {}"]) == [
        "a photo of a hot dog.",
        "my hot dog",
        "a photo of a cat.",
        "my cat",
    ]
    text = torch.tensor([[2.0, 0], [0, 5.0], [-3.0, 0], [-1.0, 0]])
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1, 0]])
    torch.testing.assert_close(class_embeddings(text, 2), expected)
    path = tmp_path / "templates.txt"
    path.write_text("a {} here\n\nthe {}\n")
    assert read_templates(path) == ("a {} here", "the {}")
    for content, message in (("a dog", "one {}"), ("\n", "no template")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_templates(path)
    with pytest.raises(InputError, match="absent.txt"):
        read_templates(tmp_path / "absent.txt")
