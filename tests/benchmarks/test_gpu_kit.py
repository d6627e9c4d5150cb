"""What `make gpu` does with a kit: unpack it, put it on the path, refuse one that does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import start

ROOT = Path(start.__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit with one wheel, which holds the module `of_the_kit`, and a cache by Triton 3.6.0."""
    kit = tmp_path / "kit"
    (kit / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(kit / "wheels" / "of_the_kit-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("of_the_kit.py", "WHERE = __file__\n")
        wheel.writestr("of_the_kit-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: of-the-kit\nVersion: 1.0\n")
        wheel.writestr(
            "of_the_kit-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("of_the_kit-1.0.dist-info/RECORD", "")
    (tmp_path / "hash").mkdir()
    (tmp_path / "hash" / "kernel.cubin").write_bytes(b"compiled")
    group = {"child_paths": {"kernel.cubin": "/another/machine/hash/kernel.cubin"}}
    (tmp_path / "hash" / "__grp__kernel.json").write_text(json.dumps(group))
    with tarfile.open(kit / "triton-cache.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "hash", arcname="hash")
    write(kit)
    monkeypatch.setattr(start, "sources", lambda: "these")
    monkeypatch.setattr(start.importlib.metadata, "version", lambda name: "3.6.0")
    return kit


def write(kit: Path, **changes: str) -> None:
    described = {"python": PYTHON, "triton": "3.6.0", "sources": "these", "commit": "abc"} | changes
    (kit / "kit.json").write_text(json.dumps(described))


def test_a_kit_is_unpacked_and_comes_before_the_repository(kit: Path, tmp_path: Path) -> None:
    environment = start.unpack(kit, tmp_path / "site", tmp_path / "cache")
    assert environment["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    assert (Path(environment["TRITON_CACHE_DIR"]) / "hash" / "kernel.cubin").read_bytes() == b"compiled"
    group = json.loads((tmp_path / "cache" / "hash" / "__grp__kernel.json").read_text())
    assert group["child_paths"] == {"kernel.cubin": str(tmp_path / "cache" / "hash" / "kernel.cubin")}
    code = "import sys, of_the_kit, benchmarks; print(of_the_kit.WHERE); assert '' not in sys.path"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).parent == tmp_path / "site", done.stderr


def test_a_kit_is_unpacked_once_and_another_replaces_it(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    start.unpack(kit, site, tmp_path / "cache")
    (site / "left.py").touch()
    start.unpack(kit, site, tmp_path / "cache")
    assert (site / "left.py").exists()
    write(kit, commit="def")
    start.unpack(kit, site, tmp_path / "cache")
    assert not (site / "left.py").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "3.99"}, rf"is for Python 3.99, and .* is {PYTHON}.*KIT_PYTHON=python{PYTHON}"),
        ({"sources": "others"}, "made of other sources than these: make gpu-kit"),
    ],
)
def test_a_kit_that_does_not_fit_is_refused_before_anything_is_unpacked(
    kit: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    write(kit, **changes)
    with pytest.raises(start.Unusable, match=message):
        start.unpack(kit, tmp_path / "site", tmp_path / "cache")
    assert not (tmp_path / "site").exists()


def test_a_wheel_that_pip_refuses_is_told(kit: Path, tmp_path: Path) -> None:
    (kit / "wheels" / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(start.Unusable, match=r"cannot be unpacked into .*broken"):
        start.unpack(kit, tmp_path / "site", tmp_path / "cache")
    assert not (tmp_path / "site" / "kit.json").exists()


def test_kernels_of_another_triton_are_not_used(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(kit, triton="3.8.0")
    assert "TRITON_CACHE_DIR" not in start.unpack(kit, tmp_path / "site", tmp_path / "cache")
    assert "Triton here is 3.6.0, the kit's kernels are by 3.8.0: they are compiled anew" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_the_digest_knows_every_source_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("phi_fast", "kernels", "csrc"):
        (tmp_path / name).mkdir()
    files = ["setup.py", "pyproject.toml", "phi_fast/a.py", "kernels/b.py", "csrc/c.cpp", "csrc/d.h"]
    for name in files:
        (tmp_path / name).write_text("x")
    seen = {start.sources(tmp_path)}
    for name in files:
        (tmp_path / name).write_text("y")
        seen.add(start.sources(tmp_path))
    (tmp_path / "kernels" / "e.py").touch()
    seen.add(start.sources(tmp_path))
    assert len(seen) == len(files) + 2
    (tmp_path / "phi_fast" / "_C.cpython-312-x86_64-linux-gnu.so").write_text("built")
    assert start.sources(tmp_path) in seen


def make(*words: str) -> str:
    return subprocess.run(["make", "-n", *words], capture_output=True, text=True, check=True, cwd=words[1]).stdout


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., str]:
    """`make gpu`'s commands in a folder with the Makefile and some empty files."""

    def commands(*files: str) -> str:
        shutil.copy(ROOT / "Makefile", tmp_path)
        for name in ("pyproject.toml", "setup.py", "constraints.txt", "csrc/a.cpp", *files):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return make("-C", str(tmp_path), "gpu", "DRY=1", "BUDGET=300")

    return commands


def test_make_uses_a_kit_only_where_there_is_no_environment(copy: Callable[..., str]) -> None:
    assert "start.py --kit --budget 300 --dry" in copy("build/gpu-kit/kit.json")
    assert "start.py --budget 300 --dry" in copy("build/gpu-kit/kit.json", ".venv/bin/python")
