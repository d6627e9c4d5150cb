"""Conversations: records of JSONL, rendered by a chat template, and their tokens with marks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from .. import chat
from ..manifest import BEGINS, TRAINED
from .units import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TrainOn = Literal["assistant", "all"]

MARKED = np.dtype("<u4")
"""dtype of tokens with their marks, which lie in the bits from MARK_BIT on."""
MARK_BIT = 30

_SHAPES = (
    'expected {"messages": [{"role": …, "content": …}, …]}, or {"prompt": …, "completion": …} with two texts or two '
    "lists of messages"
)


@dataclass(frozen=True)
class Conversations:
    """Reads records as conversations; a document is the JSON of its parts, [[text, whether it is trained], …]."""

    tokenizer: PreTrainedTokenizerFast
    """The tokenizer with its chat template and special tokens."""
    train_on: TrainOn
    """The tokens that count in the loss: what the assistant writes, or everything."""

    @staticmethod
    def of(encoder: Tokenizer, name: str, template: Path | None, train_on: TrainOn) -> Conversations:
        """Conversations of the tokenizer `encoder` of that name; see `chat.with_template`."""
        chat.require_transformers("--chat")
        return Conversations(chat.with_template(encoder, name, template), train_on)

    @property
    def end(self) -> int:
        """Id of the token that ends an answer."""
        end = self.tokenizer.convert_tokens_to_ids(str(self.tokenizer.eos_token))
        assert isinstance(end, int)
        return end

    def document(self, line: bytes) -> str:
        """Render one record. Raises ValueError for a record of another shape, or one that the template rejects."""
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"found {type(record).__name__}; {_SHAPES}")
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            texts = [record["prompt"], record["completion"]]
            self._refuse_special_tokens(texts)
            found = [(texts[0], False), (texts[1] + str(self.tokenizer.eos_token), True)]
        else:
            messages = _messages(record)
            self._refuse_special_tokens([message["content"] for message in messages])
            if self.train_on == "all":
                return json.dumps([(chat.render(self.tokenizer, messages), True)])
            found = chat.parts(self.tokenizer, messages)
        return json.dumps([(text, trained or self.train_on == "all") for text, trained in found])

    def _refuse_special_tokens(self, texts: list[str]) -> None:
        """Raise ValueError if a text names a special token: it would be encoded as if the template had written it."""
        for added in self.tokenizer.added_tokens_decoder.values():
            if added.special and any(added.content in text for text in texts):
                raise ValueError(f"a text contains {added.content!r}, the name of a special token")


@dataclass(frozen=True)
class MarkedEncoding(Encoding):
    """Encodes the documents of `Conversations`: tokens of dtype `MARKED`, each with its mark above its id.

    Each part is encoded by itself, as when a model continues a prompt. The first token is no label: it has no context.
    """

    def encode(self, texts: list[str]) -> Iterator[np.ndarray[Any, Any]]:
        self.tokenizer.encode_special_tokens = False
        conversations = [json.loads(text) for text in texts]
        flat = [text for parts in conversations for text, _ in parts]
        encoded = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for parts in conversations:
            ids = [np.array(next(encoded).ids, MARKED) for _ in parts]
            trained = [TRAINED * wanted for _, wanted in parts]
            marks = np.repeat(np.array(trained, MARKED), [len(part) for part in ids])
            tokens = np.concatenate(ids) | marks << np.uint32(MARK_BIT)
            tokens[:1] &= ~np.uint32(TRAINED << MARK_BIT)
            tokens[:1] |= np.uint32(BEGINS << MARK_BIT)
            yield tokens


def split_marks(tokens: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Separate tokens of dtype `MARKED` into their ids, of the same dtype, and their marks, uint8."""
    return tokens & np.uint32(2**MARK_BIT - 1), (tokens >> np.uint32(MARK_BIT)).astype(np.uint8)


def _messages(record: dict[str, Any]) -> list[chat.Message]:
    """The messages of a record. Raises ValueError unless each has a role and a text."""
    found = record.get("messages")
    if found is None and isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list):
        found = record["prompt"] + record["completion"]
    if not isinstance(found, list) or not found:
        raise ValueError(f"found the fields {', '.join(record) or 'none'}; {_SHAPES}")
    for i, message in enumerate(found):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is {message!r:.60}; {_SHAPES}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of message {i} is {type(message.get('content')).__name__}, expected text")
    return found
