"""Shared by the trainer's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on CPUs on every machine, here and in the processes that a test starts: several ranks have no room on one
    GPU, and what is expected are a CPU's losses. `make gpu` trains on a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
