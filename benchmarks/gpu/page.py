"""docs/gpu-DEVICE.md from a day's JSON: every figure is the file's, and what it lacks is "not measured"."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.day import NOT_MEASURED, RUNNING
from benchmarks.tables import cells, describe, markdown

STATES = {RUNNING: "cut short with the whole run: what it had measured is kept"}
"""What a reader is told in place of a state."""


def page(document: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    machine = document["machine"]
    parts = [
        f"# {machine['device']}"
        + (" (a dry run at toy sizes: no figure here means anything)" if document["dry"] else ""),
        "Written by `make gpu` from the JSON of the run; do not edit. [How to read it](gpu.md).",
        _facts(document),
        _overview(document["stages"]),
    ]
    if comparison := predictions(document):
        parts += ["## Measured ÷ predicted", _predicted(comparison)]
    for stage in document["stages"].values():
        parts += [f"## {stage['title']}", _state(stage)]
        for name, value in stage["results"].items():
            parts.append(_result(name, value))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(document: dict[str, Any]) -> str:
    machine = document["machine"]
    facts = {"Began": document["began"], "Commit": document["commit"], "Budget": f"{document['budget_s']:g} s"}
    facts |= {key: value for key, value in machine.items() if key not in ("device", "versions", "gpu")}
    facts |= machine.get("gpu") or {}
    versions = (f"{name} {version}" for name, version in machine["versions"].items() if version[:1].isdigit())
    return "\n".join(
        [*(f"- {key}: {_cell(value)}" for key, value in facts.items()), f"- versions: {', '.join(versions)}"]
    )


def _overview(stages: dict[str, Any]) -> str:
    body = [
        [f"{number}. {stage['title']}", stage["state"], "" if stage["seconds"] is None else f"{stage['seconds']:.0f}"]
        for number, stage in enumerate(stages.values(), 1)
    ]
    return markdown(["stage", "state", "seconds"], body)


def _state(stage: dict[str, Any]) -> str:
    reason = STATES.get(stage["state"], stage["reason"])
    return f"{stage['state'].capitalize()}" + (f": {reason}" if reason else ".")


def _result(name: str, value: Any) -> str:
    """One result: a subject of the benchmarks as their table, a list of objects as a table, an object as a list."""
    if isinstance(value, dict) and "rows" in value:
        return f"**{value['name']}** ({describe(value['config'])})\n\n{markdown(*cells(value))}"
    if isinstance(value, dict) and isinstance(value.get("tiles"), list):
        return _table_of_tiles(name, value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        header = list(dict.fromkeys(key for row in value for key in row))
        body = [[_cell(row.get(key)) for key in header] for row in value]
        return f"**{name}**\n\n{markdown(header, body)}"
    if isinstance(value, dict):
        return "\n".join([f"**{name}**", "", *(f"- {key}: {_cell(item)}" for key, item in value.items())])
    return f"- {name}: {_cell(value)}"


def _table_of_tiles(name: str, table: dict[str, Any]) -> str:
    """What `phi_fast.kernels.tune` measured: a row per kernel and case; and attention's back ends."""
    rows = [
        [
            entry["kernel"],
            _fields(entry["case"]),
            _fields(entry["tile"]),
            _cell(entry["milliseconds"]),
            _cell(entry["by_hand_milliseconds"]),
            f"{entry['by_hand_milliseconds'] / entry['milliseconds']:.2f}×",
            _cell(entry["timed"]),
        ]
        for entry in table["tiles"]
    ]
    parts = [f"**{name}**", markdown(["kernel", "case", "tile", "ms", "by hand, ms", "gain", "tiles timed"], rows)]
    for entry in table.get("backends", []):
        chosen = ", ".join(f"{backend} {_cell(ms)}" for backend, ms in entry["milliseconds"].items())
        parts.append(f"- {entry['op']}, {_fields(entry['case'])}, ms: {chosen}")
    return "\n\n".join(parts)


def _fields(given: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in given.items() if value != "")


def _cell(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def predictions(document: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(name, milliseconds predicted, milliseconds measured or None) of everything that was predicted."""
    measured = milliseconds(document)
    return [(name, expected, measured.get(name)) for name, expected in (document.get("predicted") or {}).items()]


def milliseconds(document: dict[str, Any]) -> dict[str, float]:
    """What can be held against a prediction: the median of this project's first row of every subject, by the subject's
    name, and the kernels of the profile as "profile, NAME"."""
    found: dict[str, float] = {}
    for stage in document["stages"].values():
        for name, value in stage["results"].items():
            if isinstance(value, dict) and "rows" in value:
                own = next((r for r in value["rows"] if r["name"].startswith("phi_fast") and r["seconds"]), None)
                found |= {value["name"]: 1000 * statistics.median(own["seconds"])} if own else {}
            elif name == "profile" and isinstance(value, list):
                found |= {f"profile, {row['kernel']}": row["ms"] for row in value if row.get("ms") is not None}
    return found


def _predicted(comparison: list[tuple[str, float, float | None]]) -> str:
    body = [
        [name, f"{expected:.4g}", _cell(actual), NOT_MEASURED if actual is None else f"{actual / expected:.2f}"]
        for name, expected, actual in comparison
    ]
    errors = [abs(actual / expected - 1) for _, expected, actual in comparison if actual is not None]
    mean = f"{statistics.mean(errors):.0%} over {len(errors)}" if errors else NOT_MEASURED
    table = markdown(["", "predicted ms", "measured ms", "measured ÷ predicted"], body)
    return f"{table}\n\nMean error, |measured ÷ predicted − 1|: {mean}."
