"""The region proposal network runs its head again at the anchors of the losses: with the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from macl.boxes import AnchorGenerator
from macl.rpn import RPN, RPNHead, windows_of_three

SIZES = ((6, 9), (3, 4), (1, 1))


@pytest.fixture
def rpn():
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=(16.0, 32.0, 64.0), aspect_ratios=(0.5, 1.0, 2.0))
    kept = dict(pre_nms=(2000, 1000), post_nms=(2000, 1000), samples=40, positive_fraction=0.5)
    rpn = RPN(head=RPNHead(8, 3), anchors=anchors, **kept)
    for parameter in rpn.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return rpn.double()


def features():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in SIZES]


def losses(rpn, maps, boxes):
    """The sum of the losses over two images, of which the first has `boxes`."""
    targets = [{"boxes": part, "ignored": part[:0]} for part in (boxes, boxes[:0])]
    _, terms = rpn(maps, [(48, 72)] * 2, (48, 72), targets)
    return sum(total for total, _ in terms.values())


BOX = torch.tensor([[4.0, 4.0, 30.0, 34.0]], dtype=torch.float64)


def test_single_anchors_equal_the_dense_head_with_all_gradients(rpn):
    maps = features()
    dense = [torch.cat(parts, 1) for parts in rpn.head(maps)]  # (2, N), (2, N, 4)
    image = torch.arange(2).repeat_interleave(dense[0].shape[1])
    anchor = torch.arange(dense[0].shape[1]).repeat(2)
    order = torch.randperm(len(anchor), generator=torch.Generator().manual_seed(2))[:-7]
    order = order[image[order].argsort(stable=True)]  # image by image, their anchors in any order
    single = rpn.head.at(maps, image[order], anchor[order])
    results = []
    for logits, offsets in ((part[image[order], anchor[order]] for part in dense), single):
        loss = F.softplus(logits).sum() + (offsets.sin() * torch.arange(1.0, 5)).sum()
        results.append([logits, offsets, *torch.autograd.grad(loss, [*maps, *rpn.head.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_under_autocast_the_losses_train_the_head(rpn):
    """The dense pass without gradient must leave no cast weights behind for the losses."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses(rpn.float(), [part.float() for part in features()], BOX.float())
    loss.backward()
    assert all((parameter.grad != 0).any() for parameter in rpn.head.parameters())


def test_the_backward_of_the_losses_is_that_of_few_anchors_and_of_one_order(rpn, backward_nodes):
    nodes = {node.name() for node in backward_nodes(losses(rpn, features(), BOX))}
    assert not any("Convolution" in name for name in nodes)  # of all anchors
    windows = windows_of_three(features()[0], torch.tensor([0, 1, 1]), torch.tensor([5, 5, 6]))
    names = {node.name() for node in backward_nodes(windows)}
    assert "GatherBackward0" in names  # threads add up what indexing reads in any order
    assert "IndexBackward0" not in names
