"""The losses against torch.nn.functional.cross_entropy in float64, and the bank beside them."""

import math

import pytest
import torch
import torch.nn.functional as F

from fgclip import Tokenizer
from fgclip.losses import PairBank, caption_ids, hard_negative_loss, symmetric_loss
from fgclip.model import l2_normalize

SCALE = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)


def rows(count, seed, dim=6):
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return l2_normalize(x).requires_grad_()


def reference(image, text, ids, queued_images, queued_texts, queued_ids, scale):
    """Per direction: a dense logit matrix, false negatives set to -inf, cross-entropy."""
    total = 0
    for query, key, queue in ((image, text, queued_texts), (text, image, queued_images)):
        logits = scale * query @ torch.cat([key, queue]).T
        same = ids[:, None] == torch.cat([ids, queued_ids])
        same &= ids[:, None] != -1
        same[torch.arange(len(ids)), torch.arange(len(ids))] = False
        total += F.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(ids))) / 2
    return total


@pytest.mark.parametrize("queued", [0, 3, 8, 11])
@pytest.mark.parametrize("classes", [1, 2])
def test_symmetric_loss_and_gradients(queued, classes):
    image, text = rows(5, 1), rows(5, 2)
    ids = torch.tensor([3, 7, 3, -1, -1])
    bank = PairBank(8, 6, classes=classes).double()
    old_images, old_texts, old_ids = rows(queued, 3).detach(), rows(queued, 4).detach(), torch.arange(queued) % 5
    bank.enqueue(old_images, old_texts, old_ids, labels=torch.arange(queued) % 2)
    kept = slice(max(0, queued - 8), None)
    if classes == 2 and queued == 11:  # the last four of each class
        kept = [i for i in range(queued) if i >= 3]
    expected = reference(image, text, ids, old_images[kept], old_texts[kept], old_ids[kept], SCALE)
    found = symmetric_loss(image, text, SCALE, ids=ids, bank=bank)
    torch.testing.assert_close(found, expected)
    inputs = (image, text, SCALE)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
    torch.testing.assert_close(symmetric_loss(image, text, SCALE, ids=ids, bank=bank, reduction="sum"), 5 * found)


@pytest.mark.parametrize("queued", [0, 5])
def test_symmetric_sigmoid_loss_and_gradients(queued):
    """Each pair of the batch once, pairs with the bank by half in each direction; statistics of the softmax."""
    image, text, bias = rows(5, 1), rows(5, 2), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 7, 3, -1, -1])
    bank = PairBank(8, 6).double()
    old_images, old_texts, old_ids = rows(queued, 3).detach(), rows(queued, 4).detach(), torch.arange(queued) + 4
    bank.enqueue(old_images, old_texts, old_ids)
    own, same = torch.eye(5), (ids[:, None] == ids) & (ids[:, None] != -1)
    expected = -(F.logsigmoid((2 * own - 1) * (SCALE * image @ text.T + bias)) * (own + (1 - own) * ~same)).sum()
    for query, queue in ((image, old_texts), (text, old_images)):
        terms = F.logsigmoid(-(SCALE * query @ queue.T + bias))
        expected = expected - (terms * (ids[:, None] != old_ids)).sum() / 2
    found, statistics = symmetric_loss(image, text, SCALE, ids=ids, bank=bank, bias=bias, with_stats=True)
    torch.testing.assert_close(found, expected / 5)
    inputs = (image, text, SCALE, bias)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected / 5, inputs))
    softmax, expected = symmetric_loss(image, text, SCALE, ids=ids, bank=bank, with_stats=True)
    assert statistics == expected and softmax != found


@pytest.mark.parametrize("count", [0, 1])
def test_no_pair_and_one_pair_give_zero_with_a_graph(count):
    image, text = rows(count, 1), rows(count, 2)
    loss, statistics = symmetric_loss(image, text, SCALE, with_stats=True)
    assert loss == 0
    gradients = torch.autograd.grad(loss, (image, text, SCALE))
    assert all(not g.numel() or g.abs().max() == 0 for g in gradients)
    assert statistics["rows"] == 2 * count and statistics["rows_with_negatives"] == 0 and statistics["top1"] == 0
    assert all(value.isfinite() for value in statistics.values())


def test_statistics():
    """Three pairs by hand: the second image scores higher with the third text; a tie is no hit."""
    image = torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0]])
    text = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1.0]])
    loss, statistics = symmetric_loss(image, text, torch.tensor(2.0), with_stats=True)
    logits = 2 * image @ text.T
    per_row = torch.cat([F.cross_entropy(m, torch.arange(3), reduction="none") for m in (logits, logits.T)])
    torch.testing.assert_close(statistics["loss"], per_row.sum())
    torch.testing.assert_close(loss, per_row.mean())
    torch.testing.assert_close(statistics["loss_over_chance"], per_row.sum() / math.log(3))
    assert statistics["rows"] == statistics["rows_with_negatives"] == 6 and statistics["candidates"] == 18
    # images: hit, miss, hit; texts: hit, tie with the third image, tie with the second
    assert statistics["top1"] == 3


@pytest.mark.parametrize("counts", [[3, 1, 4], [11, 11], [1]])
def test_hard_negatives(counts):
    region, text = rows(len(counts), 1), rows(sum(counts), 2)
    parts = text.split(counts)
    expected = torch.stack(
        [F.cross_entropy((SCALE * r @ t.T)[None], torch.tensor([0])) for r, t in zip(region, parts, strict=True)]
    ).mean()
    found, statistics = hard_negative_loss(region, text, SCALE, counts=torch.tensor(counts), with_stats=True)
    torch.testing.assert_close(found, expected)
    inputs = (region, text, SCALE)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
    hits = sum(len(t) > 1 and bool((r @ t[0]) > (t[1:] @ r).max()) for r, t in zip(region, parts, strict=True))
    assert statistics["top1"] == hits and statistics["candidates"] == sum(counts)
    assert statistics["rows_with_negatives"] == sum(c > 1 for c in counts)


def test_hard_negatives_equal_to_the_phrase_are_left_out():
    region, text = rows(2, 1), rows(6, 2)
    ids = torch.tensor([4, 5, 4, 9, 5, 9])
    threes = torch.tensor([3, 3])
    found = hard_negative_loss(region, text, SCALE, counts=threes, ids=ids)
    expected = hard_negative_loss(region, text[[0, 1, 3, 4]], SCALE, counts=torch.tensor([2, 2]))
    torch.testing.assert_close(found, expected)
    without = torch.tensor([-1, -1, 4, 5, -1, 6])  # -1 is nobody's id
    nobody = hard_negative_loss(region, text, SCALE, counts=threes, ids=without)
    torch.testing.assert_close(nobody, hard_negative_loss(region, text, SCALE, counts=threes))


def test_losses_stay_in_float32_under_autocast():
    image, text, counts = rows(4, 1).float(), rows(4, 2).float(), torch.tensor([2, 2])
    for loss_of in (
        lambda: symmetric_loss(image, text, 90.0), lambda: hard_negative_loss(image[:2], text, 90.0, counts=counts)
    ):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        torch.testing.assert_close(loss, loss_of(), rtol=1e-6, atol=1e-6)


def test_caption_ids_depend_on_the_text_alone():
    tokenizer = Tokenizer("bytes")
    texts = ["a red square", "a red  Square", "a red squares", "", "b"]
    ids = caption_ids(tokenizer(texts, 24), tokenizer.eos_id)
    assert ids[0] == ids[1] and len(set(ids.tolist())) == 4
    assert caption_ids(tokenizer(texts, 77), tokenizer.eos_id).equal(ids)
    padded_with_end = tokenizer(texts, 30)
    padded_with_end[(padded_with_end == tokenizer.eos_id).cumsum(1) > 0] = tokenizer.eos_id
    assert caption_ids(padded_with_end, tokenizer.eos_id).equal(ids)
    assert ids[0].item() == 8113415350517407081  # the same on every machine and in every version


def test_gradients_of_rows_that_repeat_add_up_in_one_order(backward_nodes):
    """Those of indexing do not: threads of a CPU add them up as they come."""
    loss = hard_negative_loss(rows(4, 0), rows(12, 1), torch.tensor(10.0), counts=torch.full((4,), 3))
    assert "IndexBackward0" not in {node.name() for node in backward_nodes(loss)}
