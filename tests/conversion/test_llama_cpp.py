"""llama.cpp itself reads a written GGUF file, and gives this project's log-probabilities."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_folders import CONFIG, make_source, random_weights
from test_gguf_file import with_tokenizer

from phi_fast.convert import ConvertOptions, convert
from phi_fast.model.reference import ReferencePhi

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")  # llama.cpp as a wheel

PROMPTS = [torch.randint(1, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(1, 33, 2)]
MOST = 64
"""Likeliest tokens whose log-probabilities are compared."""
ASK = """
import json, sys, xllamacpp
path, prompts, most = json.loads(sys.argv[1])
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.warmup = path, 64, False
options.cpuparams.n_threads = 1
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in 16 bits
server, found = xllamacpp.Server(options), []
for prompt in prompts:
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": most, "cache_prompt": False}
    replies = []
    server.handle_completions(asked, replies.append)
    steps = replies[-1]["choices"][0]["logprobs"]["content"]
    found.append([(x["id"], x["logprob"]) for step in steps for x in step["top_logprobs"]])
print("FOUND", json.dumps(found), flush=True)
"""


def by_llama_cpp(path: Path) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of the likeliest tokens after each prompt, from a process of its own. The list is empty
    where the likeliest of all is only a part of a character: the server keeps it back."""
    words = json.dumps([str(path), PROMPTS, MOST])
    done = subprocess.run([sys.executable, "-c", ASK, words], capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("FOUND"))


def test_llama_cpp_gives_our_log_probabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: tensor * 12 for name, tensor in random_weights().items()}
    source = with_tokenizer(make_source(tmp_path / "source", "merged", weights))
    found = by_llama_cpp(convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf")))

    reference = ReferencePhi(CONFIG).eval()
    reference.load_state_dict(weights)
    gelu = F.gelu
    # ggml reads GELU from a table of 16-bit numbers.
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x.half().float(), approximate="tanh").half().float())
    compared = 0
    for prompt, likeliest in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert expected.std() > 0.3
        for token, value in likeliest:
            assert value == pytest.approx(float(expected[token]), abs=1e-4), (prompt, token)
            compared += 1
    assert compared >= len(PROMPTS) // 2 * MOST
