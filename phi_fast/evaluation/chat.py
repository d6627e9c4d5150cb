"""Chat templates and names of special tokens, read by transformers: a `tokenizers` file does not hold them."""

from __future__ import annotations

import hashlib
from typing import Any

import jinja2
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..data import vocabulary
from ..data.chat import FILES
from ..errors import UsageError


def prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    *,
    template: str | None,
    add_generation_prompt: bool,
    arguments: dict[str, Any],
    console: Console,
) -> str:
    """Render `messages` ({"role": …, "content": …}) as the model's input text, exactly as lm-eval's own class does.

    template: a chat template to use instead of the tokenizer's. Without a generation prompt the last message is left
    open. If the template rejects a system message, the message is left out, and the console says so. Raises UsageError
    if there is no template or it rejects the messages.
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
            console.print(f"the chat template rejects the system message, which is left out: {error}", markup=False)
            return tokenizer.apply_chat_template(without, **options)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(f"the chat template rejects messages with the roles {roles}: {error}") from error


def fingerprint(name: str, tokenizer: Tokenizer, template: Any) -> str:
    """lm-eval's key for cached prompts: it differs for every tokenizer and chat template."""
    content = f"{vocabulary.digest(tokenizer)} {template}".encode()
    return f"{name.replace('/', '__')}-{hashlib.sha256(content).hexdigest()[:12]}"
