"""Chat templates: conversations as text, rendered by transformers with the Jinja template of a tokenizer."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from ..errors import UsageError
from ..files import write_atomically
from ..json_files import read_object, read_regular
from .vocabulary import END_OF_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]
"""{"role": "system", "user" or "assistant", "content": text}, and whatever else a template reads."""

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 2**20
FILES = ("tokenizer_config.json", TEMPLATE_FILE)

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first %}{{ '\\n' }}{% endif -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] }}
{%- elif message['role'] == 'user' -%}
{{ 'Instruct: ' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}
{{ 'Output: ' + message['content'] + eos_token }}
{%- else -%}
{{ raise_exception('the role ' + message['role'] + ' is none of system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ ('\\n' if messages else '') + 'Output:' }}{% endif -%}
"""
"""Template for a tokenizer without one: phi-2's "Instruct: …", "Output: …", with the end of text after each answer."""


def require_transformers(what: str) -> None:
    """Raise UsageError if transformers, which `what` needs, is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(f"{what} needs transformers, which is not installed: pip install 'phi-fast[chat]'")


def described(tokenizer: Tokenizer, folders: Iterable[Path | None]) -> PreTrainedTokenizerFast:
    """`tokenizer` with the special tokens and the chat template from the first folder that has one of `FILES`, if any.

    The tokenizer class that the folder names is not used, so no code from the folder runs.
    """
    from transformers import PreTrainedTokenizerFast

    for folder in folders:
        if folder is not None and any((folder / name).exists() for name in FILES):
            return PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=tokenizer, local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_template(
    tokenizer: Tokenizer, name_or_path: str | Path, template: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of that name (as in `vocabulary.tokenizer`) with a chat template and an end-of-text token.

    template: file with a template to use instead of the tokenizer's own, or of `DEFAULT_TEMPLATE` if it has none.
    Raises UsageError if the file cannot be read, or the tokenizer has neither an eos_token nor `<|endoftext|>`.
    """
    path = Path(name_or_path)
    if path.exists() or name_or_path == "phi-1.5":
        found = described(tokenizer, [path if path.is_dir() else path.parent] if path.exists() else [])
    else:
        from transformers import PreTrainedTokenizerFast

        found = PreTrainedTokenizerFast.from_pretrained(name_or_path, tokenizer_object=tokenizer)
    if found.eos_token is None and tokenizer.token_to_id(END_OF_TEXT) is not None:
        found.eos_token = END_OF_TEXT
    if found.eos_token is None or tokenizer.token_to_id(found.eos_token) is None:
        raise UsageError(
            f"tokenizer {str(name_or_path)!r} has no token that ends an answer: name one as the eos_token in a "
            "tokenizer_config.json beside its tokenizer.json"
        )
    if template is not None:
        try:
            found.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {template} cannot be read: {error}") from error
    found.chat_template = found.chat_template or DEFAULT_TEMPLATE
    return found


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, answer: bool = False) -> str:
    """Render messages by the tokenizer's chat template.

    answer: end with what comes before the assistant's next answer.
    Raises ValueError with the template's reason if it rejects the messages.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except jinja2.TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(f"the chat template rejects messages with the roles {roles}: {error}") from error
    return str(text)


def parts(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into (text, whether the assistant wrote it), up to its last answer.

    An answer is what the template adds to a conversation that ends before it, with the prompt for an answer.
    Raises ValueError if there is no answer, or a later message changes how the template renders earlier ones.
    """
    found: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], answer=True)
        after = render(tokenizer, messages[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"the chat template renders the messages before message {i} in another way once it follows, so that "
                "its tokens cannot be told from theirs: use another --chat-template, or --train-on all"
            )
        found += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not found:
        raise ValueError("no message has the role 'assistant'")
    return found


class ChatFiles(NamedTuple):
    """A chat template and the special tokens that it names, as they lie beside a tokenizer.json."""

    template: str
    names: dict[str, str]
    """Names of the special tokens: {"eos_token": …}."""

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast) -> ChatFiles:
        names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return ChatFiles(str(tokenizer.chat_template), names)

    def on(self, tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
        """The tokenizer with this template and these special tokens."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=self.template, **self.names)

    @staticmethod
    def read(directory: Path) -> ChatFiles | None:
        """Read what `write` wrote; None if there is no template. Raises JsonFileError for files with other content."""
        template = directory / TEMPLATE_FILE
        if not template.exists():
            return None
        fields = read_object(directory / "tokenizer_config.json")
        text = read_regular(template, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
        return ChatFiles(text, {name: fields.text(name) for name in fields.values})

    def write(self, directory: Path) -> None:
        write_atomically(directory / "tokenizer_config.json", json.dumps(self.names, indent=2).encode())
        write_atomically(directory / TEMPLATE_FILE, self.template.encode())
