"""Weights & Biases (`--track wandb`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from .tracker import TrackedRun


class Wandb:
    """Tracks a run with wandb, which reads its own environment: WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY, …"""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "phi_fast"),
            id=run.id,
            name=run.name,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.config.update(dict(run.config), allow_val_change=True)  # a resumed run may have other options
        # The steps after a checkpoint are taken again by a resume; wandb drops values at a lower step of its own count.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def text(self, tag: str, text: str, step: int) -> None:
        self._run.log({tag: self._html(f"<pre>{escape(text)}</pre>", inject=False), "step": step})

    def page(self, path: Path) -> None:
        self._run.log({"report": self._html(path.read_text(encoding="utf-8"), inject=False)})

    def close(self) -> None:
        self._run.finish()
