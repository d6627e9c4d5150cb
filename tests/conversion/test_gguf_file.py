"""Reads written GGUF files with the package's own reader, and runs their tensors as llama.cpp's `phi2` does."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from model_folders import CONFIG, make_run, make_source, random_weights, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phi_fast.conversion.errors import ConversionError
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model.reference import ReferencePhi

gguf = pytest.importorskip("gguf")

TEXTS = ["def f(x):\n    return x + 12  # it's naïve — 猫", "  the\t\tend <|endoftext|> of the text, they'll say"]
# llama.cpp's names (src/llama-arch.cpp), written out here independently of the package.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
OUTSIDE = {"output_norm": "model.final_layernorm", "output": "lm_head"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types (include/llama.h)."""


def merging_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=True, special=False)])
    return tokenizer


@pytest.fixture
def source(tmp_path):
    return with_tokenizer(make_source(tmp_path / "source", "phi-msft", random_weights()))


def with_tokenizer(folder):
    merging_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def expected_names() -> dict[str, str]:
    """GGUF name -> Hugging Face name."""
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for p in ("weight", "bias"):
        names |= {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in OUTSIDE.items()}
        for i in range(CONFIG.num_hidden_layers):
            names |= {f"blk.{i}.{ours}.{p}": f"model.layers.{i}.{theirs}.{p}" for ours, theirs in BLOCK.items()}
    return names


def read_tensors(path) -> dict[str, torch.Tensor]:
    result = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        result[tensor.name] = data
        assert list(data.shape) == tensor.shape.tolist()[::-1]
    return result


def read_keys(path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("asked", ["keep", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_under_llama_cpps_name(tmp_path, dtype, asked):
    weights = random_weights(dtype)
    source = with_tokenizer(make_source(tmp_path / "source", "mixformer", weights))
    path = convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf", dtype=asked))
    found = read_tensors(path)
    assert found.keys() == expected_names().keys()
    matrices = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(asked, dtype)
    for name, theirs in expected_names().items():
        tensor = weights[theirs]
        expected = tensor.float() if tensor.dim() == 1 else tensor.to(matrices)
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), name
    assert read_keys(path)["general.file_type"] == {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[matrices]


def test_every_key(tmp_path, source):
    (source / "chat_template.jinja").write_text("{{ messages }}")
    path = convert(ConvertOptions(str(source), gguf=tmp_path / "a folder" / "model.gguf"))
    keys = read_keys(path)
    tokenizer = merging_tokenizer()
    size = tokenizer.get_vocab_size()
    assert size == 301
    tokens = [tokenizer.id_to_token(id) for id in range(size)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    assert {name: value for name, value in keys.items() if not name.startswith("GGUF.")} == {
        "general.architecture": "phi2",
        "general.name": "source",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "phi2.context_length": 64,
        "phi2.embedding_length": 128,
        "phi2.feed_forward_length": 512,
        "phi2.block_count": 2,
        "phi2.attention.head_count": 2,
        "phi2.attention.head_count_kv": 2,
        "phi2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "phi2.rope.dimension_count": 32,
        "phi2.rope.freq_base": 10000.0,
        "phi2.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{id}]" for id in range(size, 320)],
        "tokenizer.ggml.token_type": [CONTROL, *[NORMAL] * 299, USER_DEFINED, *[UNUSED] * 19],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


def test_the_tokenizer_read_back_gives_the_same_ids(tmp_path, source):
    keys = read_keys(convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf")))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    vocabulary = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    again = Tokenizer(models.BPE(vocabulary, merges))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    again.add_special_tokens([token for token, type in zip(tokens, types, strict=True) if type == CONTROL])
    again.add_tokens([token for token, type in zip(tokens, types, strict=True) if type == USER_DEFINED])
    for text in TEXTS:
        assert again.encode(text).ids == merging_tokenizer().encode(text).ids


def test_the_tensors_run_as_llama_cpps_phi2_gives_our_logits(tmp_path):
    """Written after llama.cpp's src/models/phi2.cpp, from the tensors and keys of the file alone."""
    weights = {name: tensor * 12 for name, tensor in random_weights().items()}
    source = with_tokenizer(make_source(tmp_path / "source", "merged", weights))
    path = convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf"))
    t, keys = read_tensors(path), read_keys(path)
    heads, rotated = keys["phi2.attention.head_count"], keys["phi2.rope.dimension_count"]
    eps = keys["phi2.attention.layer_norm_epsilon"]
    ids = torch.randint(0, CONFIG.vocab_size, (17,), generator=torch.Generator().manual_seed(1))

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def rotate(x):  # LLAMA_ROPE_TYPE_NEOX: dim j pairs with dim j + rotated / 2
        frequency = keys["phi2.rope.freq_base"] ** (-torch.arange(0, rotated, 2) / rotated)
        angle = torch.arange(x.shape[0])[:, None, None] * frequency
        a, b, rest = x.split([rotated // 2, rotated // 2, x.shape[-1] - rotated], -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)

    x = t["token_embd.weight"][ids]
    for i in range(keys["phi2.block_count"]):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (linear(h, f"blk.{i}.attn_{part}").unflatten(-1, (heads, -1)) for part in "qkv")
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        mlp = linear(F.gelu(linear(h, f"blk.{i}.ffn_up"), approximate="tanh"), f"blk.{i}.ffn_down")
        x = x + linear(attended, f"blk.{i}.attn_output") + mlp
    logits = linear(norm(x, "output_norm"), "output")

    reference = ReferencePhi(CONFIG)
    reference.load_state_dict(weights)
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def spoiled(change):
    def make():
        tokenizer = merging_tokenizer()
        return change(tokenizer) or tokenizer

    return make


def _normalise(tokenizer):
    tokenizer.normalizer = normalizers.NFC()


def _split_at_spaces(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def _prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


STRANGERS = {
    "a normalizer": (spoiled(_normalise), "its normalizer is .*NFC"),
    "another pre-tokenizer": (spoiled(_split_at_spaces), "its pre_tokenizer is .*Whitespace"),
    "a prefix space": (spoiled(_prefix_space), "its pre_tokenizer is .*true"),
    "no BPE": (lambda: Tokenizer(models.WordLevel({"<|endoftext|>": 0}, "<|endoftext|>")), "its model is WordLevel"),
    "no merges": (tiny_tokenizer, "no merges"),
    "a row's name": (spoiled(lambda tokenizer: tokenizer.add_tokens(["[PAD310]"]) and None), r"a token '\[PAD310\]'"),
    "too many ids": (
        spoiled(lambda tokenizer: tokenizer.add_tokens([f"<{i}>" for i in range(20)]) and None),
        "321 ids, the model only 320",
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(tmp_path, source, kind):
    make, message = STRANGERS[kind]
    make().save(str(source / "tokenizer.json"))
    with pytest.raises(ConversionError, match=message):
        convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_float64_needs_a_dtype(tmp_path):
    source = with_tokenizer(make_source(tmp_path / "source", "merged", random_weights(torch.float64)))
    with pytest.raises(ConversionError, match="--dtype fp32"):
        convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf"))
    convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf", dtype="fp32"))


def test_a_folder_and_a_file_at_once_from_a_run(tmp_path):
    run = with_tokenizer(make_run(tmp_path / "my-run", random_weights()))
    path = tmp_path / "model.gguf"
    assert convert(ConvertOptions(str(run), tmp_path / "out", gguf=path)) == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").exists()
    assert read_keys(path)["general.name"] == "my-run"


def test_places_that_cannot_be_written(tmp_path, source):
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(ConversionError, match=r"model\.gguf exists.*--overwrite"):
        convert(ConvertOptions(str(source), gguf=path))
    assert path.read_text() == "mine"
    convert(ConvertOptions(str(source), gguf=path, overwrite=True))
    assert path.read_bytes()[:4] == b"GGUF"
    for options, message in (
        (ConvertOptions(str(source), gguf=source, overwrite=True), "is a folder"),
        (ConvertOptions(str(source), tmp_path / "new", gguf=tmp_path / "new"), "name two places"),
        (ConvertOptions(str(source), gguf=source / "model.safetensors", overwrite=True), "a file of the source"),
        (ConvertOptions(str(source)), "OUT, or a file, --gguf FILE"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(options)


def test_a_crash_leaves_nothing(tmp_path, source):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf"), progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_package_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'phi-fast\[gguf\]'"):
        convert(ConvertOptions(str(source), gguf=tmp_path / "model.gguf"))
