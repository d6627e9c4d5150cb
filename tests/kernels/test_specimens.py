"""The launches that codegen compiles are those that the launchers make."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import phi_fast.kernels.triton as package
from phi_fast.kernels.triton import rotary
from phi_fast.kernels.triton.common import recording
from phi_fast.kernels.triton.compiled import ARCHITECTURES
from phi_fast.kernels.triton.specimens import specimens, variants


def test_every_kernel_has_a_specimen() -> None:
    """A kernel is a jitted function that no other function calls."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    sources = {name: Path(package.__path__[0], f"{name}.py").read_text() for name in names}
    called = set(re.findall(r"(?<!def )\b(\w+)\(", "".join(sources.values())))
    jitted = {(name, f) for name, text in sources.items() for f in re.findall(r"@triton\.jit\ndef (\w+)\(", text)}
    kernels = {(name, function) for name, function in jitted if function not in called}
    assert len(kernels) >= 11
    found = {
        (specimen.launch.kernel.fn.__module__.rsplit(".", 1)[1], specimen.launch.kernel.fn.__name__)
        for specimen in specimens("sm_90", torch.float16)
    }
    assert found == kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specimens_are_launched_with_the_tiles_of_their_architecture(architecture: str) -> None:
    tiles = importlib.import_module("phi_fast.kernels.triton.attention_tiles")
    [launch] = [
        specimen.launch
        for specimen in specimens(architecture, torch.bfloat16)
        if specimen.name == "attention.dkv" and "head_dim 128" in specimen.note
    ]
    expected = tiles.tile("dkv", architecture, 128, 2, False, False)
    actual = (launch.constants["M"], launch.constants["N"], launch.num_warps, launch.num_stages)
    assert actual == tuple(expected)[:4]
    assert launch.constants["GROUP"] == 4 and launch.arguments["dk_pointer"].shape == (2, 2048, 4, 128)
    assert launch.signature()["q_pointer"] == "*bf16"


@pytest.mark.parametrize(("architecture", "described"), [("sm_80", False), ("sm_90", True), ("sm_100", True)])
def test_attention_by_descriptors_is_among_the_variants_where_they_are_fetched_in_hardware(
    architecture: str, described: bool
) -> None:
    found = {specimen.name for specimen in variants(architecture) if specimen.launch.constants.get("DESCRIPTORS")}
    assert found == ({"attention.forward", "attention.dq", "attention.dkv"} if described else set())


def test_meta_tensors_are_launched_only_where_launches_are_recorded() -> None:
    x, table = torch.empty(2, 3, 4, 64, device="meta"), torch.empty(3, 16, device="meta")
    with recording("sm_90") as launches:
        rotary.rotate_(x, table, table, 0)
        with recording("sm_80") as inner:
            rotary.rotate_(x, table, table, 0, inverse=True)
    assert [launch.constants["INVERSE"] for launch in (*launches, *inner)] == [False, True]
    with pytest.raises(RuntimeError, match=r"meta tensors, which have no memory: move them with \.to_empty\(\)"):
        rotary.rotate_(x, table, table, 0)


def test_variants_are_what_the_ops_accept() -> None:
    """Every value of every compile-time flag is compiled, and each dtype; no launch twice."""
    found = variants("sm_90")
    flags: dict[str, set] = {}
    dtypes: dict[str, set[str]] = {}
    for specimen in found:
        launch, name = specimen.launch, specimen.name
        for flag, value in launch.constants.items():
            flags.setdefault(f"{name} {flag}", set()).add(value)
        dtypes.setdefault(name, set()).update(launch.signature().values())
    assert len({(specimen.name, specimen.note) for specimen in found}) == len(found)
    for name in ("forward", "dq", "dkv"):
        assert flags[f"attention.{name} D"] == {64, 80, 96, 128}
        assert flags[f"attention.{name} HALF"] == {0, 16, 32, 64}
        assert flags[f"attention.{name} GROUP"] == {1, 4}
        for flag in ("CAUSAL", "VARLEN", "BANDED"):
            assert flags[f"attention.{name} {flag}"] == {False, True}, (name, flag)
    assert flags["linear_cross_entropy.loss_and_gradient HELD"] == {0, 8, 13}
    assert flags["linear_cross_entropy.loss HELD"] == {0}
    for key in (
        *("adam.step HAS_MASTER", "adam.step LR_IS_TENSOR", "adam.step DECOUPLED", "adam.step BIAS_CORRECTION"),
        *("bias_gelu.forward TANH", "bias_gelu.backward TANH", "rotary.forward INTERLEAVED"),
        *("gated_activation.forward SILU", "gated_activation.backward SILU"),
        *(f"linear_cross_entropy.loss_and_gradient {flag}" for flag in ("SMOOTH", "CAPPED", "SCALE_BY_ROW")),
    ):
        assert flags[key] == {False, True}, key
    for flag in ("SMOOTH", "CAPPED", "WHOLE"):
        assert flags[f"linear_cross_entropy.loss_on_chip {flag}"] == {False, True}, flag
    assert flags["muon.symmetric_product WHOLE"] == {False, True}
    for name, types in dtypes.items():
        wanted = {"*bf16", "*fp32"} if name.startswith("muon") else {"*fp16", "*bf16", "*fp32"}
        assert name.startswith("adam") or wanted <= types, name
    assert {str(value) for value in flags["adam.step PARAM"]} == {"fp16", "bf16", "fp32"}
