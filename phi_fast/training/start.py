"""Preparation of a run: batch, precision, kernels and model, and the header that shows them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn

from ..conversion.source import Source
from ..errors import MachineError, UsageError
from ..kernels import BackendUnavailable, in_use, layer_norm, use
from ..kernels.backend import OPS, implementation, tiles
from ..model.lora import add_lora
from ..model.phi import Phi
from ..precision import DTYPES, Precision, auto_precision
from . import cuda_graphs
from .corpora import Corpora
from .deferred_gradients import reduces_once
from .display import back_ends, show
from .distributed import World
from .initial import initial_model, new_model
from .options import Options, plan_batch
from .run_directory import Run


class Setup(NamedTuple):
    """The options, and what they mean on these ranks and this device."""

    options: Options
    world: World
    precision: Precision
    micro_batch_size: int
    """Rows per rank in one forward pass."""
    accumulation: int
    """Micro-batches per step."""

    @staticmethod
    def of(options: Options, world: World) -> Setup:
        """Raises UsageError if the options do not fit the ranks, MachineError if a back end cannot run here."""
        micro_batch_size, accumulation = plan_batch(options, world.size)
        cuda_graphs.check(options, world, accumulation)
        choose_kernels(options.kernels, world)
        precision = auto_precision(world.device) if options.precision == "auto" else options.precision
        return Setup(options, world, precision, micro_batch_size, accumulation)


def choose_kernels(choice: str, world: World) -> None:
    """Select the kernels by --kernels: "auto", or "BACKEND,op=BACKEND,…".

    Raises UsageError for an unknown name, MachineError for a back end that cannot run on this machine.
    """
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
    except (BackendUnavailable, ValueError) as error:
        raise MachineError(str(error)) from None


def build_model(setup: Setup, initial: Source | None = None) -> nn.Module:
    """Build the model in the training dtype, the same on every rank: from `initial`'s weights, else from the seed."""
    options = setup.options
    torch.manual_seed(options.seed)
    dtype, device = DTYPES[setup.precision], setup.world.device
    if initial is None:
        return new_model(options).to(device, dtype)
    model = initial_model(options, initial, dtype, device)
    if options.lora is not None:
        assert isinstance(model, Phi)
        add_lora(model, options.lora)
    return model


def header(console: Console, setup: Setup, run: Run, corpora: Corpora, done: int) -> None:
    """Print what is about to run, before the first step."""
    options, world = setup.options, setup.world
    config, left, lora = options.model, options.steps - done, options.lora
    used = in_use(world.device)
    if options.implementation == "reference":
        used = {"adam": used["adam"]}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
    once = ", gradients reduced once per step" if reduces_once(options, world, setup.accumulation) else ""
    split = f"{setup.micro_batch_size} × {setup.accumulation} accumulated × {world.size} ranks{once}"
    lines = {
        "recipe": f"{options.recipe} → {run.directory}",
        "model": f"{config.num_parameters():,} parameters: {config.num_hidden_layers} layers, "
        f"width {config.hidden_size}, vocabulary {config.vocab_size}, {options.implementation}",
        **({"weights": f"from {options.init_from}"} if options.init_from and not done else {}),
        **(
            {}
            if lora is None
            else {
                "lora": f"{options.trained_parameters:,} parameters: rank {lora.rank}, alpha "
                f"{lora.alpha:g}, {', '.join(lora.targets)}"
            }
        ),
        "data": corpora.summary(),
        **({} if (cache := corpora.cache) is None else {"cache": f"{cache.directory}, {cache.limit_bytes / 1e9:g} GB"}),
        "device": f"{world.size} × {device}{threads}, {setup.precision}, DeepSpeed ZeRO-2, {options.zero_step} step"
        f"{', CUDA graphs' if options.cuda_graphs else ''}",
        "kernels": back_ends(used),
        **({"tiles": tiles(world.device)} if "triton" in used.values() else {}),
        "batch": f"{options.global_batch_size} rows = {split}, of {options.sequence_length} tokens",
        "to go": f"{left:,} steps, {left * options.tokens_per_step:,} tokens"
        if left > 0
        else f"nothing: {done:,} steps are done, and --tokens asks for {options.steps:,}",
    }
    show(console, lines)
