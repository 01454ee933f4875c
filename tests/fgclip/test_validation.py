"""Metrics of images that were not trained on: what a model makes of a data set, against its own forward pass."""

import pytest
import torch

from fgclip import Tokenizer
from fgclip.data import Collate
from fgclip.embedding import Embedder
from fgclip.metrics import choice_metrics, region_metrics, retrieval_recall
from fgclip.model import l2_normalize
from fgclip.synthetic import SyntheticRegions
from fgclip.tasks import best_metric, validation_metrics, validation_text


def test_metrics_are_those_of_one_forward_pass(small_model):
    """Whatever the batches; regions have the scale of their own loss, and the captions that the data set drew."""
    scenes = SyntheticRegions(7, seed=0, image_size=32, placement="free")
    with torch.no_grad():
        small_model.logit_scale_finegraind.fill_(1.5)
        batch = Collate(Tokenizer("bytes"), context_length=24, long_context_length=36)([scenes[i] for i in range(7)])
        features = {name: l2_normalize(value) for name, value in small_model(batch).items() if value.ndim}
    between = []
    embedder = Embedder(small_model, Tokenizer("bytes"), batch_size=3, between=lambda: between.append(1))
    metrics = validation_metrics(embedder, scenes)
    scale, ids = small_model.logit_scales()["region"].item(), batch["short_ids"][batch["region"]]
    region, image, every = features["regions"], features["image"], torch.arange(7)
    expected = region_metrics(region, features["region_texts"], ids, scale)
    assert metrics.pop("region") == pytest.approx(expected, rel=1e-5)
    hard = choice_metrics(region[batch["hard_regions"]], features["hard_texts"], batch["hard_counts"])
    assert metrics.pop("hard") == pytest.approx(hard) and hard["count"] == len(region)
    assert metrics.keys() == {"short", "long"}
    for name, row in metrics.items():
        recall = retrieval_recall(image, features[name], every)
        assert row["count"] == 7 and row["r1"] == sum(part["R@1"] for part in recall.values()) / 2
        assert all(row[f"{way}_{k}"] == value for way, part in recall.items() for k, value in part.items())
    assert len(between) > 3  # texts, too, can be interrupted
    assert validation_metrics(embedder, scenes, regions=False, long=False).keys() == {"short"}
    assert validation_metrics(embedder, SyntheticRegions(1, seed=0, image_size=32), regions=False) == {}


def test_the_line_on_the_console():
    region = dict(count=600, candidates=132, loss=0.5, relative=0.1, r1=0.75, cosine=0.9, cosine_unmatched=0.1)
    metrics = dict(region=region | dict(effective_rank=24.4), hard=dict(accuracy=0.5, count=600))
    assert validation_text(metrics | dict(long=dict(r1=0.25, count=150))) == (
        "600 regions among 132 captions: loss 0.500 (0.10 of chance), R@1 0.750, cosine 0.90 (others 0.10), effective "
        "rank 24; hard negatives 0.500 of 600; long captions R@1 0.250 of 150"
    )
    assert validation_text({}) == "nothing to choose from"


def test_the_metric_that_chooses_a_checkpoint():
    metrics = {"region": {"r1": 0.5, "loss": 0.9}, "hard": {"accuracy": 0.3}, "short": {"r1": 0.2}, "long": {"r1": 0.4}}
    assert best_metric(metrics, "region") == (0.5, -0.9) and best_metric(metrics, "hard")[0] == 0.3
    assert best_metric(metrics, "captions")[0] == pytest.approx(0.3)
    assert best_metric({}, "region") == best_metric({}, "captions") == (-1, 0)
