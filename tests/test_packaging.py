"""Wheel and sdist, installed into fresh environments and used outside the repository."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KERNELS = tuple(re.split("[<>=]", need)[0] for need in PROJECT["dependencies"])
TRAIN = (*KERNELS, *(re.split("[<>=]", need)[0] for need in PROJECT["optional-dependencies"]["train"]))
BUILD = ("setuptools", "pybind11", "pip")
OPS = """
import importlib.util, pathlib, torch, phi_fast
from phi_fast import Phi, PhiConfig
from phi_fast.kernels import FusedAdam, apply_rotary_, attention, bias_gelu, layer_norm, rotary_table
assert importlib.util.find_spec("deepspeed") is None
assert pathlib.Path(phi_fast.__file__).is_relative_to(sys.prefix), phi_fast.__file__
x, ones = torch.randn(2, 8, 64), torch.ones(64)
q = x.view(2, 8, 1, 64)
torch.testing.assert_close(layer_norm(x, ones, 0 * ones, 1e-5), torch.nn.functional.layer_norm(x, (64,)))
torch.testing.assert_close(bias_gelu(x, ones), torch.nn.functional.gelu(x + ones, approximate="tanh"))
expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
torch.testing.assert_close(attention(q, q, q), expected)
apply_rotary_(q.clone(), None, *rotary_table(8, 32))
model = Phi(PhiConfig.preset("phi-tiny").replace(num_hidden_layers=1))  # parallel_block, linear_cross_entropy
optimizer, ids = FusedAdam(model.parameters(), lr=1e-3), torch.arange(64)[None]
losses = []
for _ in range(3):
    loss = model(ids, ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[2] < losses[0]
"""


def needed(names: Iterable[str]) -> set[str]:
    """Names of distributions, and of all that they need in turn, as far as they are installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        waiting += [re.split(r"[^\w.-]", need)[0] for need in requirements if "extra ==" not in need]
    return found


def environment(folder: Path, names: Iterable[str]) -> Path:
    """A fresh venv that has these distributions of this one, by links, and nothing else; its Python."""
    venv.create(folder, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in sorted(needed(names)):
        here = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in here.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source, link = Path(str(here.locate_file(top))), site / top
            if source.exists() and not link.exists() and source.suffix != ".pth":
                link.symlink_to(source)
    return folder / "bin" / "python"


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".whl", ".gz"])
def test_the_kernels_alone(suffix: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    """torch and numpy are all there is: every op runs, and the trainer says what it lacks."""
    python = environment(tmp_path / "venv", (*KERNELS, *BUILD))
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    run(python, "-m", "pip", "install", *flags, distributions[suffix], cwd=tmp_path)
    run(python, "-c", "import sys\n" + OPS, cwd=tmp_path)
    refused = subprocess.run([python, "-m", "phi_fast.train"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.endswith("pip install 'phi-fast[train]'\n")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".whl", ".gz"])
def test_the_trainer(suffix: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", (*TRAIN, *BUILD))
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    run(python, "-m", "pip", "install", *flags, distributions[suffix], cwd=tmp_path)
    where = run(
        python, "-c", "import phi_fast, phi_fast._C; print(phi_fast.__file__, phi_fast._C.__file__)", cwd=tmp_path
    )
    assert all(Path(path).is_relative_to(tmp_path) for path in where.split())
    assert "FAIL" not in run(python, "-m", "phi_fast.verify", "--dtypes", "fp32", cwd=tmp_path)
    words = ("--tokens", str(5 * 8 * 256), "--val-every", "0", "--sample-tokens", "0")
    assert "step 5/5" in run(python, "-m", "phi_fast.train", *words, cwd=tmp_path)


def test_there_is_one_version() -> None:
    assert "version" in PROJECT["dynamic"]
    assert importlib.metadata.version("phi-fast") == importlib.import_module("phi_fast").__version__
