"""A training step (forward, backward, clip, AdamW) of Hugging Face models before and after `accelerate`.

Every row trains the same weights on the same tokens under torch's fused AdamW. Labels are given, so the step includes
the model's own loss. The paired ratio is taken round by round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks import models, sizes
from benchmarks.harness import Results, compare
from benchmarks.ops import DTYPES
from benchmarks.peers import absent, compiled
from benchmarks.steps import Step, bare_step, with_rates
from benchmarks.timing import device
from phi_fast import PhiConfig
from phi_fast.kernels import accelerate

BEFORE, AFTER = "transformers", "phi_fast accelerate"
NOT_COMPILED = "compiled in the full run, for phi only"
ROWS = {"phi-tiny": 8, "pythia-70m": 4, "llama": 8, "qwen2": 8} | {
    "phi 2048 wide": 4,
    "neox 2048 wide": 4,
    "llama 2048 wide": 4,
}
LENGTH = 2048 if sizes.GPU else 256


def phi_tiny(full: bool) -> PreTrainedModel:
    config = PhiConfig.preset("phi-tiny")
    return models.hugging_face(config if full else models.small(config))


def pythia_70m(full: bool) -> PreTrainedModel:
    """EleutherAI/pythia-70m with random weights."""
    shape: dict[str, Any] = {
        "vocab_size": 50304 if full else 512,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6 if full else 1,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, use_cache=False))


def gated(full: bool) -> dict[str, Any]:
    """A Llama's shape, of phi-tiny's width."""
    return {
        "vocab_size": 8192 if full else 512,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4 if full else 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "use_cache": False,
    }


def llama(full: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**gated(full)))


def qwen2(full: bool) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**gated(full)))


def phi_wide(full: bool) -> PreTrainedModel:
    """Six of phi-1.5's layers."""
    config = models.of("a quarter of phi-1.5")
    return models.hugging_face(config if full else models.small(config))


def neox_wide(full: bool) -> PreTrainedModel:
    """Six layers of EleutherAI/pythia-1.4b's shape, of random weights."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16} if full else SMALL
    vocabulary = 50304 if full else 512
    layers = 6 if full else 1
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **shape, vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=2048, use_cache=False
        )
    )


def llama_wide(full: bool) -> PreTrainedModel:
    """Six layers of TinyLlama-1.1B's shape, of random weights."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32} if full else SMALL
    vocabulary = 32000 if full else 512
    layers, groups = (6, 4) if full else (1, 2)
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            num_key_value_heads=groups,
            max_position_embeddings=2048,
            use_cache=False,
        )
    )


SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
"""The small run's shape of the wide models."""
MODELS: dict[str, Callable[[bool], PreTrainedModel]] = (
    {"phi 2048 wide": phi_wide, "neox 2048 wide": neox_wide, "llama 2048 wide": llama_wide}
    if sizes.GPU
    else {"phi-tiny": phi_tiny, "pythia-70m": pythia_70m, "llama": llama, "qwen2": qwen2}
)
"""On a GPU models that fill it: Python takes longer to launch the kernels of the others than it takes to run them."""


def liger(name: str, model: PreTrainedModel) -> PreTrainedModel | str:
    """The model patched by Liger-Kernel, without its rotary, which would replace that of every model here."""
    if not name.startswith("llama"):
        return f"does not cover {type(model).__name__}"
    if reason := absent("liger_kernel"):
        return reason
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model, rope=False)
    return model


def training_step(model: PreTrainedModel, ids: torch.Tensor, run: Callable[..., Any] | None = None) -> Step:
    """A step of the model, or of its compiled form `run`."""
    call = run or model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return bare_step(model, optimizer, lambda: call(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("dtype", sizes.DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_accelerate(name: str, dtype: str, full: bool, results: Results) -> None:
    rows, length = (ROWS[name], LENGTH) if full else (1, 32)
    plain = MODELS[name](full).to(device(), DTYPES[dtype]).train()
    ids = torch.randint(plain.config.vocab_size, (rows, length), device=device())
    accelerated, peer, for_compiler = (copy.deepcopy(plain) for _ in range(3))
    print(accelerate(accelerated))
    patched = liger(name, peer)
    contenders: dict[str, Step | str] = {
        BEFORE: training_step(plain, ids),
        AFTER: training_step(accelerated, ids),
        "transformers torch.compile": training_step(for_compiler, ids, compiled(for_compiler, full))
        if full and name.startswith("phi")
        else NOT_COMPILED,
        "Liger-Kernel": patched if isinstance(patched, str) else training_step(patched, ids),
    }
    subject = compare(
        f"accelerate, {name}, {dtype}",
        contenders,
        config={"rows": rows, "tokens per row": length, "optimizer": "torch fused AdamW"},
        repeats=9 if full else 1,
        budget=15.0,
    )
    after = next(row for row in with_rates(subject, rows * length).rows if row.name == AFTER)
    after.extra["paired ratio"] = f"{subject.ratio(BEFORE, AFTER):.2f}"
    results.add(subject)
