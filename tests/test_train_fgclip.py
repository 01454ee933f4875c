"""train_fgclip.py as a person runs it: on drawn scenes, on files, with banks, resumed, and with wrong flags."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_fgclip
from fgclip import FGCLIP, embedding, load_model, save_clip_weights
from fgclip.synthetic import SyntheticRegions
from trainkit.errors import one_sentence

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--vision-width 16 --vision-layers 2 --vision-heads 2 --text-width 16 --text-layers 2 --text-heads 2 "
    "--embed-dim 8 --device cpu --workers 0 --epochs 2"
).split()
TINY = [*SMALL, *"--image-size 32 --synthetic-train 24 --synthetic-val 12 --batch-size 4 --warmup-steps 2".split()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(output, *flags, tiny=TINY):
    train_fgclip.main([*tiny, "--output", str(output), *map(str, flags)])
    return output


def refused(capsys, *flags, tiny=TINY) -> str:
    """The one sentence with which the script ends that has bad input, and its exit status is 2."""
    with pytest.raises(SystemExit) as stop, one_sentence():
        train_fgclip.main([*tiny, *map(str, flags)])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def metrics(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def load(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


BANK = "--bank-size 8 --bank-warmup-steps 5 --global-bank-size 4 --bank-classes 2".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of twelve steps."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("runs") / "whole", "--validate-at", "3")


@pytest.fixture(scope="module")
def bank_run(tmp_path_factory):
    """The same, one region an image, with banks that are used from step 6 on."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("runs") / "bank", *BANK)


def test_a_run_leaves_what_it_should(run):
    assert {"args.json", "metrics.jsonl", "last.pt", "best.pt"} <= {path.name for path in run.iterdir()}
    steps = metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 13))
    weights = {"loss_long": 1, "loss_short": 1, "loss_region": 1, "loss_hard": 0.5}
    for line in steps:
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()))
        assert line["region_candidates"] == 16 >= line["region_unmasked"] > 12
        assert line["region_in_batch"] == pytest.approx(line["loss_region"])
        assert line["long_candidates"] == 4 and "region_bank" not in line
        assert {"region_relative", "region_r1", "region_cosine", "region_cosine_unmatched", "hard_r1"} <= line.keys()
        assert {"logit_scale_global", "logit_scale_region", "logit_scale_hard", "grad_norm", "lr"} <= line.keys()
        assert {"norm_image", "norm_regions", "norm_region_texts", "truncated", "images_per_second"} <= line.keys()
    validations = metrics(run, "validation")
    assert [line["step"] for line in validations] == [0, 3, 6, 12]
    for line in validations:
        assert line["region"].keys() >= {"loss", "relative", "r1", "candidates", "cosine_unmatched", "effective_rank"}
        assert line["region"]["count"] == line["hard"]["count"] == 48 and line["long"]["count"] == 12


def test_the_losses_fall(tmp_path):
    flags = (
        "--synthetic-train 160 --batch-size 16 --lr 0.01 --epochs 6 --vision-width 32 --text-width 32 --embed-dim 16"
    )
    steps = metrics(train(tmp_path / "run", *flags.split()))
    first, last = steps[:5], steps[-5:]
    for name in ("loss_long", "loss_short", "loss_region", "loss_hard"):
        assert sum(line[name] for line in last) < 0.8 * sum(line[name] for line in first), name
    assert sum(line["region_r1"] for line in last) > 2 * sum(line["region_r1"] for line in first)


def test_a_resumed_run_equals_one_that_was_never_stopped(bank_run, tmp_path):
    """Stopped in the middle of an epoch, before the banks are used and after; and the flags need not be repeated."""
    halves = train(tmp_path / "halves", *BANK, "--max-steps", 4)
    train_fgclip.main(["--resume", str(halves), "--max-steps", "9"])
    train(halves, *BANK, "--resume", "auto")
    whole, resumed = load(bank_run), load(halves)
    assert whole["stepper"]["steps"] == 12
    for part in ("model", "ema", "optimizer", "schedule", "stepper", "sampler", "rng", "banks", "merges"):
        assert equal(whole[part], resumed[part]), part
    timing = {"images_per_second", "memory_gib"}
    for one, other in zip(metrics(bank_run), metrics(halves), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_a_signal_gives_up_a_validation_and_the_run_goes_on_with_it(run, tmp_path, monkeypatch):
    """In one before the first step, in the middle and at the end of an epoch: no line is lost, and none comes twice."""
    calls, to_device = itertools.count(1), embedding.to_device

    def told_to_end(*args):
        if next(calls) in (1, 6, 10):  # three batches a validation
            signal.raise_signal(signal.SIGTERM)
        return to_device(*args)

    monkeypatch.setattr(embedding, "to_device", told_to_end)
    for steps in (0, 3, 6):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "run", "--validate-at", "3", "--resume", "auto")
        assert stop.value.code == 143 and load(tmp_path / "run")["stepper"]["steps"] == steps
    train(tmp_path / "run", "--validate-at", "3", "--resume", "auto")
    whole, parts = load(run), load(tmp_path / "run")
    for part in ("model", "ema", "optimizer", "schedule", "stepper", "sampler", "rng", "best"):
        assert equal(whole[part], parts[part]), part
    assert metrics(run, "validation") == metrics(tmp_path / "run", "validation")


def test_workers_do_not_change_the_numbers(run, tmp_path):
    workers = train(tmp_path / "workers", "--workers", 2, "--max-steps", 3)
    assert [line["loss"] for line in metrics(workers)] == [line["loss"] for line in metrics(run)[:3]]


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


def test_a_small_batch_with_a_bank_of_128(tmp_path):
    """132 candidates from the end of the warm-up on, and nearly all of them count."""
    flags = "--bank-size 128 --synthetic-train 220 --epochs 1 --max-steps 52 --synthetic-val 2".split()
    steps = metrics(train(tmp_path / "run", *flags))
    assert [line["region_candidates"] for line in steps[:50]] == [4] * 50
    assert [line["region_candidates"] for line in steps[50:]] == [132] * 2
    assert all(line["region_unmasked"] > 125 for line in steps[50:])


def test_micro_batches_weigh_by_what_they_hold(tmp_path):
    """Two batches of three make the step of one of six, although they hold different numbers of regions."""
    flags = "--placement free --long-weight 0 --short-weight 0 --region-weight 0 --hard-weight 1 --epochs 1".split()
    flags += ["--seed", "1", "--optimizer", "sgd", "--lr", "0.05"]
    one = train(tmp_path / "one", *flags, "--batch-size", 6)
    two = train(tmp_path / "two", *flags, "--batch-size", 3, "--accumulate", 2)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, value in load(one)["model"].items():
        torch.testing.assert_close(load(two)["model"][name], value, msg=name)


def test_a_stop_signal_leaves_a_checkpoint_to_go_on_from(tmp_path):
    command = [sys.executable, "train_fgclip.py", *TINY, "--epochs", "100", "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and '"train"' in path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "--resume" in said and "Traceback" not in said
    steps = load(tmp_path / "run")["stepper"]["steps"]
    assert 1 <= steps == len(metrics(tmp_path / "run"))
    train_fgclip.main(["--resume", str(tmp_path / "run"), "--max-steps", str(steps + 1), "--workers", "0"])
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, steps + 2))


def test_check_reports_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_fgclip.main([*TINY, "--check"])
    said = capsys.readouterr().out
    assert "96 boxes, 0 (0.00%) dropped" in said and "96 regions with hard negatives" in said
    assert "gradient norm of vision_model.encoder" in said and "no gradient" not in said
    assert "logit_scale_finegraind" in said and "region_relative" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        "--amp bf16 --roi-projection --roi-projection-lr 0.1 --text-lr 1e-4 --vision-lr 1e-4 --projection-lr 1e-3",
        "--checkpoint-activations --placement free --diagnostics 1 --ema-decay 0 --best-by hard",
        "--long-weight 0 --short-weight 0 --best-by hard --optimizer sgd --clip-norm 0",
        "--region-weight 0 --accumulate 3 --context-length 24 --activation gelu",
        "--hard-weight 0 --long-weight 0 --max-regions 2 --vocab bytes --bank-size 8 --bank-warmup-steps 0",
    ],
)
def test_every_option_trains_a_step(tmp_path, capsys, flags):
    run = train(tmp_path / "run", *flags.split(), "--max-steps", 1)
    assert len(metrics(run)) == 1
    said = capsys.readouterr().out
    assert ("moved: vision_model.encoder" in said) == ("--diagnostics" in flags)


def test_what_no_loss_reaches_is_frozen_and_all_else_moves(tmp_path):
    """Or DistributedDataParallel would wait for ever."""
    for name, flags in {
        "global": "--stage global",
        "regions": "--long-weight 0 --short-weight 0 --roi-projection",
        "short": "--long-weight 0 --hard-weight 0",
        "long": "--short-weight 0 --stage global",
    }.items():
        run = train(tmp_path / name, *flags.split(), "--max-steps", 1, "--lr", 0.1, "--warmup-steps", 0)
        start = train(tmp_path / f"{name}-start", *flags.split(), "--max-steps", 1, "--lr", 1e-30, "--warmup-steps", 0)
        after, before = load(run)["model"], load(start)["model"]
        still = {key for key in after if torch.equal(after[key], before[key])}
        optimized = sum(len(group["params"]) for group in load(run)["optimizer"]["param_groups"])
        assert len(after) - len(still) == optimized, (name, still)


def test_stage_global_goes_on_from_a_run(run, tmp_path, capsys):
    """Architecture and tokenizer come from the checkpoint; the scales of the regions stay as they are."""
    flags = ["--init-from", run / "best.pt", "--stage", "global", "--synthetic-train", 8, "--synthetic-val", 6]
    flags += ["--batch-size", 4, "--device", "cpu", "--workers", 0, "--epochs", 1]
    after = load(train(tmp_path / "global", *flags, tiny=[]))
    assert after["model_kwargs"] == load(run)["model_kwargs"] and after["merges"] == load(run)["merges"]
    before = load(run, "best.pt")["ema"]
    assert after["model"]["logit_scale"] != before["logit_scale"]
    assert after["model"]["logit_scale_finegraind"] == before["logit_scale_finegraind"]
    (step, _) = metrics(tmp_path / "global")
    assert {name for name in step if name.startswith("loss_")} == {"loss_long", "loss_short"}
    assert all("region" not in line for line in metrics(tmp_path / "global", "validation"))
    said = capsys.readouterr().out
    assert "--best-by captions" in said and "far from" not in said


def test_published_weights_and_their_scales(tmp_path, capsys):
    """A folder in Hugging Face's layout; the scales are taken over, held after the step, or reset on request."""
    torch.manual_seed(0)
    model = FGCLIP(
        vision=dict(image_size=32, patch_size=8, width=64, layers=2, heads=1, mlp_width=32),
        text=dict(vocab_size=514, context_length=24, width=64, layers=2, heads=1, mlp_width=32),
        embed_dim=8,
        logit_scale=6.0,
    )
    save_clip_weights(model, tmp_path / "weights")
    tiny = "--synthetic-train 8 --synthetic-val 4 --batch-size 4 --device cpu --workers 0 --epochs 2".split()
    flags = ["--init-from", tmp_path / "weights", "--vocab", "bytes", "--image-size", 48, "--heads", 1, 1]
    flags += ["--activation", "quick_gelu", "--reset-logit-scales"]
    train(tmp_path / "reset", *flags, "--max-steps", 1, "--logit-scale-init", 3, tiny=tiny)
    said = capsys.readouterr().out
    assert "FG-CLIP" in said and "all logit scales reset to 3.0000" in said
    assert metrics(tmp_path / "reset")[0]["logit_scale_region"] == pytest.approx(3, abs=0.01)
    assert (
        load_model(tmp_path / "reset" / "last.pt")[0].vision_model.image_size == 48
    )  # what it was trained on, not what it was
    train(tmp_path / "kept", *flags[:-1], "--max-steps", 1, tiny=tiny)
    said = capsys.readouterr().out
    assert "logit scale region is 6.0000, far from --logit-scale-init 2.6593; --reset-logit-scales" in said
    assert metrics(tmp_path / "kept")[0]["logit_scale_region"] == pytest.approx(4.6052, abs=1e-4)  # ln 100 at most
    train_fgclip.main(["--resume", str(tmp_path / "kept")])
    assert "logit scale hard is 4.6" in capsys.readouterr().out
    train_fgclip.main(["--resume", str(tmp_path / "reset"), "--reset-logit-scales", "--logit-scale-init", "2"])
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
    run = train(tmp_path / "run", *data, "--val-share", 0.25, "--epochs", 3, tiny=FILES)
    said = capsys.readouterr().out
    assert "held out for validation: 3 of the 12 images" in said and "training from random weights" in said
    assert "36 boxes, 9 (25.00%) dropped" in said
    steps = metrics(run)
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
        run = train(tmp_path / name, *flags, "--val-share", 0.2, "--max-steps", 4, tiny=FILES)
        steps = metrics(run)
        assert all(torch.tensor(line["loss"]).isfinite() for line in steps)
        assert steps[-1]["loss"] < steps[0]["loss"] and ("loss_hard" in steps[0]) == (name == "finehard")
        assert metrics(run, "validation")[-1]["region"]["candidates"] > 5


def test_wrong_flags_end_in_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def say(flags="", *more, tiny=TINY):
        return refused(capsys, *flags.split(), *more, tiny=tiny)

    assert "--stage" in say("--stage local")
    assert "unrecognized" in say("--bathc-size 4")
    assert "already holds files" in say("--output", run)
    assert "no other caption" in say("--batch-size 1")
    assert "no other phrase" in say("--batch-size 1 --max-regions 1 --long-weight 0 --short-weight 0")
    assert "has no regions" in say("--stage global --region-weight 1")
    assert "has no regions" in say("--stage global --bank-size 8")
    assert "no weight" in say("--bank-size 8 --region-weight 0")
    assert "no weight" in say("--global-bank-size 8 --long-weight 0 --short-weight 0")
    assert "nothing would be learnt" in say("--stage global --long-weight 0 --short-weight 0")
    assert "does not divide" in say("--bank-size 9 --bank-classes 2")
    assert "--bank-classes needs" in say("--bank-classes 2")
    assert "the run has only 12 steps" in say("--bank-size 8")
    assert "--image-root needs" in say("--image-root .")
    assert "--val-annotations needs" in say("--val-annotations x.json")
    assert "--val-image-root needs" in say("--val-image-root .")
    assert "--trust-torchscript" in say("--trust-torchscript")
    assert "--reset-logit-scales is for" in say("--reset-logit-scales")
    assert "at most ln 100" in say("--logit-scale-init 5")
    assert "--best-by region needs" in say("--stage global --best-by region")
    assert "--roi-projection-lr needs" in say("--roi-projection-lr 0.1")
    assert "multiple of the patch size" in say("--device cpu --image-size 30 --init-from", run / "best.pt", tiny=[])
    assert "fit together" in say("--vision-heads 5")
    assert "no long text path" in say("--context-length 20")
    assert "comes with the weights" in say("--init-from", run / "best.pt")
    assert "brings its own tokenizer" in say("--vocab bytes --device cpu --init-from", run / "best.pt", tiny=[])
    assert "nothing.pt does not exist" in say("--device cpu --init-from nothing.pt", tiny=[])
    assert "nothing.txt does not exist" in say("--vocab nothing.txt")
    assert "--heads is for the weights of --init-from" in say("--heads 1 1")
    assert "no room for the start and end tokens" in say("--context-length 1 --long-weight 0")
    assert "of at most 4096" in say("--device cpu --image-size 8192 --init-from", run / "best.pt", tiny=[])
    assert "--resume" in say("--resume nothing")
    assert "is 2, but the run" in say("--max-regions 2 --resume", run)
    assert not list(tmp_path.iterdir())
    (tmp_path / "merges.txt").write_text("#version: 1\no r\n")
    changed = ["--vocab", "merges.txt", "--output", "changed", "--max-steps", "1"]
    train_fgclip.main([*TINY, *changed])
    (tmp_path / "merges.txt").write_text("#version: 1\na n\n")
    assert "trained with other merges" in say("--resume auto", *changed)


def test_wrong_data_ends_in_one_sentence(tmp_path, capsys):
    data = finehard(tmp_path / "data")
    output = ["--output", tmp_path / "run"]

    def say(*flags):
        return refused(capsys, *flags, *output, tiny=FILES)

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


def test_help_shows_the_defaults_of_the_command(capsys):
    for flags, lr, weight in ((["--data-root", "x"], "0.0005", "0.1"), ([], "0.0015", "1.0")):
        with pytest.raises(SystemExit):
            train_fgclip.main([*flags, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert f"learning rate after warm-up (default: {lr})" in said
        assert f"regions and phrases (default: {weight})" in said
