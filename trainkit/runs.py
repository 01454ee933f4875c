"""What a run's folder tells: its arguments, the curves of metrics.jsonl, and its pictures."""

import array
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainkit.errors import InputError
from trainkit.files import MAX_ID, number, parse_json, read_json, shown

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Name = tuple[str, ...]  # of a number in a record, as the keys that lead to it: ("both", "ap50")


@dataclass
class Run:
    """A run of any of the scripts.

    curves: kind of record -> name -> (steps, values), each (n,) float64 with NaN for null, steps rising. notes: what is
    not as it should be, as sentences. pictures: their paths from the folder on.
    """

    folder: Path
    label: str = ""
    record: dict = field(default_factory=dict)  # args.json
    curves: dict[str, dict[Name, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    steps: int = 0
    epochs: float = 0
    pictures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> dict:
        return self.record.get("arguments", {})


def read_runs(folders: list[str | Path]) -> list[Run]:
    """The runs in these folders, labelled so that they can be told apart.

    Raises InputError, naming folder, file or line, where a folder is missing, given twice or no run's, and where one of
    its files is broken or leads out of it. A last line of metrics.jsonl that is half written only makes a note.
    """
    runs = [_read_run(Path(folder)) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise InputError(f"{place} is given twice.")
    for run, label in zip(runs, _labels(places), strict=True):
        run.label = label
    return runs


def _labels(places: list[Path]) -> list[str]:
    """The last names of each path, as many as tell all of them apart."""
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        labels = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(labels)) == len(labels):
            return labels
    return [str(place) for place in places]


def _read_run(folder: Path) -> Run:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"{folder}: expected the folder of a run, found {found}.")
    run = Run(folder)
    record, metrics = read_record(folder), _inside(folder, "metrics.jsonl")
    if record is None and metrics is None:
        raise InputError(f"{folder} is not the folder of a run: it holds neither args.json nor metrics.jsonl.")
    if record is None:
        run.notes.append("there is no args.json, so the arguments are not known")
    else:
        run.record = record
    if metrics is None:
        run.notes.append("there is no metrics.jsonl, nothing has been logged")
    else:
        _read_metrics(metrics, run)
    run.pictures = list(_find_pictures(folder))
    return run


def _inside(folder: Path, name: str) -> Path | None:
    """The file of that name where there is one; InputError where a link leads out of the folder."""
    path = folder / name
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link that leads out of the run's folder.")
    return path


def read_record(folder: Path, script: str | None = None) -> dict | None:
    """args.json of a run's folder, with "arguments" and "resumed"; None where there is none.

    InputError where it is damaged or a link that leads out, or where the run is of another script than `script`.
    """
    path = _inside(folder, "args.json")
    if path is None:
        return None
    record = read_json(path, "what a run began with", dict)
    kinds = {"arguments": dict, "resumed": list}
    for key, kind in kinds.items():
        if not isinstance(record.setdefault(key, kind()), kind):
            raise InputError(f"{path}: {key}: expected {kind.__name__}, got {shown(record[key])}")
    if script is not None and record.get("script") != script:
        raise InputError(f"{path}: the run was begun by {shown(record.get('script'))}; {script} cannot go on with it")
    return record


def _read_metrics(path: Path, run: Run) -> None:
    points: dict[str, dict[Name, tuple[array.array, array.array]]] = {}
    half = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            if half is not None:
                raise InputError(f"{path}: line {half} is not a json object with a step.")
            record = step_record(line)
            if record is None:
                half = place
                continue
            step = record["step"]
            run.steps, run.epochs = max(run.steps, int(step)), max(run.epochs, _number(record.get("epoch")) or 0)
            of_kind = points.setdefault(str(record.get("kind")), {})
            values = {key: value for key, value in record.items() if key not in ("step", "epoch", "kind")}
            for name, value in _numbers(values):
                steps, column = of_kind.setdefault(name, (array.array("d"), array.array("d")))
                steps.append(step)
                column.append(value)
    if half is not None:
        run.notes.append(f"line {half} of metrics.jsonl, the last one, is half written and was left out")
    for kind, of_kind in points.items():
        run.curves[kind] = {name: _sorted(*columns) for name, columns in of_kind.items()}


def step_record(line: str) -> dict | None:
    """A line of metrics.jsonl, with a number of at least 0 as its "step"; None where it is something else."""
    try:
        record = parse_json(line, "")
        step = None if isinstance(record["step"], str) else record["step"]
        return record | {"step": number(step, "", 0, MAX_ID)}
    except (InputError, KeyError, TypeError):
        return None


def _numbers(values: dict, before: Name = ()) -> Iterator[tuple[Name, float]]:
    """Every number in nested dicts, with its name; NaN for null."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*before, key))
        elif value is None or isinstance(value, (int, float)):
            finite = _number(value)
            yield (*before, key), math.nan if finite is None else finite


def _number(value) -> float | None:
    """A finite float, or None for all else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _sorted(steps: array.array, values: array.array) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(steps), np.array(values)
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def _find_pictures(folder: Path) -> Iterator[str]:
    """Pictures in the folder and below, in order; links are left alone."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() in PICTURES and not path.is_symlink():
                yield path.relative_to(folder).as_posix()
