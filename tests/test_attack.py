"""`make attack`, very small: each campaign reaches its target, counts are printed, and failures are reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phi_fast.evaluation import sandbox

TESTS = Path(__file__).parent
ROW = re.compile(r"^(\w+) +([\d,]+) +([\d,]+) +(\d+) +\d+", re.MULTILINE)


def attack(*options: str, path: Path = TESTS) -> tuple[int, str]:
    """Exit status and output. path: a folder with a sitecustomize.py that every process of the campaign runs first."""
    command = [sys.executable, "-m", "attack", "--seed", "3", "--no-sanitizer", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, path)))}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def rows(output: str) -> dict[str, list[int]]:
    """For each campaign: done, target and failures."""
    return {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in ROW.findall(output)}


@pytest.mark.slow
def test_each_campaign_reaches_its_target() -> None:
    names = ["kills", "flips", "headers", "ops"]
    try:
        sandbox.check()
        names.append("programs")
    except sandbox.SandboxError:
        pass  # the other campaigns need none
    status, output = attack("--scale", "0.001", "--minutes", "10", "--only", *names)
    assert status == 0, output
    expected = {"kills": 1, "flips": 5, "headers": 1000, "ops": 9, "programs": 1}
    assert rows(output) == {name: [expected[name], expected[name], 0] for name in names}


@pytest.mark.slow
def test_a_budget_that_ends_early_is_said() -> None:
    status, output = attack("--minutes", "0.2", "--only", "headers")
    assert status == 0, output
    done, target, failures = rows(output)["headers"]
    assert (target, failures) == (1_000_000, 0) and 0 < done < target
    assert "ended before its target" in output


KERNELS = "import os; from phi_fast import kernels; kernels"


@pytest.mark.parametrize(
    ("campaign", "broken", "message"),
    [
        (
            "flips",
            "from phi_fast.training import checkpoint; checkpoint.newest = lambda d, w: (d / 'step-2', [])",
            "bit ",
        ),
        ("headers", "from phi_fast.data import formats; formats.open_layout = lambda p, dtype: int('x')", "ValueError"),
        pytest.param("ops", f"{KERNELS}.bias_gelu = lambda *a, **k: {{}}[1]", "KeyError: 1", marks=pytest.mark.slow),
        pytest.param(
            "ops", f"{KERNELS}.layer_norm = lambda *a, **k: os.abort()", "ended with -6", marks=pytest.mark.slow
        ),
    ],
    ids=["flips", "headers", "an error in ops", "a crash in ops"],
)
def test_what_is_broken_is_found(tmp_path: Path, campaign: str, broken: str, message: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(broken)
    status, output = attack("--scale", "0.01", "--minutes", "10", "--only", campaign, path=tmp_path)
    assert status == 1
    assert rows(output)[campaign][2] > 0
    assert message in output
