"""Two processes train as one does on their images together, however the boxes are shared among them."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import macl
from macl.data import SyntheticPairs
from macl.evaluation import predict
from trainkit import distributed

# Every anchor and every RoI is in the loss, so that nothing is drawn.
KWARGS = dict(
    backbone="resnet18", norm="group", fpn_channels=16, fpn_levels=3, anchor_sizes=(16, 32, 64), aspect_ratios=(2.0,),
    head_width=16, rpn_pre_nms=(60, 60), rpn_post_nms=(40, 40), rpn_samples=10**6, rpn_positive_fraction=1.0,
    roi_samples=10**6, roi_positive_fraction=1.0, macl_hidden=(16,), macl_dim=8, msp=True,
)  # fmt: skip
# What compares a batch with more than itself: banks that wrap around within two steps, of keys that come with boxes.
CONTRAST = {level: dict(dhn_size=7, dhn_k=3, macl_level=level) for level in ("roi", "crop")}
BOXES = {"unequal": (3, 0, 1, 1), "none on one rank": (2, 1, 0, 0), "none at all": (0, 0, 0, 0)}


def model(**kwargs):
    torch.manual_seed(0)
    return macl.build_detector(**KWARGS | kwargs).double().train()


def pairs(counts, first_scene=0):
    generator = torch.Generator().manual_seed(3 + first_scene)
    result = []
    for i, count in enumerate(counts):
        images = torch.rand(2, 3, 64, 96, generator=generator, dtype=torch.float64)
        corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([70.0, 20.0])
        boxes = torch.cat([corner, corner + torch.tensor([15.0, 38.0])], dim=1)
        keys = torch.nn.functional.normalize(torch.randn(count, 2, 8, generator=generator, dtype=torch.float64), dim=2)
        more = {"labels": torch.ones(count, dtype=torch.int64), "scene": torch.tensor(first_scene + i), "keys": keys}
        result.append((*images, {"boxes": boxes, **more}))
    return result


def run(detector, chosen):
    visible, infrared, targets = (list(column) for column in zip(*chosen, strict=True))
    losses, metrics = detector(visible=visible, infrared=infrared, targets=targets, with_metrics=True)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}, metrics


def gradients(detector):
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.requires_grad}


def two_steps(detector, wrapped, counts, share):
    """What the second step gives, after one that filled the banks and a change of the projector."""
    run(wrapped, pairs((2, 3, 1, 2), first_scene=1)[share])
    detector.zero_grad()
    with torch.no_grad():
        for parameter in detector.macl.projector.parameters():
            parameter.add_(0.1)
    losses, metrics = run(wrapped, pairs(counts)[share])
    banks = {name: value.clone() for name, value in detector.macl.hard.state_dict().items()}
    return {"losses": losses, "gradients": gradients(detector), "banks": banks, "metrics": metrics}


def evaluated():
    """What is found in three images: an odd one out for two ranks."""
    data = SyntheticPairs(3, seed=5)
    results = predict(model().float(), data, modes={"both": ("visible", "infrared")}, device="cpu")
    return [
        (result["image_id"], result["detections"]["both"], result["ground_truth"], result["embeddings"])
        for result in results
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    macl.detector.jittered = torch.clone  # which draws for each process on its own
    distributed.start("cpu")
    seen, own = {"evaluated": evaluated()}, slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    for name, counts in BOXES.items():
        detector = model()
        losses, _ = run(DistributedDataParallel(detector), pairs(counts)[own])
        seen[name] = {"losses": losses, "gradients": gradients(detector)}
        for kind, kwargs in CONTRAST.items():
            detector = model(**kwargs)
            seen[kind, name] = two_steps(detector, DistributedDataParallel(detector), counts, own)
    torch.save(seen, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def seen(two_ranks, tmp_path_factory):
    return two_ranks(__file__, tmp_path_factory.mktemp("detector"))


@pytest.mark.parametrize("name", BOXES)
def test_losses_and_gradients_are_the_single_process(seen, name):
    detector = model()
    expected, _ = run(detector, pairs(BOXES[name]))
    for loss, value in expected.items():
        assert sum(rank[name]["losses"][loss] for rank in seen) / 2 == pytest.approx(value, rel=1e-9, abs=1e-12)
    for parameter, gradient in gradients(detector).items():
        for rank in seen:
            torch.testing.assert_close(rank[name]["gradients"][parameter], gradient, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("kind", CONTRAST)
@pytest.mark.parametrize("name", BOXES)
def test_contrast_with_keys_and_banks_is_that_of_the_single_process(seen, kind, name, monkeypatch):
    monkeypatch.setattr(macl.detector, "jittered", torch.clone)
    detector = model(**CONTRAST[kind])
    expected = two_steps(detector, detector, BOXES[name], slice(None))
    ranks = [rank[kind, name] for rank in seen]
    for loss, value in expected["losses"].items():
        assert sum(rank["losses"][loss] for rank in ranks) / 2 == pytest.approx(value, rel=1e-9, abs=1e-12), loss
    for rank in ranks:
        for part in ("gradients", "banks", "metrics"):
            assert rank[part].keys() == expected[part].keys()
            for key, value in expected[part].items():
                torch.testing.assert_close(rank[part][key], value, rtol=1e-7, atol=1e-11)
    assert len(detector.macl.hard.banks["visible"]) == 7
    if sum(BOXES[name]):
        assert expected["metrics"]["dhn_hardest"] != 0 and expected["metrics"]["dhn_masked"] > 0


def test_every_rank_hears_of_every_image_once(seen):
    expected = evaluated()
    for rank in seen:
        assert [image for image, *_ in rank["evaluated"]] == [0, 1, 2]
        torch.testing.assert_close(rank["evaluated"], expected, rtol=1e-4, atol=1e-4)
