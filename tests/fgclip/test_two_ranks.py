"""Two gloo processes against one: this file starts itself twice, each process writes what it saw, the tests compare."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fgclip import FGCLIP
from fgclip.losses import PairBank, contrast_pairs, hard_negative_loss, symmetric_loss
from fgclip.model import unit
from trainkit import distributed

ROOT = Path(__file__).resolve().parents[2]
# Images of each rank, of eight; the regions of each image. In the last split one rank has not a single region.
SPLITS = {"even": (4, 4), "ragged": (3, 5), "no regions": (2, 6)}
REGIONS = [0, 0, 2, 1, 0, 3, 1, 2]
WEIGHTS = dict(long=1.0, short=1.0, region=0.1, hard=0.5)


def make_model():
    torch.manual_seed(0)
    return FGCLIP(
        vision=dict(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=16),
        text=dict(vocab_size=32, context_length=24, width=12, layers=2, heads=2, mlp_width=16),
        embed_dim=8,
        logit_scale=2.0,
    ).double()


def make_batch(images):
    """The part of one global batch that a rank with these images has. Texts 3 and 5 are the same caption."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 30, (12, 6), generator=generator)
    texts[:, 5] = 31
    pixels = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
    corners = torch.rand(sum(REGIONS), 4, generator=generator)
    boxes = torch.cat([corners[:, :2] * 0.5, 0.5 + corners[:, 2:] * 0.5], dim=1)
    phrases = torch.randint(0, 12, (sum(REGIONS),), generator=generator)
    of_image = torch.repeat_interleave(torch.tensor(REGIONS))
    regions = torch.isin(of_image, torch.tensor(list(images)))
    ids = torch.arange(100, 112)
    ids[5] = ids[3]
    return dict(
        pixels=pixels[list(images)],
        short_texts=texts,
        short_ids=ids,
        short=torch.tensor([3, 1, 2, 5, 4, 3, 6, 7])[list(images)],
        long_texts=texts[:, 1:],
        long_ids=ids,
        long=torch.arange(8)[list(images)],
        boxes=[boxes[of_image == i] for i in images],
        region=phrases[regions],
        hard=torch.stack([phrases, (phrases + 1) % 12, (phrases + 5) % 12], 1)[regions].flatten(),
        region_labels=(torch.arange(sum(REGIONS)) % 2)[regions],
    )


def steps(wrap, images, classes):
    """Two steps on the same images, the second with the bank that the first has filled."""
    model = wrap(make_model())
    bank = PairBank(6, 8, classes=classes).double()
    seen = []
    for _ in range(2):
        model.zero_grad()
        batch = make_batch(images)
        features = model(batch)
        pairs = contrast_pairs(features, batch)
        losses = {
            name: symmetric_loss(p.image, p.text, p.logit_scale, ids=p.ids, bank=bank if name == "region" else None)
            for name, p in pairs.items()
        }
        region = pairs["region"]
        losses["hard"] = hard_negative_loss(region.image, unit(features["hard_texts"]), features["scale_hard"])
        bank.enqueue(region.image, region.text, region.ids, region.labels)
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        module = getattr(model, "module", model)
        seen.append(
            dict(
                losses={k: v.detach() for k, v in losses.items()},
                gradients={k: p.grad.clone() for k, p in module.named_parameters()},
                bank={k: v.clone() for k, v in bank.state_dict().items()},
            )
        )
    return seen


def golden_losses(arrays):
    """The official global loss of this rank, and gradients of the sum over ranks."""
    image, long, short = (
        arrays[name][distributed.rank()].clone().requires_grad_() for name in ("image", "text_long", "text_short")
    )
    scale = arrays["logit_scale"].clone().requires_grad_()
    losses = [symmetric_loss(image, text, scale.exp()) for text in (long, short)]
    sum(losses).backward()
    return dict(
        loss_long=losses[0].detach(),
        loss_short=losses[1].detach(),
        grad_image=image.grad,
        grad_text_long=long.grad,
        grad_text_short=short.grad,
        grad_logit_scale=scale.grad,
    )


def observe(folder):
    seen = {}
    for name, split in SPLITS.items():
        first = sum(split[: distributed.rank()])
        images = range(first, first + split[distributed.rank()])
        for classes in (1, 2) if name == "ragged" else (1,):
            seen[name, classes] = steps(DistributedDataParallel, images, classes)
    if (folder / "golden.pt").exists():
        seen["golden"] = golden_losses(torch.load(folder / "golden.pt", weights_only=True))
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    folder = Path(sys.argv[1])
    torch.save(observe(folder), folder / f"rank{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, two_ranks):
    """What both ranks saw."""
    folder = tmp_path_factory.mktemp("two-ranks")
    arrays = ROOT.parent / "shared" / "golden" / "fgclip" / "global_loss_ws2.npz"
    if arrays.exists():
        import numpy as np

        with np.load(arrays) as z:
            torch.save({k: torch.from_numpy(np.array(z[k])) for k in z.files}, folder / "golden.pt")
    return two_ranks(__file__, folder)


@pytest.mark.parametrize(("split", "classes"), [*((name, 1) for name in SPLITS), ("ragged", 2)])
def test_two_ranks_are_one_batch(ranks, split, classes):
    alone = steps(lambda model: model, range(8), classes)
    assert alone[1]["losses"]["region"] > alone[0]["losses"]["region"] > 0  # the bank is in use
    for step in range(2):
        first, second = (seen[split, classes][step] for seen in ranks)
        for name, loss in alone[step]["losses"].items():
            torch.testing.assert_close((first["losses"][name] + second["losses"][name]) / 2, loss, msg=name)
        for name, gradient in alone[step]["gradients"].items():
            torch.testing.assert_close(first["gradients"][name], gradient, msg=name)
            assert first["gradients"][name].equal(second["gradients"][name]), name
        for name, content in alone[step]["bank"].items():
            torch.testing.assert_close(first["bank"][name], content, msg=name)
            assert first["bank"][name].equal(second["bank"][name]), name


def test_golden_loss_of_two_ranks(ranks, golden):
    g = golden("global_loss_ws2")
    for rank, seen in enumerate(ranks):
        for name, found in seen["golden"].items():
            tolerance = dict(rtol=1e-5, atol=1e-5) if name.startswith("loss") else dict(rtol=1e-3, atol=5e-5)
            torch.testing.assert_close(found, g[name][rank], **tolerance, msg=name)
