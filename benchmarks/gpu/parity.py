"""Stage "parity": `phi_fast.verify`, one dtype after the other, the trainer's default first."""

from __future__ import annotations

from typing import Any, Literal

from benchmarks.gpu.runner import Session
from phi_fast import verify
from phi_fast.terminal import table_console

ORDER: tuple[Literal["fp16", "bf16", "fp32"], ...] = ("fp16", "bf16", "fp32")


class NotRight(Exception):
    """A kernel's result is not within its bounds."""


def check(session: Session) -> None:
    """Every verdict that is not "ok", and of each op and dtype the largest error beside plain PyTorch's.

    Raises NotRight where a verdict is "fail".
    """
    table: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for dtype in ORDER:
        options = verify.Options(dtypes=(dtype,))
        if session.dry:
            options = verify.Options(dtypes=(dtype,), ops=("rotary", "layer_norm"), device="cpu")
        report = verify.run(options, table_console())
        table += rows(report["verdicts"])
        session.put("error beside plain PyTorch's", table)
        failures += [{k: v[k] for k in ("op", "case", "dtype", "backend", "detail")} for v in failed(report)]
        session.put("failures", failures or "none")
    if failures:
        raise NotRight(f"{len(failures)} of {len(table)} verdicts failed")


def failed(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [verdict for verdict in report["verdicts"] if verdict["status"] == "fail"]


def rows(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per verdict that ran."""
    return [
        {
            "op": verdict["op"],
            "case": verdict["case"],
            "dtype": verdict["dtype"],
            "back end": verdict["backend"],
            "worst result": verdict["worst"],
            "error ÷ plain PyTorch's": verdict["errors"][verdict["worst"]]["ratio"] if verdict["worst"] else None,
            "": verdict["status"],
        }
        for verdict in verdicts
        if verdict["status"] != "not run"
    ]
