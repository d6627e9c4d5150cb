"""LayerNorm, RMSNorm, the GELU MLP and the gated MLP of Hugging Face models on this library's ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..bias_gelu import bias_gelu
from ..gated_activation import gated_activation
from ..layer_norm import layer_norm as layer_norm_op
from ..rms_norm import rms_norm as rms_norm_op
from .modules import Builder, Forward, hooked, plain

_APPROXIMATE = {
    type(ACT2FN[name]): approximate
    for name, approximate in (("gelu", "none"), ("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"))
}
"""transformers' activation -> `bias_gelu`'s `approximate`."""

_GATES = {type(ACT2FN[name]): "silu" for name in ("silu", "swish")} | {
    activation: "gelu_tanh" for activation, form in _APPROXIMATE.items() if form == "tanh"
}
"""transformers' activation -> `gated_activation`'s `activation`."""


def approximate(activation: nn.Module) -> str:
    """ "tanh" or "none", as `bias_gelu` names GELU's forms. `why_no_gelu` has accepted the activation."""
    return _APPROXIMATE[type(activation)]


def why_no_layer_norm(module: Any) -> str | None:
    """Why `layer_norm` cannot take the module's place."""
    if len(module.normalized_shape) != 1:
        return f"normalizes over {len(module.normalized_shape)} dims; the op has one"
    return "no weight and bias; the op has both" if module.weight is None or module.bias is None else None


def why_no_gelu(module: Any) -> str | None:
    """Why the module's activation is not `bias_gelu`."""
    activation = getattr(module, "act", None) or module.activation_fn
    known = ", ".join(sorted(cls.__name__ for cls in _APPROXIMATE))
    return None if type(activation) in _APPROXIMATE else f"activation {type(activation).__name__} is not one of {known}"


def why_not_gated(module: Any) -> str | None:
    """Why the module's activation is not one of `gated_activation`'s."""
    activation = module.activation_fn if hasattr(module, "activation_fn") else module.act_fn
    known = ", ".join(sorted(cls.__name__ for cls in _GATES))
    return None if type(activation) in _GATES else f"activation {type(activation).__name__} is not one of {known}"


def layer_norm(base: type[nn.Module]) -> Forward:
    """torch.nn.LayerNorm over the last dim, with weight and bias."""

    def forward(self, x):
        autocast = x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)
        if x.dtype != self.weight.dtype or autocast:  # torch would answer in fp32
            return base.forward(self, x)
        return layer_norm_op(x, self.weight, self.bias, self.eps)

    return forward


def rms_norm(base: type[nn.Module]) -> Forward:
    """The RMSNorm of Llama and its kin, over the last dim, with weight."""

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        autocast = dtype != torch.float32 and torch.is_autocast_enabled(hidden_states.device.type)
        if dtype != self.weight.dtype or autocast:  # the op's result has another dtype than transformers'
            return base.forward(self, hidden_states)
        return rms_norm_op(hidden_states, self.weight, self.variance_epsilon)

    return forward


def gelu_mlp(up: str, down: str, activation: str, dropout: str | None = None) -> Builder:
    """Builder of the forward down(gelu(up(x))), of the modules' names. The configuration says which GELU."""

    def build(base: type[nn.Module]) -> Forward:
        def forward(self, x):
            act = getattr(self, activation)
            if hooked(act):
                return base.forward(self, x)
            form = approximate(act)
            first = getattr(self, up)
            if plain(first) and first.bias is not None:
                h = F.linear(x, first.weight)
                h = bias_gelu(h, first.bias.to(h.dtype), approximate=form)
            else:
                h = bias_gelu(first(x), approximate=form)
            h = getattr(self, down)(h)
            return h if dropout is None else getattr(self, dropout)(h)

        return forward

    return build


def gated_mlp(base: type[nn.Module]) -> Forward:
    """Llama's MLP and its kin's: down_proj(act(gate_proj(x)) · up_proj(x))."""

    def forward(self, x):
        act = self.act_fn
        if hooked(act):
            return base.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype:  # a projection that somebody replaced; the op takes one dtype
            return self.down_proj(act(gate) * up)
        return self.down_proj(gated_activation(gate, up, activation=_GATES[type(act)]))

    return forward


def packed_gated_mlp(base: type[nn.Module]) -> Forward:
    """Phi-3's MLP, whose gate_up_proj gives both halves, which the op reads where they lie."""

    def forward(self, hidden_states):
        act = self.activation_fn
        if hooked(act):
            return base.forward(self, hidden_states)
        return self.down_proj(gated_activation(self.gate_up_proj(hidden_states), activation=_GATES[type(act)]))

    return forward
