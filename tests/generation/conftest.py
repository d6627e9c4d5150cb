"""A small model with a byte tokenizer, in memory and as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_folders import speaking_phi, tiny_tokenizer
from samples import make_folder
from tokenizers import Tokenizer

from phi_fast.model import Phi


@pytest.fixture(scope="session")
def model() -> Phi:
    return speaking_phi()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), model, tokenizer)
