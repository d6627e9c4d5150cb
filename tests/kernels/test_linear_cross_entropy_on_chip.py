"""linear_cross_entropy with logits that stay on the chip: losses against float64, and where it is used."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, assert_no_worse
from test_linear_cross_entropy import make, make_labels, plain_rows
from test_linear_cross_entropy_options import make_weights
from torch import Tensor

from phi_fast.kernels import backend, keep_logits_on_chip, linear_cross_entropy, use
from phi_fast.kernels import linear_cross_entropy_chunks as chunks
from phi_fast.kernels.reference.linear_cross_entropy import Objective, cross_entropy_, linear_losses

triton = pytest.importorskip("phi_fast.kernels.triton.linear_cross_entropy_on_chip")
BACKENDS = ("reference", "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "d", "vocab", "magnitude", "with_bias", "eps", "z"),
    [
        (19, 24, 301, 1.0, True, 0.0, 0.0),  # a ragged end in every dim
        (5, 64, 256, 1.0, False, 0.0, 1e-3),
        (130, 32, 130, 40.0, True, 0.1, 1e-2),  # logits in the hundreds, two blocks of rows
    ],
)
def test_error_against_float64(device, dtype, backend_name, rows, d, vocab, magnitude, with_bias, eps, z) -> None:
    inputs = make(rows, d, vocab, dtype, device, magnitude)
    if not with_bias:
        del inputs["bias"]
    labels = make_labels(rows, vocab, device)

    def plain(x: dict[str, Tensor]) -> Tensor:
        return plain_rows(torch.nn.functional.linear(x["hidden"], x["weight"], x.get("bias")), labels, eps, z)

    with use(backend_name), keep_logits_on_chip(True):
        options = {"label_smoothing": eps, "z_loss": z, "reduction": "none"}
        losses = linear_cross_entropy(**{"bias": None, **inputs}, labels=labels, **options)
    exact = plain({name: x.double() for name, x in inputs.items()})
    assert_no_worse(losses, plain(inputs), exact, backend_name)
    assert (losses[labels == -100] == 0).all()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_option_in_parts_of_the_vocabulary(device: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima, sums and scores of the vocabulary's parts meet; labels outside give NaN, ignored rows 0."""
    monkeypatch.setattr(triton, "PROGRAMS", parts)
    inputs = make(9, 40, 150, torch.float32, device)
    labels = make_labels(9, 150, device)
    labels[3], labels[5] = 150, 2**40
    objective = Objective(-100, 0.2, 1e-2, make_weights(150).to(device), 3.0)
    wide = [x.double() for x in inputs.values()]
    exact = linear_losses(*wide, labels, objective._replace(class_weight=objective.class_weight.double()))
    found = triton.linear_losses(**inputs, labels=labels, objective=objective)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found[[3, 5]].isnan().all() and found[1] == 0 and found[[0, 2, 4]].isfinite().all()


def test_strided_and_empty_inputs(device: str) -> None:
    inputs = make(12, 40, 77, torch.float32, device)
    hidden, weight = inputs["hidden"][::2].T.contiguous().T, inputs["weight"].T.contiguous().T
    bias, labels = torch.stack([inputs["bias"]] * 2, 1)[:, 0], make_labels(12, 77, device)[::2]
    exact = linear_losses(hidden.double(), weight.double(), bias.double(), labels, Objective())
    found = triton.linear_losses(hidden, weight, bias, labels, Objective())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert triton.linear_losses(hidden[:0], weight, bias, labels[:0], Objective()).shape == (0,)


def test_nan_reaches_the_loss(device: str) -> None:
    inputs, labels = make(4, 8, 33, torch.float32, device), torch.tensor([5, 6, -100, 7], device=device)
    inputs["bias"][5] = torch.nan
    found = triton.linear_losses(**inputs, labels=labels, objective=Objective())
    assert found.isnan().tolist() == [True, True, False, True]


def test_rows_whose_scores_are_all_minus_inf(device: str) -> None:
    inputs, labels = make(2, 8, 33, torch.float32, device), torch.tensor([5, 6], device=device)
    inputs["bias"][:] = -torch.inf
    found = triton.linear_losses(**inputs, labels=labels, objective=Objective())
    scale = torch.ones((), device=device)
    logits = inputs["hidden"] @ inputs["weight"].T
    exact = cross_entropy_(logits, labels, inputs["bias"], objective=Objective(), scale=scale, need_grad=False)
    assert not found.isfinite().any() and not exact.isfinite().any()


def test_it_forms_losses_where_no_gradient_is_formed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = backend.implementation("linear_cross_entropy", torch.device(device))
    chosen = "triton" if device == "cuda" else "reference"
    calls: list[str] = []
    with use(chosen):
        kernel = backend.implementation("linear_cross_entropy", torch.device(device))
        for name in ("linear_losses", "cross_entropy_"):
            usual = getattr(kernel, name)
            spy = lambda *a, usual=usual, name=name, **o: calls.append(name) or usual(*a, **o)  # noqa: E731
            monkeypatch.setattr(kernel, name, spy)
        inputs, labels = make(6, 8, 20, torch.float32, device), make_labels(6, 20, device)
        usual = linear_cross_entropy(**inputs, labels=labels)
        assert "linear_losses" not in calls, "off by default"
        with keep_logits_on_chip(True):
            calls.clear()
            alone = linear_cross_entropy(**inputs, labels=labels)
            assert calls[0] == "linear_losses"
            torch.testing.assert_close(alone, usual)
            calls.clear()
            leaves = {name: x.requires_grad_() for name, x in inputs.items()}
            linear_cross_entropy(**leaves, labels=labels).backward()
            assert calls == ["cross_entropy_"]
            calls.clear()
            rows = linear_cross_entropy(**leaves, labels=labels, reduction="none")
            assert calls[0] == "linear_losses"
            calls.clear()
            rows.sum().backward()
            assert calls == ["cross_entropy_"]
        assert not backend.logits_stay_on_chip(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="C++ runs on a CPU")
def test_a_back_end_without_it_says_so() -> None:
    inputs, labels = make(3, 8, 20, torch.float32, "cpu"), make_labels(3, 20, "cpu")
    with (
        use("cpp"),
        keep_logits_on_chip(True),
        pytest.raises(ValueError, match=r"'cpp' cannot keep logits on the chip; call keep_logits_on_chip\(False\)"),
    ):
        linear_cross_entropy(**inputs, labels=labels)


def test_programs_fill_a_gpu_and_none_is_without_columns() -> None:
    tile = triton.tile("sm_90", 2, 2048, Objective())
    assert (tile.M, tile.N) == (128, 128)
    assert triton.tile("sm_90", 2, 2000, Objective()).N == triton.tile("sm_90", 2, 2048, Objective(softcap=3.0)).N == 64
    assert triton._parts(8192, 51200, tile) == (16, 25)  # 64 blocks of rows, 400 of columns, about 1024 programs
    for rows, vocab in ((1, 1), (1, 51200), (8192, 51200), (8192, 257), (10**6, 51200)):
        parts, blocks = triton._parts(rows, vocab, tile)
        columns = -(-vocab // tile.N)
        assert (parts - 1) * blocks < columns <= parts * blocks


def test_chunks_are_not_allocated(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "rows_of_a_chunk", lambda *a, **k: pytest.fail("a chunk of logits was planned"))
    inputs, labels = make(3, 8, 20, torch.float32, device), make_labels(3, 20, device)
    with use("reference"), keep_logits_on_chip(True):
        linear_cross_entropy(**inputs, labels=labels)
