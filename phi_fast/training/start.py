"""What is chosen before the first step: kernels, the model, how the sample is drawn; and the header that says so."""

from __future__ import annotations

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn

from ..errors import UsageError
from ..generation import Sampling
from ..kernels import in_use, layer_norm, use
from ..kernels.backend import OPS, implementation
from ..model.phi import Phi
from ..model.reference import ReferencePhi
from ..precision import DTYPES, Precision
from .corpora import Corpora
from .display import back_ends, show
from .distributed import World
from .options import Options
from .run_directory import Run


def choose_kernels(choice: str, world: World) -> None:
    """Carry out --kernels: "auto", or "BACKEND,op=BACKEND,…". Raises UsageError or BackendUnavailable."""
    for part in choice.split(","):
        left, equals, right = part.strip().partition("=")
        try:
            use(right, op=left) if equals else use(left)
        except ValueError as error:
            raise UsageError(f"--kernels {choice}: {error}") from None
    try:
        for op in OPS:
            implementation(op, world.device)
        ones = torch.ones(1, 8, device=world.device)
        layer_norm(ones, ones[0], ones[0], 1e-5)  # the first op in C++ reads PHI_FAST_ISA
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_model(options: Options, world: World, precision: Precision) -> nn.Module:
    """The model from its seed, the same on every rank, in the dtype it is trained in."""
    torch.manual_seed(options.seed)
    if options.implementation == "reference":
        model: nn.Module = ReferencePhi(options.model)
    else:
        model = Phi(options.model, recompute=options.recompute)
    return model.to(world.device, DTYPES[precision])


def plan_sample(options: Options, tokenizer: Tokenizer) -> Sampling:
    """How the sample at the end is drawn. Raises UsageError for a --sample-prompt that fills the model's context."""
    prompt = len(tokenizer.encode(options.sample_prompt, add_special_tokens=False).ids)
    context = options.model.max_position_embeddings
    if prompt >= context:
        raise UsageError(
            f"--sample-prompt has {prompt} tokens, and the model's context of {context} leaves none to sample: shorten "
            "it, or give --sample-tokens 0"
        )
    return Sampling(max_new_tokens=min(options.sample_tokens, context - prompt), temperature=0.8, seed=options.seed)


def header(
    console: Console,
    options: Options,
    world: World,
    run: Run,
    corpora: Corpora,
    precision: Precision,
    micro_batch_size: int,
    accumulation: int,
    done: int,
) -> None:
    """What is about to run, before the first step."""
    config, left = options.model, options.steps - done
    used = in_use(world.device)
    if options.implementation == "reference":
        used = {"adam": used["adam"]}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
    batch = f"{options.global_batch_size} rows = {micro_batch_size} × {accumulation} accumulated × {world.size} ranks"
    lines = {
        "recipe": f"{options.recipe} → {run.directory}",
        "model": f"{config.num_parameters():,} parameters: {config.num_hidden_layers} layers, "
        f"width {config.hidden_size}, vocabulary {config.vocab_size}, {options.implementation}",
        "data": corpora.summary(),
        "device": f"{world.size} × {device}{threads}, {precision}, DeepSpeed ZeRO-2, {options.zero_step} step",
        "kernels": back_ends(used),
        "batch": f"{batch}, of {options.sequence_length} tokens",
        "to go": f"{left:,} steps, {left * options.tokens_per_step:,} tokens"
        if left > 0
        else f"nothing: {done:,} steps are done, and --tokens asks for {options.steps:,}",
    }
    show(console, lines)
