"""A subject as a table in the terminal, and as Markdown from the JSON, with the same columns."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.subjects import Subject, kind, paired_ratio, spread

COLUMNS = ("median ms", "spread", "× phi_fast", "of bound")
"""× phi_fast is the time as a multiple of this project's first row, and of bound is `Row.of_bound`."""


def cells(subject: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, a list of cells for each row) of a subject in the JSON's form."""
    rows = subject["rows"]
    extras = list(dict.fromkeys(key for row in rows for key in row["extra"]))
    bounded = any(row.get("of_bound") for row in rows)
    header = ["", *(c for c in COLUMNS if bounded or c != "of bound"), *extras, "note"]
    ours = [row["seconds"] for row in rows if kind(row["name"]) == "ours" and row["seconds"]]
    base = ours[0] if ours else None
    body = [[row["name"], *_figures(row, base, bounded), *_extras(row, extras), row["note"]] for row in rows]
    if not any(line[-1] for line in body):
        header, body = header[:-1], [line[:-1] for line in body]
    return header, body


def _figures(row: dict[str, Any], base: list[float] | None, bounded: bool) -> list[str]:
    if not row["seconds"]:
        return ["not measured", "", "", *([""] if bounded else [])]
    median = statistics.median(row["seconds"])
    share = row.get("of_bound")
    return [
        f"{1000 * median:.2f}",
        f"{100 * spread(row['seconds']):.0f}%",
        f"{paired_ratio(row['seconds'], base):.2f}" if base else "",
        *([f"{100 * share:.0f}%" if share else ""] if bounded else []),
    ]


def _extras(row: dict[str, Any], names: list[str]) -> list[str]:
    values = [row["extra"].get(name) for name in names]
    return ["" if v is None else f"{v:,}" if isinstance(v, int | float) else str(v) for v in values]


def markdown(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table with text aligned left and figures aligned right."""
    texts = [all(not line[i][:1].isdigit() for line in body) for i in range(len(header))]
    rule = ["---" if text else "---:" for text in texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def describe(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())


def show(subject: Subject, console: Console) -> None:
    """Print the subject as a table."""
    header, body = cells(asdict(subject))
    table = Table(title=f"{subject.name}: {describe(subject.config)}")
    for title in header:
        table.add_column(title, justify="left" if title in ("", "note") else "right", max_width=60)
    for line in body:
        table.add_row(*line)
    console.print(table)
