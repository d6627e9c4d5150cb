"""`accelerate` and `restore`."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from . import attention, loss, phi
from .families import LAYER_NORM, Family, Replacement, family_of
from .masks import masks
from .modules import original, swap, swap_back, swapped
from .report import Entry, Report


def accelerate(model: nn.Module, *, keep_logits: bool = False) -> Report:
    """Put this library's ops into a Hugging Face model, in place.

    model: an instance of transformers' Phi, GPT-NeoX (Pythia), GPT-J, StableLM, Phi-3, Llama or Qwen2, with any head,
    or a PEFT model around one. Parameters and their names, state_dict, the config and the arguments of `forward` stay
    as they were; so do Trainer, PEFT, gradient checkpointing, padding masks, generation and KV caches. No other model
    changes, even if it shares the config. What the ops cannot do runs as before: the report lists what was replaced,
    what was left and why, and when the model's own code runs. Each call follows the config as it is at that time
    (attention implementation, output_attentions, is_causal).

    Logits: in training mode with labels the loss is computed without them (batch × sequence × vocab_size elements that
    are never whole in memory). `output.logits`, `output["logits"]`, `output[1]`, `output.to_tuple()` and pickle form
    them at that moment, differentiable like the model's own; keys() and items() do not list them until then. Read
    them before the optimizer's step: if they can no longer be formed (lm_head changed or sharded, an output gathered by
    DataParallel), reading them raises RuntimeError with the way out. Under torch.compile they are None. The tuple of
    return_dict=False contains them, and in eval mode, as in Trainer's evaluation, so does every output.
    keep_logits: leave the head and the loss to the model, so that each output has its logits from the start.

    A second derivative, which the ops do not have, raises NotImplementedError.

    A model is accelerated once, before it is wrapped in FSDP2 or compiled; `restore` undoes it. Restore it before
    pickling the model itself (torch.save of the model, not of its state_dict).

    Returns a `Report`. Raises TypeError for another model, ValueError for one that is accelerated already.
    """
    model = _unwrapped(model)
    family = family_of(model)
    assert isinstance(model, PreTrainedModel)  # family_of says so
    if any(swapped(module) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} is accelerated already; call restore(model) first")
    replaced: Counter[tuple[str, str]] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    for module in list(model.modules()):
        name, replacement = type(module).__name__, _replacement(module, family)
        why = None if replacement is None else replacement.why_not(module) or _why_not_here(model, module, replacement)
        if keep_logits and name == family.model:
            why = "keep_logits: the model's own head and loss"
        if replacement is not None and why is None:
            swap(module, replacement.build)
            replaced[name, replacement.ops] += 1
        elif why is not None:
            left[name, why] += 1
        elif type(module).__module__ == family.module and name in family.left:
            left[name, family.left[name]] += 1
        elif type(module).__module__ == family.module and name == family.base:
            swap(module, masks)
    rules = (*phi.RULES, *attention.RULES, *loss.RULES) if family.name == "phi" else (*attention.RULES, *loss.RULES)
    return Report(type(model).__name__, _entries(replaced), _entries(left), rules)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the instance is what it was, bit for bit. Raises ValueError for a model that is not
    accelerated, or that was wrapped since by what changes a module's class (FSDP2)."""
    model = _unwrapped(model)
    if not any(swapped(module) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} is not accelerated; there is nothing to restore")
    swap_back(model)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None or isinstance(model, PreTrainedModel) else inner()


def _replacement(module: nn.Module, family: Family) -> Replacement | None:
    cls = original(module)
    if cls is nn.LayerNorm:
        return LAYER_NORM
    return family.replaced.get(cls.__name__) if cls.__module__ == family.module else None


def _why_not_here(model: PreTrainedModel, module: nn.Module, replacement: Replacement) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, by accelerate's device_map for one"
    return _why_no_attention(model) if "attention" in replacement.ops or "block" in replacement.ops else None


def _why_no_attention(model: PreTrainedModel) -> str | None:
    config = model.config
    if not getattr(config, "is_causal", True):
        return "config.is_causal is False; the layer's masks are read as causal ones"
    if config._attn_implementation not in attention.IMPLEMENTATIONS:
        known = " or ".join(map(repr, attention.IMPLEMENTATIONS))
        return f"attn_implementation is {config._attn_implementation!r}; expected {known} to stand before"
    return None


def _entries(counted: Counter[tuple[str, str]]) -> tuple[Entry, ...]:
    return tuple(Entry(module, count, note) for (module, note), count in counted.items())
