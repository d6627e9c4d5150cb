"""Fixtures that the kernels' tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The device of the tests. On a CPU, Triton's kernels run in its interpreter (see `tests/conftest.py`)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, mark fp16 in Triton as slow where a test has the marker `interpreted_in_bf16`: bf16 runs the same
    lines of the kernel, and the interpreter takes seconds for each. `interpreted_in_fp32(but)` marks bf16 too, except
    where the test's id contains `but`: with that choice, `make mutants` still finds every fault."""
    if torch.cuda.is_available():
        return
    for item in items:
        bf16, fp32 = item.get_closest_marker("interpreted_in_bf16"), item.get_closest_marker("interpreted_in_fp32")
        if (bf16 or fp32) and isinstance(item, pytest.Function):
            given = item.callspec.params.values()
            slow = torch.float16 in given or (fp32 and torch.bfloat16 in given and fp32.args[0] not in item.name)
            if slow and any(isinstance(value, str) and "triton" in value for value in given):
                item.add_marker(pytest.mark.slow)
