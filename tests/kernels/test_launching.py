"""Launches that are kept ready get the arguments that Triton would bind, and each is used only where it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.reference.layer_norm import ResidualStream
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.triton import (
    adam,
    attention,
    attention_tiles,
    bias_gelu,
    gated_activation,
    launching,
    layer_norm,
    linear_cross_entropy,
    rotary,
)
from phi_fast.kernels.triton.common import Launch

MODULES = (adam, attention, bias_gelu, gated_activation, layer_norm, linear_cross_entropy, rotary)


class Compiled:
    """A stand-in for Triton's compiled kernel that records the arguments of each launch."""

    def __init__(self, launch: Launch, log: list[tuple]) -> None:
        self.launch, self.log = launch, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.log.append((self.launch.kernel, grid, arguments))


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """A log of the launches that were ready. No kernel runs; the first launch of a kind is described, as on a GPU."""
    log: list[tuple] = []
    monkeypatch.setattr(launching, "CompiledKernel", Compiled)
    monkeypatch.setattr(Launch, "__call__", lambda self: Compiled(self, log))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # a CPU tensor's get_device()
    launching.forget()
    yield log
    launching.forget()


def bound(launch: Launch) -> tuple:
    """The arguments in the kernel's order, with tensors replaced by their addresses."""
    values = {**launch.arguments, **launch.constants}
    return tuple(_known(values[name]) for name in launch.kernel.arg_names)


def _known(x: Any) -> Any:
    """x, with addresses in the place of tensors."""
    if isinstance(x, TensorDescriptor):
        return x.base.data_ptr(), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding
    return x.data_ptr() if isinstance(x, Tensor) else x


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(options: AttentionOptions, heads: int = 2, key_heads: int = 2) -> None:
    batch = 2 if options.cu_seqlens is None else 1
    q, out, dout, dq = (draw(batch, 40, heads, 64) for _ in range(4))
    k, v, dk, dv = (draw(batch, 40, key_heads, 64) for _ in range(4))
    _, lse = attention.forward(q, k, v, options, out=out)
    attention.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)


def tables() -> dict[str, Tensor]:
    return {"cos": draw(40, 16, dtype=torch.float32), "sin": draw(40, 16, dtype=torch.float32)}


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normalise(stream: ResidualStream) -> None:
    x, weight = draw(8, 64), draw(64)
    _, mean, rstd = layer_norm.forward(x, weight, weight, 1e-5, stream)
    layer_norm.backward(draw(8, 64), x, weight, mean, rstd, residual_grad=stream.residual)


def activate(approximate: str, bias: bool, carry: bool) -> None:
    x, b = draw(8, 96), draw(96) if bias else None
    carried = (draw(8, 32), draw(8, 32)) if carry else None
    bias_gelu.forward(x, b, approximate=approximate, carry=carried)
    bias_gelu.backward(draw(8, 96), x, b, approximate=approximate, carry=carried)


def gate(activation: str) -> None:
    gate, up = draw(8, 96), draw(8, 96)
    gated_activation.forward(gate, up, activation=activation)
    gated_activation.backward(draw(8, 96), gate, up, activation=activation)


def lose(objective: Objective, need_grad: bool) -> None:
    dbias = draw(100, dtype=torch.float32) if need_grad else None
    scale = torch.ones(())
    labels = torch.zeros(6, dtype=torch.int64)
    linear_cross_entropy.cross_entropy_(
        draw(6, 100), labels, draw(100), objective=objective, scale=scale, need_grad=need_grad, dbias=dbias
    )


def step(lr: float | Tensor, master: bool) -> None:
    dtype = torch.float16 if master else torch.float32
    states = [[draw(70, dtype=torch.float32)] for _ in range(2)]
    masters = [draw(70, dtype=torch.float32)] if master else None
    lists = AdamLists([draw(70, dtype=dtype)], [draw(70, dtype=dtype)], *states, masters)
    adam.step_(lists, AdamOptions(torch.ones(()), lr, (0.9, 0.98), 1e-7, 0.1, True))
    adam.grad_norm_squared(lists.grads)


CALLS: dict[str, Callable[[], None]] = {
    "causal": lambda: attend(AttentionOptions(0.125)),
    "full": lambda: attend(AttentionOptions(0.125, causal=False)),
    "another scale": lambda: attend(AttentionOptions(0.25)),
    "window": lambda: attend(AttentionOptions(0.125, window=(7, 0))),
    "another window": lambda: attend(AttentionOptions(0.125, window=[9, 0])),  # type: ignore[arg-type]
    "grouped": lambda: attend(AttentionOptions(0.125), heads=4),
    "rotary inside": lambda: attend(AttentionOptions(0.125, **tables())),
    "documents": lambda: attend(AttentionOptions(0.125, cu_seqlens=ends(0, 8, 40))),
    "more documents": lambda: attend(AttentionOptions(0.125, cu_seqlens=ends(0, 8, 20, 40))),
    "norm": lambda: normalise(ResidualStream()),
    "norm, residual": lambda: normalise(ResidualStream(residual=draw(8, 64))),
    "norm, shifted": lambda: normalise(ResidualStream(shift=draw(64), shifted=draw(8, 64))),
    "GELU": lambda: activate("tanh", bias=True, carry=False),
    "GELU, exact": lambda: activate("none", bias=True, carry=False),
    "GELU, carrying": lambda: activate("tanh", bias=False, carry=True),
    "gated SiLU": lambda: gate("silu"),
    "gated GELU": lambda: gate("gelu_tanh"),
    "loss": lambda: lose(Objective(), need_grad=False),
    "loss and gradient": lambda: lose(Objective(), need_grad=True),
    "smoothed": lambda: lose(Objective(label_smoothing=0.1, z_loss=1e-4, softcap=30.0), need_grad=True),
    "class weights": lambda: lose(Objective(class_weight=torch.rand(100)), need_grad=True),
    "rotary": lambda: rotary.rotate_(draw(2, 5, 3, 64), *tables().values(), 0),
    "rotary back": lambda: rotary.rotate_(draw(2, 5, 3, 64), *tables().values(), 0, inverse=True),
    "rotary from 3": lambda: rotary.rotate_(draw(2, 5, 3, 64), *tables().values(), 3),
    "rotary by position": lambda: rotary.rotate_(
        draw(2, 5, 3, 64), *tables().values(), torch.zeros(2, 5, dtype=torch.int64)
    ),
    "Adam": lambda: step(1e-3, master=True),
    "Adam, another rate": lambda: step(2e-3, master=True),
    "Adam, no master": lambda: step(1e-3, master=False),
    "Adam, rate on the device": lambda: step(torch.ones(()), master=True),
}


@pytest.mark.parametrize("descriptors", [False, True])
def test_a_ready_launch_has_the_arguments_of_a_described_one(
    descriptors: bool, ready: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs every op with every kind of option three times with new tensors, and compares each launch with a
    description. With tensor descriptors: attention."""
    counted = {"ready": 0, "all": 0}

    def spy(build: Callable[..., Launch], *arguments: Any) -> None:
        before = len(ready)
        launching.launch(build, *arguments)
        described = build(*arguments)
        counted["all"] += 1
        for kernel, grid, given in ready[before:]:
            counted["ready"] += 1
            assert kernel is described.kernel and grid == (*described.grid, 1, 1)
            assert tuple(map(_known, given)) == bound(described)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", spy)
    if descriptors:
        monkeypatch.setattr(attention, "tile", lambda *_: attention_tiles.Tile(16, 16, 4, 1, descriptors=True))
    kept = []  # so that no address is used again
    for _ in range(3):
        for name, call in CALLS.items():
            kept.append(draw(64))
            call()
            assert name
    assert counted["ready"] >= counted["all"] * 2 // 3


def kernel_of(*names: str) -> Any:
    return SimpleNamespace(arg_names=list(names), __name__="kernel")


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ((draw(8, 4), None, 3), "shape"),
        ((draw(4, 16)[:, :8], None, 3), "stride"),
        ((draw(4, 8, dtype=torch.bfloat16), None, 3), "dtype"),
        ((draw(4 * 8 + 1)[1:].view(4, 8), None, 3), "alignment"),
        ((draw(4, 8), draw(4, 8), 3), "presence"),
        ((draw(4, 8), None, 4), "option"),
    ],
)
def test_what_the_description_depends_on_is_compared(ready: list[tuple], other: tuple, why: str) -> None:
    built = []

    def build(x: Tensor, y: Tensor | None, n: int) -> Launch:
        built.append(n)
        return Launch(kernel_of("x", "y", "n"), (1,), {"x": x, "y": y, "n": n}, {})

    first = (draw(4, 8), None, 3)
    launching.launch(build, *first)
    launching.launch(build, draw(4, 8), None, 3)
    assert len(built) == 1 and len(ready) == 1
    launching.launch(build, *other)
    assert len(built) == 2 and len(ready) == 1, why


def test_a_launch_with_another_tile_is_described_anew(ready: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles come from a table, which may be changed after launches were kept."""
    options = AttentionOptions(0.125)
    for _ in range(2):
        attend(options)
    assert len(ready) == 3, "forward, dq and dkv"
    monkeypatch.setattr(attention, "tile", lambda *_: attention_tiles.Tile(16, 16, 4, 1))
    attend(options)
    assert len(ready) == 3
    attend(options)
    constants = [dict(zip(kernel.arg_names, given, strict=True)) for kernel, _, given in ready[3:]]
    assert [(values["M"], values["N"]) for values in constants] == [(16, 16)] * 3


def test_a_tensor_that_the_description_makes_is_made_each_time(ready: list[tuple]) -> None:
    def build(x: Tensor) -> Launch:
        return Launch(kernel_of("x"), (1,), {"x": x.contiguous()}, {})

    for _ in range(3):
        launching.launch(build, draw(4, 8).T)
    assert not ready


def test_ready_launches_are_bounded_and_forgotten(ready: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST", 3)
    for n in range(10):
        launching.launch(lambda x, n: Launch(kernel_of("x", "n"), (1,), {"x": x, "n": n}, {}), draw(4), n)
        assert len(launching._ready) <= 3
    launching.forget()
    assert not launching._ready


def test_the_tensors_gpu_is_made_current(ready: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Guard:
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    def build(x: Tensor) -> Launch:
        return Launch(kernel_of("x"), (1,), {"x": x}, {})

    monkeypatch.setattr(torch.cuda, "device", Guard)
    launching.launch(build, draw(4))
    launching.launch(build, draw(4))
    assert len(ready) == 1 and not entered, "current already"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launching.launch(build, draw(4))
    assert len(ready) == 2 and entered == [-1]
