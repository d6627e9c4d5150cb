"""Perplexity and bits per byte of a text, against plain forward passes and lm-eval's own windows."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from model_folders import tiny_tokenizer
from rich.console import Console

from phi_fast import evaluate as module
from phi_fast.evaluation.perplexity import TextScore, score_text, windows
from phi_fast.model import Phi

QUIET = Console(quiet=True, markup=False, emoji=False)


def write(folder: Path, letters: int, seed: int = 0) -> Path:
    """A text of about `letters` letters in one to three bytes, with other white space than single spaces."""
    draw = random.Random(seed)
    text = "".join(draw.choices("aé東 \n\t", weights=[6, 2, 1, 2, 1, 1], k=letters)) + "\r\nend"
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return path


def plainly(model: Phi, ids: list[int], window: int, stride: int) -> float:
    """Sum -log p of each token, each from a forward pass over nothing but its own window."""
    total = 0.0
    for at in range(1, len(ids)):
        last = window if at <= window else window + math.ceil((at - window) / stride) * stride
        last = min(last, len(ids) - 1)
        inputs = torch.tensor([ids[max(0, last - window) : at]])
        with torch.no_grad():
            total -= float(model(inputs).logits[0, -1].double().log_softmax(-1)[ids[at]])
    return total


@pytest.mark.parametrize("stride", [None, 192, 50, 191])
def test_every_token_is_predicted_once_from_its_window(small_phi: Phi, tmp_path: Path, stride: int | None) -> None:
    path = write(tmp_path, 250)
    text = path.read_bytes()
    found = score_text(
        path, text.decode(), small_phi, tiny_tokenizer(), stride=stride, batch_tokens=1000, console=QUIET
    )
    ids = [0, *tiny_tokenizer().encode(text.decode()).ids]
    assert (found.tokens, found.bytes, found.words) == (len(text), len(text), len(text.decode().split()))
    assert found.nats == pytest.approx(plainly(small_phi, ids, 192, stride or 96), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.nats / len(text) / math.log(2))
    assert found.nats_per_token == pytest.approx(found.nats / len(text))


@pytest.mark.parametrize("length", [2, 5, 6, 7, 11, 12, 13, 40])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_windows_cover_the_text(length: int, stride: int) -> None:
    ids = list(range(length))
    requests = list(windows(ids, 5, stride))
    assert [id for request in requests for id in request.continuation] == ids[1:]
    for number, request in enumerate(requests):
        joined = request.context + request.continuation
        assert joined == tuple(range(joined[0], joined[-1] + 1))
        assert len(joined) <= 6
        assert number == 0 or len(request.context) >= 5 - stride + 1


def test_disjoint_windows_are_lm_evals(small_phi: Phi, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from phi_fast.evaluation.lm import PhiFastLM

    path = write(tmp_path, 300)
    lm = PhiFastLM(model=small_phi, hf_tokenizer=tiny_tokenizer())
    text = path.read_bytes().decode()
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    found = score_text(path, text, small_phi, tiny_tokenizer(), stride=192, batch_tokens=4096, console=QUIET)
    assert -found.nats == pytest.approx(lm.loglikelihood_rolling([request])[0], rel=1e-6)


def test_the_figures_are_those_of_a_uniform_model() -> None:
    """Of 4-byte words and 2-byte tokens, each at probability 1/16: 4 bits per token, 2 per byte."""
    score = TextScore("t", 8, 4, tokens=200, words=100, bytes=400, nats=200 * math.log(16))
    assert score.bits_per_byte == pytest.approx(2)
    assert score.perplexities == {"token": pytest.approx(16), "word": pytest.approx(256), "byte": pytest.approx(4)}
    assert TextScore("t", 8, 4, tokens=1, words=1, bytes=1, nats=1e4).perplexities["word"] == math.inf
    assert (
        json.loads(TextScore("t", 8, 4, tokens=1, words=1, bytes=1, nats=1e4).to_json())["perplexity_per_word"] is None
    )


def run(folder: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(folder), *words])
    return module.main()


def test_the_command(small_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    path = write(tmp_path, 100)
    words = ["--text", str(path), "--stride", "30", "--out", str(tmp_path / "out")]
    assert run(small_folder, *words, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "text-text.txt.json").read_text())
    assert written["bytes"] == len(path.read_bytes())
    assert (written["window"], written["stride"]) == (192, 30)
    for shown in (f"{written['bits_per_byte']:.4f}", f"{written['nats_per_token']:.4f}", "advancing by 30"):
        assert shown in printed


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (["--stride", "193"], b"a text", "--stride 193: expected 1 to 192 tokens, the model's context"),
        (["--stride", "0"], b"a text", "--stride 0: expected 1 to 192 tokens"),
        (["--tasks", "piqa"], b"a text", "--text and --tasks exclude each other"),
        ([], b"a\xff text", "byte 1 is 0xff, which is not UTF-8"),
        ([], b" \n", "has no word"),
        ([], None, "cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_scored_is_refused(words, content, message, small_folder, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(small_folder, "--text", str(path), *words, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_stride_without_a_text_is_refused(small_folder, monkeypatch, capsys) -> None:
    assert run(small_folder, "--stride", "5", monkeypatch=monkeypatch) == 2
    assert "--stride 5 is for the windows of --text" in capsys.readouterr().err
