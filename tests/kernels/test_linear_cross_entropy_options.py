"""linear_cross_entropy's softcap, class weights and reduction="none", beside torch's cross_entropy and float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, backends, double, gradients
from products import multiply_as_a_gpu
from test_linear_cross_entropy import NoSync, lost, make, make_labels, peak_bytes
from torch import Tensor

from phi_fast.kernels import backend, linear_cross_entropy
from phi_fast.kernels import linear_cross_entropy_chunks as chunks
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.reference.linear_cross_entropy import cross_entropy_ as reference

module = importlib.import_module("phi_fast.kernels.linear_cross_entropy")
rows_module = importlib.import_module("phi_fast.kernels.linear_cross_entropy_rows")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = backends(DEVICE)
REDUCTIONS = ("mean", "sum", "none")

# softcap, weighted, label smoothing, z-loss, magnitude of the logits
OPTIONS = {
    "softcap": (30.0, False, 0.0, 0.0, 1.0),
    "softcap that bites": (5.0, False, 0.1, 1e-2, 20.0),
    "weights": (None, True, 0.0, 0.0, 1.0),
    "weights smoothed": (None, True, 0.1, 1e-2, 10.0),
    "all": (8.0, True, 0.2, 1e-3, 5.0),
    "none": (None, False, 0.1, 1e-3, 1.0),
}


def interpreted(backend_name: str, *case: str, quick: bool) -> tuple:
    """A case, marked slow in the interpreter unless `quick`; a case with every option at once always runs."""
    slow = backend_name == "triton" and DEVICE == "cpu" and not quick
    return pytest.param(backend_name, *case, marks=[pytest.mark.slow] if slow else [])  # type: ignore[return-value]


CASES = [
    interpreted(backend_name, name, reduction, quick=(name, reduction) in (("all", "mean"), ("none", "none")))
    for backend_name, name, reduction in itertools.product(BACKENDS, OPTIONS, REDUCTIONS)
    if name == "all" or reduction != "sum"
]
PRIMITIVE_CASES = [
    interpreted(backend_name, name, quick=name == "all") for backend_name, name in itertools.product(BACKENDS, OPTIONS)
]


def make_weights(vocab: int) -> Tensor:
    """Class weights over two orders of magnitude, one of them 0."""
    weights = 10.0 ** torch.rand(vocab, generator=torch.Generator().manual_seed(vocab)).mul(2).sub(1)
    weights[3] = 0.0
    return weights.to(DEVICE)


def plain_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    cap: float | None,
    eps: float,
    z: float,
    reduction: str,
) -> Tensor:
    """The loss as PyTorch users write it; the z-loss gives a position the same weight as its cross entropy."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = None if weights is None else weights.to(scores.dtype)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    loss = F.cross_entropy(scores, labels, weights, label_smoothing=eps, reduction=reduction)
    counts = labels != -100
    of_rows = counts if weights is None else counts * weights[labels.where(counts, 0)]
    extra = z * of_rows * scores.logsumexp(1).square()
    if reduction == "none":
        return loss + extra
    return loss + (extra.sum() if reduction == "sum" else extra.sum() / of_rows.sum())


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend_name", "name", "reduction"), CASES)
def test_error_against_float64(dtype: torch.dtype, backend_name: str, name: str, reduction: str) -> None:
    cap, weighted, eps, z, magnitude = OPTIONS[name]
    rows, d, vocab = 160, 24, 301  # enough for the largest errors not to depend on a few samples
    inputs, labels = make(rows, d, vocab, dtype, DEVICE, magnitude), make_labels(rows, vocab, DEVICE)
    weights = make_weights(vocab) if weighted else None
    dout = torch.ones(())
    if reduction == "none":
        dout = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(5)).to(DEVICE)

    def ours(**tensors: Tensor) -> Tensor:
        options = {"label_smoothing": eps, "z_loss": z, "softcap": cap, "class_weight": weights, "chunk_size": 64}
        return linear_cross_entropy(**tensors, labels=labels, reduction=reduction, **options)

    def theirs(reduction: str = reduction, **tensors: Tensor) -> Tensor:
        logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
        return plain_loss(logits, labels, weights, cap=cap, eps=eps, z=z, reduction=reduction)

    exact, usual = gradients(theirs, double(inputs), dout), gradients(theirs, inputs, dout)
    with backend.use(backend_name, op="linear_cross_entropy"):
        actual = gradients(ours, inputs, dout)
    if reduction != "none":  # a single number is compared with the rows' error in plain PyTorch
        errors = theirs("none", **inputs).double() - theirs("none", **double(inputs))
        typical = errors[labels != -100].square().mean().sqrt() * (1 if reduction == "mean" else rows)
        error = (actual.pop("out").double() - exact["out"]).abs()
        assert error <= 2 * typical, f"loss: error {error:.3e}, in plain PyTorch a row's {typical:.3e}"
    for name, tensor in actual.items():
        assert_no_worse(tensor, usual[name], exact[name], f"{backend_name} {name}")


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend_name", "name"), PRIMITIVE_CASES)
def test_primitive_error_against_float64(dtype: torch.dtype, backend_name: str, name: str) -> None:
    """Covers losses, gradients scaled by row, and their sum, for odd widths and logits far beyond the cap."""
    cap, weighted, eps, z, magnitude = OPTIONS[name]
    rows, vocab = 131, 517
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(rows, vocab, generator=generator) * 3 * magnitude).to(DEVICE, dtype)
    bias = torch.randn(vocab, generator=generator).to(DEVICE, dtype)
    labels, weights = make_labels(rows, vocab, DEVICE), make_weights(vocab) if weighted else None
    scale = 0.5 + torch.rand(rows, generator=generator).to(DEVICE)

    def judge(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        x = (logits.to(wide) + bias.to(wide)).requires_grad_()  # the sum that a matrix product's epilogue computes
        losses = plain_loss(x, labels, weights, cap=cap, eps=eps, z=z, reduction="none")
        (dx,) = torch.autograd.grad(losses, x, scale.to(wide))
        dx = dx.to(logits.dtype)
        return losses.detach(), dx, dx.to(wide).sum(0)

    exact, usual = judge(logits.double(), bias.double()), judge(logits, bias)
    kernel = importlib.import_module(f"phi_fast.kernels.{backend_name}.linear_cross_entropy").cross_entropy_
    options = {"objective": Objective(-100, eps, z, weights, cap)}
    alone = kernel(logits.clone(), labels, bias, scale=scale, need_grad=False, **options)
    dbias = torch.zeros(vocab, device=DEVICE)
    losses = kernel(logits, labels, bias, scale=scale, need_grad=True, dbias=dbias, **options)
    assert torch.equal(losses, alone)
    for what, a, b, c in zip(("losses", "dlogits", "dbias"), (losses, logits, dbias), usual, exact, strict=True):
        assert_no_worse(a, b, c, what)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_primitive_at_infinities_and_labels_outside(backend_name: str) -> None:
    kernel = importlib.import_module(f"phi_fast.kernels.{backend_name}.linear_cross_entropy").cross_entropy_
    logits = torch.randn(4, 70, device=DEVICE)
    logits[0, 5], logits[1, 7], logits[2, 9] = torch.inf, -torch.inf, torch.nan
    labels = torch.tensor([5, 6, -100, 70], device=DEVICE)
    objective = Objective(-100, 0.1, 1e-3, make_weights(70), 4.0)
    options = {"objective": objective, "scale": torch.ones((), device=DEVICE), "need_grad": True}
    expected = logits.clone()
    losses_expected = reference(expected, labels, **options)
    losses = kernel(logits, labels, **options)
    torch.testing.assert_close(losses, losses_expected, equal_nan=True)
    torch.testing.assert_close(logits, expected, equal_nan=True)
    assert losses[:3].isfinite().all() and losses[3].isnan() and logits[3].isnan().all() and not logits[2].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_in_float64(name: str) -> None:
    cap, weighted, eps, z, _ = OPTIONS[name]
    leaves = {name: x.requires_grad_() for name, x in make(5, 4, 11, torch.float64, "cpu").items()}
    labels, weights = make_labels(5, 11, "cpu"), make_weights(11).cpu() if weighted else None
    for reduction in REDUCTIONS:

        def loss(*tensors: Tensor, reduction: str = reduction) -> Tensor:
            options = {"label_smoothing": eps, "z_loss": z, "softcap": cap, "class_weight": weights, "chunk_size": 2}
            return linear_cross_entropy(*tensors, labels, reduction=reduction, **options)

        with backend.use("reference"):
            assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_shape_of_the_rows_losses() -> None:
    inputs, labels = make(12, 16, 50, torch.float32, DEVICE), make_labels(12, 50, DEVICE)
    flat = linear_cross_entropy(**inputs, labels=labels, reduction="none")
    cube = {**inputs, "hidden": inputs["hidden"].view(3, 4, 16)}
    assert torch.equal(linear_cross_entropy(**cube, labels=labels.view(3, 4), reduction="none"), flat.view(3, 4))
    assert not flat[labels == -100].any() and flat.dtype == torch.float32
    torch.testing.assert_close(flat.sum(), linear_cross_entropy(**inputs, labels=labels, reduction="sum"))
    empty = linear_cross_entropy(**{**inputs, "hidden": inputs["hidden"][:0]}, labels=labels[:0], reduction="none")
    assert empty.shape == (0,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counts(reduction: str) -> None:
    """As in torch, the mean of no rows is NaN and its gradients are 0."""
    inputs, labels = make(4, 8, 20, torch.float32, DEVICE), torch.full((4,), -100, device=DEVICE)
    options = {"class_weight": make_weights(20), "softcap": 3.0, "reduction": reduction}
    dout = torch.ones(4 if reduction == "none" else ())
    result = gradients(lambda **t: linear_cross_entropy(**t, labels=labels, **options), inputs, dout)
    assert result.pop("out").isnan().all() if reduction == "mean" else not result.pop("out").any()
    assert not any(grad.any() for grad in result.values())


def test_the_mean_does_not_depend_on_the_unit_of_the_weights() -> None:
    inputs, labels, weights = make(9, 8, 20, torch.float32, DEVICE), make_labels(9, 20, DEVICE), make_weights(20)
    options = {"labels": labels, "label_smoothing": 0.1, "z_loss": 1e-2}
    a, b = (linear_cross_entropy(**inputs, class_weight=weights * unit, **options) for unit in (1.0, 1000.0))
    torch.testing.assert_close(a, b)
    ones = linear_cross_entropy(**inputs, class_weight=torch.ones(20, device=DEVICE), **options)
    torch.testing.assert_close(ones, linear_cross_entropy(**inputs, **options))


@pytest.fixture
def fp16_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a CPU do what a GPU does: store logits and gradient in fp16, accumulate and return products in fp32."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(chunks, "working_dtype", lambda hidden: hidden.dtype)
    multiply_as_a_gpu(monkeypatch)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.usefixtures("fp16_storage")
def test_no_fp16_gradient_underflows_that_scaled_autograd_keeps(backend_name: str, reduction: str) -> None:
    """Class weights are in the hundreds, and the rows' incoming gradients range from 1 to 10."""
    inputs = make(192, 16, 128, torch.float16, DEVICE)
    inputs["bias"][64:] -= 8
    labels = torch.randint(128, (192,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights, cap = make_weights(128).sqrt() * 100, 20.0
    dout = torch.tensor(2.0**16)
    if reduction == "none":
        dout = 10.0 ** torch.rand(192, generator=torch.Generator().manual_seed(1))
    dout = dout.to(DEVICE)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        return plain_loss(logits, labels, weights, cap=cap, eps=0.0, z=0.0, reduction=reduction)

    def ours(**tensors: Tensor) -> Tensor:
        options = {"class_weight": weights, "softcap": cap, "reduction": reduction, "chunk_size": 150}
        return linear_cross_entropy(**tensors, labels=labels, **options)

    exact, usual = gradients(theirs, double(inputs), dout), gradients(theirs, inputs, dout)
    with backend.use(backend_name, op="linear_cross_entropy"):
        actual = gradients(ours, inputs, dout)
    for name in ("hidden", "weight", "bias"):
        assert actual[name].isfinite().all()
        assert lost(actual[name], exact[name]) <= lost(usual[name], exact[name]) == 0, name
        assert_no_worse(actual[name], usual[name], exact[name], name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.usefixtures("fp16_storage")
def test_fp16_storage_neither_overflows_nor_vanishes_whatever_the_weights(unit: float, reduction: str) -> None:
    """The gradient of a loss whose weights and dout cancel does not depend on the weights' unit."""
    inputs, labels = make(8, 8, 40, torch.float16, DEVICE), make_labels(8, 40, DEVICE)
    weights = make_weights(40) * unit
    dout = torch.full((8,) if reduction == "none" else (), 1.0 if reduction == "mean" else 1 / unit)

    def ours(**tensors: Tensor) -> Tensor:
        options = {"class_weight": weights, "z_loss": 1e-3, "label_smoothing": 0.1, "reduction": reduction}
        return linear_cross_entropy(**tensors, labels=labels, **options)

    def theirs(**tensors: Tensor) -> Tensor:
        logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
        return plain_loss(logits, labels, weights.double(), cap=None, eps=0.1, z=1e-3, reduction=reduction)

    actual, exact = gradients(ours, inputs, dout), gradients(theirs, double(inputs), dout.double())
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-2, atol=2e-3 * float(exact[name].max()))


@pytest.mark.parametrize(("dout", "judged"), [(2.0**-20, "weight"), (2.0**17, "hidden")])
@pytest.mark.usefixtures("fp16_storage")
def test_fp16_rows_keep_what_arrives_small_or_large(dout: float, judged: str) -> None:
    """dlogits · dout exceeds fp16's range at either end; its products with large hidden or small weights do not."""
    inputs, labels = make(8, 8, 40, torch.float16, DEVICE), torch.arange(8, device=DEVICE)
    inputs["hidden"] *= 256
    inputs["weight"] /= 256
    rows = torch.full((8,), dout, device=DEVICE)
    actual = gradients(lambda **t: linear_cross_entropy(**t, labels=labels, reduction="none"), inputs, rows)[judged]

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")

    exact = gradients(theirs, double(inputs), rows.double())[judged]
    torch.testing.assert_close(actual.double(), exact, rtol=1e-2, atol=2e-3 * float(exact.abs().max()))


@pytest.mark.usefixtures("fp16_storage")
def test_rows_whose_gradient_is_not_finite_do_not_hide() -> None:
    """An overflow must reach the loss scaler's check and not vanish in the division by the largest row."""
    inputs, labels = make(4, 8, 20, torch.float16, DEVICE), torch.tensor([1, 2, 3, 4], device=DEVICE)
    for bad in (torch.inf, torch.nan):
        dout = torch.tensor([1.0, bad, 1.0, 1.0], device=DEVICE)
        result = gradients(lambda **t: linear_cross_entropy(**t, labels=labels, reduction="none"), inputs, dout)
        assert not result["hidden"][1].isfinite().any() and result["hidden"][[0, 2, 3]].isfinite().all()
        assert not result["weight"].isfinite().any()


def test_rows_form_gradients_in_the_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass computes no gradients, and the backward pass only those that are needed."""
    formed, compute = [], chunks.losses_and_gradients
    monkeypatch.setattr(chunks, "losses_and_gradients", lambda *a: formed.append(a[-1]) or compute(*a))
    inputs, labels = make(6, 8, 20, torch.float32, DEVICE), make_labels(6, 20, DEVICE)
    inputs["weight"].requires_grad_()
    losses = linear_cross_entropy(**inputs, labels=labels, reduction="none")
    assert formed == [[False] * 3]
    losses.sum().backward()
    assert formed[1:] == [[False, True, False]] and inputs["weight"].grad is not None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("fp16_storage")
def test_nothing_waits_for_the_device(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "check_labels", lambda *_: None)  # it runs on a CPU only
    for dtype in (torch.float32, torch.float16):
        inputs = {name: x.requires_grad_() for name, x in make(9, 8, 20, dtype, DEVICE).items()}
        options = {"class_weight": make_weights(20), "softcap": 5.0, "reduction": reduction, "chunk_size": 4}
        labels = make_labels(9, 20, DEVICE)
        with backend.use("reference") if DEVICE == "cpu" else backend.use("triton"), NoSync():
            linear_cross_entropy(**inputs, labels=labels, **options).sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_agree_bit_for_bit(reduction: str) -> None:
    inputs, labels = make(33, 16, 200, torch.bfloat16, DEVICE), make_labels(33, 200, DEVICE)
    options = {"class_weight": make_weights(200), "softcap": 5.0, "reduction": reduction, "chunk_size": 8}
    dout = torch.ones(33 if reduction == "none" else ())
    first, second = (
        gradients(lambda **t: linear_cross_entropy(**t, labels=labels, **options), inputs, dout) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operators_and_compile(reduction: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in make(9, 8, 20, torch.float32, DEVICE).items()}
    labels, weights = make_labels(9, 20, DEVICE), make_weights(20)
    if reduction == "none":
        row = (*inputs.values(), labels, -100, 0.1, 0.01, weights, 5.0, 4)
        torch.library.opcheck(rows_module.row_losses, row)
        detached = [None if x is None else x.detach() for x in (inputs["hidden"], inputs["weight"], None)]
        for wanted in ([True, True, False], [False, True, False]):
            arguments = (torch.rand(9, device=DEVICE), *detached, *row[3:], wanted)
            torch.library.opcheck(rows_module._row_gradients, arguments)
    else:
        options = (-100, 0.1, 0.01, reduction == "mean", None, 4, [True] * 3, weights, 5.0)
        torch.library.opcheck(module._linear_cross_entropy_op, (*inputs.values(), labels, *options))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = {"class_weight": weights, "softcap": 5.0, "label_smoothing": 0.1, "chunk_size": 4}
        return linear_cross_entropy(hidden * 2, weight, bias, labels, reduction=reduction, **options)

    dout = torch.rand(9 if reduction == "none" else ())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, captured = gradients(loss, inputs, dout), gradients(compiled, inputs, dout)
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


def test_a_second_derivative_of_the_rows_losses_is_refused() -> None:
    inputs = {name: x.requires_grad_() for name, x in make(5, 8, 20, torch.float32, DEVICE).items()}
    losses = linear_cross_entropy(**inputs, labels=make_labels(5, 20, DEVICE), reduction="none")
    (first,) = torch.autograd.grad(losses.sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy can be differentiated once"):
        (losses.sum() + first.square().sum()).backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap=0.0: expected a finite value > 0"),
        ({"softcap": float("inf")}, "softcap=inf: expected a finite"),
        ({"class_weight": torch.ones(4)}, r"class_weight is torch.float32 \(4,\): expected floating point \(5,\)"),
        ({"class_weight": torch.ones(5).long()}, r"class_weight is torch.int64 \(5,\)"),
        ({"class_weight": torch.ones(5, device="meta")}, "class_weight is on meta and hidden on cpu"),
        ({"class_weight": torch.ones(5, requires_grad=True)}, r"class_weight requires a gradient.*detach\(\)"),
        ({"labels": torch.tensor([0, 5, 0]), "reduction": "none"}, r"labels\[1\]=5 .*expected 0 to 4"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "bias": None, "labels": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the CPU allocator's events")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_peak_memory_at_vocabulary_51200(reduction: str) -> None:
    rows, d, vocab = 512, 32, 51200
    inputs = {name: x.requires_grad_() for name, x in make(rows, d, vocab, torch.float32, "cpu").items()}
    options = {"labels": make_labels(rows, vocab, "cpu"), "class_weight": make_weights(vocab).cpu(), "softcap": 30.0}
    peak = peak_bytes(
        lambda: linear_cross_entropy(**inputs, **options, reduction=reduction, chunk_size=64).sum().backward()
    )
    chunk, dweight = 64 * vocab * 4, vocab * d * 4
    temporaries = 2 if backend.name("linear_cross_entropy", "cpu") == "reference" else 0  # the reference is plain torch
    assert peak < 1.1 * ((1 + 2 * temporaries) * chunk + 2 * dweight), f"{peak / 2**20:.0f} MiB"
