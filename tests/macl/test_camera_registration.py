"""Registration of the two cameras: the shift between drawn and real pairs, and the flags that correct it."""

from argparse import Namespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2.functional import resize

import train_stage1
import train_stage2
from macl import predict
from macl.data import DAY_AND_NIGHT, KAIST, LLVIP, SyntheticPairs, find_pairs, moved, read_pair
from macl.registration import estimate_shift, rig_shift
from macl.training import choose_move
from trainkit.errors import InputError

REAL = {
    "llvip": (LLVIP, "llvip", ("train", "test")),
    "roadscene": (LLVIP, "roadscene_flir", ("train",)),
    "kaist": (KAIST, "kaist/kaist-rgbt", ("train", "test")),
}
SHIFTS = [(0, 0), (3, 1), (-12, 6), (12, -6), (-1, -4)]


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_known_shift_is_found_exactly(shift, inverted):
    for sample in SyntheticPairs(2, 5):
        visible, infrared = sample["visible"], 255 - sample["visible"] if inverted else sample["visible"]
        infrared = moved({"infrared": infrared}, shift)["infrared"]
        found, score = estimate_shift(visible, infrared)
        assert found == shift and 0.1 < score <= 1.001
        assert estimate_shift(visible / 255, infrared / 255)[0] == shift


def test_the_score_is_the_correlation_of_edges():
    """Against numpy's, over all pixels further than most + 2 from the border."""
    sample = SyntheticPairs(1, 0, size=(64, 80))[0]
    (x, y), score = estimate_shift(sample["visible"], sample["infrared"], (4, 2))
    edges = []
    for image in (sample["visible"], sample["infrared"]):
        grey = avg_pool2d(image.double().mean(0, keepdim=True) / 255, 3, 1, 1, count_include_pad=False)[0]
        strength = torch.zeros_like(grey)
        strength[:-1, :-1] = (grey.diff(dim=0)[:, :-1].square() + grey.diff(dim=1)[:-1].square()).sqrt()
        strength[:-1, -1], strength[-1, :-1] = grey.diff(dim=0)[:, -1].abs(), grey.diff(dim=1)[-1].abs()
        edges.append((strength / strength.mean()).clamp(max=5))
    rows = edges[0][4:60, 6:74].flatten(), edges[1][4 + y : 60 + y, 6 + x : 74 + x].flatten()
    assert score == pytest.approx(torch.corrcoef(torch.stack(rows))[0, 1].item(), abs=1e-5)


def test_images_without_edges_or_room():
    image, flat = SyntheticPairs(1, 0)[0]["visible"], torch.full((3, 128, 160), 90, dtype=torch.uint8)
    for pair in ((image, flat), (flat, image), (flat, flat)):
        assert estimate_shift(*pair) == ((0, 0), 0)
    with pytest.raises(InputError, match="--register-most 78 0 is too far for an image of 160 x 128"):
        estimate_shift(image, image, (78, 0))


def test_the_border_is_repeated():
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    pair = {"visible": image, "infrared": image}
    out = moved(pair, (1, -2))
    assert out["infrared"][0].tolist() == [[8, 8, 9, 10]] * 3 and out["visible"] is image
    assert moved(pair, lambda images: (-9, 0))["infrared"][0, :, 0].tolist() == [3, 7, 11]
    assert moved({"visible": image, "infrared": None}, (0, 0))["infrared"] is None


def flags(register="rig"):
    return Namespace(register=register, register_most=[12, 6])


def test_a_rig_is_the_median_and_is_refused_where_pairs_disagree():
    street = SyntheticPairs(40, 7, domain=DAY_AND_NIGHT)
    shift, share = rig_shift(street)
    assert shift == (3, 1) and share > 0.8
    assert rig_shift(street.moved((-3, -1)))[0] == (0, 0)
    scattered = SyntheticPairs(30, 7)
    scattered = [moved(scattered[index], (6 * (index % 3), 0)) for index in range(30)]
    with pytest.raises(InputError, match=r"--register rig: the shift \(6, 0\).* 3\d% of the pairs"):
        choose_move(flags(), scattered)
    move, name, messages = choose_move(flags(), street, "none")
    assert (move, name) == ((-3, -1), "rig 3 1") and "(3, 1)" in messages[0]
    assert "trained with --register 'none', this is rig 3 1" in messages[1]
    assert choose_move(flags("none"), street, "none") == ((0, 0), "none", [])
    move, _, _ = choose_move(flags("each"), scattered)
    shift, share = rig_shift([moved(sample, move) for sample in scattered])
    assert shift == (0, 0) and share > 0.9  # single pairs may be wrong


def images(sample):
    return {name: sample[name] for name in ("visible", "infrared")}


def close(shifts, others):
    """Whether shifts are the same give or take a pixel, as drawn pairs are."""
    return all(abs(a - b) <= 1 for pair in zip(shifts, others, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("register", ["none", "rig", "each"])
def test_scripts_register_training_and_validation(register):
    """Each domain by its own rig: the street's infrared lies 3 px right and 1 down, that of the night does not."""
    drawn = ["--synthetic-train", "24", "--synthetic-val", "24", "--register", register]
    there = (3, 1) if register == "none" else (0, 0)
    for script, classes, off in (
        (train_stage1, [], [(0, 0)] * 2),
        (train_stage2, [["person"]], [there, (0, 0), there, (0, 0)]),
    ):
        *opened, kept, messages = script.open_data(script.parse_arguments(drawn), *classes)
        sets = [*getattr(opened[0], "datasets", opened[:1]), *opened[1:]]
        assert close([rig_shift(dataset)[0] for dataset in sets], off)
        assert register == "rig" or all(bool(dataset.moves) == (register == "each") for dataset in sets)
        kind, *shift = kept["register"].split()
        assert kind == register and (register != "rig" or close([map(int, shift)], [(3, 1) if classes else (0, 0)]))
        assert any("infrared is registered" in line for line in messages) == (register != "none")


def test_pictures_are_registered_and_one_camera_is_not(tmp_path, capsys, monkeypatch):
    class Blind(torch.nn.Module):
        fusion, roi_head, kwargs = Namespace(kind="mean"), Namespace(), {"classes": ["person"]}

        def forward(self, **images):
            seen.append(images)
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}]

    sample = SyntheticPairs(1, 3)[0]
    seen, pair = [], images(moved(sample | {"infrared": sample["visible"]}, (5, 0)))
    monkeypatch.setattr(predict, "load_detector", lambda path, **options: Blind())
    monkeypatch.setattr(predict, "read_checkpoint", lambda path: {"register": "rig 5 0"})
    flags = ["--checkpoint", "a.pt", "--output", str(tmp_path / "out"), "--device", "cpu"]
    for name, image in pair.items():
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
        flags += [f"--{name}", str(tmp_path / f"{name}.png")]
    alone = flags[:-4] + flags[-2:]
    for command in (alone, flags, [*flags, "--register", "rig"], [*flags, "--register", "each"]):
        predict.main(command)
    expected = [pair] * 2 + [moved(pair, (-5, 0))] * 2
    for given, wanted in zip(seen, expected, strict=True):
        assert torch.equal((given["infrared"][0] * 255).round(), wanted["infrared"].float())
    assert capsys.readouterr().out.count("trained with --register 'rig 5 0'") == 3  # all but the third
    with pytest.raises(InputError, match="--register needs --visible and --infrared"):
        predict.main([*alone, "--register", "rig"])


@pytest.mark.parametrize(
    ("name", "size", "count", "least"),
    [("llvip", (256, 320), 62, 1), ("roadscene", (165, 240), 79, 1), ("kaist", (256, 320), 11, 0.9),
     ("llvip256", (256, 256), 106, 0.6)],
)  # fmt: skip
def test_real_pairs(shared, name, size, count, least):
    """With a shift of up to 12 x 4 pixels added, the share found within 2 pixels; without one, the rig."""
    if name == "llvip256":
        folder = shared / "data/llvip256/unlabelled"
        paths = list(find_pairs(folder / "visible", folder / "infrared").values())[::10]
    else:
        kind, root, splits = REAL[name]
        parts = [kind(shared / "data" / root, split) for split in splits]
        paths = [pair[:2] for part in parts for pair in part.pairs]
    pairs = [read_pair(*pair) for pair in paths]
    pairs = [{key: resize(image, size, antialias=True) for key, image in pair.items()} for pair in pairs]
    generator, within = torch.Generator().manual_seed(1), []
    for sample in pairs:
        x, y = (int(torch.randint(-most, most + 1, (), generator=generator)) for most in (12, 4))
        (found_x, found_y), _ = estimate_shift(**moved(sample, (x, y)), most=(16, 8))
        within.append(abs(found_x - x) <= 2 and abs(found_y - y) <= 2)
    assert len(within) == count and sum(within) / count >= least
    assert max(map(abs, rig_shift(pairs)[0])) <= 1
