"""Bytes of text per token id, by which a loss in nats per token becomes bits per byte, comparable across tokenizers."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from .vocabulary import vocab_size


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Count the bytes of UTF-8 text that each token id stands for; (vocabulary,) int64.

    A special token, such as `<|endoftext|>`, stands for no text: 0. A token that is a part of a character counts with
    its own bytes, where the tokenizer works on bytes (GPT-2's byte level, SentencePiece's byte fallback). For any other
    token the count is what the tokenizer's decoder adds for it after another token.
    """
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    decoders, alphabet = _decoders(content["decoder"]), set(pre_tokenizers.ByteLevel.alphabet())
    table = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    anchor = next((id for id in sorted(tokenizer.get_vocab().values()) if tokenizer.decode([id]).strip()), None)
    before = [] if anchor is None else [anchor]
    for text, id in tokenizer.get_vocab(with_added_tokens=True).items():
        if id in added:
            table[id] = 0 if added[id]["special"] else len(added[id]["content"].encode())
        elif "ByteLevel" in decoders:
            table[id] = len(text) if alphabet.issuperset(text) else len(text.encode())
        elif "ByteFallback" in decoders and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            table[id] = 1
        else:
            table[id] = len(tokenizer.decode([*before, id]).encode()) - len(tokenizer.decode(before).encode())
    return table


def _decoders(decoder: dict[str, Any] | None) -> set[str]:
    """List the types of a decoder and its parts, in `tokenizers`' JSON."""
    if decoder is None:
        return set()
    parts = decoder.get("decoders", [])
    return {decoder["type"]}.union(*(_decoders(part) for part in parts))
