"""`make mutants`: which faults are found in a source, and which are chosen."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from mutants.__main__ import EQUIVALENT, KERNELS, PER_KIND, SELECTIONS, Result, equivalents, order, report
from mutants.faults import KINDS, chosen, diff, faults

SOURCE = b"""
@triton.jit
def copy(x, out, n, x_stride, out_stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at * x_stride, mask=at < n, other=0.0).to(tl.float32)
    value -= 2.0 * tl.max(value, axis=0)
    tl.store(out + at, value, mask=(at < n) & (at >= 1))


def launch(x):
    return x.stride(0)
"""
EXPECTED = {
    ("mask", "value = tl.load(x + at * x_stride).to(tl.float32)"),
    ("mask", "tl.store(out + at, value)"),
    ("mask", "tl.store(out + at, value, mask=(at < n))"),
    ("mask", "tl.store(out + at, value, mask=(at >= 1))"),
    ("compare", "value = tl.load(x + at * x_stride, mask=at <= n, other=0.0).to(tl.float32)"),
    ("compare", "tl.store(out + at, value, mask=(at <= n) & (at >= 1))"),
    ("compare", "tl.store(out + at, value, mask=(at < n) & (at > 1))"),
    ("stride", "value = tl.load(x + at * out_stride, mask=at < n, other=0.0).to(tl.float32)"),
    ("stride", "return x.stride(1)"),
    ("index", "at = (1 + tl.arange(0, BLOCK))"),
    ("index", "value = tl.load(x + at * x_stride + 1, mask=at < n, other=0.0).to(tl.float32)"),
    ("index", "tl.store(out + at + 1, value, mask=(at < n) & (at >= 1))"),
    ("cast", "value = (tl.load(x + at * x_stride, mask=at < n, other=0.0))"),
    ("constant", "value -= 2.02 * tl.max(value, axis=0)"),
    ("constant", "tl.store(out + at, value, mask=(at < n) & (at >= 2))"),
    ("operand", "value = tl.load(((x) - (at * x_stride)), mask=at < n, other=0.0).to(tl.float32)"),
    ("operand", "value = tl.load(x + ((at) + (x_stride)), mask=at < n, other=0.0).to(tl.float32)"),
    ("operand", "value = 2.0 * tl.max(value, axis=0)"),
    ("operand", "value -= ((2.0) + (tl.max(value, axis=0)))"),
    ("operand", "tl.store(((out) - (at)), value, mask=(at < n) & (at >= 1))"),
    ("extremum", "value -= 2.0 * tl.min(value, axis=0)"),
    ("other", "value = tl.load(x + at * x_stride, mask=at < n, other=1.0).to(tl.float32)"),
}


def test_faults_of_a_kernel() -> None:
    found = faults("copy.py", SOURCE)
    assert {(fault.kind, fault.after) for fault in found} == EXPECTED and len(found) == len(EXPECTED)
    assert {fault.kind for fault in found} == set(KINDS)
    for fault in found:
        changed = fault.applied(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert fault.after in changed.decode() and f"+    {fault.after}" in diff(fault, SOURCE)


def test_a_fault_is_the_same_when_lines_are_added_elsewhere() -> None:
    moved = b"# A comment: \xce\xb2.\n" + SOURCE.replace(b"def launch", b"def other():\n    pass\n\n\ndef launch")
    before, after = (chosen(faults("copy.py", source), 1) for source in (SOURCE, moved))
    assert [fault.key for fault in before] == [fault.key for fault in after]


def test_the_kernels_get_faults_of_every_kind() -> None:
    sources = {f"kernels/triton/{name}.py": (KERNELS / f"{name}.py").read_bytes() for name in SELECTIONS}
    jitted = {f"kernels/triton/{path.name}" for path in KERNELS.glob("*.py") if "@triton.jit" in path.read_text()}
    assert jitted <= set(sources), "every kernel has its tests named"
    found = [fault for path, source in sources.items() for fault in faults(path, source)]
    seeded = chosen(found, PER_KIND)
    assert len(seeded) >= 150 and len({fault.key for fault in found}) == len(found)
    assert {fault.kind for fault in seeded} == set(KINDS) and {fault.path for fault in seeded} == set(sources)
    listed = [entry["fault"] for entry in json.loads(EQUIVALENT.read_text())]
    assert set(listed) <= {fault.key for fault in found}, "equivalent.json lists what is no longer there"


def test_the_tests_that_are_named_exist() -> None:
    folder = Path(__file__).parent / "kernels"
    assert all((folder / f"test_{name}.py").exists() for _, names in SELECTIONS.values() for name in names)


def test_the_test_that_killed_most_in_the_least_time_is_first() -> None:
    """2 s for three faults is 0.5 s each, beside 0.6 s and 0.9 s for tests that killed none."""
    durations = {"slow": 0.9, "killer": 2.0, "quick": 0.6}
    results = {" ".join(SELECTIONS["rotary"][1]): Result("survived", "", 9.0, durations)}
    results |= {f"kernels/triton/rotary.py:f: {i}": Result("killed", "killer", 1.0) for i in range(3)}
    results["kernels/triton/adam.py:f: x"] = Result("killed", "slow", 1.0)
    assert order("rotary", results) == ["killer", "quick", "slow"]


def test_the_report_tells_failed_tests_dead_processes_and_equal_results_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, source = "kernels/triton/rotary.py", (KERNELS / "rotary.py").read_bytes()
    found = faults(path, source)
    equal = next(fault for fault in found if fault.key in {entry["fault"] for entry in equivalents()})
    a, b, c = [fault for fault in found if fault is not equal][:3]
    outcomes = {a: "tests/kernels/test_rotary.py::x", b: "signal 11", c: "", equal: ""}
    results = {fault.key: Result("killed" if by else "survived", by, 1.0) for fault, by in outcomes.items()}
    assert report([a, b, equal], results, {path: source}) == 0
    assert "| rotary | 3 | 1 | 1 | 1 | 0 |" in capsys.readouterr().out
    assert report([a, b, c, equal], results, {path: source}) == 1
    printed = capsys.readouterr().out
    assert "| rotary | 4 | 1 | 1 | 1 | 1 |" in printed and f"survived: {c.key}" in printed
    assert "2 of 3 killed, 66.7%; 1 equivalent" in printed
