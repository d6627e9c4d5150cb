"""LoRA (Hu et al., arXiv 2106.09685) on a `Phi`: small trained matrices beside frozen weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import LoraConfig, PhiConfig
from ..kernels.parallel_block_adapters import Adapters
from .merged import LAYER, parts_of

if TYPE_CHECKING:
    from .phi import Block, Phi

MERGED = ("in_proj.weight", "out_proj.weight")
MODULES = {name.split(".")[1]: name.removesuffix(".weight") for ours in MERGED for name in LAYER[ours][0]}
"""Target -> its module in a layer of transformers' phi: "q_proj" -> "self_attn.q_proj"."""


class LoRA(nn.Module):
    """The adapters of one block: parameters `{target}.a` (rank, inputs) and `{target}.b` (outputs, rank)."""

    def __init__(self, config: PhiConfig, lora: LoraConfig) -> None:
        super().__init__()
        self.scale = lora.scale
        self.adapters = nn.ModuleDict()
        for target, (a, b) in lora.shapes(config).items():
            pair = nn.Module()
            pair.a, pair.b = nn.Parameter(torch.empty(a)), nn.Parameter(torch.zeros(b))
            nn.init.kaiming_uniform_(pair.a, a=math.sqrt(5))  # as PEFT and the authors' loralib do
            self.adapters[target] = pair

    def tensors(self) -> Adapters:
        """Return the adapters as `kernels.parallel_block` takes them."""
        pairs = self.adapters.values()
        a, b = (tuple(getattr(pair, name) for pair in pairs) for name in "ab")
        return Adapters(tuple(self.adapters), self.scale, a, b)


def add_lora(model: Phi, lora: LoraConfig) -> None:
    """Freeze a model's weights and add adapters to its blocks, A drawn from torch's generator and B zero."""
    weight = model.lm_head.weight
    model.requires_grad_(False)
    for layer in model.layers:
        layer.lora = LoRA(model.config, lora).to(weight.device, weight.dtype)


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute scale · B A in at least fp32: the change of a weight (outputs, inputs)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return scale * (b.to(wide) @ a.to(wide))


@torch.no_grad()
def merged_state(block: Block) -> Mapping[str, Tensor]:
    """Return a block's state dict with its adapters added to the weights."""
    state = {name: tensor for name, tensor in block.state_dict().items() if not name.startswith("lora.")}
    if block.lora is None:
        return state
    tensors = block.lora.tensors()
    changes = {part: delta(a, b, tensors.scale) for part, a, b in zip(tensors.parts, tensors.a, tensors.b, strict=True)}
    for ours in MERGED:
        names, dim = LAYER[ours]
        parts = parts_of(ours, state[ours])
        targets = [name.split(".")[1] for name in names]
        new = [part + changes[t] if t in changes else part for t, part in zip(targets, parts, strict=True)]
        state[ours] = torch.cat(new, dim).to(state[ours].dtype)
    return state
