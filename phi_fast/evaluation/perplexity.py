"""Perplexity of a model on a text file, per token, word and byte, and bits per byte."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from ..errors import UsageError
from ..files import writing
from ..json_files import read_regular
from ..model.phi import Phi
from .scoring import Request, log_likelihoods


@dataclass(frozen=True)
class TextScore:
    """Log-probability that a model gives to a text, with the sizes that it is divided by."""

    text: str
    """Path of the file."""
    window: int
    """Tokens that the model reads at a time."""
    stride: int
    """Tokens by which the window advances. Every token of the text is predicted once, after the first window from at
    least window − stride + 1 tokens before it."""
    tokens: int
    """Predicted tokens: all, or, if the tokenizer has no token that begins or ends a text, all but the first."""
    words: int
    """Words between white space."""
    bytes: int
    """Bytes of the text in UTF-8."""
    nats: float
    """Minus the log-probability of the text: the sum over its tokens."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    @property
    def perplexities(self) -> dict[str, float]:
        """exp of the nats per token, per word and per byte; infinite where that is too large for a float."""
        return {
            "token": _exp(self.nats / self.tokens),
            "word": _exp(self.nats / self.words),
            "byte": _exp(self.nats / self.bytes),
        }

    def to_json(self) -> str:
        values = {
            **asdict(self),
            "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte,
            **{f"perplexity_per_{unit}": value for unit, value in self.perplexities.items()},
        }
        finite = {name: None if value == math.inf else value for name, value in values.items()}
        return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"


def read_text(path: Path) -> str:
    """Read a text as it is, byte for byte. Raises UsageError if it is not UTF-8, or has no word."""
    try:
        text = read_regular(path).decode()
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read ({error.strerror}): name a text file") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {path}: byte {error.start:,} is 0x{error.object[error.start]:02x}, which is not UTF-8; save it as "
            "UTF-8"
        ) from None
    if not text.split():
        raise UsageError(f"--text {path} has no word: name a text to predict")
    return text


def score_text(
    path: Path, text: str, model: Phi, tokenizer: Tokenizer, *, stride: int | None, batch_tokens: int, console: Console
) -> TextScore:
    """Compute the log-probability of a file's text, in windows of the model's context.

    stride: see `TextScore`; None: half of the context. As long as the context: disjoint windows, as lm-eval has.
    Raises UsageError for a stride that does not fit, or a text that has no token to predict.
    """
    window = model.config.max_position_embeddings
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"--stride {stride}: expected 1 to {window} tokens, the model's context")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if max(ids, default=0) >= model.config.vocab_size:
        raise UsageError(
            f"--tokenizer gives token id {max(ids)}, and the model's vocabulary has {model.config.vocab_size} entries: "
            "use the model's own tokenizer"
        )
    begin = model.config.eos_token_id if model.config.bos_token_id is None else model.config.bos_token_id
    ids = ids if begin is None else [begin, *ids]
    if len(ids) < 2:
        raise UsageError(f"--text {path} has no token that the model can predict from another: name a longer text")
    requests = list(windows(ids, window, stride))
    total = 0.0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("windows", total=len(requests))
        for _, (score, _) in log_likelihoods(model, requests, batch_tokens=batch_tokens):
            total += score
            bar.advance(task)
    return TextScore(str(path), window, stride, len(ids) - 1, len(text.split()), len(text.encode()), -total)


def windows(ids: list[int], window: int, stride: int) -> Iterator[Request]:
    """Cut a text into requests that predict every token but the first once.

    The first predicts up to `window` tokens, each later one up to `stride`, from the tokens before them that fit into
    the window.
    """
    first, last = 1, min(window + 1, len(ids))
    while first < len(ids):
        begin = max(0, last - 1 - window)
        yield Request(tuple(ids[begin:first]), tuple(ids[first:last]))
        first, last = last, min(last + stride, len(ids))


def write(score: TextScore, folder: Path) -> Path:
    """Write the figures into `folder`/text-NAME.json; returns the file. Raises UsageError if that is impossible."""
    path = folder / f"text-{Path(score.text).name}.json"
    with writing(path, "make room or grant write permission, or name another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(score.to_json(), encoding="utf-8")
    return path


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
