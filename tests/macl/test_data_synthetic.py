"""The drawn scenes: the same everywhere, as hard as they say, and boxes that fit what is drawn."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from macl.data import DAY_AND_NIGHT, NIGHT, SyntheticPairs
from macl.data.figures import DISTRACTORS
from macl.data.scenes import INFRARED, STREET_NIGHT, VISIBLE


@pytest.fixture(scope="module")
def counts():
    return SyntheticPairs(300, seed=5).statistics()


def figures_of(data, index):
    _, _, scene = data.layout(index)
    return scene.figures


def test_a_sample_follows_the_contract():
    sample = SyntheticPairs(5, seed=1)[3]
    count = len(sample["boxes"])
    assert sample["visible"].shape == sample["infrared"].shape == (3, 128, 160)
    assert sample["visible"].dtype == sample["infrared"].dtype == torch.uint8
    assert sample["boxes"].dtype == torch.float32 and sample["labels"].tolist() == [1] * count
    assert sample["ignore"].shape == sample["occlusion"].shape == (count,) and sample["ignore"].dtype == torch.bool
    assert sample["visible_in"].shape == (count, 2) and sample["visible_in"].any(dim=1).all()
    assert sample["image_id"] == 3 and sample["scene"] == 3 and sample["daytime"] is False
    assert torch.equal(sample["infrared"][0], sample["infrared"][2])
    assert SyntheticPairs(5, seed=1, classes=("car", "person"))[3]["labels"].tolist() == [2] * count > []


@pytest.mark.parametrize(("domain", "expected"), [(NIGHT, "82577aad4b944c10"), (DAY_AND_NIGHT, "65574125ff1c5106")])
def test_pixels_are_the_same_on_every_machine(domain, expected):
    data, digest = SyntheticPairs(8, seed=2024, domain=domain), hashlib.sha256()
    for sample in (data[index] for index in range(8)):
        for key in ("visible", "infrared"):
            digest.update(np.ascontiguousarray(sample[key].numpy()).tobytes())
        digest.update(sample["boxes"].numpy().astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == expected


def test_a_pair_depends_on_seed_and_index_alone():
    few, many = SyntheticPairs(3, seed=7), SyntheticPairs(50, seed=7)
    many[40]
    torch.manual_seed(0)
    np.random.seed(0)
    for key in ("visible", "infrared", "boxes"):
        assert torch.equal(few[2][key], many[2][key])
    assert not torch.equal(many[1]["visible"], many[2]["visible"])
    assert not torch.equal(SyntheticPairs(3, seed=8)[2]["visible"], few[2]["visible"])
    assert len(list(pickle.loads(pickle.dumps(few)))) == 3  # iteration ends


def test_a_fifth_is_seen_in_either_modality_only_and_sizes_range_over_a_factor_of_five(counts):
    people = counts["seen_in_both"] + counts["visible_only"] + counts["infrared_only"]
    assert people == counts["boxes"] > 800
    assert 0.15 <= counts["visible_only"] / people <= 0.25
    assert 0.15 <= counts["infrared_only"] / people <= 0.25
    assert counts["ignored"] / people < 0.15 and counts["empty_images"] >= 1
    assert counts["max_height"] / counts["min_height"] >= 5


def test_two_distractors_at_least_in_every_image_of_either_modality():
    data = SyntheticPairs(100, seed=5)
    for index in range(100):
        figures = [f for f in figures_of(data, index) if f.kind in DISTRACTORS and f.hidden <= 0.5]
        assert min(sum(f.seen[modality] for f in figures) for modality in (VISIBLE, INFRARED)) >= 2


def quiet(**changes):
    """Scenes without noise, misregistration or blur's reach beyond a pixel, to compare pixels in."""
    return replace(
        NIGHT, visible_noise=(0, 0), infrared_noise=(0, 0), misregistration=0, occluders=(0, 0), empty=0.0, **changes
    )


def contrast(sample, figure, modality):
    """Mean absolute difference of tone between a figure's inside and its patch's outside."""
    patch = sample[("visible", "infrared")[modality]].numpy().astype(float).mean(0)[figure.rows, figure.columns]
    return abs(patch[figure.coverage == 1].mean() - patch[figure.coverage == 0].mean())


@pytest.mark.parametrize("modality", [VISIBLE, INFRARED])
def test_people_show_in_the_modalities_that_see_them(modality):
    domain = quiet(people=(1, 1), visible_only=0.5, infrared_only=0.5, distractors=(0, 0), warm_clutter=(0, 0))
    data = SyntheticPairs(60, seed=9, domain=domain)
    shown, hidden = [], []
    for index in range(60):
        (figure,) = figures_of(data, index)
        (shown if figure.seen[modality] else hidden).append(contrast(data[index], figure, modality))
    assert min(len(shown), len(hidden)) > 15
    assert np.median(shown) > 3 * np.median(hidden) and np.quantile(shown, 0.05) > np.median(hidden)


@pytest.mark.parametrize("domain", [NIGHT, STREET_NIGHT])
def test_hidden_and_small_people_are_marked(domain):
    data, seen, least = SyntheticPairs(60, seed=11, domain=domain), set(), domain.ignored_below * 128
    for index in range(60):
        sample, people = data[index], [figure for figure in figures_of(data, index) if figure.kind == "person"]
        heights = (sample["boxes"][:, 3] - sample["boxes"][:, 1]).tolist()
        for figure, height, level, ignore in zip(people, heights, sample["occlusion"], sample["ignore"], strict=True):
            assert level == (figure.hidden > 0.05) + (figure.hidden > 0.5)
            assert ignore == (figure.hidden > 0.7 or height < least)
            seen.add((int(level), bool(ignore), height < least))
    assert {(0, False, False), (1, False, False), (2, False, False), (2, True, False)} <= seen
    assert ((0, True, True) in seen) == (domain is STREET_NIGHT)
    assert data.statistics()["ignored"] == sum(int(data[index]["ignore"].sum()) for index in range(60))


def test_what_is_nearer_hides_what_is_farther_and_boxes_are_the_tight_extents():
    figures = figures_of(SyntheticPairs(40, seed=12), 3)
    assert [f.foot[1] for f in figures] == sorted(f.foot[1] for f in figures) and figures[-1].hidden == 0
    masks = np.zeros((len(figures), 128, 160), dtype=bool)
    for mask, figure in zip(masks, figures, strict=True):
        mask[figure.rows, figure.columns] = figure.inside
        rows, columns = np.nonzero(mask)
        assert figure.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    for number, (mask, figure) in enumerate(zip(masks, figures, strict=True)):
        hidden = mask & masks[number + 1 :].any(axis=0)
        assert figure.hidden == pytest.approx(hidden.sum() / mask.sum())


def test_day_and_night_take_turns():
    data = SyntheticPairs(6, seed=1, domain=DAY_AND_NIGHT)
    samples = [data[index] for index in range(6)]
    assert [sample["daytime"] for sample in samples] == [True, False] * 3
    assert data.source.endswith("drawn from seed 1, 3 of them by day") and data.statistics()["day"] == 3
    brightness = [sample["visible"].float().mean().item() for sample in samples]
    assert min(brightness[::2]) > max(brightness[1::2])
    assert SyntheticPairs(6, seed=1).source.endswith("drawn from seed 1")  # one kind of scene: nothing to say


def test_people_of_the_second_domain_are_smaller_more_ignored_and_seen_by_the_camera_of_the_hour(counts):
    for domain in DAY_AND_NIGHT:
        street = SyntheticPairs(100, seed=5, domain=domain).statistics()
        assert street["median_height"] < 0.75 * counts["median_height"]
        assert 0.05 < street["ignored"] / street["boxes"] < 0.25
        shares = [street[name] / street["boxes"] for name in ("visible_only", "infrared_only")]
        assert max(shares) > 0.2 > min(shares) and (shares[0] > shares[1]) == domain.daytime
