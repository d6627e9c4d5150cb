"""The page of a GPU's day: every figure in it is the file's."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.gpu.page import milliseconds, page, predictions

SUBJECT = {
    "name": "rotary, fp16, forward",
    "config": {"batch": 4},
    "rows": [
        {"name": "torch eager", "seconds": [0.004, 0.004, 0.004], "note": "", "extra": {}},
        {"name": "phi_fast triton", "seconds": [0.001, 0.002, 0.009], "note": "", "extra": {"GB/s": 2500.1}},
        {"name": "Liger-Kernel", "seconds": None, "note": "not installed", "extra": {}},
    ],
}
PROFILE = [{"kernel": "adam", "ms": 12.5, "launches": 1, "bound ms": 10.0, "of bound": "80%"}]
PROFILE += [{"kernel": "copies", "ms": 1.5, "launches": 9, "bound ms": None, "of bound": None}]
DOCUMENT: dict[str, Any] = {
    "machine": {"device": "NVIDIA X", "python": "3.12.3", "gpu": {"L2 MB": 50}}
    | {"versions": {"torch": "2.11.0+cu130", "flash-attn": "not installed"}},
    "commit": "abc1234",
    "dry": False,
    "budget_s": 600.0,
    "began": "2026-11-28T10:00:00",
    "predicted": None,
    "stages": {
        "kernels": {"title": "Kernels", "state": "done", "reason": "", "seconds": 60.4}
        | {"results": {SUBJECT["name"]: SUBJECT, "benchmarks that did not end": "none"}},
        "step": {"title": "Step", "state": "stopped", "reason": "its time was up", "seconds": 99.0}
        | {"results": {"profile": PROFILE, "memory": {"allocated": 12345678, "planned": None}, "whole": False}},
        "trainer": {"title": "Trainer", "state": "not measured", "reason": "not reached", "seconds": None}
        | {"results": {}},
    },
}


def test_the_page_has_the_files_figures_and_says_what_it_lacks() -> None:
    lines = page(DOCUMENT).splitlines()
    assert lines[0] == "# NVIDIA X"
    assert "- L2 MB: 50" in lines
    assert "- versions: torch 2.11.0+cu130" in lines
    assert "| 1. Kernels | done | 60 |" in lines
    assert "| 3. Trainer | not measured |  |" in lines
    assert "| phi_fast triton | 2.00 | 200% | 1.00 | 2,500.1 |  |" in lines
    assert "| Liger-Kernel | not measured |  |  |  | not installed |" in lines
    assert "| adam | 12.5 | 1 | 10 | 80% |" in lines
    assert "| copies | 1.5 | 9 | not measured | not measured |" in lines
    assert "Stopped: its time was up" in lines
    assert "Not measured: not reached" in lines
    assert {"- allocated: 12,345,678", "- planned: not measured", "- whole: no"} <= set(lines)
    assert "## Measured ÷ predicted" not in lines


def test_a_dry_run_says_that_it_is_one() -> None:
    assert "no figure here means anything" in page(DOCUMENT | {"dry": True}).splitlines()[0]


def test_what_was_predicted_is_held_against_what_was_measured() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["predicted"] = {"rotary, fp16, forward": 1.6, "profile, adam": 10.0, "never measured": 3.0}
    assert milliseconds(document) == {
        "rotary, fp16, forward": 2.0,
        "profile, adam": 12.5,
        "profile, copies": 1.5,
    }
    assert predictions(document) == [
        ("rotary, fp16, forward", 1.6, 2.0),
        ("profile, adam", 10.0, 12.5),
        ("never measured", 3.0, None),
    ]
    lines = page(document).splitlines()
    assert "| rotary, fp16, forward | 1.6 | 2 | 1.25 |" in lines
    assert "| never measured | 3 | not measured | not measured |" in lines
    assert "Mean error, |measured ÷ predicted − 1|: 25% over 2." in lines


def test_text_of_a_failure_breaks_no_table() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["stages"]["trainer"]["results"] = {"failures": [{"test": "a", "error": "E  x | y\nE  z"}]}
    assert "| a | E  x \\| y E  z |" in page(document).splitlines()


@pytest.mark.parametrize("state", ["done", "failed", "stopped", "running", "not measured"])
def test_every_state_has_its_words(state: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["stages"]["trainer"]["state"] = state
    assert f"| 3. Trainer | {state} |  |" in page(document).splitlines()


def test_a_table_of_tiles_is_a_row_for_each_kernel_and_a_line_for_each_choice_of_a_back_end() -> None:
    entry = {"kernel": "attention.dq", "case": {"head_dim": 64, "mask": "causal"}, "tile": {"m": 64, "warps": 4}}
    entry |= {"milliseconds": 0.5, "by_hand_milliseconds": 0.75, "timed": 12}
    backend = {"op": "attention", "case": {"head_dim": 64}, "backend": "triton"}
    backend |= {"milliseconds": {"triton": 1.5, "sdpa": 2.0}}
    document = copy.deepcopy(DOCUMENT)
    document["stages"]["step"]["results"]["table"] = {"version": 1, "tiles": [entry], "backends": [backend]}
    lines = page(document).splitlines()
    assert "| attention.dq | head_dim 64, mask causal | m 64, warps 4 | 0.5 | 0.75 | 1.50× | 12 |" in lines
    assert "- attention, head_dim 64, ms: triton 1.5, sdpa 2" in lines
