"""Fixtures for the trainer's tests; tests only read these folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from samples import compact_questions, write_jsonl
from trainer_processes import make_corpora


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora of `trainer_processes.make_corpora`."""
    return make_corpora(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions of arc_easy and piqa, for --eval-data."""
    folder = tmp_path_factory.mktemp("questions")
    for task in ("arc_easy", "piqa"):
        write_jsonl(folder / f"{task}.jsonl", compact_questions()[task])
    return folder


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on CPUs on every machine, here and in the processes that a test starts: one GPU has no room for several
    ranks, and the expected losses are a CPU's. `make gpu` trains on a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
