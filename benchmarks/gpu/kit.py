"""`make gpu-kit`: what a machine with a GPU and without network lacks for `make gpu`, in one folder of at most 60 MiB.

Run by the Python that the other machine has, with its own library alone. Wheels of the trainer's needs and of the peers
are fetched from PyPI in the versions of constraints.txt, DeepSpeed's is built without its ops, and this project's with
its extension. Where that Python also has the other machine's torch and Triton, the kernels are compiled ahead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from start import KIT, ROOT, install, sources  # this file runs where `benchmarks` cannot be imported

TRAINER = (
    *("tyro", "docstring-parser", "typeguard", "deepspeed", "hjson", "py-cpuinfo"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "markdown", "werkzeug", "protobuf", "pillow"),
)
"""Packages of `phi-fast[train]` that torch and transformers do not bring."""
PEERS = ("liger-kernel", "megatron-core", "litgpt", "jsonargparse", "lightning", "lightning-utilities", "torchmetrics")
PEERS += ("cut-cross-entropy", "accelerate", "peft")  # the last two for the tests
BUILT = ("deepspeed",)
"""Not to be had as wheels."""
LIMIT = 60 * 2**20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=KIT, help="the folder to fill")
    kit = parser.parse_args().kit
    wheels = kit / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    made_of = {"sources": sources(), "commit": commit()}  # before the minutes that the rest takes
    fetch(wheels)
    own(wheels)
    described = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "triton": compile_ahead(kit),
        **made_of,
        "wheels": sorted(file.name for file in wheels.glob("*.whl")),
    }
    (kit / "kit.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file())
    print(f"{kit}: {len(described['wheels'])} wheels, {size / 2**20:.1f} MiB of {LIMIT >> 20}")
    if size > LIMIT:
        sys.exit(f"error: {kit} has {size / 2**20:.1f} MiB, and at most {LIMIT >> 20} can be carried; leave a peer out")


def fetch(wheels: Path) -> None:
    """The wheels that are not there yet, in the versions of constraints.txt, and no others of those packages."""
    versions = constraints()
    for name in (*TRAINER, *PEERS):
        wanted = versions.get(normal(name))
        found = [file for file in wheels.glob("*.whl") if normal(file.name.split("-")[0]) == normal(name)]
        if wanted and [file for file in found if file.name.split("-")[1] == wanted]:
            continue
        if found and not wanted:
            continue
        for file in found:
            file.unlink()
        what = f"{name}=={wanted}" if wanted else name
        print(f"{what}", flush=True)
        verb = "wheel" if name in BUILT else "download"
        pip(verb, "--no-deps", f"--{'wheel-dir' if verb == 'wheel' else 'dest'}", str(wheels), what)


def own(wheels: Path) -> None:
    """This project's wheel; its extension is compiled only where a source changed since the last kit."""
    for file in wheels.glob("phi_fast-*.whl"):
        file.unlink()
    print("phi_fast", flush=True)
    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))


def pip(verb: str, *arguments: str) -> None:
    """Ends the process with pip's words where it fails."""
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr.strip()[-3000:]}")


def compile_ahead(kit: Path) -> str | None:
    """Fill triton-cache.tar.xz; the version of the Triton that did, None where this Python has no torch and Triton."""
    archive = kit / "triton-cache.tar.xz"
    archive.unlink(missing_ok=True)
    if missing := [name for name in ("torch", "triton", "numpy") if importlib.util.find_spec(name) is None]:
        print(f"without kernels compiled ahead: {sys.executable} has no {', '.join(missing)}")
        return None
    with tempfile.TemporaryDirectory() as folder:
        site, cache = Path(folder) / "site", ROOT / "build" / "gpu-kit-compiled"  # what did not change is there already
        install(sorted((kit / "wheels").glob("*.whl")), site)
        paths = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "PYTHONSAFEPATH": "1"}
        environment = os.environ | paths | {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.gpu.kernel_cache"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr.strip()[-3000:]}")
        kernels = json.loads(done.stdout)
        partial = archive.with_suffix(".partial")
        with tarfile.open(partial, "w:xz") as file:
            for kernel in kernels:
                file.add(cache / kernel, arcname=kernel)
        partial.replace(archive)
    print(f"{len(kernels)} kernels compiled ahead", flush=True)
    return importlib.metadata.version("triton")


def constraints() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def commit() -> str:
    """Describe the commit, as `benchmarks.machine.commit` does, which cannot be imported here."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
