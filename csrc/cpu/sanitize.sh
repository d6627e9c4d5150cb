#!/bin/sh
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer, apart from the installed one, and runs the C++
# kernels' tests on it, or a module. Usage, from the repository's root:
# PYTHON=.venv/bin/python sh csrc/cpu/sanitize.sh [pytest options | -m MODULE [its arguments]]
set -eu
python=${PYTHON:-python}
build=${TMPDIR:-/tmp}/phi_fast_sanitized
# Tiles are emulated in plain loops: the sanitizer cannot see what tile instructions read, and few processors have them.
flags="-DPHI_EMULATE_TILES -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CFLAGS="$flags -O1" CXXFLAGS="$flags -O1" LDFLAGS="$flags" \
  "$python" setup.py -q build_ext --build-lib "$build/lib" --build-temp "$build/temp"
# -s: a captured report would be lost with the process. Python and torch are not instrumented, so their leaks are not
# reported and the sanitizer's runtime must be loaded first.
ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
  "$python" - "$build" "$@" <<'PYTHON'
import importlib.util
import pathlib
import runpy
import sys

import pytest

build, *options = sys.argv[1:]
(library,) = pathlib.Path(build, "lib").rglob("_C*.so")
spec = importlib.util.spec_from_file_location("phi_fast._C", library)
sys.modules["phi_fast._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["phi_fast._C"])
print("sanitized:", sys.modules["phi_fast._C"].__file__)
if options[:1] == ["-m"]:
    sys.argv[1:] = options[2:]
    runpy.run_module(options[1], run_name="__main__", alter_sys=True)
    sys.exit()
sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "tests/kernels/test_cpp_kernels.py",
                      "tests/kernels/test_weight_gradient.py",
                      "tests/kernels/test_linear_cross_entropy_in_cache.py",
                      "tests/kernels/test_cpp_attention.py", "tests/kernels/test_cpp_entries.py",
                      "tests/kernels/test_guard_pages.py",
                      *options]))
PYTHON
