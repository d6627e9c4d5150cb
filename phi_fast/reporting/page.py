"""The report as one HTML file with inline styles, curves and a short script; the page fetches nothing."""

from __future__ import annotations

import re
from html import escape

from .curves import chart
from .mixture import Draw, draws
from .read import RunData
from .summary import Chart, charts, differences, figures

# The policy forbids every request, so that the page depends on this file alone.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7d; --line: #dfe4ea; --page: #f6f7f9; --card: #fff;
  --c0: #2563c9; --c1: #d1602b; --c2: #1f8a5b; --c3: #9a3fb5; --c4: #b58900; --c5: #c2315a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #97a3b4; --line: #2c3440; --page: #12161c;
  --card: #1a2029; --c0: #6ea8ff; --c1: #ff9a62; --c2: #5fd39b; --c3: #d08cf0; --c4: #e6c455; --c5: #ff7d9d; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
p { margin: .3rem 0; color: var(--soft); }
.grid-of-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin-top: 1rem; min-width: 0; overflow-x: auto; }
.grid-of-cards section { margin: 0; } .grid-of-cards { margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } tr:last-child > * { border-bottom: 0; } td { overflow-wrap: break-word; }
#differences td, #configurations td { overflow-wrap: anywhere; }
svg.chart { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 13px; }
.grid { stroke: var(--line); } .cursor { stroke: var(--soft); stroke-dasharray: 2 3; }
.series { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .series circle { stroke: none; }
.s1 { stroke-dasharray: 6 3; } .s2 { stroke-dasharray: 2 3; } .s3 { stroke-dasharray: 8 3 2 3; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .85rem; color: var(--soft); }
.legend svg { width: 22px; height: 8px; vertical-align: middle; margin-right: .35rem; }
.legend output { color: var(--ink); font-variant-numeric: tabular-nums; margin-left: .35rem; }
.raw { opacity: .35; stroke-width: 1; } .smooth { stroke-width: 2; }
.bar { position: relative; height: 12px; background: var(--line); border-radius: 6px; min-width: 6rem; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 6px; }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; font: 13px/1.5 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--soft); } .none { font-style: italic; }
@media (max-width: 600px) { svg.chart text { font-size: 22px; } body { padding: 1rem .7rem; }
  #mixture thead { display: none; } #mixture tr { display: block; padding: .4rem 0; }
  #mixture td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  #mixture td::before { content: attr(data-label); color: var(--soft); } #mixture .bar { width: 100%; } }
"""
_STYLE += "".join(
    f".c{i} {{ stroke: var(--c{i}); }} .c{i} circle {{ fill: var(--c{i}); }} .b{i} {{ background: var(--c{i}); }}\n"
    for i in range(6)
)

# Shows the values under the pointer in the legends. The curves themselves need no script.
_SCRIPT = """
const list = (text) => text.split(",").map((word) => (word === "" ? NaN : Number(word)));
let curves = 0;
for (const svg of document.querySelectorAll("svg.chart")) {
  const series = [...svg.querySelectorAll("g.series")].map((g) => ({ steps: list(g.dataset.steps),
    values: list(g.dataset.values) }));
  const outputs = [...svg.closest("section").querySelectorAll(".legend output")];
  const cursor = svg.querySelector(".cursor"), d = svg.dataset;
  curves += series.length;
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, 0).matrixTransform(svg.getScreenCTM().inverse()).x;
    const share = Math.min(1, Math.max(0, (x - d.left) / (d.right - d.left)));
    const step = Number(d.first) + share * (d.last - d.first);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
    series.forEach(({ steps, values }, i) => {
      let at = 0;
      steps.forEach((s, j) => { if (Math.abs(s - step) < Math.abs(steps[at] - step)) at = j; });
      outputs[i].textContent = Number.isNaN(values[at]) ? "–" : `${values[at].toPrecision(5)} at ${steps[at]}`;
    });
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    outputs.forEach((output) => { output.textContent = ""; });
  });
}
document.documentElement.dataset.curves = curves;
"""


def page(runs: list[RunData]) -> str:
    """Write the HTML document."""
    title = escape(", ".join(run.name for run in runs))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>phi_fast: {title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1><p>phi_fast, from metrics.jsonl, config.json and the TensorBoard events</p>",
        _overview(runs),
        '<div class="grid-of-cards">',
        *(_chart(one) for one in charts(runs)),
        "</div>",
        _mixture(runs),
        _differences(runs),
        _samples(runs),
        _configs(runs),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _overview(runs: list[RunData]) -> str:
    summaries = [figures(run) for run in runs]
    head = ["", *(_key(i, 0) + escape(run.name) for i, run in enumerate(runs))]
    rows = [[escape(name), *(escape(summary[name]) for summary in summaries)] for name in summaries[0]]
    return f'<section id="overview">{_table(head, rows)}</section>'


def _chart(one: Chart) -> str:
    named = [series for series in one.series if any(value is not None for value in series.curve[1])]
    legend = "".join(
        f"<span>{_key(series.color, series.style)}{escape(series.label)}<output></output></span>" for series in named
    )
    return (
        f'<section id="chart-{one.metric}"><h2>{escape(one.title)}</h2>{chart(one.metric, named, log=one.log)}'
        f'<div class="legend">{legend}</div></section>'
    )


def _mixture(runs: list[RunData]) -> str:
    rows = [_draw(i, run, draw) for i, run in enumerate(runs) for draw in draws(run)]
    if not rows:
        return ""
    head = ["run", "corpus", "intended", "drawn", "", "rows drawn", "largest deviation after any step"]
    note = (
        "A run does not record its draws: rows are counted with the loader's own assignment, which depends on the "
        "mixture alone. The bar shows the drawn share, and the mark the intended share."
    )
    return f'<section id="mixture"><h2>Mixture, drawn against intended</h2>{_table(head, rows)}<p>{note}</p></section>'


def _draw(index: int, run: RunData, draw: Draw) -> list[str]:
    bar = (
        f'<div class="bar" data-run="{escape(run.name, quote=True)}" data-corpus="{escape(draw.corpus, quote=True)}" '
        f'data-intended="{draw.intended:.6f}" data-drawn="{draw.share:.6f}">'
        f'<i class="b{index % 6}" style="width:{100 * draw.share:.2f}%"></i>'
        f'<b style="left:{100 * draw.intended:.2f}%"></b></div>'
    )
    shares = [f"{100 * draw.intended:.2f}%", f"{100 * draw.share:.2f}%"]
    names = [f"<span>{_key(index, 0)}{escape(run.name)}</span>", escape(draw.corpus)]
    return [*names, *shares, bar, f"{draw.drawn:,} of {draw.rows:,}", f"{draw.worst:.2f} rows"]


def _differences(runs: list[RunData]) -> str:
    if len(runs) == 1:
        return ""
    rows = [[escape(key), *map(escape, values)] for key, values in differences(runs).items()]
    body = _table(["option", *(escape(run.name) for run in runs)], rows) if rows else "<p>none except the directory</p>"
    return f'<section id="differences"><h2>Configuration, where it differs</h2>{body}</section>'


def _samples(runs: list[RunData]) -> str:
    parts = []
    for i, run in enumerate(runs):
        for step, text in run.samples:
            parts.append(f"<p>{_key(i, 0)}{escape(run.name)}, step {step}</p><pre>{escape(text)}</pre>")
    body = "".join(parts) or '<p class="none">no run has sampled text</p>'
    return f'<section id="samples"><h2>Samples</h2>{body}</section>'


def _configs(runs: list[RunData]) -> str:
    parts = []
    for run in runs:
        rows = [[escape(key), escape(str(value))] for key, value in run.config.items()]
        parts.append(
            f"<details><summary>{escape(run.name)}: every option</summary>{_table(['option', 'value'], rows)}</details>"
        )
    return f'<section id="configurations">{"".join(parts)}</section>'


def _key(color: int, style: int) -> str:
    """Draw a short stroke in a run's color."""
    stroke = f'<path class="series c{color % 6} s{style % 4}" d="M0 4h20"/>'
    return f'<svg class="key" viewBox="0 0 22 8" width="22" height="8">{stroke}</svg> '


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Make a table from cells of HTML; each cell carries its column's title for narrow pages, which hide the head."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(map(_cell, head, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(title: str, cell: str) -> str:
    return f'<td data-label="{escape(re.sub("<.*?>", "", title), quote=True)}">{cell}</td>'
