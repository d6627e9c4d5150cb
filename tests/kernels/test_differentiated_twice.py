"""Second derivatives are right if an op has them, and otherwise an error; they are never omitted silently."""

from __future__ import annotations

import pytest
import torch
from tensor_kinds import cases
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig, PhiForCausalLM

from phi_fast.kernels import accelerate, linear_cross_entropy

OPS = list(cases())
HAVE_IT = ("apply_rotary_",)
"""Linear ops, whose gradient has the same form as the op and can be differentiated again."""


def penalty(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the squared result plus the squared gradient of the first input, as in WGAN-GP's penalty."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    (loss + gradient.square().sum()).backward()
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_penalty_is_right_or_refused(op: str) -> None:
    case = cases()[op]
    if op in HAVE_IT:
        ours, theirs = (
            penalty(function, case.inputs)[0] for function in (case.op, case.plain)
        )  # the tables are constants
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(NotImplementedError, match=f"{op} can be differentiated once"):
            penalty(case.op, case.inputs)


@pytest.mark.parametrize("op", OPS)
def test_the_first_derivative_of_a_graph_is_right(op: str) -> None:
    """create_graph=True is allowed if the gradients are used but not differentiated."""
    case = cases()[op]
    grads = []
    for function in (case.op, case.plain):
        x = case.inputs[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, *case.inputs[1:]).sum(), x, create_graph=True)
        grads.append(gradient.detach())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_activation_checkpointing_is_no_second_derivative(op: str, use_reentrant: bool) -> None:
    case = cases()[op]
    grads = []
    for function in (case.op, case.plain):
        x = case.inputs[0].clone().requires_grad_()
        checkpoint(function, x, *case.inputs[1:], use_reentrant=use_reentrant).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_an_accelerated_model_refuses_too() -> None:
    torch.manual_seed(0)
    config = PhiConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
    model = PhiForCausalLM(config)
    accelerate(model)
    ids = torch.randint(64, (1, 8))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        gradient.square().sum().backward()


def test_a_loss_for_each_row_refuses_too() -> None:
    hidden, weight, labels = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8), torch.tensor([1, 0, 4, 2])
    losses = linear_cross_entropy(hidden, weight, None, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy can be differentiated once"):
        gradient.square().sum().backward()
