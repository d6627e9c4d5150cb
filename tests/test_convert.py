"""Converts all four layouts into each other bit for bit, and loads the results with transformers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import torch
from model_folders import CONFIG, make_run, make_source, random_weights, tiny_tokenizer
from safetensors.torch import load_file, save_file

from phi_fast.config import PhiConfig
from phi_fast.conversion import published_layouts, writer
from phi_fast.conversion.errors import ConversionError
from phi_fast.conversion.folder import find_tokenizer
from phi_fast.conversion.hf_config import phi_config
from phi_fast.conversion.source import Source
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model.merged import to_merged
from phi_fast.model.reference import ReferencePhi

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", published_layouts.NAMES)
def test_every_layout_into_every_other_and_back_bit_for_bit(tmp_path, start, dtype):
    source = make_source(tmp_path / "source", start, random_weights(dtype))
    original = load_file(source / "model.safetensors")
    for to in published_layouts.NAMES:
        there = convert(ConvertOptions(str(source), tmp_path / to, to=to))
        back = convert(ConvertOptions(str(there), tmp_path / f"{to}-back", to=start))
        returned = load_file(back / "model.safetensors")
        assert returned.keys() == {name for name in original if "rotary_emb" not in name}
        for name, tensor in returned.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, original[name]), (to, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", ["hf", "phi-msft", "mixformer"])
def test_transformers_loads_the_result_and_gives_the_same_logits(tmp_path, start, dtype):
    weights = random_weights(dtype)
    source = make_source(tmp_path / "source", start, weights)
    out = convert(ConvertOptions(str(source), tmp_path / "hf"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype
    reference = ReferencePhi(CONFIG)
    reference.load_state_dict(weights)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, reference.float()(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_transformers_saves_comes_in_bit_for_bit(tmp_path):
    config = transformers.PhiConfig(
        vocab_size=320, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="400KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    tiny_tokenizer().save(str(tmp_path / "saved" / "tokenizer.json"))
    source = Source.open(tmp_path / "saved")
    assert source.config == CONFIG
    merged = convert(ConvertOptions(str(tmp_path / "saved"), tmp_path / "merged", to="merged"))
    state = load_file(merged / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in to_merged(model.state_dict()).items())


def test_torch_files_of_the_older_layouts(tmp_path):
    weights = random_weights(torch.float16)
    source = make_source(tmp_path / "source", "mixformer", weights, torch_file=True)
    out = convert(ConvertOptions(str(source), tmp_path / "hf"))
    result = load_file(out / "model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in weights.items())


def test_tokenizer_and_generation_config_load_as_they_are(tmp_path):
    source = make_source(tmp_path / "source", "hf", random_weights())
    out = convert(ConvertOptions(str(source), tmp_path / "out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "def f(x):\n    return x  # é"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer().encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 0)
    again = convert(ConvertOptions(str(out), tmp_path / "again"))
    assert (again / "tokenizer_config.json").read_text() == (out / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("merged", [True, False])
def test_a_run_becomes_a_folder_with_its_recipe_and_results(tmp_path, merged):
    weights = random_weights()
    run = make_run(tmp_path / "my-run", to_merged(weights) if merged else weights)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(
        json.dumps({"tasks": {"arc_easy": {"score": 0.4321, "questions": 2376}}})
    )
    for source in (run, run / "checkpoints" / "step-7"):
        out = convert(ConvertOptions(str(source), tmp_path / "out", overwrite=True))
        result = load_file(out / "model.safetensors")
        assert all(torch.equal(result[name], tensor) for name, tensor in weights.items())
        card = (out / "README.md").read_text()
        for words in ("my-run", "| lr | 0.0002 |", "| loss | 3.0 |", "| val_loss | 3.25 |", "0.432 | 2376 | 0.756"):
            assert words in card, words
        assert "| tokens | not measured |" in card
        transformers.AutoTokenizer.from_pretrained(out)


def test_shards_and_their_index(tmp_path):
    weights = random_weights()
    source = make_source(tmp_path / "source", "hf", weights)
    out = convert(ConvertOptions(str(source), tmp_path / "out", max_shard_gb=4e-4))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in weights.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    back = convert(ConvertOptions(str(out), tmp_path / "back", to="merged"))
    state = load_file(back / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in to_merged(weights).items())


def test_dtype_changes_only_when_asked(tmp_path):
    weights = random_weights()
    source = make_source(tmp_path / "source", "hf", weights)
    out = convert(ConvertOptions(str(source), tmp_path / "out", dtype="fp16"))
    result = load_file(out / "model.safetensors")
    assert all(torch.equal(result[name], tensor.half()) for name, tensor in weights.items())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_every_wrong_key_is_in_one_error(tmp_path):
    weights = random_weights()
    del weights["model.layers.1.mlp.fc1.bias"], weights["lm_head.bias"]
    weights["model.layers.2.mlp.fc1.bias"] = torch.zeros(3)
    weights["model.layers.0.mlp.fc2.weight"] = torch.zeros(512, 128)
    source = make_source(tmp_path / "source", "hf", weights)
    with pytest.raises(ConversionError) as error:
        convert(ConvertOptions(str(source), tmp_path / "out"))
    for line in (
        "4 problems",
        "missing: model.layers.1.mlp.fc1.bias (512,)",
        "missing: lm_head.bias (320,)",
        "extra: model.layers.2.mlp.fc1.bias (3,)",
        "misshapen: model.layers.0.mlp.fc2.weight is (512, 128), expected (128, 512)",
    ):
        assert line in str(error.value), line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def save_torch(value):
    def save(folder):
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return save


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGES = {
    "weights cut short": (
        cut("model.safetensors", 5000),
        r"model\.safetensors is damaged or cut short: .*Get it again",
    ),
    "weights empty": (cut("model.safetensors", 0), r"model\.safetensors is damaged or cut short"),
    "a pickle of more": (save_torch({"a": CONFIG}), r"pytorch_model\.bin is damaged, or holds more than tensors"),
    "a list": (save_torch([1]), r"pytorch_model\.bin does not hold a state dict of named tensors"),
    "a nested dictionary": (
        save_torch({"model": {}}),
        r"pytorch_model\.bin does not hold a state dict of named tensors",
    ),
    "no JSON": (cut("config.json", 30), r"config\.json is not JSON: .*Get it again"),
    "another JSON": (write("config.json", "[]"), r"config\.json holds a JSON list, expected an object"),
    "an index of nothing": (write("model.safetensors.index.json", "{}"), r"index\.json has no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path, damage):
    spoil, message = DAMAGES[damage]
    source = make_source(tmp_path / "source", "hf", random_weights())
    spoil(source)
    with pytest.raises(ConversionError, match=message):
        convert(ConvertOptions(str(source), tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_torch_file_cut_short_is_named(tmp_path):
    source = make_source(tmp_path / "source", "hf", random_weights(), torch_file=True)
    cut("pytorch_model.bin", 5000)(source)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged"):
        Source.open(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "128", "num_attention_heads": 0}, r"hidden_size is '128', num_attention_heads is 0; expected"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type is linear, expected default"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is linear"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path, changes, message):
    source = make_source(tmp_path / "source", "hf", random_weights())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConversionError, match=message):
        Source.open(source)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
def test_shards_have_a_size(tmp_path, size):
    source = make_source(tmp_path / "source", "hf", random_weights())
    with pytest.raises(ConversionError, match=r"--max-shard-gb .*: expected a size above 0"):
        convert(ConvertOptions(str(source), tmp_path / "out", max_shard_gb=size))


def test_configurations_of_other_models_are_refused_with_all_reasons(tmp_path):
    source = make_source(tmp_path / "source", "hf", random_weights())
    config = json.loads((source / "config.json").read_text())
    config |= {"qk_layernorm": True, "num_key_value_heads": 1, "hidden_act": "relu", "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as error:
        Source.open(source)
    for words in ("qk_layernorm is True", "num_key_value_heads is 1", "hidden_act is relu", "tie_word_embeddings"):
        assert words in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ConversionError, match="neither a folder"):
        Source.open("nowhere")
    with pytest.raises(ConversionError, match="could not be downloaded from the hub"):
        Source.open("no-such-owner/no such model")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConversionError, match="no checkpoint of this run was completed"):
        Source.open(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="holds no weights"):
        Source.open(tmp_path / "empty")
    save_file({"gpt.wte": torch.zeros(2)}, tmp_path / "empty" / "model.safetensors")
    with pytest.raises(ConversionError, match="belong to no phi layout"):
        Source.open(tmp_path / "empty")


def test_an_existing_folder_is_not_replaced_unasked(tmp_path):
    source = make_source(tmp_path / "source", "hf", random_weights())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="--overwrite"):
        convert(ConvertOptions(str(source), tmp_path / "out"))
    assert (tmp_path / "out" / "mine.txt").exists()


def test_a_tokenizer_is_demanded_where_none_is_known(tmp_path):
    source = make_source(tmp_path / "source", "hf", random_weights())
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match="--tokenizer"):
        convert(ConvertOptions(str(source), tmp_path / "out"))
    tiny_tokenizer().save(str(tmp_path / "mine.json"))
    out = convert(ConvertOptions(str(source), tmp_path / "out", tokenizer=str(tmp_path / "mine.json")))
    assert find_tokenizer(Source.open(out)).get_vocab() == tiny_tokenizer().get_vocab()


def test_the_command_and_its_error(tmp_path):
    source = make_source(tmp_path / "source", "hf", random_weights())
    command = [sys.executable, "-m", "phi_fast.convert", str(source), str(tmp_path / "out"), "--to", "phi-msft"]
    assert subprocess.run(command).returncode == 0
    assert "transformer.h.1.mixer.Wqkv.bias" in load_file(tmp_path / "out" / "model.safetensors")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_phi_1_5_converts_in_little_memory(tmp_path):
    """Converts 2.8 GB of fp16 weights; the peak is the process's memory, including torch's import."""
    config = PhiConfig()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(phi_config(config, torch.float16)))
    tiny_tokenizer().save(str(tmp_path / "source" / "tokenizer.json"))
    shapes = published_layouts.shapes(config)
    entries = [writer.Entry(name, shape, torch.float16) for name, shape in shapes.items()]
    writer.write(tmp_path / "source", entries, lambda name: torch.zeros(shapes[name], dtype=torch.float16), 10**10)
    command = [
        sys.executable,
        "-m",
        "phi_fast.convert",
        str(tmp_path / "source"),
        str(tmp_path / "out"),
        "--to",
        "merged",
    ]
    subprocess.run(command, check=True)
    peak_gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"peak memory {peak_gigabytes:.2f} GB")
    assert peak_gigabytes < 6, peak_gigabytes
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2 * config.num_parameters()
