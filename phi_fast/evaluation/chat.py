"""Chat templates and names of special tokens, which a `tokenizers` file does not hold: transformers reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..data import vocabulary
from ..errors import UsageError

FILES = ("tokenizer_config.json", "chat_template.jinja")


def described(tokenizer: Tokenizer, folders: Iterable[Path | None]) -> PreTrainedTokenizerFast:
    """`tokenizer` with the special tokens and the chat template of the first folder that has `FILES`, if any has.

    The class that the folder names is not used, so no code of the folder's is run.
    """
    for folder in folders:
        if folder is not None and any((folder / name).exists() for name in FILES):
            return PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=tokenizer, local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    *,
    template: str | None,
    add_generation_prompt: bool,
    arguments: dict[str, Any],
    console: Console,
) -> str:
    """`messages` ({"role": …, "content": …}) as the text that the model reads, the same as by lm-eval's own class.

    template: a chat template in place of the tokenizer's. Without a generation prompt the last message is left open. A
    template that refuses the system's message is asked again without it, and that is told. Raises UsageError where
    there is no template, or where it refuses the messages.
    """
    if template is None and not tokenizer.chat_template:
        raise UsageError(
            f"there is no chat template: {' and '.join(FILES)} beside the model hold none. Leave out "
            "--apply_chat_template, or name a folder whose tokenizer has one: --model_args ...,tokenizer=FOLDER"
        )
    options = {
        "chat_template": template,
        "tokenize": False,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": not add_generation_prompt,
        **arguments,
    }
    try:
        try:
            return tokenizer.apply_chat_template(messages, **options)
        except jinja2.TemplateError as error:
            without = [message for message in messages if message["role"] != "system"]
            if len(without) == len(messages):
                raise
            console.print(f"the chat template refuses the system's message, which is left out: {error}", markup=False)
            return tokenizer.apply_chat_template(without, **options)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(f"the chat template refuses messages of the roles {roles}: {error}") from error


def fingerprint(name: str, tokenizer: Tokenizer, template: Any) -> str:
    """What lm-eval keeps prompts under: another tokenizer or chat template gives another one."""
    content = f"{vocabulary.digest(tokenizer)} {template}".encode()
    return f"{name.replace('/', '__')}-{hashlib.sha256(content).hexdigest()[:12]}"
