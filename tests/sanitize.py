"""Runs the token tests against csrc/tokens built with AddressSanitizer and UBSan: `python tests/sanitize.py`.

The installed extension is not touched: the sources are built into a temporary folder, and that module stands in for
phi_fast._C. Needs g++ with its sanitizer libraries. Exit status: pytest's, or the first report's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
TESTS = ["fuzz_headers", "order", "formats", "token_entries", "loader_faults", "loader"]
MODULE = """
#include <pybind11/pybind11.h>
#include "tokens/bindings.h"
PYBIND11_MODULE(_C, module) {
  auto tokens = module.def_submodule("tokens");
  phi_fast::tokens::bind(tokens);
}
"""
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("phi_fast._C", sys.argv[1])
module = sys.modules["phi_fast._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import phi_fast
phi_fast._C = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def build(folder: Path) -> Path:
    """Compile csrc/tokens with the sanitizers; returns the module's path."""
    (folder / "module.cpp").write_text(MODULE)
    includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [folder / "module.cpp", *sorted((ROOT / "csrc" / "tokens").glob("*.cpp"))]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, SANITIZERS, *includes, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", SANITIZERS, *objects, "-pthread", "-o", module], check=True)
    return module


def library(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        module = build(Path(folder))
        tests = [str(ROOT / "tests" / "data" / f"test_{name}.py") for name in TESTS]
        # Exits are tested on the real build: the processes they start would not be this one's.
        arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--deselect", f"{tests[-1]}::{NOT_HERE}", *tests]
        environment = os.environ | {
            "LD_PRELOAD": " ".join(library(name) for name in ("libasan.so", "libstdc++.so")),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python does not free everything at its exit
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # each object an allocation of its own, so that reading past a header is seen
            "OMP_NUM_THREADS": "1",
            "FUZZ_EXAMPLES": os.environ.get("FUZZ_EXAMPLES", "300"),
        }
        return subprocess.run([sys.executable, "-c", RUN, module, *arguments], cwd=ROOT, env=environment).returncode


NOT_HERE = "test_python_exits_however_the_loader_was_left"

if __name__ == "__main__":
    sys.exit(main())
