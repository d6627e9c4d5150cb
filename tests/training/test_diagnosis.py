"""The diagnosis of a diverged run: the layer, the op and the rows in the message, and the checkpoints that remain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_processes import arguments, finish, latest, losses

from phi_fast import Phi, PhiConfig
from phi_fast.config import LORA_TARGETS, LoraConfig
from phi_fast.model.lora import add_lora
from phi_fast.model.merged import to_merged
from phi_fast.model.reference import ReferencePhi
from phi_fast.train import INTERRUPTED
from phi_fast.training.diagnosis import first_overflow

CONFIG = PhiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=1)


def models() -> tuple[ReferencePhi, Phi]:
    """Make a model of each implementation."""
    torch.manual_seed(0)
    reference, ours = ReferencePhi(CONFIG), Phi(CONFIG)
    return reference, ours


def tokens(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(64, (rows, 17), generator=torch.Generator().manual_seed(3))
    ids[ids == 7] = 8
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("implementation", ["reference", "phi"])
@pytest.mark.parametrize(
    ("weight", "value", "expected"),
    [
        ("model.layers.1.mlp.fc1.weight", 3e4, "the output of linear in {}layers.1.mlp.fc1"),
        ("model.layers.1.self_attn.dense.weight", 6e4, "the output of linear in {}layers.1.self_attn.dense"),
        ("lm_head.weight", 6e4, "the output of linear in lm_head"),
    ],
)
def test_a_forward_overflow_is_named(implementation: str, weight: str, value: float, expected: str) -> None:
    reference, ours = models()
    with torch.no_grad():
        reference.get_parameter(weight).fill_(value)
        if weight == "lm_head.weight":  # its input has mean 0: add a part that does not cancel
            reference.model.final_layernorm.bias.fill_(8.0)
        reference.get_parameter("model.layers.1.input_layernorm.bias").fill_(4.0)
        reference.get_parameter("model.layers.1.self_attn.v_proj.bias").fill_(4.0)
    ours.load_state_dict(to_merged(reference.state_dict()))
    model = (reference if implementation == "reference" else ours).half()
    found = first_overflow(model, *tokens())
    if weight == "lm_head.weight" and implementation == "phi":  # its logits are fp32 on a CPU: nothing overflows
        assert found is None
        return
    assert found is not None
    assert found.forward
    prefix = "model." if implementation == "reference" else ""
    assert found.what == expected.format(prefix)
    assert found.largest <= 65504


def test_an_overflow_of_adapters_is_named() -> None:
    """In the forward, by the projection that has them; and none, with frozen weights that take no gradient."""
    _, model = models()
    add_lora(model, LoraConfig(2, 2.0, LORA_TARGETS))
    model = model.half()
    assert first_overflow(model, *tokens()) is None
    with torch.no_grad():
        model.layers[1].norm.bias.fill_(4.0)
        model.layers[1].lora.adapters["fc1"].a.fill_(1.0)
        model.layers[1].lora.adapters["fc1"].b.fill_(300.0)
    found = first_overflow(model, *tokens())
    assert found is not None
    assert found.what == "the output of linear in layers.1.mlp.fc1"


@pytest.mark.parametrize("implementation", ["reference", "phi"])
def test_a_forward_overflow_names_its_rows(implementation: str) -> None:
    reference, ours = models()
    with torch.no_grad():
        reference.model.embed_tokens.weight[7] = 6e4
        reference.model.layers[0].self_attn.dense.bias.fill_(6e4)
    ours.load_state_dict(to_merged(reference.state_dict()))
    model = (reference if implementation == "reference" else ours).half()
    input_ids, labels = tokens()
    input_ids[2, 5] = 7
    found = first_overflow(model, input_ids, labels)
    assert found is not None
    assert found.rows == (2,)
    assert "layers.0" in found.what


@pytest.mark.parametrize("implementation", ["reference", "phi"])
def test_a_gradient_overflow_is_named(implementation: str) -> None:
    """With fc1 at 0 and huge fc2 weights the forward pass is small, but the gradient of GELU's input is not."""
    reference, ours = models()
    with torch.no_grad():
        reference.model.layers[1].mlp.fc2.weight.mul_(2e4)
        reference.model.layers[1].mlp.fc1.weight.zero_()
    ours.load_state_dict(to_merged(reference.state_dict()))
    model = (reference if implementation == "reference" else ours).half()
    assert first_overflow(model, *tokens(), 1.0) is None
    found = next(found for power in range(24) if (found := first_overflow(model, *tokens(), 2.0**power)))
    assert not found.forward
    prefix = "model." if implementation == "reference" else ""
    assert found.what.startswith("the gradient of ")
    assert f"{prefix}layers.1.mlp" in found.what
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_finite_are_named() -> None:
    _, model = models()
    with torch.no_grad():
        model.layers[2].in_proj.bias[5] = float("nan")
    found = first_overflow(model, *tokens())
    assert found is not None
    assert found.what == "the weights of layers.2.in_proj.bias, before the step"


def test_a_healthy_step_has_no_overflow() -> None:
    for model in models():
        assert first_overflow(model, *tokens(), 2.0**10) is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_loss_ends_the_run_with_a_diagnosis(data: Path, tmp_path: Path, ranks: int) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 20, save_every=4)
    output = finish(
        words, tmp_path / "output", ranks=ranks, expect=2, fault="nan_weights_at_step", given=[0, 6][-ranks:]
    )
    error = output[output.index("error: ") :]
    assert error.startswith("error: step 6 cannot be taken: the loss is nan")
    assert "the weights of layers.0.out_proj.bias_mlp" in error
    assert "on rank 0, rows " in error  # the all-gather spreads one rank's bad weight to rank 0
    assert "(docs)" in error
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-4'}" in error
    assert "Traceback" not in output
    assert latest(run).name == "step-4"
    finish([*words, "--resume", "--stop-after", "4"], tmp_path / "output", expect=INTERRUPTED)
    assert len(losses(run)) == 8


def test_a_scale_at_its_minimum_ends_the_run_with_a_diagnosis(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 20, precision="fp16", initial_loss_scale=2, loss_scale_hysteresis=1)
    output = finish(words, tmp_path / "output", expect=2, fault="overflow_at_steps", given=[2, 3, 4, 5])
    assert "step  2/20 | " in output
    assert "error: step 3 cannot be taken: the loss is " in output
    assert "the loss scale 1. When run again, every micro-batch was finite" in output
    assert "there is no checkpoint yet" in output
    assert "Traceback" not in output
