"""The tokenizer decides the ids at a text's beginning and end: in a run's config, its checkpoints, export and text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_folders import make_source, random_weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from trainer_processes import arguments, finish

from phi_fast.conversion.errors import ConversionError
from phi_fast.conversion.load import load
from phi_fast.convert import ConvertOptions, convert
from phi_fast.data import stdlib_corpus, vocabulary
from phi_fast.data.manifest import Delimiter, Manifest
from phi_fast.evaluation.lm import PhiFastLM
from phi_fast.generation import Sampling, complete, generate
from phi_fast.train import main
from phi_fast.training.options import parse
from phi_fast.training.run_directory import _differences


def tokenizer_of(special: list[str]) -> Tokenizer:
    """A byte tokenizer whose first ids are the special tokens, in order."""
    result = vocabulary.byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator([], trainer)
    return result


def make_corpora(folder: Path, tokenizer: Tokenizer, delimiters: dict[str, int | None]) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, delimiter in delimiters.items():
        plain = tokenizer_of([vocabulary.END_OF_TEXT])  # the writer needs a name for the delimiter
        stdlib_corpus._write_component(folder / name, ["a few words " * 20] * 60, plain)
        manifest = Manifest.read(folder / name)
        changed = {"tokenizer_sha256": vocabulary.digest(tokenizer), "vocab_size": vocabulary.vocab_size(tokenizer)}
        between = None if delimiter is None else Delimiter(delimiter)
        Manifest(**{**vars(manifest), **changed, "delimiter": between}).write(folder / name)
    return folder


def model_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["model"]


@pytest.mark.parametrize(
    ("special", "delimiter", "end"),
    [
        (["<unk>", "<s>", "<|endoftext|>"], 2, 2),
        (["<unk>", "<s>", "</s>"], 2, 2),
        (["<|endoftext|>", "<s>", "</s>"], 2, 2),  # the corpus's delimiter does not have the default name
        (["<pad>", "<|endoftext|>"], None, 1),
        (["<pad>"], None, None),
    ],
)
def test_one_id_from_the_corpus_to_the_export(tmp_path, special, delimiter, end) -> None:
    tokenizer = tokenizer_of(special)
    data = make_corpora(tmp_path / "data", tokenizer, {"docs": delimiter, "code": delimiter})
    run = tmp_path / "run"
    finish(arguments(data, run, 2, sample_tokens=4), tmp_path / "output")
    assert (model_of(run)["bos_token_id"], model_of(run)["eos_token_id"]) == (end, end)

    model, found = load(run)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (end, end)
    out = convert(ConvertOptions(str(run), tmp_path / "out"))
    names = json.loads((out / "tokenizer_config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    if end is None:
        assert not any("eos" in name for name in (*names, *generation))
        with pytest.raises(ValueError, match="a prompt is empty, and this model's tokenizer has no beginning"):
            complete(model, found, [""], Sampling(max_new_tokens=2))
        return
    assert (config["bos_token_id"], config["eos_token_id"]) == (end, end)
    assert generation == {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    assert names["eos_token"] == names["pad_token"] == special[end]
    assert load(out)[0].config.eos_token_id == end
    lm = PhiFastLM(model=model, hf_tokenizer=found)
    assert (lm.eot_token_id, lm.prefix_token_id) == (end, end)

    # A model that always generates `end`, and one with an empty prompt.
    model.lm_head.bias.data.zero_()
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data[end] = 1.0
    (ended,) = complete(model, found, ["a"], Sampling(max_new_tokens=5))
    assert (ended.tokens, ended.reason) == ([end], "end")
    (empty,) = complete(model, found, [""], Sampling(max_new_tokens=5))
    assert empty.tokens == [end]


@pytest.mark.slow
def test_the_papers_recipe_with_another_tokenizer(stdlib, tmp_path) -> None:
    shape = ["--model.hidden-size", "64", "--model.num-attention-heads", "1", "--model.num-hidden-layers", "1"]
    less = ["--sequence-length", "16", "--global-batch-size", "2", "--tokens", "32", "--sample-tokens", "0"]
    words = ["--recipe", "phi-1.5", "--tokenizer", "stdlib", "--model.vocab-size", "8192", *shape, *less]
    assert main([*words, "--mixture", "docs=1", "--data", str(stdlib), "--run-dir", str(tmp_path / "run")]) == 0
    out = convert(ConvertOptions(str(tmp_path / "run"), tmp_path / "out"))
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    command = [sys.executable, "-m", "phi_fast.generate", "--model", str(out), "--prompt", "", "--max-new-tokens", "2"]
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize(
    ("special", "delimiters", "changes", "message"),
    [
        (["<|endoftext|>"], {"docs": 0, "code": 3}, {}, "different ids, docs with 0, code with 3"),
        (["<|endoftext|>"], {"docs": 300, "code": 300}, {}, "id 300, which tokenizer .* does not have"),
        (["<|endoftext|>"], {"docs": 0, "code": 0}, {"model.eos_token_id": 5}, r"model.eos_token_id=5, .* have 0"),
        (["<|endoftext|>"], {"docs": 0, "code": 0}, {"model.bos_token_id": 1}, r"leave --model.bos-token-id out"),
        (["<|endoftext|>"], {"docs": 0, "code": 0}, {"model.vocab_size": 256}, "has 257 ids, .* has 256 entries"),
    ],
)
def test_a_contradiction_is_refused_before_training(tmp_path, special, delimiters, changes, message, capsys) -> None:
    data = make_corpora(tmp_path / "data", tokenizer_of(special), delimiters)
    assert main(arguments(data, tmp_path / "run", 2, **changes)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_resuming_a_run_whose_ids_were_not_the_tokenizers(tmp_path) -> None:
    """As an earlier version saved it: the ids have no effect on training, so they must not stop it."""
    data = make_corpora(tmp_path / "data", tokenizer_of(["<|endoftext|>"]), {"docs": 0, "code": 0})
    run = tmp_path / "run"
    finish(arguments(data, run, 4, stop_after=2), tmp_path / "output", expect=75)
    state = next((run / "checkpoints").glob("step-*")) / "state.json"
    saved = json.loads(state.read_text())
    saved["options"]["model"] |= {"bos_token_id": 50256, "eos_token_id": 50256}
    assert _differences(saved, parse(arguments(data, run, 4))) == []
    saved["options"]["model"]["num_hidden_layers"] = 3
    assert len(_differences(saved, parse(arguments(data, run, 4)))) == 1


def save_with(folder: Path, tokenizer: Tokenizer, *, config: dict[str, Any], settings: dict[str, Any] | None) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


ADDED = {"__type": "AddedToken", "content": "</s>"}
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<pad>"]


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, None, (3, 3, 3)),  # transformers' defaults, which are ignored
        (
            {},
            {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": "<pad>"},
            (1, 2, 4),
        ),
        ({"eos_token_id": [2, 7], "bos_token_id": None}, {"eos_token": "</s>"}, (2, 2, 2)),
    ],
)
def test_a_folders_tokenizer_has_the_last_word(tmp_path, config, settings, expected) -> None:
    source = make_source(tmp_path / "source", "hf", random_weights())
    save_with(source, tokenizer_of(SPECIAL), config=config, settings=settings)
    told: list[str] = []
    out = convert(ConvertOptions(str(source), tmp_path / "out"), tell=told.append)
    written = json.loads((out / "generation_config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == expected
    assert any("eos_token_id" in line for line in told) == (not isinstance(config.get("eos_token_id"), list))
    for folder in (source, out):
        model = load(folder)[0]
        assert (model.config.bos_token_id, model.config.eos_token_id) == expected[:2]
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == expected[1]


def test_a_tokenizer_without_names_leaves_it_to_the_configuration(tmp_path) -> None:
    source = make_source(tmp_path / "source", "hf", random_weights())
    save_with(source, tokenizer_of(["<s>", "</s>"]), config={"bos_token_id": 0, "eos_token_id": 1}, settings=None)
    assert load(source)[0].config.eos_token_id == 1
    save_with(source, tokenizer_of(["<s>", "</s>"]), config={"eos_token_id": 319}, settings=None)
    with pytest.raises(ConversionError, match=r"token id 319, but the tokenizer has 258 ids"):
        load(source)
    save_with(source, tokenizer_of(["<s>"]), config={}, settings={"eos_token": "</s>"})
    with pytest.raises(ValueError, match=r"names '</s>' as the eos_token, and tokenizer.json has no such token"):
        load(source)


def test_prompts_are_encoded_as_documents_are(tmp_path) -> None:
    """A tokenizer that adds special tokens around each text, which no corpus has."""
    source = make_source(tmp_path / "source", "hf", {name: 10 * weight for name, weight in random_weights().items()})
    plain, adding = tokenizer_of(["<|endoftext|>", "<s>"]), tokenizer_of(["<|endoftext|>", "<s>"])
    adding.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert adding.encode("a").ids[0] == 1
    save_with(source, plain, config={}, settings=None)
    model, _ = load(source)
    sampling = Sampling(max_new_tokens=4)
    (expected,) = generate(model, [plain.encode("words").ids], sampling)
    (completion,) = complete(model, adding, ["words"], sampling)
    assert completion.tokens == expected


def test_ids_that_the_model_does_not_have_are_refused(tmp_path) -> None:
    source = make_source(tmp_path / "source", "hf", random_weights())
    model, _ = load(source)
    for prompt in ([1, 320], [-1]):
        with pytest.raises(
            ValueError, match=rf"prompt 0 has token id {prompt[-1]}, and the model's vocabulary has 320"
        ):
            generate(model, [prompt], Sampling())
