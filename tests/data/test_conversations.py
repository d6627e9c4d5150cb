"""`prepare --chat`: the tokens, masks and rows of conversations, against transformers' own chat templates."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from model_folders import tiny_tokenizer
from samples import write_jsonl
from tokenizers import AddedToken

from phi_fast.data.chat import DEFAULT_TEMPLATE, ChatFiles
from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation import packing
from phi_fast.data.preparation.conversations import MARKED, MarkedEncoding, split_marks
from phi_fast.data.vocabulary import tokenizer
from phi_fast.prepare import main

transformers = pytest.importorskip("transformers")

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
"""ChatML, with transformers' marks around what the assistant writes."""


@pytest.fixture(params=["default", "chatml"])
def folder(request, tmp_path: Path) -> Path:
    """A tokenizer without a chat template, or with ChatML and its special tokens."""
    made = tmp_path / "tokenizer"
    made.mkdir()
    plain = tiny_tokenizer()
    if request.param == "chatml":
        plain.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
        config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
        (made / "tokenizer_config.json").write_text(json.dumps(config))
    plain.save(str(made / "tokenizer.json"))
    return made


def turns(*texts: str) -> dict:
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


RECORDS = [
    turns("hi", "Hello."),
    turns("How is it called?", "f(x)", "and  then?", "g(y)\n\ntwice"),
    {"messages": [{"role": "system", "content": "Be short."}, *turns("naïve?", "Ünïcode → ✓")["messages"]]},
    {"prompt": turns("as lists")["messages"], "completion": [{"role": "assistant", "content": "yes"}]},
    turns("an answer, and a question that has none", "so it is", "and now?"),
]


def prepare(folder: Path, records: list[dict], *options: str) -> int:
    write_jsonl(folder.parent / "records.jsonl", records)
    words = [str(folder.parent / "records.jsonl"), "--tokenizer", str(folder), "--out", str(folder.parent / "corpus")]
    return main([*words, "--chat", "--validation", "0", "--workers", "1", *options])


def read(corpus: Path) -> tuple[np.ndarray, np.ndarray, list[tuple[list[int], list[int]]]]:
    """The tokens and marks of the train split, and of each document: (ids, marks)."""
    split = Manifest.read(corpus).splits["train"]
    ids = np.fromfile(corpus / split.file, "<u2")
    marks = np.fromfile(corpus / split.marks, "u1")
    starts = [*np.flatnonzero(marks & 2).tolist(), len(ids)]
    return ids, marks, [(ids[a:b].tolist(), marks[a:b].tolist()) for a, b in pairwise(starts)]


def by_transformers(folder: Path, record: dict) -> tuple[list[int], list[int]]:
    """(ids, 1 for each token that the assistant wrote) as transformers' apply_chat_template has them."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if not theirs.chat_template:
        marked = "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        theirs.chat_template = DEFAULT_TEMPLATE.replace(
            "{{ 'Output: ' + message['content'] + eos_token }}", "{{ 'Output:' }}" + marked
        )
        theirs.eos_token = "<|endoftext|>"
    messages = record.get("messages") or record["prompt"] + record["completion"]
    if messages[-1]["role"] == "user":
        messages = messages[:-1]
    found = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    return list(found["input_ids"]), list(found["assistant_masks"])


def test_tokens_and_masks_are_transformers(folder: Path):
    assert prepare(folder, RECORDS, "--row-tokens", "4096") == 0
    _, marks, documents = read(folder.parent / "corpus")
    expected = [by_transformers(folder, record) for record in RECORDS]
    assert sum(sum(mask) for _, mask in expected) == int((marks & 1).sum()) > 0
    found = sorted((ids, [mark & 1 for mark in marks]) for ids, marks in documents if any(mark & 1 for mark in marks))
    assert found == sorted(expected)


def test_everything_but_the_first_token_can_be_trained(folder: Path):
    assert prepare(folder, RECORDS[:1], "--row-tokens", "512", "--train-on", "all") == 0
    _, _, [(ids, marks), *padding] = read(folder.parent / "corpus")
    assert ids == by_transformers(folder, RECORDS[0])[0]
    assert marks == [2] + [1] * (len(ids) - 1)
    assert not any(mark & 1 for _, marks in padding for mark in marks)


def test_a_prompt_and_its_completion_are_joined_without_a_template(folder: Path):
    assert prepare(folder, [{"prompt": "def f(x):\n", "completion": "    return x"}], "--row-tokens", "64") == 0
    _, _, [(ids, marks), *_] = read(folder.parent / "corpus")
    plain = tokenizer(folder)
    before, after = (plain.encode(text, add_special_tokens=False).ids for text in ("def f(x):\n", "    return x"))
    end = plain.token_to_id(json.loads((folder.parent / "corpus" / "tokenizer_config.json").read_text())["eos_token"])
    assert ids == [*before, *after, end]
    assert [mark & 1 for mark in marks] == [0] * len(before) + [1] * (len(after) + 1)
    assert Manifest.read(folder.parent / "corpus").delimiter.id == end


def test_the_corpus_keeps_the_template(folder: Path):
    assert prepare(folder, RECORDS, "--row-tokens", "512") == 0
    kept = ChatFiles.read(folder.parent / "corpus")
    chatml = (folder / "tokenizer_config.json").exists()
    assert kept.template == (CHATML if chatml else DEFAULT_TEMPLATE)
    assert kept.names["eos_token"] == ("<|im_end|>" if chatml else "<|endoftext|>")


def test_whole_conversations_are_packed_and_long_ones_cut(folder: Path, capsys):
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(1, 200, 300).tolist(), 900]
    records = [{"prompt": f"{i:03d}", "completion": chr(97 + i % 26) * n} for i, n in enumerate(lengths)]
    records.append({"prompt": "p" * 700, "completion": "after the cut"})
    assert prepare(folder, records, "--row-tokens", "256") == 0
    printed = capsys.readouterr().out
    assert "cut 1 conversations to 256 tokens" in printed
    assert "left out 1 conversations whose answers begin after 256 tokens" in printed
    ids, marks, documents = read(folder.parent / "corpus")
    plain = tokenizer(folder)
    texts = [plain.decode(ids) for ids, marks in documents if any(mark & 1 for mark in marks)]
    assert sorted(texts) == sorted((r["prompt"] + r["completion"])[:256] for r in records[:-1])
    assert (len(ids) - 1) % 256 == 0
    assert (marks[::256] & 2 > 0).all()  # no document crosses rows
    used = sum(len(ids) for ids, marks in documents if any(mark & 1 for mark in marks))
    assert used / len(ids) > 0.95


def test_packing_is_first_fit(tmp_path):
    documents = [np.full(n, i, MARKED) for i, n in enumerate([6, 7, 4, 3, 5])]
    rows = list(packing._rows(iter(documents), 10))
    assert [[int(document[0]) for document in row.documents] for row in rows] == [[0, 2], [1, 3], [4]]
    assert [row.free for row in rows] == [0, 0, 5]


def test_the_fullest_row_is_closed_when_too_many_are_open(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    documents = [np.full(n, i, MARKED) for i, n in enumerate([6, 8, 7, 4])]
    rows = list(packing._rows(iter(documents), 10))
    assert [[int(document[0]) for document in row.documents] for row in rows] == [[1], [0, 3], [2]]


MALFORMED = [
    ([1], "found list; expected"),
    ({"text": "x"}, "found the fields text; expected"),
    ({"messages": []}, "found the fields messages; expected"),
    ({"messages": ["hi"]}, "message 0 is 'hi'"),
    ({"messages": [{"role": "user", "content": None}]}, "the content of message 0 is NoneType, expected text"),
    (turns("a question"), "no message has the role 'assistant'"),
    (turns("x", "<|endoftext|>"), "a text contains '<|endoftext|>', the name of a special token"),
    ({"prompt": "x<|endoftext|>", "completion": "y"}, "a text contains '<|endoftext|>'"),
    ({"prompt": "x", "completion": 3}, "found the fields prompt, completion; expected"),
]


@pytest.mark.parametrize(("record", "message"), MALFORMED)
def test_records_that_are_no_conversations(folder: Path, record, message, capsys):
    lines = [json.dumps(turns("hi", "yes")), json.dumps(record)]
    (folder.parent / "records.jsonl").write_text("\n".join(lines))
    words = [str(folder.parent / "records.jsonl"), "--tokenizer", str(folder), "--out", str(folder.parent / "corpus")]
    words += ["--chat", "--validation", "0", "--workers", "1", "--row-tokens", "64"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "line 2" in error


def test_records_that_are_no_conversations_are_left_out_and_counted(folder: Path, capsys):
    records = [turns("hi", "yes"), *(record for record, _ in MALFORMED)]
    assert prepare(folder, records, "--row-tokens", "64", "--skip-malformed") == 0
    assert f"left out {len(MALFORMED)} malformed records" in capsys.readouterr().out


def test_a_template_that_changes_earlier_messages_is_refused(folder: Path, tmp_path: Path, capsys):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    assert prepare(folder, [turns("a", "b")], "--chat-template", str(file), "--row-tokens", "64") == 1
    assert "renders the messages before message 1 in another way once it follows" in capsys.readouterr().err
    out = ["--tokenizer", str(folder), "--out", str(tmp_path / "all"), "--chat", "--validation", "0"]
    everything = ["--chat-template", str(file), "--row-tokens", "64", "--train-on", "all"]
    assert main([str(tmp_path / "records.jsonl"), *out, *everything]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row-tokens", "1"], "--row-tokens 1: expected at least 2"),
        (["--chat-template", "nothing.jinja"], "--chat-template nothing.jinja cannot be read"),
        (["--row-tokens", "2"], "no conversation of train is left: raise --row-tokens 2"),
    ],
)
def test_options_that_do_not_fit(folder: Path, options, message, capsys):
    assert prepare(folder, RECORDS[:1], *options) == 1
    assert message in capsys.readouterr().err


def test_other_files_than_jsonl_are_refused(folder: Path, tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text("hi")
    words = [str(tmp_path / "text.txt"), "--tokenizer", str(folder), "--out", str(tmp_path / "out"), "--chat"]
    assert main(words) == 1
    assert "text.txt is not JSONL" in capsys.readouterr().err


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, capsys):
    folder = tmp_path / "endless"
    folder.mkdir()
    endless = json.loads(tiny_tokenizer().to_str())
    endless["added_tokens"] = []
    del endless["model"]["vocab"]["<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(endless))
    assert prepare(folder, RECORDS[:1]) == 1
    assert "has no token that ends an answer" in capsys.readouterr().err


def test_a_part_is_encoded_by_itself():
    """A tokenizer that would merge across the beginning of an answer does not: generation cannot either."""
    plain = tiny_tokenizer()
    merging = json.loads(plain.to_str())
    merging["model"]["vocab"]["ab"] = len(merging["model"]["vocab"])
    merging["model"]["merges"] = [["a", "b"]]
    merging = type(plain).from_str(json.dumps(merging))
    encoding = MarkedEncoding(merging, None, MARKED)
    [tokens] = encoding.encode([json.dumps([["xa", False], ["bab", True]])])
    ids, marks = split_marks(tokens)
    assert [merging.id_to_token(id) for id in ids.tolist()] == ["x", "a", "b", "ab"]
    assert marks.tolist() == [2, 0, 1, 1]
