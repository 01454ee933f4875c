"""One HTML page about the runs of any of the scripts, side by side. The page needs no network.

    python -m trainkit.report runs/stage1-20260101-120000
    python -m trainkit.report runs/one runs/other --output compare.html

It holds validation metrics, every curve of metrics.jsonl, pictures, arguments (those that differ first) and versions.
matplotlib, of the extra `viz`, draws the curves.
"""

import base64
import collections
import io
import json
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
from trainkit.run_folder import file_in_run, read_record

MAX_SIDE = 900  # pixels of a picture on the page
MAX_POINTS = 300  # of a curve; longer ones are drawn faintly, and over it the means of so many stretches
MAX_VALUE = 1e100  # larger numbers are not drawn
LOGARITHMIC = {"grad_norm"}  # curves with a logarithmic axis
# Okabe and Ito's, for colour-blind users; the ninth curve is the first one dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578e", "#b38600", "#3a9bd0", "#7a4fb5", "#6b6b6b")
TITLES = {"validation": "Validation", "train": "Training"}
STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 1240px; color: #1c1e21; font: 15px/1.45 system-ui, sans-serif }
h1, h2 { border-bottom: 1px solid #d8dce2; font-size: 1.2rem } h1, figcaption, td { overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: .9rem }
.pictures { display: flex; flex-wrap: wrap; gap: .9rem } img { max-height: 250px; max-width: 100% }
figure { margin: 0; break-inside: avoid } figcaption { font-weight: 600 } small { font-weight: normal }
figure > svg { width: 100%; height: auto } figcaption, .key, table { font-size: .88rem } .key { margin-right: 1rem }
table { border-collapse: collapse; margin: .6rem 0 } th { background: #f3f5f7 } .differs td { background: #fff3c4 }
th, td { padding: .18rem .6rem; border-bottom: 1px solid #d8dce2; text-align: right; vertical-align: top }
th:first-child, td:first-child, .text td, .text th { text-align: left }
"""
Name = tuple[str, ...]  # kind of record and the keys that lead to a number in it: ("validation", "both", "ap50")
Curve = tuple[np.ndarray, np.ndarray]  # steps and values, each (n,) float64; NaN where the value is null


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
    records = [run.record | {"arguments": "above"} for run in runs]
    sections = [
        ("Runs", overview(runs)),
        ("Last validation", validation_tables(runs)),
        *((title, charts(runs, kind)) for kind, title in TITLES.items()),
        ("Pictures", shown),
        ("Arguments", compared(runs, [run.record.get("arguments", {}) for run in runs])),
        ("Machine and versions", compared(runs, records)),
    ]
    parts = [f"<section><h2>{escape(title)}</h2>{body}</section>" for title, body in sections if body]
    title = escape(", ".join(run.label for run in runs))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence], style: str = "") -> str:
    """A table of plain values; nothing without rows. style: "text" sets cells to the left, "differs" marks them."""
    texts = [[cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for cell in row] for row in rows]
    lines = [f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in texts]
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<table class="{style}"><tr>{titles}</tr>{"".join(lines)}</table>' if rows else ""


def figure(content: str, caption: str, remark: str) -> str:
    return f"<figure><figcaption>{escape(caption)} <small>{escape(remark)}</small></figcaption>{content}</figure>"


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
        for i, label in enumerate(curves) if len(runs) > 1 or len(curves) > 1 else ():
            mark = f'<span style="color: {COLOURS[i % 8]}">{"━╍"[i // 8 % 2] * 2}</span>'
            content += f"<span class=key>{mark} {escape(label)}</span>"
        missing = (np.isnan(values) | (logarithmic and values <= 0)).sum()
        figures.append(figure(content, title, f"{missing} not drawn" if missing else ""))
    drawn = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return drawn + (f"<p><small>Without change: {escape(', '.join(constant))}.</small></p>" if constant else "")


def draw(curves: list[Curve], log: bool, salt: str) -> str:
    """The curves over their steps as an <svg> without text from files. salt: makes its ids this chart's own."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise InputError('the report needs matplotlib: pip install "macl-fgclip[viz]"') from error
    options = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.sans-serif": ["DejaVu Sans"], "font.size": 8}
    options |= {"path.simplify_threshold": 1.0, "lines.solid_capstyle": "round"}
    with matplotlib.rc_context(options), io.StringIO() as file:
        axes = Figure(figsize=(4.5, 2.6), layout="constrained").subplots()
        for i, (steps, values) in enumerate(curves):
            values = np.where(values > 0, values, np.nan) if log else values
            style = dict(color=COLOURS[i % 8], linestyle=["solid", "dashed"][i // 8 % 2])
            if len(values) > MAX_POINTS:
                axes.plot(steps, values, linewidth=0.6, alpha=0.3, **style)
                known = ~np.isnan(values)
                stretches = [np.array_split(column[known], MAX_POINTS) for column in (steps, values)]
                steps, values = (np.array([part.mean() for part in column if len(part)]) for column in stretches)
            axes.plot(steps, values, **style)
            dots = np.repeat(values, 3)
            dots[2::3] = np.nan  # so that a point between two gaps shows; markers would become <use>
            axes.plot(np.repeat(steps, 3), dots, color=COLOURS[i % 8], linewidth=4 if len(values) < 50 else 2)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(alpha=0.3)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("step")
        axes.figure.savefig(file, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
        svg = file.getvalue()
    return re.sub(r' id="[\w.]+_\d+"| xmlns\S*"', "", svg[svg.index("<svg") :])


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
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=85)
        source = base64.b64encode(data.getvalue()).decode("ascii")
        figures.append(figure(f'<img alt="" src="data:image/jpeg;base64,{source}">', name, run.label))
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


if __name__ == "__main__":
    with one_sentence():
        main()
