"""`python -m benchmarks.report`: the README's and docs/benchmarks.md's tables, from benchmarks/results/*.json alone."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"


def tables(document: dict[str, Any]) -> str:
    """Every subject of one results file as Markdown."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version[0].isdigit())
    parts = [f"Measured on {machine['device']} ({machine['cpu_capability']}), {versions}."]
    for subject in document["subjects"]:
        config = ", ".join(f"{key} {value}" for key, value in subject["config"].items())
        extras = sorted({key for row in subject["rows"] for key in row["extra"]})
        header = ["", "median ms", "spread", "× fastest", *extras]
        lines = [f"**{subject['name']}** ({config})", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
        medians = [statistics.median(row["seconds"]) for row in subject["rows"] if row["seconds"]]
        lines += [_line(_cells(row, min(medians), extras)) for row in subject["rows"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any], fastest: float, extras: list[str]) -> list[str]:
    extra = [f"{value:,}" if isinstance(value, int | float) else str(value) for value in map(row["extra"].get, extras)]
    extra = ["" if value == "None" else value for value in extra]
    if not row["seconds"]:
        return [f"{row['name']} ({row['note']})" if row["note"] else row["name"], "not measured", "", "", *extra]
    median = statistics.median(row["seconds"])
    spread = (max(row["seconds"]) - min(row["seconds"])) / median
    return [row["name"], f"{1000 * median:.2f}", f"{100 * spread:.0f}%", f"{median / fastest:.2f}", *extra]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Write docs/benchmarks.md, and the newest CPU and GPU tables between the README's markers."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        print(
            f"no results in {RESULTS.relative_to(ROOT)}; measure first: pytest benchmarks/ --benchmark", file=sys.stderr
        )
        return 1
    documents = [json.loads(file.read_text()) for file in files]
    body = "\n\n".join(f"## {file.stem}\n\n{tables(document)}" for file, document in zip(files, documents, strict=True))
    title = "# Benchmarks\n\nWritten by `python -m benchmarks.report` from `benchmarks/results/`; do not edit."
    (ROOT / "docs" / "benchmarks.md").write_text(f"{title}\n\n{body}\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    readme.write_text(f"{head}{BEGIN}\n{tables(documents[-1])}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
