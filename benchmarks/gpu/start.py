"""What `make gpu` runs first, with Python's own library alone: where a kit is used, it is unpacked and put on the path.

A bare machine has torch and Triton and no network. The kit (`make gpu-kit`) brings the rest as wheels, this project's
own among them, which are unpacked into a folder beside it: nothing is built there, and nothing of the machine's Python
is changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KIT, SITE, CACHE = (ROOT / "build" / name for name in ("gpu-kit", "gpu-kit-site", "gpu-kit-triton-cache"))
SOURCES = ("phi_fast", "kernels", "csrc", "setup.py", "pyproject.toml")
"""What the wheel in the kit is made of."""


class Unusable(Exception):
    """The kit does not fit; the message says what to do."""


def sources(root: Path = ROOT) -> str:
    """A digest of the sources that the kit's wheel of this project is made of."""
    digest = hashlib.sha256()
    files = [root / name for name in SOURCES]
    files = [file for each in files for file in (sorted(each.rglob("*")) if each.is_dir() else [each])]
    for file in files:
        if file.suffix in (".py", ".cpp", ".h", ".toml", ".typed", ".sh"):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def unpack(kit: Path, site: Path, cache: Path) -> dict[str, str]:
    """The environment in which the kit is used. Raises Unusable, naming what differs and the way out."""
    described = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python != described["python"]:
        raise Unusable(
            f"{kit} is for Python {described['python']}, and {sys.executable} is {python}: give the other by "
            f"PYTHON=..., or make another kit: make gpu-kit KIT_PYTHON=python{python}"
        )
    if sources() != described["sources"]:
        raise Unusable(f"{kit} was made of other sources than these: make gpu-kit, which builds only what changed")
    stamp = site / "kit.json"
    if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != described:
        for folder in (site, cache):
            shutil.rmtree(folder, ignore_errors=True)
        install(sorted((kit / "wheels").glob("*.whl")), site)
        stamp.write_text(json.dumps(described), encoding="utf-8")
    environment = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "PYTHONSAFEPATH": "1"}
    return environment | compiled(kit, cache, described)


def install(wheels: list[Path], site: Path) -> None:
    """Unpack wheels into a folder. Raises Unusable with pip's words where it refuses one."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unusable(f"the kit's wheels cannot be unpacked into {site}: {done.stderr.strip()[-1000:]}")


def compiled(kit: Path, cache: Path, described: dict[str, Any]) -> dict[str, str]:
    """Triton's cache as the kit brings it, where the Triton here is the one that made it; otherwise nothing."""
    archive = kit / "triton-cache.tar.xz"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if not archive.exists() or version != described["triton"]:
        print(f"Triton here is {version}, the kit's kernels are by {described['triton']}: they are compiled anew")
        return {}
    if not cache.exists():
        with tarfile.open(archive) as file:
            file.extractall(cache, filter="data")
        for group in cache.glob("*/__grp__*.json"):
            members = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
            here = {name: str(group.parent / name) for name in members}  # Triton keeps whole paths
            group.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    return {"TRITON_CACHE_DIR": str(cache)}


def main(arguments: list[str]) -> None:
    """Become `python -m benchmarks.gpu`; the budget has begun."""
    began = ["--began", str(time.time())]
    environment = dict(os.environ)
    if "--kit" in arguments:
        arguments = [word for word in arguments if word != "--kit"]
        try:
            environment |= unpack(KIT, SITE, CACHE)
        except Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        began += ["--commit", json.loads((KIT / "kit.json").read_text(encoding="utf-8"))["commit"]]
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *arguments, *began], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
