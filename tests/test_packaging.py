"""Wheel and sdist, installed into fresh environments and used outside the repository."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KERNELS = tuple(re.split("[<>=]", need)[0] for need in PROJECT["dependencies"])
TRAIN = (*KERNELS, *(re.split("[<>=]", need)[0] for need in PROJECT["optional-dependencies"]["train"]))
BUILD = ("setuptools", "pybind11", "pip")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Behaves like GCC 10: refuses code that names AMX after preprocessing.
WITHOUT_AMX = """#!/bin/sh
for word; do
  if [ "$previous" = -o ]; then output=$word; fi
  previous=$word
done
case "$*" in
*.cpp*)
  g++ "$@" -E || exit 1
  # Not in system headers, which newer compilers bring along: their line markers have the flag 3.
  if awk '/^# [0-9]+ "/ { system = / 3/ } !system && /target.*amx/ { found = 1 } END { exit !found }' "$output"
  then echo "error: unknown target amx-tile" >&2; exit 1; fi ;;
esac
exec g++ "$@"
"""
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
    """Return the names of distributions and all their dependencies, as far as they are installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        waiting += [re.split(r"[^\w.-]", need)[0] for need in requirements if "extra ==" not in need]
    return found


def environment(folder: Path, names: Iterable[str]) -> Path:
    """Make a fresh venv with links to only these installed distributions; returns its Python."""
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
    """With only torch and numpy installed, every op runs, and the trainer says which packages are missing."""
    python = environment(tmp_path / "venv", (*KERNELS, *BUILD))
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    run(python, "-m", "pip", "install", *flags, distributions[suffix], cwd=tmp_path)
    run(python, "-c", "import sys\n" + OPS, cwd=tmp_path)
    refused = subprocess.run([python, "-m", "phi_fast.train"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.endswith("pip install 'phi-fast[train]'\n")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the repository's files")
def test_the_source_distribution_is_the_repository(distributions: dict[str, Path]) -> None:
    """The sdist has every tracked file except those for the repository's host."""
    tracked = {Path(name) for name in run("git", "ls-files", cwd=ROOT).splitlines()}
    expected = {
        path for path in tracked if path.parts[0] not in (".github", ".ci", ".gitignore") and (ROOT / path).exists()
    }
    with tarfile.open(distributions[".gz"]) as archive:
        packed = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    assert expected <= packed, sorted(expected - packed)
    made = {path for path in packed - tracked if path.parts[0] not in ("PKG-INFO", "setup.cfg", "phi_fast.egg-info")}
    assert not {path for path in made if path.suffix in (".so", ".pyc", ".o")}


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


def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)  # setup.py runs in its folder and uses relative paths
    return runpy.run_path("setup.py")


@pytest.mark.parametrize(
    ("unknown", "machine", "expected"),
    [
        ("nothing", "x86_64", []),
        ("amx-tile", "x86_64", ["amx"]),  # GCC 10
        ("avx512bf16", "x86_64", ["amx", "avx512_bf16"]),  # GCC 9
        ("avx", "AMD64", ["amx", "avx2", "avx512", "avx512_bf16"]),
        ("amx-tile", "aarch64", []),
    ],
)
def test_the_compiler_decides_which_instruction_sets_are_built(
    unknown: str, machine: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    omitted = setup_script(monkeypatch)["omitted"]
    assert omitted(lambda target: unknown not in target, machine) == expected


def test_the_compiler_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe also works with flags that cause a warning."""
    from setuptools import Distribution
    from setuptools._distutils.sysconfig import customize_compiler
    from setuptools.command.build_ext import new_compiler  # type: ignore[attr-defined]

    monkeypatch.setenv("CXXFLAGS", "-Wmissing-declarations")
    build = setup_script(monkeypatch)["BuildExtension"](Distribution())
    build.compiler = new_compiler()
    customize_compiler(build.compiler)
    assert not build.knows("avx1024")
    if os.uname().machine == "x86_64":
        assert build.knows("avx2,fma,f16c")


@pytest.mark.slow
def test_a_compiler_without_amx_builds_the_rest(tmp_path: Path) -> None:
    compiler, library_folder = tmp_path / "g++-10", tmp_path / "lib"
    compiler.write_text(WITHOUT_AMX)
    compiler.chmod(0o755)
    words = ("build_ext", "--build-lib", str(library_folder), "--build-temp", str(tmp_path / "temp"))
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=ROOT,
        env={**os.environ, "CC": str(compiler), "CXX": str(compiler)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert built.returncode == 0, built.stderr
    assert "built without its amx kernels" in built.stdout
    (library,) = library_folder.rglob("_C*.so")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("phi_fast._C", {str(library)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cpu.omitted_isas(), "amx" in module.cpu.supported_isas(), module.cpu.isa())
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).startswith("['amx'] False ")
    environment = {**os.environ, "PHI_FAST_ISA": "amx"}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "PHI_FAST_ISA=amx: not compiled in: the compiler that built phi_fast does not know" in asked.stderr
    assert asked.returncode != 0


def test_the_classifiers_and_the_workflow_name_the_same_pythons() -> None:
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.", name)]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    oldest = jobs["kernels"]["strategy"]["matrix"]["include"][0]
    assert f"torch>={oldest['torch'].removesuffix('.*')},<3" in PROJECT["dependencies"]
    assert PROJECT["optional-dependencies"]["gpu"] == [f"triton>={oldest['triton'].removesuffix('.*')}"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflows_call_targets_that_exist(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    called = set(re.findall(r"make ([\w-]+)", workflow.read_text()))
    assert called <= known
    assert called or workflow.stem == "release"


def test_a_releases_text_is_the_changelogs_section(tmp_path: Path) -> None:
    """The workflow's own commands run on a changelog that also has neighbouring versions."""
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["release"]["steps"]
    (script,) = (step["run"] for step in steps if "notes.md" in step.get("run", "") and "awk" in step["run"])
    (tmp_path / "phi_fast").mkdir()
    (tmp_path / "phi_fast" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    sections = {"1.2.30 (2027-01-03)": "later", "1.2.3 (2027-01-02)": "- this one\n\n  and more", "1.2.2": "before"}
    text = "".join(f"## {title}\n\n{body}\n\n" for title, body in sections.items())
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n" + text)

    def notes(tag: str) -> int:
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        return subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment).returncode

    assert notes("v1.2.3") == 0
    assert (tmp_path / "notes.md").read_text().strip() == "- this one\n\n  and more"
    assert notes("v1.2.30") != 0, "the tag is not the tree's version"
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.2\n\nbefore\n")
    assert notes("v1.2.3") != 0, "the version has no section"


def test_the_changelogs_newest_section_is_this_version_with_a_date() -> None:
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    version = importlib.import_module("phi_fast").__version__
    assert newest and re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", newest[1])
