"""Writes the model card of a converted model: architecture, recipe and measured results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .. import paper
from ..json_files import JsonFileError
from ..step_records import read_records
from ..terminal import printable
from . import inside
from .errors import ConversionError
from .source import Source


def write(folder: Path, source: Source, to: str, name: str) -> None:
    """Write README.md in `folder`, for a model that is loaded by `name`: its folder's, or that on the hub. Texts from
    the source are escaped, so that they are never markup; `name` becomes a string in the example's code."""
    config, name = source.config, json.dumps(_utf8(name), ensure_ascii=False)
    lines = [
        "---",
        "library_name: transformers" if to == "hf" else "library_name: phi_fast",
        "pipeline_tag: text-generation",
        "tags: [phi, phi_fast]",
        "---",
        "",
        f"# {_text((source.run or source.folder).absolute().name)}",
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
        f"model = AutoModelForCausalLM.from_pretrained({name})",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        "```"
        if to == "hf"
        else f"```\n\nThis folder is in the {to} layout: convert it to hf first (`python -m phi_fast.convert`).",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _recipe(source: Source) -> list[str]:
    options = inside.read_fields(source.run, "config.json") if source.run else None
    if options is None:
        return ["## Training", "", "Converted from published weights; how they were trained is not recorded here.", ""]
    rows = [
        f"| {_text(name)} | {_cell(value)} |"
        for name, value in options.values.items()
        if name != "model" and value is not None
    ]
    return ["## Training recipe", "", "| option | value |", "|---|---|", *rows, ""]


def _training_results(source: Source) -> list[str]:
    path = inside.find(source.run, "metrics.jsonl") if source.run else None
    if path is None:
        return []
    last: dict[str, Any] = {}
    try:
        for record in read_records(path):
            last |= {name: value for name, value in record.items() if value is not None}
    except JsonFileError as error:
        raise ConversionError(f"{error}. Remove that line: the model card quotes the last losses") from error
    names = ("step", "tokens", "loss", "val_loss")
    rows = [f"| {name} | {_cell(last[name]) if name in last else 'not measured'} |" for name in names]
    return ["## At the end of training", "", "| | |", "|---|---|", *rows, ""]


def _evaluation(source: Source) -> list[str]:
    folders = [folder / "evaluation" for folder in (source.folder, source.run) if folder]
    found = (inside.read_fields(folder, "results.json") for folder in folders)
    results = next((fields for fields in found if fields is not None), None)
    if results is None:
        return ["## Evaluation", "", "Not measured.", ""]
    rows, tasks = [], results.inner("tasks")
    for task in tasks.values:
        result, reported = tasks.inner(task), paper.score("phi-1.5", task)
        score = f"{result.number('score'):.3f}" if "score" in result else "–"
        rows.append(f"| {_text(task)} | {score} | {result.whole('questions')} | {reported or '–'} |")
    header = ["| task | score | questions | phi-1.5 (report) |", "|---|---|---|---|"]
    return ["## Evaluation", "", *header, *rows, ""]


def _cell(value: Any) -> str:
    return _text(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value))


def _text(value: str) -> str:
    """Escape a text so that it stays on one line and is neither HTML, nor code, nor a link, nor ends a table's cell."""
    line = printable(_utf8(value)).replace("\n", " ").replace("\t", " ")
    return re.sub(r"[\\`|<]|\](?=[(\[])", lambda match: f"\\{match[0]}", line)


def _utf8(value: str) -> str:
    """Replace what UTF-8 cannot encode: a file's name may have bytes that are not UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode()
