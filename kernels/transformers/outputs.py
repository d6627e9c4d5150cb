"""The output of a training step whose logits are formed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_outputs import CausalLMOutputWithPast

WAY_OUT = "accelerate(model, keep_logits=True) keeps them, at the cost of holding them whole"


class LazyLogits:
    """lm_head's product with a step's last hidden states, to be taken later: differentiable, and in the step's autocast
    mode."""

    def __init__(self, head: nn.Linear, hidden: Tensor) -> None:
        device = hidden.device.type
        self.head, self.hidden, self.weights = head, hidden, _weights(head)
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def __call__(self) -> Tensor:
        """(batch, sequence, vocab_size). Raises RuntimeError where lm_head no longer holds the step's weights."""
        if _weights(self.head) != self.weights:
            raise RuntimeError(
                "logits: lm_head no longer has the weights that the loss was computed with (after an optimizer's step, "
                f"or where FSDP shards it outside of forward); read logits before that, or {WAY_OUT}"
            )
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.head(self.hidden)


def _weights(head: nn.Linear) -> list[tuple[int, int, int]]:
    """Identify the parameters' present values without reading them, by object, version and bytes held."""
    return [(id(p), 0 if p.is_inference() else p._version, p.untyped_storage().nbytes()) for p in head.parameters()]


def _lost() -> Tensor:
    raise RuntimeError(
        "logits: the loss was computed without them, and this output was rebuilt since from its items on other tensors "
        f"(by DataParallel, for one), so they can no longer be formed; {WAY_OUT}"
    )


_of_loss: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""loss -> its LazyLogits. By it an output that accelerate's autocast or a pytree has rebuilt from its items finds its
logits again; an entry lives as long as the loss."""


class CausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast of a step that has a loss and no logits yet.

    `.logits`, `["logits"]`, a position other than 0, a slice, `to_tuple()` and pickle form them, once. Code that only
    iterates over keys and items (Trainer, autocast's conversion to fp32, DDP, FSDP) does not form them: they are not
    listed until then.
    """

    _form: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if super().__getattribute__("logits") is None:
            self._form = _of_loss.get(self.loss, _lost)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits" and (form := super().__getattribute__("_form")) is not None:
            self.logits = form()
            for key in ("past_key_values", "hidden_states", "attentions"):
                if key in self:
                    self.move_to_end(key)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "logits" and value is not None:
            self._form = None

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        return self.loss if key == 0 else super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """(loss, logits, ...) as the model's own; forms the logits."""
        _ = self.logits
        return super().to_tuple()

    def __reduce__(self) -> tuple:
        fields = (self.loss, self.logits, self.past_key_values, self.hidden_states, self.attentions)
        return CausalLMOutputWithPast, fields

    def __repr__(self) -> str:
        note = "" if self._form is None else ", logits=formed when asked for"
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.items())}{note})"


def without_logits(loss: Tensor, head: nn.Linear, hidden: Tensor, **fields: Any) -> CausalLMOutputWithPast:
    """The output of a step that computed `loss` from `hidden` (batch, sequence, d) and lm_head at once.

    fields: the others of CausalLMOutputWithPast. Under torch.compile logits are None: the graph's outputs are fixed.
    """
    if torch.compiler.is_compiling():
        return CausalLMOutputWithPast(loss=loss, **fields)
    _of_loss[loss] = LazyLogits(head, hidden)
    return CausalLMOutput(loss=loss, **fields)
