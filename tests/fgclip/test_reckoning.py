"""What is reckoned beforehand against a real step's multiplications and what autograd really keeps."""

import re

import pytest
from scripts import FGCLIP as TINY
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import train_fgclip
from fgclip.freezing import freeze
from fgclip.lora import add_lora
from fgclip.reckoning import PEAK, UTILISATION, cost, reckoning


def really(model, batch):
    """Operations and kept bytes of a step on real tensors."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model({name: value for name, value in batch.items() if name not in ("boxes", "region")})
        total = sum(feature.sum() for name, feature in features.items() if not name.startswith("scale"))
        total.backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("parts", "rank", "checkpointing"),
    [([], 0, False), (["text"], 2, False), (["vision:2", "text:1"], 0, True)],
)
def test_operations_and_bytes_are_those_of_a_step(small_model, small_batch, parts, rank, checkpointing):
    freeze(small_model, parts)
    if rank:
        add_lora(small_model, ("q_proj", "fc1"), rank=rank, alpha=4, dropout=0.0)
    small_model.set_checkpointing(checkpointing)
    real = {name: part for name, part in small_batch.items() if name != "boxes"}
    operations, kept = cost(small_model, real, amp="none")
    right, bytes_kept = really(small_model, small_batch)
    assert operations == right and kept == pytest.approx(bytes_kept, rel=0.1)
    assert operations < cost(small_model, real, amp="none", cached=True)[0] < 2 * operations
    assert operations < cost(small_model, small_batch, amp="none")[0]  # with regions
    assert cost(small_model, real, amp="bf16")[1] != kept


def test_sentences(small_model, small_batch):
    options = dict(images=1000, batches=3, world_size=2, amp="bf16", optimizer="adamw", average=True, bank_bytes=2**30)
    plain = reckoning(small_model, small_batch, **options, cached=False)
    freeze(small_model, ["vision"])
    frozen = reckoning(small_model, small_batch, **options, cached=False)
    cached = reckoning(small_model, small_batch, **options, cached=True)
    small_model.requires_grad_(True)
    (operations, _), (both, _) = (cost(small_model, small_batch, amp="bf16", cached=cached) for cached in (False, True))
    rate = UTILISATION * PEAK["bf16"] / (operations / 2) * 2
    assert "53 tokens" in plain[0] and f"{operations / 2e9:.1f} GFLOP" in plain[0]
    assert "banks 1.00" in plain[1] and "; 1.0 together" in plain[1]
    assert f"{rate:.4g} images and {rate * 53:.4g} tokens a second, {rate / 10:.4g} MB/s" in plain[2]
    assert "83 steps of 12" in plain[3]
    shares = [float(re.search(r"([\d.e+]+) images", lines[2])[1]) / rate for lines in (frozen, cached)]
    assert shares[0] > shares[1] > operations / both  # the image tower runs once


def test_check_prints_it(capsys):
    train_fgclip.main([*TINY, "--check", "--cached-negatives", "--accumulate", "2", "--freeze", "text"])
    output = capsys.readouterr().out
    assert "reckoned by the shapes of one batch, not measured" in output and "an epoch of 32 images: 4 steps" in output
