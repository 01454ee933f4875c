"""The losses of a step: two gloo processes against one, micro-batches against one batch, and the metrics.

This file starts itself twice, each process writes what it saw, the tests compare.
"""

import copy
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fgclip import FGCLIP, Tokenizer
from fgclip.data import Collate
from fgclip.freezing import freeze, train_unfrozen
from fgclip.lora import add_lora
from fgclip.losses import PairBank, symmetric_loss
from fgclip.model import l2_normalize
from fgclip.objective import FGCLIPLoss, freeze_unreached
from fgclip.synthetic import SyntheticRegions, vocabulary
from trainkit import distributed
from trainkit.step import TrainStep

WEIGHTS = dict(loss_long=1.0, loss_short=1.0, loss_region=0.5, loss_hard=0.7)
NAMES = ("long", "short", "region", "hard")
# Images of the two micro-batches of a step: of one process, and of each of two. Image 0 has no regions.
ALONE = ((0, 1, 2, 3, 4, 5), (6, 7, 8, 9))
SPLITS = {
    "even": (((0, 1, 2), (6, 7)), ((3, 4, 5), (8, 9))),
    "ragged": (((0,), (6, 7, 8)), ((1, 2, 3, 4, 5), (9,))),
    "cached": (((0,), (1, 2, 3, 4)), ((5, 6, 7), (8, 9))),  # together the images in order
}

SPLITS["sigmoid"] = SPLITS["cached"]
TOGETHER = ("cached", "sigmoid")  # micro-batches of one large batch
CASES = (("even", 1), ("ragged", 2), ("cached", 2), ("sigmoid", 2))  # split, and classes of the banks
PREPARE = dict(sigmoid=lambda model: model.with_logit_bias(-2.0).double())


def make_model(vocab_size):
    torch.manual_seed(0)
    tower = dict(layers=2, heads=2, mlp_width=16)
    vision = dict(image_size=16, patch_size=8, width=16, **tower)
    text = dict(vocab_size=vocab_size, context_length=24, width=12, **tower)
    return FGCLIP(vision=vision, text=text, embed_dim=8, logit_scale=2.0).double()


def make_batches(micro_batches, **options):
    """Scenes of two to four regions; image 0 has none, those of image 8 have no negatives, and 1 and 2 are the same."""
    scenes = SyntheticRegions(10, seed=3, image_size=16, placement="free")
    samples = [scenes[i] for i in range(10)]
    samples[0].boxes, samples[0].phrases, samples[0].hard = torch.zeros(0, 4), [], []
    samples[8].hard = [[] for _ in samples[8].hard]
    samples[2] = copy.copy(samples[1])
    collate = Collate(Tokenizer(vocabulary()), context_length=24, long_context_length=36, **options)
    batches = [collate([samples[i] for i in images]) for images in micro_batches]
    for batch in batches:
        batch["pixels"] = batch["pixels"].double()
    return batches


def same(model):
    return model


def steps(wrap, micro_batches, classes=1, cached=False, prepare=same):
    """Three steps on the same images, the last two with the banks that the first has begun to fill."""
    bare = prepare(make_model(Tokenizer(vocabulary()).vocab_size))
    model = wrap(bare)
    sizes = dict(region=6, long=4, short=4)
    banks = torch.nn.ModuleDict({name: PairBank(size, 8, classes=classes) for name, size in sizes.items()}).double()
    dtype = bare.logit_scale.dtype
    objective = FGCLIPLoss(model, names=NAMES, banks=banks.to(dtype), device="cpu")
    stepper = TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.05), weights=WEIGHTS, describe=str,
        forward=lambda _, batch: (objective(batch), {}), device="cpu",
    )  # fmt: skip
    seen = []
    for _ in range(3):
        batches = [batch | dict(pixels=batch["pixels"].to(dtype)) for batch in make_batches(micro_batches)]
        batches = [batches] if cached else batches
        objective.begin(batches, use_banks=stepper.steps >= 1)
        result = stepper(batches, keep_gradients=True)
        gradients = {name: p.grad.clone() for name, p in bare.named_parameters() if p.requires_grad}
        content = {name: value.clone() for name, value in banks.state_dict().items()}
        seen.append(dict(losses=result.losses, metrics=objective.metrics(), gradients=gradients, banks=content))
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    observed, rank = {}, distributed.rank()
    for name, classes in CASES:
        case = (SPLITS[name][rank], classes, name in TOGETHER, PREPARE.get(name, same))
        observed[name, classes] = steps(DistributedDataParallel, *case)
    torch.save(observed, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, two_ranks):
    return two_ranks(__file__, tmp_path_factory.mktemp("two-ranks"))


@pytest.mark.parametrize(("split", "classes"), CASES)
def test_two_ranks_are_one_process(ranks, split, classes):
    """Losses, metrics, gradients and banks, over micro-batches of unequal content; cached, of one large batch."""
    images = [range(10)] if split in TOGETHER else ALONE
    for step, alone in enumerate(steps(same, images, classes, prepare=PREPARE.get(split, same))):
        first, second = (seen[split, classes][step] for seen in ranks)
        for name, loss in alone["losses"].items():
            assert first["losses"][name] == pytest.approx(loss, rel=1e-9), name
        for name, metric in alone["metrics"].items():
            if not name.endswith("_unmatched"):  # the pairs of one rank only
                assert first["metrics"][name] == pytest.approx(metric, rel=1e-6), name
            assert first["metrics"][name] == pytest.approx(second["metrics"][name], nan_ok=True), name
        for part in ("gradients", "banks"):
            for name, value in alone[part].items():
                torch.testing.assert_close(first[part][name], value, msg=name)
                assert first[part][name].equal(second[part][name]), name
    assert alone["metrics"]["region_candidates"] > 6


@pytest.mark.parametrize("frozen", [[], ["text"], ["vision"]])
def test_cached_micro_batches_are_one_large_batch(frozen):
    """In float32; with frozen towers in float64 and with activation checkpointing."""

    def prepare(model):
        freeze(model, frozen)
        model.set_checkpointing(bool(frozen))
        return model if frozen else model.float()

    tolerance = dict(rtol=1e-9, atol=1e-12) if frozen else dict(rtol=1e-5, atol=1e-6)
    parts = ((0,), (1, 2, 3, 4), (5, 6), (7, 8, 9))
    whole = steps(same, [range(10)], prepare=prepare)
    cached = steps(same, parts, cached=True, prepare=prepare)
    for one, other in zip(whole, cached, strict=True):
        for part in ("losses", "metrics", "gradients", "banks"):
            assert one[part].keys() == other[part].keys()
            for name, value in one[part].items():
                torch.testing.assert_close(other[part][name], value, **tolerance, check_dtype=False, msg=name)


def test_the_second_pass_replays_the_random_states_and_skips_frozen_towers():
    """Under autocast. The image tower runs again, each micro-batch just before its own backward pass."""
    model = make_model(Tokenizer(vocabulary()).vocab_size).float()
    freeze(model, ["text"])
    add_lora(model, ["v_proj"], rank=2, alpha=4.0, dropout=0.5)
    for block in model.vision_model.encoder.layers:
        torch.nn.init.normal_(block.self_attn.v_proj.lora_up)
    train_unfrozen(model)
    seen, texts = [], []

    def look(module, inputs, output):
        seen.append(output.detach().clone())
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(None))

    model.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(look)
    model.text_model.register_forward_hook(lambda *call: texts.append(call))
    objective = FGCLIPLoss(model, names=NAMES, banks={}, device="cpu")
    batches = [batch | dict(pixels=batch["pixels"].float()) for batch in make_batches(((0, 1, 2), (0, 1, 2)))]
    objective.begin([batches])
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(batches)
    states = torch.get_rng_state()
    assert len(seen) == 2 and not seen[0].equal(seen[1]) and len(texts) == 4
    sum(losses.values()).backward()
    first, last, last_again, end, first_again, _ = seen
    assert first_again.equal(first) and last_again.equal(last) and end is None and first.dtype == torch.bfloat16
    assert len(texts) == 4 and torch.get_rng_state().equal(states)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def one_step(micro_batches, names, roi_projection=False, **options):
    model = make_model(Tokenizer(vocabulary()).vocab_size)
    model = model.with_roi_projection().with_logit_bias(-2.0).double() if roi_projection else model
    freeze_unreached(model, names)
    objective = FGCLIPLoss(model, names=names, banks={}, device="cpu")
    batches = make_batches(micro_batches, **options)
    objective.begin(batches)
    total = 0.0
    for batch in batches:
        loss = sum(objective(batch).values()) / len(batches)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, objective.metrics()


def test_micro_batches_are_one_batch_where_there_are_no_other_negatives():
    whole, gradients, metrics = one_step([range(10)], ["hard"])
    parts, others, of_parts = one_step([(0, 1), (2, 3, 4, 5, 6), (7, 8, 9)], ["hard"])
    assert parts == pytest.approx(whole, rel=1e-12) and of_parts == pytest.approx(metrics, nan_ok=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)


@pytest.mark.parametrize("roi_projection", [False, True])
@pytest.mark.parametrize("names", [names for n in (1, 2, 3, 4) for names in itertools.combinations(NAMES, n)])
def test_what_is_not_frozen_is_reached(names, roi_projection):
    gradients = one_step([range(10)], names, roi_projection)[1]
    assert gradients and all(gradient is not None for gradient in gradients.values()), names
    every = {name for name, _ in make_model(Tokenizer(vocabulary()).vocab_size).named_parameters()}
    scales = {"long": "logit_scale", "region": "logit_scale_finegraind", "hard": "logit_scale_hardneg"}
    for loss, scale in scales.items():
        assert (scale in gradients) == (loss in names or (loss == "long" and "short" in names))
    assert len(names) < 4 or not every - gradients.keys()


def test_a_batch_without_regions_or_negatives():
    loss, gradients, metrics = one_step([(0,)], ["region", "hard"])
    assert loss == 0 and math.isnan(metrics["region_r1"]) and math.isnan(metrics["hard_r1"])
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_metrics_are_what_they_say():
    """Against the definitions, spelt out."""
    torch.manual_seed(0)
    model = make_model(Tokenizer(vocabulary()).vocab_size)
    bank = PairBank(50, 8).double()
    stale = l2_normalize(torch.randn(50, 8, dtype=torch.float64))
    (batch,) = make_batches([range(10)])
    ids = batch["short_ids"][batch["region"]]
    bank.enqueue(stale, stale.flip(0), torch.cat([ids[:3], torch.arange(47)]))
    stale_ids = bank.negatives("texts")["bank_ids"].clone()
    features = {name: value.detach() for name, value in model(batch).items()}
    region, text = l2_normalize(features["regions"]), l2_normalize(features["region_texts"])
    scale, count = features["scale_region"], len(region)
    expected, _ = symmetric_loss(region, text, scale, ids=ids, bank=bank, with_stats=True)

    objective = FGCLIPLoss(model, names=["region"], banks={"region": bank}, device="cpu")
    objective.begin([batch])
    losses = objective(batch)
    metrics = objective.metrics()
    assert losses["loss_region"].item() == pytest.approx(expected.item())
    same = ids[:, None] == ids
    wrong = {}
    for name, query, key in (("text", region, text), ("region", text, region)):
        logits = scale * query @ key.T
        wrong[name] = logits.masked_fill(same & ~torch.eye(count, dtype=torch.bool), -torch.inf)
    r1 = sum((w.argmax(1) == torch.arange(count)).double().mean() for w in wrong.values()) / 2
    loss = sum(-w.log_softmax(1).diagonal().mean() for w in wrong.values()) / 2
    assert metrics["region_in_batch"] == pytest.approx(loss.item())
    assert metrics["region_in_batch_r1"] == pytest.approx(r1.item())
    assert metrics["region_candidates"] == count + 50 and metrics["region_bank"] == 50
    masked = (same.sum(1) - 1 + (ids[:, None] == stale_ids).sum(1)).double().mean().item()
    assert masked > 0 and metrics["region_unmasked"] == pytest.approx(count + 50 - masked)
    cosines = region @ text.T
    assert metrics["region_cosine"] == pytest.approx(cosines.diagonal().mean().item())
    assert metrics["region_cosine_unmatched"] == pytest.approx(cosines[~same].mean().item())
    assert metrics["norm_regions"] == pytest.approx(features["regions"].norm(dim=1).mean().item())
    assert bank.images[0].features[: count % 50].equal(region[: count % 50])
