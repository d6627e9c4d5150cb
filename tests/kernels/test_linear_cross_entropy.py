"""linear_cross_entropy against float64, beside plain PyTorch: loss, gradients, memory, underflow, refused arguments."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, assert_same_nonfinite, backends, double, gradients
from products import multiply_as_a_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phi_fast.kernels import backend
from phi_fast.kernels import linear_cross_entropy_chunks as chunks
from phi_fast.kernels.linear_cross_entropy import linear_cross_entropy
from phi_fast.kernels.reference import weight_gradient
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.reference.linear_cross_entropy import cross_entropy_ as reference

module = importlib.import_module("phi_fast.kernels.linear_cross_entropy")  # the package's attribute is the function
BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")


def make(rows: int, d: int, vocab: int, dtype: torch.dtype, device: str, magnitude: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + d + vocab)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    return {"hidden": draw(rows, d) * magnitude, "weight": draw(vocab, d) * 0.3, "bias": draw(vocab)}


def make_labels(rows: int, vocab: int, device: str) -> Tensor:
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    labels[1::3] = -100
    labels[0], labels[-1] = 0, vocab - 1
    return labels.to(device)


def plain_rows(logits: Tensor, labels: Tensor, eps: float = 0.0, z: float = 0.0) -> Tensor:
    """Each row's loss as PyTorch users write it; the z-loss is PaLM's."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, label_smoothing=eps, reduction="none")
    return losses + (labels != -100) * z * logits.logsumexp(1).square() if z else losses


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, labels: Tensor, eps: float = 0.0, z: float = 0.0
) -> Tensor:
    """The mean loss, computed with all logits in memory."""
    return plain_rows(F.linear(hidden, weight, bias), labels, eps, z).sum() / (labels != -100).sum()


def compare(
    inputs: dict[str, Tensor], labels: Tensor, eps: float, z: float, backend_name: str, chunk_size: int | None
) -> None:
    def ours(bias: Tensor | None = None, **tensors: Tensor) -> Tensor:
        options = {"label_smoothing": eps, "z_loss": z, "chunk_size": chunk_size}
        return linear_cross_entropy(**tensors, bias=bias, labels=labels, **options)

    def theirs(**tensors: Tensor) -> Tensor:
        return plain(**tensors, labels=labels, eps=eps, z=z)

    def rows(tensors: dict[str, Tensor]) -> Tensor:
        logits = F.linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
        return plain_rows(logits, labels, eps, z)[labels != -100]

    one = torch.ones(())
    exact = gradients(theirs, double(inputs), one)
    usual = gradients(theirs, inputs, one)
    with backend.use(backend_name, op="linear_cross_entropy"):
        actual = gradients(ours, inputs, one)
    # The loss is a single number, so its error is a single sample: compare it with the rows' error in plain PyTorch.
    typical = (rows(inputs).double() - rows(double(inputs))).square().mean().sqrt()
    error = (actual.pop("out").double() - exact["out"]).abs()
    assert error <= 2 * typical, f"{backend_name} loss: error {error:.3e}, a row's in plain PyTorch {typical:.3e}"
    for name, tensor in actual.items():
        assert_no_worse(tensor, usual[name], exact[name], f"{backend_name} {name}")


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "d", "vocab", "magnitude", "with_bias", "eps", "z"),
    [
        (19, 24, 301, 1.0, True, 0.0, 0.0),
        (8, 16, 4097, 1.0, False, 0.0, 1e-3),
        (5, 16, 64, 1.0, True, 0.1, 1e-2),
        (7, 32, 130, 40.0, True, 0.1, 0.0),  # logits in the hundreds
    ],
)
def test_error_against_float64(device, dtype, backend_name, rows, d, vocab, magnitude, with_bias, eps, z) -> None:
    inputs = make(rows, d, vocab, dtype, device, magnitude)
    if not with_bias:
        del inputs["bias"]
    compare(inputs, make_labels(rows, vocab, device), eps, z, backend_name, chunk_size=8)


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(("eps", "z", "magnitude"), [(0.0, 0.0, 1.0), (0.1, 1e-2, 10.0), (0.0, 0.0, 300.0)])
def test_primitive_error_against_float64(device, dtype, backend_name, eps, z, magnitude) -> None:
    rows, vocab = 24, 517
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(rows, vocab, generator=generator) * magnitude).to(device, dtype)
    bias = torch.randn(vocab, generator=generator).to(device, dtype)
    labels = torch.randint(vocab, (rows,), generator=generator).to(device)

    def judge(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        x = (logits.to(wide) + bias.to(wide)).requires_grad_()  # the sum that a matrix product's epilogue computes
        losses = plain_rows(x, labels, eps, z)
        (dx,) = torch.autograd.grad(losses.sum(), x)
        dx = dx.to(logits.dtype)
        return losses.detach(), dx, dx.to(wide).sum(0)

    exact, usual = judge(logits.double(), bias.double()), judge(logits, bias)
    kernel = pytest.importorskip(f"phi_fast.kernels.{backend_name}.linear_cross_entropy").cross_entropy_
    dbias = torch.zeros(vocab, device=device)
    options = {"objective": Objective(-100, eps, z), "need_grad": True, "dbias": dbias}
    losses = kernel(logits, labels, bias, scale=torch.ones((), device=device), **options)
    for name, a, b, c in zip(("losses", "dlogits", "dbias"), (losses, logits, dbias), usual, exact, strict=True):
        assert_no_worse(a, b, c, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's products")
def test_error_of_bf16_products_on_a_cpu_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, their gradient and each chunk's products are rounded to bf16, as on a CPU with bf16 instructions."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    inputs = make(64, 24, 301, torch.bfloat16, "cpu")
    assert chunks.working_dtype(inputs["hidden"]) == torch.bfloat16
    compare(inputs, make_labels(64, 301, "cpu"), 0.1, 1e-3, "reference", chunk_size=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_memory_held_before_does_not_show(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of logits are padded, and a matrix product may read the padding, as oneDNN's for AMX does."""
    inputs, labels = make(37, 128, 1003, dtype, device), make_labels(37, 1003, device)
    for x in inputs.values():
        x.requires_grad_()
    empty = torch.empty

    def full_of_nan(*size, **options) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full_of_nan)
        linear_cross_entropy(**inputs, labels=labels).backward()
    assert all(bool(x.grad.isfinite().all()) for x in inputs.values())


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_strided_inputs(device: str, backend_name: str) -> None:
    inputs = make(12, 40, 77, torch.float32, device)
    inputs["hidden"], inputs["weight"] = inputs["hidden"][::2, 3:27], inputs["weight"].T[3:27].T
    inputs["bias"] = torch.stack([inputs["bias"], 1 + inputs["bias"]], 1)[:, 0]
    labels = torch.stack([make_labels(6, 77, device), make_labels(6, 77, device).flip(0)], 1)[:, 0]
    compare(inputs, labels, 0.0, 0.0, backend_name, chunk_size=4)


def test_leading_dims_and_sum(device: str) -> None:
    inputs = make(12, 16, 50, torch.float32, device)
    labels = make_labels(12, 50, device)
    flat = linear_cross_entropy(**inputs, labels=labels, reduction="sum")
    cube = linear_cross_entropy(**{**inputs, "hidden": inputs["hidden"].view(3, 4, 16)}, labels=labels.view(3, 4))
    assert torch.allclose(flat / (labels != -100).sum(), cube, rtol=1e-6)


def test_gradcheck_in_float64() -> None:
    leaves = {name: x.requires_grad_() for name, x in make(5, 4, 11, torch.float64, "cpu").items()}
    labels = make_labels(5, 11, "cpu")
    for reduction in ("mean", "sum"):

        def loss(*tensors: Tensor, reduction: str = reduction) -> Tensor:
            options = {"label_smoothing": 0.1, "z_loss": 0.01, "chunk_size": 2, "reduction": reduction}
            return linear_cross_entropy(*tensors, labels, **options)

        with backend.use("reference"):
            assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_primitive_keeps_its_contract(device: str, backend_name: str) -> None:
    """Rows may be strided; padding stays; dbias is added to; ignored rows give 0, labels out of range give NaN."""
    kernel = pytest.importorskip(f"phi_fast.kernels.{backend_name}.linear_cross_entropy").cross_entropy_
    padded = torch.randn(6, 90, device=device)
    padded[2] = torch.nan
    logits = padded[:, :83]
    bias, labels = torch.randn(83, device=device), torch.tensor([3, 82, -1, 0, 7, 50], device=device)
    scale = torch.tensor(8.0, device=device)
    options = {"objective": Objective(-1, 0.1, 1e-3), "scale": scale, "need_grad": True}
    expected, dbias_expected = logits.clone(), torch.zeros(83, device=device)
    losses_expected = reference(expected, labels, bias, dbias=dbias_expected, **options)
    before, dbias = padded.clone(), torch.full((83,), 5.0, device=device)
    losses = kernel(logits, labels, bias, dbias=dbias, **options)

    torch.testing.assert_close(losses, losses_expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias, dbias_expected + 5, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded[:, 83:].nan_to_num(9), before[:, 83:].nan_to_num(9))
    assert losses[2] == 0 and torch.equal(logits[2], torch.zeros(83, device=device))

    for outside in (83, -2, 10**9):
        row = torch.randn(1, 83, device=device)
        assert kernel(row, torch.tensor([outside], device=device), None, **options).isnan().all()
        assert row.isnan().all()


def test_rows_that_fit_registers_are_held() -> None:
    """512 threads may have 128 registers each; those that hold a row of 51,200 16-bit elements are less than half."""
    triton = pytest.importorskip("phi_fast.kernels.triton.linear_cross_entropy")
    plain, held = Objective(), triton.blocks_held
    assert held(51200, 2, plain, "sm_90", need_grad=True) * triton.BLOCK >= 51200
    for chip, columns in {"sm_80": 32768, "sm_90": 53248, "sm_100": 53248, "gfx942": 32768}.items():
        registers = 2 * columns / 4 / (32 * triton.WARPS)
        assert registers <= 52
        assert held(columns, 2, plain, chip, need_grad=True) == columns / triton.BLOCK
        assert held(columns + 1, 2, plain, chip, need_grad=True) == 0
        assert held(columns, 4, plain, chip, need_grad=True) == 0  # fp32 would take twice the registers
    assert held(1000, 2, Objective(z_loss=1e-4), "sm_80", need_grad=True) == 1
    assert held(1000, 2, plain, "sm_80", need_grad=False) == 0
    few, many = (triton.Tile(2048, warps) for warps in (4, 32))
    assert held(13312, 2, plain, "sm_90", few, need_grad=True) == 7  # 128 threads: 52 registers each, too
    assert (
        held(13313, 2, plain, "sm_90", few, need_grad=True) == held(1000, 2, plain, "sm_90", many, need_grad=True) == 0
    )
    for other in ({"label_smoothing": 0.1}, {"class_weight": torch.ones(1000)}, {"softcap": 30.0}):
        assert held(1000, 2, Objective(**other), "sm_80", need_grad=True) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [8192, 8200])
def test_a_row_that_is_held_gives_the_bits_of_one_that_is_read_twice(
    device: str, dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("phi_fast.kernels.triton.linear_cross_entropy")
    launching = pytest.importorskip("phi_fast.kernels.triton.launching")
    generator = torch.Generator().manual_seed(vocab)
    logits, bias = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((3, vocab), (vocab,)))
    logits[0, 7], logits[2, -1] = -math.inf, 40.0
    options = {"objective": Objective(-100, 0.0, 1e-3), "scale": torch.full((), 4.0, device=device), "need_grad": True}
    labels = torch.tensor([5, -100, vocab - 1], device=device)
    results = []
    for most in (53248, 0):
        monkeypatch.setattr(triton, "MOST_HELD", dict.fromkeys(triton.MOST_HELD, most))
        launching.forget()
        x = logits.clone()
        results.append((x, triton.cross_entropy_(x, labels, bias, **options)))
    launching.forget()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_bias_gradient_sums_every_row(device: str, backend_name: str) -> None:
    """The rows are one more than a multiple of what a program of the column sums takes at a time."""
    kernel = pytest.importorskip(f"phi_fast.kernels.{backend_name}.linear_cross_entropy").cross_entropy_
    logits, dbias = torch.randn(129, 70, device=device), torch.zeros(70, device=device)
    options = {"objective": Objective(), "need_grad": True, "dbias": dbias}
    kernel(logits, torch.arange(129, device=device) % 70, scale=torch.ones((), device=device), **options)
    torch.testing.assert_close(dbias, logits.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spread_as_in_torch(device: str, backend_name: str, value: float) -> None:
    inputs = make(4, 8, 33, torch.float32, device)
    inputs["bias"][5] = value
    labels = torch.tensor([5, 6, -100, 7], device=device)
    exact = gradients(lambda **t: plain(**t, labels=labels), double(inputs), torch.ones(()))
    with backend.use(backend_name, op="linear_cross_entropy"):
        actual = gradients(lambda **t: linear_cross_entropy(**t, labels=labels), inputs, torch.ones(()))
    assert_same_nonfinite(actual["out"], exact["out"], "loss")
    for name in ("weight", "bias"):
        assert_same_nonfinite(actual[name], exact[name], name)
    counted = (
        labels != -100
    )  # torch passes a NaN in the logits on to the gradient of an ignored row; here that gradient is 0
    assert_same_nonfinite(actual["hidden"][counted], exact["hidden"][counted], "hidden")


@pytest.fixture
def fp16_storage(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Makes a CPU do what a GPU does: store logits and gradient in fp16, accumulate and return products in fp32."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(chunks, "working_dtype", lambda hidden: hidden.dtype)
    return multiply_as_a_gpu(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one_product", [True, False])
def test_weights_gradient_is_added_in_the_product(
    device: str, dtype: torch.dtype, one_product: bool, fp16_storage: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk's 16-bit product is added to the fp32 sums as it ends; by an addition where torch's addmm cannot."""
    if one_product and not weight_gradient.ADDS_TO_FP32:
        pytest.skip(f"torch {torch.__version__}: its addmm does not add to fp32")
    monkeypatch.setattr(weight_gradient, "ADDS_TO_FP32", one_product)
    additions, sum_into = [], weight_gradient.sum_into_
    monkeypatch.setattr(weight_gradient, "sum_into_", lambda *a, **o: additions.append(o["first"]) or sum_into(*a, **o))
    inputs, labels = make(24, 16, 9000, dtype, device), make_labels(24, 9000, device)
    compare(inputs, labels, 0.0, 0.0, "reference", chunk_size=8)
    for done in (fp16_storage, additions):
        done.clear()
    options = (inputs["bias"], labels, Objective(), torch.ones((), device=device), 8, [True, True, False])
    with backend.use("reference"):
        chunks.losses_and_gradients(inputs["hidden"], inputs["weight"], *options)
    logits_and_hidden = [("mm", (8, 9000)), ("mm", (8, 16))]
    later = [("addmm", (9000, 16))] if one_product else [("mm", (8192, 16)), ("mm", (808, 16))]
    assert fp16_storage == [*logits_and_hidden, ("mm", (9000, 16)), *2 * [*logits_and_hidden, *later]]
    assert additions == ([] if one_product else 4 * [False])


LOSS_SCALE = 2.0**16


def scaled_gradients(loss_function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients(loss_function, inputs, torch.tensor(LOSS_SCALE))


def lost(actual: Tensor, exact: Tensor) -> int:
    """The number of elements that are 0 although fp16 can hold them."""
    return int(((actual == 0) & (exact.abs() > 2.0**-24)).sum())


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.usefixtures("fp16_storage")
def test_no_fp16_gradient_underflows_that_scaled_autograd_keeps(device: str, backend_name: str) -> None:
    inputs = make(96, 16, 512, torch.float16, device)
    inputs["bias"][256:] -= 10  # half the vocabulary has a softmax of 1e-7, and 1e-9 after the division by 96 rows
    labels = torch.randint(512, (96,), generator=torch.Generator().manual_seed(0)).to(device)
    exact = scaled_gradients(lambda **t: plain(**t, labels=labels), double(inputs))
    usual = scaled_gradients(lambda **t: plain(**t, labels=labels), inputs)
    with backend.use(backend_name, op="linear_cross_entropy"):
        actual = scaled_gradients(lambda **t: linear_cross_entropy(**t, labels=labels, chunk_size=40), inputs)
        # The default scale prevents this: unscaled gradients of the mean lose elements in the same fp16 storage.
        unscaled = scaled_gradients(lambda **t: linear_cross_entropy(**t, labels=labels, loss_scale=1 / 96), inputs)
    for name in ("hidden", "weight", "bias"):
        assert actual[name].isfinite().all()
        assert lost(actual[name], exact[name]) <= lost(usual[name], exact[name]) == 0, name
        assert_no_worse(actual[name], usual[name], exact[name], name)
    assert lost(unscaled["weight"], exact["weight"]) > 10


@pytest.mark.parametrize("z", [0.0, 1e-4, 0.1])
@pytest.mark.usefixtures("fp16_storage")
def test_fp16_storage_cannot_overflow(device: str, z: float) -> None:
    """With wrong logits at the edge of fp16 and weights of 900, all stays finite until grad_output is known."""
    hidden = torch.full((4, 8), 9.0, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(40, 8, device=device, dtype=torch.float16)
    weight[3] = 900.0
    weight.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3], device=device)
    small = 1e-4 / (1 + 2 * z * 64800)
    loss = linear_cross_entropy(hidden, weight, None, labels, z_loss=z)
    exact = plain(hidden.double(), weight.double(), labels=labels, z=z)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    expected = torch.autograd.grad(exact * small, (hidden, weight))
    for a, b in zip(torch.autograd.grad(loss * small, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    inputs, labels = make(33, 16, 200, dtype, device), make_labels(33, 200, device)
    first, second = (
        gradients(lambda **t: linear_cross_entropy(**t, labels=labels, chunk_size=8), inputs, torch.ones(()))
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_twice_with_retain_graph(device: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in make(6, 8, 20, torch.float32, device).items()}
    loss = linear_cross_entropy(**inputs, labels=make_labels(6, 20, device))
    first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(2 * loss, list(inputs.values()))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_no_gradient_is_formed_that_is_not_wanted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    formed, saved = [], []
    kernel = backend.implementation("linear_cross_entropy", torch.device(device))
    primitive, compute = kernel.cross_entropy_, module._compute

    def spy(*args, **options):
        formed.append(options["need_grad"])
        return primitive(*args, **options)

    def spy_compute(*args):
        result = compute(*args)
        saved.append([grad.numel() > 0 for grad in result[1:4]])
        return result

    monkeypatch.setattr(kernel, "cross_entropy_", spy)
    monkeypatch.setattr(module, "_compute", spy_compute)
    inputs, labels = make(6, 8, 20, torch.float32, device), make_labels(6, 20, device)
    linear_cross_entropy(**inputs, labels=labels)
    inputs["weight"].requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(**inputs, labels=labels)
    assert formed == [False, False] and saved == [[False] * 3] * 2
    linear_cross_entropy(**inputs, labels=labels).backward()
    assert formed[-1] and saved[-1] == [False, True, False] and inputs["weight"].grad is not None


class NoSync(TorchDispatchMode):
    """Fails when a value is read back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "check_labels", lambda *_: None)  # it runs on a CPU only
    inputs = {name: x.requires_grad_() for name, x in make(9, 8, 20, torch.float32, device).items()}
    labels = make_labels(9, 20, device)
    with backend.use("reference") if device == "cpu" else backend.use("triton"), NoSync():
        linear_cross_entropy(**inputs, labels=labels, chunk_size=4).backward()


def test_nothing_counts(device: str) -> None:
    """As in torch, the mean of no rows is NaN and its gradients are 0."""
    inputs = make(4, 8, 20, torch.float32, device)
    result = gradients(
        lambda **t: linear_cross_entropy(**t, labels=torch.full((4,), -100, device=device)), inputs, torch.ones(())
    )
    assert result.pop("out").isnan()
    assert not any(grad.any() for grad in result.values())


def test_operator_and_compile(device: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in make(9, 8, 20, torch.float32, device).items()}
    labels = make_labels(9, 20, device)
    arguments = (*inputs.values(), labels, -100, 0.1, 0.01, True, None, 4)
    torch.library.opcheck(module._linear_cross_entropy_op, (*arguments, [True, True, True]))
    only_weight = (inputs["hidden"].detach(), inputs["weight"], None, *arguments[3:], [False, True, False])
    torch.library.opcheck(module._linear_cross_entropy_op, only_weight)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, bias, labels, chunk_size=4)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, captured = gradients(loss, inputs, torch.ones(())), gradients(compiled, inputs, torch.ones(()))
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


GOOD = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(5, 4),
    "bias": torch.zeros(5),
    "labels": torch.zeros(3).long(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"weight \(5, 3\)"),
        ({"bias": torch.zeros(4)}, r"bias \(4,\): expected \(5,\)"),
        ({"labels": torch.zeros(2).long()}, r"labels \(2,\): expected \(3,\)"),
        ({"labels": torch.zeros(3).int()}, "labels are torch.int32: expected torch.int64"),
        ({"hidden": torch.zeros(3, 4).int()}, "hidden is torch.int32"),
        ({"weight": torch.zeros(5, 4).half()}, "weight is torch.float16 and hidden torch.float32"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta and hidden on cpu"),
        ({"labels": torch.tensor([0, 5, 0])}, r"labels\[1\]=5 .*expected 0 to 4"),
        ({"labels": torch.tensor([0, -1, 0])}, r"labels\[1\]=-1 .*ignore_index=-100"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"reduction": "batchmean"}, "reduction='batchmean': expected 'mean', 'sum' or 'none'"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**GOOD, **change})


def peak_bytes(function) -> int:
    """Peak bytes that `function` holds beyond those that are live before it, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the CPU allocator's events")
def test_peak_memory_at_vocabulary_51200() -> None:
    rows, d, vocab = 1024, 32, 51200
    inputs = {name: x.requires_grad_() for name, x in make(rows, d, vocab, torch.float32, "cpu").items()}
    labels = make_labels(rows, vocab, "cpu")
    ours = peak_bytes(lambda: linear_cross_entropy(**inputs, labels=labels, chunk_size=64).backward())
    usual = peak_bytes(lambda: plain(**inputs, labels=labels).backward())
    chunk, dweight = 64 * vocab * 4, vocab * d * 4
    temporaries = 1 if backend.name("linear_cross_entropy", "cpu") == "reference" else 0  # the reference is plain torch
    assert ours < 1.1 * ((1 + 2 * temporaries) * chunk + 2 * dweight), f"{ours / 2**20:.0f} MiB"
    assert usual > 2 * rows * vocab * 4, "the measure sees the logits and their gradient"
