"""Sampling of a text from the model at the end of a run."""

from __future__ import annotations

from tokenizers import Tokenizer
from torch import nn

from ..errors import UsageError
from ..generation import Sampling, complete
from ..model.merged import to_merged
from ..model.phi import Phi
from .options import Options


def plan_sample(options: Options, tokenizer: Tokenizer) -> Sampling:
    """Choose the sampling parameters. Raises UsageError for a --sample-prompt that fills the model's context."""
    prompt = len(tokenizer.encode(options.sample_prompt, add_special_tokens=False).ids)
    context = options.model.max_position_embeddings
    if prompt >= context:
        raise UsageError(
            f"--sample-prompt has {prompt} tokens, and the model's context of {context} leaves none to sample: shorten "
            "it, or give --sample-tokens 0"
        )
    return Sampling(max_new_tokens=min(options.sample_tokens, context - prompt), temperature=0.8, seed=options.seed)


def sample(model: nn.Module, tokenizer: Tokenizer, options: Options, sampling: Sampling) -> str:
    """Sample a continuation of --sample-prompt; the same seed gives the same text. Returns prompt and continuation."""
    [completion] = complete(as_phi(model, options), tokenizer, [options.sample_prompt], sampling)
    return options.sample_prompt + completion.text


def as_phi(model: nn.Module, options: Options) -> Phi:
    """Return the model itself if it is a Phi, else a Phi with a copy of the reference's weights."""
    if isinstance(model, Phi):
        return model
    phi = Phi(options.model).to(next(model.parameters()))
    phi.load_state_dict(to_merged(model.state_dict()))
    return phi
