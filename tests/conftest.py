"""Fixtures for all tests: the default corpus, built once, and Triton's interpreter if there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from phi_fast.data import stdlib_corpus

# Triton reads this at its first import, by transformers or by the first test that uses a Triton kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the standard-library corpus (docs, code, tokenizer.json). Read only."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # pytest-xdist gives each worker its own folder
    stdlib_corpus.prepare(shared / "stdlib")
    return shared / "stdlib"
