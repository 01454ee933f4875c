"""Figures of held-out images, against their definitions."""

import math

import pytest
import torch

from fgclip import Tokenizer
from fgclip.batches import Collate
from fgclip.model import unit
from fgclip.synthetic import SyntheticRegions
from fgclip.validation import (
    best_metric,
    distinct_candidates,
    embed,
    region_figures,
    validation_metrics,
    validation_text,
)

UNITS = torch.eye(200)


@pytest.mark.parametrize(("captions", "expected"), [(180, 131), (40, 39), (1, 0)])
def test_candidates_have_distinct_captions(captions, expected):
    ids = torch.randint(0, captions, (500,), generator=torch.Generator().manual_seed(0)) * 7
    others = distinct_candidates(ids)
    assert others.shape == (500, expected) and others.equal(distinct_candidates(ids))
    for own, found in zip(ids, ids[others], strict=True):
        assert len(set(found.tolist()) - {own.item()}) == expected
    if expected:
        assert len(torch.unique(others)) > 400  # of several regions with a caption it is not always the same


def test_regions_that_are_told_apart_and_such_that_are_not():
    ids = torch.arange(200)
    told = region_figures(UNITS, UNITS, ids, 10.0)
    assert told["candidates"] == 132 and told["count"] == 200
    assert told["r1"] == told["region_to_text_r1"] == told["text_to_region_r1"] == 1
    assert told["loss"] == pytest.approx(math.log(1 + 131 * math.exp(-10)), rel=1e-3)
    same = region_figures(UNITS[:1].expand(200, -1), UNITS[:1].expand(200, -1), ids, 10.0)
    assert same["relative"] == pytest.approx(1) and same["r1"] == 0  # a tie is a miss


def test_one_direction_can_fail_alone():
    """Every text is nearest to its region, but all regions are nearest to text 0."""
    region = unit(UNITS + 2 * UNITS[0])
    text = unit(UNITS)
    figures = region_figures(region, text, torch.arange(200), 1.0)
    assert figures["text_to_region_r1"] == 1 and figures["region_to_text_r1"] < 0.6
    assert figures["r1"] == pytest.approx((1 + figures["region_to_text_r1"]) / 2)


def test_embedding_a_data_set(small_model):
    """The order is that of the data set, whatever the batch size, and hard rows belong to their regions."""
    scenes = SyntheticRegions(7, seed=0, image_size=32, placement="free")
    collate = Collate(Tokenizer("bytes"), context_length=24, long_context_length=36)
    found = embed(small_model, scenes, collate, device="cpu", batch_size=3)
    whole = collate([scenes[i] for i in range(7)])
    with torch.no_grad():
        features = small_model(whole)
    for name in ("image", "short", "long", "regions", "region_texts", "hard_texts"):
        torch.testing.assert_close(found[name], unit(features[name]), msg=name)
    assert found["hard_regions"].equal(found["regions"][whole["hard_regions"]])
    assert found["hard_counts"].equal(whole["hard_counts"])
    assert found["region_ids"].equal(whole["short_ids"][whole["region"]])
    figures = validation_metrics(found, 14.0)
    assert figures.keys() == {"region", "hard", "short", "long"} and figures["hard"]["count"] == len(found["regions"])
    said = validation_text(figures)
    assert f"{len(found['regions'])} regions among" in said and "long captions R@1" in said
    captions = {name: found[name] for name in ("image", "short")}
    assert validation_metrics(captions, 14.0).keys() == {"short"}
    assert validation_metrics({"image": found["image"][:1]}, 14.0) == {}


def test_the_figure_that_chooses_a_checkpoint():
    figures = {"region": {"r1": 0.5, "loss": 0.9}, "hard": {"accuracy": 0.3}, "short": {"r1": 0.2}, "long": {"r1": 0.4}}
    assert best_metric(figures, "region") == (0.5, -0.9) and best_metric(figures, "hard")[0] == 0.3
    assert best_metric(figures, "captions")[0] == pytest.approx(0.3)
    assert best_metric({}, "region") == best_metric({}, "captions") == (-1, 0)
