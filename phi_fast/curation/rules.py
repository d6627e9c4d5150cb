"""datatrove's rules as a step: Gopher's and C4's and FineWeb's quality rules, language, and replacing of e-mail
addresses.

The rules are datatrove's own filters and formatters, called one document at a time, in the order given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .documents import CurateError, Document, Drop
from .extras import require

_FILTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gopher-quality": ("gopher_quality_filter", "GopherQualityFilter", ("spacy",)),
    "gopher-repetition": ("gopher_repetition_filter", "GopherRepetitionFilter", ("spacy",)),
    "c4": ("c4_filters", "C4QualityFilter", ("spacy",)),
    "c4-paragraphs": ("c4_filters", "C4ParagraphFilter", ()),
    "fineweb-quality": ("fineweb_quality_filter", "FineWebQualityFilter", ("spacy",)),
    "language": ("language_filter", "LanguageFilter", ("fasttext", "fasteners")),
}
"""Name of a rule -> (module of datatrove.pipeline.filters, class, modules that it needs)."""
PII = "pii"
RULES = (*_FILTERS, PII)
"""Names of the rules."""
EMAIL, IP = (
    "email@example.com",
    "192.0.2.1"
    """What replaces e-mail and public IP addresses, one of each (RFC 2606 and
5737): datatrove's own lists are used in turn, so that a text would depend on the ones before it.""",
)
LANGUAGE_MODEL = "lid.176.bin"


@dataclass(frozen=True)
class RuleSettings:
    """Which rules apply, and the options that they share."""

    rules: tuple[str, ...]
    """Names from RULES, in the order in which they apply."""
    languages: tuple[str, ...] = ("en",)
    """The languages that the rule "language" keeps, as fastText's lid.176 names them."""
    language_threshold: float = 0.65
    """Least probability of one of them; the default is datatrove's."""
    language_model: Path | None = None
    """lid.176.bin on this machine. None: datatrove downloads it once."""

    def check(self) -> None:
        """Raise CurateError for an invalid value, and for a package that is missing."""
        if not self.rules:
            raise CurateError(f"name the rules to apply: {', '.join(RULES)}")
        for rule in self.rules:
            if rule not in RULES:
                raise CurateError(f"there is no rule {rule!r}: choose from {', '.join(RULES)}")
        if len(set(self.rules)) != len(self.rules):
            raise CurateError(f"rules {', '.join(self.rules)}: each can be given once")
        if not 0 <= self.language_threshold < 1:
            raise CurateError(f"language_threshold={self.language_threshold}: expected a probability, 0 to below 1")
        if "language" in self.rules and not self.languages:
            raise CurateError("languages: name at least one to keep")
        if self.language_model is not None and not self.language_model.is_file():
            raise CurateError(f"{self.language_model} is not a file: name fastText's {LANGUAGE_MODEL}")
        require("datatrove", "the rules")
        for rule in self.rules:
            for module in _FILTERS[rule][2] if rule in _FILTERS else ():
                require(module, f"the rule {rule!r}")


class Rules:
    """Drops the documents that a rule refuses; the reason is datatrove's own, after the rule's name."""

    name = "rules"

    def __init__(self, settings: RuleSettings) -> None:
        """Take the settings. Raises CurateError for invalid ones."""
        settings.check()
        self._settings = settings

    def settings(self) -> dict[str, Any]:
        import importlib.metadata

        found = asdict(self._settings)
        found["language_model"] = None if found["language_model"] is None else str(found["language_model"])
        return {**found, "datatrove": importlib.metadata.version("datatrove")}

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        """Apply every rule; "c4" and "pii" may change texts, and "language" adds a score."""
        return [self._judge_one(document) for document in documents]

    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": self._settings}  # the filters are made anew in each worker

    def _judge_one(self, document: Document) -> Drop | None:
        for rule, apply in self._rules:
            if (drop := apply(document)) is not None:
                return Drop(f"{rule}: {drop}" if drop != rule else rule)
        return None

    @cached_property
    def _rules(self) -> list[tuple[str, Callable[[Document], str | None]]]:
        return [(rule, self._formatter() if rule == PII else self._filter(rule)) for rule in self._settings.rules]

    def _formatter(self) -> Callable[[Document], str | None]:
        from datatrove.pipeline.formatters.pii import PIIFormatter

        formatter = PIIFormatter(email_replacement=EMAIL, ip_replacement=IP)

        def replace(document: Document) -> None:
            document.text = formatter.format(document.text)

        return replace

    def _filter(self, rule: str) -> Callable[[Document], str | None]:
        import importlib

        from datatrove.data import Document as Theirs

        module, name, _ = _FILTERS[rule]
        quiet()
        make = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), name)
        if rule == "language":
            made = make(list(self._settings.languages), language_threshold=self._settings.language_threshold)
            made.model = language_model(made.model, self._settings.language_model)
        else:
            made = make()

        def judge(document: Document) -> str | None:
            if not document.text.strip():
                return "no text"  # several filters divide by its number of lines or words
            theirs = Theirs(text=document.text, id=document.id)
            try:
                result = made.filter(theirs)
            except (ZeroDivisionError, ValueError, RecursionError) as error:
                return f"the filter failed with {type(error).__name__}"
            if isinstance(result, tuple):
                result, reason = result
            else:
                reason = "refused"
            if "language_score" in theirs.metadata:
                document.scores[f"language_{theirs.metadata['language']}"] = float(theirs.metadata["language_score"])
            if not result:
                return str(reason)
            document.text = theirs.text
            return None

        return judge


def quiet() -> None:
    """Keep datatrove from logging to stderr unless its own variable asks for that."""
    if "DATATROVE_LOG_LEVEL" not in os.environ:
        from loguru import logger

        logger.disable("datatrove")


def language_model(identifier: Any, path: Path | None) -> Any:
    """Give datatrove's language identifier the model of a local file, or let it download its own."""
    if path is None:
        return identifier
    from fasttext.FastText import _FastText

    try:
        identifier._model = _FastText(str(path))  # datatrove has no option for a local file
    except ValueError as error:
        raise CurateError(f"{path} is not a model of fastText: {error}") from error
    return identifier
