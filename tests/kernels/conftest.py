"""Fixtures that the kernels' tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The device of the tests. On a CPU, Triton's kernels run in its interpreter (see `tests/conftest.py`)."""
    return "cuda" if torch.cuda.is_available() else "cpu"
