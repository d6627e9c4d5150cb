"""Memory of one rank by component, under DeepSpeed ZeRO-2 as `zero.py` configures it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import PhiConfig
from .devices import CONTEXT, FRAGMENTATION
from .work import Shape, gradient_itemsize

BUCKET = 500_000_000
"""Elements of a DeepSpeed bucket, unless the model is smaller (`deepspeed_config`)."""


def bucket_elements(trained: int) -> int:
    """Compute `reduce_bucket_size` as `deepspeed_config` does, for a number of trained parameters."""
    return min(BUCKET, max(1_000_000, trained))


def hidden_matrices(config: PhiConfig) -> int:
    """Count the elements of the layers' matrices: q, k, v and dense; fc1 and fc2."""
    d = config.hidden_size
    return config.num_hidden_layers * (4 * d * d + 2 * d * config.intermediate_size)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps from the forward for the backward pass."""

    inputs: int
    """Token ids, int64."""
    blocks: int
    """All layers: x, and what else `recompute` keeps."""
    final_norm: int
    """The last block's output and the LayerNorm's statistics."""
    loss_gradients: int
    """fp32 gradients of the hidden states and, unless they are frozen, of lm_head's weight and bias, which are
    computed with the loss."""

    @property
    def total(self) -> int:
        return self.inputs + self.blocks + self.final_norm + self.loss_gradients


def activations(shape: Shape) -> Activations:
    """Count what autograd holds after the forward pass of a micro-batch, without parameters and rotary table."""
    config, tokens, e = shape.config, shape.tokens, shape.itemsize
    d = config.hidden_size
    statistics = 4 * tokens * (2 + config.num_attention_heads)  # mean, rstd, log-sum-exp of each head, fp32
    wide = {"all": 1, "norm_gelu": 9, "none": 14}[shape.recompute]  # x | + packed 7d, o | + packed 7d, h, [o | g]
    block = wide * d * tokens * e + (0 if shape.recompute == "all" else statistics)
    return Activations(
        inputs=8 * tokens,
        blocks=config.num_hidden_layers * block,
        final_norm=tokens * (d * e + 8),
        loss_gradients=4 * (tokens * d + (0 if shape.lora else config.vocab_size * (d + 1)) + 1),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    """All weights in the storage dtype; every rank has a full copy."""
    gradients: float
    """This rank's part in fp32 (`grad_accum_dtype`). A single rank with one micro-batch per step keeps autograd's
    gradients in the storage dtype (`local_gradients`)."""
    sums: float
    """fp32 sums of the micro-batches' gradients, if they are reduced once per step; freed during the last backward
    pass."""
    optimizer: float
    """This rank's part of master, exp_avg, exp_avg_sq (of Muon's matrices master and momentum), and of the weights'
    average if there is one: fp32."""
    buckets: float
    """DeepSpeed's bucket buffers (two with overlap_comm), and the flattened copy of one while it is reduced; held only
    in the backward pass. 0 on one rank."""
    activations: float
    """Kept from the forward pass (`activations`)."""
    loss_chunk: float
    """One chunk of logits and the fp32 temporaries of its products; held only in the forward pass."""
    working: float
    """Temporaries of a block's backward pass, including its weights' gradients."""
    context: float
    """Memory outside torch's allocator."""
    fragmentation: float
    peak: float
    """Largest sum held at one time."""
    moment: str
    """The moment of the peak."""


def memory(
    shape: Shape,
    ranks: int,
    *,
    gpu: bool,
    accumulating: bool,
    deferred: bool = False,
    average: bool = False,
    muon: bool = False,
) -> Memory:
    """Count memory by component, and `peak`, the largest of several moments of a micro-batch and its update.

    accumulating: there are several micro-batches per step, so that earlier ones' gradients are held. deferred: they are
    held as fp32 sums on each rank, and reduced once per step. average: the run keeps a moving average (--ema-decay).
    muon: the matrices of the layers are stepped by Muon (--optimizer muon), which keeps one moment of each.
    """
    config, tokens, e = shape.config, shape.tokens, shape.itemsize
    d, vocabulary, parameters = config.hidden_size, config.vocab_size, shape.trained
    frozen = config.num_parameters() if shape.lora else 0
    part = math.ceil(parameters / ranks)
    kept = activations(shape)
    size = gradient_itemsize(e, ranks, accumulating=accumulating)
    weights, gradients, optimizer = (parameters + frozen) * e, size * part, (16 if average else 12) * part
    matrices = math.ceil(hidden_matrices(config) / ranks) if muon else 0
    optimizer -= 4 * matrices
    chunk = shape.chunk * math.ceil(vocabulary / 64) * 64 * e
    chunk += 4 * d * max(shape.chunk, min(8192, vocabulary)) if e == 2 else 0
    again = {"none": 0, "norm_gelu": 1, "all": 13}[shape.recompute]
    # [dO | dG], [dQ | dK | dV | dU], dh, what is recomputed, and the weights' gradients.
    working = (5 + 7 + 1 + again) * d * tokens * e + (0 if shape.lora else 12 * d * d * e)
    bucket = bucket_elements(parameters) * e if ranks > 1 else 0
    buffers = 2 * bucket if gpu else bucket  # overlap_comm has two
    sums = 4 * parameters * deferred
    before = sums or gradients * accumulating
    head = 0 if accumulating or ranks > 1 or shape.lora else vocabulary * d * e  # its gradient waits for the update
    moments: dict[str, float] = {
        "end of the forward": kept.total + chunk + before,
        "backward of the loss": kept.total + (tokens + (0 if shape.lora else vocabulary)) * d * e + before,
        "backward of the last block": kept.blocks + kept.final_norm + working + head + buffers + before,
    }
    if ranks > 1:
        filled = min(1.0, bucket / (parameters * e))  # share of the backward when the first bucket is full
        # fp32 gradients stay in the bucket; 16-bit gradients are accumulated in a separate tensor.
        apart = gradients * (accumulating or e == 2) + sums * (1 - filled)
        moments["first reduction"] = kept.blocks * (1 - filled) + working + buffers + bucket + apart
    else:
        moments["end of the backward"] = kept.blocks / config.num_hidden_layers + working + gradients
    if muon:  # directions; on several ranks also the pieces that leave, and the owned matrices whole (`training.muon`)
        moments["Muon's update"] = gradients + min(e, 4) * matrices * (3 if ranks > 1 else 1)
    held = weights + optimizer + max(moments.values())
    context = CONTEXT.value if gpu else 0.0
    fragmentation = FRAGMENTATION.value * held if gpu else 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        sums=sums,
        optimizer=optimizer,
        buckets=buffers + bucket,
        activations=kept.total,
        loss_chunk=chunk,
        working=working,
        context=context,
        fragmentation=fragmentation,
        peak=held + context + fragmentation,
        moment=max(moments, key=lambda name: moments[name]),
    )
