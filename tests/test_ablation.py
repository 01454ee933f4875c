"""The ablation's statistics, what it skips, what it runs first and what it writes; with runs that train nothing."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import train_stage1
from trainkit.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def load():
    """benchmarks/ is no package: its scripts are loaded by their path."""
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "benchmarks" / "ablation.py")
    module = sys.modules["ablation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ablation = load()
Arm = ablation.Arm
ARMS = {
    "plain": Arm("train_stage1.py", "--macl-weight 0", "nothing", seeds=2),
    "more": Arm("train_stage1.py", "--msp", "much", against=("plain",), seeds=3),
    "tuned": Arm("train_stage2.py", "--tune", "tuning", against=("more",), begins_with="plain", seeds=1),
}
METRICS = {"AP50 both": 50.0, "AP50 visible": 40.0, "AP50 infrared": 30.0, "R@1": None, "old AP50 both": None}


class Runs:
    """Stands in for `measure`: notes what is run, leaves a checkpoint, and gives metrics that grow with the seed."""

    def __init__(self, fails=()):
        self.seen, self.fails = [], fails

    def __call__(self, name, seed, args, arms):
        self.seen.append((name, seed))
        if (name, seed) in self.fails:
            raise InputError(f"{name} with seed {seed} ended with status 2: error: no such flag")
        folder = args.runs / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "best.pt").write_bytes(b"weights")
        gain = {"plain": 0.0, "more": 5.0 + 0.1 * seed, "tuned": 1.0}[name]
        return {
            "arm": name, "seed": seed, "metrics": {**METRICS, "AP50 both": 50 + 3.0 * seed + gain},
            "arguments": ablation.arguments_of(name, seed, steps=args.steps, scenes=args.scenes, arms=arms),
            "machine": "a machine, 2 cores", "versions": {"torch": "2.15.0"},
            "commit": "abc", "date": "2026-01-02",
        }  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    def run(*flags, runs=None):
        runs = Runs() if runs is None else runs
        where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results.jsonl"), "--jobs", "1"]
        ablation.main([*where, *flags], arms=ARMS, measure=runs)
        return runs.seen

    run.path = tmp_path / "results.jsonl"
    run.folder = tmp_path / "runs"
    return run


@pytest.mark.parametrize(
    ("differences", "mean", "error", "verdict"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3, (2.5 / 5) ** 0.5, "better"),  # a variance of 2.5
        ([2.0, 3.0, 2.5], 2.5, 0.2887, "better"),
        ([-2.0, -3.0, -2.5], -2.5, 0.2887, "worse"),
        ([5.0, -4.0, 3.0], 4 / 3, 2.728, "no effect shown"),
        ([0.0, 0.0], 0, 0, "no effect shown"),
        ([9.0], 9, None, "one seed says nothing"),
    ],
)
def test_paired_differences_and_what_they_allow_to_say(differences, mean, error, verdict):
    found = ablation.paired(differences)
    assert found == (pytest.approx(mean), error and pytest.approx(error, abs=1e-3), verdict)


def test_an_arm_brings_what_it_needs_along_for_the_same_seeds():
    assert ablation.wanted(ARMS, ["tuned"], None) == [("plain", 0), ("more", 0), ("tuned", 0)]
    assert ablation.wanted(ARMS, ["more"], None) == [(name, seed) for name in ("plain", "more") for seed in range(3)]
    assert ablation.wanted(ARMS, list(ARMS), 2) == [(name, seed) for name in ARMS for seed in range(2)]


def test_a_finished_run_is_skipped_and_one_of_other_arguments_is_not(sweep):
    assert sorted(sweep("--seeds", "1")) == [("more", 0), ("plain", 0), ("tuned", 0)]
    assert sweep("--seeds", "1") == []
    assert sorted(sweep("--seeds", "2")) == [("more", 1), ("plain", 1), ("tuned", 1)]
    assert sorted(sweep("--seeds", "1", "--steps", "9")) == [("more", 0), ("plain", 0), ("tuned", 0)]
    assert sweep("--seeds", "2") == [] and len(sweep.path.read_text().splitlines()) == 9


def test_what_begins_with_a_checkpoint_runs_after_it(sweep):
    seen = sweep("--seeds", "2")
    assert all(seen.index(("tuned", seed)) > seen.index(("plain", seed)) for seed in (0, 1))


def test_a_failure_is_said_and_the_others_go_on(sweep, capsys):
    runs = Runs(fails={("plain", 0)})
    with pytest.raises(SystemExit) as stop:
        sweep("--seeds", "2", runs=runs)
    assert stop.value.code == 1
    assert "failed: plain with seed 0 ended with status 2: error: no such flag" in capsys.readouterr().out
    assert len(sweep.path.read_text().splitlines()) == 5
    assert ("plain", 0) in sweep("--seeds", "2")


def test_the_table(sweep):
    sweep()
    text = sweep.path.with_suffix(".md").read_text()
    assert "a machine, 2 cores; torch 2.15.0; 2026-01-02; commit abc." in text
    assert (
        "| plain | nothing | `train_stage1.py --macl-weight 0` | random weights | 3 | 53.0 ± 3.0 | 40.0 ± 0.0 |" in text
    )
    assert "| more | plain | AP50 both | +5.1 | 0.1 | 3 of 3 | better |" in text
    assert "| more | plain | AP50 visible | +0.0 | 0.0 | 0 of 3 | no effect shown |" in text
    assert "| tuned | more | AP50 both | -4.0 | - | 0 of 1 | one seed says nothing |" in text
    assert "R@1 |" in text and "| plain | R@1" not in text  # nothing to compare


def test_broken_results_are_named(sweep):
    sweep.path.write_text('{"arm": "plain"\n')
    with pytest.raises(InputError, match=r"results.jsonl, line 1: expected a json object"):
        sweep()


def test_the_last_validation_counts(tmp_path):
    early = {"both": {"ap50": 0.9}, "visible": {"ap50": 0.9}, "infrared": {"ap50": 0.9}, "alignment": {"r1": 0.1}}
    late = {"both": {"ap50": 0.5}, "visible": {"ap50": None}, "infrared": {"ap50": 0.25}, "alignment": None}
    lines = [{"kind": "validation", **early}, {"kind": "validation", **late}, {"kind": "train", "loss": 1.0}]
    lines[1]["old"] = {"both": {"ap50": 0.75}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = ablation.last_metrics(tmp_path / "metrics.jsonl")
    assert list(found.values()) == [50.0, None, 25.0, None, 75.0] and list(found) == list(ablation.METRICS)


def test_a_run_is_a_process_of_the_script_itself(tmp_path):
    arms = {"tiny": Arm("benchmarks/ablation.py", "--no-such-flag", "a script that ends at once")}
    args = argparse.Namespace(runs=tmp_path, steps=1, scenes=1, jobs=1)
    with pytest.raises(InputError, match="tiny with seed 1 ended with status 2: .*unrecognized.* --no-such-flag"):
        ablation.measure("tiny", 1, args, arms)
    assert "unrecognized" in (tmp_path / "tiny-1.log").read_text()


def test_both_stages_take_the_same_number_of_steps():
    for arm, pairs_a_step in (("more", 4), ("tuned", 3)):  # one pair of stage 2's four is of the old domain
        flags = ablation.arguments_of(arm, 0, steps=50, scenes=10, arms=ARMS)
        assert flags[flags.index("--synthetic-train") + 1] == str(50 * pairs_a_step)
        assert ("--old-share" in flags) == (arm == "tuned")


@pytest.mark.parametrize("name", [name for name, arm in ablation.ARMS.items() if arm.script == "train_stage1.py"])
def test_the_flags_of_the_stage_1_arms_are_the_script_s(name):
    script, *flags = ablation.arguments_of(name, 3, steps=200, scenes=150)
    args = train_stage1.parse_arguments(flags)
    assert script == "train_stage1.py" and (args.seed, args.synthetic_train, args.epochs) == (3, 800, 1)
