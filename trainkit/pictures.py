"""A run's pictures inside the page: found by name, thinned where there are many, made smaller."""

import base64
import collections
import io
import re
from html import escape
from pathlib import Path

import numpy as np

from trainkit.files import natural, open_image
from trainkit.page import figure, html
from trainkit.runs import Run

LARGEST_SIDE = 900  # pixels of a picture on the page


def pictures_section(runs: list[Run], most: int) -> str:
    """The pictures whose names differ in their numbers only, together; of a run's `most` evenly spaced ones.

    Of one run they stand in a row, of several the pictures of the same name. Adds a note to a run for each picture that
    cannot be shown.
    """
    kinds: dict[str, dict[str, list[Run]]] = {}  # kind -> name -> the runs that have it
    counts: collections.Counter = collections.Counter()
    for run in runs:
        of_run: dict[str, list[str]] = {}
        for name in run.pictures:
            of_run.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        for kind, names in of_run.items():
            counts[kind] += len(names)
            for name in evenly_spaced(sorted(names, key=natural), most):
                kinds.setdefault(kind, {}).setdefault(name, []).append(run)
    parts = []
    for kind, names in sorted(kinds.items()):
        several = len(runs) > 1
        ordered = sorted(names, key=natural)
        rows = [[embedded(run, name, run.label if several else "") for run in names[name]] for name in ordered]
        rows = rows if several else [sum(rows, [])]
        shown = sum(bool(cell) for row in rows for cell in row)
        counted = "" if shown == counts[kind] else f" <span class=soft>{shown} of {counts[kind]}</span>"
        parts.append(f"<h3>{html(Path(kind).stem.replace('#', '').strip('-_ ') or kind)}{counted}</h3>")
        parts += [f'<div class="pictures">{"".join(row)}</div>' for row in rows]
    return "".join(parts)


def embedded(run: Run, name: str, remark: str = "") -> str:
    try:
        return figure(picture(run.folder / name), name, remark)
    except ValueError as error:
        run.notes.append(f"{name} cannot be shown: {error}")
        return ""


def evenly_spaced(items: list, most: int) -> list:
    """At most so many of them, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def picture(path: Path) -> str:
    """The picture as an <img> that holds it, as JPEG and no larger than LARGEST_SIDE. Raises InputError."""
    image = open_image(path)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{escape(path.name)}" {size} src="data:image/jpeg;base64,{source}">'
