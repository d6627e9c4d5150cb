"""The launches that `codegen` compiles: what the launchers make on meta tensors of a model's shapes, recorded.

The kernels' arguments, tiles and grids are the launchers' own. What is stated here is which calls are looked at, and
the bytes that each must move.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.adam import AdamLists, AdamOptions
from ..reference.attention import AttentionOptions
from ..reference.layer_norm import ResidualStream
from ..reference.linear_cross_entropy import Objective
from . import adam, attention, bias_gelu, gated_activation, layer_norm, linear_cross_entropy, muon, rotary
from .common import Launch, recording
from .tiles import session

TOKENS, WIDTH, HEADS, VOCABULARY = 8192, 2048, 32, 51200  # of phi-1.5


@dataclass(frozen=True)
class Specimen:
    """A launch at a model's shapes, with the bytes it moves through memory and the fewest that the work needs."""

    name: str
    """op.pass, for example "layer_norm.backward"."""
    launch: Launch
    bytes_moved: int
    """Global bytes read and written by the whole launch, each tensor once per pass over it; 0 for `variants`."""
    bytes_bound: int
    """The design's bound for this work; 0 for `variants`."""
    note: str = ""
    """What the reader must know of the shape: "(tokens, d) fp16"."""


def specimens(architecture: str, dtype: torch.dtype) -> list[Specimen]:
    """The kernels as phi-1.5 calls them, and attention as other models do."""
    return [
        *_adam_specimens(architecture, dtype),
        *_attention_specimens(architecture, dtype),
        *_attention_specimens(architecture, dtype, ", rotary inside", rotary_dim=32),
        *_attention_specimens(architecture, dtype, ", documents", batch=1, documents=8),
        *_attention_specimens(
            architecture, dtype, ", head_dim 128, 4 queries per key", heads=16, key_heads=4, head_dim=128
        ),
        *_bias_gelu_specimens(architecture, dtype),
        *_gated_activation_specimens(architecture, dtype),
        *_layer_norm_specimens(architecture, dtype),
        *_linear_cross_entropy_specimens(architecture, dtype),
        *_muon_specimens(architecture),
        *_rotary_specimens(architecture, dtype),
    ]


def variants(architecture: str) -> list[Specimen]:
    """What else the ops accept, each compiled launch once: the dtypes, and every option that the kernels know. fp16
    comes first, then bf16, then fp32."""
    found: dict[Any, Specimen] = {}
    for specimen in (
        *_attention_variants(architecture),
        *_described_variants(architecture),
        *_elementwise_variants(architecture),
        *_row_variants(architecture),
        *_muon_variants(architecture),
    ):
        found.setdefault(compiled_as(specimen.launch), specimen)
    return sorted(found.values(), key=_dtype_rank)


def compiled_as(launch: Launch) -> tuple[Any, str]:
    """What decides the code of a launch: launches that agree in it are compiled to the same."""
    tile = (launch.num_warps, launch.num_stages)
    return launch.kernel, str((launch.signature(), launch.constexprs(), launch.attributes(), tile))


def _dtype_rank(specimen: Specimen) -> int:
    types = specimen.launch.signature().values()
    return next((rank for rank, name in enumerate(("*fp16", "*bf16")) if name in types), 2)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _adam_specimens(architecture: str, dtype: torch.dtype, elements: int = 2**28) -> Iterator[Specimen]:
    """One flat partition: 16-bit weights and gradients, fp32 master and state; and its gradient's norm."""
    param, grad = (_empty(elements, dtype=dtype) for _ in range(2))
    exp_avg, exp_avg_sq, master, scalar = *(_empty(elements) for _ in range(3)), _empty()
    options = AdamOptions(scalar, 2e-4, (0.9, 0.98), 1e-7, 0.1, True, True, scalar, scalar, scalar)
    with recording(architecture) as launches:
        adam.step_(AdamLists([param], [grad], [exp_avg], [exp_avg_sq], [master]), options)
        adam.grad_norm_squared([grad])
    step, norm = launches
    note = f"{elements} {_words(dtype)} weights, fp32 master"
    moved = param.nbytes + grad.nbytes + 2 * (exp_avg.nbytes + exp_avg_sq.nbytes + master.nbytes)
    yield Specimen("adam.step", step, moved, moved, note)
    yield Specimen("adam.norm", norm, grad.nbytes, grad.nbytes, note)


def _attention_specimens(
    architecture: str,
    dtype: torch.dtype,
    note: str = "",
    *,
    batch: int = 2,
    sequence: int = 2048,
    heads: int = HEADS,
    key_heads: int = 0,
    head_dim: int = 64,
    rotary_dim: int = 0,
    documents: int = 0,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    keys: int = 0,
) -> Iterator[Specimen]:
    """Both passes on q, k and v as slices of the parallel block's packed buffer. key_heads 0: as many as heads; keys,
    where they are not as many as rows, lie in a buffer of their own."""
    width, key_width = heads * head_dim, (key_heads or heads) * head_dim

    def split(packed: Tensor) -> list[Tensor]:
        parts = packed.split((width, key_width, key_width, 4 * width), -1)[:3]
        return [part.unflatten(-1, (-1, head_dim)) for part in parts]

    q, k, v = split(_empty(batch, sequence, 5 * width + 2 * key_width, dtype=dtype))
    dq, dk, dv = split(_empty(batch, sequence, 5 * width + 2 * key_width, dtype=dtype))
    if keys:
        k, v, dk, dv = (_empty(batch, keys, key_heads or heads, head_dim, dtype=dtype) for _ in range(4))
    out = _empty(batch, sequence, heads, head_dim, dtype=dtype)
    dout = _empty(batch, sequence, 5 * width, dtype=dtype)[..., :width].unflatten(-1, (heads, head_dim))
    cu_seqlens = _empty(documents + 1, dtype=torch.int32) if documents else None
    cos = sin = _empty(keys or sequence, rotary_dim // 2) if rotary_dim else None
    options = AttentionOptions(head_dim**-0.5, causal, window, cu_seqlens, cos, sin)
    with recording(architecture) as launches:
        _, lse = attention.forward(q, k, v, options, out=out)
        attention.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)
    note = f"({batch}, {sequence}, {heads}, {head_dim}) {_words(dtype)}{note}"
    for name, launch in zip(("forward", "dq", "dkv"), launches, strict=True):
        operands = [getattr(x, "base", x) for argument, x in launch.arguments.items() if argument.endswith("_pointer")]
        moved = sum(x.numel() * x.element_size() for x in operands)
        yield Specimen(f"attention.{name}", launch, moved, moved, note)


def _bias_gelu_specimens(architecture: str, dtype: torch.dtype) -> Iterator[Specimen]:
    """The calls of the parallel block: slices of the packed buffers; o carried along, the activation written again."""
    packed, dpacked = (_empty(TOKENS, 7 * WIDTH, dtype=dtype) for _ in range(2))
    mixed, dmixed = (_empty(TOKENS, 5 * WIDTH, dtype=dtype) for _ in range(2))
    o, u, du = _empty(TOKENS, WIDTH, dtype=dtype), packed[:, 3 * WIDTH :], dpacked[:, 3 * WIDTH :]
    with recording(architecture) as launches:
        bias_gelu.forward(u, None, out=mixed[:, WIDTH:])
        bias_gelu.forward(u, None, out=mixed[:, WIDTH:], carry=(o, mixed[:, :WIDTH]))
        dg = dmixed[:, WIDTH:]
        bias_gelu.backward(dg, u, None, dx=du, activation=dg, carry=(o, dmixed[:, :WIDTH]))
    plain, carrying, again = launches
    element, carried, partial = 4 * o.nbytes, 2 * o.nbytes, 2 * again.arguments["partial"].nbytes
    note = f"({TOKENS}, {4 * WIDTH}) {_words(dtype)}"
    beside = f"{note}, o copied beside"
    yield Specimen("bias_gelu.forward", plain, 2 * element, 2 * element, note)
    yield Specimen("bias_gelu.forward_carrying", carrying, 2 * element + carried, 2 * element, beside)
    again_note = f"{note}, g written again, o copied beside"
    yield Specimen("bias_gelu.backward", again, 4 * element + carried + partial, 4 * element, again_note)


def _gated_activation_specimens(architecture: str, dtype: torch.dtype) -> Iterator[Specimen]:
    """On the halves of one packed projection, as in Phi-3."""
    packed, dpacked = (_empty(TOKENS, 8 * WIDTH, dtype=dtype) for _ in range(2))
    gate, up, dgate, dup = *packed.chunk(2, 1), *dpacked.chunk(2, 1)
    dout = _empty(TOKENS, 4 * WIDTH, dtype=dtype)
    with recording(architecture) as launches:
        gated_activation.forward(gate, up, out=dout)
        gated_activation.backward(dout, gate, up, dgate=dgate, dup=dup)
    note = f"({TOKENS}, {4 * WIDTH}) {_words(dtype)}"
    for name, launch, tensors in zip(("forward", "backward"), launches, (3, 5), strict=True):
        yield Specimen(f"gated_activation.{name}", launch, tensors * dout.nbytes, tensors * dout.nbytes, note)


def _layer_norm_specimens(architecture: str, dtype: torch.dtype) -> Iterator[Specimen]:
    """The calls of the parallel block: forward with the residual stream's copy, and backward with its gradient. Beside
    them the kernels for rows that registers do not hold."""
    x, shifted, dy = (_empty(TOKENS, WIDTH, dtype=dtype) for _ in range(3))
    vector = _empty(WIDTH, dtype=dtype)
    with recording(architecture) as launches:
        _, mean, rstd = layer_norm.forward(x, vector, vector, 1e-5)
        layer_norm.forward(x, vector, vector, 1e-5, ResidualStream(shift=vector, shifted=shifted))
        layer_norm.backward(dy, x, vector, mean, rstd, residual_grad=dy)
    plain, with_shift, backward = launches
    note, partial = f"({TOKENS}, {WIDTH}) {_words(dtype)}", 2 * backward.arguments["partial"].nbytes
    shift_note = f"{note}, with x + biases written for the block's last product"
    yield Specimen("layer_norm.forward", plain, 2 * x.nbytes, 2 * x.nbytes, note)
    yield Specimen("layer_norm.forward_shifted", with_shift, 3 * x.nbytes, 3 * x.nbytes, shift_note)
    backward_note = f"{note}, with the residual's gradient"
    yield Specimen("layer_norm.backward", backward, 4 * x.nbytes + partial, 4 * x.nbytes, backward_note)
    rows, d = TOKENS // 16, 16 * WIDTH
    x, vector, row = _empty(rows, d, dtype=dtype), _empty(d, dtype=dtype), _empty(rows)
    with recording(architecture) as launches:
        layer_norm.forward(x, vector, vector, 1e-5)
        layer_norm.backward(x, x, vector, row, row)
    forward, sums, backward = launches
    note, partial = f"({rows}, {d}) {_words(dtype)}", 2 * backward.arguments["partial"].nbytes
    cached = f"{note}; all but the first read of a row are counted as L2 hits"
    yield Specimen("layer_norm.forward_wide", forward, 2 * x.nbytes, 2 * x.nbytes, cached)
    yield Specimen("layer_norm.row_means", sums, 2 * x.nbytes, 2 * x.nbytes, note)
    yield Specimen("layer_norm.backward", backward, 3 * x.nbytes + partial, 3 * x.nbytes, note)


def _linear_cross_entropy_specimens(architecture: str, dtype: torch.dtype, rows: int = 4096) -> Iterator[Specimen]:
    """The kernels on one chunk of phi-1.5's logits."""
    logits, bias = _empty(rows, VOCABULARY, dtype=dtype), _empty(VOCABULARY, dtype=dtype)
    labels, scale, sums = _empty(rows, dtype=torch.int64), _empty(), _empty(VOCABULARY)
    cross_entropy_, objective = linear_cross_entropy.cross_entropy_, Objective()
    with recording(architecture) as launches:
        cross_entropy_(logits, labels, bias, objective=objective, scale=scale, need_grad=True, dbias=sums)
        cross_entropy_(logits, labels, bias, objective=objective, scale=scale, need_grad=False)
    gradient, dbias, loss = launches
    chunk, note, name = logits.nbytes, f"({rows}, {VOCABULARY}) {_words(dtype)}", "linear_cross_entropy"
    held = "a row stays in registers" if gradient.constants["HELD"] else "a row's second read is counted as an L2 hit"
    yield Specimen(f"{name}.loss_and_gradient", gradient, 2 * chunk, 2 * chunk, f"{note}; {held}")
    yield Specimen(f"{name}.loss", loss, chunk, chunk, note)
    yield Specimen(f"{name}.bias_gradient", dbias, chunk, chunk, note)
    hidden, weight = (_empty(n, WIDTH, dtype=dtype) for n in (TOKENS, VOCABULARY))
    with recording(architecture) as launches:
        linear_cross_entropy.linear_losses(hidden, weight, bias, _empty(TOKENS, dtype=torch.int64), objective)
    [on_chip] = launches
    moved = hidden.nbytes + weight.nbytes
    read = f"({TOKENS}, {WIDTH}) x ({VOCABULARY}, {WIDTH}) {_words(dtype)}; operands read again are counted as L2 hits"
    yield Specimen(f"{name}.loss_on_chip", on_chip, moved, moved, read)


def _rotary_specimens(
    architecture: str, dtype: torch.dtype, batch: int = 4, sequence: int = 2048
) -> Iterator[Specimen]:
    """q and k of phi-1.5's packed buffer (tokens, 7d), both ways."""
    batch, sequence = 4, TOKENS // 4
    packed = _empty(batch, sequence, 7 * WIDTH, dtype=dtype)
    x = packed[..., : 2 * WIDTH].unflatten(-1, (2 * HEADS, -1))
    cos, sin = (_empty(sequence, 16) for _ in range(2))
    with recording(architecture) as launches:
        rotary.rotate_(x, cos, sin, 0)
        rotary.rotate_(x, cos, sin, 0, inverse=True)
    moved = TOKENS * 2 * HEADS * 32 * 2 * dtype.itemsize
    note = f"q, k of ({TOKENS}, {7 * WIDTH}) {_words(dtype)}"
    for name, launch in zip(("forward", "backward"), launches, strict=True):
        yield Specimen(f"rotary.{name}", launch, moved, moved, note)


def _muon_specimens(architecture: str) -> Iterator[Specimen]:
    """The symmetric products of fc2 (2048, 8192), in bf16 with any model in 16 bits."""
    x = _empty(WIDTH, 4 * WIDTH, dtype=torch.bfloat16)
    with recording(architecture) as launches:
        gram = muon.symmetric_product(x)
        muon.symmetric_product(gram, gram, alpha=2.0315, beta=-4.775)
    for launch, note in zip(launches, ("", ", added to a matrix"), strict=True):
        operand = launch.arguments["x"]
        moved = operand.nbytes + gram.nbytes
        words = f"{tuple(operand.shape)} bfloat16{note}; operands read again are counted as L2 hits"
        yield Specimen("muon.symmetric_product", launch, moved, moved, words)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MASKS: dict[str, dict[str, Any]] = {
    "": {},
    ", not causal": {"causal": False},
    ", window": {"window": (256, 0)},
}


def _attention_variants(architecture: str) -> Iterator[Specimen]:
    """fp16: all masks × documents × rotations, and groups where a kernel loops over them; bf16 and fp32: every mask,
    with all else and without. Heads of 80 and 96 dims run in the tiles of 128: a few of each."""
    choices = itertools.product(_DTYPES, (64, 128), _MASKS, (0, 8), (0, 32), (1, 4))
    for dtype, head_dim, mask, documents, rotary_dim, group in choices:
        if dtype != torch.float16 and len({bool(documents), bool(rotary_dim), group > 1}) > 1:
            continue
        heads = 2048 // head_dim
        words = f"{', documents' * bool(documents)}{', rotary inside' * bool(rotary_dim)}"
        words += f", {group} queries per key" * (group > 1)
        options: dict[str, Any] = {"rotary_dim": rotary_dim, "documents": documents, **_MASKS[mask]}
        options |= {"batch": 1, "heads": heads, "key_heads": heads // group, "head_dim": head_dim}
        found = _attention_specimens(architecture, dtype, mask + words, **options)
        yield from (x for x in found if group == 1 or x.name == "attention.dkv" or dtype != torch.float16)
    for head_dim in (64, 128):
        shape: dict[str, Any] = {"heads": 2048 // head_dim, "head_dim": head_dim, "rotary_dim": head_dim}
        for note, more in (("", {}), (", documents", {"documents": 8}), (", 4096 keys", {"keys": 4096})):
            whole = f", {head_dim} dims rotated inside{note}"
            yield from _attention_specimens(architecture, torch.float16, whole, batch=1, **(shape | more))
    partial: dict[str, dict[str, Any]] = {
        "": {},
        ", rotary inside": {"rotary_dim": 32},
        ", not causal, documents, 4 queries per key": {"causal": False, "documents": 8, "key_heads": 4},
        ", window, documents, rotary inside": {"window": (256, 0), "documents": 8, "rotary_dim": 32},
    }
    for dtype, head_dim, (note, more) in itertools.product(_DTYPES, (80, 96), partial.items()):
        if dtype == torch.float16 or not note:
            shape = {"batch": 1, "heads": 16, "head_dim": head_dim}
            yield from _attention_specimens(architecture, dtype, note, **(shape | more))


def _described_variants(architecture: str) -> Iterator[Specimen]:
    """Attention whose loop is fetched by tensor descriptors, which a measured tile may choose; other GPUs than these
    have ordinary loads for them."""
    if architecture not in ("sm_90", "sm_100"):
        return
    for dtype, head_dim in itertools.product(_DTYPES[:2], (64, 128)):
        shape: dict[str, Any] = {"batch": 1, "heads": 2048 // head_dim, "head_dim": head_dim}
        with session() as asked:
            list(_attention_specimens(architecture, dtype, **shape))
        tiles = {(one.tunable.name, one.case): one.by_hand._replace(descriptors=True) for one in asked.choices}
        with session(tiles):
            found = list(_attention_specimens(architecture, dtype, ", by descriptors", **shape))
        yield from found


def _recorded(architecture: str, note: str, *calls: tuple[str, Callable[[], Any]]) -> Iterator[Specimen]:
    """Each call's launches, under its name."""
    for name, call in calls:
        with recording(architecture) as launches:
            call()
        for launch in launches:
            yield Specimen(name, launch, 0, 0, note)


def _elementwise_variants(architecture: str) -> Iterator[Specimen]:
    """Adam, GELU, gated activations and the rotation."""
    for dtype, master, tensors in itertools.product(_DTYPES, (False, True), (False, True)):
        scalar, lr, decoupled = (_empty(), _empty(), True) if tensors else (None, 1e-3, False)
        options = AdamOptions(_empty(), lr, (0.9, 0.999), 1e-8, 0.1, decoupled, decoupled, scalar, scalar, scalar)
        weights, state = [_empty(2**20, dtype=dtype)], [_empty(2**20)]
        note = f"{_words(dtype)}{', fp32 master' * master}, {'scalars on the device' if tensors else 'L2 penalty'}"
        lists = AdamLists(weights, weights, state, state, state if master else None)
        step = functools.partial(adam.step_, lists, options)
        norm = functools.partial(adam.grad_norm_squared, weights)
        yield from _recorded(architecture, note, ("adam.step", step), ("adam.norm", norm))
    for dtype, form, with_bias, n in itertools.product(_DTYPES, ("tanh", "none"), (False, True), (320, 4096)):
        x, bias = _empty(TOKENS, n, dtype=dtype), _empty(n, dtype=dtype) if with_bias else None
        note = f"({TOKENS}, {n}) {_words(dtype)}, {form}{', bias' * with_bias}"
        forward = functools.partial(bias_gelu.forward, x, bias, approximate=form)
        backward = functools.partial(bias_gelu.backward, x, x, bias, approximate=form)
        yield from _recorded(architecture, note, ("bias_gelu.forward", forward), ("bias_gelu.backward", backward))
    for dtype, activation, n in itertools.product(_DTYPES, ("silu", "gelu_tanh"), (320, 4096)):
        x, note = _empty(TOKENS, n, dtype=dtype), f"({TOKENS}, {n}) {_words(dtype)}, {activation}"
        forward = functools.partial(gated_activation.forward, x, x, activation=activation)
        backward = functools.partial(gated_activation.backward, x, x, x, activation=activation)
        name = "gated_activation"
        yield from _recorded(architecture, note, (f"{name}.forward", forward), (f"{name}.backward", backward))
    for dtype, half, interleaved, inverse in itertools.product(_DTYPES, (16, 32, 64), (False, True), (False, True)):
        x, table = _empty(4, 2048, 32, 128, dtype=dtype), _empty(4096, half)
        note = f"{2 * half} of 128 dims, {_words(dtype)}{', interleaved' * interleaved}, positions"
        positions = _empty(4, 2048, dtype=torch.int64)
        turn = functools.partial(rotary.rotate_, x, table, table, positions, interleaved=interleaved, inverse=inverse)
        yield from _recorded(architecture, note, (f"rotary.{'backward' if inverse else 'forward'}", turn))


def _row_variants(architecture: str) -> Iterator[Specimen]:
    """LayerNorm, RMSNorm and cross entropy."""
    norms = [*itertools.product(_DTYPES, (64, 768, 2048, 8192, 16384, 32768), (False, True), (False,))]
    norms += itertools.product(_DTYPES, (2048, 32768), (True,), (True,))
    for dtype, d, residual, rms in norms:
        x, vector, row = _empty(TOKENS, d, dtype=dtype), _empty(d, dtype=dtype), _empty(TOKENS)
        stream = ResidualStream(residual=x if residual else None)
        if residual and not rms:
            stream = stream._replace(shift=vector, shifted=x)
        bias, mean = (None, None) if rms else (vector, row)
        note = f"({TOKENS}, {d}) {_words(dtype)}{', RMSNorm' * rms}{', residual' * residual}"
        forward = functools.partial(layer_norm.forward, x, vector, bias, 1e-5, stream)
        backward = functools.partial(
            layer_norm.backward, x, x, vector, mean, row, residual_grad=x if residual else None
        )
        for found in _recorded(architecture, note, ("layer_norm", forward), ("layer_norm", backward)):
            yield replace(found, name=found.launch.kernel.__name__.removeprefix("_").replace("norm_", "norm."))
    name = "linear_cross_entropy"
    objectives = {
        "": Objective(),
        ", smoothing, z-loss": Objective(label_smoothing=0.1, z_loss=1e-4),
        ", class weights, smoothing": Objective(label_smoothing=0.1, class_weight=_empty(VOCABULARY)),
        ", capped": Objective(softcap=30.0),
    }
    choices = itertools.product(_DTYPES, objectives.items(), (False, True), (VOCABULARY, 32000))
    for dtype, (words, objective), by_row, vocab in choices:
        if vocab != VOCABULARY and words:
            continue
        logits, bias = _empty(1024, vocab, dtype=dtype), _empty(vocab, dtype=dtype) if by_row else None
        note = f"(1024, {vocab}) {_words(dtype)}{words}{', bias, scale per row' * by_row}"
        labels, scale = _empty(1024, dtype=torch.int64), _empty(1024) if by_row else _empty()
        given: dict[str, Any] = {"objective": objective, "scale": scale}
        cross_entropy = functools.partial(linear_cross_entropy.cross_entropy_, logits, labels, bias, **given)
        loss, gradient = (functools.partial(cross_entropy, need_grad=wanted) for wanted in (False, True))
        yield from _recorded(architecture, note, (f"{name}.loss", loss), (f"{name}.loss_and_gradient", gradient))
        hidden = _empty(1024, 2048 if by_row else 2000, dtype=dtype)
        weight = _empty(vocab, hidden.shape[1], dtype=dtype)
        alone = functools.partial(linear_cross_entropy.linear_losses, hidden, weight, bias, labels, objective)
        yield from _recorded(architecture, note, (f"{name}.loss_on_chip", alone))
        sums = functools.partial(cross_entropy, need_grad=True, dbias=_empty(vocab))
        *_, last = _recorded(architecture, note, (f"{name}.bias_gradient", sums))
        yield last


def _muon_variants(architecture: str) -> Iterator[Specimen]:
    """Both products, of matrices whose sizes are multiples of the tile's, and of others."""
    for dtype, shape in itertools.product((torch.bfloat16, torch.float32), ((WIDTH, WIDTH), (2000, 4112))):
        x, gram = _empty(*shape, dtype=dtype), _empty(shape[0], shape[0], dtype=dtype)
        name, note = "muon.symmetric_product", f"{shape} {_words(dtype)}"
        product = functools.partial(muon.symmetric_product, x)
        added = functools.partial(muon.symmetric_product, x, gram, alpha=2.0315, beta=-4.775)
        yield from _recorded(architecture, note, (name, product))
        yield from _recorded(architecture, f"{note}, added to a matrix", (name, added))
