"""Builds phi_fast._C (C++17, pybind11) without torch, and maps kernels/ to phi_fast.kernels."""

import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))

extension = Pybind11Extension(
    "phi_fast._C",
    sources=SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    cxx_std=17,
    # A multiply and an add are fused where the source says so, not where a compiler or a processor happens to.
    extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"] if platform.system() == "Linux" else [],
)

ParallelCompile("NPY_NUM_BUILD_JOBS", default=0).install()
setup(
    packages=[
        *find_packages(include=["phi_fast", "phi_fast.*"]),
        *(f"phi_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"phi_fast.kernels": "kernels"},
    package_data={"phi_fast": ["py.typed"], "phi_fast.kernels": ["py.typed"]},
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
