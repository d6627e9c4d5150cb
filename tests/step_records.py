"""A StepRecord for tests."""

from __future__ import annotations

import dataclasses

from phi_fast.training.metrics import StepRecord

RECORD = StepRecord(
    step=1,
    tokens=2048,
    loss=9.01,
    lr=1e-3,
    grad_norm=2.5,
    loss_scale=1.0,
    skipped=False,
    tokens_per_s=4000.4,
    step_ms=512.1,
    mfu=None,
)


def at(step: int, **changes: object) -> StepRecord:
    return dataclasses.replace(RECORD, step=step, **changes)
