"""Attention by FlashAttention-3 (the folder hopper/ of https://github.com/Dao-AILab/flash-attention): sm_90, 16 bits.

Called below its autograd, so that out and log-sum-exp are saved once. It does not rotate: q and k are copied and
rotated first.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..backend import BackendUnavailable
from ..reference.attention import AttentionOptions
from .rotation import rotated, turn_back_

try:
    import flash_attn_interface as _flash
except ImportError as error:
    raise BackendUnavailable(
        "attention: FlashAttention-3 cannot be imported: build it from hopper/ of "
        "https://github.com/Dao-AILab/flash-attention, or use('auto', op='attention')"
    ) from error


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.attention.forward`."""
    joined = options.cu_seqlens is not None
    tensors = zip("qkv", (*rotated(q, k, options), v), strict=True)
    operands = {name: x[0] if joined else x for name, x in tensors}
    result, lse, *_ = _call("_flash_attn_forward", q.shape[1], options, **operands)
    result, lse = (result[None], lse[None]) if joined else (result, lse)
    return (result if out is None else out.copy_(result)), lse


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
    """Same contract as `reference.attention.backward`, by its deterministic mode."""
    joined = options.cu_seqlens is not None
    turned = rotated(q, k, options)
    tensors = {"dout": dout, "q": turned[0], "k": turned[1], "v": v, "out": out, "softmax_lse": lse}
    made = {name: x.new_empty(x.shape) for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}  # it wants contiguous ones
    operands = {name: x[0] if joined else x for name, x in {**tensors, **made}.items()}
    _call("_flash_attn_backward", q.shape[1], options, **operands, deterministic=True)
    for target, gradient in zip((dq, dk, dv), made.values(), strict=True):
        target.copy_(gradient)
    turn_back_(dq, dk, options)


def _call(name: str, length: int, options: AttentionOptions, **given: Any) -> Any:
    """Call one of its functions by the names of its parameters, which versions order and group differently; a parameter
    without a default that is not given is None."""
    scale, causal, window, cu_seqlens, *_ = options
    left, right = window or (-1, -1)
    known = {"softmax_scale": scale, "causal": causal, "window_size": (left, right)}
    known |= {"window_size_left": left, "window_size_right": right, **given}
    if cu_seqlens is not None:  # the longest document's length would wait for the device; the joined length is a bound
        known |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens)
        known |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), length)
    function = getattr(_flash, name)
    # Newer versions register their functions with torch.library, which keeps the Python function here.
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    missing = sorted({"softmax_scale", "causal", *given} - parameters.keys())
    if missing:
        raise BackendUnavailable(
            f"attention: {name} of this FlashAttention-3 has no parameter {', '.join(missing)}: install another "
            "version, or use('auto', op='attention')"
        )
    none = {name: None for name, parameter in parameters.items() if parameter.default is parameter.empty}
    return function(**{**none, **{name: value for name, value in known.items() if name in parameters}})
