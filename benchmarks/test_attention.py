"""Causal attention on slices of a packed buffer, at phi-small's shape and at phi-1.5's length.

FLOPs count the causal half: two products forward, five backward (the scores are computed again).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.phi.modeling_phi import eager_attention_forward

from benchmarks import sizes
from benchmarks.harness import Results
from benchmarks.ops import DTYPES, Cost, Op, leaf, measure
from benchmarks.peers import NOT_COMPILED, absent, backends, compiled, peer
from benchmarks.timing import device
from phi_fast.kernels import attention

pytestmark = pytest.mark.usefixtures("kept_memory")

HEAD_DIM = 64
ONLY_ON_A_GPU = "a back end of torch's for GPUs"
SHAPES = (
    {"sequence 2048": (4, 2048, 32), "sequence 512": (16, 512, 32)}
    if sizes.GPU
    else {"sequence 512": (4, 512, 8), "sequence 2048": (1, 2048, 8)}
)
"""Name -> (batch, sequence, heads). On a GPU phi-1.5's heads and 8192 tokens, which fill its multiprocessors; on a CPU
phi-small's shape, and phi-1.5's length."""


def by_head(packed: Tensor) -> list[Tensor]:
    """Views q, k, v (batch, heads, sequence, head_dim)."""
    return [x.transpose(1, 2) for x in packed.unbind(2)]


def eager(packed: Tensor) -> Tensor:
    """Attention by its formula, with all scores in memory."""
    q, k, v = by_head(packed)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sdpa(packed: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*by_head(packed), is_causal=True).transpose(1, 2)


class Module(nn.Module):
    """The attributes that transformers' attention functions read from the module that calls them."""

    num_key_value_groups, is_causal = 1, True


def chosen_sdpa(backend: SDPBackend, packed: Tensor) -> Tensor:
    """torch's SDPA by one of its back ends alone."""
    with sdpa_kernel(backend):
        return sdpa(packed)


def transformers_sdpa(packed: Tensor) -> Tensor:
    return sdpa_attention_forward(Module(), *by_head(packed), None, scaling=HEAD_DIM**-0.5)[0]


def transformers_eager(packed: Tensor, mask: Tensor) -> Tensor:
    return eager_attention_forward(Module(), *by_head(packed), mask, HEAD_DIM**-0.5)[0]


def flash_attn(packed: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(packed, causal=True)


@pytest.mark.parametrize("dtype", sizes.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: str, dtype: str, full: bool, results: Results) -> None:
    where = device()
    batch, sequence, heads = SHAPES[shape] if full else (1, 32, 2)
    packed = leaf(batch, sequence, 3, heads, HEAD_DIM, dtype=DTYPES[dtype], device=where)
    dout = torch.randn_like(packed[:, :, 0])
    mask = torch.full((1, 1, sequence, sequence), torch.finfo(dout.dtype).min, dtype=dout.dtype, device=where).triu(1)

    def of(function: Callable[[Tensor], Tensor], note: str = "") -> Op:
        return Op(lambda: function(packed), [packed], note=note)

    fast = compiled(eager, full and (shape == "sequence 512" or sizes.GPU))
    ops: dict[str, Op | str] = {
        label: Op(lambda: attention(*packed.unbind(2)), [packed], backend=("attention", name))
        for label, name in backends("attention", where).items()
    }
    ops |= {
        "torch SDPA": of(sdpa, "also litgpt's"),
        "torch SDPA flash": of(lambda x: chosen_sdpa(SDPBackend.FLASH_ATTENTION, x)) if sizes.GPU else ONLY_ON_A_GPU,
        "torch SDPA cuDNN": of(lambda x: chosen_sdpa(SDPBackend.CUDNN_ATTENTION, x)) if sizes.GPU else ONLY_ON_A_GPU,
        "torch eager": of(eager),
        "torch.compile": of(fast) if fast else NOT_COMPILED if not full else "measured at sequence 512",
        "transformers sdpa": of(transformers_sdpa),
        "transformers eager": of(lambda x: transformers_eager(x, mask)),
        "flash-attn": peer("flash_attn", lambda: of(flash_attn)),
        "Liger-Kernel": absent("liger_kernel") or "has no attention over all keys",
    }
    product = batch * heads * sequence**2 * HEAD_DIM  # 2 FLOPs for half of the pairs
    costs = (Cost(flops=2 * product), Cost(flops=5 * product))
    config = {"batch": batch, "sequence": sequence, "heads": heads, "head dim": HEAD_DIM}
    measure(f"attention, {shape}, {dtype}", ops, dout, results, costs=costs, config=config, full=full)
