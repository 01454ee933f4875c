"""Which parts of the method help? Short runs of the scripts themselves on drawn scenes, compared seed by seed.

    python benchmarks/ablation.py --jobs 2               # every arm; give it again to go on where it was interrupted
    python benchmarks/ablation.py --arms detector macl --seeds 3

Each arm is a line of flags of train_stage1.py or train_stage2.py, each run a process with one thread, and its metrics
are those of the run's last validation. A finished run is one json line, by which it is known and skipped as long as
its arguments are the same; to measure changed code, name another --results. What an arm changes is the difference to
the arm that it is compared with, of the same seed: the same training scenes and validation scenes.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import processor, table
from trainkit.arguments import positive_int
from trainkit.errors import InputError, one_sentence

BATCH_SIZE = 4
CLEAR = 4  # standard errors from 0 at which a difference counts as shown; with three seeds p = 0.06, with five 0.02
OLD_PAIRS = 1  # of each batch of stage 2, from the domain of stage 1


@dataclass(frozen=True)
class Arm:
    """One variant: `flags` of `script`, beside those that all runs share."""

    script: str
    flags: str
    adds: str  # in words
    against: tuple[str, ...] = ()  # the arms that it is compared with
    begins_with: str | None = None  # the arm whose best.pt, of the same seed, it goes on from
    seeds: int = 3


STAGE_1, STAGE_2 = "train_stage1.py", "train_stage2.py"
ARMS = {
    "detector": Arm(STAGE_1, "--no-msp --macl-weight 0", "the detector alone", seeds=5),
    "probe": Arm(
        STAGE_1, "--no-msp --macl-weight 0.001", "a projector that reads its features and hardly shapes them",
        against=("detector",), seeds=5,
    ),
    "macl": Arm(STAGE_1, "--no-msp", "contrast between the modalities (MACL)", against=("detector", "probe"), seeds=5),
    "light": Arm(STAGE_1, "--no-msp --macl-weight 0.1", "MACL at a tenth of the weight", against=("detector", "macl")),
    "msp": Arm(STAGE_1, "--macl-weight 0", "multi-scale pyramid reweighting (MSP)", against=("detector",)),
    "undropped": Arm(
        STAGE_1, "--no-msp --macl-weight 0 --modality-dropout 0 0", "the detector alone, no modality ever masked",
        against=("detector",),
    ),
    "tuned": Arm(
        STAGE_2, "--dhn-size 0 --mmd-level none", "the detector of macl, tuned to the second domain",
        begins_with="macl", seeds=5,
    ),
    "dhn": Arm(
        STAGE_2, "--mmd-level none", "hard negatives in the denominator (DHN)",
        against=("tuned",), begins_with="macl", seeds=5,
    ),
    "mmd": Arm(STAGE_2, "--dhn-size 0", "MMD of the embeddings (domain alignment)", ("tuned",), begins_with="macl"),
}  # fmt: skip

# Name of a metric -> where a validation line of metrics.jsonl has it. Stage 1 validates on the domain that it trains
# on, stage 2 on the second one and, "old", on that of stage 1.
METRICS = {
    "AP50 both": ("both", "ap50"),
    "AP50 visible": ("visible", "ap50"),
    "AP50 infrared": ("infrared", "ap50"),
    "R@1": ("alignment", "r1"),
    "old AP50 both": ("old", "both", "ap50"),
}


def arguments_of(name: str, seed: int, *, steps: int, scenes: int, arms: dict[str, Arm] = ARMS) -> list[str]:
    """The script and its flags without the folders: what a finished run is known by."""
    arm = arms[name]
    shared = f"--seed {seed} --batch-size {BATCH_SIZE} --epochs 1 --synthetic-val {scenes} --device cpu"
    if arm.script == STAGE_2:  # an epoch is over when its own domain's pairs are
        share = f"--old-share {OLD_PAIRS / BATCH_SIZE} --synthetic-train {(BATCH_SIZE - OLD_PAIRS) * steps}"
    else:
        share = f"--synthetic-train {BATCH_SIZE * steps}"
    return [arm.script, *shared.split(), *share.split(), *arm.flags.split()]


def finished_runs(args: argparse.Namespace, arms: dict[str, Arm]) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> the latest result that was made with the arguments of now. InputError for a line that is none."""
    finished = {}
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else ()
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{args.results}, line {number}: expected a json object; remove the line") from None
        name, seed = result["arm"], result["seed"]
        now = name in arms and arguments_of(name, seed, steps=args.steps, scenes=args.scenes, arms=arms)
        if result["arguments"] == now:
            finished[name, seed] = result
    return finished


def wanted(arms: dict[str, Arm], names: list[str], seeds: int | None) -> list[tuple[str, int]]:
    """The (arm, seed) to be measured: for each arm, what it is compared with and begins with comes along."""
    most = dict.fromkeys(arms, 0)
    for name in reversed(arms):  # an arm stands below those that it needs
        if name in names:
            most[name] = max(most[name], seeds or arms[name].seeds)
        for needed in {*arms[name].against, arms[name].begins_with} - {None}:
            most[needed] = max(most[needed], most[name])
    return [(name, seed) for name in arms for seed in range(most[name])]


def measure(name: str, seed: int, args: argparse.Namespace, arms: dict[str, Arm]) -> dict:
    """Trains one run in a process of its own. Raises InputError with what it said last when it fails."""
    arm, folder = arms[name], args.runs / f"{name}-{seed}"
    if folder.exists():  # what an interrupted run left
        shutil.rmtree(folder)
    known_by = arguments_of(name, seed, steps=args.steps, scenes=args.scenes, arms=arms)
    command = [sys.executable, *known_by, "--output", str(folder)]
    if arm.begins_with:
        command += ["--init-from", str(args.runs / f"{arm.begins_with}-{seed}" / "best.pt")]
    args.runs.mkdir(parents=True, exist_ok=True)
    log = args.runs / f"{name}-{seed}.log"
    with log.open("w", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if run.returncode:
        said = (log.read_text(encoding="utf-8").strip() or "nothing").splitlines()[-1]
        raise InputError(f"{name} with seed {seed} ended with status {run.returncode}: {said} (see {log})")
    about = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    return {
        "arm": name,
        "seed": seed,
        "arguments": known_by,
        "metrics": last_metrics(folder / "metrics.jsonl"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": about["versions"],
        "commit": about["commit"],
        "date": datetime.date.today().isoformat(),
    }


def last_metrics(path: Path) -> dict[str, float | None]:
    """METRICS of the last validation in a metrics.jsonl, in percent; None for those that the run does not have."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    metrics = {}
    for name, keys in METRICS.items():
        value = last
        for key in keys:
            value = (value or {}).get(key)
        metrics[name] = None if value is None else round(100 * value, 3)
    return metrics


def sweep(runs: list[tuple[str, int]], args: argparse.Namespace, arms: dict[str, Arm], measure=measure) -> int:
    """Makes the runs, `args.jobs` at a time, and appends a line for each; returns how many failed.

    Runs that begin with another's checkpoint wait until all others are through.
    """

    def one(run: tuple[str, int]) -> bool:
        try:
            result = measure(*run, args, arms)
        except InputError as error:
            print(f"failed: {error}", flush=True)
            return True
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(*run, ", ".join(f"{name} {percent(value)}" for name, value in result["metrics"].items()), flush=True)
        return False

    failures = 0
    for waits in (False, True):
        with ThreadPoolExecutor(args.jobs) as pool:
            failures += sum(pool.map(one, [run for run in runs if bool(arms[run[0]].begins_with) == waits]))
    return failures


def compare(finished: dict, arms: dict[str, Arm]) -> list[list[str]]:
    """A row per arm, arm that it is compared with, and metric that both have: the paired difference and a verdict."""
    rows = []
    for name, other in [(name, other) for name, arm in arms.items() for other in arm.against]:
        seeds = sorted(seed for run, seed in finished if run == name and (other, seed) in finished)
        for metric in METRICS:
            pairs = [[finished[run, seed]["metrics"][metric] for run in (name, other)] for seed in seeds]
            differences = [ours - theirs for ours, theirs in pairs if None not in (ours, theirs)]
            if differences:
                better = f"{sum(d > 0 for d in differences)} of {len(differences)}"
                mean, error, verdict = paired(differences)
                rows.append([name, other, metric, percent(mean, "+.1f"), percent(error), better, verdict])
    return rows


def paired(differences: list[float]) -> tuple[float, float | None, str]:
    """Mean, standard error (None of one difference), and what they allow to say."""
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, None, "one seed says nothing"
    error = stdev(differences) / sqrt(len(differences))
    if abs(mean) <= CLEAR * error:
        return mean, error, "no effect shown"
    return mean, error, "better" if mean > 0 else "worse"


def percent(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def report(finished: dict, args: argparse.Namespace, arms: dict[str, Arm]) -> str:
    """What is committed: the arms with their metrics, and the differences."""
    facts = [
        ", ".join(sorted({form.format(**result) for result in finished.values()}))
        for form in ("{machine}", "torch {versions[torch]}", "{date}", "commit {commit}")
    ]
    rows = []
    for name, arm in arms.items():
        results = [result["metrics"] for (run, _), result in finished.items() if run == name]
        row = [name, arm.adds, f"`{arm.script} {arm.flags}`", arm.begins_with or "random weights", str(len(results))]
        for metric in METRICS:
            known = [metrics[metric] for metrics in results if metrics[metric] is not None]
            spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
            row.append(percent(fmean(known) if known else None) + spread)
        if results:
            rows.append(row)
    paragraphs = [
        "# Ablation on the drawn scenes",
        f"{'; '.join(facts)}.\n{len(finished)} runs of {args.steps} steps of {BATCH_SIZE} pairs, one thread each; "
        f"validation on {args.scenes} scenes. Metrics are percent, mean and standard deviation over the seeds.",
        table(["arm", "what it is or adds", "command", "begins with", "seeds", *METRICS], rows),
        "Paired differences, the same seed in both arms. A difference counts as shown when it is more than "
        f"{CLEAR} standard errors from 0.",
        table(["arm", "minus", "metric", "difference", "standard error", "above 0", ""], compare(finished, arms)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def main(arguments: list[str] | None = None, *, arms: dict[str, Arm] = ARMS, measure=measure) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=tuple(arms), default=list(arms), help="and those that they need")
    parser.add_argument("--seeds", type=positive_int, help="how many, from 0 on (default: 5 or 3, by arm)")
    parser.add_argument("--steps", type=positive_int, default=150, help=f"of {BATCH_SIZE} pairs (default: 150)")
    parser.add_argument("--scenes", type=positive_int, default=100, help="validation scenes of a domain (default: 100)")
    parser.add_argument("--jobs", type=positive_int, default=2, help="runs at a time, of one thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation", help="folders of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "ablation-cpu.jsonl",
        help="a line a finished run; the table is written beside it",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    args.runs, args.results = args.runs.resolve(), args.results.resolve()

    runs = wanted(arms, args.arms, args.seeds)
    finished = finished_runs(args, arms)
    todo = [run for run in runs if run not in finished]
    print(f"{len(runs)} runs, {len(todo)} of them still to be done", flush=True)
    failures = sweep(todo, args, arms, measure)
    if finished := finished_runs(args, arms):
        text = report(finished, args, arms)
        args.results.with_suffix(".md").write_text(text, encoding="utf-8")
        print(f"\n{text}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    with one_sentence():
        main()
