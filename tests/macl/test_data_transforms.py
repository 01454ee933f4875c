"""Augmentation and loading: one geometry for both images and the boxes, the same draws wherever they are made."""

import pickle

import pytest
import torch
from scripts import equal

from macl.data import AugmentedDataset, PairedAugmentation, SyntheticPairs, collate
from trainkit.loader import make_loader

GEOMETRY = {"flip": 0.5, "crop": 0.7, "crop_scale": (0.5, 0.9)}
PHOTOMETRY = dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, gain=0.3, offset=0.1, noise=0.05)
EVERYTHING = GEOMETRY | PHOTOMETRY


class Painted(torch.utils.data.Dataset):
    """Black pairs with their boxes painted, in the same grey in both modalities, each box in a grey of its own."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator, boxes = torch.Generator().manual_seed(index), []
        image = torch.zeros(3, 120, 160, dtype=torch.uint8)
        for number in range(3):  # one in each third, so that they do not overlap
            width, height = (int(torch.randint(*sides, (), generator=generator)) for sides in ((14, 40), (20, 90)))
            x = 53 * number + int(torch.randint(0, 53 - width, (), generator=generator))
            y = int(torch.randint(0, 120 - height, (), generator=generator))
            image[:, y : y + height, x : x + width] = 100 + 50 * number
            boxes.append([x, y, x + width, y + height])
        seen, labels = torch.tensor([[True, True], [True, False], [False, True]]), torch.tensor([1, 2, 3])
        boxes = dict(boxes=torch.tensor(boxes).float(), labels=labels, ignore=labels < 0, occlusion=labels - 1)
        names = dict(image_id=index, path=f"painted/{index}", scene=index)
        return dict(visible=image, infrared=image.clone(), visible_in=seen) | boxes | names


def test_geometry_is_the_same_in_both_modalities_and_boxes_follow():
    data = AugmentedDataset(Painted(), PairedAugmentation(**GEOMETRY), seed=0)
    shapes, seen = set(), 0
    for epoch in range(5):
        for index in range(len(data)):
            sample = data[epoch, index]
            visible = sample["visible"]
            assert torch.equal(visible, sample["infrared"])
            assert visible.dtype == torch.float32 and visible.min() >= 0 and visible.max() <= 1
            shapes.add(tuple(visible.shape))
            for (x1, y1, x2, y2), label in zip(sample["boxes"].tolist(), sample["labels"].tolist(), strict=True):
                assert 0 <= x1 < x2 <= visible.shape[2] and 0 <= y1 < y2 <= visible.shape[1]
                if min(x2 - x1, y2 - y1) < 8:
                    continue
                # Inside its own grey, up to a blurred edge; just outside black or another box's.
                inside = visible[0, round(y1) + 3 : round(y2) - 3, round(x1) + 3 : round(x2) - 3] * 255
                assert (inside - (50 + 50 * label)).abs().max() < 3
                for x, y in ((x1 - 3, (y1 + y2) / 2), (x2 + 3, (y1 + y2) / 2), ((x1 + x2) / 2, y1 - 3)):
                    if 0 <= x < visible.shape[2] and 0 <= y < visible.shape[1]:
                        assert (visible[0, int(y), int(x)] * 255 - (50 + 50 * label)).abs() > 20
                seen += 1
    assert seen > 60 and len(shapes) > 10


def test_what_belongs_to_a_box_vanishes_with_it():
    data, fewer = AugmentedDataset(Painted(), PairedAugmentation(crop=1.0, crop_scale=(0.2, 0.4)), seed=1), 0
    for key in [(epoch, index) for epoch in range(3) for index in range(len(data))]:
        sample, before = data[key], data.dataset[key[1]]
        kept = sample["labels"] - 1
        assert len(sample["boxes"]) == len(sample["ignore"]) >= 1  # a crop never loses all boxes
        assert torch.equal(sample["visible_in"], before["visible_in"][kept])
        assert torch.equal(sample["occlusion"], before["occlusion"][kept])
        fewer += len(kept) < 3
    assert fewer > 10


def test_a_sliver_is_ignored_and_a_crop_keeps_a_whole_box_that_fits():
    data = Painted()
    transform = PairedAugmentation(flip=0.0, crop=1.0, crop_scale=(0.8, 0.8))
    areas = [((box[2] - box[0]) * (box[3] - box[1])).item() for box in data[0]["boxes"]]
    torch.manual_seed(0)
    for _ in range(40):
        sample = transform(data[0])
        left = ((sample["boxes"][:, 2:] - sample["boxes"][:, :2]).prod(1)).tolist()
        shares = [area / areas[label - 1] for area, label in zip(left, sample["labels"].tolist(), strict=True)]
        assert max(shares) == pytest.approx(1)
        assert sample["ignore"].tolist() == [share < 0.3 for share in shares]


def test_a_crop_works_without_boxes_and_with_ignored_ones_only():
    sample = Painted()[0]
    transform = PairedAugmentation(**GEOMETRY | {"crop": 1.0})
    for chosen in (slice(0), slice(3)):
        cut = sample | {key: sample[key][chosen] for key in ("boxes", "labels", "visible_in", "occlusion")}
        cut["ignore"] = torch.ones(len(cut["boxes"]), dtype=torch.bool)
        for _ in range(10):
            out = transform(cut)
            assert out["boxes"].shape == (len(out["ignore"]), 4) and out["ignore"].all()


def test_photometry_stays_within_its_modality():
    plain = PairedAugmentation(flip=0.0)(Painted()[0])
    torch.manual_seed(0)
    out = PairedAugmentation(flip=0.0, brightness=0.5, contrast=0.5)(Painted()[0])
    assert torch.equal(out["infrared"], plain["infrared"]) and not torch.equal(out["visible"], plain["visible"])
    out = PairedAugmentation(flip=0.0, gain=0.5, offset=0.2, noise=0.1)(Painted()[0])
    assert torch.equal(out["visible"], plain["visible"]) and not torch.equal(out["infrared"], plain["infrared"])
    assert torch.equal(out["infrared"][0], out["infrared"][2]) and out["infrared"].max() <= 1
    assert torch.equal(out["boxes"], plain["boxes"])


def test_gain_and_offset_are_what_they_say():
    sample, transform = Painted()[0], PairedAugmentation(flip=0.0, gain=0.2, offset=0.1)
    torch.manual_seed(0)
    seen = []
    for _ in range(40):
        out = transform(sample)["infrared"]
        offset = out[0, sample["infrared"][0] == 0].min()  # clipped below 0
        gain = (out[0, sample["infrared"][0] == 100].max() - offset) / (100 / 255)
        if offset > 0:
            seen.append((gain.item(), offset.item()))
    gains, offsets = zip(*seen, strict=True)
    assert 0.8 <= min(gains) < 0.9 and 1.1 < max(gains) <= 1.2 and 0.05 < max(offsets) <= 0.1


def test_draws_follow_from_seed_epoch_and_index_alone():
    data = AugmentedDataset(Painted(), PairedAugmentation(**EVERYTHING), seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = data[2, 5]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's draws are untouched
    torch.rand(7)
    data[0, 1]
    assert equal(data[2, 5], first) and equal(pickle.loads(pickle.dumps(data))[2, 5], first)
    for other in (data[3, 5], AugmentedDataset(Painted(), PairedAugmentation(**EVERYTHING), seed=4)[2, 5]):
        assert other["visible"].shape != first["visible"].shape or not torch.equal(other["visible"], first["visible"])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])  # that imports torch
def test_workers_change_nothing(context):
    data = AugmentedDataset(SyntheticPairs(8, seed=0), PairedAugmentation(**EVERYTHING), seed=0)
    batches = [[(0, 3), (0, 1)], [(0, 7)]]
    loader = make_loader(data, batches, collate, workers=2)
    loader.multiprocessing_context = context
    state = torch.get_rng_state()
    for batch, keys in zip(loader, batches, strict=True):
        assert equal(batch, collate([data[key] for key in keys]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_is_a_dict_of_lists():
    batch = collate([Painted()[2] | {"daytime": True}, Painted()[4]])
    assert set(batch) == {"visible", "infrared", "targets", "image_id", "path", "scene"}
    assert [image.shape for image in batch["visible"]] == [(3, 120, 160)] * 2
    assert batch["image_id"] == [2, 4] and batch["path"] == ["painted/2", "painted/4"] and batch["scene"] == [2, 4]
    torch.testing.assert_close(batch["visible"][0], Painted()[2]["visible"] / 255)
    assert set(batch["targets"][1]) == {"boxes", "labels", "ignore", "visible_in", "occlusion", "scene"}
    assert batch["targets"][0].keys() - batch["targets"][1].keys() == {"daytime"}
    without = {key: value for key, value in Painted()[0].items() if key not in ("visible_in", "occlusion")}
    assert set(collate([without])["targets"][0]) == {"boxes", "labels", "ignore", "scene"}
