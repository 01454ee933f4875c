"""Which parts of the method help? Short runs of the scripts themselves on drawn scenes, compared seed by seed.

    python benchmarks/ablation.py --jobs 2               # every arm; give it again to go on where it was interrupted
    python benchmarks/ablation.py --arms detector macl --seeds 3

Each arm is a line of flags of train_stage1.py or train_stage2.py, each run a process with one thread, and its figures
are those of the run's last validation. A finished run is one json line, by which it is known and skipped as long as
its arguments are the same; to measure changed code, name another --results. What an arm changes is the difference to
the arm that it is compared with, of the same seed: the same training scenes and validation scenes.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import comb, sqrt
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainkit.errors import InputError, one_sentence

BATCH_SIZE = 4
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
    "macl": Arm(
        STAGE_1, "--no-msp", "contrast between the modalities (MACL)", against=("detector", "probe"), seeds=5
    ),
    "light": Arm(
        STAGE_1, "--no-msp --macl-weight 0.1", "MACL with a tenth of the weight", against=("detector", "macl"), seeds=3
    ),
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
    "softplus": Arm(
        STAGE_2, "--mmd-level none --dhn-mode softplus", "hard negatives as a loss of their own (DHN)",
        against=("tuned",), begins_with="macl",
    ),
    "mmd": Arm(
        STAGE_2, "--dhn-size 0", "domain alignment: MMD of the embeddings", against=("tuned",), begins_with="macl"
    ),
    "adversary": Arm(
        STAGE_2, "--dhn-size 0 --mmd-level none --adversary dataset", "domain alignment: adversary of the data sets",
        against=("tuned",), begins_with="macl",
    ),
}  # fmt: skip

# Name of a figure -> where a validation line of metrics.jsonl has it. Stage 1 validates on the domain that it trains
# on, stage 2 on the second one and, "old", on that of stage 1.
FIGURES = {
    "AP50 both": ("both", "ap50"),
    "AP50 visible": ("visible", "ap50"),
    "AP50 infrared": ("infrared", "ap50"),
    "R@1": ("alignment", "r1"),
    "old AP50 both": ("old", "both", "ap50"),
}

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last one serves for more, a little wide.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def arguments_of(name: str, seed: int, *, steps: int, scenes: int, arms: dict[str, Arm] = ARMS) -> list[str]:
    """The script and its flags without the folders: what a finished run is known by."""
    arm = arms[name]
    shared = f"--seed {seed} --batch-size {BATCH_SIZE} --epochs 1 --synthetic-val {scenes} --device cpu"
    if arm.script == STAGE_2:  # an epoch is over when its own domain's pairs are
        share = f"--old-share {OLD_PAIRS / BATCH_SIZE} --synthetic-train {(BATCH_SIZE - OLD_PAIRS) * steps}"
    else:
        share = f"--synthetic-train {BATCH_SIZE * steps}"
    return [arm.script, *shared.split(), *share.split(), *arm.flags.split()]


def read_results(path: Path) -> list[dict]:
    """One dict a finished run. Raises InputError for a line that is none."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            raise InputError(f"{path}, line {number}: expected a json object; remove the line to run it anew") from None
    return results


def wanted(arms: dict[str, Arm], names: list[str], seeds: int | None) -> list[tuple[str, int]]:
    """The (arm, seed) to be measured: for each arm, what it is compared with and begins with comes along."""
    most = dict.fromkeys(arms, 0)
    for name in reversed(arms):  # an arm stands below those that it needs
        if name in names:
            most[name] = max(most[name], seeds or arms[name].seeds)
        for needed in {*arms[name].against, arms[name].begins_with} - {None}:
            most[needed] = max(most[needed], most[name])
    return [(name, seed) for name in arms for seed in range(most[name])]


def pending(runs: list[tuple[str, int]], finished: dict, folder: Path, arms: dict[str, Arm]) -> list[tuple[str, int]]:
    """The runs without a result, and those that they begin with whose checkpoint is no longer there."""
    open_runs = {run for run in runs if run not in finished}
    for name, seed in list(open_runs):
        parent = arms[name].begins_with
        if parent and not (folder / f"{parent}-{seed}" / "best.pt").is_file():
            open_runs.add((parent, seed))
    return [run for run in runs if run in open_runs]


def measure(name: str, seed: int, args: argparse.Namespace, arms: dict[str, Arm]) -> dict:
    """Trains one run in a process of its own. Raises InputError with what it said last when it fails."""
    arm, folder = arms[name], args.runs / f"{name}-{seed}"
    if folder.exists():  # what an interrupted run left
        shutil.rmtree(folder)
    known_by = arguments_of(name, seed, steps=args.steps, scenes=args.scenes, arms=arms)
    command = [sys.executable, *known_by, "--output", str(folder)]
    if arm.begins_with:
        command += ["--init-from", str(args.runs / f"{arm.begins_with}-{seed}" / "best.pt")]
    log = args.runs / f"{name}-{seed}.log"
    args.runs.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(run.pid, 0)  # as run.wait(), which does not tell the processor time
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        said = (log.read_text(encoding="utf-8").strip() or "nothing").splitlines()[-1]
        raise InputError(f"{name} with seed {seed} ended with status {run.returncode}: {said} (see {log})")
    about = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    return {
        "arm": name,
        "seed": seed,
        "arguments": known_by,
        "figures": last_figures(folder / "metrics.jsonl"),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "jobs": args.jobs,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": about["versions"],
        "commit": about["commit"],
        "date": datetime.date.today().isoformat(),
    }


def last_figures(path: Path) -> dict[str, float | None]:
    """FIGURES of the last validation in a metrics.jsonl, in percent; None for those that the run does not have."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    figures = {}
    for name, keys in FIGURES.items():
        value = last
        for key in keys:
            value = (value or {}).get(key)
        figures[name] = None if value is None else round(100 * value, 3)
    return figures


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def sweep(runs: list[tuple[str, int]], args: argparse.Namespace, arms: dict[str, Arm], measure=measure) -> list[str]:
    """Runs what is pending, `args.jobs` at a time, and appends a line for each; returns what failed.

    Runs that begin with another's checkpoint wait until all others are through.
    """
    failures = []
    for waits in (False, True):
        batch = [run for run in runs if (arms[run[0]].begins_with is not None) == waits]
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {pool.submit(measure, *run, args, arms): run for run in batch}
            try:
                for future in as_completed(futures):
                    try:
                        result = future.result()
                    except InputError as error:
                        failures.append(str(error))
                        print(f"failed: {error}", flush=True)
                        continue
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    figures = ", ".join(f"{k} {percent(v)}" for k, v in result["figures"].items())
                    print(f"{result['arm']} {result['seed']}: {figures}; {result['cpu_seconds']} s", flush=True)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    return failures


def paired(differences: list[float]) -> dict:
    """Mean, standard error, 95 % t interval and two-sided exact sign test of paired differences.

    -> n, mean, better (how many are above 0), and se, low, high, p; these are None with fewer than two differences.
    """
    n, better = len(differences), sum(d > 0 for d in differences)
    mean = fmean(differences)
    if n < 2:
        return {"n": n, "mean": mean, "better": better, "se": None, "low": None, "high": None, "p": None}
    se = stdev(differences) / sqrt(n)
    half = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * se
    untied = sum(d != 0 for d in differences)
    fewer = min(better, untied - better)
    p = min(1.0, 2 * sum(comb(untied, k) for k in range(fewer + 1)) / 2**untied)
    return {"n": n, "mean": mean, "better": better, "se": se, "low": mean - half, "high": mean + half, "p": p}


def verdict(found: dict) -> str:
    """What the interval allows to say."""
    if found["se"] is None:
        return "one seed says nothing"
    return "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "no effect shown"


def compare(finished: dict, arms: dict[str, Arm]) -> list[dict]:
    """`paired` of each arm minus each that it is compared with, for the figures that both have, and their names."""
    rows = []
    for name, arm in arms.items():
        for other in arm.against:
            seeds = sorted(seed for run, seed in finished if run == name and (other, seed) in finished)
            for figure in FIGURES:
                pairs = [[finished[run, seed]["figures"][figure] for run in (name, other)] for seed in seeds]
                differences = [ours - theirs for ours, theirs in pairs if None not in (ours, theirs)]
                if differences:
                    rows.append({"arm": name, "against": other, "figure": figure, **paired(differences)})
    return rows


def percent(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)] + [""]


def report(finished: dict, args: argparse.Namespace, arms: dict[str, Arm]) -> str:
    """What is committed: the arms, their figures, the differences, and what did not help."""
    results = list(finished.values())
    rows = compare(finished, arms)
    where = {
        name: ", ".join(sorted({str(value) for value in values}))
        for name, values in {
            "machine": [result["machine"] for result in results],
            "torch": [f"torch {result['versions']['torch']}" for result in results],
            "date": [result["date"] for result in results],
            "commit": [f"commit {result['commit']}" for result in results],
        }.items()
    }
    about = [
        [name, arm.adds, f"`{arm.script} {arm.flags}`", arm.begins_with or "random weights", ", ".join(arm.against)]
        for name, arm in arms.items()
        if any(run == name for run, _ in finished)
    ]
    lines = [
        "# Ablation on the drawn scenes",
        "",
        "; ".join(where.values()) + ".",
        f"{len(results)} runs of {args.steps} steps of {BATCH_SIZE} pairs, one thread each, at most "
        f"{max(result['cpu_seconds'] for result in results)} s of processor time; validation on {args.scenes} scenes. "
        "Figures are percent.",
        "",
        *table(["arm", "what it is or adds", "command", "begins with", "compared with"], about),
        "Mean and standard deviation over the seeds:",
        "",
        *table(["arm", "seeds", *FIGURES], means(finished, arms)),
        "Paired differences, the same seed in both arms: standard error, 95 % t interval, and the two-sided exact sign "
        "test. The intervals are not widened for their number: of twenty without an effect one would leave out 0.",
        "",
        *table(
            ["arm", "minus", "figure", "seeds", "difference", "standard error", "95 % interval", "above 0", "p", ""],
            [
                [
                    row["arm"], row["against"], row["figure"], str(row["n"]), percent(row["mean"], "+.1f"),
                    percent(row["se"]), f"{percent(row['low'], '+.1f')} to {percent(row['high'], '+.1f')}",
                    f"{row['better']} of {row['n']}", percent(row["p"], ".3f"), verdict(row),
                ]
                for row in rows
            ],
        ),
        *conclusions(rows, arms),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def means(finished: dict, arms: dict[str, Arm]) -> list[list[str]]:
    """A row an arm: its name, its number of seeds, and each figure's mean and standard deviation."""
    rows = []
    for name in arms:
        own = [result["figures"] for (run, _), result in finished.items() if run == name]
        cells = []
        for figure in FIGURES:
            known = [figures[figure] for figures in own if figures[figure] is not None]
            spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
            cells.append(percent(fmean(known) if known else None) + spread)
        if own:
            rows.append([name, str(len(own)), *cells])
    return rows


def conclusions(rows: list[dict], arms: dict[str, Arm]) -> list[str]:
    """A sentence for each comparison: in which figures the arm was shown to help, or that it was shown in none."""
    lines = []
    for name, other in dict.fromkeys((row["arm"], row["against"]) for row in rows):
        found = {row["figure"]: verdict(row) for row in rows if (row["arm"], row["against"]) == (name, other)}
        parts = [
            f"{word} in {', '.join(figure for figure in found if found[figure] == word)}"
            for word in dict.fromkeys(found.values())
        ]
        helps = "helps" if "better" in found.values() else "**is not shown to help**"
        lines.append(f"* {name}, {arms[name].adds}, {helps}, against {other}: {'; '.join(parts)}.")
    return lines


def main(arguments: list[str] | None = None, *, arms: dict[str, Arm] = ARMS, measure=measure) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=tuple(arms), default=list(arms), help="and those that they need")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default: 5 or 3, by arm)")
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH_SIZE} pairs (default: 150)")
    parser.add_argument("--scenes", type=int, default=100, help="validation scenes of a domain (default: 100)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation", help="folders of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "ablation-cpu.jsonl",
        help="a line a finished run; the table is written beside it",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    for name in ("seeds", "steps", "scenes", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1")
    args.runs, args.results = args.runs.resolve(), args.results.resolve()

    runs = wanted(arms, args.arms, args.seeds)
    todo = pending(runs, finished_runs(args, arms), args.runs, arms)
    print(f"{len(runs)} runs, {len(todo)} of them still to be done", flush=True)
    failures = sweep(todo, args, arms, measure)
    if finished := finished_runs(args, arms):
        table = report(finished, args, arms)
        args.results.with_suffix(".md").write_text(table, encoding="utf-8")
        print(f"\n{table}")
    if failures:
        raise SystemExit(1)


def finished_runs(args: argparse.Namespace, arms: dict[str, Arm]) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> the latest result that was made with the arguments of now."""
    finished = {}
    for result in read_results(args.results):
        name, seed = result["arm"], result["seed"]
        now = name in arms and arguments_of(name, seed, steps=args.steps, scenes=args.scenes, arms=arms)
        if result["arguments"] == now:
            finished[name, seed] = result
    return finished


if __name__ == "__main__":
    with one_sentence():
        main()
