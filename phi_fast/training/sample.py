"""Sampling of a text from the model at the end of a run."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer
from torch import nn

from ..data.chat import ChatFiles, render, require_transformers
from ..errors import UsageError
from ..generation import Sampling, complete
from ..model.merged import to_merged
from ..model.phi import Phi
from .options import Options


class Sample(NamedTuple):
    """What is sampled at the end of a run, and how."""

    prompt: str
    """--sample-prompt, or what the chat template makes of it as a user's message."""
    sampling: Sampling


def plan_sample(options: Options, tokenizer: Tokenizer, chat: ChatFiles | None = None) -> Sample:
    """Choose the prompt and the sampling parameters.

    Raises UsageError for a --sample-prompt that fills the model's context, or that the chat template rejects.
    """
    text = options.sample_prompt
    if chat is not None:
        text = ask(chat, tokenizer, text)
    prompt = len(tokenizer.encode(text, add_special_tokens=False).ids)
    context = options.model.max_position_embeddings
    if prompt >= context:
        raise UsageError(
            f"--sample-prompt has {prompt} tokens, and the model's context of {context} leaves none to sample: shorten "
            "it, or give --sample-tokens 0"
        )
    sampling = Sampling(max_new_tokens=min(options.sample_tokens, context - prompt), temperature=0.8, seed=options.seed)
    return Sample(text, sampling)


def ask(chat: ChatFiles, tokenizer: Tokenizer, question: str) -> str:
    """Render a user's question by the chat template, up to where the answer begins."""
    require_transformers("the sample from a chat, unless it is left out with --sample-tokens 0,")
    try:
        return render(chat.on(tokenizer), [{"role": "user", "content": question}], answer=True)
    except ValueError as error:
        raise UsageError(f"--sample-prompt {question!r}: {error}; give --sample-tokens 0") from None


def sample(model: nn.Module, tokenizer: Tokenizer, options: Options, planned: Sample) -> str:
    """Sample a continuation of the prompt; the same seed gives the same text. Returns prompt and continuation."""
    [completion] = complete(as_phi(model, options), tokenizer, [planned.prompt], planned.sampling)
    return planned.prompt + completion.text


def as_phi(model: nn.Module, options: Options) -> Phi:
    """Return the model itself if it is a Phi, else a Phi with a copy of the reference's weights."""
    if isinstance(model, Phi):
        return model
    phi = Phi(options.model).to(next(model.parameters()))
    phi.load_state_dict(to_merged(model.state_dict()))
    return phi
