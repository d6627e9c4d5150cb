"""Trackio (`--track trackio`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .tracker import TrackedRun


class Trackio:
    """Tracks a run with trackio, which reads its own environment: TRACKIO_DIR, TRACKIO_SPACE_ID, …"""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._markdown = trackio.Markdown
        self._page = f"report-{run.id}"
        self._run = trackio.init(
            project="phi_fast",
            name=f"{run.name}-{run.id}",
            resume="allow",
            config=dict(run.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, tag: str, text: str, step: int) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown shows indented lines as they are
        self._run.log({tag: self._markdown(indented)}, step=step)

    def page(self, path: Path) -> None:
        self._run.log_artifact(path, name=self._page, type="report")

    def close(self) -> None:
        self._run.finish()
