"""Builds phi_fast._C (C++17, pybind11) without torch, and maps kernels/ to phi_fast.kernels."""

import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def instruction_sets() -> dict[str, str]:
    """Map each name to its target attribute for the compiler, read from csrc/cpu/kernels_NAME.cpp."""
    found = {}
    for path in sorted(Path("csrc/cpu").glob("kernels_*.cpp")):
        if match := re.search(r'#pragma GCC target\("([^"]+)"\)', path.read_text(encoding="utf-8")):
            found[path.stem.removeprefix("kernels_")] = match[1]
    return found


def omitted(knows: Callable[[str], bool], machine: str) -> list[str]:
    """List the instruction sets whose kernels this compiler cannot build (AMX needs GCC 11)."""
    if machine not in ("x86_64", "AMD64"):
        return []  # other processors compile these files to nothing
    return [name for name, target in instruction_sets().items() if not knows(target)]


class BuildExtension(build_ext):
    """Leaves out instruction sets that the compiler does not know, and prints which.

    phi_fast.verify prints them, too, because pip shows a build's output only with --verbose.
    """

    def build_extensions(self) -> None:
        for name in omitted(self.knows, platform.machine()):
            print(f"phi_fast._C: built without its {name} kernels, whose instructions this compiler does not know")
            self.extensions[0].define_macros.append((f"PHI_WITHOUT_{name.upper()}", "1"))
        super().build_extensions()

    def knows(self, target: str) -> bool:
        """Return whether a function for these instructions compiles; Clang's warning for unknown names is an error."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(f'__attribute__((target("{target}"))) int probe() {{ return 0; }}\n', encoding="utf-8")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_preargs=["-Werror=ignored-attributes"])
            except CompileError:
                return False
        return True


extension = Pybind11Extension(
    "phi_fast._C",
    sources=SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    cxx_std=17,
    # Multiply-adds are fused only where the source says so, so that the results do not depend on the compiler.
    extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"] if platform.system() == "Linux" else [],
)

if __name__ == "__main__":
    ParallelCompile("NPY_NUM_BUILD_JOBS", default=0).install()
    setup(
        packages=[
            *find_packages(include=["phi_fast", "phi_fast.*"]),
            *(f"phi_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
        ],
        package_dir={"phi_fast.kernels": "kernels"},
        package_data={"phi_fast": ["py.typed"], "phi_fast.kernels": ["py.typed"]},
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
    )
