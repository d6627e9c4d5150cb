"""Untrusted folders: names and links must not lead out of them, and their contents are checked before use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import CONFIG, make_run, make_source, random_weights
from safetensors.torch import save_file

from phi_fast.conversion.errors import ConversionError
from phi_fast.conversion.load import load
from phi_fast.conversion.source import Source
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model.merged import to_merged

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = make_source(tmp_path / "source", "hf", random_weights())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "config.json", "model.safetensors", "model.safetensors.index.json"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["relative", "absolute", "through a folder"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, source, secret, name, how) -> None:
    aim = {"relative": Path("../home/id_rsa"), "absolute": secret, "through a folder": Path("home/id_rsa")}[how]
    (source / "home").symlink_to(secret.parent)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(aim)
    with pytest.raises(ConversionError, match=rf"{name} leads to {secret}, outside of its folder"):
        convert(ConvertOptions(str(source), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "{tmp}/other/model.safetensors", "a\x00b", 7, ["x"]])
def test_an_index_names_files_of_its_folder(tmp_path, source, name) -> None:
    make_source(tmp_path / "other", "hf", random_weights(seed=1))
    (source / "model.safetensors").unlink()
    shard = name.format(tmp=tmp_path) if isinstance(name, str) else name
    index = {"weight_map": dict.fromkeys(random_weights(), shard)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "outside of its folder|cannot be opened|has no weight_map"
    with pytest.raises(ConversionError, match=message):
        load(source)


def test_links_inside_a_folder_and_the_hubs_cache_are_followed(tmp_path, source) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for path in source.iterdir():
        path.rename(tmp_path / "models--a--b" / "blobs" / path.name[::-1])
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name[::-1]}")
    assert convert(ConvertOptions(str(snapshot), tmp_path / "out")).exists()
    (snapshot / "added_tokens.json").symlink_to("../../other")
    (tmp_path / "models--a--b" / "other").write_text(SECRET)
    with pytest.raises(ConversionError, match="outside of its folder"):
        convert(ConvertOptions(str(snapshot), tmp_path / "again"))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "tokenizer.json", "evaluation/results.json"])
def test_a_runs_files_neither(tmp_path, secret, name) -> None:
    run = make_run(tmp_path / "run", to_merged(random_weights()))
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(ConversionError, match="outside of its folder"):
        convert(ConvertOptions(str(run), tmp_path / "out"))


@pytest.mark.parametrize("text", ["../../other", "/etc", "step-8", "", "\x00", "link"])
def test_the_pointer_of_a_run_names_one_of_its_checkpoints(tmp_path, text) -> None:
    run = make_run(tmp_path / "run", to_merged(random_weights()))
    other = make_run(tmp_path / "x" / "other", to_merged(random_weights(seed=1))) / "checkpoints" / "step-7"
    (run / "checkpoints" / "link").symlink_to(other)
    (run / "checkpoints" / "latest").write_text(text)
    with pytest.raises(ConversionError, match=r"which is not there|outside of its run"):
        Source.open(run)


@pytest.mark.parametrize("name", FILES)
def test_a_fifo_is_refused_at_once(source, name) -> None:
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(ConversionError, match=f"{name} is no regular file"):
        convert(ConvertOptions(str(source), source.parent / "out"))


def test_what_is_copied_is_said_and_code_is_left_out(tmp_path, source) -> None:
    settings = {
        "eos_token": "<|endoftext|>",
        "auto_map": {"AutoTokenizer": ["evil/repo--tokenizer.Evil", None]},
        "chat_template": "{{ 1 }}",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenizer.py").write_text("import os")
    command = [sys.executable, "-m", "phi_fast.convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"copied from {source}: tokenizer.json, tokenizer_config.json (with a chat_template)" in done.stderr
    assert "left out of tokenizer_config.json: auto_map" in done.stderr
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "chat_template": "{{ 1 }}"}
    assert not (tmp_path / "out" / "tokenizer.py").exists()


LIES = {
    "num_hidden_layers": (10**9, "describes 1,000,000,000 layers, and its weights .* have 2"),
    "max_position_embeddings": (10**9, "max_position_embeddings is 1000000000; .* at most 1,048,576"),
    "vocab_size": (10**9, r"model.embed_tokens.weight is \(320, 128\), expected \(1000000000, 128\)"),
    "hidden_size": (10**4000, "hidden_size is 1000.*; expected whole numbers"),
    "num_attention_heads": (10**9, "head dim"),
    "rope_theta": ("big", "rope_theta is 'big', expected a finite number"),
    "layer_norm_eps": ([], r"layer_norm_eps is \[\], expected a finite number"),
    "rope_parameters": (["x"], r"rope_parameters is \['x'\], expected an object"),
    "partial_rotary_factor": ("half", "partial_rotary_factor is 'half', expected a finite number"),
}


ONLY_OF_HF = ("rope_parameters", "partial_rotary_factor")
PLACES = [("hf", lie) for lie in LIES] + [("run", lie) for lie in LIES if lie not in ONLY_OF_HF]


@pytest.mark.parametrize(("place", "lie"), PLACES)
def test_a_configuration_is_compared_with_the_weights_first(tmp_path, place, lie) -> None:
    """Refused at once and in little memory, by every command that reads a model."""
    value, message = LIES[lie]
    if place == "hf":
        folder = make_source(tmp_path / "source", "hf", random_weights())
        config = json.loads((folder / "config.json").read_text())
        if lie == "partial_rotary_factor":
            del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config | {lie: value}))
    else:
        folder = make_run(tmp_path / "run", to_merged(random_weights())) / "checkpoints" / "step-7"
        state = json.loads((folder / "state.json").read_text())
        state["options"]["model"][lie] = value
        (folder / "state.json").write_text(json.dumps(state))
        message = message.replace("model.embed_tokens", "embed_tokens")
    with pytest.raises(ConversionError, match=message):
        load(folder)


def test_tensors_that_show_one_number_as_many(tmp_path) -> None:
    weights = random_weights()
    source = make_source(tmp_path / "source", "hf", weights, torch_file=True)
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 2**30}
    (source / "config.json").write_text(json.dumps(config))
    wide = torch.zeros(1, CONFIG.hidden_size).expand(2**30, -1)
    weights |= {"model.embed_tokens.weight": wide, "lm_head.weight": wide, "lm_head.bias": wide[:, 0]}
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin has .* bytes, and its tensors would take"):
        load(source)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("torch_file", [False, True])
def test_weights_are_floats(tmp_path, dtype, torch_file) -> None:
    weights = random_weights()
    weights["model.layers.1.mlp.fc1.bias"] = torch.ones(512).to(dtype)
    source = make_source(tmp_path / "source", "hf", weights, torch_file=torch_file)
    with pytest.raises(ConversionError, match=r"wrong dtype: model\.layers\.1\.mlp\.fc1\.bias holds .*expected one of"):
        load(source)


def test_a_message_about_many_tensors_ends(tmp_path, source) -> None:
    weights = random_weights() | {f"extra.{i}": torch.zeros(1) for i in range(3000)}
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConversionError, match="3000 problems") as error:
        load(source)
    assert len(str(error.value).splitlines()) < 110


@pytest.mark.parametrize("layout", ["hf", "merged", "phi-msft", "mixformer"])
def test_layers_are_counted_in_every_layout(tmp_path, layout) -> None:
    source = make_source(tmp_path / "source", layout, random_weights())
    assert Source.open(source).config.num_hidden_layers == 2
    config = json.loads((source / "config.json").read_text())
    name = "n_layer" if "n_layer" in config else "num_hidden_layers"
    (source / "config.json").write_text(json.dumps(config | {name: 3}))
    with pytest.raises(ConversionError, match=r"describes 3 layers, and its weights .* have 2"):
        Source.open(source)


def test_a_cards_text_is_no_markup(tmp_path) -> None:
    run = make_run(tmp_path / "run", to_merged(random_weights()))
    options = json.loads((run / "config.json").read_text())
    evil = "x|\n\n<script>alert(1)</script> ![a](http://e) `\x1b]0;t\x07"
    (run / "config.json").write_text(json.dumps(options | {"recipe": evil, evil: 1, "betas": [0.9, 0.98]}))
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps({"tasks": {evil: {"score": 0.5, "questions": 3}}}))
    card = (convert(ConvertOptions(str(run), tmp_path / "out")) / "README.md").read_text()
    assert "| betas | [0.9, 0.98] |" in card
    lines = [line for line in card.splitlines() if "script" in line]
    assert len(lines) == 3
    for line in lines:
        assert "<script>" not in line.replace(r"\<", "")
        assert not re.search(r"(?<!\\)\]\(", line)
        assert "\x1b" not in line
        assert line.replace(r"\|", "").count("|") == (5 if "0.500" in line else 3)


@pytest.mark.parametrize("results", [{}, {"tasks": 1}, {"tasks": {"a": {"score": "x", "questions": 1}}}])
def test_results_that_are_none_are_named(tmp_path, results) -> None:
    run = make_run(tmp_path / "run", to_merged(random_weights()))
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConversionError, match=r"results.json: tasks.* expected .*Get it again"):
        convert(ConvertOptions(str(run), tmp_path / "out"))


def test_a_model_folder_may_hold_checkpoints(tmp_path, source) -> None:
    (source / "checkpoints" / "step-500").mkdir(parents=True)
    assert Source.open(source).run is None
    inside_one = make_source(tmp_path / "checkpoints" / "phi", "hf", random_weights())
    assert Source.open(inside_one).run is None
    run = make_run(tmp_path / "run", to_merged(random_weights()))
    assert Source.open(run).run == run
    assert Source.open(run / "checkpoints" / "step-7").run == run


def test_errors_show_names_from_files_without_terminal_escapes(tmp_path, source) -> None:
    save_file({"\x1b]0;owned\x07": torch.zeros(1)}, source / "model.safetensors")
    commands = {"convert": [source, tmp_path / "out"], "generate": ["--model", source, "--prompt", "a"]}
    for module, words in commands.items():
        done = subprocess.run([sys.executable, "-m", f"phi_fast.{module}", *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert r"\x1b]0;owned\x07" in done.stderr
        assert "\x1b" not in done.stderr
