"""What is expected of a GPU: the page is the code's, and the numbers are those of bytes and rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import predictions
from benchmarks.gpu.predicted import predicted

H100 = "NVIDIA H100 80GB HBM3"


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "predicted-h100.md"
    assert page.read_text(encoding="utf-8") == predictions.page()


def test_a_device_without_predictions_has_none() -> None:
    assert predicted("NVIDIA GeForce RTX 4090") is None
    assert predicted(H100) == predictions.predicted(H100)


def test_milliseconds_by_hand() -> None:
    """LayerNorm reads and writes 8192 x 2048 numbers of 2 bytes. Causal attention has half of 4 x 32 x 2048² pairs,
    each with 64 products of 2 FLOPs for QKᵀ and again for PV."""
    found = predictions.predicted(H100)
    share = {name: share.value for name, share in predictions.SHARES.items()}
    assert found["layer_norm, fp16, forward"] == pytest.approx(2 * 33.554432e6 / (3.35e9 * share["streaming"]))
    flops = 4 * 32 * 2048**2 / 2 * 64 * 2 * 2
    assert found["attention, sequence 2048, bf16, forward"] == pytest.approx(
        flops / (989.4e9 * share["attention forward"])
    )


def test_a_block_by_hand() -> None:
    """12 d² products per token; LayerNorm reads x and writes h and x + bias, RoPE moves half of q and k both ways, GELU
    reads and writes 4 d and copies o: 3 + 2 + 10 rows of d numbers."""
    share = {name: share.value for name, share in predictions.SHARES.items()}
    products = 2 * 8192 * 12 * 2048**2 / (989.4e9 * share["product"])
    scores = 2 * 8192 * 2048 * 2048 / (989.4e9 * share["attention forward"])
    moved = 15 * 33.554432e6 / (3.35e9 * share["streaming"])
    found = predictions.predicted(H100)["parallel_block, fp16, forward"]
    assert found == pytest.approx(products + scores + moved)


def test_no_rate_passes_the_data_sheet() -> None:
    assert all(0 < share.value < 1 for share in predictions.SHARES.values())
    step = predictions.predicted(H100)["training step, phi-1.5, fp16"] / 1e3
    flops = 16 * 2048 * predictions.PhiConfig().flops_per_token(2048, causal=True)
    assert 0.3 < flops / step / 989.4e12 < 0.7
