"""Attention in Triton: head dims 64, 80, 96, 128; fp16, bf16, fp32; the rotation, where asked for, inside the loads.

Bytes: forward, q, k, v and out once per pass, and k and v again for every block of rows that L2 does not serve;
backward, dq reads dout, out, q, k, v and writes dq and delta; dk and dv read dout, q, k, v and write dk and dv.

Rotating inside saves the pass of 4d bytes per token each way, and costs registers and arithmetic: every block of rows
rotates the keys again. Compiled for sm_90 it takes the forward from 128 to 177 registers per thread. Which is faster on
a GPU was not measured; `fuse_rotary` chooses.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.attention import AttentionOptions
from .attention_backward import dkv_kernel, dq_kernel
from .attention_forward import forward_kernel
from .attention_tiles import HEAD_DIMS, KERNELS, Tile, architecture, case_of, mask_of, tile
from .common import Launch, fp32_precision, next_power_of_2
from .launching import launch

_KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
_OPERANDS = {
    "forward": ("q", "k", "v", "out", "lse"),
    "dq": ("dout", "q", "k", "v", "lse", "delta", "out", "dq"),
    "dkv": ("dout", "q", "k", "v", "lse", "delta", "dk", "dv"),
}
_MOVED = {"forward": ("k", "v"), "dq": ("k", "v"), "dkv": ("q", "dout")}
"""Operands that a kernel reads block after block: by descriptors, where its tile says so."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.attention.forward`. Raises ValueError or TypeError for what the kernels were not
    written for."""
    _check(q, options)
    batch, sequence, heads, _ = q.shape
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((batch, heads, sequence), dtype=torch.float32)
    if not k.numel():
        out.zero_()
        lse.fill_(-math.inf)
    elif q.numel():
        launch(_describe, "forward", _tile("forward", q, k, options), fp32_precision(), options, q, k, v, out, lse)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Same contract as `reference.attention.backward`; two runs give the same bits."""
    _check(q, options)
    delta = torch.empty_like(lse)
    if not (q.numel() and k.numel()):
        for gradient in (dq, dk, dv):
            gradient.zero_()
    else:
        precision, read = fp32_precision(), (dout, q, k, v, lse, delta)
        launch(_describe, "dq", _tile("dq", q, k, options), precision, options, *read, out, dq)  # writes delta for dkv
        launch(_describe, "dkv", _tile("dkv", q, k, options), precision, options, *read, dk, dv)


def _tile(name: str, q: Tensor, k: Tensor, options: AttentionOptions) -> Tile:
    """The tile of kernel `name`: as measured on this GPU, or as chosen by hand."""
    rotary, documents = options.cos is not None, options.cu_seqlens is not None
    by_hand = tile(name, architecture(q.device), q.shape[3], q.element_size(), rotary, documents)
    return KERNELS[name].tile(q.device, by_hand, case_of, q, k, options)


def _describe(name: str, chosen: Tile, precision: str, options: AttentionOptions, *operands: Tensor) -> Launch:
    """Describe the launch of kernel `name` on its `_OPERANDS`, with the tile that was chosen."""
    scale, causal, _, cu_seqlens, cos, sin = options
    kernel = _KERNELS[name]
    tensors = dict(zip(_OPERANDS[name], operands, strict=True))
    q, k = tensors["q"], tensors["k"]
    batch, sequence, heads, head_dim = q.shape
    keys, key_heads = k.shape[1:3]
    banded, least, most = mask_of(q, k, options)
    programs, block = (batch * key_heads, chosen.n) if name == "dkv" else (batch * heads, chosen.m)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    arguments = {
        **{f"{name}_pointer": tensor for name, tensor in tensors.items()},
        **{
            f"stride_{name}_{axis}": stride
            for name, tensor in tensors.items()
            for axis, stride in zip("bsh", tensor.stride(), strict=False)
        },
        "cos": cos,
        "sin": sin,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "documents": documents,
        "search_steps": max(documents - 1, 0).bit_length(),  # of a binary search among the documents
        "heads": heads,
        "key_heads": key_heads,
        "sequence": sequence,
        "keys": keys if banded else None,
        "least": least if banded else None,
        "most": most if banded else None,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
    }
    width = next_power_of_2(head_dim)
    moved, rows = _MOVED[name], chosen.m if name == "dkv" else chosen.n
    descriptors = chosen.descriptors and all(_describable(tensors[operand]) for operand in moved)
    if descriptors:
        for operand in moved:
            described = TensorDescriptor.from_tensor(tensors[operand], [1, rows, 1, width])
            arguments[f"{operand}_pointer"] = described
    return Launch(
        kernel=kernel,
        grid=(triton.cdiv(keys if name == "dkv" else sequence, block) * programs,),
        arguments={name: value for name, value in arguments.items() if name in kernel.arg_names},
        constants={
            "GROUP": heads // key_heads,
            "D": head_dim,
            "WIDTH": width,
            "HALF": 0 if cos is None else cos.shape[1],
            "CAUSAL": causal and not banded,
            "VARLEN": cu_seqlens is not None,
            "BANDED": banded,
            "PRECISION": precision,
            "M": chosen.m,
            "N": chosen.n,
            "DESCRIPTORS": descriptors,
        },
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        tile=chosen,
    )


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can say where x lies: every row on 16 bytes, none of them twice (CUDA driver API,
    cuTensorMapEncodeTiled). Other tensors are read by pointers, whatever the tile says."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _check(q: Tensor, options: AttentionOptions) -> None:
    head_dim = q.shape[3]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"attention in Triton takes float16, bfloat16 or float32, not {q.dtype}; use('reference', op='attention')"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"attention in Triton takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}; "
            "use('sdpa' or 'reference', op='attention')"
        )
    cos, sin = options.cos, options.sin
    if cos is None or sin is None:
        return
    half = cos.shape[1]
    if half == 0 or half & (half - 1) or 2 * half > head_dim:
        raise ValueError(
            f"attention in Triton rotates 2 * 2**n dims, not {2 * half} of {head_dim}; call apply_rotary_ before it "
            "and leave cos and sin out"
        )
    if not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"cos and sin have strides {cos.stride()} and {sin.stride()}; expected contiguous tables")
