from __future__ import annotations

from pathlib import Path

import pytest
from remote_fixtures import http, no_waits, s3, s3_process  # noqa: F401

from phi_fast.data import stdlib_corpus

WORDS = [f"Document {i}, naïve 東京 🙂:\n{'lorem ipsum dolor ' * (i % 7)}\n\tend {i * i}\n" for i in range(60)]


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a few hundred ids; `<|endoftext|>` is 0."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    stdlib_corpus.train_tokenizer(WORDS).save(str(path))
    return path
