"""Which instruction set and which threads the C++ kernels use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from phi_fast import _C

# Imports the extension alone, to save the seconds that importing torch takes.
CODE = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("phi_fast._C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cpu.isa(), module.cpu.parallel_backend())
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PHI_FAST_ISA": isa}
    return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)


def test_unknown_name_is_refused() -> None:
    result = run("sse9")
    assert result.returncode != 0
    assert "PHI_FAST_ISA=sse9: expected one of" in result.stderr and "portable" in result.stderr


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_missing_instructions_are_refused(name: str) -> None:
    if name in _C.cpu.supported_isas():
        pytest.skip(f"this processor has {name}")
    result = run(name)
    assert result.returncode != 0
    assert f"PHI_FAST_ISA={name}" in result.stderr
    assert "does not have these instructions; best here: " in result.stderr or "expected one of" in result.stderr


@pytest.mark.parametrize("name", _C.cpu.supported_isas())
def test_the_variable_forces_one(name: str) -> None:
    result = run(name)
    assert result.stdout.split()[0] == name, result.stderr


def test_the_best_is_the_default() -> None:
    assert run("").stdout.split()[0] == _C.cpu.supported_isas()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is reached through GCC's entry points, on Linux")
def test_the_work_runs_in_torchs_own_threads() -> None:
    import torch  # noqa: F401  (brings the runtime)

    assert _C.cpu.parallel_backend() == "openmp"


def test_without_torch_threads_are_started_for_the_call() -> None:
    assert run("").stdout.split()[1] == "std::thread"
