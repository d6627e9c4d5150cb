"""The table of measured tiles: where it lies, when it is used, and that a bad one never ends a step."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from phi_fast.kernels import backend, tuned, use
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.triton import attention_tiles, tiles
from phi_fast.kernels.triton.attention_tiles import Tile

GPU, CUDA = "NVIDIA H100 80GB HBM3", torch.device("cuda", 0)
CASE = attention_tiles.Case(64, "float16", 0, "causal", False, 1, 2048)
BY_HAND, MEASURED = Tile(64, 64, 4, 2), Tile(128, 32, 8, 3)
DQ = attention_tiles.KERNELS["dq"]


def entry(**other: Any) -> dict[str, Any]:
    return {"kernel": "attention.dq", "case": CASE._asdict(), "tile": MEASURED._asdict(), **other}


def document(**other: Any) -> dict[str, Any]:
    head = {"version": tuned.VERSION, "gpu": GPU, "architecture": "sm_90", "triton": triton.__version__}
    return {**head, "tiles": [entry()], "backends": [], **other}


def tile(case: Any = CASE, kernel: tiles.Tunable = DQ, device: torch.device = CUDA) -> Any:
    """What a launch gets."""
    return kernel.tile(device, BY_HAND, lambda: case)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that has a name and nothing else."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    tiles.forget()
    yield
    tiles.forget()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the environment says that the table is."""
    path = tmp_path / "table.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    return path


def test_a_measured_tile_is_used_for_its_case_only(table: Path) -> None:
    tuned.write(table, document())
    assert tile() == MEASURED
    others = {"head_dim": 128, "dtype": "bfloat16", "rotation": 32, "mask": "full", "documents": True, "group": 4}
    for field, value in {**others, "length": 4096}.items():
        assert tile(CASE._replace(**{field: value})) == BY_HAND, field
    assert tile(kernel=attention_tiles.KERNELS["dkv"]) == BY_HAND
    assert tile(device=torch.device("cpu")) == tile(device=torch.device("meta")) == BY_HAND
    assert backend.tiles(CUDA) == f"1 tiles measured on {GPU}, from {table}"
    assert backend.tiles("cpu") == "chosen by hand"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is damaged"),
        (b'{"version": 1', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (json.dumps(document()).encode()[:-9], "is damaged"),
        (json.dumps(document(tiles=[entry(milliseconds=float("nan"))])).encode(), "NaN is not JSON"),
        (b"[" * 100000, "is damaged"),
        (b"[]", "is not a table of version 1"),
        (b"null", "is not a table of version 1"),
        (json.dumps(document(version=2)).encode(), "is not a table of version 1"),
        (json.dumps(document(gpu=None)).encode(), "is not a table of version 1"),
        (json.dumps(document(tiles={"a": 1})).encode(), "must be lists of objects"),
        (json.dumps(document(tiles=[3])).encode(), "must be lists of objects"),
        (
            json.dumps(document(gpu="NVIDIA A100")).encode(),
            "measured with gpu NVIDIA A100, and this is NVIDIA H100",
        ),
        (json.dumps(document(triton="3.4.0")).encode(), "was measured with triton 3.4.0, and this is"),
    ],
)
def test_a_table_that_cannot_be_used_is_a_warning_that_names_it(table: Path, content: bytes, why: str) -> None:
    table.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=why) as told:
        assert tile() == BY_HAND
    assert str(table) in str(told[0].message) and "chosen by hand" in str(told[0].message)
    assert backend.tiles(CUDA).startswith("chosen by hand: ") and str(table) in backend.tiles(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile() == BY_HAND, "it is said once"


def test_a_table_that_is_too_large_is_not_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_LARGEST", 1 << 20)
    table.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.warns(RuntimeWarning, match="more than 1 MiB"):
        assert tile() == BY_HAND


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "FIFO"])
def test_what_is_no_file_is_not_waited_for(table: Path, make: Callable[[Path], None]) -> None:
    make(table)
    with pytest.warns(RuntimeWarning, match=r"table\.json is not a regular file"):
        assert tile() == BY_HAND


@pytest.mark.parametrize(
    "bad",
    [
        {"tile": {"m": 48, "n": 32, "warps": 8, "stages": 3}},
        {"tile": {"m": "64", "n": 32, "warps": 8, "stages": 3}},
        {"tile": {"m": 64.0, "n": 32, "warps": 8, "stages": 3}},
        {"tile": {"m": True, "n": 32, "warps": 8, "stages": 3}},
        {"tile": {"m": 64, "n": 32, "warps": 8}},
        {"tile": {**MEASURED._asdict(), "no_such_variant": True}},
        {"tile": None},
        {"tile": []},
        {"case": {}},
        {"case": None},
        {"case": {**CASE._asdict(), "length": "2048"}},
        {"case": {**CASE._asdict(), "documents": 0}},
    ],
    ids=str,
)
def test_an_entry_that_these_kernels_do_not_have_is_left_out(table: Path, bad: dict[str, Any]) -> None:
    other = CASE._replace(length=512)
    tuned.write(table, document(tiles=[entry(**bad), entry(case=other._asdict())]))
    with pytest.warns(RuntimeWarning, match="this entry is not used: measure again") as told:
        assert tile() == BY_HAND
    assert str(table) in str(told[0].message)
    assert tile(other) == MEASURED


def test_a_named_file_that_is_missing_is_said_and_one_in_the_cache_folder_is_not(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RuntimeWarning, match=r"PHI_FAST_TUNED: there is no file .*table\.json"):
        assert tile() == BY_HAND
    tiles.forget()
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile() == BY_HAND
    assert "python -m phi_fast.kernels.tune measures" in backend.tiles(CUDA)


def test_where_the_table_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.place(GPU) == tmp_path / "phi_fast" / "tuned" / "NVIDIA-H100-80GB-HBM3.json"
    assert tuned.place("../NVIDIA/x") == tmp_path / "phi_fast" / "tuned" / "NVIDIA-x.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.place(GPU) == tmp_path / ".cache" / "phi_fast" / "tuned" / "NVIDIA-H100-80GB-HBM3.json"
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.place(GPU) is None
    assert backend.tiles(CUDA) == "chosen by hand"


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "table.json"
    tuned.write(path, document())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tuned.write(path, document(tiles=[]))
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


FLASH = "phi_fast.kernels.vendor.flash_attn_attention"


def backends(fastest: str) -> dict[str, Any]:
    return document(backends=[{"op": "attention", "case": CASE._asdict(), "backend": fastest, "milliseconds": {}}])


def on_a_gpu(*shape: int) -> Any:
    """What is looked at of a tensor on a GPU before it is launched."""
    return SimpleNamespace(device=CUDA, shape=shape, dtype=torch.float16)


def module_for(length: int = 2048, **options: Any) -> Any:
    x = on_a_gpu(4, length, 32, 64)
    return backend.attention_for(x, x, AttentionOptions(0.125, **options))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A flash-attn that is installed."""
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, FLASH, module)
    return module


def test_auto_takes_the_fastest_back_end_for_its_case_only(table: Path, flash: Any) -> None:
    tuned.write(table, backends("flash-attn"))
    triton_module = backend.module("triton", "attention")
    assert module_for() is flash
    assert module_for(length=512) is triton_module and module_for(causal=False) is triton_module
    assert module_for(window=(256, 0)) is triton_module
    with use("triton", op="attention"):
        assert module_for() is triton_module, "a choice of the user's goes first"
    with use("reference"):
        assert module_for() is backend.module("reference", "attention")


@pytest.mark.parametrize("chosen", ["triton", ""])
def test_triton_runs_where_it_was_the_fastest_or_nothing_was_measured(table: Path, chosen: str, flash: Any) -> None:
    tuned.write(table, backends(chosen) if chosen else document())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module_for() is backend.module("triton", "attention")


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("sdpa", "'sdpa' is not one of triton, flash-attn"),  # its backward may give other bits in each run
        ("os", "'os' is not one of triton, flash-attn"),
        ("flash-attn-3", "FlashAttention-3 cannot be imported"),  # it was there when it was measured
    ],
)
def test_a_back_end_that_cannot_be_used_is_a_warning(
    table: Path, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    sys.modules.pop("phi_fast.kernels.vendor.flash_attn_3_attention", None)
    tuned.write(table, backends(chosen))
    with pytest.warns(RuntimeWarning, match=why) as told:
        assert module_for() is backend.module("triton", "attention")
    assert str(table) in str(told[0].message) and "attention runs in Triton" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module_for()
