"""Files beside the weights in a Hugging Face folder: configuration, tokenizer, generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..config import PhiConfig
from ..data import vocabulary
from ..data.chat import MAX_TEMPLATE_BYTES, TEMPLATE_FILE, ChatFiles
from ..data.vocabulary import TokenIds
from . import inside
from .errors import ConversionError
from .hf_config import old_config, phi_config
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
    """The tokenizer of a model: `name_or_path` if given, else tokenizer.json in its folder or run, else phi's own if
    the vocabulary has phi-1.5's size. Raises ConversionError if there is none.
    """
    if name_or_path is not None:
        return vocabulary.tokenizer(name_or_path)
    folder = _tokenizer_folder(source)
    if folder is not None:
        return vocabulary.tokenizer(folder)
    if source.config.vocab_size in (vocabulary.PHI_VOCAB_SIZE, PhiConfig().vocab_size):
        return vocabulary.tokenizer("phi-1.5")
    raise ConversionError(
        f"{source.folder} has no tokenizer.json, and a vocabulary of {source.config.vocab_size} is not phi's; name one "
        "with --tokenizer"
    )


def token_ids(source: Source, tokenizer: Tokenizer, name_or_path: str | Path | None = None) -> TokenIds:
    """Ids of the special tokens at the beginning and end of a text. The files beside the tokenizer name them; otherwise
    they are `<|endoftext|>`, or, if the tokenizer does not have it, the ids in the model's configuration.

    name_or_path: as given to `find_tokenizer`. Raises ConversionError if tokenizer, configuration and vocabulary
    contradict each other.
    """
    config, folder = source.config, _folder_of(source, name_or_path)
    ids = TokenIds.of(tokenizer, _special_names(folder) if folder else {})
    if ids.end is None:
        ids = TokenIds(config.eos_token_id if ids.beginning is None else ids.beginning, *[config.eos_token_id] * 2)
    for id in (ids.beginning, ids.end, ids.padding):
        if id is not None and (id >= config.vocab_size or tokenizer.id_to_token(id) is None):
            raise ConversionError(
                f"{source.folder}: a text begins or ends with token id {id}, but the tokenizer has "
                f"{vocabulary.vocab_size(tokenizer)} ids and the model's vocabulary {config.vocab_size} entries: they "
                "do not belong together; name the model's own with --tokenizer"
            )
    return ids


def chat_files(source: Source, name_or_path: str | Path | None = None) -> ChatFiles | None:
    """The chat template beside the tokenizer, and the special tokens' names; None if there is no template.

    name_or_path: as given to `find_tokenizer`.
    """
    folder = _folder_of(source, name_or_path)
    if folder is None:
        return None
    named = _special_names(folder)
    template = named.get("chat_template")
    if (path := inside.find(folder, TEMPLATE_FILE)) is not None:
        template = inside.read_text(path, MAX_TEMPLATE_BYTES)
    if not isinstance(template, str):
        return None
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = named.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            names[name] = text
    return ChatFiles(template, names)


def write_config(folder: Path, to: str, config: PhiConfig, dtype: torch.dtype, ids: TokenIds) -> None:
    """Write config.json, and generation_config.json for layout "hf"."""
    if to == "hf":
        _write_json(folder / "config.json", phi_config(config, dtype))
        tokens = {"bos_token_id": ids.beginning, "eos_token_id": ids.end, "pad_token_id": ids.padding}
        _write_json(folder / "generation_config.json", {name: id for name, id in tokens.items() if id is not None})
    elif to == "merged":
        _write_json(folder / "config.json", phi_config(config, dtype) | {"model_type": "phi_fast"})
    else:
        _write_json(folder / "config.json", old_config(config, dtype, mixformer=to == "mixformer"))


def write_tokenizer(
    folder: Path, source: Source, name_or_path: str | Path | None, tokenizer: Tokenizer, ids: TokenIds
) -> list[str]:
    """Write the files that AutoTokenizer loads: the source's own if it has them all, else made from the tokenizer.

    Returns lines that say what was copied from the source, and what was left out.
    """
    own = source.folder
    settings = inside.read_fields(own, "tokenizer_config.json") if name_or_path is None else None
    if settings is not None and inside.find(own, "tokenizer.json") is not None:
        return _copy_tokenizer(folder, own, settings.values, ids.names(tokenizer))
    largest = vocabulary.vocab_size(tokenizer)
    if largest > source.config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {largest} ids, the model only {source.config.vocab_size}; name its own with --tokenizer"
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", ids.names(tokenizer))
    settings_made = ids.config(tokenizer, source.config.max_position_embeddings)
    chat = chat_files(source, name_or_path)
    if chat is None:
        _write_json(folder / "tokenizer_config.json", settings_made)
        return []
    _write_json(folder / "tokenizer_config.json", settings_made | chat.names)
    (folder / TEMPLATE_FILE).write_text(chat.template, encoding="utf-8")
    return [f"copied the chat template of {source.run or source.folder}"]


def _copy_tokenizer(folder: Path, own: Path, settings: dict[str, Any], names: dict[str, str]) -> list[str]:
    copied = []
    for name in TOKENIZER_FILES:
        path = inside.find(own, name)
        if path is not None and name != "tokenizer_config.json":
            shutil.copyfile(path, folder / name)
            copied.append(name)
    named = {field: names[field] for field in ("bos_token", "eos_token") if field in names and not settings.get(field)}
    kept = {field: value for field, value in (settings | named).items() if field != "auto_map"}
    _write_json(folder / "tokenizer_config.json", kept)
    copied.append("tokenizer_config.json" + " (with a chat_template)" * ("chat_template" in kept))
    lines = [f"copied from {own}: {', '.join(copied)}"]
    if "auto_map" in settings:
        lines.append("left out of tokenizer_config.json: auto_map, which makes transformers load program code")
    return lines


def _folder_of(source: Source, name_or_path: str | Path | None) -> Path | None:
    """The folder of the tokenizer that `find_tokenizer` finds; None if it has none on this disk."""
    if name_or_path is None:
        return _tokenizer_folder(source)
    path = Path(name_or_path)
    return (path if path.is_dir() else path.parent) if path.exists() else None


def _tokenizer_folder(source: Source) -> Path | None:
    """The folder with the model's own tokenizer.json."""
    folders = (source.folder, source.run, *source.bases)
    return next((folder for folder in folders if folder and inside.find(folder, "tokenizer.json")), None)


def _special_names(folder: Path) -> dict[str, Any]:
    """Names of special tokens, from the files beside a tokenizer.json."""
    files = (inside.read_fields(folder, name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    names: dict[str, Any] = {}
    for file in files:
        if file is not None:
            names |= {name: value for name, value in file.values.items() if value is not None}
    return names


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
