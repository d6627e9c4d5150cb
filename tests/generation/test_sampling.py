"""Filters and the repetition penalty agree with transformers; samples follow their probabilities."""

from __future__ import annotations

import pytest
import torch
from model_folders import random_prompts

from phi_fast.generation import Sampling, generate
from phi_fast.generation.sampling import filtered_probabilities, penalised


def test_filters_are_transformers(model):
    warpers = pytest.importorskip("transformers").generation.logits_process
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)) * 3
    for temperature, k, p in ((0.7, 0, 1.0), (1.0, 10, 1.0), (1.3, 0, 0.8), (0.9, 50, 0.5), (1.0, 3, 0.01)):
        scores = warpers.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        scores = warpers.TopKLogitsWarper(k)(None, scores) if k else scores
        scores = warpers.TopPLogitsWarper(p)(None, scores) if p < 1 else scores
        torch.testing.assert_close(filtered_probabilities(logits, temperature, k, p), scores.softmax(-1))
        for min_p in (0.05, 0.3, 1.0):
            kept = warpers.MinPLogitsWarper(min_p)(None, scores)
            torch.testing.assert_close(filtered_probabilities(logits, temperature, k, p, min_p), kept.softmax(-1))


def test_the_repetition_penalty_is_transformers(model, folder):
    """Checks logits of both signs, and each token of greedy texts, for a batch of prompts of several lengths."""
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))
    texts = [[5, 7, 5, 299], [0, 1, 2, 3]]
    for penalty in (0.8, 1.2, 3.0):
        processor = transformers.generation.logits_process.RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(penalised(logits, texts, penalty), processor(torch.tensor(texts), logits.clone()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    free, expected = generate(model, random_prompts(8), Sampling(max_new_tokens=30)), []
    for prompt in random_prompts(8):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.3,
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert generate(model, random_prompts(8), Sampling(max_new_tokens=30, repetition_penalty=1.3)) == expected
    assert expected != free


def test_draws_follow_the_probabilities():
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    generator = sampling.generator(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampling.next_tokens(logits, [generator])[0]] += 1
    expected = logits[0, :3].softmax(-1)
    assert counts[3] == 0
    assert ((counts[:3] / 4000 - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_bad_settings_are_refused():
    nan, infinite = float("nan"), float("inf")
    settings: list[dict] = [
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"top_k": -2},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ]
    settings += [{"temperature": nan}, {"temperature": infinite}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": nan}]
    settings += [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": nan},
        {"repetition_penalty": infinite},
        {"stop": ("",)},
    ]
    for setting in settings:
        with pytest.raises(ValueError, match=next(iter(setting))):
            Sampling(**setting)
