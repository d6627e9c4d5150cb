"""linear_cross_entropy in bf16 on a CPU, without stored logits, on each instruction set that has it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from numerics import assert_no_worse, assert_same_nonfinite, double, gradients
from test_linear_cross_entropy import make, make_labels
from test_linear_cross_entropy_options import OPTIONS, make_weights, plain_loss
from torch import Tensor
from torch.nn.functional import linear

from phi_fast._C import cpu
from phi_fast.kernels import backend, linear_cross_entropy, use
from phi_fast.kernels.cpp import linear_cross_entropy as kernel
from phi_fast.kernels.reference.linear_cross_entropy import Objective

BF16, ONE = torch.bfloat16, torch.ones(())


def isas_with_it() -> list[str]:
    found = []
    for name in cpu.supported_isas():
        cpu.force_isa(name)
        found += [name] * cpu.has_linear_cross_entropy()
    cpu.force_isa("")
    return found


@pytest.fixture(params=isas_with_it())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An instruction set. Dot products, too, form gradients here, which they can and do more slowly than torch."""
    cpu.force_isa(request.param)
    monkeypatch.setattr(kernel, "has_tiles", lambda: True)
    yield request.param
    cpu.force_isa("")


def compare(shape: tuple[int, int, int], option: str, reduction: str = "mean", bias: bool = True) -> None:
    """Loss and gradients against float64, with at most twice the error of plain PyTorch in bf16."""
    cap, weighted, eps, z, magnitude = OPTIONS[option]
    rows, _, vocab = shape
    inputs, labels = make(*shape, BF16, "cpu", magnitude * 0.3), make_labels(rows, vocab, "cpu")
    if not bias:
        del inputs["bias"]
    weights = make_weights(vocab).cpu() if weighted else None

    def plain(**tensors: Tensor) -> Tensor:
        logits = linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
        return plain_loss(logits, labels, weights, cap=cap, eps=eps, z=z, reduction=reduction)

    def ours(bias: Tensor | None = None, **tensors: Tensor) -> Tensor:
        options = {"label_smoothing": eps, "z_loss": z, "softcap": cap, "class_weight": weights}
        return linear_cross_entropy(
            **tensors, bias=bias, labels=labels, reduction=reduction, chunk_size=1024, **options
        )

    dout = torch.rand(rows, generator=torch.Generator().manual_seed(2)) if reduction == "none" else ONE
    assert backend.logits_stay_in_cache("cpu", BF16, gradients=True)
    exact, usual, actual = gradients(plain, double(inputs), dout), gradients(plain, inputs, dout), None
    actual = gradients(ours, inputs, dout)
    for name, tensor in actual.items():
        assert_no_worse(tensor, usual[name], exact[name], name)


# One of each; ragged panels; exactly whole ones; sums in more than one part, of hidden's columns and of its rows.
SHAPES = [(2, 1, 5), (37, 70, 301), (32, 64, 512), (70, 600, 1003), (1060, 40, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64(isa: str, shape: tuple[int, int, int]) -> None:
    compare(shape, "none")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(isa: str, option: str) -> None:
    compare((45, 40, 1103), option)
    compare((45, 40, 1103), option, "none", bias=False)


def test_more_blocks_than_groups(isa: str) -> None:
    """The gradient of hidden is summed over the blocks of a group, and then over the groups."""
    compare((40, 1100, 5000), "all")


def test_rows_in_chunks_give_the_gradient_of_all(isa: str) -> None:
    inputs, labels = make(90, 40, 301, BF16, "cpu"), make_labels(90, 301, "cpu")
    results = []
    for size in (90, 32):
        results.append(
            gradients(lambda **t: linear_cross_entropy(**t, labels=labels, chunk_size=size), inputs, ONE)  # noqa: B023
        )
    for name, whole in results[0].items():
        torch.testing.assert_close(results[1][name], whole, rtol=2**-7, atol=1e-6)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    inputs, labels = make(100, 70, 9001, BF16, "cpu"), make_labels(100, 9001, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8, 1):
            torch.set_num_threads(count)
            results.append(gradients(lambda **t: linear_cross_entropy(**t, labels=labels), inputs, ONE))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spread_as_in_torch(isa: str, value: float) -> None:
    inputs, labels = make(40, 8, 70, BF16, "cpu"), make_labels(40, 70, "cpu")
    inputs["bias"][5] = value
    labels[2] = 5

    def plain(**t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(linear(*t.values()), labels)

    exact = gradients(plain, double(inputs), ONE)
    actual = gradients(lambda **t: linear_cross_entropy(**t, labels=labels), inputs, ONE)
    counted = labels != -100
    exact["hidden"], actual["hidden"] = exact["hidden"][counted], actual["hidden"][counted]
    for name, tensor in actual.items():
        assert_same_nonfinite(tensor, exact[name], name)


def test_a_vocabulary_whose_first_blocks_are_masked(isa: str) -> None:
    """Logits of -inf in all of a block give probability 0, not NaN."""
    inputs, labels = make(8, 16, 1500, BF16, "cpu"), torch.arange(8) + 1400
    inputs["bias"][:1300] = -math.inf
    kept = {"hidden": inputs["hidden"], "weight": inputs["weight"][1300:], "bias": inputs["bias"][1300:]}
    found = gradients(lambda **t: linear_cross_entropy(**t, labels=labels), inputs, ONE)
    alone = gradients(lambda **t: linear_cross_entropy(**t, labels=labels - 1300), kept, ONE)
    assert bool((found["weight"][:1300] == 0).all() and (found["bias"][:1300] == 0).all())
    torch.testing.assert_close(found["out"], alone["out"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["weight"][1300:], alone["weight"], rtol=2**-7, atol=1e-6)


def test_rows_that_do_not_count_add_nothing(isa: str) -> None:
    inputs, labels = make(35, 16, 70, BF16, "cpu"), make_labels(35, 70, "cpu")
    inputs["hidden"][1, 3] = math.nan  # an ignored row, whose logits are NaN
    found = gradients(lambda **t: linear_cross_entropy(**t, labels=labels), inputs, ONE)
    assert bool((found["hidden"][1] == 0).all())
    assert all(bool(found[name].isfinite().all()) for name in ("out", "hidden", "bias"))


def test_a_label_outside_gives_nan(isa: str) -> None:
    inputs, labels = make(3, 16, 40, BF16, "cpu"), torch.tensor([1, 40, -7])
    dhidden = torch.zeros(3, 16)
    options = {"objective": Objective(), "scale": ONE, "dhidden": dhidden, "dweight": None, "dbias": None}
    losses = kernel.linear_cross_entropy(*inputs.values(), labels, first=True, **options)
    assert losses.isnan().tolist() == dhidden.isnan().all(1).tolist() == [False, True, True]


def test_no_logits_are_stored(isa: str) -> None:
    rows, vocab, sizes, empty = 64, 4096, [], torch.empty
    inputs, labels = make(rows, 16, vocab, BF16, "cpu"), make_labels(rows, vocab, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **options: sizes.append(size) or empty(*size, **options))
        linear_cross_entropy(**inputs, labels=labels)
        assert sizes == []
        with use("reference", op="weight_gradient"):
            linear_cross_entropy(**inputs, labels=labels)
        assert sizes == [(rows, vocab)]


@pytest.mark.parametrize("name", cpu.supported_isas())
def test_where_logits_are_stored(name: str) -> None:
    cpu.force_isa(name)
    try:
        inside = {
            (dtype, gradients): backend.logits_stay_in_cache("cpu", dtype, gradients=gradients)
            for dtype in (BF16, torch.float16, torch.float32)
            for gradients in (True, False)
        }
        with use("reference", op="linear_cross_entropy"):
            assert not backend.logits_stay_in_cache("cpu", BF16, gradients=False)
    finally:
        cpu.force_isa("")
    expected = {(BF16, True): name == "amx", (BF16, False): name in ("amx", "avx512_bf16")}
    assert {case for case, found in inside.items() if found} == {case for case, found in expected.items() if found}


def test_other_instruction_sets_refuse() -> None:
    inputs = make(3, 16, 40, BF16, "cpu")
    options = {"objective": Objective(), "scale": ONE, "dhidden": None, "dweight": None, "dbias": None}
    cpu.force_isa("portable")
    try:
        with pytest.raises(RuntimeError, match="not with the instruction set portable"):
            kernel.linear_cross_entropy(*inputs.values(), torch.arange(3), first=True, **options)
    finally:
        cpu.force_isa("")
