"""Memory that is freed and allocated again, in a separate process, because the setting lasts until a process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from phi_fast.kernels import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(5):  # at first the heap still grows: malloc cuts small blocks from the ends of large ones
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(setting: str) -> int:
    result = subprocess.run([sys.executable, "-c", CODE, setting], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_a_block_that_is_freed_and_taken_again_faults_no_page() -> None:
    assert page_faults("keep") < 100
    assert page_faults("leave") > 10 * 100  # otherwise the test would show nothing
