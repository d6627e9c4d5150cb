"""A valid call of each entry of `phi_fast._C.cpu` that takes tensors, and invalid ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi_fast._C import cpu
from phi_fast.kernels.cpp._tensors import described

ROWS, COLUMNS, BATCH, SEQUENCE, HEADS, HEAD_DIM, HALF = 5, 37, 2, 7, 4, 20, 9
FP32, BF16, INT64, INT32 = torch.float32, torch.bfloat16, torch.int64, torch.int32


@dataclass
class Entry:
    """A call, with its arguments by name and in order. Tensors, also those in lists and in lists of tuples, are
    replaced by their descriptions when the entry is called."""

    name: str
    arguments: dict[str, Any]
    wrong: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further invalid calls: name -> the arguments that differ."""
    same_dtype: bool = True
    """Whether every floating tensor must have the dtype of the others."""
    any_shape: bool = False
    """Whether only the number of elements counts."""
    free: frozenset[tuple[str, int]] = frozenset()
    """(argument, dim) pairs whose size no other argument determines."""
    needs: Callable[[], bool] = lambda: True
    """Whether this machine can run the valid call."""

    def placed(self, place: Callable[[Tensor], Tensor]) -> Entry:
        """The same call, with each tensor in the memory that `place` gives it."""
        return replace(self, arguments={name: _each(place, value) for name, value in self.arguments.items()})

    def call(self, **different: Any) -> Any:
        """Make the call, with some arguments replaced by other tensors or descriptions."""
        given = self.arguments | different
        return getattr(cpu, self.name)(*(_each(partial(described, self.name), value) for value in given.values()))


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(change, part) for part in value) if isinstance(value, list | tuple) else value


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def matrix(dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """A matrix with gaps between its rows."""
    return torch.cat((randn(rows, columns), randn(rows, 3)), 1).to(dtype)[:, :columns]


def heads(dtype: torch.dtype, sequence: int = SEQUENCE, count: int = HEADS, batch: int = BATCH) -> Tensor:
    return randn(batch, sequence, count, HEAD_DIM + 3, dtype=dtype)[..., :HEAD_DIM]


def integers(*numbers: int, dtype: torch.dtype = INT64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def row_entries(dtype: torch.dtype) -> Iterator[Entry]:
    x, vector = (lambda: matrix(dtype)), (lambda: randn(COLUMNS))
    rows = {"mean": randn(ROWS), "rstd": randn(ROWS)}
    arguments = {"x": x(), "residual": x(), "summed": x(), "out": x(), "shifted": x(), "weight": vector()}
    arguments |= {"bias": vector(), "shift": vector(), "eps": 1e-5, **rows, "threads": 1}
    nowhere = {"a sum that goes nowhere": {"summed": None}, "a shift that goes nowhere": {"shifted": None}}
    first = arguments
    yield Entry("layer_norm_forward", arguments, nowhere)
    arguments = {"dy": x(), "x": x(), "residual_grad": x(), "dx": x(), "weight": vector(), **rows}
    second = arguments | {"dweight": vector(), "dbias": vector(), "threads": 1}
    yield Entry("layer_norm_backward", second)
    without = {"residual": None, "summed": None, "shift": None, "shifted": None}
    yield Entry("layer_norm_forward", first | without | {"bias": None, "mean": None})
    yield Entry("layer_norm_backward", second | {"mean": None, "dbias": None})
    yield Entry("bias_gelu_forward", {"tanh": True, "x": x(), "out": x(), "bias": vector(), "threads": 1})
    arguments = {"tanh": False, "dout": x(), "x": x(), "dx": x(), "activation": x(), "bias": vector()}
    yield Entry("bias_gelu_backward", arguments | {"dbias": vector(), "threads": 1})
    for silu in (True, False):
        yield Entry("gated_activation_forward", {"silu": silu, "gate": x(), "up": x(), "out": x(), "threads": 1})
        operands = {name: x() for name in ("dout", "gate", "up", "dgate", "dup")}
        yield Entry("gated_activation_backward", {"silu": silu, **operands, "threads": 1})


def position_entries(dtype: torch.dtype) -> Iterator[Entry]:
    table = {"cos": randn(SEQUENCE + 1, HALF), "sin": randn(SEQUENCE + 1, HALF)}
    too_wide = dict.fromkeys(("cos", "sin"), randn(SEQUENCE + 1, HEAD_DIM // 2 + 1))
    short = dict.fromkeys(("cos", "sin"), randn(SEQUENCE - 1, HALF))
    options = {"interleaved": False, "inverse": False, "threads": 1}
    wrong = {f"offset {n}": {"offset": n} for n in (-1, 2, 2**62, -(2**63))} | {"a table too wide": too_wide}
    free = frozenset({("x", 0), ("x", 1), ("x", 2), ("x", 3)})
    yield Entry(
        "rotary", {"x": heads(dtype), **table, "positions": None, "offset": 1, **options}, wrong, False, free=free
    )
    positions = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % (SEQUENCE + 1)
    place = integers(1), integers(SEQUENCE - 1)
    numbers = (-1, SEQUENCE + 1, 2**62)
    wrong = {f"position {n}": {"positions": positions.index_put(place, integers(n))} for n in numbers}
    arguments = {"x": heads(dtype), **table, "positions": positions, "offset": 0, **options, "interleaved": True}
    yield Entry("rotary", arguments, wrong, same_dtype=False, free=frozenset({("x", 2), ("x", 3)}))

    for backward in (False, True):
        q, k = (lambda: heads(dtype)), (lambda: heads(dtype, SEQUENCE + 1, 2))
        tensors = [q(), k(), k(), q(), q(), q(), k(), k()][: 8 if backward else 4]
        arguments = {"tensors": tensors, "lse": randn(BATCH, HEADS, SEQUENCE), "documents": None, **table}
        arguments |= {"scale": 0.3, "least": -SEQUENCE, "most": 1, "threads": 1}
        bands = {"least": (-SEQUENCE - 1, 2, -(2**63)), "most": (0, SEQUENCE + 2, 2**63 - 1)}
        wrong = {f"{side} {n}": {side: n} for side, numbers in bands.items() for n in numbers}
        wrong |= {"a table too wide": too_wide, "a short table": short, "cos alone": {"sin": None}}
        wrong |= {f"{n} tensors": {"tensors": (tensors * 3)[:n]} for n in (0, 3, 5, 9)}
        ends = integers(0, SEQUENCE, dtype=INT32)
        yield Entry("attention", arguments, wrong | {"documents in a batch": {"documents": ends}})

        tensors = [heads(dtype, batch=1, count=n) for n in (4, 2, 2, 4, 4, 4, 2, 2)][: len(tensors)]
        ends = [(0, 3, 9), (0, 3), (1, 7), (0, 5, 3, 7), (0, -1, 7), (0, 2**31 - 1, 7), (7,), ()]
        wrong = {f"documents {numbers}": {"documents": integers(*numbers, dtype=INT32)} for numbers in ends}
        tables = {name: x[:4] for name, x in table.items()}
        wrong["a document longer than the table"] = {"documents": integers(0, 2, 7, dtype=INT32)}
        packed = {"tensors": tensors, "lse": randn(1, HEADS, SEQUENCE), "documents": integers(0, 3, 3, 7, dtype=INT32)}
        arguments = arguments | packed | tables | {"most": 0}
        yield Entry("attention", arguments, wrong, free=frozenset({("documents", 0)}))


def other_entries(dtype: torch.dtype) -> Iterator[Entry]:
    vector = {"bias": randn(COLUMNS), "class_weight": randn(COLUMNS).abs(), "mean_weight": 1.0, "ignore_index": -100}
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    for scale in (randn(ROWS), torch.ones(())):
        arguments = {"logits": matrix(dtype), "labels": integers(0, -100, COLUMNS - 1, 3, 4), **vector, **numbers}
        arguments |= {"scale": scale, "need_grad": True, "dbias": randn(COLUMNS), "losses": randn(ROWS), "threads": 1}
        yield Entry("cross_entropy", arguments, same_dtype=False)
    for scale in (randn(ROWS), torch.ones(())):
        arguments = {"hidden": matrix(BF16, columns=45), "weight": matrix(BF16, COLUMNS, 45)}
        arguments |= {"labels": integers(0, -100, COLUMNS - 1, 3, 4), **vector, **numbers, "scale": scale}
        arguments |= {"dhidden": randn(ROWS, 45), "dweight": randn(COLUMNS, 45), "add": True, "dbias": randn(COLUMNS)}
        arguments |= {"losses": randn(ROWS), "threads": 1}
        yield Entry("linear_cross_entropy", arguments, same_dtype=False, needs=cpu.has_linear_cross_entropy)
    x, out = randn(ROWS, COLUMNS, dtype=dtype), randn(ROWS, COLUMNS)
    arguments = {"x": x, "out": out, "factor": 2.0, "add": True, "threads": 1}
    yield Entry("scaled", arguments, same_dtype=False)
    a, b, out = matrix(BF16), matrix(BF16, columns=45), matrix(dtype, COLUMNS, 45)
    arguments = {"a": a, "b": b, "out": out, "add": True, "threads": 1}
    yield Entry("weight_gradient", arguments, same_dtype=False, needs=cpu.has_weight_gradient)
    steps = [(randn(n, dtype=dtype), randn(n), *(randn(n).abs() for _ in range(3))) for n in (9, COLUMNS)]
    numbers = dict.fromkeys(("scale", "beta1", "beta2", "step", "root", "eps", "l2", "keep"), 0.5)
    yield Entry("adam", {"tensors": steps, **numbers, "threads": 1}, any_shape=True)
    arguments = {"grad": randn(COLUMNS, dtype=dtype), "momentum": randn(COLUMNS), "direction": randn(COLUMNS).to(dtype)}
    arguments |= {"grad_scale": 0.5, "beta": 0.9, "nesterov": True, "threads": 1}
    yield Entry("muon_momentum", arguments, same_dtype=False, any_shape=True)
    arguments = {"param": randn(COLUMNS, dtype=dtype), "update": randn(COLUMNS, dtype=dtype)}
    arguments |= {"momentum": randn(COLUMNS), "master": randn(COLUMNS), "rate": 0.1, "keep": 0.9, "threads": 1}
    yield Entry("muon_update", arguments, same_dtype=False, any_shape=True)
    grads = [randn(9, dtype=dtype), randn(COLUMNS, dtype=dtype)]
    free = frozenset({("grads", 0)})
    yield Entry("grad_norm_squared", {"grads": grads, "threads": 1}, any_shape=True, free=free)


def entries(dtype: torch.dtype = FP32) -> list[Entry]:
    return [*row_entries(dtype), *position_entries(dtype), *other_entries(dtype)]
