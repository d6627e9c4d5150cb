"""Adam in Triton: one launch over any number of tensors, and the squared norm of their gradients in another.

Step t with gradient g, divided by the loss scale and clipped (Kingma and Ba, arXiv 1412.6980; decoupled decay λ of
Loshchilov and Hutter, arXiv 1711.05101):

    m = β1 m + (1 - β1) g;  v = β2 v + (1 - β2) g²;  m̂ = m / (1 - β1^t);  v̂ = v / (1 - β2^t)
    w = w - lr (m̂ / (sqrt(v̂) + ε) + λ w)

Programs find their work in tables on the device: the addresses and sizes of the tensors, and a map from program to
(tensor, first element). Tables are kept while the addresses stay the same: a step in the steady state uploads nothing.
A tensor whose addresses are multiples of 16 bytes is cut into a multiple of 16 elements, which moves in 128-bit
accesses, and a remainder; remainders and misaligned tensors go through a second, narrow launch.

Bytes per parameter, 16-bit weights and gradients, fp32 master and state: read 2 + 4 + 4 + 4, write 2 + 4 + 4 + 4 = 28;
the norm reads the gradient once more: 30.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.adam import AdamLists, AdamOptions
from .common import Launch
from .launching import Varying, launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

CHUNK = 32768  # elements per program
BLOCK = 2048  # elements at a time: with 256 threads, 8 each
WARPS = 8


class Tile(NamedTuple):
    chunk: int
    """Elements per program, a multiple of `block`."""
    block: int
    """Elements at a time."""
    warps: int


MANY = 2**26
"""Elements from which on the tile no longer depends on their number."""
_TRIED = {"chunk": (8192, 16384, CHUNK, 65536, 131072), "block": (1024, BLOCK, 4096, 8192), "warps": (4, WARPS, 16)}
STEP, NORM = (Tunable(f"adam.{name}", Tile, RowCase, _TRIED) for name in ("step", "norm"))

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _address(table, tensor, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The address that `table` (tensors,) holds for `tensor`, as a pointer to DTYPE."""
    pointer = tl.load(table + tensor).to(tl.pointer_type(DTYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _work(sizes, chunks, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """(tensor, first element, end) of this program: chunks (programs, 2) int64, sizes (tensors,) int64."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    end = tl.minimum(start + CHUNK, tl.load(sizes + tensor))
    if WIDE:
        start = tl.multiple_of(start, 16)
        end = tl.multiple_of(end, 16)
    return tensor, start, end


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - β^t = -expm1(t·log β) in fp32, to a few ulp: by its series where exp would cancel."""
    x = log_beta * t
    series = 1.0 + x / 8.0
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adam(
    table,  # (6, tensors) int64: addresses of params, grads, exp_avgs, exp_avg_sqs, masters; sizes
    chunks,  # (programs, 2) int64
    tensors,
    step,  # scalar fp32
    lr,  # scalar fp32, or a float
    grad_scale,  # scalar fp32 or None
    found_inf,  # scalar fp32 or None
    nonfinite,  # scalar fp32 or None: set to 1 where a value written is not finite
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(found_inf) != 0:
            return
    tensor, start, end = _work(table + 5 * tensors, chunks, CHUNK, WIDE)
    params = _address(table, tensor, PARAM, WIDE)
    grads = _address(table + tensors, tensor, GRAD, WIDE)
    exp_avgs = _address(table + 2 * tensors, tensor, tl.float32, WIDE)
    exp_avg_sqs = _address(table + 3 * tensors, tensor, tl.float32, WIDE)
    masters = _address(table + 4 * tensors, tensor, tl.float32, WIDE) if HAS_MASTER else params

    rate = tl.load(lr) if LR_IS_TENSOR else lr
    scale = tl.load(grad_scale) if grad_scale is not None else 1.0
    step_size, root2 = rate, 1.0
    if BIAS_CORRECTION:
        t = tl.load(step)
        step_size = rate / _one_minus_power(log_beta1, t)
        root2 = tl.sqrt_rn(_one_minus_power(log_beta2, t))
    keep = 1.0 - rate * weight_decay

    with_zero = tl.zeros([BLOCK // 8], dtype=tl.float32)  # sums of products with 0: NaN once a factor is not finite
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        p = tl.load(masters + at, mask=inside).to(tl.float32)
        g = tl.load(grads + at, mask=inside).to(tl.float32) * scale
        m = tl.load(exp_avgs + at, mask=inside)
        v = tl.load(exp_avg_sqs + at, mask=inside)
        if DECOUPLED:
            p = p * keep
        else:
            g = g + weight_decay * p
        m = m + one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        p = p - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
        tl.store(exp_avgs + at, m, mask=inside)
        tl.store(exp_avg_sqs + at, v, mask=inside)
        stored = narrow(p, PARAM)
        tl.store(params + at, stored, mask=inside)
        if HAS_MASTER:
            tl.store(masters + at, p, mask=inside)
        if nonfinite is not None:
            products = tl.where(inside, stored.to(tl.float32) * 0.0 + v * 0.0, 0.0)  # m is in p
            with_zero += tl.sum(tl.reshape(products, [BLOCK // 8, 8]), axis=1)  # inside each thread
    if nonfinite is not None:
        total = tl.sum(with_zero, axis=0)
        tl.atomic_max(nonfinite, 1.0, mask=total != total, sem="relaxed")


@triton.jit
def _sum_of_squares(
    table,  # (2, tensors) int64: addresses of grads; sizes
    chunks,  # (programs, 2) int64
    tensors,
    partials,  # (programs,) fp32
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, end = _work(table + tensors, chunks, CHUNK, WIDE)
    grads = _address(table, tensor, GRAD, WIDE)
    lanes = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        g = tl.load(grads + at, mask=at < end, other=0.0).to(tl.float32)
        lanes += g * g
    tl.store(partials + tl.program_id(0), tl.sum(lanes, axis=0))


def _split(lists: Sequence[Sequence[Tensor]]) -> tuple[list[list[int]], list[list[int]]]:
    """The i-th tensors of `lists` as rows [address in each list ..., elements], in parts: (wide, narrow)."""
    wide, narrow = [], []
    for tensors in zip(*lists, strict=True):
        addresses, n = [t.data_ptr() for t in tensors], tensors[0].numel()
        whole = n - n % 16 if all(address % 16 == 0 for address in addresses) else 0
        if whole:
            wide.append([*addresses, whole])
        if whole < n:
            narrow.append([a + whole * t.element_size() for a, t in zip(addresses, tensors, strict=True)] + [n - whole])
    return wide, narrow


class _Uploaded:
    """int64 values on a device, which streams may read once they have arrived there.

    Uploading does not wait for the device. Raises RuntimeError while a CUDA graph is captured: each replay would copy
    the values anew, from host memory that has other uses by then.
    """

    def __init__(self, values: Sequence[int], device: torch.device) -> None:
        self.values = torch.tensor(values, dtype=torch.int64)
        self.ordered: set[int] = set()
        """Streams that were told to wait for the copy."""
        if device.type != "cuda":
            self.values = self.values.to(device)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "adam: the capture steps tensors at other addresses than the steps before it; take a step first, and "
                "keep the gradients where they are: zero_grad(set_to_none=False)"
            )
        self.values = self.values.pin_memory().to(device, non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record()
        self.ordered.add(torch.cuda.current_stream(device).cuda_stream)

    def here(self) -> Tensor:
        """The values, for work on the current stream: it waits for the copy, and their memory waits for the work."""
        if self.values.device.type != "cuda":
            return self.values
        if torch.cuda.is_current_stream_capturing():  # began after a step that had them, and a synchronization
            _CAPTURED.append(self.values)
            return self.values
        stream = torch.cuda.current_stream(self.values.device)
        if stream.cuda_stream not in self.ordered:
            stream.wait_event(self.arrived)
            self.values.record_stream(stream)
            self.ordered.add(stream.cuda_stream)
        return self.values


_CAPTURED: list[Tensor] = []
"""Tables that a CUDA graph reads: they must outlive the caches."""

_uploaded = lru_cache(maxsize=64)(_Uploaded)


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device, chunk: int) -> _Uploaded:
    """(programs, 2): which tensor a program works on, and from which element."""
    pairs = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, chunk)]
    return _Uploaded([value for pair in pairs for value in pair], device)


class _Tables:
    """The kernels' `table` (a column per tensor) and `chunks`, for `rows` of `_split`."""

    def __init__(self, rows: list[list[int]], device: torch.device, chunk: int) -> None:
        columns = list(zip(*rows, strict=True))
        self.shape = len(columns), len(rows)
        self.table = _uploaded(tuple(value for column in columns for value in column), device)
        self.chunks = _chunks(tuple(columns[-1]), device, chunk)

    def here(self) -> tuple[Tensor, Tensor]:
        """Both, for work on the current stream."""
        return self.table.here().view(self.shape), self.chunks.here().view(-1, 2)


def _case(elements: int, dtype: torch.dtype, gradients: torch.dtype, has_master: bool) -> RowCase:
    variant = f"{words(gradients)} gradients{', master' * has_master}"
    return RowCase(words(dtype), 1, bucket(min(elements, MANY)), variant)


def _adam_launch(
    tile: Tile,
    table: Tensor,
    chunks: Tensor,
    param: torch.dtype,
    grad: torch.dtype,
    options: AdamOptions,
    has_master: bool,
    wide: bool,
) -> Launch:
    step, lr, betas, eps, weight_decay, decoupled, bias_correction, grad_scale, found_inf, nonfinite = options
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in betas)
    return Launch(
        _adam,
        (len(chunks),),
        {
            "table": table,
            "chunks": chunks,
            "tensors": table.shape[1],
            "step": step,
            "lr": lr,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "nonfinite": nonfinite,
            "beta2": float(betas[1]),
            "one_minus_beta1": 1.0 - betas[0],
            "one_minus_beta2": 1.0 - betas[1],
            "log_beta1": log_beta1,
            "log_beta2": log_beta2,
            "eps": float(eps),
            "weight_decay": float(weight_decay),
        },
        {
            "PARAM": TRITON_DTYPES[param],
            "GRAD": TRITON_DTYPES[grad],
            "HAS_MASTER": has_master,
            "LR_IS_TENSOR": isinstance(lr, Tensor),
            "DECOUPLED": decoupled,
            "BIAS_CORRECTION": bias_correction,
            "WIDE": wide,
            "CHUNK": tile.chunk,
            "BLOCK": tile.block,
        },
        num_warps=tile.warps,
        tile=tile,
    )


def _sum_of_squares_launch(
    tile: Tile, table: Tensor, chunks: Tensor, partials: Tensor, grad: torch.dtype, wide: bool
) -> Launch:
    return Launch(
        _sum_of_squares,
        (len(chunks),),
        {"table": table, "chunks": chunks, "tensors": table.shape[1], "partials": partials},
        {"GRAD": TRITON_DTYPES[grad], "WIDE": wide, "CHUNK": tile.chunk, "BLOCK": tile.block},
        num_warps=tile.warps,
        tile=tile,
    )


def step_(lists: AdamLists, options: AdamOptions) -> None:
    """`reference.adam.step_`."""
    if not isinstance(options.lr, Tensor):
        options = options._replace(lr=Varying(options.lr))
    param, grad, has_master = lists.params[0], lists.grads[0], lists.masters is not None
    if "elements" not in lists.kept:
        lists.kept["elements"] = sum(p.numel() for p in lists.params)
    by_hand, elements = Tile(CHUNK, BLOCK, WARPS), lists.kept["elements"]
    tile = STEP.tile(param.device, by_hand, _case, elements, param.dtype, grad.dtype, has_master)
    if lists.kept.get("chunk") != tile.chunk:
        *tensors, masters = lists.tensors
        parts = _split([*tensors, lists.params if masters is None else masters])
        lists.kept["tables"] = [_Tables(rows, param.device, tile.chunk) if rows else None for rows in parts]
        lists.kept["chunk"] = tile.chunk
    for tables, wide in zip(lists.kept["tables"], (True, False), strict=True):
        if tables is not None:
            launch(_adam_launch, tile, *tables.here(), param.dtype, grad.dtype, options, has_master, wide)


def grad_norm_squared(grads: Sequence[Tensor]) -> Tensor:
    """`reference.adam.grad_norm_squared`: one partial sum per program, added up in fp64 in a fixed order."""
    device, partials = grads[0].device, []
    for dtype in dict.fromkeys(g.dtype for g in grads):
        for rows, wide in zip(_split([[g for g in grads if g.dtype == dtype]]), (True, False), strict=True):
            if rows:
                elements = sum(row[-1] for row in rows)
                tile = NORM.tile(device, Tile(CHUNK, BLOCK, WARPS), _case, elements, dtype, dtype, False)
                table, chunks = _Tables(rows, device, tile.chunk).here()
                partials.append(torch.empty(len(chunks), dtype=torch.float32, device=device))
                launch(_sum_of_squares_launch, tile, table, chunks, partials[-1], dtype, wide)
    return torch.cat(partials).sum(dtype=torch.float64).float() if partials else torch.zeros((), device=device)
