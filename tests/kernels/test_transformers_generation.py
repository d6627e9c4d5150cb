"""Accelerated models give the same results as before: generation, KV caches, attentions and hidden states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers_models import FAMILIES, MODELS, build, padded, tokens

from phi_fast.kernels import accelerate

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the plain model, the accelerated model)."""
    plain = build(name, dtype).eval()
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    return plain, accelerated


def generated(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    return model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same(name: str) -> None:
    plain, accelerated = pair(name)
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    cached = generated(accelerated, **inputs)
    assert cached.shape == (2, 19)
    assert torch.equal(cached, generated(plain, **inputs))
    assert torch.equal(cached, generated(accelerated, **inputs, use_cache=False))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_prompts_padded_on_the_left(name: str) -> None:
    plain, accelerated = pair(name)
    batch = padded("left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    together = generated(accelerated, **inputs)
    assert torch.equal(together, generated(plain, **inputs))
    alone = generated(accelerated, input_ids=batch["input_ids"][1:2, 5:])
    assert torch.equal(together[1, 17:], alone[0, 12:])


@pytest.mark.parametrize("name", ["phi", "llama", "llama, eager"])
def test_a_static_cache(name: str) -> None:
    plain, accelerated = pair(name)
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generated(accelerated, **inputs, **static), generated(plain, **inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_continued_by_several_tokens(name: str) -> None:
    _, accelerated = pair(name)
    ids = tokens(2, 12)
    with torch.no_grad():
        whole = accelerated(input_ids=ids).logits
        past = accelerated(input_ids=ids[:, :7], use_cache=True).past_key_values
        rest = accelerated(input_ids=ids[:, 7:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_eval_mode(name: str) -> None:
    plain, accelerated = pair(name)
    ids = tokens()
    theirs, ours = plain(input_ids=ids, labels=ids), accelerated(input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert accelerated(input_ids=ids, logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states(name: str, training: bool) -> None:
    plain, accelerated = (model.train(training) for model in pair(name))
    ids = tokens()
    theirs, ours = (model(input_ids=ids, labels=ids, output_hidden_states=True) for model in (plain, accelerated))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama, eager", "gpt-j", "phi, eager", "stablelm, eager"])
def test_attentions_where_the_model_can_show_them(name: str) -> None:
    family, _, eager = name.partition(", ")
    plain = build(family, attn_implementation="eager" if eager else None).eval()
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    ids = tokens()
    accelerated(input_ids=ids)
    theirs, ours = (model(input_ids=ids, output_attentions=True).attentions for model in (plain, accelerated))
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["phi", "gpt-j"])
def test_compiled_without_a_graph_break(name: str) -> None:
    plain, accelerated = (model.train() for model in pair(name))
    torch._dynamo.reset()
    compiled = torch.compile(accelerated, backend="aot_eager", fullgraph=True)
    ids = tokens()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (compiled, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for ours, theirs in zip(accelerated.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
