"""Line charts as inline SVG, without any library; colours and fonts come from the style sheet of the page around them.

Classes: `s0` to `s7` stroke a curve, `d1` to `d3` dash it, `band` fills the range behind it, `grid` and `frame` are the
lines of the plot, `tick` its numbers.
"""

import math
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 32  # margins of the plot, in the same units
END, MIDDLE = 'text-anchor="end"', 'text-anchor="middle"'
COLOURS, DASHES = 8, 4
MOST_POINTS = 300  # of a curve; more are averaged, as nobody sees more in so few pixels
FEWEST_UNITS = 8  # between two points for both to get a marker
MAX_SIZE = 1e100  # larger numbers are not drawn


@dataclass(frozen=True)
class Curve:
    """steps, values: (n,) float64, steps rising; NaN is a gap. style: which colour and dash, from 0."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    style: int = 0


@dataclass(frozen=True)
class _Axis:
    """Numbers from `low` to `high` on a line from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: np.ndarray) -> np.ndarray:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        values = np.log10(values) if self.log else values
        return self.start + (values - low) / (high - low) * (self.end - self.start)


def drawable(values: np.ndarray, log: bool = False) -> np.ndarray:
    """(n,) bool: which values have a place on an axis."""
    return (np.abs(values) < MAX_SIZE) & ((values > 1 / MAX_SIZE) if log else True)


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS):
    """A curve of at most `most` points: steps, means, smallest and largest values, each (m,).

    A longer one is cut into `most` stretches of equally many steps, each of which becomes the mean of its values. A
    stretch with nothing but NaN stays NaN, one in which nothing was logged gives no point. A shorter curve is returned
    as it is, with its values for all three.
    """
    if len(steps) <= most:
        return steps, values, values, values
    edges = np.linspace(steps[0], steps[-1], most + 1)
    which = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, most - 1)
    logged = np.bincount(which, minlength=most)
    known = ~np.isnan(values)
    counts = np.bincount(which[known], minlength=most)
    totals = np.bincount(which[known], weights=values[known], minlength=most)
    low, high = np.full(most, np.inf), np.full(most, -np.inf)
    np.minimum.at(low, which[known], values[known])
    np.maximum.at(high, which[known], values[known])
    middle = np.bincount(which, weights=steps, minlength=most)[logged > 0] / logged[logged > 0]
    empty = np.where(counts > 0, 0.0, np.nan)
    means = totals / np.maximum(counts, 1) + empty
    return middle, *(column[logged > 0] for column in (means, low + empty, high + empty))


def value_range(curves: list[Curve], log: bool = False) -> tuple[float, float] | None:
    """From the smallest to the largest number to draw; None where there is none.

    Of curves that are thinned it takes in the means, and all but the outermost 2 % of the numbers on each side, so that
    a single spike does not flatten the rest.
    """
    found = [np.empty(0)]
    for curve in curves:
        values = np.where(drawable(curve.values, log), curve.values, np.nan)
        means = thin(curve.steps, values)[1]
        found.append(means[~np.isnan(means)])
        if means is not values and len(found[-1]):
            found.append(np.nanpercentile(values, [2, 98]))
    found = np.concatenate(found)
    return (float(found.min()), float(found.max())) if len(found) else None


def line_chart(
    curves: list[Curve],
    *,
    log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """The curves over their steps as an <svg>; empty where none has a number to draw.

    log: logarithmic values, on which those of 0 and below are gaps. x_range, y_range: instead of what the curves and
    `value_range(curves, log)` reach, for charts that are to be compared. Curves of few points get markers that tell
    their value when pointed at.
    """
    y_range = y_range or value_range(curves, log)
    if y_range is None:
        return ""
    steps = np.concatenate([curve.steps for curve in curves])
    inner = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    x = _Axis(*_widened(*(x_range or (float(steps.min()), float(steps.max()))), 0.02), 0, inner[0])
    y = _Axis(*(_log_widened(*y_range) if log else _from_zero(*_widened(*y_range, 0.05))), inner[1], 0, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in ticks(y.low, y.high, log):
        place = TOP + float(y.at(np.float64(value)))
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}h{inner[0]}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{place + 3.5:.1f}" text-anchor="end">{_label(value)}</text>'
        )
    for value in ticks(x.low, x.high, most=6):
        place = LEFT + float(x.at(np.float64(value)))
        parts.append(f'<path class="grid" d="M{place:.1f} {TOP + inner[1]}v4"/>')
        parts.append(f'<text class="tick" x="{place:.1f}" y="{TOP + inner[1] + 15}" {MIDDLE}>{_label(value)}</text>')
    parts.append(f'<text class="tick" x="{LEFT + inner[0]}" y="{HEIGHT - 4}" {END}>step</text>')
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{inner[0]}" height="{inner[1]}"/>')
    # A nested svg cuts off what leaves the plot.
    parts.append(f'<svg x="{LEFT}" y="{TOP}" width="{inner[0]}" height="{inner[1]}">')
    parts += [_draw(curve, x, y) for curve in curves]
    return "".join([*parts, "</svg></svg>"])


def legend(labels: list[str], styles: list[int]) -> str:
    """The labels, each behind a piece of its curve, as a list."""
    swatch = '<svg class="swatch" viewBox="0 0 24 10"><path class="{}" d="M1 5h22"/></svg>'
    items = [
        f"<li>{swatch.format(_classes(style))}{escape(label)}</li>" for label, style in zip(labels, styles, strict=True)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def ticks(low: float, high: float, log: bool = False, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as `most`: 1, 2 or 5 times a power of ten, or powers of ten."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, math.ceil((last - first) / most))
        factors = (1,) if last - first > 3 else (1, 3) if last - first > 2 else (1, 2, 5)
        found = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
        found = [value for value in found if low <= value <= high]
        return found if len(found) > 1 else ticks(low, high, most=most)
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [0.0 if n == 0 else n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """A little more on both sides, and more than nothing between them."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-90):
        extra = abs(high) * 0.1 or 1.0
        return low - extra, high + extra
    return low - share * (high - low), high + share * (high - low)


def _from_zero(low: float, high: float) -> tuple[float, float]:
    """What is nearly as large as it is far from 0 starts at 0, and nothing positive gets a negative axis."""
    return (0.0, high) if low <= 0.5 * high and low > -0.1 * high else (low, high)


def _log_widened(low: float, high: float) -> tuple[float, float]:
    return (low / 2, high * 2) if high < 1.5 * low else (low / 1.15, high * 1.15)


def _label(value: float) -> str:
    """A number in few characters: 0.05, 250, 12k, 1e-05."""
    if abs(value) >= 1000:
        thousands = f"{value / 1000:.6g}k"
        return thousands if len(thousands) < 6 else f"{value:.2g}"
    return f"{value:.4g}"


def _classes(style: int) -> str:
    dash = style // COLOURS % DASHES
    return f"s{style % COLOURS}" + (f" d{dash}" if dash else "")


def _draw(curve: Curve, x: _Axis, y: _Axis) -> str:
    values = np.where(drawable(curve.values, y.log), curve.values, np.nan)
    steps, means, low, high = thin(curve.steps, values)
    across, (line, bottom, top) = x.at(steps), (y.at(column) for column in (means, low, high))
    parts = [f"<g><title>{escape(curve.label)}</title>"]
    shown = ~np.isnan(line)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shown, [False]])))
    for first, end in edges.reshape(-1, 2):  # stretches without a gap
        if means is not low:
            outline = [*zip(across[first:end], top[first:end], strict=True)]
            outline += [*zip(across[first:end], bottom[first:end], strict=True)][::-1]
            parts.append(f'<path class="band {_classes(curve.style)}" d="{_path(outline)}Z"/>')
        stretch = [*zip(across[first:end], line[first:end], strict=True)]
        parts.append(f'<path class="{_classes(curve.style)}" d="{_path(stretch)}{"h0" if len(stretch) == 1 else ""}"/>')
    if np.ptp(across) >= FEWEST_UNITS * (len(steps) - 1):
        for place, level, step, value in zip(across[shown], line[shown], steps[shown], means[shown], strict=True):
            title = f"<title>{escape(curve.label)}: {value:.5g} at step {step:.0f}</title>"
            dot = f'class="dot s{curve.style % COLOURS}" cx="{place:.1f}" cy="{level:.1f}" r="2.5"'
            parts.append(f"<circle {dot}>{title}</circle>")
    return "".join([*parts, "</g>"])


def _path(points: list[tuple[float, float]]) -> str:
    """An SVG path in tenths; what lies far outside the plot stays just outside."""
    return "M" + "L".join(f"{x:.1f} {min(max(y, -HEIGHT), 2 * HEIGHT):.1f}" for x, y in points)
