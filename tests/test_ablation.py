"""The ablation's statistics, what it skips, what it runs first and what it writes; with runs that train nothing."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

import train_stage1
import train_stage2
from macl import evaluate
from trainkit.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ablation = importlib.import_module("benchmarks.ablation")
Arm = ablation.Arm
ARMS = {
    "base": Arm("the start", "train_stage1.py --macl-weight 0", start="", against=()),
    "control": Arm("the base, trained on", "train_stage1.py --macl-weight 0", against=()),
    "control again": Arm("other draws", "train_stage1.py --macl-weight 0", against=("control",), redraw=1000),
    "merge": Arm("views merged", start="control", evaluate="--merge logit", against=("control",)),
    "msp": Arm("pyramids", "train_stage1.py --msp"),
}
GAIN = {"base": 0.0, "control": 0.0, "control again": 2.0, "merge": 5.0, "msp": 6.0}


class Runs:
    """Stands in for `measure`: notes what is run, and gives metrics that grow with the seed."""

    def __init__(self, fails=()):
        self.seen, self.fails = [], fails

    def __call__(self, name, seed, args):
        self.seen.append((name, seed))
        if (name, seed) in self.fails:
            raise InputError(f"{name}-{seed} ended with status 2: no such flag")
        metrics = dict.fromkeys(ablation.METRICS, 40.0) | {"AP50": 50 + 3.0 * seed + GAIN[name], "R@1": None}
        seconds = None if name == "merge" else 7.0
        facts = {"machine": "a machine", "torch": "2.15.0", "date": "2026-01-02", "seconds": seconds}
        return {
            "arm": name, "seed": seed, "metrics": metrics, "arguments": [*ablation.commands(name, seed, args)], **facts
        }  # fmt: skip


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """sweep(*flags): the runs that the benchmark makes."""
    monkeypatch.setattr(ablation, "ARMS", ARMS)
    monkeypatch.setattr(ablation, "DRAWN", ARMS)

    def run(*flags, runs=None):
        runs = Runs() if runs is None else runs
        where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results.jsonl"), "--jobs", "1"]
        ablation.main([*where, *flags], measure=runs)
        return runs.seen

    run.path = tmp_path / "results.jsonl"
    return run


@pytest.mark.parametrize(
    ("differences", "said"),  # a variance of 2.5 first; two seeds are too few to say so
    [([1.0, 2.0, 3.0, 4.0, 5.0], "**+3.0 ± 0.7**"), ([-2.0, -3.0, -2.5], "**-2.5 ± 0.3**"), ([9.0], "+9.0"), ([], "-"),
     ([5.0, -4.0, 3.0], "+1.3 ± 2.7"), ([3.0, 3.0], "+3.0 ± 0.0")],
)  # fmt: skip
def test_paired_differences_and_what_they_allow_to_say(differences, said):
    assert ablation.paired(differences) == said


def test_an_arm_brings_what_it_needs_along_and_runs_after_it(sweep):
    assert sweep("--seeds", "1", "--arms", "merge") == [("base", 0), ("control", 0), ("merge", 0)]
    seen = sweep("--seeds", "2")
    assert len(seen) == 7 and seen.index(("base", 1)) < seen.index(("control", 1)) < seen.index(("merge", 1))


def test_a_finished_run_is_skipped_and_one_of_other_arguments_is_not(sweep):
    assert len(sweep("--seeds", "1")) == 5 and sweep("--seeds", "1") == []
    assert {seed for _, seed in sweep("--seeds", "2")} == {1}
    assert len(sweep("--seeds", "1", "--scenes", "9")) == 5 and sweep("--seeds", "2") == []


def test_a_failure_is_said_takes_what_begins_with_it_along_and_no_other(sweep, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep("--seeds", "2", runs=Runs(fails={("control", 0)}))
    assert stop.value.code == 1 and "failed: control-0 ended with status 2" in capsys.readouterr().out
    assert len(sweep.path.read_text().splitlines()) == 8  # without control-0 and merge-0
    assert sweep("--seeds", "2") == [("control", 0), ("merge", 0)]


def test_the_table(sweep):
    sweep("--seeds", "3")
    text = " ".join(sweep.path.with_suffix(".md").read_text().split())
    assert "a machine; torch 2.15.0; 2026-01-02." in text
    assert "| control | the base, trained on | `train_stage1.py --macl-weight 0` | base | 3 | 7 | 53.0 ± 3.0 |" in text
    assert "| merge | views merged | `macl.evaluate --merge logit` | control | 3 | - | 58.0 ± 3.0 |" in text
    assert "| merge | control | 3 | **+5.0 ± 0.0** | +0.0 ± 0.0 |" in text
    assert "| msp | control and control again | 3 | **+5.0 ± 0.0** |" in text  # minus their mean


def test_broken_results_are_named(sweep):
    sweep.path.write_text('{"arm": "plain"\n')
    with pytest.raises(InputError, match=r"results.jsonl, line 1: expected a json object"):
        sweep()


def test_real_arms_need_real_pairs(tmp_path):
    with pytest.raises(InputError, match="need --llvip ROOT"):
        ablation.main(["--arms", "real control", "--results", str(tmp_path / "a.jsonl")])


def test_what_an_evaluation_says_becomes_percent(tmp_path):
    both = {"ap50": 0.5, "ap": 0.25, "ap50_seen_in_visible_only": 0.2, "ap50_seen_in_infrared_only": 0.4}
    found = {"detection": {"both": both, "visible": {"ap50": None}}, "alignment": None}
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert list(ablation.read_metrics(tmp_path / "a.json").values()) == [50, 25, 30, None, None, None, None, None]


def test_a_run_is_a_process_that_trains_and_one_that_evaluates(tmp_path, monkeypatch):
    args = argparse.Namespace(runs=tmp_path, scenes=9, workers=0, device="cpu", llvip=Path("L"))
    called = []
    monkeypatch.setattr(ablation, "call", lambda command, log: called.append(command) or 1.0)
    monkeypatch.setattr(ablation, "read_metrics", lambda path: {})
    for name in ("merge", "real control"):
        ablation.measure(name, 1, args)
    (evaluated, trained, again) = (" ".join(map(str, command)) for command in called)
    assert f"--checkpoint {tmp_path}/control-1/last.pt" in evaluated and "--merge logit" in evaluated
    assert f"--init-from {tmp_path}/base-1/last.pt --data-root L --output {tmp_path}/real_control-1" in trained
    assert f"--checkpoint {tmp_path}/real_control-1/last.pt --data-root L" in again and "llvip --split test" in again
    monkeypatch.undo()
    with pytest.raises(InputError, match="a ended with status 3: said"):
        ablation.call([sys.executable, "-c", "print('said'); raise SystemExit(3)"], tmp_path / "a.log")


@pytest.mark.parametrize("name", ablation.ARMS)
def test_the_flags_of_the_arms_are_those_of_the_scripts(name):
    args = argparse.Namespace(scenes=9, workers=0, device="cpu")
    train, evaluation = ablation.commands(name, 3, args)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    root = ["--data-root", "L"] * (name in ablation.LLVIP)
    evaluate.check_flags(parser.parse_args(["--checkpoint", "a.pt", *evaluation, *root]))
    if train:
        script = {"train_stage1.py": train_stage1, "train_stage2.py": train_stage2}[train[0]]
        given = script.parse_arguments(train[1:])
        arm = ablation.ARMS[name]
        assert given.seed == 3 + arm.redraw and given.batch_size == arm.batch
        own = given.batch_size * (1 - getattr(given, "old_share", 0))  # of each batch
        assert name in ablation.LLVIP or given.synthetic_train == arm.steps * own
