"""What holds for all three training scripts: learning, wiring, resume, signals, --check, wrong flags."""

import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from scripts import FGCLIP, ROOT, STAGE_1, STAGE_2, VIDEO, equal, load, metrics, refused, run

import macl
import train_fgclip
import train_stage1
import train_stage2
import train_video
from macl.data import DAY_AND_NIGHT, NIGHT
from trainkit import distributed
from trainkit.errors import one_sentence
from trainkit.run import Run

NAMES = ("stage1", "stage2", "fgclip", "video")
RECORDED = {
    "stage1": ["TrainStep", "validate"],
    "stage2": ["TrainStep", "validate", "SyntheticPairs", "KeyEncoder", "forward_losses"],
    "fgclip": ["TrainStep", "Embedder"],
    "video": ["TrainStep", "Embedder"],
}


class Recorded:
    """Calls of a function: their arguments and results; the function itself still runs."""

    def __init__(self, function):
        self.function, self.calls, self.results = function, [], []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        self.results.append(self.function(*args, **kwargs))
        return self.results[-1]


def record(name: str, script, flags: list, folder) -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        parts = {}
        for part in RECORDED[name]:
            place = script if hasattr(script, part) else macl.training
            parts[part] = Recorded(getattr(place, part))
            patch.setattr(place, part, parts[part])
        run(script, flags, folder)
    return SimpleNamespace(name=name, script=script, flags=flags, folder=folder, parts=parts)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    return record("stage1", train_stage1, STAGE_1, tmp_path_factory.mktemp("runs") / "stage1")


@pytest.fixture(scope="module")
def stage2(stage1, tmp_path_factory):
    flags = [*STAGE_2, "--init-from", stage1.folder / "best.pt"]
    return record("stage2", train_stage2, flags, tmp_path_factory.mktemp("runs") / "stage2")


@pytest.fixture(scope="module")
def fgclip(tmp_path_factory):
    return record("fgclip", train_fgclip, FGCLIP, tmp_path_factory.mktemp("runs") / "fgclip")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return record("video", train_video, VIDEO, tmp_path_factory.mktemp("runs") / "video")


@pytest.fixture(params=NAMES)
def whole(request):
    """A finished run of 24 steps of each script, with what its main handed to its parts."""
    return request.getfixturevalue(request.param)


def test_a_run_leaves_what_it_should(whole):
    files = {"args.json", "metrics.jsonl", "last.pt", "best.pt"} | ({"pictures"} if "stage" in whole.name else set())
    assert files <= {path.name for path in whole.folder.iterdir()}
    steps, validations = metrics(whole.folder), metrics(whole.folder, "validation")
    assert [line["step"] for line in steps] == list(range(1, 25))
    at = [0, 3, 8, 16, 24] if whole.name == "fgclip" else [0, 8, 16, 24]
    assert [line["step"] for line in validations] == at
    # Stage 1 has nothing to detect with before its first step.
    assert ("both" in validations[0]) == (whole.name == "stage2")
    assert all({"loss", "lr", "grad_norm"} <= line.keys() for line in steps)


def test_what_is_optimised_is_what_is_logged(whole):
    weights = {"loss_macl": 0.1, "loss_hard": 0.5}
    if whole.name == "video":
        weights = dict.fromkeys(("loss_short", "loss_region", "loss_caption", "loss_track"), 0.5)
        weights |= {"loss_texts": 0.1, "loss_hard": 0.1}
    for line in metrics(whole.folder):
        losses = {name: value for name, value in line.items() if name.startswith("loss_")}
        assert line["loss"] == pytest.approx(sum(weights.get(name, 1.0) * value for name, value in losses.items()))


def test_a_run_learns_along_its_schedule(whole):
    steps = metrics(whole.folder)
    rates, losses = [line["lr"] for line in steps], [line["loss"] for line in steps]
    lr = 0.002 if whole.name == "stage2" else 0.004
    assert rates[0] < 0.3 * lr and rates[5] == pytest.approx(lr, rel=0.1) and rates[-1] < 0.05 * lr
    if whole.name in ("stage1", "fgclip"):  # stage 2 begins with a trained detector, video has two stages
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_the_step_gets_what_the_flags_say_and_validation_the_average(whole):
    (train_step,) = whole.parts["TrainStep"].results
    assert train_step.clip_norm == 3 and train_step.schedule is not None
    averaged = train_step.average.module
    validated = whole.parts["validate" if "stage" in whole.name else "Embedder"].calls[-1][0][0]
    assert validated is (averaged.fgclip if whole.name == "video" else averaged) and averaged is not train_step.model


def test_a_resumed_run_equals_one_that_was_never_stopped(whole, tmp_path):
    """Stopped in the middle of an epoch and of the data order, twice; resumed without repeating its flags."""
    halves = run(whole.script, whole.flags, tmp_path / "halves", "--max-steps", 3)
    whole.script.main(["--resume", str(halves), "--max-steps", "13", "--device", "cpu"])
    whole.script.main(["--resume", "auto", "--output", str(halves), "--device", "cpu"])
    parts, others = load(whole.folder), load(halves)
    assert parts["stepper"]["steps"] == 24 and parts.keys() == others.keys()
    for name in parts.keys() - {"best", "stale"}:  # runs with --max-steps end with a validation
        assert equal(parts[name], others[name]), name
    assert metrics(whole.folder) == metrics(halves)


@pytest.mark.parametrize("name", ["stage2", "fgclip"])
def test_a_signal_gives_up_a_validation_and_the_run_goes_on_with_it(name, request, tmp_path, monkeypatch):
    """In the first one and in a later one: no line is lost, and none comes twice."""
    whole, ahead, between = request.getfixturevalue(name), {0, 16}, Run.leave_if_asked

    def told_to_end(self):
        steps = self.train_step.steps
        if steps in ahead and self.train_step.validated != steps:
            ahead.remove(steps)
            signal.raise_signal(signal.SIGTERM)
        return between(self)

    monkeypatch.setattr(Run, "leave_if_asked", told_to_end)
    for steps in (0, 16):
        with pytest.raises(SystemExit) as stop:
            flags = whole.flags if steps == 0 else ["--device", "cpu"]
            run(whole.script, flags, tmp_path / "run", "--resume", "auto")
        assert stop.value.code == 143 and load(tmp_path / "run")["stepper"]["steps"] == steps
    run(whole.script, [], tmp_path / "run", "--resume", "auto", "--device", "cpu")
    for name in ("last.pt", "best.pt"):
        assert equal(load(whole.folder, name), load(tmp_path / "run", name)), name
    assert metrics(whole.folder, "validation") == metrics(tmp_path / "run", "validation")


@pytest.mark.parametrize(("name", "number"), [("stage1", signal.SIGINT), ("fgclip", signal.SIGTERM)])
def test_a_stop_signal_leaves_a_checkpoint_to_go_on_from(tmp_path, name, number):
    flags = [*(STAGE_1 if name == "stage1" else FGCLIP), "--epochs", "50", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, f"train_{name}.py", *flags, "--output", str(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and '"train"' in path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the loading process gets it, too
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert "--resume" in output and "Traceback" not in output
    steps = load(tmp_path / "run")["stepper"]["steps"]
    assert 1 <= steps == len(metrics(tmp_path / "run"))
    script = train_stage1 if name == "stage1" else train_fgclip
    script.main(["--resume", str(tmp_path / "run"), "--max-steps", str(steps + 1), "--device", "cpu"])
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, steps + 2))


def test_a_signal_before_the_first_step_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_stage1, "open_data", lambda args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop, one_sentence():
        run(train_stage1, STAGE_1, tmp_path / "run")
    assert stop.value.code == 143 and capsys.readouterr().err == "terminated\n"


@pytest.mark.parametrize("name", ["stage1", "fgclip"])
def test_workers_do_not_change_the_numbers(name, request, tmp_path):
    whole = request.getfixturevalue(name)
    workers = run(whole.script, whole.flags, tmp_path / "workers", "--workers", 2, "--max-steps", 3)
    assert metrics(workers) == metrics(whole.folder)[:3]


def test_check_reports_and_writes_nothing(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole.script.main([*map(str, whole.flags), "--check"])
    output = capsys.readouterr().out
    words = {
        "stage1": ["training: pairs 32", "gradient norm of backbone.layer1"],
        "stage2": ["training, old domain: pairs 16", "gradient norm of macl.projector", "loss_macl"],
        "video": ["normal 4", "gradient norm of fgclip.vision_model", "loss_region"],
        "fgclip": ["128 boxes, 0 (0.00%) dropped", "gradient norm of vision_model.encoder", "logit_scale_finegraind"],
    }
    assert all(word in output for word in words[whole.name])
    assert "no gradient" not in output
    assert not list(tmp_path.iterdir())


def test_help_shows_the_defaults_of_the_command(capsys):
    for flags, lr, weight in ((["--data-root", "x"], "0.0005", "0.1"), ([], "0.0015", "1.0")):
        with pytest.raises(SystemExit):
            train_fgclip.main([*flags, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"learning rate after warm-up (default: {lr})" in text
        assert f"regions and phrases (default: {weight})" in text


@pytest.mark.parametrize("script", [train_stage1, train_stage2, train_fgclip, train_video])
def test_every_value_of_a_recipe_belongs_to_a_flag(script):
    flags = vars(script.parse_arguments([]))
    for name, recipe in vars(script).items():
        if name.endswith("_RECIPE"):
            assert recipe.keys() <= flags.keys(), name


def test_wrong_flags_that_all_scripts_share_end_in_one_sentence(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def say(*flags):
        return refused(capsys, whole.script.main, *flags)

    assert "--batch-size" in say("--batch-size", 0)
    assert "unrecognized" in say("--bathc-size", 4)
    assert "already holds files" in say(*whole.flags, "--output", whole.folder)
    assert "--resume nothing: expected a checkpoint" in say("--resume", "nothing")
    assert "give one of the two" in say("--init-from", whole.folder / "best.pt", "--resume", whole.folder)
    assert "is 5, but the run" in say("--seed", 5, "--resume", whole.folder)
    assert "missing.pt does not exist" in say("--init-from", "missing.pt", "--device", "cpu")
    other = "stage1" if whole.name == "fgclip" else "fgclip"
    (tmp_path / "args.json").write_text(f'{{"script": "{other}"}}')
    (tmp_path / "last.pt").touch()
    assert f"begun by '{other}'" in say("--resume", "auto", "--output", tmp_path)


def test_metrics_of_a_step_are_those_of_all_its_micro_batches(tmp_path):
    """At a rate of 0 the two batches of a step say what they say as steps of their own."""
    flags = [*STAGE_1, "--epochs", 1, "--lr", 1e-30]
    one = metrics(run(train_stage1, flags, tmp_path / "one", "--max-steps", 4))
    two = metrics(run(train_stage1, flags, tmp_path / "two", "--max-steps", 2, "--accumulate", 2))
    for name in ("loss_macl", "macl_recall", "macl_relative", "macl_candidates"):
        for i in range(2):
            mean = (one[2 * i][name] + one[2 * i + 1][name]) / 2
            assert two[i][name] == pytest.approx(mean, rel=1e-5), name
    assert len({line["macl_candidates"] for line in one}) > 1


def test_a_loss_that_is_not_finite_stops_and_names_its_images(tmp_path, capsys, monkeypatch):
    resize = macl.PairedFasterRCNN.resize
    monkeypatch.setattr(macl.PairedFasterRCNN, "resize", lambda self, *args: resize(self, *args) * math.nan)
    flags = [*STAGE_1, "--output", tmp_path / "run", "--macl-weight", "0"]
    sentence = refused(capsys, train_stage1.main, *flags)
    assert "not a finite number" in sentence and "synthetic/0/" in sentence


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_each_process_samples_its_own_regions(name, request, monkeypatch, tmp_path):
    whole, seeds = request.getfixturevalue(name), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(whole.script, "Run", lambda *_, **__: sys.exit())
    with pytest.raises(SystemExit):
        run(whole.script, whole.flags, tmp_path / "run", "--seed", 7)
    assert seeds == [7, 7003]


def test_stage_1_measures_mean_and_deviation(stage1):
    detector = stage1.parts["TrainStep"].results[0].model
    data = train_stage1.SyntheticPairs(32, 0)
    for name in ("visible", "infrared"):
        pixels = torch.cat([data[i][name].flatten(1) for i in range(32)], 1) / 255
        torch.testing.assert_close(torch.tensor(detector.kwargs[f"{name}_mean"]), pixels.mean(1))
        torch.testing.assert_close(torch.tensor(detector.kwargs[f"{name}_std"]), pixels.std(1))


def test_stage_2_trains_and_validates_both_domains(stage2):
    drawn = [(kwargs["domain"], args[1] >= macl.training.VALIDATION_SEED) for args, kwargs in
             stage2.parts["SyntheticPairs"].calls]  # fmt: skip
    assert sorted(drawn, key=str) == sorted([(d, v) for d in (DAY_AND_NIGHT, NIGHT) for v in (False, True)], key=str)
    validated = [call[0][1].domains for call in stage2.parts["validate"].calls]
    assert validated[-2:] == [tuple(DAY_AND_NIGHT), (NIGHT,)]


def test_stage_2_takes_keys_from_an_average_that_follows_every_step(stage2):
    (keys,) = stage2.parts["KeyEncoder"].results
    assert keys.average.n_averaged == load(stage2.folder)["keys"]["average.n_averaged"] == 24
    assert [kwargs for _, kwargs in stage2.parts["forward_losses"].calls] == [{"teachers": [keys]}] * 24
    fill = [line["dhn_fill"] for line in metrics(stage2.folder)]
    assert fill[0] == 0 < fill[1] <= fill[-1] == 1


def test_a_lower_miss_rate_is_better():
    def chosen(rate):
        both = {"ap50": 0.5, "ap": 0.3, "ap75": 0.3, "recall": 0.5}
        metrics = {"both": both, "alignment": None, "miss_rate": {"both": {"reasonable all": rate}}}
        return train_stage2.selection_metric(metrics, "miss-rate")

    assert chosen(20.0) > chosen(30.0) > chosen(None)


def test_fgclip_spares_tables_from_weight_decay(fgclip):
    (train_step,) = fgclip.parts["TrainStep"].results
    decayed = {id(p) for group in train_step.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in train_step.model.named_parameters():
        assert not ("position_embedding" in name and id(parameter) in decayed), name
