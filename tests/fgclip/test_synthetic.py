"""The synthetic scenes: what they promise to a learner, and that they are the same everywhere."""

import itertools

import numpy as np
import pytest
import torch

from fgclip import Tokenizer, synthetic
from fgclip.data import Collate, data_statistics
from fgclip.synthetic import ATTRIBUTES, PHRASES, PLACEMENTS, SyntheticRegions


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scenes(placement):
    scenes = SyntheticRegions(30, seed=5, placement=placement)
    records = [scenes.record(i) for i in range(30)]
    sizes = {len(r.regions) for r in records}
    assert sizes == ({4} if placement == "grid" else {2, 3, 4})
    for record in records:
        phrases = [r.phrases[0] for r in record.regions]
        assert len(set(phrases)) == len(phrases) and set(phrases) <= set(PHRASES)
        assert record.label == any(" red " in phrase for phrase in phrases)
        assert all(phrase in record.long for phrase in phrases)
        for a in record.regions:
            x1, y1, x2, y2 = a.box
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            for b in record.regions:
                apart = x1 >= b.box[2] or x2 <= b.box[0] or y1 >= b.box[3] or y2 <= b.box[1]
                assert a is b or apart
    assert len({r.short for r in records}) > 25 and len(set(PHRASES)) == 192
    assert data_statistics(records).boxes.invalid == 0


def test_some_regions_of_a_scene():
    """Others at every visit; the picture and the captions are those of the whole scene."""
    whole, few = SyntheticRegions(8, seed=5), SyntheticRegions(8, seed=5, max_regions=1)
    assert whole[2].pixels.equal(few[2].pixels) and whole[2].record.long == few[2].record.long
    drawn = {few[epoch, 2].phrases[0] for epoch in range(20)}
    assert drawn == set(whole[2].phrases) and few[3, 2].phrases == few[3, 2].phrases
    sample = few[7, 2]
    assert sample.boxes.equal(whole[2].boxes[[whole[2].phrases.index(sample.phrases[0])]])
    assert len(sample.hard) == 1 and sample.hard[0][0] == sample.phrases[0]


def test_negatives_differ_in_one_attribute():
    scenes = SyntheticRegions(20, seed=1)
    for region in (region for i in range(20) for region in scenes.record(i).regions):
        own = region.phrases[0].split()[1:]
        assert len(set(region.negatives)) == 10
        for negative in region.negatives:
            other = negative.split()[1:]
            assert sum(a != b for a, b in zip(own, other, strict=True)) == 1
            assert all(word in values for word, values in zip(other, ATTRIBUTES, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_scene_is_drawn_from_seed_and_index(placement):
    few, many = (SyntheticRegions(count, seed=2, placement=placement) for count in (3, 50))
    for i in range(3):
        assert few[i].pixels.equal(many[4, i].pixels) and few[i].boxes.equal(many[i].boxes)
        assert few[i].hard == many[7, i].hard
    other = SyntheticRegions(3, seed=3, placement=placement)
    assert not other[0].pixels.equal(few[0].pixels) and other.record(0).long != few.record(0).long
    assert few[0].pixels.shape == (3, 64, 64) and few[0].pixels.dtype == torch.float32
    with pytest.raises(IndexError):
        few[3]


def test_shapes_and_textures_differ():
    u, v = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32))
    shapes = [synthetic.shape_mask(name, u, v) for name in synthetic.SHAPES]
    textures = [synthetic.texture_mask(name, u, v) for name in synthetic.TEXTURES]
    for masks in (shapes, textures):
        assert all((a != b).mean() > 0.05 for a, b in itertools.combinations(masks, 2))


def test_a_learned_vocabulary_makes_short_texts():
    scenes = SyntheticRegions(40, seed=0)
    tokenizer = Tokenizer(synthetic.vocabulary())
    assert {len(tokenizer.encode(phrase)) for phrase in PHRASES} == {4}
    batch = Collate(tokenizer)([scenes[i] for i in range(40)])
    assert batch["short_texts"].shape[1] <= 16 and batch["long_texts"].shape[1] <= 40
    assert batch["truncated"] == 0 and len(batch["region"]) == 160
