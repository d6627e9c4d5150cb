"""apply_rotary_ against float64, beside plain PyTorch at the same dtype."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, assert_no_worse, assert_same_nonfinite, backends, double, gradients
from torch import Tensor

from phi_fast.kernels import apply_rotary_, rotary_table, use

BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 24


def plain(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding in x's own dtype, out of place, as models implement it."""
    half = cos.shape[1]
    c, s = (table.to(x.dtype)[positions].unsqueeze(-2) for table in (cos, sin))
    turning, through = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        return torch.cat((torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2), through), -1)
    a, b = turning.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s, through), -1)


def packed(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    """A buffer (batch, sequence, 3, heads, head_dim); x is [:, :, 1], strided as in a packed buffer."""
    batch, sequence, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, sequence, 3, heads, head_dim, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "rotary_dim", "scale"),
    [((2, 5, 3, 64), 32, 1.0), ((1, 7, 2, 24), 20, 1.0), ((2, 3, 1, 16), 16, 5000.0), ((1, 2, 5, 80), 2, 1e-3)],
)
def test_error_forward_and_gradient(backend, dtype, interleaved, shape, rotary_dim, scale, device):
    cos, sin = rotary_table(LENGTH, rotary_dim, device=device)
    positions = torch.arange(3, 3 + shape[1], device=device).expand(shape[:2])
    inputs = {"buffer": packed(shape, dtype, device, scale)}
    dout = packed(shape, dtype, device, seed=1)[:, :, 1]

    def ours(buffer: Tensor) -> Tensor:
        return apply_rotary_(buffer.clone()[:, :, 1], None, cos, sin, offset=3, interleaved=interleaved)[0]

    def theirs(buffer: Tensor) -> Tensor:
        return plain(buffer[:, :, 1], cos, sin, positions, interleaved)

    with use(backend, op="rotary"):
        actual = gradients(ours, inputs, dout)
    expected, exact = gradients(theirs, inputs, dout), gradients(theirs, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)
    untouched = slice(rotary_dim, None)
    assert torch.equal(actual["out"][..., untouched], inputs["buffer"][:, :, 1][..., untouched])
    assert torch.equal(actual["buffer"][:, :, 1][..., untouched], dout[..., untouched])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_rotary_dims_of_the_heads_named_are_written(backend, dtype, device):
    """One call rotates q and k of a packed buffer; v and every dim past rotary_dim keep their bits."""
    buffer = packed((2, 3, 4, 64), dtype, device)
    buffer[:, :, :, :, 40] = torch.nan  # never read
    before = buffer.clone()
    cos, sin = rotary_table(LENGTH, 32, device=device)
    with use(backend, op="rotary"):
        apply_rotary_(buffer[:, :, :2].flatten(2, 3), None, cos, sin)
    assert torch.equal(buffer[:, :, 2].nan_to_num(), before[:, :, 2].nan_to_num())
    assert torch.equal(buffer[..., 32:].nan_to_num(), before[..., 32:].nan_to_num())
    positions = torch.arange(3, device=device).expand(2, 3)
    expected = plain(before[:, :, :2].flatten(2, 3).double(), cos, sin, positions, False)
    assert_no_worse(
        buffer[:, :, :2].flatten(2, 3)[..., :32],
        plain(before[:, :, :2].flatten(2, 3), cos, sin, positions, False)[..., :32],
        expected[..., :32],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_by_tensor_offset_and_documents_agree(backend, dtype, device):
    cos, sin = rotary_table(LENGTH, 32, device=device)
    x = packed((1, 9, 2, 64), torch.float32, device)[:, :, 0].clone()
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]], device=device)  # documents of 3, 1 and 5 rows
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32, device=device)
    with use(backend, op="rotary"):
        by_tensor = apply_rotary_(x.clone(), None, cos, sin, positions=positions.to(dtype))[0]
        by_document = apply_rotary_(x.clone(), None, cos, sin, cu_seqlens=cu_seqlens)[0]
        by_offset = torch.cat([apply_rotary_(part, None, cos, sin)[0] for part in x.clone().split([3, 1, 5], 1)], 1)
        shifted = apply_rotary_(x.clone(), None, cos, sin, offset=7)[0]
        by_row = [apply_rotary_(x[:, s : s + 1].clone(), None, cos, sin, offset=7 + s)[0] for s in range(9)]
    assert torch.equal(by_tensor, by_document)
    assert torch.equal(by_tensor, by_offset)
    assert torch.equal(shifted, torch.cat(by_row, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_separate_q_and_k_by_stride(backend, device):
    """k has fewer heads, and both are views of (batch, heads, sequence, head_dim); two runs agree bit for bit."""
    cos, sin = rotary_table(LENGTH, 8, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 16, generator=generator).to(device).transpose(1, 2) for heads in (6, 2))
    positions = torch.arange(5, device=device).expand(2, 5)
    with use(backend, op="rotary"):
        once, twice = (apply_rotary_(q.clone(), k.clone(), cos, sin) for _ in range(2))
    for a, b, x in zip(once, twice, (q, k), strict=True):
        assert a.stride() == x.stride()
        assert torch.equal(a, b)
        assert_no_worse(a, plain(x, cos, sin, positions, False), plain(x.double(), cos, sin, positions, False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_pair(backend, dtype, device):
    cos, sin = rotary_table(LENGTH, 8, device=device)
    x = packed((1, 4, 2, 16), dtype, device)[:, :, 0].clone()
    x[0, 1, 0, 0], x[0, 2, 1, 5], x[0, 3, 0, 3] = torch.nan, torch.inf, -torch.inf
    expected = plain(x.double(), cos, sin, torch.arange(4, device=device)[None], False)
    with use(backend, op="rotary"):
        apply_rotary_(x, None, cos, sin)
    assert_same_nonfinite(x, expected)


def test_gradient_reaches_the_buffer_that_a_slice_belongs_to(device):
    """After a rotation in place on a view that autograd tracks, the rest of the buffer keeps its gradient."""
    cos, sin = rotary_table(LENGTH, 8, device=device)
    leaf = packed((1, 4, 2, 16), torch.float32, device).requires_grad_()
    buffer = leaf * 1
    apply_rotary_(buffer[:, :, 0], buffer[:, :, 1], cos, sin)
    weight = packed((1, 4, 2, 16), torch.float32, device, seed=3)
    (buffer * weight).sum().backward()
    positions = torch.arange(4, device=device)[None]
    expected = torch.autograd.grad(
        plain(leaf[:, :, :2].flatten(2, 3), cos, sin, positions, False), leaf, weight[:, :, :2].flatten(2, 3)
    )[0]
    expected[:, :, 2] = weight[:, :, 2]
    torch.testing.assert_close(leaf.grad, expected)


def test_table_is_transformers_own():
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    config = PhiConfig(hidden_size=128, num_attention_heads=2, partial_rotary_factor=0.5)
    cos, sin = PhiRotaryEmbedding(config)(torch.zeros(1), torch.arange(2048)[None])
    ours = rotary_table(2048, 32)
    assert torch.equal(ours[0], cos[0, :, :16])
    assert torch.equal(ours[1], sin[0, :, :16])


X = torch.zeros(2, 3, 4, 16)
TABLE = rotary_table(8, 8)
BAD: list[tuple[tuple, dict, type[Exception], str]] = [
    ((X[0], None, *TABLE), {}, ValueError, r"q has shape \(3, 4, 16\); expected \(batch"),
    ((X.int(), None, *TABLE), {}, TypeError, "q is torch.int32"),
    ((X, X[:1], *TABLE), {}, ValueError, "expected one batch, sequence and device"),
    ((X.transpose(2, 3), None, *TABLE), {}, ValueError, "q's last stride is 16; expected 1"),
    ((X, X[:, :, :1].expand(X.shape), *TABLE), {}, ValueError, r"k's strides are \(192, 64, 0, 1\)"),
    ((X[:1].expand(X.shape), None, *TABLE), {}, ValueError, "q's strides are .* would turn more than once"),
    ((X, None, *rotary_table(8, 32)), {}, ValueError, "rotate 32 dims and q's head_dim is 16"),
    ((X, None, TABLE[0], TABLE[1][:2]), {}, ValueError, r"sin has shape \(2, 4\)"),
    ((X, None, TABLE[0].half(), TABLE[1]), {}, TypeError, "cos is torch.float16; expected float32"),
    ((X, None, TABLE[0].to("meta"), TABLE[1]), {}, ValueError, "cos is on meta and q is on cpu"),
    ((X, None, *TABLE), {"offset": 6}, ValueError, "offset=6 and a sequence of 3 reach past the table's 8"),
    ((X, None, *TABLE), {"positions": torch.zeros(3, dtype=torch.int64)}, ValueError, r"positions \(3,\)"),
    ((X, None, *TABLE), {"positions": torch.zeros(2, 3)}, TypeError, "positions are torch.float32"),
    ((X, None, *TABLE), {"positions": torch.full((2, 3), 8)}, ValueError, "run from 8 to 8; the table has 0 to 7"),
    ((X, None, *TABLE), {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "needs batch 1, not 2"),
    ((X[:1], None, *TABLE), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens is torch.int64"),
    ((X, None, *TABLE), {"offset": 1, "positions": torch.zeros(2, 3).int()}, ValueError, "give one of them"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        apply_rotary_(*arguments, **options)


def test_odd_rotary_dim_and_narrow_table_are_refused():
    with pytest.raises(ValueError, match="rotary_dim=31: expected an even number"):
        rotary_table(8, 31)
    with pytest.raises(ValueError, match=r"dtype=torch.float16: expected float32"):
        rotary_table(8, 32, dtype=torch.float16)
    with use("triton", op="rotary"), pytest.raises(TypeError, match=r"use\('reference', op='rotary'\)"):
        apply_rotary_(X.double(), None, *TABLE)
