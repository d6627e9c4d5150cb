"""The command `generate`: prompts from options, files, pipes and chats; refused options; terminals and encodings."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import speaking_phi, tiny_tokenizer
from samples import make_folder
from tokenizers import Tokenizer

from phi_fast.data.chat import DEFAULT_TEMPLATE, ChatFiles
from phi_fast.generate import GenerateOptions, chat, from_prompts, main, read_prompts, unescape
from phi_fast.generation import Sampling, complete
from phi_fast.model import Phi

GREEDY = ["--max-new-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module")
def model() -> Phi:
    return speaking_phi()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), model, tokenizer)


def test_chat_keeps_the_dialogue(model, tokenizer):
    out = io.StringIO()
    options = GenerateOptions(model="", sampling=Sampling(max_new_tokens=5))
    results = chat(options, model, tokenizer, io.StringIO("hi\nand now?\n\n"), out)
    assert len(results) == 2
    assert out.getvalue() == f"Alice: Bob:{results[0].text}\nAlice: Bob:{results[1].text}\nAlice: "
    dialogue = f"Alice: hi\nBob:{results[0].text}\nAlice: and now?\nBob:"
    stop = ("\nAlice:", "\nBob:")
    (again,) = complete(model, tokenizer, [dialogue], Sampling(max_new_tokens=5, stop=stop))
    assert again == results[1]


def test_chat_by_a_template_keeps_the_dialogue(model, tokenizer):
    """The model reads what transformers renders of the messages, the oldest of which are left out for room."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=DEFAULT_TEMPLATE, eos_token="<|endoftext|>"
    )
    template = ChatFiles(DEFAULT_TEMPLATE, {"eos_token": "<|endoftext|>"})
    out = io.StringIO()
    sampling = Sampling(max_new_tokens=5)
    questions = ["hi", "and now?", "x" * 50]
    lines = io.StringIO("\n".join([*questions, "", ""]))
    results = chat(GenerateOptions(model="", sampling=sampling), model, tokenizer, lines, out, template)
    messages = []
    for question, result in zip(questions, results, strict=True):
        messages.append({"role": "user", "content": question})
        kept = messages if question != questions[-1] else messages[-1:]  # a context of 96 tokens has no room for more
        prompt = theirs.apply_chat_template(kept, tokenize=False, add_generation_prompt=True)
        (again,) = complete(model, tokenizer, [prompt], sampling)
        assert again == result
        messages.append({"role": "assistant", "content": result.text.strip()})
    assert out.getvalue().startswith(f"user: assistant: {results[0].text}\nuser: ")


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:2.*an object with a"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"prompt": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"p.jsonl:3: prompt is 3, expected a string"):
        read_prompts(tmp_path / "p.jsonl")


def test_the_command_on_a_pipe(folder, model, tokenizer):
    command = [sys.executable, "-m", "phi_fast.generate", "--model", str(folder), "--max-new-tokens", "6", "--quiet"]
    command += ["--temperature", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    piped = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, input="one")
    (expected,) = complete(model, tokenizer, ["one"], Sampling(max_new_tokens=6))
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, f"one{expected.text}\n", "")


def test_the_command_on_a_file(folder, tmp_path, model, tokenizer, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two and"}\n')
    files = ["--file", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "new" / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), *GREEDY, *files])
    assert main() == 0
    assert "tokens/s" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = complete(model, tokenizer, ["one", "two and"], Sampling(max_new_tokens=6))
    assert [row["completion"] for row in rows] == [completion.text for completion in expected]
    assert [row["tokens"] for row in rows] == [6, 6]


def test_a_chat_on_a_terminal(folder):
    """Without a prompt, and with a terminal as standard input, it starts a chat and prints no speed: the user's time
    would count."""
    command = [sys.executable, "-m", "phi_fast.generate", "--model", str(folder), "--max-new-tokens", "3"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.write(ours, b"hi\n\n")
        out, errors = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert out.startswith("Alice: Bob:") and out.endswith("\nAlice: ")
    assert "tokens/s" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--file", "p.txt"], "--prompt, --file, --chat and --serve exclude each other"),
        (["--prompt", "a", "--chat"], "--prompt, --file, --chat and --serve exclude each other"),
        (["--prompt", "a", "--out", "o.jsonl"], "--out is for the results of --file"),
        (["--file", "p.txt", "--out", "."], "Is a directory"),
        (["--file", "p.txt", "--out", "p.txt"], "--out p.txt is the file of prompts, p.txt, itself"),
        (["--file", "p.txt", "--out", "p.txt/o"], "p.txt cannot be written to; name another place"),
        (["--file", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--prompt", "a", "--n", "0"], "--n 0: expected at least 1"),
        (["--prompt", "a", "--n", "2", "--temperature", "0"], "is the same text 2 times: raise --temperature"),
        (["--chat", "--n", "2"], "a chat has one answer"),
        (["--prompt", "a", "--stop", "x\\"], "a backslash itself is written twice"),
        (["--prompt", os.fsdecode(b"caf\xe9")], r"--prompt has '\udce9' at position 3, which is not UTF-8"),
        (["--prompt", "a", "b", "--batch-size", "0"], "batch_size=0: expected at least 1"),
        (["--prompt", "a", "--device", "quantum"], "device 'quantum' cannot be used"),
        (["--prompt", "a", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--prompt", "a", "--dtype", "int8"], "dtype 'int8': expected auto, fp32, fp16, bf16"),
    ],
)
def test_options_that_cannot_be(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), *arguments])
    assert main() == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_an_error_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(tmp_path / "nothing")])
    assert main() == 2
    assert "nothing is neither a folder" in capsys.readouterr().err


def command(monkeypatch, folder, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), "--max-new-tokens", "6", *words])
    return main()


def test_samples_of_a_prompt_differ_and_a_file_has_them_side_by_side(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("one\ntwo and\n")
    assert command(monkeypatch, folder, "--file", str(tmp_path / "p.txt"), "--n", "3") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one"] * 3 + ["two and"] * 3
    assert len({row["completion"] for row in rows}) == 6
    assert command(monkeypatch, folder, "--prompt", "one", "--n", "2") == 0
    assert [line for line in capsys.readouterr().out.split("\n") if line.startswith("---")] == ["--- 1", "--- 2"]


def test_the_command_draws_unless_it_is_told_not_to(folder, model, tokenizer, monkeypatch, capsys):
    """Sampling is the default, since greedy text of a small model repeats itself."""
    (greedy,) = complete(model, tokenizer, ["one"], Sampling(max_new_tokens=6))
    (drawn,) = complete(model, tokenizer, ["one"], Sampling(max_new_tokens=6, temperature=0.8))
    assert greedy.text != drawn.text
    for words, expected in (([], drawn), (["--temperature", "0"], greedy)):
        assert command(monkeypatch, folder, "--prompt", "one", *words) == 0
        assert capsys.readouterr().out == f"one{expected.text}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb", "a\tb"),
        (r"\\n", r"\n"),
        ("é—🙂", "é—🙂"),
        (r"\u2014", "—"),
        ("\n", "\n"),
        ("end", "end"),
    ],
)
def test_escapes_in_stop_strings(typed, meant):
    assert unescape(typed) == meant


def test_a_newline_stops(folder, model, tokenizer, monkeypatch, capsys):
    """Uses a model that generates only newlines."""
    talker = speaking_phi()
    talker.lm_head.weight.data.zero_()
    talker.lm_head.bias.data[tokenizer.encode("\n").ids[0]] = 50.0
    monkeypatch.setattr("phi_fast.generate.load", lambda *_, **__: (talker, tokenizer))
    assert command(monkeypatch, folder, "--prompt", "one", "--stop", r"\n") == 0
    assert capsys.readouterr().out == "one\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("ok\ncafé\n".encode("latin-1"), r"p.txt:2 has byte 0xe9, which is not UTF-8 \(it is 'é' in Latin-1\)"),
        ("ok\n".encode("utf-16"), r"p.txt:1 looks like UTF-16"),
    ],
)
def test_prompts_in_another_encoding_name_the_line(tmp_path, folder, monkeypatch, capsys, data, message):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")
    loaded = []
    monkeypatch.setattr("phi_fast.generate.load", lambda *_, **__: loaded.append(1))
    assert command(monkeypatch, folder, "--file", str(tmp_path / "p.txt")) == 2
    assert "save it as UTF-8" in capsys.readouterr().err
    assert not loaded  # the error comes before a large model is read


def test_a_mark_at_a_files_beginning_and_other_line_ends_are_no_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\ntwo\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a"}\r\n'.encode())
    assert read_prompts(tmp_path / "p.jsonl") == ["a"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ud800"}')
    with pytest.raises(ValueError, match=r"p.jsonl:1 has .* which is not UTF-8"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("link", [False, True])
def test_results_never_go_onto_the_prompts(folder, tmp_path, monkeypatch, capsys, link):
    (tmp_path / "p.txt").write_text("one\n")
    out = tmp_path / "o.jsonl"
    if link:
        out.symlink_to("p.txt")
    else:
        os.link(tmp_path / "p.txt", out)
    assert command(monkeypatch, folder, "--file", str(tmp_path / "p.txt"), "--out", str(out)) == 2
    assert "itself: name another" in capsys.readouterr().err
    assert (tmp_path / "p.txt").read_text() == "one\n"


def test_nothing_is_left_where_the_model_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "kept").write_text("before")
    for out in ("new/out", "kept"):
        words = ("--file", str(tmp_path / "p.txt"), "--out", str(tmp_path / out))
        assert command(monkeypatch, tmp_path / "nothing", *words) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", "kept"}
    assert (tmp_path / "kept").read_text() == "before"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_models_escapes_reach_a_file_and_no_terminal(tokenizer):
    """Uses a model that generates escapes, streamed, in a batch and in a chat."""
    talker = speaking_phi()
    talker.lm_head.weight.data.zero_()
    talker.lm_head.bias.data[tokenizer.encode("\x1b").ids[0]] = 50.0
    for options in (
        GenerateOptions(model="", prompt=("\x1b]0;t\x07",), sampling=Sampling(max_new_tokens=3)),
        GenerateOptions(model="", prompt=("a", "b"), sampling=Sampling(max_new_tokens=3)),
    ):
        for out in (Terminal(), io.StringIO()):
            from_prompts(options, talker, tokenizer, out)
            assert (r"\x1b\x1b\x1b" in out.getvalue()) == out.isatty()
            assert ("\x1b\x1b\x1b" in out.getvalue()) != out.isatty()
            assert ("\x1b" in out.getvalue()) != out.isatty()
    out = Terminal()
    chat(GenerateOptions(model="", sampling=Sampling(max_new_tokens=3)), talker, tokenizer, io.StringIO("hi\n\n"), out)
    assert r"\x1b\x1b\x1b" in out.getvalue() and "\x1b" not in out.getvalue()


@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.slow), "latin-1"])
@pytest.mark.parametrize("module", [pytest.param("generate", marks=pytest.mark.slow), "convert"])
def test_any_encoding_of_the_terminal(folder, tmp_path, module, encoding):
    """Help and names with characters outside the encoding, and names that look like markup."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    out = tmp_path / "[red]x[/nothing]—é"
    run = {"generate": ["--model", folder, *GREEDY, "--prompt", "—[/nothing]"], "convert": [folder, out]}[module]
    for words in (["--help"], run):
        call = [sys.executable, "-m", f"phi_fast.{module}", *map(str, words)]
        done = subprocess.run(call, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
    text = (done.stdout if module == "generate" else done.stderr).decode(encoding)
    assert ("[/nothing]" if module == "generate" else "[red]x[/nothing]") in text
