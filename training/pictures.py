"""A run's pictures inside the page: found by name, thinned where there are many, made smaller."""

import base64
import collections
import io
import re
import warnings
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from training.page import figure, html
from training.runs import Run

LARGEST_SIDE = 900  # pixels of a picture on the page
MOST_PIXELS = 50_000_000  # of a picture file; one that says it has more is left out


def pictures_section(runs: list[Run], most: int) -> str:
    """Pictures whose names differ in their numbers only, in a row; of a longer row of a run evenly spaced ones."""
    kinds: dict[str, dict[str, dict[str, Path]]] = {}  # kind -> name -> label of the run -> path
    counts: collections.Counter = collections.Counter()
    for run in runs:
        of_kind: dict[str, list[Path]] = {}
        for path in run.pictures:
            of_kind.setdefault(re.sub(r"\d+", "#", str(path.relative_to(run.folder))), []).append(path)
        for kind, paths in of_kind.items():
            counts[kind] += len(paths)
            for path in evenly_spaced(sorted(paths, key=natural), most):
                kinds.setdefault(kind, {}).setdefault(str(path.relative_to(run.folder)), {})[run.label] = path
    parts = []
    for kind, names in sorted(kinds.items()):
        figures = []
        for name in sorted(names, key=natural):
            for run in runs:
                figures += embedded(run, names[name].get(run.label), name)
        shown = "" if counts[kind] == len(figures) else f" <span class=soft>{len(figures)} of {counts[kind]}</span>"
        parts.append(f'<h3>{html(Path(kind).stem)}{shown}</h3><div class="row wide">{"".join(figures)}</div>')
    return "".join(parts)


def embedded(run: Run, path: Path | None, name: str) -> list[str]:
    if path is None:
        return []
    try:
        return [figure(picture(path), name, run.label)]
    except ValueError as error:
        run.notes.append(f"{name} cannot be shown: {error}")
        return []


def natural(name) -> list:
    """A key by which 34 comes before 102."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", str(name))]


def evenly_spaced(items: list, most: int) -> list:
    """At most so many of them, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def picture(path: Path) -> str:
    """The picture as an <img> that holds it, as JPEG and no larger than LARGEST_SIDE.

    Raises ValueError where the file is no picture, breaks off, or has more than MOST_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        image = image.convert("RGBA") if image.mode in ("RGBA", "LA", "PA", "P") else image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError("it has too many pixels") from error
    except (OSError, SyntaxError) as error:  # Pillow's words for a broken PNG are a SyntaxError
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{escape(path.name)}" {size} src="data:image/jpeg;base64,{source}">'
