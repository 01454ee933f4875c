"""Look at runs: one page of html with all that their folders tell, side by side. The page needs no network.

    python -m trainkit.report runs/stage1-20260101-120000
    python -m trainkit.report runs/one runs/other --output compare.html

It holds the validation figures, every curve of metrics.jsonl, the gradients by loss, pictures, arguments (those that
differ first) and versions, of runs of any of the scripts.
"""

import collections
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from trainkit.arguments import make_parser, non_negative_int
from trainkit.charts import MOST_POINTS, Curve, drawable, legend, line_chart, value_range
from trainkit.errors import InputError, one_sentence
from trainkit.files import write_text
from trainkit.page import Html, details, document, figure, html, table
from trainkit.pictures import pictures_section
from trainkit.runs import Name, Run, read_runs

# What a step's numbers are about, by how their names begin; the rest comes under "Monitored".
GROUPS = {
    "Losses": ("loss",),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad",),
    "Monitored": (),
    "Speed and memory": ("images_per_second", "samples_per_second", "memory"),
}
LOGARITHMIC = ("grad_norm", "norm")


def main(arguments: list[str] | None = None) -> None:
    """`python -m trainkit.report`: write the page of one or several runs."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE.html", help="the page; without it report.html in the first RUN")
    parser.add_argument("--pictures", type=non_negative_int, default=6, metavar="N", help="of each kind and run")
    log = "names of the curves on a logarithmic axis"
    parser.add_argument("--log", default=",".join(LOGARITHMIC), metavar="NAME,NAME", help=log)
    args = parser.parse_args(arguments)
    output = Path(args.output) if args.output else Path(args.runs[0]) / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output {output}: expected a name that ends with .html.")
    runs = read_runs(args.runs)
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist.")
    text = report(runs, pictures=args.pictures, log=tuple(args.log.split(",")))
    write_text(output, text)
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}", file=sys.stderr)
    print(f"{output}: {len(runs)} run{'s' * (len(runs) > 1)}, {output.stat().st_size / 2**20:.1f} MiB")


def report(runs: list[Run], *, pictures: int = 6, log: tuple[str, ...] = LOGARITHMIC) -> str:
    """The page. `pictures`: how many of each kind to show of a run; `log`: names with a logarithmic axis.

    Adds a note to a run whose pictures cannot be read.
    """
    shown = pictures_section(runs, pictures)  # first, as it makes notes
    sections = {
        "Runs": overview(runs),
        "Validation": validation_tables(runs) + charts(runs, "validation", log),
        "Training": training(runs, log),
        "Gradients by loss": cosines(runs) + charts(runs, "gradients", log, by_leaf=True),
        "Pictures": shown,
        "Arguments": arguments_section(runs),
        "Machine and versions": machine(runs),
    }
    labels = [run.label for run in runs]
    return document(", ".join(labels), sections, legend(labels, [*range(len(runs))]) if len(runs) > 1 else "")


def overview(runs: list[Run]) -> str:
    """A table of one row a run: what ran, how far it came, its last loss, and what is odd about it."""
    rows = []
    for run in runs:
        _, loss = run.curves.get("train", {}).get(("loss",), ((), ()))
        validations = {step for steps, _ in run.curves.get("validation", {}).values() for step in steps}
        resumed = len(run.record.get("resumed") or ())
        notes = [*run.notes, *([f"resumed {resumed} times"] if resumed > 1 else ["resumed once"] if resumed else [])]
        rows.append([
            run.label, run.record.get("script", "unknown"), run.record.get("started", "unknown"), run.steps,
            f"{run.epochs:g}", len(validations), number(loss[-1]) if len(loss) else "–", "; ".join(notes) or "–",
        ])  # fmt: skip
    head = ["run", "script", "started", "steps", "epochs", "validations", "last loss", "notes"]
    long = any(len(steps) > MOST_POINTS for run in runs for k in run.curves.values() for steps, _ in k.values())
    thinned = (
        f"<p class=soft>Curves of more than {MOST_POINTS} points are drawn as the means of {MOST_POINTS} equal "
        "stretches of steps; the band behind them reaches from the smallest to the largest value.</p>"
    )
    return table(head, rows, text=True) + (thinned if long else "")


def families(names: Iterable[Name], by_leaf: bool = False) -> dict[Name, dict[str, Name]]:
    """Names that differ in one key only belong in one chart: family -> that key -> name.

    The key is the last one but the leaf that takes several values, as the modality in ("both", "ap50"), ("visible",
    "ap50"); with `by_leaf` it is the leaf. A name that is alone is a family of its own, with the key "".
    """
    names = list(names)
    others = collections.Counter((name[:i], name[i + 1 :]) for name in names for i in range(len(name)))
    found: dict[Name, dict[str, Name]] = {}
    for name in names:
        places = [len(name) - 1] if by_leaf else range(len(name) - 2, -1, -1)
        place = next((i for i in places if by_leaf or others[name[:i], name[i + 1 :]] > 1), None)
        family, key = (name, "") if place is None else (name[:place] + name[place + 1 :], name[place])
        found.setdefault(family, {})[key] = name
    return dict(sorted(found.items(), key=lambda item: len(item[1]) == 1))  # those that compare come first


def names_of(runs: list[Run], kind: str, wanted: Callable[[Name], bool] = lambda name: True) -> list[Name]:
    """The names of a kind's curves that have a value in any run, in the order of the files."""
    found = {name: None for run in runs for name in run.curves.get(kind, {}) if wanted(name)}
    return [name for name in found if any(has_values(run, kind, name) for run in runs)]


def has_values(run: Run, kind: str, name: Name) -> bool:
    return name in run.curves.get(kind, {}) and not np.isnan(run.curves[kind][name][1]).all()


def charts(runs: list[Run], kind: str, log: tuple[str, ...], wanted=lambda name: True, by_leaf: bool = False) -> str:
    """A chart of every family of one run; of several runs one of every name, those of a family with the same axis.

    What never changes is told in a sentence instead.
    """
    figures, constant = [], []
    names = names_of(runs, kind, wanted)
    x_range, found = steps_of(runs, kind, names), families(names, by_leaf)
    styles = {key: i for i, key in enumerate({key: None for members in found.values() for key in members if key})}
    for family, members in found.items():
        title, logarithmic = " / ".join(family), any(key in log for key in family)
        groups = grouped(runs, kind, title, members, styles)
        y_range = value_range([one for curves in groups.values() for one in curves], logarithmic)
        if y_range and y_range[0] == y_range[1]:
            constant.append(f"{title} {number(y_range[0])}")
            continue
        for caption, curves in groups.items():
            drawing = line_chart(curves, log=logarithmic, x_range=x_range, y_range=y_range)
            several = len(runs) == 1 and len(curves) > 1
            below = legend([one.label for one in curves], [one.style for one in curves]) if several else ""
            figures.append(figure(drawing, caption, remark(curves, logarithmic), below))
    drawn = f'<div class="row">{"".join(figures)}</div>' if figures else ""
    return drawn + (f"<p class=soft>Without change: {html(', '.join(constant))}.</p>" if constant else "")


def steps_of(runs: list[Run], kind: str, names: list[Name]) -> tuple[float, float] | None:
    """The first and the last step at which one of these names was logged."""
    steps = [run.curves[kind][name][0] for run in runs for name in names if has_values(run, kind, name)]
    return (min(float(some[0]) for some in steps), max(float(some[-1]) for some in steps)) if steps else None


def grouped(
    runs: list[Run], kind: str, title: str, members: dict[str, Name], styles: dict[str, int]
) -> dict[str, list[Curve]]:
    """Caption -> curves: colours tell the members of the family apart, or where there are several runs, these."""
    if len(runs) == 1:
        of_kind = runs[0].curves[kind]
        return {title: [Curve(key or title, *of_kind[name], styles.get(key, 0)) for key, name in members.items()]}
    return {
        f"{title} · {key}" if key else title: [
            Curve(run.label, *run.curves[kind][name], i) for i, run in enumerate(runs) if has_values(run, kind, name)
        ]
        for key, name in members.items()
    }


def remark(curves: list[Curve], log: bool) -> str:
    """What a chart does not show by itself: its axis, its last value, and what is missing from it."""
    nulls = sum(int(np.isnan(one.values).sum()) for one in curves)
    off = sum(int((~drawable(one.values, log)).sum()) for one in curves) - nulls
    remarks = ["log scale"] if log else []
    remarks += [f"last {number(curves[0].values[-1])}"] if len(curves) == 1 else []
    remarks += [f"{nulls} null"] if nulls else []
    remarks += [f"{off} off the scale"] if off else []
    return ", ".join(remarks)


def validation_tables(runs: list[Run]) -> str:
    """The last validation's figures: a row a figure, a column for each key of its family and each run."""
    by_keys: dict[tuple[str, ...], list[tuple[Name, dict[str, Name]]]] = {}
    for family, members in families(names_of(runs, "validation")).items():
        by_keys.setdefault(tuple(members), []).append((family, members))
    tables = []
    for keys, found in by_keys.items():
        rows = [
            [" / ".join(family), *(last_value(run, members[key]) for key in keys for run in runs)]
            for family, members in found
        ]
        over = "".join(f"<th colspan={len(runs)}>{html(key)}</th>" for key in keys)
        labels = [run.label for _ in keys for run in runs] if len(runs) > 1 else keys
        above = f"<tr><th></th>{over}</tr>" if len(runs) > 1 and keys != ("",) else ""
        tables.append(table(["last validation", *labels], rows, above=above))
    return f'<div class="tables">{"".join(tables)}</div>' if tables else ""


def last_value(run: Run, name: Name) -> str:
    """The last value; pointed at, it tells its range."""
    if not has_values(run, "validation", name):
        return "–"
    steps, values = run.curves["validation"][name]
    low, high = np.nanargmin(values), np.nanargmax(values)
    extent = f"from {values[low]:.4g} (step {steps[low]:.0f}) to {values[high]:.4g} (step {steps[high]:.0f})"
    return Html(f'<span title="{html(extent)}">{html(number(values[-1]))}</span>')


def number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4g}"


def training(runs: list[Run], log: tuple[str, ...]) -> str:
    """The curves of the training steps, group by group; kinds of records that are not known come last."""
    named = tuple(begin for begins in GROUPS.values() for begin in begins)
    parts = []
    for title, begins in GROUPS.items():
        drawn = charts(
            runs, "train", log, lambda name, b=begins: name[0].startswith(b) if b else not name[0].startswith(named)
        )
        parts.append(f"<h3>{title}</h3>{drawn}" if drawn else "")
    for kind in {kind: None for run in runs for kind in run.curves if kind not in ("train", "validation", "gradients")}:
        parts.append(f"<h3>{html(kind)}</h3>{charts(runs, kind, log)}")
    return "".join(parts)


def cosines(runs: list[Run]) -> str:
    """The mean cosine of every two losses' gradients, a table for each run and part."""
    tables = []
    for run in runs:
        reports = run.curves.get("gradients", {})
        found = {name: curve for name, curve in reports.items() if len(name) == 4 and name[1] == "cosine"}
        for part in {name[0]: None for name in found}:
            losses = [name[2] for name in reports if name[:2] == (part, "norm") and len(name) == 3]
            rows = [
                [one, *(mean_cosine(found.get((part, "cosine", other, one))) for other in losses[: losses.index(one)])]
                for one in losses[1:]
            ]
            rows = [row + [""] * (len(losses) - len(row)) for row in rows]
            tables.append(
                figure(table(["", *losses[:-1]], rows), f"{run.label}: {part}", "mean cosine of the gradients")
            )
    return f'<div class="row wide">{"".join(tables)}</div>' if tables else ""


def mean_cosine(curve: tuple[np.ndarray, np.ndarray] | None) -> str:
    """The mean, on a ground that is the bluer the more the losses agree, and the redder the more they do not."""
    if curve is None or np.isnan(curve[1]).all():
        return "–"
    mean = float(np.nanmean(curve[1]))
    colour = "0, 114, 178" if mean > 0 else "213, 94, 0"
    return Html(f'<span style="background: rgba({colour}, {min(abs(mean), 1) * 0.6:.2f})">{mean:+.3f}</span>')


def arguments_section(runs: list[Run]) -> str:
    return compared(runs, [run.arguments for run in runs], "flag", "flags with the same value in all runs")


def machine(runs: list[Run]) -> str:
    """Of args.json all but the arguments."""
    records = [{key: value for key, value in run.record.items() if key != "arguments"} for run in runs]
    for record in records:
        versions = record.pop("versions", None)
        record.update(versions if isinstance(versions, dict) else {})
        if isinstance(record.get("command"), list):
            record["command"] = shlex.join(map(str, record["command"]))
    return compared(runs, records, "", "the same in all runs")


def compared(runs: list[Run], records: list[dict], title: str, same: str) -> str:
    """A table of several dicts: the rows that differ first and marked, the others folded away."""
    keys = {key: None for record in records for key in record}
    rows = [[key, *(said(record[key]) if key in record else "" for record in records)] for key in keys]
    head = [title, *(run.label for run in runs)]
    if len(runs) == 1:
        return table(head, rows, text=True) if rows else ""
    differing = [row for row in rows if len(set(row[1:])) > 1]
    alike = [row for row in rows if len(set(row[1:])) == 1]
    parts = [table(head, differing, differing=[True] * len(differing), text=True)] if differing else []
    parts += [details(f"{len(alike)} {same}", table(head, alike, text=True))] if alike else []
    return "".join(parts)


def said(value) -> str:
    if value is None or value == []:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    with one_sentence():
        main()
