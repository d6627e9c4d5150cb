"""The symmetric products of Muon's iteration in Triton: against float64, mirrored bit for bit, at ragged sizes."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_no_worse
from torch import Tensor

from phi_fast.kernels import backend, use
from phi_fast.kernels.muon import COEFFICIENTS, orthogonalize

triton = pytest.importorskip("phi_fast.kernels.triton.muon")
_, B, C = COEFFICIENTS
DTYPES = (torch.float32, torch.bfloat16)
ROWS_AND_WIDTH = [(1, 7), (48, 48), (130, 300), (250, 64), (257, 96), (129, 1)]
"""One to five rows of tiles of 64 or 128; a width that is a multiple of the tile's, and one that is not."""


def draw(dtype: torch.dtype, *shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTH)
@pytest.mark.parametrize("transposed", [False, True])
def test_triton_has_plain_torchs_error_and_equal_halves(rows, width, transposed, dtype, device) -> None:
    draws = 64 if rows == 1 else 1  # the error of a single entry is a matter of chance
    shape = (width, rows) if transposed else (rows, width)
    xs = [draw(dtype, *shape, device=device, seed=seed) for seed in range(draws)]
    xs = [x.mT if transposed else x for x in xs]
    grams = [triton.symmetric_product(x) for x in xs]
    exact = [x.double() @ x.double().mT for x in xs]
    assert_no_worse(*map(torch.stack, (grams, [x @ x.mT for x in xs], exact)), "x xᵀ")
    both = [triton.symmetric_product(gram, gram, alpha=C, beta=B) for gram in grams]
    plain = [torch.addmm(gram, gram, gram, beta=B, alpha=C) for gram in grams]
    exact = [B * gram.double() + C * (gram.double() @ gram.double()) for gram in grams]
    assert_no_worse(*map(torch.stack, (both, plain, exact)), "b a + c a a")
    assert all(torch.equal(x, x.mT) for x in grams + both)
    assert torch.equal(grams[0], triton.symmetric_product(xs[0]))


def test_triton_reads_any_strides(device: str) -> None:
    packed = draw(torch.float32, 70, 3, 50, device=device)
    for x in (packed[:, 1], packed[:, 1].mT, packed[::2, :, 7], packed.permute(2, 0, 1)[::3, :, 0]):
        assert torch.equal(triton.symmetric_product(x), triton.symmetric_product(x.contiguous()))


def test_triton_passes_nan_on_to_its_row_and_column_only(device: str) -> None:
    x = draw(torch.float32, 130, 40, device=device)
    x[129, 39] = torch.nan
    bad = triton.symmetric_product(x).isnan()
    assert bad[129].all() and bad[:, 129].all() and int(bad.sum()) == 2 * 130 - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (140, 70), (70, 140)])
def test_triton_orthogonalises_with_the_references_error(shape, dtype, device) -> None:
    m = draw(dtype, *shape, device=device)
    with use("reference", op="muon"):
        plain, exact = orthogonalize(m, dtype=dtype), orthogonalize(m.double(), dtype=torch.float64)
    with use("triton", op="muon"):
        assert_no_worse(orthogonalize(m, dtype=dtype), plain, exact)


def test_triton_refuses_fp64(device: str) -> None:
    with use("triton", op="muon"), pytest.raises(TypeError, match=r"muon in Triton computes in fp32"):
        orthogonalize(torch.eye(3, device=device), dtype=torch.float64)


def test_products_are_tritons_on_a_gpu_and_torchs_on_a_cpu() -> None:
    assert backend.name("muon", "cuda") == "triton"
    assert backend.module("triton", "muon").orthogonalize is triton.orthogonalize
    assert backend.module("cpp", "muon").orthogonalize is backend.module("reference", "muon").orthogonalize


@pytest.mark.parametrize("tiles", range(1, 9))
def test_each_triton_tile_is_written(tiles: int, device: str) -> None:
    """x is one column of different numbers, so that a tile left out, or in the wrong place, shows."""
    x = torch.arange(1.0, tiles * triton.SINGLE.M, device=device)[:, None] / 1024
    assert torch.equal(triton.symmetric_product(x), x * x.mT)
