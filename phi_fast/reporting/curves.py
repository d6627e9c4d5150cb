"""Curves as inline SVG: each curve is a group with its steps and values as data attributes, readable in the DOM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from .read import Curve

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 88, 32, 12, 62
MOST = 1200
"""Most points drawn per curve; of a longer curve only the minimum and maximum of each interval are drawn."""
X_LABEL = "optimizer step"
SMOOTHING = 40
"""A smoothed curve averages over about (number of steps) ÷ SMOOTHING steps; a short curve is not smoothed."""


@dataclass(frozen=True)
class Series:
    """One curve of a chart."""

    label: str
    color: int
    """Index of the run; each run has its own color."""
    curve: Curve
    style: int = 0
    """Index of the dash pattern."""
    smooth: bool = False
    """Draw the curve faintly, and its moving average over it."""


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic (`log`) map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            if last > first:
                return [10.0**i for i in range(first, last + 1, max(1, (last - first) // 5))]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 6)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def chart(metric: str, series: list[Series], *, log: bool = False) -> str:
    """Draw an <svg> with a <g class="series"> per curve: data-metric, -label, -steps and -values (empty: no value)."""
    thinned = [(one, thin(one.curve)) for one in series]
    steps = [step for _, (at, _) in thinned for step in at]
    values = [value for _, (_, found) in thinned for value in found if value is not None and (value > 0 or not log)]
    if not values:
        return '<p class="none">not measured</p>'
    x = Scale(*_room(min(steps), max(steps), 0), LEFT, WIDTH - RIGHT)
    low, high = _room(min(values), max(values), 0.05)
    if log:
        low, high = min(values) / 1.2, max(values) * 1.2
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    body = "".join(_series(metric, one, curve, x, y) for one, curve in thinned)
    label = escape(f"{metric} over steps", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-left="{x.start}" data-right="{x.end}" data-first="{x.low}" data-last="{x.high}">'
        f'{_axes(x, y)}{body}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def thin(curve: Curve) -> Curve:
    """Thin a curve to about MOST points at most, and keep every extreme."""
    steps, values = curve
    if len(steps) <= MOST:
        return curve
    width = math.ceil(len(steps) / (MOST // 2))
    chosen: set[int] = {0, len(steps) - 1}
    for start in range(0, len(steps), width):
        there = [i for i in range(start, min(start + width, len(steps))) if values[i] is not None]
        if there:
            chosen |= {min(there, key=lambda i: values[i] or 0.0), max(there, key=lambda i: values[i] or 0.0)}
    order = sorted(chosen)
    return [steps[i] for i in order], [values[i] for i in order]


def smoothed(curve: Curve) -> Curve | None:
    """Compute the exponential moving average with bias correction; None if the curve is too short."""
    steps, values = curve
    if len(steps) < 2 * SMOOTHING:
        return None
    decay = 1 - SMOOTHING / len(steps)
    total = weight = 0.0
    averages: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        averages.append(None if value is None else total / weight)
    return steps, averages


def number(value: float) -> str:
    """Format a number briefly."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.3g}"


def _series(metric: str, one: Series, curve: Curve, x: Scale, y: Scale) -> str:
    steps, values = curve
    data = {
        "metric": metric,
        "label": one.label,
        "steps": ",".join(map(str, steps)),
        "values": ",".join("" if value is None else repr(value) for value in values),
    }
    attributes = " ".join(f'data-{key}="{escape(value, quote=True)}"' for key, value in data.items())
    lines = _lines(curve, x, y)
    average = smoothed(one.curve) if one.smooth else None
    if average is not None:
        lines = f'<g class="raw">{lines}</g><g class="smooth">{_lines(thin(average), x, y)}</g>'
    return f'<g class="series c{one.color % 6} s{one.style % 4}" {attributes}>{lines}</g>'


def _lines(curve: Curve, x: Scale, y: Scale) -> str:
    return "".join(_line(stretch, x, y) for stretch in _stretches(*curve, positive=y.log))


def _line(points: list[tuple[int, float]], x: Scale, y: Scale) -> str:
    if len(points) == 1:
        return f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="2.5"/>'
    return '<polyline points="' + " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points) + '"/>'


def _stretches(steps: list[int], values: list[float | None], *, positive: bool) -> list[list[tuple[int, float]]]:
    """Split a curve into stretches without gaps; a step without a value is a gap."""
    found: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is None or (positive and value <= 0):
            found.append([])
        else:
            found[-1].append((step, value))
    return [stretch for stretch in found if stretch]


def _axes(x: Scale, y: Scale) -> str:
    parts = []
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="0.32em" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 36}" text-anchor="middle">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{X_LABEL}</text>')
    return "".join(parts)


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    """Add a margin to a range, which is then never empty."""
    if low == high:
        return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return low - share * (high - low), high + share * (high - low)
