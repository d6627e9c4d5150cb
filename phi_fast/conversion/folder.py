"""What lies beside the weights in a Hugging Face folder: configuration, tokenizer, generation config, model card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..config import PhiConfig
from ..data import vocabulary
from ..evaluation import paper
from .hf_config import ConversionError, old_config, phi_config, read_json
from .source import Source

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def find_tokenizer(source: Source, name_or_path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model: `name_or_path` if given, else its folder's or its run's tokenizer.json, else, for
    phi-1.5's vocabulary, phi's own. Raises ConversionError where there is none.
    """
    if name_or_path is not None:
        return vocabulary.tokenizer(name_or_path)
    for folder in (source.folder, source.run):
        if folder is not None and (folder / "tokenizer.json").exists():
            return vocabulary.tokenizer(folder)
    if source.config.vocab_size in (vocabulary.PHI_VOCAB_SIZE, PhiConfig().vocab_size):
        return vocabulary.tokenizer("phi-1.5")
    raise ConversionError(
        f"{source.folder} has no tokenizer.json, and a vocabulary of {source.config.vocab_size} is not phi's; name one "
        "with --tokenizer"
    )


def write_config(folder: Path, to: str, config: PhiConfig, dtype: torch.dtype) -> None:
    """config.json, and for Hugging Face's phi generation_config.json."""
    if to == "hf":
        _write_json(folder / "config.json", phi_config(config, dtype))
        tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        _write_json(folder / "generation_config.json", {**tokens, "pad_token_id": config.eos_token_id})
    elif to == "merged":
        _write_json(folder / "config.json", phi_config(config, dtype) | {"model_type": "phi_fast"})
    else:
        _write_json(folder / "config.json", old_config(config, dtype, mixformer=to == "mixformer"))


def write_tokenizer(folder: Path, source: Source, name_or_path: str | Path | None) -> None:
    """Files that AutoTokenizer loads: the source's own where it has them all, else made from the tokenizer."""
    own = source.folder
    if name_or_path is None and (own / "tokenizer.json").exists() and (own / "tokenizer_config.json").exists():
        for name in TOKENIZER_FILES:
            if (own / name).exists():
                shutil.copyfile(own / name, folder / name)
        return
    tokenizer = find_tokenizer(source, name_or_path)
    largest = vocabulary.vocab_size(tokenizer)
    if largest > source.config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {largest} ids, the model only {source.config.vocab_size}; name its own with --tokenizer"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    end = vocabulary.END_OF_TEXT if tokenizer.token_to_id(vocabulary.END_OF_TEXT) is not None else None
    special = {name: end for name in ("bos_token", "eos_token", "unk_token", "pad_token") if end}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": source.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )


def write_model_card(folder: Path, source: Source, to: str) -> None:
    """README.md: the architecture, and, for a run, its recipe and what it measured; nothing that was not measured."""
    config = source.config
    lines = [
        "---",
        "library_name: transformers" if to == "hf" else "library_name: phi_fast",
        "pipeline_tag: text-generation",
        "tags: [phi, phi_fast]",
        "---",
        "",
        f"# {source.run.name if source.run else source.folder.name}",
        "",
        f"A phi model of {config.num_parameters():,} parameters: {config.num_hidden_layers} parallel blocks of width "
        f"{config.hidden_size}, {config.num_attention_heads} heads, context {config.max_position_embeddings}, "
        f"vocabulary {config.vocab_size}. Architecture: {paper.SOURCE}.",
        "",
        *_recipe(source),
        *_training_results(source),
        *_evaluation(source),
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{folder.name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")',
        "```"
        if to == "hf"
        else f"```\n\nThis folder is in the {to} layout: convert it to hf first (`python -m phi_fast.convert`).",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _recipe(source: Source) -> list[str]:
    path = source.run / "config.json" if source.run else None
    if path is None or not path.exists():
        return ["## Training", "", "Converted from published weights; how they were trained is not recorded here.", ""]
    options = read_json(path)
    rows = [f"| {name} | {_cell(value)} |" for name, value in options.items() if name != "model" and value is not None]
    return ["## Training recipe", "", "| option | value |", "|---|---|", *rows, ""]


def _training_results(source: Source) -> list[str]:
    path = source.run / "metrics.jsonl" if source.run else None
    if path is None or not path.exists():
        return []
    records = list(_records(path))
    rows = []
    for name in ("step", "tokens", "loss", "val_loss"):
        value = next((record[name] for record in reversed(records) if record.get(name) is not None), None)
        rows.append(f"| {name} | {'not measured' if value is None else _cell(value)} |")
    return ["## At the end of training", "", "| | |", "|---|---|", *rows, ""]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the line that was being written when the run was killed
            yield json.loads(line)


def _evaluation(source: Source) -> list[str]:
    where = [folder / "evaluation" / "results.json" for folder in (source.folder, source.run) if folder]
    results = next((read_json(path) for path in where if path.exists()), None)
    if results is None:
        return ["## Evaluation", "", "Not measured.", ""]
    rows = []
    for task, result in results["tasks"].items():
        reported = paper.score("phi-1.5", task)
        score = "–" if result["score"] is None else f"{result['score']:.3f}"
        rows.append(f"| {task} | {score} | {result['questions']} | {reported or '–'} |")
    header = ["| task | score | questions | phi-1.5 (report) |", "|---|---|---|---|"]
    return ["## Evaluation", "", *header, *rows, ""]


def _cell(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text.replace("|", "\\|")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
