"""`make prove` sets up an environment of its own, for which it needs a newer Python than the project does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD = """#!/bin/sh
exec python3 -c 'import sys; sys.version_info = (3, 11); exec(sys.argv.pop(1))' "$2"
"""


@pytest.mark.parametrize("python", ["missing", "too old"])
def test_without_a_python_that_ttsem_runs_on_it_says_what_to_do(python: str, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    if python == "too old":
        interpreter.write_text(OLD, encoding="utf-8")
        interpreter.chmod(0o755)
    command = ["make", "prove", f"PROVE_PYTHON={interpreter}", f"PROVE={tmp_path / 'environment'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "make prove needs Python 3.12 or 3.13" in result.stderr
    assert "make prove PROVE_PYTHON=/path/to/python3.12" in result.stderr
    assert not (tmp_path / "environment").exists()
