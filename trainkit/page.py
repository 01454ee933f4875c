"""Parts of an HTML page that needs no network: tables, figures, charts, pictures. What is printed is escaped."""

import base64
import io
import json
import re
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from trainkit.errors import InputError

MAX_SIDE = 900  # pixels of a picture on the page
MAX_POINTS = 300  # of a curve; longer ones are drawn faintly, and over it the means of so many stretches
# Okabe and Ito's, for colour-blind users; the ninth curve is the first one dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578e", "#b38600", "#3a9bd0", "#7a4fb5", "#6b6b6b")
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
Curve = tuple[np.ndarray, np.ndarray]  # steps and values, each (n,) float64; NaN where the value is null


def html_page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """The page of titled sections, without those that are empty. It is forbidden to load anything."""
    parts = [f"<section><h2>{escape(name)}</h2>{body}</section>" for name, body in sections if body]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence], style: str = "") -> str:
    """A table of plain values; nothing without rows. style: "text" sets cells to the left, "differs" marks them."""
    texts = [[cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for cell in row] for row in rows]
    lines = [f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in texts]
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<table class="{style}"><tr>{titles}</tr>{"".join(lines)}</table>' if rows else ""


def figure(content: str, caption: str, remark: str) -> str:
    return f"<figure><figcaption>{escape(caption)} <small>{escape(remark)}</small></figcaption>{content}</figure>"


def picture(image: Image.Image, caption: str, remark: str = "") -> str:
    """A figure of an image, which is scaled down to MAX_SIDE in place."""
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    return figure(f'<img alt="" src="data:image/jpeg;base64,{source}">', caption, remark)


def keys(labels: Iterable[str]) -> str:
    """What the curves of a chart are, in their colours."""
    marks = [(f'<span style="color: {COLOURS[i % 8]}">{"━╍"[i // 8 % 2] * 2}</span>', s) for i, s in enumerate(labels)]
    return "".join(f"<span class=key>{mark} {escape(label)}</span>" for mark, label in marks)


def draw(curves: list[Curve], log: bool, salt: str, across: str = "step") -> str:
    """The curves over `across` as an <svg> without text from files. salt: makes its ids this chart's own."""
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
        axes.set_xlabel(across)
        axes.figure.savefig(file, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
        svg = file.getvalue()
    return re.sub(r' id="[\w.]+_\d+"| xmlns\S*"', "", svg[svg.index("<svg") :])
