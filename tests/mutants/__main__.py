"""Seeds faults into the Triton kernels, one at a time, and asks which of them the tests see: `make mutants`.

A fault that no test sees survives. Each must then get a test or, where it cannot change a result, a line with the
reason in equivalent.json. Works on a copy of the package in a temporary folder. Results are kept in
build/mutants.jsonl: a run that was stopped goes on, and one after a change tries only what the change concerns. Ends
with status 1 where a fault survived.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .faults import KINDS, Fault, chosen, diff, faults

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels" / "triton"
RESULTS = ROOT / "build" / "mutants.jsonl"
EQUIVALENT = Path(__file__).parent / "equivalent.json"
PER_KIND = 3
CPU_FACTOR, CPU_SECONDS = 3, 10
"""A run hangs, and is killed, at this multiple of the CPU time of the tests without a fault plus these seconds."""

BACKENDS, ALL = "triton and not cpp", ""
ATTENTION = (
    "triton and (guard_pages or far_rows or rounded or (errs and float32) or (errs and bfloat16 and 128) or touched"
    " or ends_of_blocks or two_rotated or tables or log_sum_exp)"
)
"""Every case in fp32, one in bf16, and what only single tests see."""
SHARED = ("formulas", "rounded_once", "triton_guard_pages", "triton_far_rows")
"""Tests of many kernels, which have the op in their names."""
SELECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adam": (BACKENDS, (*SHARED, "adam", "adam_options")),
    "attention_forward": (ATTENTION, (*SHARED, "attention")),
    "attention_backward": (ATTENTION, (*SHARED, "attention")),
    "bias_gelu": (BACKENDS, (*SHARED, "bias_gelu")),
    "common": (ALL, ("launch_description", "launch", "launching", "specimens")),
    "gated_activation": (BACKENDS, (*SHARED, "gated_activation")),
    "grid": (BACKENDS, ("bias_gelu", "rotary")),
    "layer_norm": (BACKENDS, (*SHARED, "layer_norm", "rms_norm")),
    "layer_norm_wide": (BACKENDS, (*SHARED, "layer_norm", "rms_norm")),
    "linear_cross_entropy": (BACKENDS, (*SHARED, "linear_cross_entropy", "linear_cross_entropy_options")),
    "linear_cross_entropy_on_chip": (BACKENDS, ("linear_cross_entropy_on_chip",)),
    "muon": (BACKENDS, ("rounded_once", "triton_guard_pages", "triton_far_rows", "muon_products")),
    "rotary": (BACKENDS, (*SHARED, "rotary")),
    "rounding": (ALL, ("rounding",)),
    "softcap": (BACKENDS, ("formulas", "linear_cross_entropy_options", "linear_cross_entropy_on_chip")),
}
"""Module of kernels/triton -> pytest's -k, and the files of tests/kernels, the fast ones first."""


@dataclass(frozen=True)
class Result:
    """What the tests made of one fault."""

    outcome: str
    """killed, or survived."""
    by: str
    """The test that failed first, or how the run ended."""
    seconds: float
    """CPU time."""
    durations: dict[str, float] = field(default_factory=dict)
    """Without a fault: the seconds of each test."""


class Copy:
    """The package and the tests in a temporary folder, where a fault may be written into a kernel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "phi_fast", folder / "phi_fast", ignore=ignored)
        shutil.copytree(ROOT / "kernels", folder / "phi_fast" / "kernels", ignore=ignored)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # a fault of the same length in the same second would not be read
            "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "tests"))),
            "TRITON_INTERPRET": "1",
        }
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "mutants.worker"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self.worker.stdin.close()
        self.worker.wait()

    def test(self, kernel: str, cpu_seconds: int, order: Sequence[str] = ()) -> dict[str, Any]:
        """The worker's answer on the kernel's tests, those of `order` first."""
        expression, names = SELECTIONS[kernel]
        shared = " or ".join(f"test_{name}" for name in SHARED)
        op = kernel.removesuffix("_forward").removesuffix("_backward").removesuffix("_wide")
        guards = f"not ({shared}) or {op}"
        arguments = [f"tests/kernels/test_{name}.py" for name in names]
        arguments += ["-m", "not slow", *(["-k", f"({expression}) and ({guards})"] if expression else [])]
        self.worker.stdin.write(json.dumps({"arguments": arguments, "order": order, "cpu_seconds": cpu_seconds}) + "\n")
        self.worker.stdin.flush()
        answer = self.worker.stdout.readline()
        if not answer:
            sys.exit("mutants: the process that runs the tests died; its last output is above")
        return json.loads(answer)

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def test_kernel(self, kernel: str) -> Result:
        """The kernel's tests without a fault, which they must pass."""
        answer = self.test(kernel, 3600)
        if answer["status"]:
            sys.exit(f"mutants: the tests of {kernel} fail without a fault:\n{self.output()}")
        print(f"{kernel}: {answer['seconds']:.1f} s without a fault", flush=True)
        return Result("survived", "", answer["seconds"], answer["durations"])

    def try_fault(self, fault: Fault, cpu_seconds: int, order: Sequence[str]) -> Result:
        place = self.folder / "phi_fast" / fault.path
        source = place.read_bytes()
        place.write_bytes(fault.applied(source))
        answer = self.test(place.stem, cpu_seconds, order)
        place.write_bytes(source)
        status = answer["status"]
        if status not in (0, 1, 2) and status >= 0:  # 1: a test failed; 2: a module did not import
            sys.exit(f"mutants: pytest ended with status {status}:\n{self.output()}")
        ended = answer["failed"] or (f"signal {-status}" if status < 0 else "")
        return Result("survived" if status == 0 else "killed", ended, answer["seconds"])


def order(kernel: str, results: dict[str, Result]) -> list[str]:
    """The kernel's tests, those first that killed many faults of its module in little time."""
    kills = Counter(result.by for key, result in results.items() if key.startswith(f"kernels/triton/{kernel}.py"))
    durations = results[" ".join(SELECTIONS[kernel][1])].durations
    return sorted(durations, key=lambda test: durations[test] / (1 + kills[test]))


def main() -> int:
    options = parse()
    kernels = options.only or list(SELECTIONS)
    sources = {f"kernels/triton/{name}.py": (KERNELS / f"{name}.py").read_bytes() for name in kernels}
    everything = [fault for path, source in sources.items() for fault in faults(path, source)]
    seeded = everything if options.every else chosen(everything, options.per_kind)
    seeded = [fault for fault in seeded if fault.kind in (options.kinds or KINDS) and options.match in fault.key]
    print(f"{len(seeded)} of {len(everything)} faults", flush=True)
    results = known()
    same = {entry["fault"] for entry in equivalents()}
    untried = sorted((fault for fault in seeded if fault.key not in results), key=lambda fault: fault.key in same)
    if options.report:
        print(f"{len(untried)} of them were not tried yet")
        seeded = [fault for fault in seeded if fault.key in results]
    elif untried:
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(Path(folder))
            for i, fault in enumerate(untried):
                kernel = Path(fault.path).stem
                tests = " ".join(SELECTIONS[kernel][1])
                if tests not in results:
                    results[tests] = copy.test_kernel(kernel)
                    keep(tests, kernel, results[tests], copy)
                limit = int(CPU_FACTOR * results[tests].seconds) + CPU_SECONDS
                result = results[fault.key] = copy.try_fault(fault, limit, order(kernel, results))
                keep(fault.key, kernel, result, copy)
                print(f"{i + 1:>4} {result.outcome:<9}{result.seconds:>6.1f} s  {fault.key}  {result.by}", flush=True)
            copy.close()
    missing = {fault for fault in same if fault.partition(":")[0] in sources}
    for key in sorted(missing - {fault.key for fault in everything}):
        print(f"equivalent.json lists a fault that the kernels no longer have: {key}")
    return report(seeded, results, sources)


def equivalents() -> list[dict[str, str]]:
    """The faults that cannot change a result, and why."""
    return json.loads(EQUIVALENT.read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("make mutants", description=__doc__)
    parser.add_argument("--per-kind", type=int, default=PER_KIND, help="faults of each kernel and kind")
    parser.add_argument("--every", action="store_true", help="all faults there are; takes hours")
    parser.add_argument("--only", nargs="+", choices=SELECTIONS, help="kernels")
    parser.add_argument("--report", action="store_true", help="the table of what was tried, without trying more")
    parser.add_argument("--match", default="", help="of the chosen faults, those with this text")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of faults")
    return parser.parse_args()


def depends_on(kernel: str, by: str, package: Path, root: Path) -> str:
    """Digest of the files that a result holds for: the kernels, and the test that killed, or all that did not and what
    these import."""
    folder = root / "tests" / "kernels"
    test = by.partition("::")[0].rpartition("/")[2]
    helpers = [file.name for file in folder.glob("*.py") if not file.name.startswith("test_")]
    tests = [test] if test.startswith("test_") else [*helpers, *(f"test_{name}.py" for name in SELECTIONS[kernel][1])]
    kernels = sorted((package / "kernels" / "triton").glob("*.py"))
    files = [*kernels, *(folder / name for name in sorted(tests))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def keep(key: str, kernel: str, result: Result, copy: Copy) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    files = depends_on(kernel, result.by, copy.folder / "phi_fast", copy.folder)
    with RESULTS.open("a") as file:
        line = {"key": key, "kernel": kernel, "depends_on": files, **vars(result)}
        file.write(json.dumps(line) + "\n")


def known() -> dict[str, Result]:
    """Results of earlier runs that still hold: by the fault's key, or by the tests' names for no fault."""
    results = {}
    for line in map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else []):
        if depends_on(line["kernel"], line["by"], ROOT, ROOT) == line["depends_on"]:
            results[line["key"]] = Result(line["outcome"], line["by"], line["seconds"], line["durations"])
    return results


def report(seeded: list[Fault], results: dict[str, Result], sources: dict[str, bytes]) -> int:
    """Prints the table and the survivors; returns the exit status."""
    equivalent = {entry["fault"]: entry["reason"] for entry in equivalents()}
    counts: dict[str, Counter[tuple[str, str]]] = {}
    survivors = [fault for fault in seeded if results[fault.key].outcome == "survived"]
    for fault in seeded:
        outcome = results[fault.key].outcome
        outcome = "equivalent" if outcome == "survived" and fault.key in equivalent else outcome
        stopped = outcome == "killed" and not results[fault.key].by.startswith("tests/")
        for row in (Path(fault.path).stem, "all"):
            for column in (fault.kind, "all"):
                counts.setdefault(row, Counter())[column, outcome] += 1
                counts[row][column, "stopped"] += stopped
    rows = [*(name for name in SELECTIONS if name in counts), "all"]
    print("\n| kernel | tried | a test failed | process died or hung | equivalent | survived |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        killed, died, same, survived = (counts[row]["all", x] for x in ("killed", "stopped", "equivalent", "survived"))
        print(f"| {row} | {killed + same + survived} | {killed - died} | {died} | {same} | {survived} |")
    print("\nkilled / seeded; = cannot change a result\n")
    print("| kernel | " + " | ".join((*KINDS, "all")) + " |")
    print("|---" * (len(KINDS) + 2) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(cell(counts[row], kind) for kind in (*KINDS, "all")) + " |")
    for fault in survivors:
        print("\n" + diff(fault, sources[fault.path]))
        print("equivalent: " + equivalent[fault.key] if fault.key in equivalent else f"survived: {fault.key}")
    for fault in seeded:
        if fault.key in equivalent and results[fault.key].outcome == "killed":
            print(f"listed as equivalent, but killed by {results[fault.key].by}: {fault.key}")
    killed, same = counts["all"]["all", "killed"], counts["all"]["all", "equivalent"]
    able = len(seeded) - same
    print(f"\n{killed} of {able} killed, {100 * killed / max(1, able):.1f}%; {same} equivalent")
    return 1 if counts["all"]["all", "survived"] else 0


def cell(counts: Counter[tuple[str, str]], kind: str) -> str:
    killed, survived, same = (counts[kind, outcome] for outcome in ("killed", "survived", "equivalent"))
    return f"{killed} / {killed + survived}" + (f" + {same} =" if same else "") if killed + survived + same else ""


if __name__ == "__main__":
    sys.exit(main())
