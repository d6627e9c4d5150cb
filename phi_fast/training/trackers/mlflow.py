"""MLflow (`--track mlflow`)."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from .tracker import TrackedRun

TAG = "phi_fast.id"
"""The tag by which a resumed run finds its MLflow run."""
LONGEST_VALUE = 6000
"""Most characters of a parameter."""
MOST_PARAMETERS = 100
"""Most parameters of one request."""


class MLflow:
    """Tracks a run with MLflow, which reads its own environment: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, …"""

    def __init__(self, run: TrackedRun) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports each table of a new database
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "phi_fast")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'")
        known = runs[0] if runs else self._client.create_run(experiment, tags={TAG: run.id}, run_name=run.name)
        self._id = known.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        # A parameter cannot change, and a resumed run may have other options: the file has the newest.
        new = [
            Param(_allowed(key), json.dumps(value)[:LONGEST_VALUE] if not isinstance(value, str) else value)
            for key, value in run.config.items()
            if _allowed(key) not in known.data.params
        ]
        for first in range(0, len(new), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=new[first : first + MOST_PARAMETERS])
        self._client.log_dict(self._id, dict(run.config), "config.json")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(_allowed(tag), value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, tag: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, f"{tag}/step-{step}.txt")

    def page(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _allowed(name: str) -> str:
    """Replace what MLflow does not take in a name, which the name of a corpus may contain."""
    return re.sub(r"[^\w\-. :/]", "_", name)
