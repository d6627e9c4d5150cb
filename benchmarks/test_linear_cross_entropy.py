"""lm_head and loss at phi-small's sizes, on a GPU at phi-1.5's, and the loss alone on one chunk of logits.

FLOPs: three matrix products, for the logits and for the gradients of hidden and weight. This project and Liger compute
the gradients in the forward, so forward and backward are timed together. Bytes of the loss alone: the logits are read
and their gradient is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks import sizes
from benchmarks.harness import Results, compare
from benchmarks.ops import DTYPES, Cost, agree, bounds, leaf
from benchmarks.peers import NOT_COMPILED, backends, compiled, peer
from benchmarks.subjects import Contender
from benchmarks.timing import device
from phi_fast.kernels import backend, keep_logits_on_chip, linear_cross_entropy, use
from phi_fast.kernels.reference.linear_cross_entropy import Objective

pytestmark = pytest.mark.usefixtures("kept_memory")

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden (rows, d), weight (V, d), bias (V,), labels (rows,)) -> the mean loss."""


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def torch_fused(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=options)


def transformers(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)[None]
    return ForCausalLMLoss(logits, None, weight.shape[0], shift_labels=labels[None])


def litgpt(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy(F.linear(hidden, weight, bias)[None], labels[None])


def liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, bias)


def cut(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Apple's cut cross entropy: the logits never leave the chip."""
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(hidden, weight, labels, bias=bias)


def ours(name: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        with use(name, op="linear_cross_entropy"):
            return linear_cross_entropy(hidden, weight, bias, labels)

    return loss


def contenders(full: bool, where: torch.device) -> dict[str, Loss | str]:
    found: dict[str, Loss | str] = {
        label: ours(name) for label, name in backends("linear_cross_entropy", where).items()
    }
    return found | {
        "torch eager": eager,
        "torch linear_cross_entropy": torch_fused,
        "torch.compile": compiled(eager, full) or NOT_COMPILED,
        "transformers": transformers,
        "litgpt chunked_cross_entropy": peer("litgpt", lambda: litgpt),
        "Liger-Kernel": peer("liger_kernel", lambda: liger),
        "cut-cross-entropy": peer("cut_cross_entropy", lambda: cut),
    }


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_linear_cross_entropy(dtype: str, full: bool, results: Results) -> None:
    where = device()
    rows, d, vocab = ((8192, 2048, 51200) if sizes.GPU else (1024, 512, 51200)) if full else (16, 32, 512)
    scales = {"hidden": 1.0, "weight": d**-0.5, "bias": 0.02}
    shapes = {"hidden": (rows, d), "weight": (vocab, d), "bias": (vocab,)}
    inputs = [leaf(*shapes[n], dtype=DTYPES[dtype], device=where, scale=scales[n]) for n in shapes]
    labels = torch.randint(vocab, (rows,), device=where)
    cost = Cost(flops=3 * 2 * rows * d * vocab)

    def timed(loss: Loss) -> Contender:
        def both() -> None:
            torch.autograd.grad(loss(*inputs, labels), inputs)

        return Contender(both, flops=cost.flops)

    losses = contenders(full, where)
    runs = {name: partial(loss, *inputs, labels) for name, loss in losses.items() if not isinstance(loss, str)}
    agree(runs, DTYPES[dtype])
    running = {name: loss if isinstance(loss, str) else timed(loss) for name, loss in losses.items()}
    subject = compare(
        f"linear_cross_entropy, {dtype}, forward and backward",
        running | bounds(cost, inputs[0].detach(), full),
        config={"rows": rows, "width": d, "vocabulary": vocab, "FLOPs": cost.flops},
        repeats=5 if full else 1,
        budget=12,
        kernels=True,
    )
    results.add(subject)


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_loss_alone(dtype: str, full: bool, results: Results) -> None:
    """The loss without gradients, as in evaluation: from chunks of logits and, on a GPU, with logits on the chip."""
    where = device()
    rows, d, vocab = ((8192, 2048, 51200) if sizes.GPU else (1024, 512, 51200)) if full else (16, 32, 512)
    shapes = {"hidden": (rows, d), "weight": (vocab, d), "bias": (vocab,)}
    scales = {"hidden": 1.0, "weight": d**-0.5, "bias": 0.02}
    inputs = [leaf(*shapes[n], dtype=DTYPES[dtype], device=where, scale=scales[n]).detach() for n in shapes]
    labels = torch.randint(vocab, (rows,), device=where)
    cost = Cost(flops=2 * rows * d * vocab)

    def ours(on_chip: bool) -> Tensor:
        with keep_logits_on_chip(on_chip):
            return linear_cross_entropy(*inputs, labels)

    subjects: dict[str, dict[str, Callable[[], Tensor] | str]] = {"loss alone": {"phi_fast": partial(ours, False)}}
    if where.type == "cuda":
        subjects["loss alone, logits on chip"] = {
            "phi_fast": partial(ours, True),
            "cut-cross-entropy": peer("cut_cross_entropy", lambda: partial(cut, *inputs, labels)),
        }
    for name, losses in subjects.items():
        losses["torch eager"] = partial(eager, *inputs, labels)
        agree({n: loss for n, loss in losses.items() if not isinstance(loss, str)}, DTYPES[dtype])
        running = {n: x if isinstance(x, str) else Contender(x, flops=cost.flops) for n, x in losses.items()}
        subject = compare(
            f"linear_cross_entropy, {dtype}, {name}",
            running | bounds(cost, inputs[0], full),
            config={"rows": rows, "width": d, "vocabulary": vocab, "FLOPs": cost.flops},
            repeats=5 if full else 1,
            budget=6,
            kernels=True,
        )
        results.add(subject)


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_cross_entropy_of_a_chunk(dtype: str, full: bool, results: Results) -> None:
    where = device()
    rows, vocab = (1024, 51200) if full else (8, 512)
    logits = torch.randn(rows, vocab, device=where).to(DTYPES[dtype])
    scratch, labels = logits.clone(), torch.randint(vocab, (rows,), device=where)
    dbias, one = torch.zeros(vocab, device=where), torch.ones((), device=where)
    options = {"objective": Objective(), "scale": one, "need_grad": True}
    kernel = backend.implementation("linear_cross_entropy", where)

    def theirs() -> None:
        copy = logits.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(copy.float(), labels, reduction="sum"), copy)

    cost = Cost(moved=2 * logits.numel() * logits.element_size())
    running = {
        "phi_fast": Contender(
            lambda: kernel.cross_entropy_(scratch, labels, dbias=dbias, **options),
            cost.moved,
            note="in place, with dbias",
        ),
        "torch eager": Contender(theirs, cost.moved),
    }
    subject = compare(
        f"cross entropy of a chunk, {dtype}, loss and gradient",
        running | bounds(cost, logits, full),
        config={"rows": rows, "vocabulary": vocab, "bytes": cost.moved},
        repeats=11 if full else 1,
        budget=4,
        kernels=True,
    )
    results.add(subject)
