"""Dialogues of `generate --chat`: what the model reads for each line that the user types."""

from __future__ import annotations

from typing import Protocol

from tokenizers import Tokenizer

from ..data.chat import ChatFiles, Message, render, require_transformers
from ..errors import UsageError


class Dialogue(Protocol):
    """Turns questions into prompts, and remembers the answers."""

    user: str
    """Name shown before the user's lines."""
    assistant: str
    """Name shown before the answers."""
    gap: str
    """Text shown between "NAME:" and the answer."""
    stop: tuple[str, ...]
    """Texts that end an answer."""

    def ask(self, question: str) -> str:
        """Return the prompt for the answer to a question."""
        ...

    def answer(self, text: str) -> None:
        """Remember the model's answer to the last question."""
        ...


class Named:
    """A dialogue between two people, for a model without a chat template."""

    gap = ""

    def __init__(self, user: str, assistant: str) -> None:
        self.user, self.assistant = user, assistant
        self.stop: tuple[str, ...] = (f"\n{user}:", f"\n{assistant}:")
        self._text = ""

    def ask(self, question: str) -> str:
        self._text += f"{self.user}: {question}\n{self.assistant}:"
        return self._text

    def answer(self, text: str) -> None:
        self._text += f"{text}\n"


class Templated:
    """A dialogue as the model's chat template renders it. The oldest turns are left out when there is no `room`, in
    tokens, for all of them. Raises UsageError without transformers, and for messages that the template rejects."""

    user, assistant, gap = "user", "assistant", " "
    stop: tuple[str, ...] = ()

    def __init__(self, template: ChatFiles, tokenizer: Tokenizer, room: int) -> None:
        require_transformers("a chat by the model's chat template")
        self._tokenizer, self._named, self._room = tokenizer, template.on(tokenizer), room
        self._messages: list[Message] = []

    def ask(self, question: str) -> str:
        self._messages.append({"role": "user", "content": question})
        prompt = self._render()
        while len(self._messages) > 1 and self._tokens(prompt) > self._room:
            del self._messages[:2]
            prompt = self._render()
        return prompt

    def answer(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text.strip()})

    def _render(self) -> str:
        try:
            return render(self._named, self._messages, answer=True)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
