"""`make prove` finds faults: kernels of `kernels/triton` are broken one line at a time, and stopped at that line.

In Triton's interpreter most of these pass their tests: it runs programs one after the other, reads what lies past a
tensor's end, and finds zeros where nobody wrote.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from ttsem import memory
from ttsem.sanitize import KernelFault

from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.triton import adam, attention, bias_gelu, layer_norm, linear_cross_entropy
from prove.semantics import Tally, session


@dataclass(frozen=True)
class Break:
    """One line of a kernel as it is and broken, what then must be found, and the line at which."""

    module: str
    line: str
    broken: str
    found: str
    run: Callable[[ModuleType], object]
    at: str = ""
    """The line of the fault where it is not the broken one."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def layer_norm_passes(module: ModuleType) -> None:
    x, weight, bias = normal(99, 48), normal(48), normal(48)
    _, mean, rstd = module.forward(x, weight, bias, 1e-5)
    module.backward(normal(99, 48), x, weight, mean, rstd)


def bias_gelu_forward(module: ModuleType) -> None:
    module.forward(normal(5, 64), normal(64))


def bias_gelu_of_slices(module: ModuleType) -> None:
    """The middle third of a packed buffer: what lies beside it is memory, but not the op's."""
    module.forward(normal(32, 144)[:, 48:96], None)


def column_sums(module: ModuleType) -> None:
    module._column_sums_launch(module.SumsTile(64, 64, 4), normal(8, 200), torch.zeros(200))()


def adam_step(module: ModuleType) -> None:
    lists = AdamLists([normal(4000)], [normal(4000)], [normal(4000)], [normal(4000).abs()])
    module.step_(lists, AdamOptions(torch.ones(()), 1e-3, (0.9, 0.95), 1e-8, 0.1, decoupled=True))


def attention_passes(head_dim: int = 64, packed: bool = False, **kernels: object) -> None:
    """packed: as slices of one buffer, with other memory after each head's dims."""
    beside = 48 if packed else 0
    q, k, v, dout = (normal(1, 70, 2, head_dim + beside)[..., :head_dim] for _ in range(4))
    options = AttentionOptions(0.125, True, None, None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in kernels.items():
            patch.setitem(attention._KERNELS, name, kernel)
        out, lse = attention.forward(q, k, v, options)
        dq, dk, dv = (torch.empty_like(q) for _ in "qkv")
        attention.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)


BREAKS = {
    "reads past the end": Break(
        "layer_norm",
        "    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)",
        "    v = tl.load(x + row * x_stride + column).to(tl.float32)",
        "oob_read",
        layer_norm_passes,
    ),
    "reads past the end of memory known by address": Break(
        "adam",
        "        inside = at < end",
        "        inside = at <= end",
        "oob_read",
        adam_step,
        at="        p = tl.load(masters + at, mask=inside).to(tl.float32)",
    ),
    "writes past the end": Break(
        "bias_gelu",
        "        tl.store(out + row[:, None] * out_stride + column[None, :], result, mask=inside)",
        "        tl.store(out + row[:, None] * out_stride + column[None, :], result)",
        "oob_write",
        bias_gelu_forward,
    ),
    "reads keys past the end": Break(
        "attention_forward",
        "            x = tl.load(at, mask=inside((row + tl.arange(0, ROWS) < end)[:, None], D, WIDTH), other=0.0)",
        "            x = tl.load(at)",
        "oob_read",
        lambda broken: attention_passes(forward=broken.forward_kernel),
    ),
    "reads dims past the end": Break(
        "attention_forward",
        "        rows = rows & (tl.arange(0, WIDTH) < D)[None, :]",
        "        rows = rows & (tl.arange(0, WIDTH) < WIDTH)[None, :]",
        "oob_read",
        lambda broken: attention_passes(80, forward=broken.forward_kernel),
        at="    q = tl.load(q_tile, mask=inside((rows < sequence)[:, None], D, WIDTH), other=0.0)",
    ),
    "reads past a head's dims where all rows exist": Break(
        "attention_forward",
        "            x = tl.load(at, mask=(tl.arange(0, WIDTH) < D)[None, :], other=0.0)",
        "            x = tl.load(at)",
        "beside the tensors passed",
        lambda broken: attention_passes(80, packed=True, forward=broken.forward_kernel),
    ),
    "writes past a head's dims": Break(
        "attention_backward",
        "    tl.store(dq_tile + local * stride_dq_s + dims, narrow(dq, dq_pointer.dtype.element_ty), mask=stored)",
        "    tl.store(dq_tile + local * stride_dq_s + dims, narrow(dq, dq_pointer.dtype.element_ty), mask=local >= 0)",
        "oob_write",
        lambda broken: attention_passes(80, dq=broken.dq_kernel),
    ),
    "reads beside a slice": Break(
        "bias_gelu",
        "        v = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)",
        "        v = tl.load(x + row[:, None] * x_stride + column[None, :]).to(tl.float32)",
        "beside the tensors passed",
        bias_gelu_of_slices,
    ),
    "programs write one row": Break(
        "layer_norm",
        "    at = partial + program.to(tl.int64) * d + own",
        "    at = partial + own",
        "race",
        layer_norm_passes,
        at="    tl.store(at, tl.sum(dweight, axis=0), mask=own < d)",
    ),
    "programs add to shared columns": Break(
        "linear_cross_entropy",
        "    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)",
        "    columns = tl.program_id(0) * (BLOCK_COLUMNS - 1) + tl.arange(0, BLOCK_COLUMNS)",
        "race",
        column_sums,
        at="    tl.store(sums + columns, old + tl.sum(total, axis=0), mask=columns < vocab)",
    ),
    "row blocks share their statistics": Break(
        "attention_backward",
        "    statistics = batch_head.to(tl.int64) * sequence + rows",
        "    statistics = batch_head.to(tl.int64) * sequence + tl.arange(0, M)",
        "race",
        lambda broken: attention_passes(dq=broken.dq_kernel),
        at="    tl.store(delta_pointer + statistics, delta, mask=rows < sequence)",
    ),
    "reads what forward did not write": Break(
        "layer_norm",
        "        tl.store(mean + row, mu)",
        "        tl.store(mean + row, mu, mask=row > 0)",
        "nobody wrote",
        layer_norm_passes,
        at="        mu = tl.load(mean + row, mask=row < rows, other=0.0)",
    ),
    "reads what the other kernel did not write": Break(
        "attention_backward",
        "    tl.store(delta_pointer + statistics, delta, mask=rows < sequence)",
        "    tl.store(delta_pointer + statistics, delta, mask=rows < sequence - 1)",
        "nobody wrote",
        lambda broken: attention_passes(dq=broken.dq_kernel, dkv=broken.dkv_kernel),
        at="        delta = tl.load(delta_row + member * sequence + rows, mask=within, other=0.0)",
    ),
}


def broken_module(fault: Break, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Path]:
    """The module with its line broken, and its file."""
    original = Path(adam.__file__).with_name(f"{fault.module}.py")
    lines = original.read_text(encoding="utf-8").splitlines()
    assert lines.count(fault.line) == 1, f"{original} has {lines.count(fault.line)} lines {fault.line!r}"
    lines[lines.index(fault.line)] = fault.broken
    path = folder / original.name
    path.write_text("\n".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{adam.__package__}.broken_{fault.module}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module, path


@pytest.mark.parametrize("fault", BREAKS.values(), ids=BREAKS)
def test_a_broken_triton_kernel_is_stopped_at_its_line(
    fault: Break, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = broken_module(fault, tmp_path, monkeypatch)
    with session({}, lambda: "", adam=module if fault.module == "adam" else adam), pytest.raises(KernelFault) as stop:
        fault.run(module)
    found = stop.value.fault
    assert fault.found == found.kind or fault.found in found.detail
    assert (found.source_file, found.source_text) == (str(path), (fault.at or fault.broken).split("  #")[0].strip())


def test_a_triton_launch_too_large_for_the_check_for_races_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs write the halves of each row: past ttsem's budget it keeps ranges of addresses, and these meet."""
    x = normal(8, 2 * bias_gelu.COLUMNS)
    for budget, unchecked in ((memory.ACCESS_BUDGET, {}), (100, {"this test": 1})):
        monkeypatch.setattr(memory, "ACCESS_BUDGET", budget)
        tallies: dict[str, Tally] = {}
        with session(tallies, lambda: "this test"):
            bias_gelu.forward(x, None)
        assert tallies == {"bias_gelu._forward": Tally(1, 0, Counter(unchecked))}


def test_the_same_triton_kernels_whole_are_not_stopped() -> None:
    with session({}, lambda: ""):
        layer_norm_passes(layer_norm)
        bias_gelu_forward(bias_gelu)
        bias_gelu_of_slices(bias_gelu)
        column_sums(linear_cross_entropy)
        adam_step(adam)
        for head_dim in (64, 80):
            attention_passes(head_dim)
            attention_passes(head_dim, packed=True)
