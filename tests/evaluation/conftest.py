"""A small model with a byte tokenizer, in memory and as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import tiny_tokenizer
from samples import compact_questions, make_folder, write_jsonl
from tokenizers import Tokenizer

from phi_fast.config import PhiConfig
from phi_fast.model import Phi

CONFIG = PhiConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=192,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def small_phi() -> Phi:
    torch.manual_seed(0)
    return Phi(CONFIG).eval()


@pytest.fixture(scope="session")
def small_folder(small_phi, byte_tokenizer, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), small_phi, byte_tokenizer)


@pytest.fixture(scope="session")
def question_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    for task, rows in compact_questions().items():
        write_jsonl(folder / f"{task}.jsonl", rows)
    return folder
