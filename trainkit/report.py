"""One HTML page about the runs of any of the scripts, side by side. The page needs no network.

    python -m trainkit.report runs/stage1-20260101-120000
    python -m trainkit.report runs/one runs/other --output compare.html

It holds validation metrics, every curve of metrics.jsonl, pictures, arguments (those that differ first) and versions.
matplotlib, of the extra `viz`, draws the curves.
"""

import collections
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from trainkit.arguments import make_parser, non_negative_int
from trainkit.errors import InputError, one_sentence
from trainkit.files import is_image, natural, open_image, write_text
from trainkit.log import step_record
from trainkit.page import Curve, draw, figure, html_page, keys, picture, table
from trainkit.run_folder import file_in_run, read_record

MAX_VALUE = 1e100  # larger numbers are not drawn
LOGARITHMIC = {"grad_norm"}  # curves with a logarithmic axis
TITLES = {"validation": "Validation", "train": "Training"}
Name = tuple[str, ...]  # kind of record and the keys that lead to a number in it: ("validation", "both", "ap50")


@dataclass
class Run:
    folder: Path
    record: dict  # args.json
    label: str = ""
    curves: dict[Name, Curve] = field(default_factory=dict)  # each has a value
    notes: list[str] = field(default_factory=list)  # sentences about what is missing or damaged

    def last(self, *name: str) -> str:
        """The last value of a curve; a dash where there is none."""
        value = self.curves[name][1][-1] if name in self.curves else math.nan
        return "–" if math.isnan(value) else f"{value:.4g}"


def main(arguments: list[str] | None = None) -> None:
    """Write the page. arguments: without the program's name."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE.html", help="the page; without it report.html in the first RUN")
    parser.add_argument("--pictures", type=non_negative_int, default=6, metavar="N", help="of each kind and run")
    args = parser.parse_args(arguments)
    output = Path(args.output) if args.output else Path(args.runs[0]) / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output {output}: expected a name that ends with .html.")
    runs = read_runs(args.runs)
    write_text(output, page(runs, args.pictures))
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}", file=sys.stderr)
    print(f"{output}: {len(runs)} run{'s' * (len(runs) > 1)}, {output.stat().st_size / 2**20:.1f} MiB")


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, labelled with the ends of their paths that tell them apart.

    Raises InputError where a folder is missing or no run's, and where one of its files is broken or leads out of it. A
    half-written last line of metrics.jsonl only makes a note.
    """
    runs = [_read_run(Path(folder)) for folder in folders]
    common = os.path.commonpath([run.folder.resolve().parent for run in runs])
    for run in runs:
        run.label = str(run.folder.resolve().relative_to(common))
    return runs


def _read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a run.")
    record, metrics = read_record(folder), file_in_run(folder, "metrics.jsonl")
    if record is None and metrics is None:
        raise InputError(f"{folder} is not the folder of a run: it holds neither args.json nor metrics.jsonl.")
    run = Run(folder, record or {})
    run.notes += ["there is no args.json, so the arguments are not known"] * (record is None)
    run.notes += ["there is no metrics.jsonl, nothing has been logged"] * (metrics is None)
    points: dict[Name, tuple[list[float], list[float]]] = {}
    with open(metrics or os.devnull, encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            record = step_record(line)
            if record is None and line.endswith("\n"):
                raise InputError(f"{metrics}: line {place} is not a json object with a step.")
            if record is None:
                run.notes.append(f"line {place} of metrics.jsonl, the last one, is half written and was left out")
                break
            values = {key: value for key, value in record.items() if key not in ("step", "epoch", "kind")}
            for name, value in _numbers(values, (str(record.get("kind")),)):
                columns = points.setdefault(name, ([], []))
                columns[0].append(record["step"])
                columns[1].append(value)
    curves = {name: (np.array(steps), np.array(values)) for name, (steps, values) in points.items()}
    run.curves = {name: curve for name, curve in curves.items() if not np.isnan(curve[1]).all()}
    return run


def _numbers(values: dict, before: Name) -> Iterator[tuple[Name, float]]:
    """Every number in nested dicts, with its name; NaN for null and for what cannot be drawn."""
    for key, value in values.items():
        if isinstance(value, dict) and len(before) < 9:
            yield from _numbers(value, (*before, key))
        elif value is None or isinstance(value, int | float):
            yield (*before, key), math.nan if value is None or not abs(value) < MAX_VALUE else float(value)


def page(runs: list[Run], pictures: int) -> str:
    """The page, which is forbidden to load anything. pictures: how many of each kind per run."""
    shown = picture_section(runs, pictures)  # first, as it makes notes
    arguments = compared(runs, [run.record.get("arguments", {}) for run in runs])
    others = compared(runs, [run.record | {"arguments": "above"} for run in runs])
    sections = [("Runs", overview(runs)), ("Last validation", validation_tables(runs))]
    sections += [(title, charts(runs, kind)) for kind, title in TITLES.items()]
    sections += [("Pictures", shown), ("Arguments", arguments), ("Machine and versions", others)]
    return html_page(", ".join(run.label for run in runs), sections)


def overview(runs: list[Run]) -> str:
    """A table of one row per run: script, start, steps, last loss, notes."""
    rows = []
    for run in runs:
        steps = max((steps.max() for steps, _ in run.curves.values()), default=0)
        script, started = (run.record.get(key, "unknown") for key in ("script", "started"))
        rows.append([run.label, script, started, f"{steps:.0f}", run.last("train", "loss"), "; ".join(run.notes)])
    return table(["run", "script", "started", "steps", "last loss", "notes"], rows, "text")


def names_of(runs: list[Run], kind: str) -> list[Name]:
    return list(dict.fromkeys(name for run in runs for name in run.curves if name[0] == kind))


def families(names: Sequence[Name]) -> dict[Name, dict[str, Name]]:
    """Group names that differ in exactly one key: the other keys -> that key -> name.

    Of several such keys it is the last before the leaf, as the modality in ("validation", "both", "ap50"). A name that
    is alone has the key "".
    """
    counts = collections.Counter((name[:i], name[i + 1 :]) for name in names for i in range(len(name)))
    groups: dict[Name, dict[str, Name]] = {}
    for name in names:
        places = [i for i in range(len(name) - 1) if counts[name[:i], name[i + 1 :]] > 1] or [len(name)]
        groups.setdefault(name[: places[-1]] + name[places[-1] + 1 :], {})["".join(name[places[-1] :][:1])] = name
    return groups


def validation_tables(runs: list[Run]) -> str:
    """The last validation's metrics: a row per metric, a column per key of its family and run."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for family, members in families(names_of(runs, "validation")).items():
        cells = [run.last(*name) for name in members.values() for run in runs]
        tables.setdefault(tuple(members), []).append([" / ".join(family[1:]), *cells])
    labels = [run.label for run in runs] if len(runs) > 1 else [""]
    heads = [["last validation", *(f"{key} {label}".strip() for key in keys for label in labels)] for keys in tables]
    return "".join(map(table, heads, tables.values()))


def compared(runs: list[Run], records: list[dict]) -> str:
    """Tables of the runs' dicts: of several runs, the rows that differ come first and are marked."""
    keys = dict.fromkeys(key for record in records for key in record)
    rows = [[key, *(record.get(key, "") for record in records)] for key in keys]
    head = ["", *(run.label for run in runs)]
    differing = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(head, differing, "text differs") + table(head, [row for row in rows if row not in differing], "text")


def charts(runs: list[Run], kind: str) -> str:
    """Of one run a chart per family, of several runs one per name; curves that never change are listed."""
    names = names_of(runs, kind)
    figures, constant = [], []
    for family, members in (families(names) if len(runs) == 1 else {name: {"": name} for name in names}).items():
        title, logarithmic = " / ".join(family[1:]), not LOGARITHMIC.isdisjoint(family)
        curves = {key or run.label: run.curves[n] for key, n in members.items() for run in runs if n in run.curves}
        values = np.concatenate([values for _, values in curves.values()])
        if np.nanmin(values) == np.nanmax(values):
            constant.append(f"{title} {np.nanmax(values):.4g}")
            continue
        content = draw(list(curves.values()), logarithmic, salt=ascii(family))
        content += keys(curves) if len(runs) > 1 or len(curves) > 1 else ""
        missing = (np.isnan(values) | (logarithmic and values <= 0)).sum()
        figures.append(figure(content, title, f"{missing} not drawn" if missing else ""))
    drawn = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return drawn + (f"<p><small>Without change: {escape(', '.join(constant))}.</small></p>" if constant else "")


def picture_section(runs: list[Run], most: int) -> str:
    """The runs' pictures by name, `most` evenly spaced ones of those whose names differ in numbers only."""
    chosen: list[tuple[str, Run]] = []
    for run in runs:
        kinds: dict[str, list[str]] = {}
        for path in run.folder.rglob("*"):
            if is_image(path) and not path.is_symlink():
                name = path.relative_to(run.folder).as_posix()
                kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        for names in kinds.values():
            names.sort(key=natural)
            places = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
            chosen += [(names[i], run) for i in places]
    figures = []
    for name, run in sorted(chosen, key=lambda item: natural(item[0])):
        try:
            image = open_image(run.folder / name)
        except InputError as error:
            run.notes.append(f"{name} cannot be shown: {error}")
            continue
        figures.append(picture(image, name, run.label))
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


if __name__ == "__main__":
    with one_sentence():
        main()
