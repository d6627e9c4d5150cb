"""Decoding with a cache gives transformers' greedy tokens, and stops where it should."""

from __future__ import annotations

import pytest
import torch
from model_folders import random_prompts

from phi_fast.generation import Decoding, Sampling, complete, generate


def test_greedy_is_transformers_token_for_token(model, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    sampling = Sampling(max_new_tokens=30)
    expected = []
    for prompt in random_prompts():
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in expected}) > 15  # equal texts would prove little
    assert [generate(model, [prompt], sampling)[0] for prompt in random_prompts()] == expected
    assert generate(model, random_prompts(), sampling) == expected


def test_the_cache_gives_what_a_full_forward_gives(model):
    prompt = random_prompts()[3]
    (new,) = generate(model, [prompt], Sampling(max_new_tokens=20), end=-1)
    ids = list(prompt)
    for token in new:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_it_stops_at_the_end_the_limit_and_the_context(model, tokenizer):
    prompt = random_prompts()[5]
    (tokens,) = generate(model, [prompt], Sampling(max_new_tokens=20), end=-1)
    end = tokens[7]
    (ended,) = generate(model, [prompt], Sampling(max_new_tokens=20), end=end)
    assert ended == tokens[: tokens.index(end) + 1]
    text = tokenizer.decode([20] * 90)
    (full,) = complete(model, tokenizer, [text], Sampling(max_new_tokens=5), end=-1)
    assert (len(full.tokens), full.reason) == (5, "length")
    decoding = Decoding(model, [[5] * 90], Sampling(max_new_tokens=50), end=-1)
    assert len(list(decoding)) == 6
    assert decoding.reasons == ["context"]


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="prompt 1 has 96 tokens; expected 1 to 95"):
        generate(model, [[1], [1] * 96], Sampling())
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        generate(model, [[]], Sampling())
