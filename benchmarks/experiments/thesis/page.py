"""Writes the results into docs/textbooks.md: tables and two figures, between two marks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi_fast.errors import UsageError
from phi_fast.files import write_atomically

from .comparison import Difference, Runs, difference, held_out, of_kind, verdicts
from .corpora import ARMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "textbooks.md"
RESULTS = ROOT / "benchmarks" / "results" / "textbooks.jsonl"
BEGIN = "<!-- results: written by python -m benchmarks.experiments.textbooks -->"
END = "<!-- end of results -->"
COLORS = {"raw": "#9a9a9a", "filtered": "#a9c8e8", "books": "#1f5fa8"}


def write(path: Path, runs: Runs, summary: dict[str, Any]) -> None:
    """Write the results between the marks of `path`, or a page of only these, and the figures into plots/ beside it.

    Raises UsageError if the page has no marks, or two arms have fewer than two seeds in common.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{path} has not one line {BEGIN!r} and one {END!r}, between which the results go: add them")
    try:
        made = results(runs, summary)
    except ValueError as error:
        raise UsageError(f"the results are not complete: {error}; run all seeds of every arm") from None
    folder = path.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    draw(runs, folder)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_atomically(path, f"{before}{BEGIN}\n{made}\n{END}{after}".encode())


def results(runs: Runs, summary: dict[str, Any]) -> str:
    """Make the Markdown of the results. Raises ValueError for fewer than two seeds."""
    machine, seeds = runs[0]["machine"], sorted({run["seed"] for run in runs})
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "numpy", "tokenizers"))
    seconds = sum(_seconds(run) for run in runs)
    parts = [
        f"Measured on {max(run['date'] for run in runs)}, commit {runs[0]['commit']}, on {machine['device']} "
        f"({machine['isa']}), {versions}: {len(runs)} runs, {len(seeds)} seeds per corpus, "
        f"{runs[0]['plan']['tokens']:,} tokens each; {seconds / 60:.0f} minutes of training and judging.",
        _hypotheses(runs),
        "![Bits per byte of each kind of held-out text, less those of the raw corpus](plots/textbooks-held-out.png)",
        _by_kind(runs),
        "![Bits per byte of each corpus's own text](plots/textbooks-own.png)",
        _own(runs),
        _exercises(runs),
        _corpora(summary),
    ]
    return "\n\n".join(parts)


def _seconds(run: dict[str, Any]) -> float:
    steps = run["plan"]["tokens"] // 2048
    return float(steps * run["step_ms"] / 1000 + run["judging_seconds"])


def _interval(found: Difference) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _hypotheses(runs: Runs) -> str:
    lines = [
        "| hypothesis | difference in bits per byte, 95% t interval | bootstrap | p | kinds better | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for v in verdicts(runs):
        low, high = v.difference.bootstrap
        lines.append(
            f"| {v.name}: {v.first} − {v.second} | {_interval(v.difference)} | [{low:+.4f}, {high:+.4f}] | {v.p:.2g} | "
            f"{v.better} of {v.kinds} | {v.outcome} |"
        )
    return "\n".join(lines)


def _means(runs: Runs, group: str, name: str) -> dict[str, str]:
    cells = {}
    for arm in ARMS:
        values = [run[group][name] for run in runs if run["arm"] == arm]
        cells[arm] = f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
    return cells


def _by_kind(runs: Runs) -> str:
    lines = [
        "Bits per byte, mean and standard deviation over seeds, and differences with their 95% t intervals:",
        "",
        f"| held-out text | {' | '.join(ARMS)} | filtered − raw | books − raw |",
        f"|---|{'---|' * (len(ARMS) + 2)}",
    ]
    for kind in runs[0]["held_out"]:
        cells = _means(runs, "held_out", kind)
        pairs = [difference(runs, first, "raw", of_kind(kind)) for first in ("filtered", "books")]
        lines.append(f"| {kind} | {' | '.join(cells.values())} | {' | '.join(map(_interval, pairs))} |")
    means = {arm: statistics.fmean(held_out(run) for run in runs if run["arm"] == arm) for arm in ARMS}
    pairs = [difference(runs, first, "raw") for first in ("filtered", "books")]
    shown = " | ".join(f"**{mean:.4f}**" for mean in means.values())
    lines.append(f"| **mean of the kinds** | {shown} | {' | '.join(map(_interval, pairs))} |")
    return "\n".join(lines)


def _own(runs: Runs) -> str:
    lines = [
        "Bits per byte of each corpus's own kind of text (documents set aside before training):",
        "",
        f"| trained on | {' | '.join(f'text of {name}' for name in runs[0]['own'])} |",
        f"|---|{'---|' * len(runs[0]['own'])}",
    ]
    for arm in ARMS:
        cells = [_means(runs, "own", name)[arm] for name in runs[0]["own"]]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _exercises(runs: Runs) -> str:
    lines = [
        "Exercises: programs that passed their tests, exercises with such a program (of each seed), and the bits per "
        "byte of the reference solutions after their prompts:",
        "",
        "| trained on | programs passed | exercises solved | solutions, bits per byte | difference from raw |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        found = [run["exercises"] for run in runs if run["arm"] == arm]
        passed, programs = (sum(each[name] for each in found) for name in ("passed", "programs"))
        solved = ", ".join(str(each["solved"]) for each in found)
        bits = [each["bits_per_byte"] for each in found]
        compared = "–"
        if arm != "raw":
            compared = _interval(difference(runs, arm, "raw", lambda run: run["exercises"]["bits_per_byte"]))
        shown = f"{statistics.fmean(bits):.4f} ± {statistics.stdev(bits):.4f}"
        lines.append(f"| {arm} | {passed} of {programs} | {solved} | {shown} | {compared} |")
    return "\n".join(lines)


def _corpora(summary: dict[str, Any]) -> str:
    lines = [
        "The corpora, after removing documents that share 13 words in a row with a held-out text:",
        "",
        "| corpus | found | contaminated | used | tokens |",
        "|---|---|---|---|---|",
    ]
    for name, facts in summary["arms"].items():
        found = facts["available"]
        lines.append(
            f"| {name} | {found['documents']:,} documents, {found['bytes'] / 1e6:.1f} MB | {facts['contaminated']:,} | "
            f"{facts['documents']:,} documents, {facts['bytes'] / 1e6:.1f} MB | {facts['tokens']:,} |"
        )
    dropped = summary["filters"]["dropped"]
    total = summary["arms"]["raw"]["available"]
    lines += ["", "What the filters dropped of the raw text:", "", "| reason | documents | bytes |", "|---|---|---|"]
    for reason, count in dropped.items():
        share = count["bytes"] / total["bytes"]
        lines.append(f"| {reason} | {count['documents']:,} | {count['bytes']:,} ({share:.1%}) |")
    share = summary["filters"]["accuracy"]
    lines += ["", f"The classifier puts {share:.1%} of its labelled documents into their class, out of bag."]
    return "\n".join(lines)


def draw(runs: Runs, folder: Path) -> Sequence[Path]:
    """Write the two figures as PNG files without a date."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for name, panel in (("held-out", _draw_held_out), ("own", _draw_own)):
        figure = Figure(figsize=(8.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        panel(figure.add_subplot(), runs)
        paths.append(folder / f"textbooks-{name}.png")
        figure.savefig(paths[-1], dpi=100, metadata={"Software": None})
    return paths


def _draw_held_out(axes: Axes, runs: Runs) -> None:
    kinds = [*runs[0]["held_out"], "mean of the kinds"]
    for offset, arm in ((-0.17, "filtered"), (0.17, "books")):
        for row, kind in enumerate(kinds):
            found = (
                difference(runs, arm, "raw", of_kind(kind))
                if kind in runs[0]["held_out"]
                else difference(runs, arm, "raw")
            )
            label = f"{arm} − raw" if row == 0 else None
            error = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(found.mean, row + offset, xerr=error, fmt="o", color=COLORS[arm], capsize=3, label=label)
            axes.plot(found.values, [row + offset] * len(found.values), "|", color="black", markersize=5)
    axes.axvline(0, color=COLORS["raw"], linewidth=1)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte less than (left) or more than (right) the raw corpus; 95% t interval, ticks: seeds")
    axes.legend(frameon=False)


def _draw_own(axes: Axes, runs: Runs) -> None:
    names = list(runs[0]["own"])
    width = 0.8 / len(ARMS)
    for at, arm in enumerate(ARMS):
        values = [[run["own"][name] for run in runs if run["arm"] == arm] for name in names]
        places = [row + (at - 1) * width for row in range(len(names))]
        means, spreads = [statistics.fmean(v) for v in values], [statistics.stdev(v) for v in values]
        axes.bar(places, means, width, yerr=spreads, color=COLORS[arm], capsize=3, label=f"trained on {arm}")
    axes.set_xticks(range(len(names)), [f"text of {name}" for name in names])
    axes.set_ylabel("bits per byte; line: standard deviation over seeds")
    axes.legend(frameon=False)
