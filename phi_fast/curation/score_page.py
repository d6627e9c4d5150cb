"""A page about one score: its histogram, and documents on both sides of a threshold; the page fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ..terminal import printable
from .score_samples import EXCERPT, Sample, Scores

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_BINS = 60
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 960, 300, 70, 40, 14
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7d; --line: #dfe4ea; --page: #f6f7f9; --card: #fff;
  --below: #d1602b; --above: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #97a3b4; --line: #2c3440; --page: #12161c;
  --card: #1a2029; --below: #ff9a62; --above: #6ea8ff; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
p { margin: .3rem 0; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin-top: 1rem; min-width: 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
.sides section { margin-top: 1rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 13px; } .grid { stroke: var(--line); } .mark { stroke: var(--ink); }
.below { fill: var(--below); } .above { fill: var(--above); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
details { border-top: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; font: 13px/1.5 ui-monospace, monospace; }
.none { font-style: italic; }
@media (max-width: 600px) { svg text { font-size: 22px; } body { padding: 1rem .7rem; } }
"""


def page(scores: Scores, source: str) -> str:
    """Write the HTML document. source: what the documents were read from."""
    title = escape(f"{printable(scores.name)} at least {scores.at_least:g}")
    total = len(scores.values)
    kept = int((scores.values >= np.float32(scores.at_least)).sum())
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>phi_fast: {title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1><p>{escape(printable(source))}</p>",
        '<section id="histogram"><h2>Documents by score</h2>',
        _histogram(scores),
        _figures(scores, total, kept),
        "</section>",
        '<div class="sides">',
        _samples("nearest-below", "Dropped, nearest to the threshold", scores.nearest_below[::-1]),
        _samples("nearest-above", "Kept, nearest to the threshold", scores.nearest_above),
        _samples("any-below", "Dropped, at random", scores.any_below),
        _samples("any-above", "Kept, at random", scores.any_above),
        "</div></body></html>",
    ]
    return "\n".join(parts)


def _figures(scores: Scores, total: int, kept: int) -> str:
    rows = [("documents", f"{total:,}"), ("kept", f"{kept:,} ({_share(kept, total)})")]
    rows.append(("dropped", f"{total - kept:,} ({_share(total - kept, total)})"))
    rows.append(("without this score, dropped, too", f"{scores.missing:,}"))
    if total:
        quantiles = np.quantile(scores.values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        rows.append(("0, 5, 25, 50, 75, 95, 100%", ", ".join(f"{value:.3g}" for value in quantiles)))
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none"


def edges(scores: Scores) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Choose bins of one width, of which the threshold is a border: (bins + 1,) float64."""
    low, high = (float(scores.values.min()), float(scores.values.max())) if len(scores.values) else (0.0, 1.0)
    low, high = min(low, scores.at_least), max(high, scores.at_least)
    width = max((high - low) / _BINS, 1e-9 * max(abs(low), abs(high), 1))
    first = scores.at_least - width * np.ceil((scores.at_least - low) / width - 1e-9)
    return first + width * np.arange(int((high - first) / width + 1e-9) + 2)


def _histogram(scores: Scores) -> str:
    bounds = edges(scores)
    counts, _ = np.histogram(scores.values.astype(np.float64), bounds)
    highest = max(int(counts.max()), 1)
    inner, base = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM
    scale = inner / (bounds[-1] - bounds[0])

    def x(value: float) -> float:
        return _LEFT + (value - float(bounds[0])) * scale

    def y(count: float) -> float:
        return base - (base - _TOP) * count / highest

    parts = []
    for tick in range(5):
        count = highest * tick / 4
        parts.append(f'<path class="grid" d="M{_LEFT} {y(count):.1f}H{_WIDTH - 10}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(count) + 4:.1f}" text-anchor="end">{count:,.4g}</text>')
    for low, high, count in zip(bounds, bounds[1:], counts.tolist(), strict=False):
        side = "above" if (low + high) / 2 >= scores.at_least else "below"
        wide = max((high - low) * scale - 1, 0.5)
        parts.append(
            f'<rect class="{side}" x="{x(low) + 0.5:.1f}" y="{y(count):.1f}" width="{wide:.1f}" '
            f'height="{base - y(count):.1f}"><title>{low:.3g} to {high:.3g}: {count:,}</title></rect>'
        )
    for value in np.linspace(bounds[0], bounds[-1], 7):
        parts.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{value:.3g}</text>')
    at = x(scores.at_least)
    parts.append(f'<path class="mark" d="M{at:.1f} {_TOP}V{base + 6}"/>')
    label = f"histogram of {escape(printable(scores.name), quote=True)}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _samples(anchor: str, title: str, samples: Sequence[Sample]) -> str:
    parts = []
    for sample in samples:
        more = f"\n… {sample.characters - EXCERPT:,} more characters" if sample.characters > EXCERPT else ""
        parts.append(
            f"<details><summary>{sample.score:.3f} · {escape(printable(sample.id))}</summary>"
            f"<pre>{escape(printable(sample.excerpt) + more)}</pre></details>"
        )
    body = "".join(parts) or '<p class="none">none</p>'
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>'
