"""Two processes train as one does on their images together, however the boxes are shared among them."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import macl
from training import distributed

# Every anchor and every RoI is in the loss, so that nothing is drawn.
KWARGS = dict(
    backbone="resnet18", norm="group", fpn_channels=16, fpn_levels=3, anchor_sizes=(16, 32, 64), aspect_ratios=(2.0,),
    head_width=16, rpn_pre_nms=(60, 60), rpn_post_nms=(40, 40), rpn_samples=10**6, rpn_positive_fraction=1.0,
    roi_samples=10**6, roi_positive_fraction=1.0, macl_hidden=(16,), macl_dim=8, msp=True,
)  # fmt: skip
BOXES = {"unequal": (3, 0, 1, 1), "none on one rank": (2, 1, 0, 0), "none at all": (0, 0, 0, 0)}


def model():
    torch.manual_seed(0)
    return macl.build_detector(**KWARGS).double().train()


def pairs(counts):
    generator = torch.Generator().manual_seed(3)
    result = []
    for count in counts:
        images = torch.rand(2, 3, 64, 96, generator=generator, dtype=torch.float64)
        corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([70.0, 20.0])
        boxes = torch.cat([corner, corner + torch.tensor([15.0, 38.0])], dim=1)
        result.append((*images, {"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64)}))
    return result


def run(detector, chosen):
    visible, infrared, targets = (list(column) for column in zip(*chosen, strict=True))
    losses = detector(visible=visible, infrared=infrared, targets=targets)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


def gradients(detector):
    return {name: parameter.grad.clone() for name, parameter in detector.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    seen = {}
    for name, counts in BOXES.items():
        detector = model()
        own = pairs(counts)[2 * distributed.rank() : 2 * distributed.rank() + 2]
        losses = run(DistributedDataParallel(detector), own)
        seen[name] = {"losses": losses, "gradients": gradients(detector)}
    torch.save(seen, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def seen(two_ranks, tmp_path_factory):
    return two_ranks(__file__, tmp_path_factory.mktemp("detector"))


@pytest.mark.parametrize("name", BOXES)
def test_losses_and_gradients_are_the_single_process(seen, name):
    detector = model()
    expected = run(detector, pairs(BOXES[name]))
    for loss, value in expected.items():
        assert sum(rank[name]["losses"][loss] for rank in seen) / 2 == pytest.approx(value, rel=1e-9, abs=1e-12)
    for parameter, gradient in gradients(detector).items():
        for rank in seen:
            torch.testing.assert_close(rank[name]["gradients"][parameter], gradient, rtol=1e-7, atol=1e-11)
