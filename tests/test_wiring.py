"""What each script hands to its parts, since every part may be right and the run still wrong."""

import json
import math

import pytest
import torch

import train_fgclip
import train_stage1
import train_stage2
from macl.boxes import BELOW, BETWEEN, BoxCoder, match
from macl.data import DAY_AND_NIGHT, NIGHT, PairedAugmentation
from macl.domain import grl_schedule
from trainkit import distributed, optimizer, step

DETECTOR = (
    "--synthetic-train 32 --synthetic-val 2 --batch-size 4 --workers 0 --device cpu --fpn-channels 16 --head-width 16 "
    "--macl-dim 8 --macl-hidden 16 --min-size 64 --epochs 4 --lr 0.004 --warmup-steps 5 --clip-norm 3 --ema-decay 0.9"
).split()
STAGE_2 = (
    "--synthetic-train 24 --synthetic-val 2 --batch-size 4 --workers 0 --device cpu --epochs 4 --lr 0.002 "
    "--warmup-steps 4 --clip-norm 3 --ema-decay 0.9 --dhn-size 0 --ramp-steps 8 --adversary dataset --old-share 0.5"
).split()
FGCLIP = (
    "--vision-width 16 --vision-layers 2 --vision-heads 2 --text-width 16 --text-layers 2 --text-heads 2 --embed-dim 8 "
    "--image-size 32 --synthetic-train 32 --synthetic-val 8 --batch-size 4 --workers 0 --device cpu --epochs 4 "
    "--lr 0.004 --warmup-steps 5 --clip-norm 3 --ema-decay 0.9 --weight-decay 0.3"
).split()


class Recorded:
    """Calls of a function: their arguments; the function itself still runs."""

    def __init__(self, function):
        self.function, self.calls, self.results = function, [], []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        self.results.append(self.function(*args, **kwargs))
        return self.results[-1]


def run(script, flags, names, folder):
    """Run a script's main in one thread. -> its parts of these names as `Recorded`, and its steps' metrics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        recorded = {name: Recorded(getattr(script, name)) for name in names}
        for name, one in recorded.items():
            patch.setattr(script, name, one)
        script.main([*flags, "--output", str(folder)])
    torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return recorded, [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiring") / "stage1"
    return (*run(train_stage1, DETECTOR, ["TrainStep", "predict"], folder), folder)


@pytest.fixture(scope="module")
def stage2(stage1, tmp_path_factory):
    flags = [*STAGE_2, "--init-from", str(stage1[2] / "best.pt")]
    return run(
        train_stage2, flags, ["TrainStep", "validate", "SyntheticPairs"], tmp_path_factory.mktemp("wiring") / "2"
    )


@pytest.fixture(scope="module")
def fgclip(tmp_path_factory):
    names = ["TrainStep", "Embedder"]
    return run(train_fgclip, FGCLIP, names, tmp_path_factory.mktemp("wiring") / "fgclip")


@pytest.mark.parametrize(("name", "lr", "warm_up"), [("stage1", 0.004, 5), ("stage2", 0.002, 4), ("fgclip", 0.004, 5)])
def test_a_run_learns_along_its_schedule(name, lr, warm_up, request):
    steps = request.getfixturevalue(name)[1]
    rates, losses = [line["lr"] for line in steps], [line["loss"] for line in steps]
    assert len(steps) >= 24
    assert rates[0] < 0.3 * lr
    assert rates[warm_up] == pytest.approx(lr, rel=0.05)
    assert rates[-1] < 0.05 * lr
    if name != "stage2":  # whose weights ramp
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize("name", ["stage1", "stage2", "fgclip"])
def test_the_stepper_gets_what_the_flags_say_and_validation_the_average(name, request):
    parts = request.getfixturevalue(name)[0]
    (stepper,) = parts["TrainStep"].results
    assert stepper.clip_norm == 3 and stepper.schedule is not None
    averaged = stepper.average.module
    calls = parts[{"stage1": "predict", "stage2": "validate", "fgclip": "Embedder"}[name]].calls
    assert calls[-1][0][0] is averaged and averaged is not stepper.model


def test_stage_1_measures_mean_and_deviation(stage1):
    detector = stage1[0]["TrainStep"].results[0].model
    data = train_stage1.SyntheticPairs(32, 0)
    for name in ("visible", "infrared"):
        pixels = torch.cat([data[i][name].flatten(1) for i in range(32)], 1) / 255
        torch.testing.assert_close(torch.tensor(detector.kwargs[f"{name}_mean"]), pixels.mean(1))
        torch.testing.assert_close(torch.tensor(detector.kwargs[f"{name}_std"]), pixels.std(1))


def test_stage_2_trains_and_validates_both_domains(stage2):
    drawn = [(kwargs["domain"], args[1] >= train_stage2.VALIDATION_SEED) for args, kwargs in
             stage2[0]["SyntheticPairs"].calls]  # fmt: skip
    assert sorted(drawn, key=str) == sorted([(d, v) for d in (DAY_AND_NIGHT, NIGHT) for v in (False, True)], key=str)
    validated = [call[0][1].domains for call in stage2[0]["validate"].calls]
    assert validated[-2:] == [tuple(DAY_AND_NIGHT), (NIGHT,)]


def test_stage_2_ramps_every_alignment_loss_and_the_reversal(stage2, stage1):
    for number, line in enumerate(stage2[1][:8], 1):
        for name in ("loss_mmd", "loss_mmd_domains", "loss_adversary"):
            full = 0.1 if name == "loss_adversary" else 1.0
            assert line["weights"][name] == pytest.approx(full * number / 8), name
    detector = stage2[0]["TrainStep"].results[0].model
    assert detector.reversal_scale == pytest.approx(grl_schedule(1.0)) and grl_schedule(0.1) < 0.5


@pytest.mark.parametrize(("better", "worse"), [(20.0, 30.0)])
def test_a_lower_miss_rate_is_better(better, worse):
    def metrics(rate):
        both = {"ap50": 0.5, "ap": 0.3, "ap75": 0.3, "recall": 0.5}
        return {"both": both, "alignment": None, "miss_rate": {"both": {"reasonable all": rate}}}

    assert train_stage2.selection_metric(metrics(better), "miss-rate") > train_stage2.selection_metric(
        metrics(worse), "miss-rate"
    )


def test_fgclip_spares_tables_from_weight_decay(fgclip):
    parts, _ = fgclip
    (stepper,) = parts["TrainStep"].results
    decayed = {id(p) for group in stepper.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in stepper.model.named_parameters():
        assert ("position_embedding" in name and id(parameter) in decayed) is False, name


class Raising(step.TrainStep):
    """A stepper whose steps leave all logit scales far above their limit."""

    def __call__(self, *args, **kwargs):
        result = super().__call__(*args, **kwargs)
        for model in (self.model, self.average.module):
            for scale in model.log_scales().values():
                scale.data.fill_(9.0)
        return result


def test_fgclip_clamps_the_scales_of_the_model_and_of_the_average(tmp_path, monkeypatch):
    monkeypatch.setattr(train_fgclip, "TrainStep", Raising)
    parts, _ = run(train_fgclip, [*FGCLIP, "--max-steps", "2"], ["TrainStep"], tmp_path / "run")
    for model in (parts["TrainStep"].results[0].model, parts["TrainStep"].results[0].average.module):
        for scale in model.log_scales().values():
            assert scale.item() == pytest.approx(math.log(100))


def test_the_learning_rate_knows_all_processes(monkeypatch):
    args = train_stage1.parse_arguments("--lr 0.01 --lr-base-batch 8 --batch-size 4 --accumulate 2".split())
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    _, schedule = optimizer.build_optimisation(args, torch.nn.Linear(2, 2), 5)
    assert schedule.base_lrs[0] == pytest.approx(0.01 * 4 * 2 * 3 / 8)


def test_boxes_decode_within_a_limit_and_half_ignored_ones_are_left_out():
    grown = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert grown[0, 2] - grown[0, 0] == pytest.approx(1000.0)
    boxes = torch.tensor([[0.0, 0, 10, 10], [4.5, 0, 14.5, 10], [5.5, 0, 15.5, 10]])
    matched = match(boxes, torch.zeros(0, 4), foreground=0.5, background=0.3, keep_best=False,
                    ignore=torch.tensor([[0.0, 0, 10, 10]]))  # fmt: skip
    assert matched.tolist() == [BETWEEN, BETWEEN, BELOW]


def test_infrared_noise_is_of_every_strength():
    sample = {name: torch.full((3, 32, 32), 128, dtype=torch.uint8) for name in ("visible", "infrared")}
    sample |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "ignore": torch.zeros(0).bool()}
    draw = PairedAugmentation(noise=0.1)
    strengths = [draw(sample)["infrared"].std().item() for _ in range(40)]
    assert min(strengths) < 0.03 and 0.07 < max(strengths) < 0.12
