"""A model read from a folder is the model that was written there."""

from __future__ import annotations

import torch
from model_folders import random_prompts, speaking_phi, tiny_tokenizer
from samples import make_folder

from phi_fast.conversion.load import load


def test_a_loaded_model_is_the_saved_one(tmp_path):
    model, tokenizer = speaking_phi(), tiny_tokenizer()
    folder = make_folder(tmp_path, model, tokenizer)
    loaded, found = load(folder)
    assert found.get_vocab() == tokenizer.get_vocab()
    for (name, parameter), mine in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, mine), name
    ids = torch.tensor([random_prompts()[0]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load(folder, dtype="bf16")[0].lm_head.weight.dtype == torch.bfloat16
