"""Which parts of the method help? Short runs from common starting points, compared seed by seed.

    python benchmarks/ablation.py --jobs 2                                # give it again to go on
    python benchmarks/ablation.py --arms control merge dhn --seeds 3
    python benchmarks/ablation.py --llvip LLVIP --jobs 2                  # also on real pairs, in LLVIP's layout

A base is trained once per seed, without the parts in question. An arm goes on from it with its own flags, or is the
checkpoint of another arm evaluated otherwise. The control runs twice, the second time with other random draws and other
training scenes: what differs between the two is noise. All arms of a seed are evaluated on the same fresh scenes by
`python -m macl.evaluate`. A finished run is one json line, by which it is known and skipped while its arguments are
the same; to measure changed code, name another --results.
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

import torch

from benchmarks.common import processor, table
from trainkit.arguments import positive_int
from trainkit.errors import InputError, one_sentence

BATCH_SIZE = 4
BASE_STEPS, STEPS, LONG_STEPS, REAL_EPOCHS = 500, 160, 270, 6
CLEAR = 3  # standard errors from 0 at which a difference counts as shown; with five seeds p = 0.04
CONTROLS, REAL_CONTROLS = ("control", "control again"), ("real control", "real control again")
BARE = "--macl-weight 0 --merge none"


@dataclass(frozen=True)
class Arm:
    """One variant: `train`, the script and its own flags, or none to evaluate the checkpoint of `start`."""

    adds: str  # in words
    train: str = ""
    start: str = "base"  # the arm whose last.pt, of the same seed, it goes on from; "" for random weights
    evaluate: str = ""  # flags of macl.evaluate
    against: tuple[str, ...] = CONTROLS  # the arms that it is compared with, their mean
    steps: int = STEPS
    redraw: int = 0  # added to the seed of training
    batch: int = BATCH_SIZE


def stage1(flags: str) -> str:
    return f"train_stage1.py --modality-dropout 0.2 0.2 {flags}"


def stage2(flags: str) -> str:
    return f"train_stage2.py --old-share 0.5 --freeze-stages 0 --macl-weight 0 {flags}"


STREET = "--domain day-and-night"
MERGE, DHN = "--merge logit", "--dhn-size 512"
ROI, CROP = "--merge none --macl-level roi", "--merge none --macl-level crop"
DRAWN = {
    "base": Arm("the detector alone, rate held", stage1(f"{BARE} --schedule constant"), "", "", (), BASE_STEPS),
    "control": Arm("the base, trained on", stage1(BARE), against=()),
    "control again": Arm("the same with other draws", stage1(BARE), against=("control",), redraw=1000),
    "longer": Arm("the same for 1.7 times as long", stage1(BARE), steps=LONG_STEPS),
    "merge": Arm("boxes of three views merged", start="control", evaluate=MERGE, against=("control",)),
    "msp": Arm("multi-scale pyramid reweighting (MSP)", stage1(f"{BARE} --msp")),
    "macl 1": Arm("MACL, weight 1", stage1(f"{ROI} --macl-weight 1")),
    "macl": Arm("MACL, weight 0.1", stage1(ROI)),
    "dhn": Arm("MACL with hard negatives", stage1(f"{ROI} {DHN}"), against=(*CONTROLS, "macl")),
    "crop": Arm("MACL on crops", stage1(CROP)),
    "crop, dhn": Arm("the same with hard negatives", stage1(f"{CROP} {DHN}"), against=(*CONTROLS, "crop")),
    "crop, batch": Arm("MACL on crops, 12 pairs a step", stage1(CROP), against=("crop", "crop, dhn"), batch=12),
    "street": Arm("the control in the new domain", start="control", evaluate=STREET, against=()),
    "street register": Arm(
        "the same, infrared registered", start="control", evaluate=f"{STREET} --register rig", against=("street",)
    ),
    "street longer": Arm("old labels alone, longer", start="longer", evaluate=STREET, against=("street",)),
    "self-training": Arm(
        "labels of the new domain by the averaged detector", stage2("--target-labels none"),
        evaluate=f"--merge none {STREET}", against=("street", "street longer"),
    ),
}  # fmt: skip
LLVIP = {
    "real control": Arm("the base, trained on real pairs", stage1(BARE), against=()),
    "real control again": Arm("the same with other draws", stage1(BARE), against=("real control",), redraw=1000),
    "real merge": Arm("boxes of three views merged", start="real control", evaluate=MERGE, against=("real control",)),
    "real msp": Arm("MSP", stage1(f"{BARE} --msp"), against=REAL_CONTROLS),
    "real macl": Arm("MACL, weight 0.1", stage1(ROI), against=REAL_CONTROLS),
    "real dhn": Arm("MACL with hard negatives", stage1(f"{ROI} {DHN}"), against=(*REAL_CONTROLS, "real macl")),
}
ARMS = DRAWN | LLVIP

# Name of a metric -> where the output of macl.evaluate has it.
METRICS = {
    "AP50": ("detection", "both", "ap50"),
    "AP50:95": ("detection", "both", "ap"),
    "one camera": ("detection", "both", "one camera"),
    "AP50 visible": ("detection", "visible", "ap50"),
    "AP50 infrared": ("detection", "infrared", "ap50"),
    "AP50:95 infrared": ("detection", "infrared", "ap"),
    "R@1": ("alignment", "r1"),
    "R@1 seen in one": ("alignment", "r1_seen_in_one"),
}


def commands(name: str, seed: int, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The flags of training and of evaluation without the folders: what a finished run is known by."""
    arm, real = ARMS[name], name in LLVIP
    seed_flags = f"--seed {seed + arm.redraw} --batch-size {arm.batch} --workers {args.workers} --device {args.device}"
    data = f"--epochs 1 --synthetic-train {arm.steps * arm.batch} --synthetic-val 1"
    if "stage2" in arm.train:  # an epoch is over when its own domain's pairs are, half of each batch
        data = f"--epochs 1 --synthetic-train {arm.steps * BATCH_SIZE // 2} --synthetic-val 1"
    train = [*arm.train.split(), *seed_flags.split(), *data.split()] if arm.train else []
    scenes = f"--count {args.scenes} --seed {20_000 + seed}"
    if real:  # the drawn base's sizes of anchors, lists of proposals and statistics stay
        train = [*arm.train.split(), *seed_flags.split(), *REAL_FLAGS.split()] if arm.train else []
        scenes = "--dataset llvip --split test"
    evaluate = f"{scenes} --device {args.device} --workers {args.workers} {arm.evaluate}"
    return train, evaluate.split()


REAL_FLAGS = f"--val-split test --epochs {REAL_EPOCHS} --validate-every {REAL_EPOCHS} --optimizer adamw --lr 1e-3 "
REAL_FLAGS += "--schedule cosine --warmup-steps 30 --ema-decay 0.99 --clip-norm 0"


def finished_runs(args: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> the latest result that was made with the arguments of now. InputError for a line that is none."""
    finished = {}
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else ()
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{args.results}, line {number}: expected a json object; remove the line") from None
        name, seed = result["arm"], result["seed"]
        if name in ARMS and result["arguments"] == [*map(list, commands(name, seed, args))]:
            finished[name, seed] = result
    return finished


def wanted(names: list[str], seeds: int) -> list[tuple[str, int]]:
    """The (arm, seed) to be measured: what an arm is compared with and begins with comes along, before it."""
    chosen = set(names)
    for name in reversed(ARMS):  # an arm stands below those that it needs
        if name in chosen:
            chosen |= {*ARMS[name].against, ARMS[name].start} - {""}
    return [(name, seed) for seed in range(seeds) for name in ARMS if name in chosen]


def call(command: list[str], log: Path) -> float:
    """Runs a command with one thread; returns its seconds of processor time. InputError with what it said last."""
    with log.open("a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        said = (log.read_text(encoding="utf-8").strip() or "nothing").splitlines()[-1]
        raise InputError(f"{log.stem} ended with status {os.waitstatus_to_exitcode(status)}: {said} (see {log})")
    return usage.ru_utime + usage.ru_stime


def measure(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and evaluates one run in processes of their own."""
    arm, folder = ARMS[name], args.runs / f"{name}-{seed}".replace(" ", "_").replace(",", "")
    train, evaluate = commands(name, seed, args)
    start = args.runs / f"{arm.start}-{seed}".replace(" ", "_").replace(",", "") / "last.pt"
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    args.runs.mkdir(parents=True, exist_ok=True)
    log, seconds, root = folder.with_suffix(".log"), None, ["--data-root", str(args.llvip)] if name in LLVIP else []
    log.write_text("", encoding="utf-8")
    checkpoint = start
    if train:
        begin = ["--init-from", str(start)] if arm.start else []
        seconds = call([sys.executable, *train, *begin, *root, "--output", str(folder)], log)
        checkpoint = folder / "last.pt"
    folder.mkdir(exist_ok=True)
    output = folder / "evaluation.json"
    flags = ["--checkpoint", str(checkpoint), *root, "--output", str(output), *evaluate]
    call([sys.executable, "-m", "macl.evaluate", *flags], log)
    return {
        "arm": name,
        "seed": seed,
        "arguments": [train, evaluate],
        "metrics": read_metrics(output),
        "seconds": seconds,
        "machine": f"{torch.cuda.get_device_name() if args.device == 'cuda' else processor()}",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def read_metrics(path: Path) -> dict[str, float | None]:
    """METRICS of an output of macl.evaluate, in percent; None for those that it does not have."""
    found = json.loads(path.read_text(encoding="utf-8"))
    both = found["detection"].get("both", {})
    alone = [both.get(f"ap50_seen_in_{name}_only") for name in ("visible", "infrared")]
    both["one camera"] = None if None in alone else fmean(alone)
    metrics = {}
    for name, keys in METRICS.items():
        value = found
        for key in keys:
            value = (value or {}).get(key)
        metrics[name] = None if value is None else round(100 * value, 3)
    return metrics


def sweep(runs: list[tuple[str, int]], args: argparse.Namespace, measure=measure) -> int:
    """Makes the runs, `args.jobs` at a time, and appends a line for each; returns how many failed.

    What goes on from another's checkpoint waits until that is written, and fails with it.
    """
    futures, failures = {}, 0

    def one(name: str, seed: int) -> bool:
        needed = futures.get((ARMS[name].start, seed))
        if needed is not None and needed.result():
            return True
        try:
            result = measure(name, seed, args)
        except InputError as error:
            print(f"failed: {error}", flush=True)
            return True
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(name, seed, ", ".join(f"{key} {percent(value)}" for key, value in result["metrics"].items()), flush=True)
        return False

    with ThreadPoolExecutor(args.jobs) as pool:  # bases first: a run that waits holds a place
        for name, seed in sorted(runs, key=lambda run: run[0] != "base"):
            futures[name, seed] = pool.submit(one, name, seed)
        failures = sum(future.result() for future in futures.values())
    return failures


def compare(finished: dict) -> list[list[str]]:
    """A row per arm that is compared: paired differences to the mean of each group of arms, and a verdict."""
    rows = []
    for name, arm in ARMS.items():
        controls = tuple(other for other in arm.against if "control" in other)
        groups = [group for group in (controls, *((other,) for other in arm.against if other not in controls)) if group]
        for group in groups:
            seeds = [seed for run, seed in finished if run == name and all((one, seed) in finished for one in group)]
            cells = []
            for metric in METRICS:
                values = [[finished[run, seed]["metrics"][metric] for run in (name, *group)] for seed in sorted(seeds)]
                cells.append(paired([ours - fmean(theirs) for ours, *theirs in values if None not in (ours, *theirs)]))
            if seeds:
                rows.append([name, " and ".join(group), str(len(seeds)), *cells])
    return rows


def paired(differences: list[float]) -> str:
    """Mean and standard error, in bold where the mean is CLEAR standard errors from 0."""
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else "-"
    mean, error = fmean(differences), stdev(differences) / sqrt(len(differences))
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if len(differences) > 2 and abs(mean) > CLEAR * error else text


def percent(value: float | None) -> str:
    return "-" if value is None else format(value, ".1f")


def report(finished: dict, args: argparse.Namespace) -> str:
    """What is committed: the arms with their metrics, and the differences."""
    facts = [", ".join(sorted({str(one[key]) for one in finished.values()})) for key in ("machine", "torch", "date")]
    rows = []
    for name, arm in ARMS.items():
        results = [result for (run, _), result in finished.items() if run == name]
        row = [name, arm.adds, f"`{arm.train or 'macl.evaluate ' + arm.evaluate}`", arm.start, str(len(results))]
        seconds = [result["seconds"] for result in results if result["seconds"] is not None]
        row.append(f"{fmean(seconds):.0f}" if seconds else "-")
        for metric in METRICS:
            known = [result["metrics"][metric] for result in results if result["metrics"][metric] is not None]
            row.append(percent(fmean(known) if known else None) + (f" ± {stdev(known):.1f}" if len(known) > 1 else ""))
        rows += [row] if results else []
    paragraphs = [
        "# Ablation",
        f"{'; torch '.join(facts[:2])}; {facts[2]}. Base: {BASE_STEPS} steps of {BATCH_SIZE} pairs; arms: {STEPS}, or "
        f"{REAL_EPOCHS} epochs of the real pairs. Evaluated on {args.scenes} fresh drawn scenes, or on the real test "
        "split. Percent, mean and standard deviation over the seeds. One camera: AP50 with both cameras of people whom "
        "one alone shows. Seconds: processor time of training.",
        table(["arm", "what it is", "command", "goes on from", "seeds", "seconds", *METRICS], rows),
        f"Differences paired by seed, mean ± standard error; bold: more than {CLEAR} standard errors from 0.",
        table(["arm", "minus", "seeds", *METRICS], compare(finished)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def main(arguments: list[str] | None = None, *, measure=measure) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="and those that they need (default: all)")
    parser.add_argument("--llvip", type=Path, metavar="ROOT", help="real pairs, in LLVIP's layout, for the real arms")
    parser.add_argument("--seeds", type=positive_int, default=5, help="how many, from 0 on (default: 5)")
    parser.add_argument(
        "--scenes", type=positive_int, default=200, help="drawn scenes of the evaluation (default: 200)"
    )
    parser.add_argument("--jobs", type=positive_int, default=2, help="runs at a time, of one thread each (default: 2)")
    parser.add_argument("--workers", type=int, default=0, help="loading processes per run (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation", help="folders of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "ablation.jsonl",
        help="a line a finished run; the table is written beside it",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    args.runs, args.results = args.runs.resolve(), args.results.resolve()

    runs = wanted(args.arms or list(DRAWN if args.llvip is None else ARMS), args.seeds)
    if args.llvip is None and any(name in LLVIP for name, _ in runs):
        raise InputError("the real arms need --llvip ROOT")
    finished = finished_runs(args)
    todo = [run for run in runs if run not in finished]
    print(f"{len(runs)} runs, {len(todo)} of them still to be done", flush=True)
    failures = sweep(todo, args, measure)
    if finished := finished_runs(args):
        text = report(finished, args)
        args.results.with_suffix(".md").write_text(text, encoding="utf-8")
        print(f"\n{text}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    with one_sentence():
        main()
