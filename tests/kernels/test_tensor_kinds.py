"""Each public op is right on every kind of tensor or refuses it, and takes no address of one without memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensor_kinds import KINDS, cases

from phi_fast import kernels

SCRIPT = Path(__file__).parent / "tensor_kinds.py"
OPS = list(cases())
NO_OPS = {
    "BackendUnavailable", "accelerate", "fuse_rotary", "in_use", "keep_freed_memory", "keep_logits_on_chip", "restore",
    "rotary_table", "use", "FusedAdam",
}  # fmt: skip
"""Public names without tensors in their arguments, and the optimizer (`test_adam.py`)."""

REFUSED = {
    "wrapper that hands itself on": r"TypeError: Lying .*the C\+\+ kernels take plain tensors with memory",
    "func.grad": "NotImplementedError: {op} cannot be differentiated by torch.func",
    "func.jvp": "NotImplementedError: {op} cannot be differentiated by torch.func",
    "forward-mode AD": "NotImplementedError: {op} has no forward-mode derivative: use reverse mode",
    "DTensor": r"TypeError: {op}: \w+ is a DTensor; expected a plain tensor: pass \w+.to_local\(\)",
    "DTensor gradient": r"TypeError: {op}: grad\[0\] is a DTensor",
    "fake gradient": "AssertionError: Please convert all Tensors to FakeTensors first",
    "sparse": r"TypeError: {op}: \w+ is a tensor of layout torch.sparse_coo; .* pass \w+.to_dense\(\)",
    "mkldnn": r"TypeError: {op}: \w+ is a tensor of layout torch._mkldnn; .* pass \w+.to_dense\(\)",
    "nested": r"TypeError: {op}: \w+ is a nested tensor; .*to_padded_tensor\(0.0\)",
    "jagged": r"TypeError: {op}: \w+ is a nested tensor",
    "freed storage": r"ValueError: {op}: the storage of \w+ .* has been freed, .*; gather it first",
    "numpy": r"TypeError: {op}: \w+ is a ndarray; expected a torch.Tensor",
    # Halves of the wrapper are plain tensors, without memory.
    "gated_activation/wrapper that hands itself on": r"ValueError: gated_activation: \w+ is .* at no address; expected",
    "linear_cross_entropy/jit.trace": "RuntimeError: Tracing a list of bool type is currently not supported",
    "parallel_block/vmap": "RuntimeError: Batching rule not implemented for phi_fast::parallel_block",
    "parallel_block/batched gradients": "RuntimeError: Batching rule not implemented for phi_fast::parallel_block",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """ "op/kind" -> what happened."""
    found: dict[str, str] = {}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    while True:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([*command, *found], capture_output=True, text=True, timeout=300, env=environment)
        # torch 2.8's Gloo writes a line of its own to stdout.
        lines = [json.loads(line) for line in ended.stdout.splitlines() if not line.startswith("[Gloo]")]
        found |= dict(zip(lines[::2], lines[1::2], strict=False))
        if ended.returncode == 0:
            return found
        assert len(lines) % 2, ended.stderr
        found[lines[-1]] = f"died with status {ended.returncode}"


def test_every_public_op_is_here():
    assert {*OPS} == {*kernels.__all__} - NO_OPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_right_or_refused(op, kind, outcomes):
    expected = REFUSED.get(f"{op}/{kind}", REFUSED.get(kind))
    outcome = outcomes[f"{op}/{kind}"]
    if expected is None:
        assert outcome in ("right", "right shape")
    else:
        assert re.match(expected.format(op=op), outcome), outcome
