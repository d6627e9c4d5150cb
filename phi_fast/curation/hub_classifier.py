"""Published classifiers of educational value, such as fineweb-edu's: a transformer with one output, the score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from .documents import CurateError, Document, Drop
from .extras import require

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu-classifier"
"""Scores from 0 to 5; FineWeb-Edu keeps documents whose rounded score is at least 3 (arXiv 2406.17557)."""


class HubScore:
    """Adds the score of a sequence classifier that `transformers` can load; drops no document.

    The score is the model's only logit, as fineweb-edu's model card computes it. Longer texts are cut to `max_tokens`.
    """

    name = "score"
    batch = 16

    def __init__(self, model: str, score: str, max_tokens: int = 512, device: str = "cpu") -> None:
        """Take a folder or a name on the hub, and the score's name. Raises CurateError if the model does not fit."""
        require("transformers", f"the classifier {model}", package="'phi-fast[eval]'")
        if max_tokens < 1:
            raise CurateError(f"max_tokens={max_tokens}: expected at least 1")
        self._name, self._score, self._max_tokens, self._device = model, score, max_tokens, device
        _ = self._model  # loaded here once, so that what is wrong is said before any work

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_model"}  # each worker loads its own

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._name)
            model = AutoModelForSequenceClassification.from_pretrained(self._name)
        except Exception as error:  # whatever the library, the hub and damaged files raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise CurateError(
                f"{self._name} cannot be loaded: {why}. Name a folder with the model, or one on the hub"
            ) from error
        if model.config.num_labels != 1:
            raise CurateError(f"{self._name} has {model.config.num_labels} outputs, expected 1: the score")
        return tokenizer, model.eval().to(self._device)

    def settings(self) -> dict[str, Any]:
        return {"model": self._name, "score": self._score, "max_tokens": self._max_tokens}

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        """Add the score to every document. Texts of one batch are padded to the longest, shortest first."""
        import torch

        tokenizer, model = self._model
        limit = min(self._max_tokens, getattr(model.config, "max_position_embeddings", self._max_tokens))
        order = sorted(range(len(documents)), key=lambda i: len(documents[i].text))
        with torch.inference_mode():
            for first in range(0, len(order), self.batch):
                some = [documents[i] for i in order[first : first + self.batch]]
                texts = [document.text[: 16 * limit] for document in some]  # more characters than so many tokens have
                inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=limit)
                logits = model(**inputs.to(self._device)).logits.squeeze(-1).float()
                for document, score in zip(some, logits.tolist(), strict=True):
                    document.scores[self._score] = round(score, 4)
        return [None] * len(documents)
