"""Compares ReferencePhi with transformers.PhiForCausalLM on the same random weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import PhiConfig as HuggingFaceConfig
from transformers import PhiForCausalLM

from phi_fast import PhiConfig
from phi_fast.model.reference import ReferencePhi, rotary_cos_sin, rotate

CONFIG = PhiConfig.preset("phi-tiny").replace(vocab_size=512, num_hidden_layers=2)


def hugging_face(config: PhiConfig) -> PhiForCausalLM:
    """The same model in transformers, with all parameters random: zero biases would hide a missing bias."""
    fields = {**config.to_dict(), "intermediate_size": config.intermediate_size, "partial_rotary_factor": 0.5}
    fields |= {"hidden_act": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    fields["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": fields.pop("rope_theta"),
        "partial_rotary_factor": fields.pop("partial_rotary_factor"),
    }
    model = PhiForCausalLM(HuggingFaceConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.endswith("layernorm.weight") else 0.0
        parameter.data = scale + 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(config: PhiConfig) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100
    return ids[:, :-1], labels


def run(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient, in fp64 for comparison."""
    model = model.to(dtype)
    model.zero_grad()
    ids, labels = batch(CONFIG)
    logits = model(ids).logits
    wide = torch.promote_types(dtype, torch.float32)
    loss = F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().double(), "loss": loss.detach().double(), **gradients}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()


def pair() -> tuple[ReferencePhi, PhiForCausalLM]:
    theirs = hugging_face(CONFIG)
    ours = ReferencePhi(CONFIG)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_fp32_matches_transformers() -> None:
    ours, theirs = pair()
    expected, actual = run(theirs, torch.float32), run(ours, torch.float32)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert error(actual[name], expected[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_transformers(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.to(dtype).float()  # so that fp64 starts from weights that dtype can hold
    exact = run(theirs, torch.float64)
    theirs_low, ours_low = run(theirs, dtype), run(ours, dtype)
    for name in exact:
        assert error(ours_low[name], exact[name]) <= 2 * error(theirs_low[name], exact[name]), name


def test_labels_give_the_mean_loss() -> None:
    ours, _ = pair()
    ids, labels = batch(CONFIG)
    output = ours(ids, labels)
    expected = F.cross_entropy(output.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(output.loss, expected)


def test_dims_beyond_rotary_pass_through() -> None:
    x = torch.randn(2, 4, 9, CONFIG.head_dim)
    cos, sin = rotary_cos_sin(CONFIG, 9, x.device, x.dtype)
    rotated = rotate(x, cos, sin)
    assert torch.equal(rotated[..., CONFIG.rotary_dim :], x[..., CONFIG.rotary_dim :])
    assert torch.equal(rotated[..., 0, :], x[..., 0, :])  # position 0 does not rotate
    assert not torch.equal(rotated[..., 1:, : CONFIG.rotary_dim], x[..., 1:, : CONFIG.rotary_dim])


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = ReferencePhi(CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.001, name
            assert abs(parameter.mean().item()) < 0.001, name
