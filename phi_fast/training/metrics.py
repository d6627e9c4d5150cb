"""The metrics of a run's steps, written to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically, writing
from ..peaks import peak_flops
from ..recipes import Recipe
from ..step_records import read_records
from .distributed import World
from .trackers.background import Background
from .trackers.opening import send_report
from .trackers.tensorboard import TensorBoard
from .trackers.tracker import Tracker
from .zero import StepOutcome


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl."""

    step: int
    """Optimizer steps taken, including this one."""
    tokens: int
    """Tokens seen by all ranks so far."""
    loss: float
    """Mean cross entropy over the global batch, in nats per token."""
    lr: float
    grad_norm: float | None
    """Global gradient norm before clipping; null if it overflowed and the step was skipped."""
    loss_scale: float
    """The loss scale of this step's gradients; 1 unless fp16."""
    skipped: bool
    """True if nothing was updated, because a gradient overflowed or --skip-spikes left the step out."""
    tokens_per_s: float
    step_ms: float
    mfu: float | None
    """Share of the device's peak, attention counted in full (PaLM's convention); null if the peak is not known."""
    data_wait_ms: float | None = None
    """Part of step_ms in which rank 0 waited for the rows of the next step; null in records of older versions."""
    val_loss: float | None = None
    """Mean cross entropy over the validation rows, weighted by corpus like the mixture; null if not measured."""
    val_losses: dict[str, float] | None = None
    """Mean cross entropy over the validation rows by corpus; null if not measured."""
    val_bpb: float | None = None
    """The validation loss in bits per byte of text: `val_loss` ÷ ln 2 ÷ mean bytes per predicted token, with the same
    weights. Comparable across tokenizers; null if not measured."""
    val_bpbs: dict[str, float | None] | None = None
    """The validation loss in bits per byte by corpus; null if not measured."""
    ema_val_loss: float | None = None
    """`val_loss` of the averaged weights (--ema-decay); null if not measured."""
    ema_val_bpb: float | None = None
    """`val_bpb` of the averaged weights; null if not measured."""
    tasks: dict[str, float] | None = None
    """Accuracy by task, a fraction of 1; null if not measured (--eval-every)."""
    trained_tokens: int | None = None
    """Labels of this step that count in the loss; null if all do, because no corpus has marks."""


OPTIONAL = {field.name for field in fields(StepRecord) if field.default is None}
"""Fields that a line has only where they were measured."""

TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "val_losses": "loss/validation",
    "val_bpb": "loss/bits_per_byte",
    "val_bpbs": "loss/bits_per_byte",
    "ema_val_loss": "loss/validation_ema",
    "ema_val_bpb": "loss/bits_per_byte_ema",
    "tasks": "tasks",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "skipped": "optimizer/skipped",
    "trained_tokens": "data/trained_tokens",
    "tokens_per_s": "speed/tokens_per_s",
    "step_ms": "speed/step_ms",
    "mfu": "speed/mfu",
    "data_wait_ms": "speed/data_wait_ms",
}
"""Maps a record's field to its TensorBoard tag; for a field with members, to the prefix of the members' tags."""


class Meter:
    """Makes a step's record from its outcome and its duration."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self._tokens_per_step, self._size = recipe.tokens_per_step, world.size
        self._flops_per_token = recipe.flops_per_token(causal=False)
        cuda = world.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if cuda else None

    def record(self, step: int, outcome: StepOutcome, lr: float, seconds: float, **measured: Any) -> StepRecord:
        """Make a step's record; measured: the fields of StepRecord that only some steps have."""
        tokens_per_s = self._tokens_per_step / seconds
        return StepRecord(
            step=step,
            tokens=step * self._tokens_per_step,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            loss_scale=outcome.loss_scale,
            skipped=outcome.skipped,
            tokens_per_s=tokens_per_s,
            step_ms=1000 * seconds,
            trained_tokens=outcome.trained_tokens,
            mfu=None if self._peak is None else tokens_per_s * self._flops_per_token / (self._peak * self._size),
            **measured,
        )


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard in a run directory, and to trackers; only rank 0 has one.

    One line per step, preceded by a line for step 0 with the validation loss before training.
    """

    def __init__(
        self,
        run: Path,
        resume_step: int,
        hyperparameters: Mapping[str, Any] | None = None,
        trackers: Sequence[Background] = (),
    ) -> None:
        """Open the files; lines after `resume_step` are dropped, for a new run (0) all of them.

        hyperparameters: by dotted name, for TensorBoard.
        Raises UsageError if the files cannot be written, or a line of metrics.jsonl is not a step's record.
        """
        self._path, self._more = run / "metrics.jsonl", trackers
        with self._writing():
            _drop_after(self._path, resume_step)
            self._file = self._path.open("a", encoding="utf-8")
            board = TensorBoard(run / "tensorboard", resume_step)
            if hyperparameters:
                board.hyperparameters(hyperparameters, {TAGS["loss"]: 0.0, TAGS["val_loss"]: 0.0})
        self._trackers: list[Tracker] = [board, *trackers]

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._path, "make room, and go on from the newest checkpoint with --resume")

    def validation_before(self, val_loss: float, val_losses: Mapping[str, float], **measured: Any) -> None:
        """Write the validation before the first step, as step 0; measured: other fields of StepRecord."""
        self._write({"step": 0, "tokens": 0, "val_loss": val_loss, "val_losses": dict(val_losses), **measured})

    def write(self, record: StepRecord) -> None:
        self._write({key: value for key, value in asdict(record).items() if key not in OPTIONAL or value is not None})

    def _write(self, line: dict[str, Any]) -> None:
        scalars = dict(member for key, tag in TAGS.items() for member in _members(tag, line.get(key)))
        with self._writing():
            self._file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.scalars(scalars, line["step"])

    def text(self, tag: str, text: str, step: int) -> None:
        for tracker in self._trackers:
            tracker.text(tag, text, step)

    def close(self) -> None:
        """Close the files, and send the trackers the report page and what is left; a second call does nothing."""
        if self._file.closed:
            return
        with self._writing():  # what could not be written before is tried again
            self._file.close()
        board, *more = self._trackers
        board.close()
        if more:
            send_report(self._path.parent, self._more)
        for tracker in more:
            tracker.close()


def _finite(value: object) -> object:
    """Replace NaN and infinities, which JSON does not have, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _members(tag: str, value: Any) -> list[tuple[str, float]]:
    """List (tag, scalar) for a record's value: one pair, one per member of a dict, or none for null."""
    if isinstance(value, dict):
        return [(f"{tag}/{name}", float(one)) for name, one in value.items() if one is not None]
    return [] if value is None else [(tag, float(value))]


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run takes again, and a last line that was cut short.

    Without a checkpoint (step 0) the validation before the first step is taken again, too.
    """
    if not path.exists():
        return
    way_out = f"Correct or remove that line, or move {path.name} away to go on without the earlier steps' records"
    records = read_records(path, way_out)
    kept = [json.dumps(record) + "\n" for record in records if step and record["step"] <= step]
    write_atomically(path, "".join(kept).encode())
