"""Imports without the trainer's packages, and the commands' messages when these are missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from phi_fast import startup

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "phi_fast").rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    and "sandbox" not in path.parts  # the sandbox starts these as files
)
WITHOUT = f"""
import importlib.util, sys
real = importlib.util.find_spec
absent = {(*startup.TRAIN_EXTRA, "lm_eval")!r}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError("No module named " + name, name=name)
importlib.util.find_spec = lambda name, *rest: None if name in absent else real(name, *rest)
sys.meta_path.insert(0, Absent())
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code, *arguments], capture_output=True, text=True)


def test_the_extra_is_pyprojects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split("[<>=]", need)[0] for need in project["dependencies"]} == {"torch", "numpy"}
    train = project["optional-dependencies"]["train"]
    assert sorted(re.split("[<>=]", need)[0] for need in train) == sorted(startup.TRAIN_EXTRA)


def test_kernels_and_model_need_torch_and_numpy_alone() -> None:
    done = python(
        "import torch\n"
        "from phi_fast import Phi, PhiConfig\n"
        "from phi_fast.kernels import FusedAdam, attention, layer_norm, linear_cross_entropy\n"
        "from phi_fast.generation import Sampling, generate\n"
        "from phi_fast.model import ReferencePhi, to_merged\n"
        "model = Phi(PhiConfig.preset('phi-tiny').replace(num_hidden_layers=1))\n"
        "optimizer = FusedAdam(model.parameters())\n"
        "ids = torch.arange(8)[None]\n"
        "model(ids, ids).loss.backward(); optimizer.step()\n"
        "print(len(generate(model, [[1, 2]], Sampling(max_new_tokens=3), end=-1)[0]))\n"
    )
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize("command", [*COMMANDS, "phi_fast.kernels.codegen"])
def test_a_command_without_the_extra_says_what_to_install(command: str) -> None:
    done = python(
        f"import runpy\nsys.argv[1:] = ['--help']\nrunpy.run_module({command!r}, run_name='__main__', alter_sys=True)\n"
    )
    names, extra = ", ".join(startup.TRAIN_EXTRA), "train"
    if command == "phi_fast.evaluation.lm":
        names, extra = f"{names}, lm_eval", "eval"
    if command == "phi_fast.kernels.codegen":  # the kernels cannot import phi_fast.startup
        names = "tyro and rich"
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {command} needs {names}: pip install 'phi-fast[{extra}]'\n"


def test_every_public_command_is_tried() -> None:
    public = (
        "train",
        "prepare",
        "curate",
        "generate",
        "evaluate",
        "convert",
        "report",
        "plan",
        "verify",
        "synthesize",
        "evaluation.lm",
        "data.stdlib_conversations",
    )
    assert {f"phi_fast.{name}" for name in public} == set(COMMANDS)


def test_a_command_speaks_before_torch_is_imported() -> None:
    """The message comes even if torch cannot be imported."""
    for command in ("train", "generate", "evaluate", "convert", "plan", "verify"):
        code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module(sys.argv[1], run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code, f"phi_fast.{command}"], capture_output=True, text=True)
        assert done.stderr.startswith(f"phi_fast.{command}: loading PyTorch"), done.stderr
        assert done.returncode != 0
