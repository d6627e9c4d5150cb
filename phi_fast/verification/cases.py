"""The cases of `phi_fast.verify`: every op and the whole model, forward and backward, with plain PyTorch's version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..config import PhiConfig
from ..kernels import (
    apply_rotary_,
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary_table,
)
from ..kernels.adam import adam_step_
from ..model.merged import to_merged, to_split
from ..model.phi import Phi
from ..model.reference import ReferencePhi, rotary_cos_sin, rotate
from .judge import Case, Tensors, differentiate

RECIPE: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}  # phi-1.5's Adam
LOSS_SCALE = 1024.0  # keeps the small model's fp16 gradients out of fp16's subnormal range, in both computations


def cases(device: torch.device) -> list[Case]:
    """List the cases, with ragged shapes: phi-1.5's width on a GPU, and small ones on a CPU, where 16-bit products and
    Triton's interpreter are slow."""
    large = device.type == "cuda"
    batch, length, heads, rows = (2, 1000, 32, 2001) if large else (2, 70, 2, 37)
    d = heads * 64
    return [
        _rotary(batch, length if large else 19, heads),
        _layer_norm(rows, d),
        _rms_norm(rows, d),
        _bias_gelu(rows, 4 * d),
        _gated_activation(rows, 4 * d, "silu"),
        _gated_activation(rows, 4 * d, "gelu_tanh"),
        _attention(batch, length, heads, heads),
        _attention(batch, length, heads, heads // 2),
        _attention(batch, length, heads // 2, heads // 2, head_dim=128),
        _attention(batch, length, heads, heads, causal=False),
        _documents([length // 3, 1, length // 2], heads),
        _documents([length // 3, 1, length // 2], heads, rotating=True),
        _linear_cross_entropy(rows, d, 51200 if large else 1003, 0.0, 0.0),
        _linear_cross_entropy(rows, d, 1003, 0.1, 1e-4),
        _adam(2**22 + 3 if large else 70_003),
        _model(PhiConfig.preset("phi-tiny").replace(num_hidden_layers=2), 2, 256)
        if large
        else _model(PhiConfig(512, 128, 2, 2, 64), 2, 45),
    ]


def _draw(generator: Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def _named(op: str, name: str, inputs: Callable[[Generator], Tensors], ours: Callable, plain: Callable) -> Case:
    return Case(op, name, inputs, differentiate(ours), differentiate(plain))


def _rotary(batch: int, length: int, heads: int) -> Case:
    config = PhiConfig()

    def inputs(generator: Generator) -> Tensors:
        return {name: _draw(generator, batch, length, heads, 64) for name in "qk"}

    def ours(q: Tensor, k: Tensor) -> Tensor:
        cos, sin = rotary_table(length, config.rotary_dim, config.rope_theta, q.device)
        return torch.stack(
            [x for x in apply_rotary_(q * 1, k * 1, cos, sin) if x is not None]
        )  # leaves stay as they are

    def plain(q: Tensor, k: Tensor) -> Tensor:
        table = rotary_cos_sin(config, length, q.device, q.dtype)
        return torch.stack([rotate(x.transpose(1, 2), *table).transpose(1, 2) for x in (q, k)])

    return _named("rotary", f"q, k ({batch}, {length}, {heads}, 64)", inputs, ours, plain)


def _layer_norm(rows: int, d: int) -> Case:
    def inputs(generator: Generator) -> Tensors:
        x = {name: _draw(generator, rows, d, scale=3.0) for name in ("x", "residual")}
        return {**x, "weight": 1 + _draw(generator, d, scale=0.1), "bias": _draw(generator, d)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.stack(layer_norm(x, weight, bias, residual=residual))

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.stack((F.layer_norm(x + residual, (d,), weight, bias), x + residual))

    return _named("layer_norm", f"({rows}, {d}) and residual", inputs, ours, plain)


def _bias_gelu(rows: int, n: int) -> Case:
    def inputs(generator: Generator) -> Tensors:
        return {"x": _draw(generator, rows, n, scale=2.0), "bias": _draw(generator, n)}

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    return _named("bias_gelu", f"({rows}, {n})", inputs, bias_gelu, plain)


def _rms_norm(rows: int, d: int) -> Case:
    """RMSNorm is layer_norm's kernels, so that is the op it is checked with."""

    def inputs(generator: Generator) -> Tensors:
        x = {name: _draw(generator, rows, d, scale=3.0) for name in ("x", "residual")}
        return {**x, "weight": 1 + _draw(generator, d, scale=0.1)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.stack(rms_norm(x, weight, residual=residual))

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.stack((F.rms_norm(x + residual, (d,), weight, 1e-6), x + residual))

    return _named("layer_norm", f"rms_norm ({rows}, {d}) and residual", inputs, ours, plain)


def _gated_activation(rows: int, n: int, activation: str) -> Case:
    """On the halves of one matrix."""

    def inputs(generator: Generator) -> Tensors:
        return {"gate_up": _draw(generator, rows, 2 * n, scale=2.0)}

    def ours(gate_up: Tensor) -> Tensor:
        return gated_activation(gate_up, activation=activation)

    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    return _named("gated_activation", f"{activation} ({rows}, {n})", inputs, ours, plain)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Compute attention on (batch, length, heads, head_dim) with torch, which uses its plain version in float64."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _attention(batch: int, length: int, heads: int, key_heads: int, head_dim: int = 64, causal: bool = True) -> Case:
    def inputs(generator: Generator) -> Tensors:
        shapes = {"q": heads, "k": key_heads, "v": key_heads}
        return {name: _draw(generator, batch, length, n, head_dim) for name, n in shapes.items()}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=causal)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _plain_attention(q, k, v, causal)

    name = f"({batch}, {length}, {heads}, {head_dim})" + (f", {key_heads} key heads" if key_heads != heads else "")
    return _named("attention", name if causal else f"{name}, not causal", inputs, ours, plain)


def _documents(lengths: list[int], heads: int, rotating: bool = False) -> Case:
    """rotating: RoPE inside the op, on positions that go on over the whole length."""
    total, config = sum(lengths), PhiConfig()

    def inputs(generator: Generator) -> Tensors:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return {**{name: _draw(generator, 1, total, heads, 64) for name in "qkv"}, "cu_seqlens": ends}

    def ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        table = rotary_table(total, config.rotary_dim, config.rope_theta, q.device) if rotating else (None, None)
        return attention(q, k, v, cu_seqlens=cu_seqlens, cos=table[0], sin=table[1])

    def plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        if rotating:
            table = rotary_cos_sin(config, total, q.device, q.dtype)
            q, k = (rotate(x.transpose(1, 2), *table).transpose(1, 2) for x in (q, k))
        documents = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([_plain_attention(*document) for document in documents], 1)

    name = f"documents of {', '.join(map(str, lengths))}" + (", rotated" if rotating else "")
    return _named("attention", name, inputs, ours, plain)


def _linear_cross_entropy(rows: int, d: int, vocab: int, smoothing: float, z: float) -> Case:
    def inputs(generator: Generator) -> Tensors:
        labels = torch.randint(vocab, (rows,), generator=generator)
        labels[::5] = -100
        weight, bias = _draw(generator, vocab, d, scale=d**-0.5), _draw(generator, vocab)
        return {"hidden": _draw(generator, rows, d), "weight": weight, "bias": bias, "labels": labels}

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden, weight, bias, labels, label_smoothing=smoothing, z_loss=z)
        return loss * LOSS_SCALE

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        penalty = z * logits.logsumexp(1).square()[labels != -100].mean()
        return (F.cross_entropy(logits, labels, label_smoothing=smoothing) + penalty) * LOSS_SCALE

    name = f"({rows}, {d}) to {vocab}" + (f", smoothing {smoothing}, z {z}" if smoothing or z else "")
    return _named("linear_cross_entropy", name, inputs, ours, plain)


def _adam(elements: int) -> Case:
    """Test Adam's seventh step on two tensors. Weights and gradients have the case's dtype, masters and state fp32."""

    def inputs(generator: Generator) -> Tensors:
        sizes = {"a": elements, "b": 5}
        drawn = {f"{kind} {name}": _draw(generator, n) for name, n in sizes.items() for kind in ("p", "g", "m", "r")}
        for name in sizes:
            drawn[f"g {name}"] *= 10.0 ** torch.randint(-6, 2, (sizes[name],), generator=generator)
            drawn[f"r {name}"] = drawn[f"r {name}"].abs() + 0.1  # the root of v, not tiny: updates stay near lr
        return drawn

    def split(inputs: Tensors, wide: torch.dtype) -> tuple[list[Tensor], ...]:
        p, g, m, r = ([inputs[f"{kind} {name}"] for name in "ab"] for kind in ("p", "g", "m", "r"))
        # Inputs are already rounded to the case's dtype, and v to fp32: float64 starts from the same numbers.
        return [x.to(wide) for x in p], g, [x.to(wide) for x in m], [x.float().square().to(wide) for x in r]

    def named(p: list[Tensor], m: list[Tensor], v: list[Tensor]) -> Tensors:
        return {
            f"{key} {name}": x for key, xs in (("p", p), ("m", m), ("v", v)) for name, x in zip("ab", xs, strict=True)
        }

    def ours(inputs: Tensors) -> Tensors:
        p, g, m, v = split(inputs, torch.float32)
        weights = [x.to(g[0].dtype) for x in p]
        device, masters = p[0].device, None if g[0].dtype == torch.float32 else p
        scalars = {"step": torch.tensor(6.0, device=device), "grad_scale": torch.tensor(0.5, device=device)}
        adam_step_(weights, g, m, v, masters, **scalars, found_inf=torch.zeros((), device=device), **RECIPE)
        return named(weights if masters is None else masters, m, v)

    def plain(inputs: Tensors) -> Tensors:
        p, g, m, v = split(inputs, torch.promote_types(inputs["p a"].dtype, torch.float32))
        p = [x.clone().requires_grad_() for x in p]
        optimizer = torch.optim.AdamW(p, foreach=False, **RECIPE)
        for i, leaf in enumerate(p):
            leaf.grad = g[i].to(leaf.dtype) * 0.5
            optimizer.state[leaf] = {"step": torch.tensor(6.0), "exp_avg": m[i], "exp_avg_sq": v[i]}
        optimizer.step()
        return named([x.detach() for x in p], m, v)

    return Case("adam", f"{elements} + 5 elements", inputs, ours, plain)


def _model(config: PhiConfig, batch: int, length: int) -> Case:
    """Test the whole model: the loss and every gradient, under Hugging Face's names."""

    def inputs(generator: Generator) -> Tensors:
        ids = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
        state = ReferencePhi(config).state_dict()
        for name, x in state.items():  # biases differ from 0 and norms from 1, so that they matter
            state[name] = _draw(generator, *x.shape, scale=0.1) + ("norm.weight" in name)
        return {**state, "input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    def evaluate(model: torch.nn.Module, inputs: Tensors, state: Tensors) -> Tensors:
        weight = inputs["lm_head.weight"]
        model = model.to(weight.device, weight.dtype)
        model.load_state_dict(state)
        loss = model(inputs["input_ids"], inputs["labels"]).loss
        (loss * LOSS_SCALE).backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    def parameters(inputs: Tensors) -> Tensors:
        return {name: x for name, x in inputs.items() if name not in ("input_ids", "labels")}

    def ours(inputs: Tensors) -> Tensors:
        result = evaluate(Phi(config), inputs, to_merged(parameters(inputs)))
        loss = result.pop("loss")
        return {"loss": loss, **to_split(result)}

    def plain(inputs: Tensors) -> Tensors:
        return evaluate(ReferencePhi(config), inputs, parameters(inputs))

    name = (
        f"{config.num_hidden_layers} layers of {config.hidden_size}, ({batch}, {length}) tokens of {config.vocab_size}"
    )
    return Case("model", name, inputs, ours, plain)
