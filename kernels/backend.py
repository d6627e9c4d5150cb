"""Which implementation runs an op.

Every op has the same primitives, under the same names, in one module per back end: `reference/rotary.py`,
`triton/rotary.py`, `cpp/rotary.py`. The public op (`rotary.py`) checks its arguments, owns autograd, and asks
`implementation(...)` here for the module to call. Nothing falls back in silence: `auto` is a fixed choice by device
that `in_use` prints (attention's may be measured: `attention_for`), and a back end that was named and cannot run raises
`BackendUnavailable` with the way out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tuned

if TYPE_CHECKING:
    from .reference.attention import AttentionOptions

OPS = ("rotary", "layer_norm", "bias_gelu", "gated_activation", "attention", "linear_cross_entropy", "adam", "muon")
"""The public ops."""

PRODUCTS = ("weight_gradient",)
"""Matrix products inside the ops, which are chosen in the same way. "reference" is torch's own product."""

BACKENDS = {"triton": OPS, "cpp": (*OPS, *PRODUCTS), "reference": (*OPS, *PRODUCTS)}
"""This project's back ends, and what each offers. On a GPU torch's products (cuBLAS) run beside Triton's kernels."""

ROTARY_INSIDE = {"triton": False, "cpp": True}
"""Back ends whose attention can apply RoPE while it reads q and k, and whether `parallel_block` lets it by default."""

LOGITS_ON_CHIP = ("triton", "reference")
"""Back ends with a product of linear_cross_entropy that stores no logits (the reference stores them, to compare)."""

VENDORS = {
    **dict.fromkeys(("sdpa", "cudnn", "flash-attn", "flash-attn-3", "flash-attn-4"), ("attention",)),
    "apex": ("layer_norm", "adam"),
}
"""Other libraries' kernels, and what each offers."""

REPEATABLE = ("flash-attn", "flash-attn-3", "flash-attn-4")
"""Vendors whose attention gives the same bits in every run, as `attention` promises: `auto` may choose these only."""


class BackendUnavailable(RuntimeError):
    """The back end that was asked for cannot run here; the message says what to do."""


def isa_problem() -> str | None:
    """Return the error that the first op in C++ would raise for PHI_FAST_ISA; None if its value is usable."""
    from phi_fast._C import cpu

    try:
        cpu.isa()
    except ValueError as error:
        return str(error)
    return None


_chosen: dict[str, Any] = {**dict.fromkeys((*OPS, *PRODUCTS), "auto"), "rotary_inside": None, "on_chip": False}


class _Choice:
    """What `use` returns: the choice already holds; as a context manager it restores the previous one at the end."""

    def __init__(self, previous: dict[str, Any]) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _chosen.update(self._previous)


def use(backend: str, op: str | None = None) -> _Choice:
    """Choose the back end for every op, or for one.

    `use("reference")` switches the whole library; `use("triton", op="attention")` switches one op. The choice holds
    from the call on; in a `with` statement it ends with the block. `backend` is "auto", "triton", "cpp", "reference",
    or, for the ops that `VENDORS` names, "sdpa", "cudnn", "flash-attn", "flash-attn-3", "flash-attn-4" or "apex".

    Raises ValueError for a name that does not exist or does not offer the op.
    """
    offered = {**BACKENDS, **VENDORS}.get(backend, (*OPS, *PRODUCTS))
    if op is not None and op not in (*OPS, *PRODUCTS):
        raise ValueError(f"op {op!r} is not one of {', '.join((*OPS, *PRODUCTS))}")
    if backend not in ("auto", *BACKENDS, *VENDORS):
        raise ValueError(f"backend {backend!r} is not one of {', '.join(('auto', *BACKENDS, *VENDORS))}")
    if backend in VENDORS and op not in offered:
        raise ValueError(f"backend {backend!r} offers only op={' or op='.join(map(repr, offered))}, not op={op!r}")
    if op is not None and op not in offered:
        raise ValueError(
            f"backend {backend!r} has no op={op!r}: matrix products are torch's; use('reference', op={op!r})"
        )
    names = (*OPS, *PRODUCTS) if op is None else (op,)
    return _choose({name: backend if name in offered else "reference" for name in names})


def _choose(chosen: dict[str, Any]) -> _Choice:
    previous = {name: _chosen[name] for name in chosen}
    _chosen.update(chosen)
    return _Choice(previous)


def fuse_rotary(inside: bool | None) -> _Choice:
    """Choose what applies RoPE in `parallel_block` and accelerated phi models.

    inside: True: attention, while it reads q and k; False: a pass over q and k before it; None: the default of
    attention's back end, which is True in C++ and False in Triton, where it costs registers and was not measured on a
    GPU. Attention of other libraries cannot do it: True then raises ValueError when the op runs.

    The choice holds as `use`'s does.
    """
    return _choose({"rotary_inside": inside})


def keep_logits_on_chip(keep: bool) -> _Choice:
    """Choose how `linear_cross_entropy` forms losses where it forms no gradient: in evaluation, and in the forward pass
    of `reduction="none"`.

    keep: True: one Triton kernel multiplies and sums, and stores no logits; False, the default: chunk by chunk, by
    torch's products. The kernel was not measured on a GPU. Gradients always come from chunks: the logits would have to
    be formed twice. There is no such kernel in C++: True then raises ValueError when the op runs.

    The choice holds as `use`'s does.
    """
    return _choose({"on_chip": keep})


def logits_stay_on_chip(device: torch.device | str) -> bool:
    """What `keep_logits_on_chip` chose. Raises ValueError where the back end on `device` cannot."""
    backend, chosen = name("linear_cross_entropy", device), _chosen["on_chip"]
    if chosen and backend not in LOGITS_ON_CHIP:
        raise ValueError(f"backend {backend!r} cannot keep logits on the chip; call keep_logits_on_chip(False)")
    return chosen


def logits_stay_in_cache(device: torch.device | str, dtype: torch.dtype, *, gradients: bool) -> bool:
    """Whether linear_cross_entropy forms logits in blocks that stay in a CPU's cache, not stored in chunks:
    in C++, with every option, for bf16 on AMX and, without gradients, on AVX-512 BF16.

    `use("reference", op="weight_gradient")` switches it off: the products are then torch's, on chunks of logits.
    """
    if any(name(op, device) != "cpp" for op in ("linear_cross_entropy", "weight_gradient")):
        return False
    return module("cpp", "linear_cross_entropy").stores_no_logits(dtype, gradients=gradients)


def rotary_inside(device: torch.device | str) -> bool:
    """What `fuse_rotary` chose, or the default of the back end that runs attention on `device`."""
    backend, chosen = name("attention", device), _chosen["rotary_inside"]
    if chosen and backend not in ROTARY_INSIDE:
        raise ValueError(f"backend {backend!r} cannot apply RoPE inside attention; call fuse_rotary(None)")
    return ROTARY_INSIDE.get(backend, False) if chosen is None else chosen


def name(op: str, device: torch.device | str) -> str:
    """The back end that runs `op` on `device` now: never "auto"."""
    chosen = _chosen[op]
    if chosen != "auto":
        return chosen
    if torch.device(device).type != "cuda":
        return "cpp"
    return "triton" if op in BACKENDS["triton"] else "reference"


def in_use(device: torch.device | str) -> dict[str, str]:
    """Op -> back end on `device`, for headers and logs."""
    return {op: name(op, device) for op in (*OPS, *PRODUCTS)}


def tiles(device: torch.device | str) -> str:
    """Where the tiles of Triton's kernels on `device` come from, in words: measured there by `phi_fast.kernels.tune`,
    or chosen by hand; and why a table of measurements is not used."""
    where = torch.device(device)
    return tuned.of(where).note if where.type == "cuda" else tuned.BY_HAND


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module whose primitives run `op` on `device`. Raises BackendUnavailable where it cannot run."""
    backend = name(op, device)
    if backend == "triton":
        _require_triton(op, device)
    if backend == "cpp" and device.type != "cpu":
        raise BackendUnavailable(
            f"{op}: backend 'cpp' runs on CPU tensors, these are on {device}; use('triton', op={op!r})"
        )
    return module(backend, op)


def module(backend: str, op: str) -> ModuleType:
    """The module of a back end's primitives for `op`. Raises BackendUnavailable where its library is missing."""
    name = f"vendor.{backend.replace('-', '_')}_{op}" if backend in VENDORS else f"{backend}.{op}"
    return importlib.import_module(f"{__package__}.{name}")


def attention_for(q: Tensor, k: Tensor, options: AttentionOptions) -> ModuleType:
    """The module whose primitives run attention of these tensors.

    Where `use` chose none and `phi_fast.kernels.tune` measured this case on this GPU, it is the fastest of those that
    give the same bits in every run (`REPEATABLE`); else `implementation`'s.
    """
    if q.device.type == "cuda" and _chosen["attention"] == "auto" and (measured := _measured(tuned.of(q.device))):
        from .triton.attention_tiles import case_of

        fastest = measured.get(case_of(q, k, options))
        if fastest is not None:
            return fastest
    return implementation("attention", q.device)


@lru_cache(maxsize=64)
def _measured(table: tuned.Table) -> dict[Any, ModuleType]:
    """Case -> module of the vendor that was the fastest; a vendor that cannot be used any more is a warning."""
    if not table.document.get("backends"):
        return {}
    from .triton.attention_tiles import Case

    found = {}
    for case, fastest in table.backends("attention", Case).items():
        try:
            if fastest in REPEATABLE:
                found[case] = module(fastest, "attention")
            elif fastest != "triton":
                raise BackendUnavailable(f"attention: {fastest!r} is not one of {', '.join(('triton', *REPEATABLE))}")
        except BackendUnavailable as error:
            tuned.warn(f"{table.path}: {error}; attention runs in Triton")
    return found


def unshared(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, each with memory of its own: torch.library forbids an op's outputs to share any, and a primitive may
    return slices of one allocation."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        address = tensor.untyped_storage().data_ptr()
        result.append(tensor.clone() if address in seen else tensor)
        seen.add(address)
    return result


def cpp_instructions() -> str:
    """Name of the instruction set that the C++ kernels use here, and of those that this build lacks, if any, since its
    compiler did not know them."""
    from phi_fast._C import cpu

    without = cpu.omitted_isas()
    return cpu.isa() + (f" (built by a compiler without {', '.join(without)})" if without else "")


def interpreting() -> bool:
    """True where Triton kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_takes_cpu_tensors() -> bool:
    """Whether Triton kernels may be given CPU tensors: in the interpreter. `make prove` replaces this function, because
    it executes what Triton compiled on the CPU."""
    return interpreting()


def _require_triton(op: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable(
            f"{op} runs in Triton on {device}, and triton is not installed: pip install triton, or use('reference')"
        )
    if device.type == "cpu" and not triton_takes_cpu_tensors():
        raise BackendUnavailable(
            f"{op}: Triton needs a GPU and these tensors are on the CPU. Set TRITON_INTERPRET=1 before Python starts "
            f"to run it in Triton's interpreter (slow), or use('auto', op={op!r})"
        )
    if device.type == "cpu" and interpreting():
        _require_a_pair_that_interprets(op)


def _require_a_pair_that_interprets(op: str) -> None:
    """Triton before 3.9 makes an index of an array with one dim, which numpy refuses from 2.4 on: a loop whose end is
    known only when it runs would fail inside the interpreter."""
    import numpy
    import triton

    def of(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if of(triton.__version__) < (3, 9) and of(numpy.__version__) >= (2, 4):
        raise BackendUnavailable(
            f"{op}: Triton {triton.__version__}'s interpreter does not work with numpy {numpy.__version__}: "
            f"pip install 'numpy<2.4' (or a Triton from 3.9 on), or use('auto', op={op!r})"
        )
