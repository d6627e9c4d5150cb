"""Writes a model as one GGUF file, which llama.cpp and the programs built on it load.

llama.cpp calls this architecture `phi2`, after phi-2, which has the same blocks: one LayerNorm before attention and the
MLP, GELU by tanh, rotary pairs `rotary_dim / 2` apart. The package `gguf` names the tensors and lays out the file
(https://github.com/ggml-org/llama.cpp, gguf-py); no weight is permuted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..data.vocabulary import TokenIds
from ..files import sync_directory, sync_file
from .errors import ConversionError
from .source import Source

ARCHITECTURE = "phi2"
PRE_TOKENIZER = "gpt-2"
"""llama.cpp's name for GPT-2's way to split a text into words; `phi-2` is another name for the same."""
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""That way to split, as tokenizer.json describes it."""
_BPE_DEFAULTS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
"""Settings of a BPE model that GGUF cannot express; each is null, false or empty in GPT-2's tokenizer."""
_SUFFIXES = (".weight", ".bias")


def check(path: Path, out: Path | None, *, overwrite: bool) -> None:
    """Raise ConversionError if the package `gguf` is missing, or `path` is in use, also as the folder `out`."""
    _gguf()
    if path.is_dir():
        raise ConversionError(f"--gguf {path} is a folder: name a file, such as {path / 'model.gguf'}")
    if out is not None and path.absolute() == out.absolute():
        raise ConversionError(f"--gguf {path} is also the folder to write, OUT: name two places")
    if path.exists() and not overwrite:
        raise ConversionError(f"--gguf {path} exists: name another file, or add --overwrite to replace it")


def write(
    path: Path,
    source: Source,
    tokenizer: Tokenizer,
    ids: TokenIds,
    template: str | None,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `path`, which appears only when it is complete, one tensor at a time.

    template: chat template in Jinja, if the model has one. dtype: that of the matrices; None: the source's own. Biases
    and LayerNorms are fp32, which is all that llama.cpp adds to a product; fp16 and bf16 widen to it exactly.
    progress(done, total) is called for each tensor. Raises ConversionError for a dtype that llama.cpp does not compute
    in, and for a tokenizer that it would read differently.
    """
    dtypes = {part: _stored_dtype(source, part, dtype) for part in source.parts}
    vocabulary = Vocabulary(tokenizer, source.config.vocab_size)
    if ids.end is None:
        raise ConversionError("GGUF needs the id of the token that ends a text, and this tokenizer names none")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    file = _gguf().GGUFWriter(temporary, ARCHITECTURE)
    try:
        _add_model(file, source, dtypes)
        _add_tokenizer(file, vocabulary, ids, template)
        _write_tensors(file, source, dtypes, progress)
        file.close()
        sync_file(temporary)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("--gguf needs the package gguf: pip install 'phi-fast[gguf]'") from error
    return gguf


def _stored_dtype(source: Source, part: str, dtype: torch.dtype | None) -> torch.dtype:
    if len(source.parts[part]) == 1:
        return torch.float32
    stored = dtype or source.dtype(part)
    if stored == torch.float64:
        raise ConversionError(f"{part} is float64, in which llama.cpp does not compute: add --dtype fp32")
    return stored


def _add_model(file: Any, source: Source, dtypes: dict[str, torch.dtype]) -> None:
    config, kinds = source.config, _gguf().LlamaFileType
    matrices = {dtype for part, dtype in dtypes.items() if len(source.parts[part]) > 1}
    if len(matrices) > 1:
        raise ConversionError(f"the matrices are {', '.join(map(str, matrices))}: choose one with --dtype")
    name = (source.run or source.folder).absolute().name.encode("utf-8", "backslashreplace").decode()
    file.add_name(name)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_attention_heads)
    file.add_layer_norm_eps(config.layer_norm_eps)
    file.add_rope_dimension_count(config.rotary_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_vocab_size(config.vocab_size)
    file.add_quantization_version(_gguf().GGML_QUANT_VERSION)
    types = {torch.float32: kinds.ALL_F32, torch.float16: kinds.MOSTLY_F16, torch.bfloat16: kinds.MOSTLY_BF16}
    file.add_file_type(types[matrices.pop()])


def _add_tokenizer(file: Any, vocabulary: Vocabulary, ids: TokenIds, template: str | None) -> None:
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(PRE_TOKENIZER)
    file.add_token_list(vocabulary.tokens)
    file.add_token_types(vocabulary.types)
    file.add_token_merges(vocabulary.merges)
    file.add_bos_token_id(ids.end if ids.beginning is None else ids.beginning)
    file.add_eos_token_id(ids.end)
    file.add_pad_token_id(ids.end if ids.padding is None else ids.padding)
    file.add_add_bos_token(False)  # texts are continued as they are, here as there
    if template is not None:
        file.add_chat_template(template)


def _write_tensors(
    file: Any, source: Source, dtypes: dict[str, torch.dtype], progress: Callable[[int, int], None] | None
) -> None:
    package = _gguf()
    names = package.get_tensor_name_map(package.MODEL_ARCH.PHI2, source.config.num_hidden_layers)
    kinds = package.GGMLQuantizationType
    raw = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    for part, shape in source.parts.items():
        dtype = dtypes[part]
        bytes_each = dtype.itemsize * torch.Size(shape).numel()
        file.add_tensor_info(names.get_name(part, _SUFFIXES), shape, None, bytes_each, raw_dtype=raw[dtype])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    for done, part in enumerate(source.parts, 1):
        if progress:
            progress(done, len(source.parts))
        tensor = source.read(part).to(dtypes[part])
        file.write_tensor_data(tensor.contiguous().flatten().view(torch.uint8).numpy())


class Vocabulary:
    """A tokenizer as GGUF holds it: a token and its type for each row of the embedding, and merges in their order."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        """rows: of the embedding; ids that the tokenizer lacks become unused tokens.

        Raises ConversionError for a tokenizer that is not GPT-2's kind of byte-level BPE, or has more ids than rows.
        """
        content = json.loads(tokenizer.to_str())
        _check_kind(content)
        types = _gguf().TokenType
        known = {id: token for token, id in tokenizer.get_vocab(with_added_tokens=True).items()}
        if max(known) >= rows:
            raise ConversionError(
                f"the tokenizer has {max(known) + 1} ids, the model only {rows}; name its own with --tokenizer"
            )
        added = {token["id"]: token["special"] for token in content["added_tokens"]}
        self.tokens = [known.get(id, f"[PAD{id}]") for id in range(rows)]
        self.types = [
            (types.CONTROL if added[id] else types.USER_DEFINED)
            if id in added
            else (types.NORMAL if id in known else types.UNUSED)
            for id in range(rows)
        ]
        if len(set(self.tokens)) < rows:  # llama.cpp looks ids up by token, and stops at a repeated one
            taken = next(token for id, token in enumerate(self.tokens) if id not in known and token in known.values())
            raise ConversionError(f"the tokenizer has a token {taken!r}, the name of an unused row: rename that token")
        merges = content["model"]["merges"]
        self.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        if not self.merges:
            raise ConversionError("the tokenizer has no merges, without which llama.cpp loads no BPE tokenizer")


def _check_kind(content: dict[str, Any]) -> None:
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    wrong = [f"its model is {model['type']}"] * (model["type"] != "BPE")
    wrong += [f"its model has {name}={model[name]!r}" for name in _BPE_DEFAULTS if model.get(name)]
    splits = {name: splitter.get(name) for name in BYTE_LEVEL}
    wrong += [f"its pre_tokenizer is {json.dumps(splitter)}"] * (splits != BYTE_LEVEL)
    wrong += [f"its normalizer is {json.dumps(content['normalizer'])}"] * bool(content["normalizer"])
    if wrong:
        raise ConversionError(
            f"--gguf writes GPT-2's kind of tokenizer (byte-level BPE, no normalizer), and this one differs: "
            f"{'; '.join(wrong)}. llama.cpp would read texts differently; convert such a model with llama.cpp's own "
            "convert_hf_to_gguf.py, from the folder that --to hf writes"
        )
