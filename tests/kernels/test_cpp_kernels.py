"""The C++ kernels on every instruction set of this machine: float64 parity on ragged, strided and unaligned tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from numerics import DTYPES, assert_no_worse
from torch import Tensor

from phi_fast._C import cpu
from phi_fast.kernels.cpp import adam, bias_gelu, layer_norm, linear_cross_entropy, rotary
from phi_fast.kernels.reference import adam as reference_adam
from phi_fast.kernels.reference import bias_gelu as reference_bias_gelu
from phi_fast.kernels.reference import layer_norm as reference_layer_norm
from phi_fast.kernels.reference import linear_cross_entropy as reference_linear_cross_entropy
from phi_fast.kernels.reference import rotary as reference_rotary
from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.layer_norm import ResidualStream
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.rotary import rotary_table

WIDTHS = (1, 3, 8, 15, 16, 17, 63, 64, 100, 256)  # one lane, a vector less one, whole vectors, four and a tail


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa("")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, magnitude: float = 1.0) -> Tensor:
    """Normal values in a view that starts one element into its buffer, with 5 elements between rows."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator) * magnitude
    buffer = torch.zeros(*shape[:-1], shape[-1] + 5, dtype=dtype)
    view = buffer.flatten()[1:-4].as_strided(shape, buffer.stride(), 1) if shape[0] else buffer[..., :-5]
    return view.copy_(values)


def padded(like: Tensor) -> tuple[Tensor, Tensor]:
    """A view of `like`'s shape in a larger buffer full of 7s, and the buffer, which shows writes beside the view."""
    buffer = torch.full((like.shape[0], like.shape[1] + 10), 7.0, dtype=like.dtype)
    return buffer[:, 5:-5], buffer


def assert_untouched(buffer: Tensor) -> None:
    assert bool((buffer[:, :5] == 7).all() and (buffer[:, -5:] == 7).all()), "written outside of the view"


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


class Comparison:
    """Results for many shapes, judged together, because with one column the largest error is a single sample."""

    def __init__(self) -> None:
        self._results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, names: tuple[str, ...], *lists: tuple[Tensor, ...]) -> None:
        """Add, for each name, the tensor from the kernel, from plain PyTorch, and in float64."""
        for name, *tensors in zip(names, *lists, strict=True):
            self._results.setdefault(name, []).append(tuple(x.flatten() for x in tensors))

    def judge(self) -> None:
        for name, results in self._results.items():
            assert_no_worse(*(torch.cat(tensors) for tensors in zip(*results, strict=True)), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_layer_norm(dtype: torch.dtype, magnitude: float) -> None:
    comparison = Comparison()
    for columns in WIDTHS:
        x, residual, dy, carried = (draw(37, columns, dtype=dtype, seed=i, magnitude=magnitude) for i in range(4))
        weight, bias, shift = (draw(1, columns, dtype=dtype, seed=10 + i)[0] for i in range(3))
        out, out_buffer = padded(x)
        shifted, shifted_buffer = padded(x)
        summed = torch.empty_like(x)
        _, mean, rstd = layer_norm.forward(
            x, weight, bias, 1e-5, ResidualStream(residual, summed, shift, shifted), out=out
        )
        assert torch.equal(summed, x + residual)
        assert torch.equal(shifted, summed + shift)
        assert_untouched(out_buffer)
        assert_untouched(shifted_buffer)
        plain = reference_layer_norm.forward(summed, weight, bias, 1e-5)
        exact = reference_layer_norm.forward(*wide(summed, weight, bias), 1e-5)
        comparison.add(("out", "mean", "rstd"), (out, mean, rstd), plain, exact)

        dx, dx_buffer = padded(x)
        backward = layer_norm.backward(dy, summed, weight, mean, rstd, residual_grad=carried, dx=dx)
        assert_untouched(dx_buffer)
        plain = reference_layer_norm.backward(dy, summed, weight, *plain[1:], residual_grad=carried)
        exact = reference_layer_norm.backward(*wide(dy, summed, weight), *exact[1:], residual_grad=carried.double())
        if columns > 1:  # with one column dx is 0 but for rounding
            comparison.add(("dx", "dweight", "dbias"), backward, plain, exact)
    comparison.judge()


def test_layer_norm_backward_writes_over_its_inputs() -> None:
    x, dy = draw(33, 70), draw(33, 70, seed=1)
    weight = draw(1, 70, seed=2)[0]
    _, mean, rstd = layer_norm.forward(x, weight, weight, 1e-5)
    expected = layer_norm.backward(dy, x, weight, mean, rstd, residual_grad=dy)[0]
    assert torch.equal(layer_norm.backward(dy, x, weight, mean, rstd, residual_grad=dy, dx=dy)[0], expected)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 30.0])
def test_bias_gelu(approximate: str, dtype: torch.dtype, magnitude: float) -> None:
    comparison = Comparison()
    for columns in WIDTHS:
        x = draw(35, columns, dtype=dtype, magnitude=magnitude)
        dout = draw(35, columns, dtype=dtype, seed=1)
        for bias in (draw(1, columns, dtype=dtype, seed=2)[0], None):
            out, out_buffer = padded(x)
            bias_gelu.forward(x, bias, out=out, approximate=approximate)
            dx, dx_buffer = padded(x)
            activation, activation_buffer = padded(x)
            backward = bias_gelu.backward(dout, x, bias, dx=dx, activation=activation, approximate=approximate)
            for buffer in (out_buffer, dx_buffer, activation_buffer):
                assert_untouched(buffer)
            assert torch.equal(activation, out)
            plain = reference_bias_gelu.forward(x, bias, approximate=approximate)
            exact = reference_bias_gelu.forward(*wide(x, bias), approximate=approximate)
            comparison.add(("out",), (out,), (plain,), (exact,))
            plain = reference_bias_gelu.backward(dout, x, bias, approximate=approximate)
            exact = reference_bias_gelu.backward(*wide(dout, x, bias), approximate=approximate)
            comparison.add(("dx", "dbias"), backward, plain, exact)
    comparison.judge()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_is_right_in_its_tails(approximate: str) -> None:
    """From 1e-30 to 1e30 the value is finite; near 0, where it is x / 2, it is relatively accurate."""
    x = torch.logspace(-30, 30, 4001, dtype=torch.float64)
    x = torch.cat((x, -x)).float().reshape(2, -1)
    out = bias_gelu.forward(x, None, approximate=approximate)
    dx, _ = bias_gelu.backward(torch.ones_like(x), x, None, approximate=approximate)
    exact = reference_bias_gelu.forward(x.double(), None, approximate=approximate)
    slope, _ = reference_bias_gelu.backward(torch.ones_like(x).double(), x.double(), None, approximate=approximate)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=1e-6)
    small = x.abs() < 1e-3
    torch.testing.assert_close(out.double()[small], exact[small], rtol=5e-7, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 32, 64, 130])
def test_rotary(dtype: torch.dtype, interleaved: bool, rotary_dim: int) -> None:
    batch, sequence, heads, head_dim = 2, 9, 3, rotary_dim + 7
    cos, sin = rotary_table(40, rotary_dim)
    packed = draw(batch, sequence, 2 * heads * head_dim + 11, dtype=dtype)
    before = packed.clone()
    x = packed[..., : 2 * heads * head_dim].unflatten(-1, (2 * heads, head_dim))
    positions = torch.randint(40, (batch, sequence), generator=torch.Generator().manual_seed(0))
    for where in (3, positions, positions.int()):
        for inverse in (False, True):
            packed.copy_(before)
            rotary.rotate_(x, cos, sin, where, interleaved=interleaved, inverse=inverse)
            plain, exact = before.clone(), before.double()
            for y in (plain, exact):
                view = y[..., : 2 * heads * head_dim].unflatten(-1, (2 * heads, head_dim))
                table = (cos, sin) if y is plain else (cos.double(), sin.double())
                reference_rotary.rotate_(view, *table, where, interleaved=interleaved, inverse=inverse)
            assert_no_worse(packed, plain, exact, "x")
            still = exact == before.double()
            assert torch.equal(packed[still], before[still])


def test_rotary_refuses_positions_outside_the_table() -> None:
    cos, sin = rotary_table(8, 4)
    x = draw(1, 4, 2, 8)
    with pytest.raises(IndexError, match="reach past the table's 8"):
        rotary.rotate_(x, cos, sin, 5)
    with pytest.raises(IndexError, match="position 8 is not in the table of 8"):
        rotary.rotate_(x, cos, sin, torch.tensor([[0, 1, 8, 2]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("label_smoothing", "z_loss", "magnitude"), [(0.0, 0.0, 1.0), (0.1, 1e-2, 10.0)])
def test_cross_entropy(dtype: torch.dtype, label_smoothing: float, z_loss: float, magnitude: float) -> None:
    rows, comparison = 21, Comparison()
    options = {"objective": Objective(-100, label_smoothing, z_loss), "scale": torch.tensor(4.0)}
    for columns in (*WIDTHS[1:], 4097):
        logits = draw(rows, columns, dtype=dtype, magnitude=magnitude)
        bias = draw(1, columns, dtype=dtype, seed=1)[0]
        labels = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(2))
        labels[::5] = -100
        results = []
        for kernels, dtype_in in (
            (linear_cross_entropy, dtype),
            (reference_linear_cross_entropy, dtype),
            (reference_linear_cross_entropy, torch.float64),
        ):
            x, b = logits.to(dtype_in, copy=True), bias.to(dtype_in)
            dbias = torch.ones(columns, dtype=torch.promote_types(dtype_in, torch.float32))
            losses = kernels.cross_entropy_(x, labels, b, need_grad=True, dbias=dbias, **options)
            alone = kernels.cross_entropy_(logits.to(dtype_in, copy=True), labels, b, need_grad=False, **options)
            assert torch.equal(losses, alone)
            results.append((losses, x, dbias))
        comparison.add(("losses", "dlogits", "dbias"), *results)
    comparison.judge()


def test_cross_entropy_labels_out_of_range_are_nan_and_ignored_rows_zero() -> None:
    logits = draw(3, 70)
    logits[1] = torch.nan
    labels = torch.tensor([70, -100, 5])
    dbias = torch.zeros(70)
    losses = linear_cross_entropy.cross_entropy_(
        logits,
        labels,
        objective=Objective(),
        scale=torch.ones(()),
        need_grad=True,
        dbias=dbias,
    )
    assert losses[0].isnan() and losses[1] == 0 and losses[2].isfinite()
    assert logits[0].isnan().all() and (logits[1] == 0).all() and logits[2].isfinite().all()
    assert dbias.isnan().all()


ADAM = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=lambda d: f"grad-{d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam(dtype: torch.dtype, grad_dtype: torch.dtype, decoupled: bool) -> None:
    sizes = (*WIDTHS, 20001, 0, 7)

    def make(seed: int, dtype: torch.dtype) -> list[Tensor]:
        return [draw(1, n, dtype=dtype, seed=seed)[0] if n else torch.empty(0, dtype=dtype) for n in sizes]

    for with_master in (False, True):
        results = []
        for kernels, wide_dtype in ((adam, None), (reference_adam, None), (reference_adam, torch.float64)):
            masters = make(0, torch.float32)
            params = [p.to(dtype) for p in masters]
            grads, m, v = make(1, grad_dtype), make(2, torch.float32), [s.square() for s in make(3, torch.float32)]
            if wide_dtype:  # from the same values
                masters = [(p if with_master else q).to(wide_dtype) for p, q in zip(masters, params, strict=True)]
                grads, m, v = ([x.to(wide_dtype) for x in tensors] for tensors in (grads, m, v))
                params = masters
            kernels.step_(
                AdamLists(params, grads, m, v, masters if with_master else None),
                AdamOptions(
                    torch.tensor(5.0),
                    grad_scale=torch.tensor(0.25),
                    found_inf=torch.tensor(0.0),
                    decoupled=decoupled,
                    **ADAM,
                ),
            )
            results.append((params, m, v, masters if with_master else params))
        for name, *lists in zip(("param", "exp_avg", "exp_avg_sq", "master"), *results, strict=True):
            assert_no_worse(*(torch.cat(tensors) for tensors in lists), name)


def test_adam_skips_on_found_inf() -> None:
    params, grads, m, v = ([draw(1, 70, seed=i)[0]] for i in range(4))
    before = [x[0].clone() for x in (params, m, v)]
    options = {"step": torch.tensor(1.0), "decoupled": True, **ADAM}
    for flag in (1.0, torch.nan):
        adam.step_(AdamLists(params, grads, m, v), AdamOptions(found_inf=torch.tensor(flag), **options))
        assert all(torch.equal(x[0], y) for x, y in zip((params, m, v), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs_for_every_kind_of_number(dtype: torch.dtype, isa: str) -> None:
    """fp32 numbers of every exponent, subnormals, infinities, NaN and ties are rounded to 16 bits as torch rounds them;
    all 65536 16-bit numbers are widened exactly."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    bits[::3] &= ~0xFFF  # exact ties in both formats
    master = bits.to(torch.int32).view(torch.float32)
    flushes = isa in ("avx512_bf16", "amx") and dtype == torch.bfloat16  # the instruction treats subnormals as 0
    if flushes:
        master = master[(master.abs() >= 2**-126) | master.isnan()]
    param = torch.empty_like(master, dtype=dtype)
    zeros = torch.zeros_like(master)
    adam.step_(
        AdamLists([param], [zeros], [zeros.clone()], [zeros.clone()], [master.clone()]),
        AdamOptions(torch.tensor(1.0), lr=0.0, betas=(0.9, 0.9), eps=1.0, weight_decay=0.0, decoupled=True),
    )
    expected = master.to(dtype)
    assert torch.equal(param.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(param[number].view(torch.int16), expected[number].view(torch.int16))

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()].reshape(1, -1, 1, 2)
    turned = every.clone()
    rotary.rotate_(turned, torch.ones(every.shape[1], 1), torch.zeros(every.shape[1], 1), 0)
    if flushes:
        every = every.where(every.abs() >= 2**-126, 0)
    assert torch.equal(turned, every)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_norm_squared(dtype: torch.dtype) -> None:
    grads = [draw(1, n, dtype=dtype, seed=n)[0] for n in (1, 17, 5000, 70001)]
    exact = sum(g.double().square().sum() for g in grads)
    torch.testing.assert_close(adam.grad_norm_squared(grads).double(), exact, rtol=1e-6, atol=0)
    for bad in (torch.inf, torch.nan):
        grads[3][70000] = bad
        assert not adam.grad_norm_squared(grads).isfinite()


def test_any_thread_count_gives_the_same_bits() -> None:
    x, dy = draw(300, 200), draw(300, 200, seed=1)
    weight = draw(1, 200, seed=2)[0]
    labels = torch.randint(200, (300,), generator=torch.Generator().manual_seed(0))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, mean, rstd = layer_norm.forward(x, weight, weight, 1e-5)
            logits, dbias = x.clone(), torch.zeros(200)
            losses = linear_cross_entropy.cross_entropy_(
                logits,
                labels,
                weight,
                objective=Objective(),
                scale=torch.ones(()),
                need_grad=True,
                dbias=dbias,
            )
            norm = adam.grad_norm_squared([x.contiguous()])
            backward = layer_norm.backward(dy, x, weight, mean, rstd)
            results.append(
                (out, mean, rstd, *backward, *bias_gelu.backward(dy, x, weight), losses, logits, dbias, norm)
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rows_is_no_work() -> None:
    x, weight = torch.empty(0, 16), torch.ones(16)
    out, mean, rstd = layer_norm.forward(x, weight, weight, 1e-5)
    assert out.shape == (0, 16) and mean.shape == rstd.shape == (0,)
    dx, dweight, dbias = layer_norm.backward(x, x, weight, mean, rstd)
    assert dx.shape == (0, 16) and not dweight.any() and not dbias.any()
    assert not bias_gelu.backward(x, x, None)[1].any()


def test_what_the_kernels_refuse() -> None:
    x, weight = draw(4, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"float32, bfloat16 and float16, not torch.float64; use\('reference'"):
        layer_norm.forward(x.double(), weight, weight, 1e-5)
    with pytest.raises(ValueError, match=r"strides \(1, 13\)"):
        bias_gelu.forward(x.T, None)
    with pytest.raises(ValueError, match=r"out is torch.float32 \(4, 7\)"):
        bias_gelu.forward(x, None, out=torch.empty(4, 7))
    with pytest.raises(ValueError, match="exp_avg has 8 elements and its parameter 4"):
        adam.step_(
            AdamLists([torch.ones(4)], [torch.ones(4)], [weight], [torch.ones(4)]),
            AdamOptions(weight[0], decoupled=True, **ADAM),
        )


def test_no_rows_have_gradients() -> None:
    """The gradient of a sum over nothing is expanded with strides of 0, which no ordinary matrix has."""
    from phi_fast.kernels import attention, bias_gelu, layer_norm

    x = torch.zeros(0, 8, requires_grad=True)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    heads = torch.zeros(2, 0, 3, 64, requires_grad=True)
    (layer_norm(x, weight, bias).sum() + bias_gelu(x, bias).sum() + attention(heads, heads, heads).sum()).backward()
    assert x.grad is not None and x.grad.shape == x.shape and not bias.grad.any() and not weight.grad.any()
