"""Attention: every back end against float64, beside torch's own scaled_dot_product_attention at the same dtype."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_no_worse, double, gradients
from torch import Tensor

from phi_fast.kernels import BackendUnavailable, backend, use
from phi_fast.kernels.attention import attention

BACKENDS = [
    "reference",
    "sdpa",
    pytest.param("cpp", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the C++ kernels run on CPU tensors")),
    pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")),
]

# Ragged ends, both head dims, every option alone and the options together.
CASES: dict[str, dict[str, Any]] = {
    "17 rows, head_dim 128": {"sequence": 17, "head_dim": 128},
    "63 rows, full": {"sequence": 63, "causal": False},
    "64 rows, rotary": {"sequence": 64, "rotary_dim": 32},
    "65 rows, 4 queries a key": {"sequence": 65, "heads": 4, "key_heads": 1},
    "130 rows, two sequences": {"sequence": 130, "batch": 2, "heads": 1, "key_heads": 1},
    "130 rows, documents": {"sequence": 130, "documents": [0, 5, 5, 70, 71, 130]},
    "130 rows, full, documents, rotary, grouped": {
        "sequence": 130, "causal": False, "documents": [0, 33, 97, 130], "rotary_dim": 64, "key_heads": 1,
    },
}  # fmt: skip


class Case:
    """Inputs of one case, and attention over them by whatever back end is in use."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        *,
        sequence: int,
        batch: int = 1,
        heads: int = 2,
        key_heads: int = 2,
        head_dim: int = 64,
        causal: bool = True,
        documents: list[int] | None = None,
        rotary_dim: int = 0,
        magnitude: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(sequence)

        def draw(number: int, factor: float = 1.0) -> Tensor:
            x = torch.randn(batch, sequence, number, head_dim, generator=generator, dtype=torch.float64) * factor
            return x.to(device, dtype)

        self.inputs = {"q": draw(heads, magnitude), "k": draw(key_heads, magnitude), "v": draw(key_heads)}
        self.dout = draw(heads)
        self.causal = causal
        self.cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=device)
        self.cos = self.sin = None
        if rotary_dim:
            frequencies = 10000 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2))
            angles = torch.outer(torch.arange(sequence).float(), frequencies).to(device)
            self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=self.causal, cu_seqlens=self.cu_seqlens, cos=self.cos, sin=self.sin)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By torch's public functions alone, nothing of phi_fast's."""
        sequence, heads = q.shape[1], q.shape[2]
        rows = torch.arange(sequence, device=q.device)
        seen = rows[:, None] >= rows if self.causal else torch.ones(sequence, sequence, dtype=torch.bool).to(q.device)
        if self.cu_seqlens is not None:
            lengths = self.cu_seqlens.diff().long()
            document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
            seen = seen & (document[:, None] == document)
            rows = torch.cat([torch.arange(n, device=q.device) for n in lengths.tolist()])
        q, k = self._rotated(q, rows), self._rotated(k, rows)
        q, k, v = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.cos is None or self.sin is None:
            return x
        half = self.cos.shape[1]
        turn = torch.polar(torch.ones_like(self.cos, dtype=torch.float64), torch.atan2(self.sin, self.cos).double())
        pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn[positions][:, None]
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :].double()), -1).to(x.dtype)


def run(name: str, function: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    with use(name, op="attention"):
        return gradients(function, case.inputs, case.dout)


def assert_case(name: str, case: Case) -> None:
    actual = run(name, case, case)
    plain = gradients(case.plain, case.inputs, case.dout)
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    for tensor, value in actual.items():
        assert_no_worse(value, plain[tensor], exact[tensor], f"{name} {tensor}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_errs_no_more_than_torch(name: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and name == "sdpa" and dtype == torch.float32:
        pytest.skip("torch's FlashAttention takes fp16 and bf16")
    assert_case(name, Case(dtype, device, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_one_row_sees_itself(name: str, dtype: torch.dtype, device: str) -> None:
    """out = v, dv = dout, and dq = dk = 0 but for dout·v - dout·out, summed in fp32 in two orders."""
    case = Case(dtype, device, sequence=1, batch=4)
    actual = run(name, case, case)
    assert torch.equal(actual["out"], case.inputs["v"])
    assert torch.equal(actual["v"], case.dout)
    terms = (case.dout * case.inputs["v"]).double().abs().sum(-1).max()
    for tensor, other in (("q", "k"), ("k", "q")):
        limit = 4 * 2.0**-24 * terms * case.inputs[other].double().abs().max() / 8  # the scale is 1 / 8
        assert actual[tensor].abs().max() <= limit, tensor


@pytest.mark.parametrize("name", BACKENDS)
def test_stays_sound_where_queries_and_keys_reach_hundreds(name: str, device: str) -> None:
    """Scores pass a million: they would overflow in fp16, and exp would without the running maximum.

    The softmax is normalised by its own sums: the output is as good as torch's. The gradients form probabilities from
    the saved log-sum-exp: where two products sum a score in different orders, fp32 knows it to a few units in the last
    place, and no probability is known better than that.
    """
    case = Case(torch.float16, device, sequence=70, magnitude=300.0)
    q, k = case.inputs["q"].double(), case.inputs["k"].double()
    largest = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).abs().max().item()
    assert largest > 1e6
    actual = run(name, case, case)
    plain = gradients(case.plain, case.inputs, case.dout)
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    assert_no_worse(actual["out"], plain["out"], exact["out"], f"{name} out")
    known = 4 * 2.0**-24 * largest / 8  # relative, of a probability; the scale is 1 / 8
    for tensor, x in actual.items():
        assert x.isfinite().all(), f"{name} {tensor}"
        assert (x - exact[tensor]).abs().max() <= known * (1 + exact[tensor].abs().max()), f"{name} {tensor}"


@pytest.mark.parametrize("tiles", [(16, 64), (64, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("options", ["130 rows, documents", "65 rows, 4 queries a key"])
def test_triton_tiles_of_any_shape_agree(
    options: str, tiles: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loop's split into masked and unmasked blocks depends on which side of the tile is longer."""
    kernels = pytest.importorskip("phi_fast.kernels.triton.attention")
    tile = importlib.import_module("phi_fast.kernels.triton.attention_tiles").Tile(*tiles, warps=4, stages=1)
    monkeypatch.setattr(kernels, "tile", lambda *_: tile)
    case = Case(torch.float32, device, **CASES[options])
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    for tensor, x in run("triton", case, case).items():
        torch.testing.assert_close(x.double(), exact[tensor], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_gradients_in_float64_are_the_derivative(name: str) -> None:
    case = Case(torch.float64, "cpu", sequence=5, heads=2, key_heads=1, head_dim=4, rotary_dim=2, documents=[0, 2, 5])
    with use(name, op="attention"):
        assert torch.autograd.gradcheck(case, [x.requires_grad_() for x in case.inputs.values()])


@pytest.mark.parametrize("name", BACKENDS)
def test_reads_and_writes_slices_of_packed_buffers(name: str, device: str) -> None:
    """The block's layout: q, k, v of a (T, 7d) buffer, out in a (T, 5d) one, gradients in a (T, 7d) one."""
    batch, sequence, heads, head_dim = 2, 70, 2, 64
    dtype, width = torch.float16, heads * head_dim
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, sequence, 7 * width, generator=generator).to(device, dtype)
    mixed = torch.randn(batch, sequence, 5 * width, generator=generator).to(device, dtype)
    dmixed = torch.randn(batch, sequence, 5 * width, generator=generator).to(device, dtype)
    gradient = torch.randn(batch, sequence, 7 * width, generator=generator).to(device, dtype)
    before = mixed.clone(), gradient.clone()

    def heads_of(x: Tensor, first: int) -> Tensor:
        return x[..., first * width : (first + 1) * width].unflatten(-1, (heads, head_dim))

    q, k, v = (heads_of(packed, i) for i in range(3))
    out, dout = heads_of(mixed, 0), heads_of(dmixed, 0)
    dq, dk, dv = (heads_of(gradient, i) for i in range(3))
    with use(name, op="attention"):
        kernels = backend.implementation("attention", packed.device)
    options = {"scale": 0.125, "causal": True}
    written, lse = kernels.forward(q, k, v, out=out, **options)
    kernels.backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options)

    assert written.data_ptr() == mixed.data_ptr()
    assert lse.shape == (batch, heads, sequence) and lse.dtype == torch.float32
    assert torch.equal(mixed[..., width:], before[0][..., width:])
    assert torch.equal(gradient[..., 3 * width :], before[1][..., 3 * width :])
    with use(name, op="attention"):
        inputs = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}
        contiguous = gradients(attention, inputs, dout.contiguous())
    for actual, expected in zip((out, dq, dk, dv), contiguous.values(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_log_sum_exp_is_natural_and_interchangeable(name: str, device: str) -> None:
    """One back end's backward takes another's forward: the statistics have one meaning."""
    case = Case(torch.float32, device, sequence=40)
    with use("reference", op="attention"):
        reference = backend.implementation("attention", case.dout.device)
    with use(name, op="attention"):
        kernels = backend.implementation("attention", case.dout.device)
    options = {"scale": 0.125, "causal": True}
    _, lse = kernels.forward(*case.inputs.values(), **options)
    torch.testing.assert_close(lse, reference.forward(*case.inputs.values(), **options)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [(tensor, value) for tensor in ("q", "k", "v", "dout") for value in (float("nan"), float("inf"))]
    + [("k", -float("inf"))],
)
def test_triton_spreads_nan_and_inf_as_plain_pytorch_does(tensor: str, value: float, device: str) -> None:
    """All who look at a poisoned row see it, and where plain PyTorch stays finite the kernel does.

    Plain PyTorch multiplies hidden values by zero, which NaN survives: it spreads further than causality asks. The
    kernel skips the blocks that are hidden whole, so it ends between the two: what each row alone makes of the keys it
    sees, and what plain PyTorch makes of all.
    """
    pytest.importorskip("triton")
    case = Case(torch.float32, device, sequence=40)
    (case.dout if tensor == "dout" else case.inputs[tensor])[0, 20, 0, 3] = value

    def softmax_v(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.125).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_v(q, k, v, torch.ones(40, 40, dtype=torch.bool, device=device).triu(1))

    def each_row_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.zeros((), dtype=torch.bool, device=device)
        return torch.cat([softmax_v(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], seen) for i in range(40)], 1)

    least = gradients(each_row_alone, case.inputs, case.dout)
    most = gradients(plain, case.inputs, case.dout)
    assert any(not x.isfinite().all() for x in least.values())
    for name, x in run("triton", case, case).items():
        assert not (x.isfinite() & ~least[name].isfinite()).any(), f"{name} hides it"
        assert not (~x.isfinite() & most[name].isfinite()).any(), f"{name} is not finite where plain PyTorch is"


@pytest.mark.parametrize("name", BACKENDS)
def test_two_backward_runs_give_the_same_bits(name: str, device: str) -> None:
    case = Case(torch.float16, device, sequence=130, heads=2, key_heads=1)
    first, second = run(name, case, case), run(name, case, case)
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


def test_a_document_is_what_it_is_alone(device: str) -> None:
    """Nothing leaks over a border, the rotation starts again, and a document is as if there were no others."""
    pytest.importorskip("triton")
    case = Case(torch.float32, device, sequence=70, documents=[0, 29, 70], rotary_dim=32)
    joined = run("triton", case, case)
    for rows in (slice(0, 29), slice(29, 70)):
        alone = Case(torch.float32, device, sequence=70, rotary_dim=32)
        alone.inputs = {name: x[:, rows].contiguous() for name, x in case.inputs.items()}
        alone.dout = case.dout[:, rows]
        for name, x in run("triton", alone, alone).items():
            torch.testing.assert_close(joined[name][:, rows], x, rtol=1e-5, atol=1e-5)


def test_opcheck(device: str) -> None:
    case = Case(torch.float32, device, sequence=9, documents=[0, 4, 9], rotary_dim=32)
    arguments = [x.requires_grad_() for x in case.inputs.values()]
    options = (0.125, True, case.cu_seqlens, case.cos, case.sin)
    torch.library.opcheck(torch.ops.phi_fast.attention.default, (*arguments, *options))


def test_compiles_without_a_break_and_with_the_same_bits(device: str) -> None:
    case = Case(torch.float32, device, sequence=40, rotary_dim=32)
    eager = gradients(case, case.inputs, case.dout)
    compiled = gradients(torch.compile(case.__call__, fullgraph=True, backend="aot_eager"), case.inputs, case.dout)
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


def ok(**changes: Any) -> dict[str, Any]:
    arguments = {name: torch.zeros(1, 8, 2, 64) for name in "qkv"}
    return {**arguments, **changes}


ZEROS = torch.zeros(1, 8, 2, 64)
TABLE = torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (ok(q=ZEROS[0]), ValueError, r"q has shape \(8, 2, 64\); expected \(batch, sequence, heads, head_dim\)"),
        (ok(k=ZEROS.int(), v=ZEROS.int()), TypeError, "k is torch.int32"),
        (ok(v=ZEROS.half()), TypeError, "v is torch.float16 and q is torch.float32"),
        (ok(k=ZEROS.to("meta")), ValueError, "k is on meta and q is on cpu"),
        (ok(q=ZEROS.mT.contiguous().mT), ValueError, "q's last stride is 2; expected 1"),
        (ok(v=ZEROS[:, :7]), ValueError, r"k has shape \(1, 8, 2, 64\) and v has \(1, 7, 2, 64\)"),
        (ok(k=ZEROS[:, :7], v=ZEROS[:, :7]), ValueError, r"q has shape \(1, 8, 2, 64\) and k has \(1, 7, 2, 64\)"),
        (ok(q=torch.zeros(1, 8, 3, 64)), ValueError, "3 query heads cannot be shared out over 2 key heads"),
        (ok(scale=-1.0), ValueError, "scale is -1.0; expected a positive, finite number"),
        (ok(scale=float("nan")), ValueError, "scale is nan"),
        (ok(cu_seqlens=torch.tensor([0, 8])), TypeError, "cu_seqlens is torch.int64; expected int32"),
        (ok(cu_seqlens=torch.tensor([8], dtype=torch.int32)), ValueError, r"cu_seqlens has shape \(1,\)"),
        (
            {**{n: torch.zeros(2, 8, 2, 64) for n in "qkv"}, "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)},
            ValueError,
            "cu_seqlens needs batch 1, not 2",
        ),
        (ok(cos=TABLE), ValueError, "sin is None and the other is not"),
        (ok(cos=TABLE, sin=TABLE[:7]), ValueError, r"sin has shape \(7, 16\)"),
        (ok(cos=TABLE.half(), sin=TABLE), TypeError, "cos is torch.float16"),
        (ok(cos=TABLE[:7], sin=TABLE[:7]), ValueError, "cos and sin have 7 positions for a sequence of 8"),
        (ok(cos=torch.zeros(8, 33), sin=torch.zeros(8, 33)), ValueError, "rotate 66 dims and head_dim is 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "half", "error", "message"),
    [
        (96, torch.float32, None, ValueError, "head_dim 64 or 128, not 96"),
        (64, torch.float64, None, TypeError, "not torch.float64"),
        (64, torch.float32, 24, ValueError, r"rotates 2 \* 2\*\*n dims, not 48 of 64; call apply_rotary_"),
    ],
)
def test_triton_names_what_it_was_not_written_for(
    head_dim: int, dtype: torch.dtype, half: int | None, error: type[Exception], message: str, device: str
) -> None:
    pytest.importorskip("triton")
    x = torch.zeros(1, 8, 2, head_dim, dtype=dtype, device=device)
    table = None if half is None else torch.zeros(8, half, device=device)
    with use("triton", op="attention"), pytest.raises(error, match=message):
        attention(x, x, x, cos=table, sin=table)


def test_flash_attn_says_how_to_get_it() -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    x = torch.zeros(1, 8, 2, 64)
    with use("flash-attn", op="attention"), pytest.raises(BackendUnavailable, match="pip install flash-attn"):
        attention(x, x, x)
