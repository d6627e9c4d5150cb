"""The tables in docs/kernels.md agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import phi_fast.kernels
from phi_fast.kernels.transformers.families import FAMILIES, Family

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_has_its_row(family: Family) -> None:
    [row] = [line for line in PAGE.splitlines() if line.startswith("| ") and f"| `{family.model}` |" in line]
    *_, on_ops, stays, _ = row.split("|")
    for name, replacement in family.replaced.items():
        if name != family.model:
            assert f"`{name}` {replacement.ops}" in on_ops
    assert "loss" in on_ops
    named = set(re.findall(r"`(\w+)`", on_ops))
    assert named <= {*family.replaced, "LayerNorm"}
    assert set(re.findall(r"`(\w+)`", stays)) == set(family.left)


def test_each_op_has_its_row_and_each_row_is_an_op() -> None:
    table = PAGE[: PAGE.index("32 is float32")]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    others = {
        "BackendUnavailable",
        "accelerate",
        "fuse_rotary",
        "keep_logits_on_chip",
        "in_use",
        "keep_freed_memory",
        "restore",
        "rotary_table",
        "use",
    }
    assert rows == set(phi_fast.kernels.__all__) - others
    assert all(f"{name}(" in PAGE for name in others - {"BackendUnavailable"})
