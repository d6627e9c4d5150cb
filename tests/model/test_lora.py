"""LoRA on the merged weights against peft's on transformers' phi."""

from __future__ import annotations

import pytest
import torch
from model_folders import CONFIG, random_weights

from phi_fast.config import LORA_TARGETS, LoraConfig
from phi_fast.conversion.adapter import peft_name
from phi_fast.conversion.hf_config import phi_config
from phi_fast.kernels import use
from phi_fast.model.cache import KeyValueCache
from phi_fast.model.lora import add_lora, merged_state
from phi_fast.model.merged import to_merged
from phi_fast.model.phi import Phi

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
SETTINGS = {
    "all": LoraConfig(4, 8.0, LORA_TARGETS),
    "attention": LoraConfig(2, 3.0, ("v_proj", "q_proj")),
    "mlp": LoraConfig(5, 5.0, ("fc1", "fc2")),
}
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4}
"""transformers makes the rotary table in fp32, whatever the model's dtype."""


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = random_weights(torch.float64)
    return {n: (t.fill_(1) if "layernorm.weight" in n else 4 * t).to(dtype) for n, t in given.items()}


def both(lora: LoraConfig, dtype: torch.dtype, recompute: str = "norm_gelu"):
    """A `Phi` and peft's model with the same weights and adapters; returns both and the pairs of their adapters."""
    model = Phi(CONFIG, recompute=recompute).to(dtype)
    model.load_state_dict(to_merged(weights(dtype)))
    torch.manual_seed(0)
    add_lora(model, lora)
    skipped = ("architectures", "torch_dtype", "model_type")
    fields = {name: value for name, value in phi_config(CONFIG, dtype).items() if name not in skipped}
    theirs = transformers.PhiForCausalLM(transformers.PhiConfig(**fields)).to(dtype)
    theirs.load_state_dict(weights(dtype))
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    pairs = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = theirs.get_parameter(peft_name(name).replace(".weight", ".default.weight"))
            if name.endswith(".b"):
                parameter.data.normal_(std=0.1)
            other.data.copy_(parameter.data)
            pairs[name] = (parameter, other)
    assert len(pairs) == sum(parameter.requires_grad for parameter in theirs.parameters())
    return model, theirs, pairs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_gradients_and_steps_of_adamw_are_pefts(kind, dtype):
    model, theirs, pairs = both(SETTINGS[kind], dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    optimizers = [
        torch.optim.AdamW([pair[which] for pair in pairs.values()], lr=0.01, weight_decay=0.1, eps=1e-3)
        for which in (0, 1)
    ]
    draw = torch.Generator().manual_seed(1)
    with use("reference" if dtype == torch.float64 else "auto"):
        for _ in range(4):
            ids = torch.randint(0, CONFIG.vocab_size, (2, 13), generator=draw)
            labels = ids.roll(-1, 1)
            loss = model(ids, labels).loss
            expected = torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten())
            torch.testing.assert_close(loss, expected, rtol=TOLERANCE[dtype], atol=0)
            for optimizer, of in zip(optimizers, (loss, expected), strict=True):
                optimizer.zero_grad()
                of.backward()
            for name, (mine, other) in pairs.items():
                scale = float(other.grad.abs().max())
                error = float((mine.grad - other.grad).abs().max())
                assert error <= TOLERANCE[dtype] * scale, name
            for optimizer in optimizers:
                optimizer.step()
    for name, (mine, other) in pairs.items():
        torch.testing.assert_close(mine, other, rtol=0, atol=TOLERANCE[dtype], msg=name)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert model.get_parameter(name).grad is None


@pytest.mark.parametrize("kind", SETTINGS)
def test_decoding_and_the_merged_state_are_the_forward(kind):
    model, _, _ = both(SETTINGS[kind], torch.float64)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    merged = Phi(CONFIG).double()
    merged.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "layers." not in name}
        | {f"layers.{i}.{name}": t for i, layer in enumerate(model.layers) for name, t in merged_state(layer).items()}
    )
    with use("reference"), torch.no_grad():
        expected = model(ids).logits
        cache = KeyValueCache.allocate(model, batch=2, max_length=9)
        found = torch.cat([model.decode(part, cache, all_logits=True) for part in (ids[:, :5], ids[:, 5:])], 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_new_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    """A is uniform within 1/√inputs, B is zero."""
    model, lora = Phi(CONFIG), SETTINGS["all"]
    ids = torch.randint(0, CONFIG.vocab_size, (1, 9))
    with torch.no_grad():
        before = model(ids).logits
        add_lora(model, lora)
        assert torch.equal(model(ids).logits, before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == lora.num_parameters(CONFIG)
    for name, p in trained.items():
        if name.endswith(".b"):
            assert not p.any()
        else:
            bound = p.shape[1] ** -0.5
            assert 0.9 * bound < float(p.detach().abs().max()) <= bound
