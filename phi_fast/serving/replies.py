"""Replies in the format of OpenAI's API: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tokenizers import Tokenizer

from ..generation.engine import Piece, Score
from ..generation.stream import INCOMPLETE, TextStream

_REASONS = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass
class Text:
    """One text as far as it has come."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens = piece.tokens
        self.reason = piece.reason
        if piece.score is not None:
            self.scores.append(piece.score)


class Reply(ABC):
    """Builds the replies to one request, whose prompts have `prompt_tokens` tokens together."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer, prompt_tokens: int) -> None:
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens
        self._common = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The reply without streaming."""
        choices = [
            {
                "index": i,
                **self._content(text.text),
                "logprobs": self._logprobs(text.scores, 0),
                "finish_reason": _REASONS[text.reason or "end"],
            }
            for i, text in enumerate(texts)
        ]
        return {**self._common, "object": self.kind, "choices": choices, "usage": self.usage(texts)}

    def start(self, index: int) -> dict[str, Any] | None:
        """The chunk before a text's first, if there is one."""
        return None

    def chunk(self, index: int, piece: Piece, before: int) -> dict[str, Any]:
        """A chunk of a stream; before: number of the text's characters in earlier chunks."""
        choice = {
            "index": index,
            **self._delta(piece.text),
            "logprobs": self._logprobs([piece.score] if piece.score else [], before),
            "finish_reason": None if piece.reason is None else _REASONS[piece.reason],
        }
        return {**self._common, "object": self.chunk_kind, "choices": [choice]}

    def last(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._common, "object": self.chunk_kind, "choices": [], "usage": self.usage(texts)}

    def usage(self, texts: Sequence[Text]) -> dict[str, int]:
        new = sum(text.tokens for text in texts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def _name(self, token: int) -> str:
        """A token's text, or its id if its bytes are only a part of a character."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return f"token_id:{token}" if INCOMPLETE in text else text

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, scores: Sequence[Score], before: int) -> dict[str, Any] | None: ...


class CompletionReply(Reply):
    """Replies of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content

    def _logprobs(self, scores: Sequence[Score], before: int) -> dict[str, Any] | None:
        if not scores:
            return None
        stream, offsets = TextStream(self.tokenizer), []
        for score in scores:
            offsets.append(before + len(stream.text))
            stream.push(score.token)
        return {
            "tokens": [self._name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._name(token): value for token, value in score.top} for score in scores],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Replies of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def start(self, index: int) -> dict[str, Any] | None:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._common, "object": self.chunk_kind, "choices": [choice]}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, scores: Sequence[Score], before: int) -> dict[str, Any] | None:
        if not scores:
            return None
        return {
            "content": [
                {
                    **self._entry(score.token, score.logprob),
                    "top_logprobs": [self._entry(*pair) for pair in score.top],
                }
                for score in scores
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        whole = not name.startswith("token_id:")
        return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if whole else None}
