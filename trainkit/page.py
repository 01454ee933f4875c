"""Pieces of a page of html that stands alone: its frame and style, tables and figures."""

from collections.abc import Sequence
from html import escape

# Colours of the runs: Okabe and Ito's, which people who see few colours can tell apart, lighter on a dark page.
STYLE = """
:root { --page: #fff; --text: #1c1e21; --soft: #5f6670; --line: #d8dce2; --mark: #fff3c4; --head: #f3f5f7;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8578e; --c4: #b38600; --c5: #3a9bd0; --c6: #7a4fb5;
  --c7: #6b6b6b }
@media screen and (prefers-color-scheme: dark) { :root { --page: #17191d; --text: #e6e8eb; --soft: #a0a7b1;
  --line: #383d45; --mark: #4a3f12; --head: #22262c; --c0: #4fb0ea; --c1: #ff8c42; --c2: #2fc79a; --c3: #e391c3;
  --c4: #e5b93c; --c5: #9bd6f7; --c6: #b594ea; --c7: #b5b5b5; color-scheme: dark } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 1240px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem;
  padding-bottom: .2rem; border-bottom: 1px solid var(--line) } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
header { position: sticky; top: 0; background: var(--page); padding: .5rem 0; border-bottom: 1px solid var(--line);
  z-index: 1 } section { scroll-margin-top: 8rem } nav a { color: var(--c0); margin-right: 1rem }
.soft, figcaption span { color: var(--soft); font-size: .85rem; font-weight: normal }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: .9rem }
.row, .pictures { margin: .8rem 0 } .wide { grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)) }
.pictures { display: flex; flex-wrap: wrap; gap: .9rem; align-items: end }
figure { margin: 0; break-inside: avoid } figcaption { font-weight: 600; font-size: .9rem; overflow-wrap: anywhere }
figure img { height: 250px; width: auto; max-width: 100%; object-fit: contain; display: block }
.pictures figure { max-width: 100% }
figure > svg { width: 100%; height: auto; display: block }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0; padding: 0;
  font-size: .85rem; overflow-wrap: anywhere } .swatch { width: 24px; height: 10px; margin-right: .4rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; margin: .3rem 0 }
th, td { padding: .18rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { background: var(--head); font-weight: 600 } th[colspan] { text-align: center }
th:first-child, td:first-child, .text td, .text th { text-align: left }
.tables { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: start }
.text td { overflow-wrap: anywhere; min-width: 6rem; max-width: 32rem } .differs td { background: var(--mark) }
.grid { stroke: var(--line); stroke-width: .7 } .frame { fill: none; stroke: var(--line) }
.tick { fill: var(--soft); font: 10px system-ui, sans-serif }
svg .s0 { stroke: var(--c0) } svg .s1 { stroke: var(--c1) } svg .s2 { stroke: var(--c2) } svg .s3 { stroke: var(--c3) }
svg .s4 { stroke: var(--c4) } svg .s5 { stroke: var(--c5) } svg .s6 { stroke: var(--c6) } svg .s7 { stroke: var(--c7) }
svg path { fill: none; stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round }
.d1 { stroke-dasharray: 5 4 } .d2 { stroke-dasharray: 1 4 } .d3 { stroke-dasharray: 8 3 1 3 }
svg .dot { fill: var(--page); stroke-width: 1.4 } svg path.band { stroke: none; opacity: .18 }
.band.s0 { fill: var(--c0) } .band.s1 { fill: var(--c1) } .band.s2 { fill: var(--c2) } .band.s3 { fill: var(--c3) }
.band.s4 { fill: var(--c4) } .band.s5 { fill: var(--c5) } .band.s6 { fill: var(--c6) } .band.s7 { fill: var(--c7) }
@media print { header { position: static } nav { display: none } body { font-size: 11px; max-width: none }
  figure img { height: 200px } .row { grid-template-columns: repeat(3, 1fr) }
  .wide { grid-template-columns: repeat(2, 1fr) }
  * { print-color-adjust: exact } }
"""


class Html(str):
    """Text that is html already; what is not of this type gets escaped."""


def html(value) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def document(title: str, sections: dict[str, str], legend: str = "") -> str:
    """A whole page; a section without a body is left out. The page is forbidden to load anything."""
    sections = {heading: body for heading, body in sections.items() if body}
    anchors = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for heading, anchor in anchors.items())
    body = "".join(f'<section id="{anchors[h]}"><h2>{h}</h2>{body}</section>' for h, body in sections.items())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html(title)}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{html(title)}</h1><nav>{links}</nav>{legend}</header><main>{body}</main></body></html>\n"
    )


def table(
    head: Sequence, rows: Sequence[Sequence], *, differing: Sequence[bool] = (), text: bool = False, above: str = ""
) -> str:
    """A table; `differing` says which rows to mark, `text` sets cells to the left, `above` is a row over the head."""
    marks = list(differing) or [False] * len(rows)
    lines = "".join(
        f"<tr{' class=differs' if mark else ''}>{''.join(f'<td>{html(cell)}</td>' for cell in row)}</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    titles = "".join(f"<th>{html(cell)}</th>" for cell in head)
    kind = " class=text" if text else ""
    return (
        f'<div class="scroll"><table{kind}><thead>{above}<tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def figure(content: str, caption: str, remark: str = "", below: str = "") -> str:
    """`content` under its caption, which a remark may follow."""
    remark = f" <span>{html(remark)}</span>" if remark else ""
    return f"<figure><figcaption>{html(caption)}{remark}</figcaption>{content}{below}</figure>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{html(summary)}</summary>{body}</details>"
