"""TensorBoard events in the run directory. The report reads the samples from them, so they are always written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes events into a folder; a `Tracker`.

    resume_step: later events of an earlier start are hidden; 0: all.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write `values` into the run's own events for TensorBoard's HPARAMS page, with the metrics shown beside them.

        `add_hparams` would create a second run beside it.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in values.items()}
        writer = self._board._get_file_writer()
        for summary in hparams(plain, dict(metrics)):
            writer.add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._board.add_text(tag, text, step)

    def page(self, path: Path) -> None:
        """Do nothing: the page lies beside the events."""

    def close(self) -> None:
        self._board.close()
