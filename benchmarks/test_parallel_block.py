"""One phi block, forward and backward, with the same weights in every implementation.

FLOPs: the matrix products with Wq, Wk, Wv, dense, fc1 and fc2 (12 d² weights) and causal attention; the backward has
twice as many, and computes attention's scores again. "products and SDPA alone" is the part that no packing or fusing
can remove.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import sizes
from benchmarks.harness import Results
from benchmarks.models import hugging_face, litgpt, small
from benchmarks.ops import DTYPES, Cost, Op, leaf, measure
from benchmarks.peers import NOT_COMPILED, absent, compiled, peer
from benchmarks.subjects import Contender
from benchmarks.timing import device
from phi_fast import Phi, PhiConfig
from phi_fast.model.merged import to_split
from phi_fast.model.reference import ReferencePhi, rotary_cos_sin

pytestmark = pytest.mark.usefixtures("kept_memory")

ALONE = "products and SDPA alone"


def ours(model: Phi, x: Tensor) -> Op:
    block = model.layers[0]
    return Op(lambda: block(x, model.cos, model.sin, "norm_gelu"), [x, *block.parameters()])


def plain(model: Phi, x: Tensor) -> Op:
    """The reference model's block."""
    reference = ReferencePhi(model.config).to(x.device, x.dtype)
    reference.load_state_dict(to_split(model.state_dict()))
    block = reference.model.layers[0]
    cos, sin = rotary_cos_sin(model.config, x.shape[1], x.device, x.dtype)
    return Op(lambda: block(x, cos, sin), [x, *block.parameters()])


def transformers(model: Phi, x: Tensor, compile: Callable[[nn.Module], nn.Module | None]) -> Op | str:
    theirs = hugging_face(model.config).to(x.device, x.dtype)
    theirs.load_state_dict(to_split(model.state_dict()))
    positions = torch.arange(x.shape[1], device=x.device)[None]
    tables = theirs.model.rotary_emb(x, positions)
    block = compile(theirs.model.layers[0])
    if block is None:
        return NOT_COMPILED
    parameters = list(theirs.model.layers[0].parameters())
    return Op(lambda: block(x, position_embeddings=tables, position_ids=positions), [x, *parameters])


def litgpt_block(model: Phi, x: Tensor) -> Op:
    theirs = litgpt(model.config).to(x.device, x.dtype)
    block = theirs.transformer.h[0]
    split = to_split(model.state_dict())
    names = {"input_layernorm": "norm_1", "self_attn.dense": "attn.proj", "mlp.fc1": "mlp.fc", "mlp.fc2": "mlp.proj"}
    state = {}
    for part in ("weight", "bias"):
        qkv = [split[f"model.layers.0.self_attn.{name}_proj.{part}"] for name in "qkv"]
        state[f"attn.qkv.{part}"] = torch.cat(qkv)
        state |= {f"{new}.{part}": split[f"model.layers.0.{old}.{part}"] for old, new in names.items()}
    block.load_state_dict(state)
    cos, sin = (table[None, : x.shape[1]].to(x) for table in (theirs.cos, theirs.sin))
    return Op(lambda: block(x, cos, sin), [x, *block.parameters()])


def alone(config: PhiConfig, x: Tensor, costs: tuple[Cost, Cost]) -> tuple[dict, dict]:
    """The block's merged matrix products and torch's SDPA, on buffers of the same shapes."""
    d, tokens = config.hidden_size, x.shape[0] * x.shape[1]
    h, packed, mixed, w_in, w_out = (
        torch.randn(*shape, device=x.device).to(x.dtype)
        for shape in ((tokens, d), (tokens, 7 * d), (tokens, 5 * d), (7 * d, d), (d, 5 * d))
    )
    heads = (x.shape[0], config.num_attention_heads, x.shape[1], config.head_dim)
    q, k, v = (leaf(*heads, dtype=x.dtype, device=x.device) for _ in range(3))
    gradient = torch.randn_like(q)
    graph = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward() -> None:
        torch.mm(h, w_in.T)
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.mm(mixed, w_out.T)

    def backward() -> None:
        torch.mm(h, w_out)
        torch.autograd.grad(graph, (q, k, v), gradient, retain_graph=True)
        torch.mm(packed, w_in)
        torch.mm(packed.T, h)
        torch.mm(h.T, mixed)

    return {ALONE: Contender(forward, flops=costs[0].flops)}, {ALONE: Contender(backward, flops=costs[1].flops)}


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_parallel_block(dtype: str, full: bool, results: Results) -> None:
    where = device()
    config = PhiConfig.preset("phi-small" if where.type == "cpu" else "phi-1.5")
    config = (config if full else small(config)).replace(num_hidden_layers=1, vocab_size=512)
    rows = 4 if full else 1
    torch.manual_seed(0)
    model = Phi(config).to(where, DTYPES[dtype])
    d, length = config.hidden_size, config.max_position_embeddings
    x = leaf(rows, length, d, dtype=DTYPES[dtype], device=where)
    ops: dict[str, Op | str] = {
        "phi_fast": ours(model, x),
        "torch eager": plain(model, x),
        "transformers": transformers(model, x, lambda block: block),
        "transformers torch.compile": transformers(model, x, lambda block: compiled(block, full)),
        "litgpt": peer("litgpt", lambda: litgpt_block(model, x)),
        "Liger-Kernel": absent("liger_kernel") or "does not cover phi",
    }
    products = 2 * rows * length * 12 * d**2
    scores = rows * length**2 * d  # per product, 2 FLOPs for half of the pairs
    costs = (Cost(flops=products + 2 * scores), Cost(flops=2 * products + 5 * scores))
    measure(
        f"parallel_block, {dtype}",
        ops,
        torch.randn_like(x),
        results,
        costs=costs,
        config={"batch": rows, "sequence": length, "width": d},
        full=full,
        repeats=9,
        budget=8,
        more=alone(config, x, costs),
    )
