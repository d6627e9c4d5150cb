"""The data of a run: its recipe's corpora, the loader over their mixture, and their validation rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from ..config import PhiConfig
from ..data import Mixture, TokenLoader, count_rows, sequential_rows, stdlib_corpus
from ..data.chat import ChatFiles
from ..data.manifest import Manifest
from ..data.remote.origin import url_of
from ..data.store import isolated_rows
from ..data.token_bytes import token_bytes
from ..data.vocabulary import END_OF_TEXT, TokenizerError, digest, tokenizer, vocab_size
from ..errors import UsageError
from ..open_data import OPEN_DATA
from ..recipes import RECIPES
from .corpus_places import CorpusPlaces
from .distributed import World
from .options import Options


class Corpora:
    """Opens the corpora of `recipe.mixture`, in `recipe.data` or where `recipe.corpora` says; builds the
    standard-library corpus if it is needed.

    Raises FileNotFoundError for a missing corpus, UsageError or TokenizerError for one that does not fit the model.
    """

    def __init__(self, recipe: Options, world: World, console: Console) -> None:
        self.recipe, self.world = recipe, world
        remote = url_of(recipe.data) is not None
        if recipe.tokenizer == "stdlib" and not remote:
            if not recipe.data.exists() and recipe.data != RECIPES["tiny"].data:
                raise UsageError(
                    f"--data {recipe.data} does not exist. The standard-library corpus is built automatically only at "
                    f"{RECIPES['tiny'].data}: correct the path, or leave --data out"
                )
            if world.is_main:
                stdlib_corpus.prepare(recipe.data, progress=lambda line: console.print(line, highlight=False))
            world.barrier()
        self.paths, self.cache = CorpusPlaces.of(recipe)
        first = next(iter(self.paths.values()), recipe.data)
        places = {"stdlib": first if remote else recipe.data, "data": first}
        if recipe.tokenizer == "data":
            self._need(*next(iter(self.paths.items())))
        self.tokenizer: Tokenizer = tokenizer(places.get(recipe.tokenizer, recipe.tokenizer))
        self.manifests: dict[str, Manifest] = {}
        for name, path in self.paths.items():
            self._need(name, path)
            self.manifests[name] = Manifest.read(path)
            if self.manifests[name].tokenizer_sha256 != digest(self.tokenizer):
                raise TokenizerError(
                    f"corpus {name!r} at {path} was made with tokenizer {self.manifests[name].tokenizer!r}, which "
                    f"is not this run's, {recipe.tokenizer!r}; give its tokenizer with --tokenizer, or prepare it again"
                )
            largest = max(split.max_id for split in self.manifests[name].splits.values())
            if largest >= recipe.model.vocab_size:
                raise UsageError(
                    f"corpus {name!r} at {path} has token id {largest}, but the model's vocabulary has "
                    f"{recipe.model.vocab_size} entries; use the corpus's tokenizer or raise --model.vocab-size"
                )
        self.chat = next(filter(None, map(ChatFiles.read, self.paths.values())), None)
        """The chat template of the first corpus made of conversations; None if there is none."""
        self.tokens = recipe.tokens if recipe.tokens is not None or recipe.epochs is None else self._tokens_of_epochs()
        """Tokens to train on: the recipe's, or those of its epochs; None if it has neither."""
        self.model = self._with_token_ids(recipe.model)
        """The recipe's model with the token ids that begin and end a text in these corpora."""

    def _tokens_of_epochs(self) -> int:
        """Count the tokens of whole steps in which every corpus is read `recipe.epochs` times or more."""
        recipe, total = self.recipe, sum(self.recipe.mixture.values())
        most = 0.0
        for name, weight in recipe.mixture.items():
            rows = count_rows(self.paths[name], "train", recipe.sequence_length)
            most = max(most, rows * total / weight)
        assert recipe.epochs is not None
        return math.ceil(most * recipe.epochs / recipe.global_batch_size) * recipe.tokens_per_step

    def _need(self, name: str, path: Path) -> None:
        """Raise FileNotFoundError if there is no corpus at `path`."""
        if not (path / "manifest.json").exists():
            open_one = next((one for one in OPEN_DATA if RECIPES[one].data == self.recipe.data), None)
            if open_one is not None:
                raise FileNotFoundError(
                    f"corpus {name!r} is not at {path}; make it, and the others, with `python -m phi_fast.prepare "
                    f"--recipe {open_one}`, which tells first what it needs"
                )
            made_with = self.recipe.tokenizer
            if made_with == "data":
                made_with = self.recipe.init_from or "TOKENIZER"
            raise FileNotFoundError(
                f"corpus {name!r} is not at {path}; make it with `python -m phi_fast.prepare INPUTS --tokenizer "
                f"{made_with} --out {path}`, or name other corpora with --data and --mixture"
            )

    def _with_token_ids(self, model: PhiConfig) -> PhiConfig:
        """Set both ids to the corpora's delimiter, else the tokenizer's `<|endoftext|>`, else None.

        The token that ends the answers of conversations goes before the delimiters of other corpora.

        Raises UsageError if the corpora, the tokenizer, and the model's own ids and vocabulary contradict each other.
        """
        size = vocab_size(self.tokenizer)
        if size > model.vocab_size:
            raise UsageError(
                f"tokenizer {self.recipe.tokenizer!r} has {size} ids, but the model's vocabulary has "
                f"{model.vocab_size} entries; raise --model.vocab-size, or use another --tokenizer"
            )
        chats = {name: manifest for name, manifest in self.manifests.items() if manifest.marked}
        ends = {name: one.delimiter.id for name, one in (chats or self.manifests).items() if one.delimiter}
        if len(set(ends.values())) > 1:
            each = ", ".join(f"{name} with {id}" for name, id in ends.items())
            raise UsageError(f"the corpora end their documents with different ids, {each}: prepare them again")
        end = next(iter(ends.values()), self.tokenizer.token_to_id(END_OF_TEXT))
        if end is not None and self.tokenizer.id_to_token(end) is None:
            raise UsageError(
                f"the corpora end their documents with id {end}, which tokenizer {self.recipe.tokenizer!r} does not "
                "have; prepare them again, or name their tokenizer with --tokenizer"
            )
        for field, given in (("bos_token_id", model.bos_token_id), ("eos_token_id", model.eos_token_id)):
            if given is not None and given != end:
                raise UsageError(
                    f"model.{field}={given}, but these corpora and their tokenizer have {end} between documents; leave "
                    f"--model.{field.replace('_', '-')} out to use theirs"
                )
        return model.replace(bos_token_id=end, eos_token_id=end)

    def need_validation(self) -> None:
        """Raises UsageError for a corpus without a validation split."""
        for name, manifest in self.manifests.items():
            if "validation" not in manifest.splits:
                raise UsageError(
                    f"corpus {name!r} at {self.paths[name]} has no validation split, which --val-every needs: give "
                    "--val-every 0, or prepare it again with more documents or a larger --validation"
                )

    def loader(self, micro_batch_size: int) -> TokenLoader:
        """Load this rank's micro-batches; `accumulation` of them on every rank make up a global batch."""
        recipe = self.recipe
        weights = {name: (self.paths[name], weight) for name, weight in recipe.mixture.items()}
        stages = [(step * recipe.global_batch_size, later) for step, later in recipe.mixture_stages]
        return TokenLoader(
            Mixture.of(weights, "train", stages),
            recipe.sequence_length,
            micro_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=recipe.seed,
            document_isolation=recipe.document_isolation,
            max_token_id=recipe.model.vocab_size - 1,
        )

    @cached_property
    def token_bytes(self) -> Tensor:
        """Bytes of text per token id, (vocabulary of the model,) int64; see `data.token_bytes`."""
        table = torch.zeros(self.model.vocab_size, dtype=torch.int64)
        found = torch.from_numpy(token_bytes(self.tokenizer))
        table[: len(found)] = found
        return table

    def validation(self, rows: int, batch: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
        """Read this rank's share of the first `rows` validation rows of each corpus.

        Yields (corpus, input_ids, labels, cu_seqlens); cu_seqlens is None unless documents are isolated.
        """
        for name, path in self.paths.items():
            there = min(rows, count_rows(path, "validation", self.recipe.sequence_length))
            start, stop = (there * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
            if start < stop:
                length, largest = self.recipe.sequence_length, self.recipe.model.vocab_size - 1
                rows_of: dict[str, Any] = {"batch": batch, "start": start, "stop": stop, "max_token_id": largest}
                if self.recipe.document_isolation:
                    for isolated in isolated_rows(path, "validation", length, **rows_of):
                        yield name, *isolated
                else:
                    for joined in sequential_rows(path, "validation", length, **rows_of):
                        yield name, *joined, None

    def summary(self) -> str:
        """Describe the mixture in one line: each corpus's share and training tokens, then later stages' shares."""
        sizes = {name: f" ({manifest.splits['train'].tokens:,} tokens)" for name, manifest in self.manifests.items()}
        lines = [_shares(self.recipe.mixture, sizes)]
        lines += [f"from step {step} on {_shares(weights, {})}" for step, weights in self.recipe.mixture_stages]
        return "; ".join(lines)


def _shares(weights: dict[str, int], sizes: dict[str, str]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {100 * weight / total:.0f}%{sizes.get(name, '')}" for name, weight in weights.items())
