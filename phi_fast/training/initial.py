"""The weights that a run starts from (`--init-from`): another run's, or a published model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from rich.console import Console
from tokenizers import Tokenizer

from ..config import PhiConfig
from ..conversion.errors import ConversionError
from ..conversion.folder import find_tokenizer
from ..conversion.load import fill
from ..conversion.source import Source
from ..errors import UsageError
from ..model.phi import Phi
from ..model.reference import ReferencePhi
from .options import Options, defaults, parse


def parse_on(shape: PhiConfig, arguments: Sequence[str], init_from: str) -> Options:
    """Parse the command line with the shape of `init_from`'s weights as the default of --model.

    The defaults of --tokenizer and --sequence-length follow: the corpora's tokenizer, and at most the model's context.
    Raises UsageError naming each option that contradicts the shape.
    """
    shape = _shape(shape)
    recipe = defaults(arguments)
    named = recipe.tokenizer if recipe.tokenizer == "stdlib" else "data"
    length = min(recipe.sequence_length, shape.max_position_embeddings)
    options = parse(arguments, replace(recipe, model=shape, tokenizer=named, sequence_length=length))
    here, there = asdict(options.model), asdict(shape)
    wrong = [
        f"--model.{name.replace('_', '-')} {here[name]}, where the weights have {there[name]}"
        for name in here
        if here[name] != there[name] and not name.endswith("_token_id")
    ]
    if wrong:
        raise UsageError(f"--init-from {init_from} contradicts {'; '.join(wrong)}: leave --model's options out")
    return options


def open_initial(options: Options, tokenizer: Tokenizer, console: Console, name: str | None = None) -> Source | None:
    """Open --init-from, whose tokens must be those of the corpora's `tokenizer`; None for random weights.

    name: where those weights are, if not under the name that the option gives.
    Raises ConversionError as `Source.open` does, and UsageError if the shape or the tokens differ.
    """
    if options.init_from is None:
        return None
    source = Source.open(name or options.init_from)
    if _shape(source.config) != _shape(options.model):
        raise UsageError(
            f"--init-from {options.init_from} has another shape than this run: it was replaced since the run began. "
            "Name a new --run-dir"
        )
    try:
        own = find_tokenizer(source)
    except ConversionError:
        console.print(f"{options.init_from} has no tokenizer.json: its tokens are not compared with the corpora's")
        return source
    if (problem := _difference(own, tokenizer)) is not None:
        raise UsageError(
            f"--init-from {options.init_from} has other tokens than the corpora: {problem}. Prepare the corpora with "
            f"`--tokenizer {options.init_from}`"
        )
    return source


def initial_model(options: Options, source: Source, dtype: torch.dtype, device: torch.device) -> Phi | ReferencePhi:
    """Build the model and read the weights into it; peak memory is the model and its largest tensor."""
    with torch.device("meta"):
        model = new_model(options)
    model = model.to(dtype).to_empty(device=device)
    fill(model, source)
    return model


def new_model(options: Options) -> Phi | ReferencePhi:
    """Make the model of --implementation, with random weights in fp32."""
    if options.implementation == "reference":
        return ReferencePhi(options.model, z_loss=options.z_loss)
    return Phi(options.model, recompute=options.recompute, z_loss=options.z_loss)


def _shape(config: PhiConfig) -> PhiConfig:
    """Remove the token ids, which come from the corpora."""
    return config.replace(bos_token_id=None, eos_token_id=None)


def _difference(own: Tokenizer, corpora: Tokenizer) -> str | None:
    """Describe the first id that means another token; None if there is none. Either may have tokens that the other
    lacks: new tokens may take the place of a vocabulary's padding."""
    mine, theirs = (tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (own, corpora))
    for token in sorted(mine.keys() & theirs.keys(), key=mine.__getitem__):
        if mine[token] != theirs[token]:
            return f"{token!r} is id {mine[token]} there and {theirs[token]} here"
    here = {id: token for token, id in theirs.items()}
    for token, id in mine.items():
        if here.get(id, token) != token:
            return f"id {id} is {token!r} there and {here[id]!r} here"
    return None
