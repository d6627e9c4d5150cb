"""Greedy decoding with a key-value cache, beside transformers' `generate` on the same weights and prompts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PhiConfig as HuggingFaceConfig
from transformers import PhiForCausalLM

from benchmarks.harness import Results, compare
from benchmarks.timing import device
from phi_fast import Phi, PhiConfig
from phi_fast.conversion.hf_config import phi_config
from phi_fast.generation import Sampling, generate
from phi_fast.model.merged import to_split

PROMPT_TOKENS, NEW_TOKENS = 32, 64


def contenders(config: PhiConfig, batch: int) -> dict[str, Callable[[], object] | str]:
    torch.manual_seed(0)
    where = device()
    model = Phi(config).eval().to(where)
    theirs = PhiForCausalLM(HuggingFaceConfig(**phi_config(config, torch.float32))).eval().to(where)
    theirs.load_state_dict(to_split(model.state_dict()))
    ids = torch.randint(1, config.vocab_size, (batch, PROMPT_TOKENS), device=where)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)

    def ours() -> list[list[int]]:
        return generate(model, ids.tolist(), sampling, end=-1)

    def transformers() -> list[list[int]]:
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, PROMPT_TOKENS:].tolist()

    assert ours() == transformers()
    return {"phi_fast": ours, "transformers": transformers}


@pytest.mark.slow
def test_greedy_decoding(results: Results, full: bool) -> None:
    for batch in (1, 8):
        for preset in ("phi-tiny", "phi-small") if full else ("phi-tiny",):
            config = PhiConfig.preset(preset)
            settings = {"model": preset, "batch": batch, "prompt": PROMPT_TOKENS, "new tokens": NEW_TOKENS}
            subject = compare(
                f"generation, {preset}, batch {batch}",
                contenders(config, batch),
                config=settings,
                repeats=5 if full else 1,
            )
            for row in subject.rows:
                if row.median:
                    row.extra["tokens/s"] = round(batch * NEW_TOKENS / row.median, 1)
            results.add(subject)
