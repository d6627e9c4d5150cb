"""Attention on every back end against float64, beside torch's own scaled_dot_product_attention at the same dtype."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, run
from numerics import DTYPES, assert_no_worse, double, gradients
from torch import Tensor

from phi_fast.kernels import BackendUnavailable, backend, use
from phi_fast.kernels.attention import attention
from phi_fast.kernels.reference.attention import AttentionOptions

OURS = [
    pytest.param(
        "cpp", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the C++ kernels run on CPU tensors")
    ),
    pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")),
]
BACKENDS = ["reference", "sdpa", *OURS]


def assert_case(name: str, case: Case) -> None:
    actual = run(name, case, case)
    plain = gradients(case.composed if name == "reference" else case.plain, case.inputs, case.dout)
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    for tensor, value in actual.items():
        assert_no_worse(value, plain[tensor], exact[tensor], f"{name} {tensor}")


@pytest.mark.interpreted_in_fp32("128")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_errs_no_more_than_torch(name: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    case = Case(dtype, device, **options)
    if name == "sdpa" and (case.window or (case.causal and options["sequence"] != case.inputs["k"].shape[1])):
        with pytest.raises(ValueError, match="sdpa's kernels take no window"):
            run(name, case, case)
        return
    if device == "cuda" and name == "sdpa" and dtype == torch.float32:
        pytest.skip("torch's FlashAttention takes fp16 and bf16")
    assert_case(name, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_one_row_sees_itself(name: str, dtype: torch.dtype, device: str) -> None:
    """out = v, dv = dout, and dq = dk = 0 up to dout·v - dout·out, which fp32 sums in two different orders."""
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
    """Scores exceed a million: they would overflow in fp16, and exp would overflow without the running maximum.

    The softmax is normalised by its own sums, so the output is as accurate as torch's. The gradients compute
    probabilities from the saved log-sum-exp. If two products sum a score in different orders, fp32 gives it to a few
    units in the last place, and no probability can be more accurate than that.
    """
    case = Case(torch.float16, device, sequence=70, magnitude=300.0)
    q, k = case.inputs["q"].double(), case.inputs["k"].double()
    largest = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).abs().max().item()
    assert largest > 1e6
    actual = run(name, case, case)
    plain = gradients(case.plain, case.inputs, case.dout)
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    assert_no_worse(actual["out"], plain["out"], exact["out"], f"{name} out")
    known = 4 * 2.0**-24 * largest / 8  # relative error of a probability; the scale is 1 / 8
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


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Triton's tiles are to be fetched by descriptors; for each launch, whether they were."""
    kernels = pytest.importorskip("phi_fast.kernels.triton.attention")
    tile = importlib.import_module("phi_fast.kernels.triton.attention_tiles").Tile(32, 32, 4, 1, descriptors=True)
    used: list[bool] = []

    def launch(describe: Any, *arguments: Any) -> None:
        found = describe(*arguments)
        read = [x for x in found.arguments.values() if isinstance(x, kernels.TensorDescriptor)]
        assert len(read) == (2 if found.constants["DESCRIPTORS"] else 0)
        used.append(found.constants["DESCRIPTORS"])
        found()

    monkeypatch.setattr(kernels, "tile", lambda *_: tile)
    monkeypatch.setattr(kernels, "launch", launch)
    return used


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ("17 rows, head_dim 128", torch.float16),
        ("63 rows, full", torch.float16),
        ("65 rows, 4 queries a key", torch.bfloat16),
        ("65 rows, 4 queries a key", torch.float32),
        ("130 rows, two sequences", torch.float16),
        ("130 rows, full, documents, rotary, grouped", torch.float16),
        ("70 rows, head_dim 80, documents, rotary, grouped", torch.float16),
        ("65 rows, head_dim 96, full", torch.bfloat16),
        ("150 rows of 90 keys, window on both sides", torch.float16),
    ],
    ids=str,
)
def test_triton_by_descriptors_errs_no_more_than_torch(
    options: str, dtype: torch.dtype, device: str, described: list[bool]
) -> None:
    assert_case("triton", Case(dtype, device, **CASES[options]))
    assert described == [True] * 3


@pytest.mark.parametrize("head_dim", [64, 80, 96])
def test_triton_by_descriptors_reads_slices_and_says_0_past_the_end(
    head_dim: int, device: str, described: list[bool]
) -> None:
    """Beside q, k and v, and after their last rows, lie NaNs: a wrong stride or a tile that goes on would show."""
    case = Case(torch.float16, device, sequence=70, key_heads=1, head_dim=head_dim)
    expected = run("triton", case, case)
    for name, x in case.inputs.items():
        case.inputs[name] = _amid_nans(x)
    assert all(torch.equal(x, expected[tensor]) for tensor, x in run("triton", case, case).items())
    assert described == [True] * 6


def _amid_nans(x: Tensor) -> Tensor:
    """x (1, sequence, heads, head_dim) as a slice of a buffer of NaNs, which lie before and after every dim but the
    first."""
    _, sequence, heads, head_dim = x.shape
    wide = torch.full((1, sequence + 20, heads + 2, head_dim + 64), torch.nan, dtype=x.dtype, device=x.device)
    return wide[:, :sequence, 1:-1, 16 : 16 + head_dim].copy_(x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [80, 96])
@pytest.mark.parametrize("name", OURS)
def test_what_lies_beside_a_head_is_not_touched(name: str, head_dim: int, causal: bool, device: str) -> None:
    """A tile of Triton's is wider than the head: 0 * NaN is NaN, and a result's neighbours are others' memory."""
    case = Case(torch.float32, device, sequence=40, key_heads=1, head_dim=head_dim, causal=causal)
    with use(name, op="attention"):
        kernels = backend.implementation("attention", case.dout.device)
    options = AttentionOptions(0.125, causal)

    def passes(place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        q, k, v, dout = (place(x) for x in (*case.inputs.values(), case.dout))
        out, dq, dk, dv = (place(torch.zeros_like(x)) for x in (q, q, k, v))
        _, lse = kernels.forward(q, k, v, options, out=out)
        kernels.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    expected = passes(torch.clone)
    for result, x in passes(_amid_nans).items():
        assert torch.equal(x, expected[result]), result
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        assert whole.isfinite().sum() == x.numel(), f"{result} is written beyond its dims"


@pytest.mark.parametrize("reason", ["stride", "address", "the same rows twice"])
def test_triton_reads_by_pointers_what_no_descriptor_can_say(reason: str, device: str, described: list[bool]) -> None:
    case = Case(torch.float16, device, sequence=40)
    kernels, options = importlib.import_module("phi_fast.kernels.triton.attention"), AttentionOptions(0.125)
    q, k, v = case.inputs.values()
    if reason == "the same rows twice":
        k = k[:, :, :1].expand(-1, -1, 2, -1)
    expected = kernels.forward(q, k.contiguous(), v, options)[0]
    if reason == "stride":
        v = v.new_empty(1, 40, 2, 65)[..., :64].copy_(v)
    elif reason == "address":
        v = v.new_empty(v.numel() + 1)[1:].view(v.shape).copy_(v)
    assert torch.equal(kernels.forward(q, k, v, options)[0], expected)
    assert described == [True, False]


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_gradients_in_float64_are_the_derivative(name: str) -> None:
    case = Case(torch.float64, "cpu", sequence=5, heads=2, key_heads=1, head_dim=4, rotary_dim=2, documents=[0, 2, 5])
    with use(name, op="attention"):
        assert torch.autograd.gradcheck(case, [x.requires_grad_() for x in case.inputs.values()])


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("name", BACKENDS)
def test_reads_and_writes_slices_of_packed_buffers(name: str, head_dim: int, device: str) -> None:
    """The block's layout: q, k, v in a (T, 7d) buffer, out in a (T, 5d) buffer, gradients in a (T, 7d) buffer."""
    batch, sequence, heads = 2, 70, 2
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
    options = AttentionOptions(head_dim**-0.5)
    written, lse = kernels.forward(q, k, v, options, out=out)
    kernels.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)

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
    """One back end's backward works on another's forward, because the statistics have the same meaning in all."""
    case = Case(torch.float32, device, sequence=40)
    with use("reference", op="attention"):
        reference = backend.implementation("attention", case.dout.device)
    with use(name, op="attention"):
        kernels = backend.implementation("attention", case.dout.device)
    arguments = *case.inputs.values(), AttentionOptions(0.125)
    _, lse = kernels.forward(*arguments)
    torch.testing.assert_close(lse, reference.forward(*arguments)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("tensor", "value"),
    [(tensor, value) for tensor in ("q", "k", "v", "dout") for value in (float("nan"), float("inf"))]
    + [("k", -float("inf"))],
)
def test_spreads_nan_and_inf_as_plain_pytorch_does(name: str, tensor: str, value: float, device: str) -> None:
    """A NaN or infinity reaches every row that sees it, and the kernel is finite wherever plain PyTorch is.

    Plain PyTorch multiplies hidden values by zero, which does not remove a NaN, so a NaN spreads to rows that should
    not see it. The kernel skips blocks that are entirely hidden. Its result is therefore finite in no more places than
    if each row is computed alone from the keys it sees, and in no fewer places than plain PyTorch's.
    """
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
    for result, x in run(name, case, case).items():
        assert not (x.isfinite() & ~least[result].isfinite()).any(), f"{result} hides it"
        assert not (~x.isfinite() & most[result].isfinite()).any(), f"{result} is not finite where plain PyTorch is"


@pytest.mark.parametrize("name", OURS)
def test_blocks_outside_the_window_are_not_touched(name: str, device: str) -> None:
    """0 * NaN is NaN, so a product with a hidden block would show in either pass."""
    case = Case(torch.float32, device, sequence=400, window=(30, 0))
    for x in (*case.inputs.values(), case.dout):
        x[:, :64] = float("nan")
    for tensor, x in run(name, case, case).items():
        assert x[:, 256:].isfinite().all(), tensor


@pytest.mark.parametrize("name", OURS)
def test_blocks_that_causality_hides_are_not_touched(name: str, device: str) -> None:
    """Keys after a row, and rows before a key, are skipped: a product with one of their NaNs would show."""
    case = Case(torch.float32, device, sequence=160)
    for tensor in ("k", "v"):
        case.inputs[tensor][:, 128:] = float("nan")
    later = run(name, case, case)
    case = Case(torch.float32, device, sequence=160)
    for x in (case.inputs["q"], case.dout):
        x[:, :32] = float("nan")
    earlier = run(name, case, case)
    assert all(later[tensor][:, :64].isfinite().all() for tensor in ("out", "q"))
    assert all(earlier[tensor][:, 96:].isfinite().all() for tensor in ("k", "v"))


@pytest.mark.parametrize("name", OURS)
def test_rows_past_the_window_of_a_key_are_not_touched(name: str, device: str) -> None:
    case = Case(torch.float32, device, sequence=160, window=(30, 0))
    for x in (case.inputs["q"], case.dout):
        x[:, 128:] = float("nan")
    gradient = run(name, case, case)
    assert all(gradient[tensor][:, :64].isfinite().all() for tensor in ("k", "v"))


@pytest.mark.parametrize("name", OURS)
def test_tables_in_float64_rotate_as_those_in_fp32(name: str, device: str) -> None:
    case = Case(torch.bfloat16, device, sequence=20, rotary_dim=32)
    expected = run(name, case, case)
    case.cos, case.sin = case.cos.double(), case.sin.double()
    assert all(torch.equal(x, expected[tensor]) for tensor, x in run(name, case, case).items())


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("causal", [True, False])
def test_documents_that_end_beside_the_ends_of_blocks(name: str, causal: bool, device: str) -> None:
    """The keys that a block of rows sees are those of its first row's document to those of its last."""
    documents = [0, 1, 31, 32, 63, 65, 95, 97, 127, 128]
    case = Case(torch.float32, device, sequence=128, heads=1, key_heads=1, causal=causal, documents=documents)
    assert_case(name, case)


@pytest.mark.parametrize("name", OURS)
def test_two_rotated_dims(name: str, device: str) -> None:
    """The fewest that can turn: one pair per head."""
    assert_case(name, Case(torch.float32, device, sequence=20, rotary_dim=2))


@pytest.mark.parametrize("name", [*OURS, "reference"])
@pytest.mark.parametrize("keys", [0, 3])
def test_rows_that_see_nothing_give_zero(name: str, keys: int, device: str) -> None:
    case = Case(torch.float32, device, sequence=70, keys=keys)
    for tensor, x in run(name, case, case).items():
        if tensor in ("out", "q"):  # the last `keys` rows see some keys
            assert not x[:, : 70 - keys].any(), tensor
    with use(name, op="attention"):
        kernels = backend.implementation("attention", case.dout.device)
    _, lse = kernels.forward(*case.inputs.values(), AttentionOptions(0.125))
    assert (lse[:, :, : 70 - keys] == -torch.inf).all() and lse[:, :, 70 - keys :].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_two_backward_runs_give_the_same_bits(name: str, device: str) -> None:
    case = Case(torch.float16, device, sequence=130, heads=2, key_heads=1)
    first, second = run(name, case, case), run(name, case, case)
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


@pytest.mark.parametrize("name", BACKENDS)
def test_documents_by_stride(name: str, device: str) -> None:
    case = Case(torch.float32, device, sequence=70, documents=[0, 29, 70])
    expected = run(name, case, case)
    case.cu_seqlens = torch.stack([case.cu_seqlens, torch.full_like(case.cu_seqlens, 70)], 1)[:, 0]
    assert all(torch.equal(x, expected[tensor]) for tensor, x in run(name, case, case).items())


@pytest.mark.parametrize("name", OURS)
def test_a_document_is_what_it_is_alone(name: str, device: str) -> None:
    """The rotation starts again with each document, and the others do not affect its results."""
    case = Case(torch.float32, device, sequence=70, documents=[0, 29, 70], rotary_dim=32)
    joined = run(name, case, case)
    for rows in (slice(0, 29), slice(29, 70)):
        alone = Case(torch.float32, device, sequence=70, rotary_dim=32)
        alone.inputs = {name: x[:, rows].contiguous() for name, x in case.inputs.items()}
        alone.dout = case.dout[:, rows]
        for tensor, x in run(name, alone, alone).items():
            torch.testing.assert_close(joined[tensor][:, rows], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.8 has the older name")
def test_triton_follows_torchs_switch_of_fp32_products(precision: str) -> None:
    """The switch is read by its newer name; reading the older name would then raise an error."""
    module, matmul = pytest.importorskip("phi_fast.kernels.triton.specimens"), torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        found = [specimen.launch.constants.get("PRECISION") for specimen in module.specimens("sm_90", torch.float32)]
        assert set(found) == {None, precision}, "kernels without products, and those with"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("window", [None, [3, 0]], ids=str)
def test_opcheck(window: list[int] | None, device: str) -> None:
    case = Case(torch.float32, device, sequence=9, documents=[0, 4, 9], rotary_dim=32)
    arguments = [x.requires_grad_() for x in case.inputs.values()]
    options = (0.125, True, window, case.cu_seqlens, case.cos, case.sin)
    torch.library.opcheck(torch.ops.phi_fast.attention.default, (*arguments, *options))


@pytest.mark.parametrize("options", [{}, {"keys": 50, "window": (8, 0)}], ids=str)
def test_compiles_without_a_break_and_with_the_same_bits(options: dict[str, Any], device: str) -> None:
    case = Case(torch.float32, device, sequence=40, rotary_dim=32, **options)
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
        (dict.fromkeys("qkv", ZEROS[..., :0]), ValueError, r"q has shape \(1, 8, 2, 0\); expected \(batch"),
        (ok(k=ZEROS.int(), v=ZEROS.int()), TypeError, "k is torch.int32"),
        (ok(v=ZEROS.half()), TypeError, "v is torch.float16 and q is torch.float32"),
        (ok(k=ZEROS.to("meta")), ValueError, "k is on meta and q is on cpu"),
        (ok(q=ZEROS.mT.contiguous().mT), ValueError, "q's last stride is 2; expected 1"),
        (ok(v=ZEROS[:, :7]), ValueError, r"k has shape \(1, 8, 2, 64\) and v has \(1, 7, 2, 64\)"),
        (
            ok(k=ZEROS[..., :32], v=ZEROS[..., :32]),
            ValueError,
            r"k has \(1, 8, 2, 32\); batch and head_dim must",
        ),
        (ok(window=(-2, 0)), ValueError, r"window is \(-2, 0\); expected \(left, right\)"),
        (ok(window=7), ValueError, r"window is 7; expected \(left, right\)"),
        (ok(window=(None, 0)), ValueError, r"window is \(None, 0\); expected \(left, right\)"),
        (ok(window=(1.5, 0)), ValueError, r"window is \(1.5, 0\); expected \(left, right\)"),
        (ok(window="ab"), ValueError, r"window is ab; expected \(left, right\)"),
        (
            ok(k=ZEROS[:, :7], v=ZEROS[:, :7], cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)),
            ValueError,
            "cu_seqlens needs as many keys as rows, not 7 for 8",
        ),
        (ok(k=ZEROS[:, :7], v=ZEROS[:, :7], cos=TABLE, sin=TABLE), ValueError, "no more rows than keys, not 8 for 7"),
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
        (72, torch.float32, None, ValueError, "head_dim 64, 80, 96, 128, not 72; use"),
        (256, torch.float32, None, ValueError, "head_dim 64, 80, 96, 128, not 256; use"),
        (96, torch.float32, 48, ValueError, r"rotates 2 \* 2\*\*n dims, not 96 of 96; call apply_rotary_"),
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
