"""The two short tables for a machine: whole steps, and kernels."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.subjects import kind, paired_ratio
from benchmarks.tables import markdown

STEPS = ("training step", "end to end under ZeRO-2", "training step under DeepSpeed ZeRO-2")
"""Groups whose subjects are whole steps."""
KERNELS = (
    "rotary",
    "layer_norm",
    "rms_norm",
    "bias_gelu",
    "gated_activation",
    "attention",
    "linear_cross_entropy",
    "adam",
    "parallel_block",
)
DTYPES = ("fp32", "bf16", "fp16")


def tables(document: dict[str, Any]) -> str:
    """Markdown tables of the subjects in `STEPS` and `KERNELS` that a results file has."""
    subjects = document["subjects"]
    return "\n\n".join(table for table in (_steps(subjects), _kernels(subjects)) if table)


def _steps(subjects: list[dict[str, Any]]) -> str:
    """One line per subject: this project's ms per step, and every other row's time as a multiple of it."""
    body = []
    for subject in subjects:
        own = _ours(subject)
        if subject["name"].split(",")[0] not in STEPS or own is None:
            continue
        others = [row for row in subject["rows"] if row["seconds"] and row is not own]
        ratios = "; ".join(f"{row['name']} {paired_ratio(row['seconds'], own['seconds']):.2f}×" for row in others)
        body.append([subject["name"], _ms(own), f"{own['extra'].get('tokens/s', 0):,}", ratios])
    return markdown(["", "phi_fast ms", "tokens/s", "times of the others"], body) if body else ""


def _kernels(subjects: list[dict[str, Any]]) -> str:
    """One line per kernel and shape, one column per dtype: ms, the fastest peer's multiple of it, share of the
    bound."""
    lines: dict[str, dict[str, list[str]]] = {}
    for subject in subjects:
        parts = subject["name"].split(", ")
        dtype = next((part for part in parts if part in DTYPES), None)
        if parts[0] not in KERNELS or dtype is None:
            continue
        at = parts.index(dtype)
        cell = " ".join(filter(None, (", ".join(parts[at + 1 :]), _cell(subject))))
        lines.setdefault(", ".join(parts[:at]), {}).setdefault(dtype, []).append(cell)
    columns = [dtype for dtype in DTYPES if any(dtype in line for line in lines.values())]
    body = [[name, *("<br>".join(line.get(dtype, [])) for dtype in columns)] for name, line in lines.items()]
    legend = "Each cell has the kernel's ms, the fastest peer's time as a multiple of it, and the share of the bound."
    return f"{legend}\n\n{markdown(['', *columns], body)}" if body else ""


def _cell(subject: dict[str, Any]) -> str:
    own = _ours(subject)
    if own is None:
        return "not measured"
    peers = [row for row in subject["rows"] if row["seconds"] and kind(row["name"]) == "peer"]
    parts = [f"{_ms(own)} ms"]
    if peers:
        best = min(peers, key=lambda row: statistics.median(row["seconds"]))
        parts.append(f"{best['name']} {paired_ratio(best['seconds'], own['seconds']):.2f}×")
    if own.get("of_bound"):
        parts.append(f"{100 * own['of_bound']:.0f}%")
    return ", ".join(parts)


def _ours(subject: dict[str, Any]) -> dict[str, Any] | None:
    """The first row of this project that was measured."""
    return next((row for row in subject["rows"] if kind(row["name"]) == "ours" and row["seconds"]), None)


def _ms(row: dict[str, Any]) -> str:
    return f"{1000 * statistics.median(row['seconds']):.1f}"
