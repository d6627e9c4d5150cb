"""A launch as the compiler gets it: types, constants and alignments, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from phi_fast.kernels.triton.common import Launch


def described(constants: dict[str, Any] | None = None, **arguments: Any) -> Launch:
    constants = constants or {}
    kernel = SimpleNamespace(arg_names=[*arguments, *constants])
    return Launch(kernel, (1,), dict(reversed(arguments.items())), constants)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "i32"),
        (2, "i32"),
        (-(2**31), "i32"),
        (2**31 - 1, "i32"),
        (-(2**31) - 1, "i64"),
        (2**31, "i64"),
        (1, "constexpr"),
        (True, "constexpr"),
        (None, "constexpr"),
        (1.0, "fp32"),
        (torch.empty(0, dtype=torch.bfloat16), "*bf16"),
        (torch.empty(0, dtype=torch.int64), "*i64"),
        (torch.empty(0, dtype=torch.bool), "*i1"),
    ],
    ids=str,
)
def test_types(value: Any, expected: str) -> None:
    launch = described({"BLOCK": 16}, first=7, value=value)
    assert list(launch.signature().items()) == [("first", "i32"), ("value", expected), ("BLOCK", "constexpr")]
    known = {"value": value} if expected == "constexpr" else {}
    assert launch.constexprs() == {**known, "BLOCK": 16}


def test_multiples_of_16() -> None:
    """Bytes of addresses and of offsets into them; an int that is 1, and a bool, are constants."""
    halves, floats = torch.empty(64, dtype=torch.float16), torch.empty(64, dtype=torch.float32, device="meta")
    aligned = {"halves": halves, "halves_8": halves[8:], "floats_4": floats[4:], "zero": 0, "n": 48}
    others = {"halves_1": halves[1:], "halves_4": halves[4:], "floats_2": floats[2:], "one": 1, "eight": 8, "x": 16.0}
    more = {"n_17": 17, "nothing": None, "no": False}
    attributes = described(**others, **aligned, **more).attributes()
    first = len(others)
    assert attributes == {(first + i,): [["tt.divisibility", 16]] for i in range(len(aligned))}


def test_an_address_between_multiples_of_16() -> None:
    memory = torch.empty(64, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    for offset, expected in ((0, True), (1, False), (8, False), (15, False), (16, True)):
        storage = torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=start + offset)
        assert bool(described(x=storage).attributes()) == expected, offset
