"""Streamed text: whole characters, stop strings, and results that do not depend on the batch size."""

from __future__ import annotations

from phi_fast.generation import Sampling, TextStream, complete


def test_the_same_prompt_twice_is_continued_in_two_ways(model, tokenizer):
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
    first, second = complete(model, tokenizer, ["once", "once"], sampling)
    assert first.tokens != second.tokens


def test_seeds_repeat_and_batching_changes_nothing(model, tokenizer):
    texts = ["once", "def f(x):", "a b c d e f g", "x", "the end of"]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    alone = complete(model, tokenizer, texts, sampling, batch_size=1)
    assert alone == complete(model, tokenizer, texts, sampling, batch_size=4)
    assert alone == complete(model, tokenizer, texts, sampling, batch_size=8)
    other = complete(model, tokenizer, texts, Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=4))
    assert [a.tokens for a in alone] != [b.tokens for b in other]


def stream_of(tokenizer, text: str, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    ids = tokenizer.encode(text).ids
    for i, token in enumerate(ids):
        pieces.append(stream.push(token, last=i + 1 == len(ids)))
        if stream.stopped:
            break
    return pieces, stream


def test_streams_give_whole_characters(tokenizer):
    text = "naïve — 你好 🙂 end"
    pieces, stream = stream_of(tokenizer, text)
    assert "".join(pieces) == stream.text == text
    assert not any("�" in piece for piece in pieces)
    broken = TextStream(tokenizer)
    first = tokenizer.encode("é").ids[0]
    assert broken.push(first) == ""
    assert broken.push(tokenizer.encode("x").ids[0], last=True) == "�x"


def test_stop_strings_are_cut_and_never_shown(tokenizer):
    pieces, stream = stream_of(tokenizer, "answer\nAl said\nAlice: next", stop=("\nAlice:", "zzz"))
    assert "".join(pieces) == stream.text == "answer\nAl said"
    assert stream.stopped
    pieces, stream = stream_of(tokenizer, "ends with \nAli", stop=("\nAlice:",))
    assert "".join(pieces) == "ends with \nAli"  # it is only the beginning of a stop string


def test_a_stop_string_ends_a_completion(model, tokenizer):
    (free,) = complete(model, tokenizer, ["hello"], Sampling(max_new_tokens=25), end=-1)
    stop = next(c for c in free.text[2:] if c != "�")
    shown: list[str] = []
    (cut,) = complete(
        model,
        tokenizer,
        ["hello"],
        Sampling(max_new_tokens=25, stop=(stop,)),
        end=-1,
        on_text=lambda _, t: shown.append(t),
    )
    assert (cut.text, cut.reason) == (free.text[: free.text.index(stop)], "stop")
    assert "".join(shown) == cut.text
    assert len(cut.tokens) < len(free.tokens)
