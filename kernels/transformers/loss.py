"""lm_head and cross entropy of a causal language model as one op, the logits never whole in memory."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..linear_cross_entropy import linear_cross_entropy
from .modules import Forward, plain
from .outputs import without_logits

IGNORED = -100

RULES = (
    "loss: in eval mode and without labels, with logits_to_keep, with a loss function of the user's own, with LoRA or "
    "hooks on lm_head. In training mode with labels, logits are formed when they are asked for, and no KV cache is "
    "built unless the call asks for it or has position_ids",
)


def causal_lm(base: type[nn.Module]) -> Forward:
    """A ...ForCausalLM's forward."""
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    def forward(self, *args, **kwargs):
        arguments = dict(zip(names[: len(args)], args[: len(names)], strict=True)) | kwargs
        if not _fits(self, arguments):
            return base.forward(self, **arguments)
        return _forward(self, arguments)

    return forward


def _fits(self: Any, arguments: dict[str, Any]) -> bool:
    keep = arguments.get("logits_to_keep", 0)
    return (
        self.training
        and arguments.get("labels") is not None
        and isinstance(keep, int)
        and keep == 0
        and self.loss_function is ForCausalLMLoss
        and plain(self.lm_head)
        and not (torch.compiler.is_compiling() and not _return_dict(self, arguments))
    )


def _return_dict(self: Any, arguments: dict[str, Any]) -> bool:
    given = arguments.get("return_dict")
    return self.config.return_dict if given is None else given


def _forward(self: Any, arguments: dict[str, Any]) -> CausalLMOutputWithPast | tuple:
    return_dict = _return_dict(self, arguments)
    for name in ("logits_to_keep", "return_dict"):
        arguments.pop(name, None)
    labels = arguments.pop("labels")
    # With a cache transformers does not look for packed documents in position_ids: there the caller's word stands.
    if all(arguments.get(name) is None for name in ("use_cache", "past_key_values", "position_ids")):
        arguments["use_cache"] = False
    options = {
        name: arguments[name] for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in arguments
    }
    outputs = self.base_model(return_dict=True, **arguments)
    hidden = outputs.last_hidden_state
    loss = _loss(self, hidden, labels, **options)
    names = ("past_key_values", "hidden_states", "attentions")
    result = without_logits(loss, self.lm_head, hidden, **{name: getattr(outputs, name) for name in names})
    return result if return_dict else result.to_tuple()


def _loss(
    self: Any,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """The loss of transformers' ForCausalLMLoss: position t is compared with the label of t + 1; the sum over
    `num_items_in_batch` (what gradient accumulation counted), or the mean."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    weight, bias = self.lm_head.weight, self.lm_head.bias
    dtype = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    loss = linear_cross_entropy(
        hidden.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        shift_labels.to(hidden.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
