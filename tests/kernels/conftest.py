"""Shared by the kernels' tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Where the tests run; on a CPU Triton's kernels run in its interpreter (see `tests/conftest.py`)."""
    return "cuda" if torch.cuda.is_available() else "cpu"
