"""train_fgclip.py as a person runs it: with banks, on files, from published weights, and with wrong flags."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import FGCLIP as TINY
from scripts import load, metrics, refused, run

import train_fgclip
from fgclip import FGCLIP, load_model, save_clip_weights
from fgclip.synthetic import SyntheticRegions
from fgclip.weights import load_clip_weights

BANK = "--bank-size 8 --bank-warmup-steps 5 --global-bank-size 4 --bank-classes 2".split()
SMALL = [*TINY[: TINY.index("--image-size")], "--device", "cpu", "--workers", "0", "--epochs", "2"]


def train(output: Path, *flags, tiny: list = TINY) -> Path:
    return run(train_fgclip, [*tiny, *flags], output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run of 24 steps."""
    return train(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def bank_run(tmp_path_factory):
    """Twelve steps with one region an image, and banks that are used from step 6 on."""
    return train(tmp_path_factory.mktemp("runs") / "bank", *BANK, "--max-steps", 12)


def test_a_step_logs_every_metric(plain):
    for line in metrics(plain):
        assert line["region_candidates"] == 16 >= line["region_unmasked"] > 12
        assert line["region_in_batch"] == pytest.approx(line["loss_region"])
        assert line["long_candidates"] == 4 and "region_bank" not in line
        assert {"region_relative", "region_r1", "region_cosine", "region_cosine_unmatched", "hard_r1"} <= line.keys()
        assert {"logit_scale_global", "logit_scale_region", "logit_scale_hard", "grad_norm", "lr"} <= line.keys()
        assert {"norm_image", "norm_regions", "norm_region_texts", "truncated"} <= line.keys()
    for line in metrics(plain, "validation"):
        assert line["region"].keys() >= {"loss", "relative", "r1", "candidates", "cosine_unmatched", "effective_rank"}
        assert line["region"]["count"] == line["hard"]["count"] == 48 and line["long"]["count"] == 12


def test_the_losses_fall(tmp_path):
    flags = "--synthetic-train 160 --batch-size 16 --lr 0.01 --epochs 6 --vision-width 32 --text-width 32"
    steps = metrics(train(tmp_path / "run", *flags.split(), "--embed-dim", 16, "--ema-decay", 0.98))
    first, last = steps[:5], steps[-5:]
    for name in ("loss_long", "loss_short", "loss_region", "loss_hard"):
        assert sum(line[name] for line in last) < 0.8 * sum(line[name] for line in first), name
    assert sum(line["region_r1"] for line in last) > 2 * sum(line["region_r1"] for line in first)


def test_a_run_with_banks_is_resumed_bit_for_bit(bank_run, tmp_path):
    """Stopped before the banks are used and after; the banks come back with the rest."""
    halves = train(tmp_path / "halves", *BANK, "--max-steps", 4)
    for steps in ("9", "12"):
        train_fgclip.main(["--resume", str(halves), "--max-steps", steps, "--device", "cpu"])
    whole, resumed = load(bank_run), load(halves)
    for part in ("model", "banks"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    assert metrics(bank_run) == metrics(halves)


def test_cached_negatives_are_those_of_a_large_batch_and_are_resumed(tmp_path):
    flags = [*BANK, *"--bank-warmup-steps 2 --region-weight 1 --max-regions 2".split()]
    whole = metrics(train(tmp_path / "whole", *flags, *"--batch-size 8 --max-steps 4".split()))
    flags += "--cached-negatives --accumulate 2".split()
    folder = train(tmp_path / "cached", *flags, "--max-steps", 4)
    cached = metrics(folder)
    for one, other in zip(whole, cached, strict=True):
        assert other.pop("kind") == one.pop("kind")
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert cached[0]["region_candidates"] == 16 and cached[3]["region_candidates"] == 24
    halves = train(tmp_path / "halves", *flags, "--max-steps", 2)
    train_fgclip.main(["--resume", str(halves), "--max-steps", "4", "--device", "cpu"])
    assert metrics(halves) == metrics(folder)


def test_banks_fill_during_warm_up_and_count_only_after_it(bank_run, tmp_path):
    without = metrics(
        train(tmp_path / "without", *"--max-regions 1 --lr-base-batch 48 --region-weight 0.1 --max-steps 7".split())
    )
    steps = metrics(bank_run)
    for line, plain in zip(steps[:5], without, strict=False):
        assert line["region_candidates"] == 4 and line["loss"] == plain["loss"]
    assert steps[0]["region_bank"] > 0
    assert steps[5]["region_candidates"] == 4 + steps[4]["region_bank"]
    assert steps[11]["region_bank"] > 4 and steps[11]["long_bank"] == steps[11]["short_bank"] == 4
    # Step 6 starts from the same weights: with the bank the loss differs, within the batch nothing does.
    assert steps[5]["loss_region"] > without[5]["loss_region"]
    for name in ("region_in_batch", "region_in_batch_r1", "long_in_batch", "loss_hard"):
        assert steps[5][name] == pytest.approx(without[5][name], abs=1e-6), name
    assert steps[6]["loss_hard"] != without[6]["loss_hard"]


def test_a_sigmoid_run_and_its_biases_are_resumed_and_go_on(plain, tmp_path):
    flags = "--loss sigmoid --logit-bias-init -4".split()
    whole = train(tmp_path / "whole", *flags, "--max-steps", 4)
    halves = train(tmp_path / "halves", *flags, "--max-steps", 2)
    train_fgclip.main(["--resume", str(halves), "--max-steps", "4", "--device", "cpu"])
    assert metrics(whole) == metrics(halves)
    last = metrics(whole)[-1]
    assert -4 != last["logit_bias"] == pytest.approx(-4, abs=0.1) and last["logit_bias_region"] != last["logit_bias"]
    tiny = [*TINY[TINY.index("--synthetic-train") :], "--max-steps", 1]
    again = load(train(tmp_path / "again", "--init-from", whole / "last.pt", *flags[:2], tiny=tiny))["model"]
    assert again["logit_bias"].item() == pytest.approx(load(whole)["ema"]["logit_bias"].item(), abs=1e-3)
    plainly = load(train(tmp_path / "plainly", "--init-from", whole / "last.pt", tiny=tiny))
    assert "logit_bias" not in plainly["model"] and "logit_bias" not in metrics(tmp_path / "plainly")[0]
    save_clip_weights(load_model(whole / "last.pt")[0], tmp_path / "weights")
    assert load_clip_weights(tmp_path / "weights").logit_bias == load(whole)["ema"]["logit_bias"]
    started = load(train(tmp_path / "started", "--init-from", plain / "best.pt", *flags, tiny=tiny))["model"]
    assert started["logit_bias"].item() == pytest.approx(-4, abs=0.01)


@pytest.mark.parametrize(
    "flags",
    [
        "--amp bf16 --roi-projection --lr-scale roi_projection=10 text_model=0.1",
        "--checkpoint-activations --placement free --ema-decay 0 --best-by hard",
        "--long-weight 0 --short-weight 0 --best-by hard --optimizer sgd --clip-norm 0",
        "--batch-size 1 --accumulate 3 --cached-negatives --lora-rank 1 --amp bf16 --freeze text:1",
        "--region-weight 0 --accumulate 3 --context-length 24 --activation gelu",
        "--loss sigmoid --accumulate 2 --cached-negatives --bank-size 8 --bank-warmup-steps 0 --lora-rank 1",
        "--loss sigmoid --long-weight 0 --short-weight 0 --amp bf16",
        "--hard-weight 0 --long-weight 0 --max-regions 2 --vocab bytes --bank-size 8 --bank-warmup-steps 0",
    ],
)
def test_every_option_trains_a_step(tmp_path, flags):
    assert len(metrics(train(tmp_path / "run", *flags.split(), "--max-steps", 1))) == 1


def test_stage_global_goes_on_from_a_run(plain, tmp_path, capsys):
    """Architecture and tokenizer come from the checkpoint; the scales of the regions stay as they are."""
    flags = ["--init-from", plain / "best.pt", "--stage", "global", "--synthetic-train", 8, "--synthetic-val", 6]
    flags += ["--batch-size", 4, "--device", "cpu", "--workers", 0, "--epochs", 1]
    after = load(train(tmp_path / "global", *flags, tiny=[]))
    assert after["model_kwargs"] == load(plain)["model_kwargs"] and after["merges"] == load(plain)["merges"]
    before = load(plain, "best.pt")["ema"]
    assert after["model"]["logit_scale"] != before["logit_scale"]
    assert after["model"]["logit_scale_finegraind"] == before["logit_scale_finegraind"]
    (step, _) = metrics(tmp_path / "global")
    assert {name for name in step if name.startswith("loss_")} == {"loss_long", "loss_short"}
    assert all("region" not in line for line in metrics(tmp_path / "global", "validation"))
    output = capsys.readouterr().out
    assert "best captions so far" in output and "far from" not in output


def test_published_weights_and_their_scales(tmp_path, capsys):
    """A folder in Hugging Face's layout; the scales are taken over, held after the step, or reset on request."""
    torch.manual_seed(0)
    tower = dict(width=64, layers=2, heads=1, mlp_width=32)
    text = dict(vocab_size=514, context_length=24, **tower)
    model = FGCLIP(vision=dict(image_size=32, patch_size=8, **tower), text=text, embed_dim=8, logit_scale=6.0)
    save_clip_weights(model, tmp_path / "weights")
    tiny = "--synthetic-train 8 --synthetic-val 4 --batch-size 4 --device cpu --workers 0 --epochs 2".split()
    flags = ["--init-from", tmp_path / "weights", "--vocab", "bytes", "--image-size", 48, "--heads", 1, 1]
    flags += ["--activation", "quick_gelu", "--reset-logit-scales"]
    train(tmp_path / "reset", *flags, "--max-steps", 1, "--logit-scale-init", 3, tiny=tiny)
    output = capsys.readouterr().out
    assert "FG-CLIP" in output and "all logit scales reset to 3.0000" in output
    assert metrics(tmp_path / "reset")[0]["logit_scale_region"] == pytest.approx(3, abs=0.01)
    model, _ = load_model(tmp_path / "reset" / "last.pt")
    assert model.vision_model.image_size == 48  # what it was trained on, not what it was
    train(tmp_path / "kept", *flags[:-1], "--max-steps", 1, tiny=tiny)
    output = capsys.readouterr().out
    assert "logit scale region is 6.0000, far from --logit-scale-init 2.6593; --reset-logit-scales" in output
    assert metrics(tmp_path / "kept")[0]["logit_scale_region"] == pytest.approx(4.6052, abs=1e-4)  # ln 100 at most
    assert load(tmp_path / "kept")["ema"]["logit_scale_finegraind"] == pytest.approx(4.6052, abs=1e-4)
    train_fgclip.main(["--resume", str(tmp_path / "kept"), "--device", "cpu"])
    assert "logit scale hard is 4.6" in capsys.readouterr().out
    train_fgclip.main(
        ["--resume", str(tmp_path / "reset"), "--device", "cpu", "--reset-logit-scales", "--logit-scale-init", "2"]
    )
    assert metrics(tmp_path / "reset")[1]["logit_scale_hard"] == pytest.approx(2, abs=0.01)


def finehard(folder: Path, count=12, regions=True) -> list[str]:
    """A data set in FineHARD's shape, and the flags that name it."""
    scenes = SyntheticRegions(count, seed=0)
    (folder / "images").mkdir(parents=True)
    items = []
    for i in range(count):
        record = scenes.record(i)
        Image.new("RGB", (40, 30), (10 * i, 100, 50)).save(folder / "images" / f"{i}.jpg")
        boxes = [
            dict(bbox=[*r.box, 0.9], short_expr=r.phrases[0], flag_short_neg=1)
            | dict(short_expr_negs={str(k): text for k, text in enumerate(r.negatives)})
            for r in record.regions
        ]
        boxes[0]["bbox"][2] = boxes[0]["bbox"][0]  # without area
        item = dict(f_path=f"{i}.jpg", caption=record.long, short_caption=record.short[0])
        items.append(item | (dict(bbox_info=boxes) if regions else {}))
    (folder / "items.json").write_text(json.dumps(items))
    return ["--annotations", str(folder / "items.json"), "--image-root", str(folder / "images")]


FILES = [*SMALL, "--image-size", "32", "--batch-size", "4", "--vocab", "bytes", "--lr", "0.01", "--warmup-steps", "0"]


def test_annotation_files_train(tmp_path, capsys):
    data = finehard(tmp_path)
    folder = train(tmp_path / "run", *data, "--val-share", 0.25, "--epochs", 3, tiny=FILES)
    output = capsys.readouterr().out
    assert "held out for validation: 3 of the 12 images" in output and "training from random weights" in output
    assert "36 boxes, 9 (25.00%) dropped" in output
    steps = metrics(folder)
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"] and steps[0]["region_candidates"] == 12
    assert steps[0]["logit_scale_region"] == pytest.approx(4.6052, abs=0.02)
    again = train(tmp_path / "again", *data, "--val-annotations", data[1], "--max-steps", 1, tiny=FILES)
    assert "items.json; 12 of them are trained on too" in capsys.readouterr().out
    assert metrics(again, "validation")[0]["region"]["count"] == 36


def test_the_real_sample_trains(shared, tmp_path):
    """COCO's own layout and the FineHARD shape of the same images, with a small random model."""
    for name, flags in {
        "coco": ["--data-root", shared / "data/fgclip/coco", "--format", "coco"],
        "finehard": ["--annotations", shared / "data/fgclip/finehard_format_DERIVED.json"]
        + ["--image-root", shared / "data/fgclip/coco"],
    }.items():
        folder = train(tmp_path / name, *flags, "--val-share", 0.2, "--max-steps", 4, tiny=FILES)
        steps = metrics(folder)
        assert all(torch.tensor(line["loss"]).isfinite() for line in steps)
        assert steps[-1]["loss"] < steps[0]["loss"] and ("loss_hard" in steps[0]) == (name == "finehard")
        assert metrics(folder, "validation")[-1]["region"]["candidates"] > 5


def test_wrong_flags_end_in_one_sentence(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def say(flags="", *more, tiny=TINY):
        return refused(capsys, train_fgclip.main, *tiny, *flags.split(), *more)

    assert "--stage" in say("--stage local")
    assert "no other caption" in say("--batch-size 1")
    assert "no other phrase" in say("--batch-size 1 --max-regions 1 --long-weight 0 --short-weight 0")
    assert "has no regions" in say("--stage global --region-weight 1")
    assert "has no regions" in say("--stage global --bank-size 8")
    assert "no weight" in say("--bank-size 8 --region-weight 0")
    assert "no weight" in say("--global-bank-size 8 --long-weight 0 --short-weight 0")
    assert "nothing would be learnt" in say("--stage global --long-weight 0 --short-weight 0")
    assert "does not divide" in say("--bank-size 9 --bank-classes 2")
    assert "the run has only 24 steps" in say("--bank-size 8")
    assert "--cached-negatives needs --accumulate" in say("--cached-negatives")
    assert "--image-root needs" in say("--image-root .")
    assert "--val-annotations needs" in say("--val-annotations x.json")
    assert "--val-image-root needs" in say("--val-image-root .")
    assert "--trust-torchscript" in say("--trust-torchscript")
    assert "--reset-logit-scales needs" in say("--reset-logit-scales")
    assert "at most ln 100" in say("--logit-scale-init 5")
    assert "--best-by region needs" in say("--stage global --best-by region")
    assert "no parameter's name begins so" in say("--lr-scale roi_projection=10")
    assert "multiple of the patch size" in say("--device cpu --image-size 30 --init-from", plain / "best.pt", tiny=[])
    assert "fit together" in say("--vision-heads 5")
    assert "no long text path" in say("--context-length 20")
    assert "comes with the weights" in say("--init-from", plain / "best.pt")
    assert "brings its own tokenizer" in say("--vocab bytes --device cpu --init-from", plain / "best.pt", tiny=[])
    assert "nothing.txt does not exist" in say("--vocab nothing.txt")
    assert "--heads needs --init-from" in say("--heads 1 1")
    assert "no room for the start and end tokens" in say("--context-length 1 --long-weight 0")
    assert "of at most 4096" in say("--device cpu --image-size 8192 --init-from", plain / "best.pt", tiny=[])
    assert not list(tmp_path.iterdir())


def test_wrong_data_ends_in_one_sentence(tmp_path, capsys):
    data = finehard(tmp_path / "data")
    output = ["--output", tmp_path / "run"]

    def say(*flags):
        return refused(capsys, train_fgclip.main, *FILES, *flags, *output)

    assert "--image-root is missing" in say(*data[:2])
    assert "nothing.json does not exist" in say("--annotations", "nothing.json", *data[2:])
    assert "jsonfiles does not exist" in say("--data-root", tmp_path / "data")
    assert "expected a COCO file" in say(*data, "--format", "coco")
    assert "too few" in say(*data, "--val-share", 1)
    assert "--bank-classes 2: none of 11 images looked at is labelled 1" in say(*data, *BANK, "--epochs", 9)
    bare = finehard(tmp_path / "bare", regions=False)
    assert "has a usable region" in say(*bare)
    items = json.loads(Path(data[1]).read_text())
    in_pixels = [item | dict(bbox_info=[dict(bbox=[0, 0, 30, 20], short_expr="a")]) for item in items]
    (tmp_path / "data" / "pixels.json").write_text(json.dumps(in_pixels))
    assert "looks like pixels; expected fractions" in say("--annotations", tmp_path / "data" / "pixels.json", *data[2:])
    for item in items:
        for info in item["bbox_info"]:
            del info["flag_short_neg"]
    plain = tmp_path / "data" / "plain.json"
    plain.write_text(json.dumps(items))
    assert "has a region with hard negatives" in say("--annotations", plain, *data[2:])
    del items[3]["caption"]
    plain.write_text(json.dumps(items))
    assert "plain.json, item 3, caption: expected a text" in say("--annotations", plain, *data[2:])
    assert not (tmp_path / "run").exists()
    (tmp_path / "data" / "images" / "5.jpg").write_bytes(b"no picture")
    assert "5.jpg (named by" in say(*data)
