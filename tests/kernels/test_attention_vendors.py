"""Adapters to other libraries' attention, which need a GPU and packages that are not here: tested on stand-ins.

The stand-ins have the signatures of FlashAttention-3 (hopper/flash_attn_interface.py), of flash-attn-4 4.0.0b36
(flash_attn/cute/interface.py) and of torch's cuDNN ops, and compute in plain PyTorch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from phi_fast.kernels import BackendUnavailable, attention, backend, use
from phi_fast.kernels.reference import attention as reference
from phi_fast.kernels.reference.attention import AttentionOptions

VENDOR = "phi_fast.kernels.vendor"


def plain_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of (batch, S, heads, D), or of joined documents (T, heads, D)."""
    joined = q.dim() == 3
    given = [x[None] if joined else x for x in (q, k, v)]
    out, lse = reference.forward(*given, plain_options(**options))
    return (out[0], lse[0]) if joined else (out, lse)


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    joined = q.dim() == 3
    given = [x[None] if joined else x for x in (dout, q, k, v, out, lse)]
    gradients = [torch.empty_like(x) for x in given[1:4]]
    reference.backward(*given, plain_options(**options), **dict(zip(("dq", "dk", "dv"), gradients, strict=True)))
    return tuple(x[0] if joined else x for x in gradients)


def plain_options(scale: float, causal: bool, window: tuple[int, int], documents: Tensor | None) -> AttentionOptions:
    assert documents is None or documents.dtype == torch.int32
    return AttentionOptions(scale, causal, None if window == (-1, -1) else window, documents)


# fmt: off
class FlashAttention3:
    """The signatures of commit c082294e, without their contents."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):
        unused = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
        assert all(x is None for x in (*unused, rotary_cos, rotary_sin, seqlens_rotary, q_descale))
        assert (cu_seqlens_q is None) == (max_seqlen_q is None) == (max_seqlen_k is None)
        assert cu_seqlens_q is cu_seqlens_k
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "documents": cu_seqlens_q}
        return *plain_forward(q, k, v, **options), None

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):
        assert deterministic and sequed_q is sequed_k is None and cu_seqlens_q is cu_seqlens_k
        assert all(x.is_contiguous() for x in (dq, dk, dv))
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "documents": cu_seqlens_q}
        for target, x in zip((dq, dk, dv), plain_backward(dout, q, k, v, out, softmax_lse, **options), strict=True):
            target.copy_(x)
        return dq, dk, dv, None


class LaterFlashAttention3:
    """Windows as two numbers, other orders, and a function that torch.library wraps."""

    @staticmethod
    def _flash_attn_backward(
        q, k, v, dout, out, softmax_lse, dq=None, dk=None, dv=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1, cu_seqlens_q=None, cu_seqlens_k=None, deterministic=False,
    ):
        options = {"scale": softmax_scale, "causal": causal, "documents": cu_seqlens_q}
        options["window"] = (window_size_left, window_size_right)
        for target, x in zip((dq, dk, dv), plain_backward(dout, q, k, v, out, softmax_lse, **options), strict=True):
            target.copy_(x)

    class _Registered:
        """As torch.library.custom_op's result: callable by any arguments, with the function inside."""

        @staticmethod
        def _init_fn(
            q, k, v, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, cu_seqlens_q=None,
            cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        ):
            options = {"scale": softmax_scale, "causal": causal, "documents": cu_seqlens_q}
            return plain_forward(q, k, v, **options, window=(window_size_left, window_size_right))

        def __call__(self, *args, **kwargs):
            return self._init_fn(*args, **kwargs)

    _flash_attn_forward = _Registered()


class FlashAttention4:
    """The signatures of 4.0.0b36, as far as the adapter uses them, without their contents."""

    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, return_lse=False,
    ):
        assert return_lse and qv is None and cu_seqlens_q is cu_seqlens_k
        window = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
        options = {"scale": softmax_scale, "causal": causal, "window": window, "documents": cu_seqlens_q}
        return *plain_forward(q, k, v, **options), None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False,
    ):
        assert deterministic and cu_seqlens_q is cu_seqlens_k
        window = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
        options = {"scale": softmax_scale, "causal": causal, "window": window, "documents": cu_seqlens_q}
        return plain_backward(dout, q, k, v, out, lse, **options)
# fmt: on


class CuDNN:
    """torch.ops.aten with cuDNN's ops, whose arguments are bound by the ops' own schemas."""

    @staticmethod
    def bound(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        schema = getattr(torch.ops.aten, name).default._schema
        names = [argument.name for argument in schema.arguments]
        return {**dict(zip(names, arguments, strict=False)), **{key: keywords[key] for key in keywords if key in names}}

    def _scaled_dot_product_cudnn_attention(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        given = self.bound("_scaled_dot_product_cudnn_attention", arguments, keywords)
        assert given["attn_bias"] is None and given["compute_log_sumexp"] and given["dropout_p"] == 0
        heads = [given[name].transpose(1, 2) for name in ("query", "key", "value")]
        out, lse = plain_forward(
            *heads, scale=given["scale"], causal=given["is_causal"], window=(-1, -1), documents=None
        )
        return out.transpose(1, 2), lse[..., None], None, None, 0, 0, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        given = self.bound("_scaled_dot_product_cudnn_attention_backward", arguments, keywords)
        assert given["logsumexp"].dim() == 4 and given["dropout_p"] == 0
        assert (given["max_q"], given["max_k"]) == (given["query"].shape[2], given["key"].shape[2])
        names = ("grad_out", "query", "key", "value", "out")
        heads = [given[name].transpose(1, 2) for name in names]
        options = {"scale": given["scale"], "causal": given["is_causal"], "window": (-1, -1), "documents": None}
        gradients = plain_backward(*heads, given["logsumexp"][..., 0], **options)
        return tuple(gradient.transpose(1, 2) for gradient in gradients)


@dataclass(frozen=True)
class Vendor:
    name: str
    install: Callable[[pytest.MonkeyPatch], None]
    everything: bool = True
    """It takes documents, windows and grouped heads."""


def flash_attention_3(stand_in: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(sys.modules, "flash_attn_interface", stand_in)


def flash_attention_4(patch: pytest.MonkeyPatch) -> None:
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    package.__path__ = cute.__path__ = []
    cute.interface = FlashAttention4  # type: ignore[attr-defined]
    modules = {"flash_attn": package, "flash_attn.cute": cute, "flash_attn.cute.interface": FlashAttention4}
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)


def cudnn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend.module("cudnn", "attention"), "_aten", CuDNN())


VENDORS = {
    "FlashAttention-3": Vendor("flash-attn-3", flash_attention_3(FlashAttention3)),
    "a later FlashAttention-3": Vendor("flash-attn-3", flash_attention_3(LaterFlashAttention3)),
    "FlashAttention-4": Vendor("flash-attn-4", flash_attention_4),
    "cuDNN": Vendor("cudnn", cudnn, everything=False),
}
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "rotation": {"rotary": 8},
    "documents, rotation": {"documents": [0, 5, 5, 20], "rotary": 4},
    "window": {"window": (3, 0)},
    "a window without a limit ahead": {"window": (3, -1), "causal": False},
    "grouped": {"key_heads": 2},
}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The adapters are imported anew, and forgotten with their stand-ins."""
    names = [f"{VENDOR}.{name}_attention" for name in ("flash_attn_3", "flash_attn_4")]
    for name in names:
        sys.modules.pop(name, None)
    yield
    for name in names:
        sys.modules.pop(name, None)


def run(kernels: Any, case: dict[str, Any]) -> list[Tensor]:
    """(out, lse, dq, dk, dv) on slices of packed buffers."""
    generator = torch.Generator().manual_seed(0)
    length, heads, key_heads, head_dim = 20, 4, case.get("key_heads", 4), 16
    batch, half = (1 if "documents" in case else 2), case.get("rotary", 0) // 2

    def packed() -> list[Tensor]:
        x = torch.randn(batch, length, (heads + 2 * key_heads) * head_dim, generator=generator)
        widths = [n * head_dim for n in (heads, key_heads, key_heads)]
        return [part.unflatten(-1, (-1, head_dim)) for part in x.split(widths, -1)]

    (q, k, v), (dq, dk, dv) = packed(), packed()
    dout, out = (torch.randn(batch, length, heads, head_dim, generator=generator) for _ in range(2))
    tables = [torch.randn(length, half, generator=generator) for _ in range(2)] if half else [None, None]
    documents = torch.tensor(case["documents"], dtype=torch.int32) if "documents" in case else None
    options = AttentionOptions(0.25, case.get("causal", True), case.get("window"), documents, *tables)
    result, lse = kernels.forward(q, k, v, options, out=out)
    assert result is out
    again, _ = kernels.forward(q, k, v, options)
    torch.testing.assert_close(again, out)
    kernels.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)
    return [out, lse, dq, dk, dv]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vendor", VENDORS)
def test_an_adapter_gives_attention(vendor: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = VENDORS[vendor]
    given.install(monkeypatch)
    kernels = backend.module(given.name, "attention")
    if not given.everything and case not in ("causal", "full", "rotation"):
        with pytest.raises(ValueError, match=r"cudnn takes no documents, no window, .*use\('triton'"):
            run(kernels, CASES[case])
        return
    for x, y in zip(run(kernels, CASES[case]), run(reference, CASES[case]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("flash-attn-3", "flash_attn_interface", "build it from hopper/"),
        ("flash-attn-4", "flash_attn", "pip install --pre flash-attn-4"),
    ],
)
def test_a_library_that_is_missing_is_named(
    name: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    x = torch.zeros(1, 4, 2, 16)
    with use(name, op="attention"), pytest.raises(BackendUnavailable, match=message):
        attention(x, x, x)


@pytest.mark.usefixtures("forgotten")
def test_a_version_without_a_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(_flash_attn_forward=lambda q, k, v, scale, causal: None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    x = torch.zeros(1, 4, 2, 16)
    with use("flash-attn-3", op="attention"), pytest.raises(BackendUnavailable, match="has no parameter softmax_scale"):
        attention(x, x, x)


def test_every_vendor_has_a_module_for_what_it_offers() -> None:
    for name, ops in backend.VENDORS.items():
        for op in ops:
            spec = importlib.util.find_spec(f"{VENDOR}.{name.replace('-', '_')}_{op}")
            assert spec is not None, (name, op)


def test_repeatable_vendors_are_asked_for_it() -> None:
    """`auto` may choose those whose backward is told to give the same bits in every run."""
    for name in backend.REPEATABLE:
        spec = importlib.util.find_spec(f"{VENDOR}.{name.replace('-', '_')}_attention")
        assert spec is not None and spec.loader is not None
        source = spec.loader.get_source(spec.name)  # type: ignore[attr-defined]
        assert "deterministic=True" in source.replace('"deterministic": True', "deterministic=True")
    assert "deterministic" not in inspect.getsource(backend.module("cudnn", "attention"))
