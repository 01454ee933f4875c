"""The drawn scenes: the same everywhere, as hard as they say, and boxes that fit what is drawn."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from macl.data import DAY_AND_NIGHT, DAY_AND_NIGHT_REGISTERED, NIGHT, SyntheticPairs
from macl.data.figures import DISTRACTORS, distractor, person, rasterise
from macl.data.painting import paint
from macl.data.scenes import INFRARED, STREET_DAY, STREET_NIGHT, VISIBLE, Scene

GROUND = Scene(size=(128, 160), horizon=30.0, slope=1.1)
PERSON = person(np.random.default_rng(0))


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


@pytest.mark.parametrize(("domain", "expected"), [(NIGHT, "434e8d52fd08e495"), (DAY_AND_NIGHT, "3fa02fc51f555e9f")])
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


def test_a_third_of_the_things_that_resemble_people_show_in_either_camera_alone():
    data = SyntheticPairs(100, seed=5)
    seen = [f.seen for index in range(100) for f in figures_of(data, index) if f.kind in DISTRACTORS]
    assert min(seen.count((True, False)), seen.count((False, True))) > len(seen) / 3 > 110


def test_shapes_are_as_high_as_they_say_and_stand_on_the_ground():
    rng = np.random.default_rng(0)
    for shape in (person(rng), *(distractor(rng, kind) for kind in DISTRACTORS)):
        rows, _, coverage, _ = rasterise(shape, foot=(80.3, 110.2), height=60.0, canvas=(128, 160))
        inside, _ = np.nonzero(coverage > 0.5)
        assert 56 <= inside.max() + 1 - inside.min() <= 64 and inside.max() + rows.start <= 111


def test_a_shape_may_reach_out_of_the_canvas_or_miss_it():
    rows, _, whole, _ = rasterise(PERSON, foot=(50, 100), height=60, canvas=(200, 200))
    assert np.array_equal(rasterise(PERSON, foot=(50, 100), height=60, canvas=(80, 200))[2], whole[: 80 - rows.start])
    assert not rasterise(PERSON, foot=(500, 100), height=60, canvas=(128, 160))[2].any()


def painted(domain, *figures, seed=1, failed=GROUND.failed):
    """(visible, infrared), each (3, H, W) float64, of nothing but these figures."""
    images = paint(np.random.default_rng(seed), domain, replace(GROUND, figures=figures, failed=failed))
    return tuple(image.astype(float) for image in images)


def change(modality, images, empty, figure):
    """How much brighter a figure's inside is than the same place without it: its median, in tones."""
    inside = figure.coverage == 1
    patch, without = (both[modality].mean(0)[figure.rows, figure.columns][inside] for both in (images, empty))
    return np.median(patch) - np.median(without)


@pytest.mark.parametrize("domain", [NIGHT, STREET_NIGHT, STREET_DAY])
def test_people_show_in_the_cameras_that_see_them(domain):
    figure = GROUND.stand("person", PERSON, 80.0, 60.0)
    for seed in range(20):
        images, empty = painted(domain, figure, seed=seed), painted(domain, seed=seed)
        assert min(abs(change(modality, images, empty, figure)) for modality in (VISIBLE, INFRARED)) > 8


@pytest.mark.parametrize("modality", [VISIBLE, INFRARED])
def test_a_figure_that_a_camera_does_not_see_leaves_its_image_as_it_is(modality):
    seen = (modality == INFRARED, modality == VISIBLE)
    figures = [GROUND.stand("person", PERSON, 80.0, 60.0, seen=one) for one in ((True, True), seen)]
    alone, both = painted(STREET_DAY, figures[0]), painted(STREET_DAY, *figures)
    same = [np.array_equal(*images) for images in zip(alone, both, strict=True)]
    assert same[modality] and not same[1 - modality]


@pytest.mark.parametrize("domain", [NIGHT, STREET_NIGHT])
def test_a_camera_sees_nobody_where_it_fails_and_the_other_sees_them(domain):
    data, within, elsewhere = SyntheticPairs(200, seed=3, domain=domain), [0, 0], [0, 0]
    for index in range(200):
        _, _, scene = data.layout(index)
        for modality, (left, right) in enumerate(scene.failed):
            inside = [figure for figure in scene.figures if left <= figure.foot[0] < right]
            assert all(figure.seen[1 - modality] and not figure.seen[modality] for figure in inside)
            people = [figure for figure in scene.figures if figure.kind == "person" and not figure.seen[modality]]
            within[modality] += sum(figure in inside for figure in people)
            elsewhere[modality] += sum(figure not in inside for figure in people)
    assert all(one > 1.5 * other > 0 for one, other in zip(within, elsewhere, strict=True))


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


def test_what_is_nearer_hides_what_is_farther_in_a_camera_that_sees_both_and_boxes_are_the_tight_extents():
    figures = figures_of(SyntheticPairs(40, seed=12), 3)
    assert [f.foot[1] for f in figures] == sorted(f.foot[1] for f in figures) and figures[-1].hidden == 0
    nearer = np.zeros((2, 128, 160), dtype=bool)  # what the figures so far cover in either camera
    for figure in reversed(figures):
        mask = np.zeros((128, 160), dtype=bool)
        mask[figure.rows, figure.columns] = figure.inside
        rows, columns = np.nonzero(mask)
        assert figure.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        shares = [(nearer[modality] & mask).sum() / mask.sum() for modality in (0, 1) if figure.seen[modality]]
        assert figure.hidden == pytest.approx(min(shares))
        nearer[list(figure.seen)] |= mask
    assert any(0 < figure.hidden < 1 for figure in figures)


def test_day_and_night_take_turns():
    data = SyntheticPairs(6, seed=1, domain=DAY_AND_NIGHT)
    assert [data[index]["daytime"] for index in range(6)] == [True, False] * 3
    assert data.source.endswith("drawn from seed 1, 3 of them by day") and data.statistics()["day"] == 3
    assert SyntheticPairs(6, seed=1).source.endswith("drawn from seed 1")  # one kind of scene: nothing to say


def test_people_of_the_second_domain_are_smaller_more_ignored_and_seen_by_the_camera_of_the_hour(counts):
    for domain in DAY_AND_NIGHT:
        street = SyntheticPairs(100, seed=5, domain=domain).statistics()
        assert street["median_height"] < 0.75 * counts["median_height"]
        assert 0.05 < street["ignored"] / street["boxes"] < 0.25
        shares = [street[name] / street["boxes"] for name in ("visible_only", "infrared_only")]
        assert max(shares) > 0.2 > min(shares) and (shares[0] > shares[1]) == domain.daytime


def test_infrared_lies_lower_and_further_right_by_the_offset_and_nowhere_else_on_the_registered_street():
    for domain, registered in zip(DAY_AND_NIGHT, DAY_AND_NIGHT_REGISTERED, strict=True):
        assert domain.offset == (1, 3) and registered == replace(domain, offset=(0, 0))
    still = replace(STREET_NIGHT, infrared_noise=(0, 0), stripes=0.0, offset=(0, 0))
    figure = GROUND.stand("person", PERSON, 80.0, 40.0)
    images = (painted(domain, figure)[INFRARED][0] for domain in (replace(still, offset=(1, 3)), still))
    moved, image = (image[8:-8, 8:-8] for image in images)
    assert np.array_equal(moved[1:, 3:], image[:-1, :-3])


@pytest.mark.parametrize(("colder", "sign"), [(1.0, -1), (0.0, 1)])
def test_hot_ground_shows_people_darker_and_warm_ground_brighter(colder, sign):
    domain, figure = replace(STREET_DAY, colder=colder), GROUND.stand("person", PERSON, 80.0, 40.0)
    assert sign * change(INFRARED, painted(domain, figure), painted(domain), figure) > 8


@pytest.mark.parametrize(("modality", "tones"), [(VISIBLE, {-1, 1}), (INFRARED, {1})])
def test_where_a_camera_fails_its_image_is_dark_glaring_or_as_warm_as_people(modality, tones):
    bands, found = [(0, 0), (0, 0)], set()
    bands[modality] = (60, 100)
    for seed in range(8):
        image, without = (painted(NIGHT, seed=seed, failed=failed)[modality] for failed in (bands, GROUND.failed))
        assert abs(image - without)[:, 40:, 70:90].mean() > 8 > abs(image - without)[:, 40:, :55].mean()
        found.add(np.sign((image - without)[:, 40:, 70:90].mean()))
    assert found == tones
