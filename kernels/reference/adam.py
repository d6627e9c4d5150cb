"""Adam and its gradient norm in plain PyTorch.

The contracts of `step_` and `grad_norm_squared`, which every back end keeps, are their docstrings. State, checks and
the optimizer class are the public op's (`kernels/adam.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamLists:
    """The tensors of a step, in lists of equal length.

    The i-th tensors have the same number of elements and are contiguous.
    """

    params: Sequence[Tensor]
    """fp32, fp16 or bf16; written."""
    grads: Sequence[Tensor]
    """fp32, fp16 or bf16, one dtype that may differ from the parameters'; read only."""
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    """fp32, as exp_avgs."""
    masters: Sequence[Tensor] | None = None
    """fp32, read instead of the parameters and written beside them; None: there are none."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What a back end made of the tensors' addresses, for the next step on the same lists."""

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.masters


class AdamOptions(NamedTuple):
    """What a step takes beside its lists of tensors; scalars are fp32 tensors of one element on their device."""

    step: Tensor
    """The count t of THIS step, 1 for the first; read, never written."""
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    """AdamW's decay (arXiv 1711.05101); False: an L2 penalty in the gradient."""
    bias_correction: bool = True
    """False: 1 in the place of both 1 - β^t."""
    grad_scale: Tensor | None = None
    """Multiplied onto every gradient: 1 / (loss scale × clip)."""
    found_inf: Tensor | None = None
    """Where it is not 0 nothing at all is written."""
    nonfinite: Tensor | None = None
    """Set to 1 where a weight as it is stored, or a moment, is not finite after the step, and left as it was elsewhere:
    found in the same pass, without a host sync."""


def step_(lists: AdamLists, options: AdamOptions) -> None:
    """One Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101, `decoupled`) step on every tensor of the lists, in place.

    In fp32 for every element, in torch.optim's order of operations, so that trajectories stay within rounding of its
    own; the scalars 1 - lr·weight_decay and 1 - β^t are formed in fp64, or in fp32 without cancellation, then rounded:
        g = grad · grad_scale;   g += weight_decay · p (not decoupled);   p *= 1 - lr·weight_decay (decoupled)
        m += (1-β1)·(g - m);     v = β2·v + ((1-β2)·g)·g
        p -= (lr / (1-β1^t) · m) / (sqrt(v) / sqrt(1-β2^t) + eps)
    """
    params, grads, exp_avgs, exp_avg_sqs, masters = lists.tensors
    _, lr, (beta1, beta2), eps, weight_decay, decoupled, bias_correction, grad_scale, found_inf, nonfinite = options
    t = options.step.double()
    step_size = lr / (1 - beta1**t) if bias_correction else lr
    root2 = (1 - beta2**t).sqrt() if bias_correction else 1.0
    for i, param in enumerate(params):
        master = param if masters is None else masters[i]
        wide = torch.promote_types(master.dtype, torch.float32)
        p, g = master.to(wide), grads[i].reshape(param.shape).to(wide)
        if grad_scale is not None:
            g = g * grad_scale
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g.add(p, alpha=weight_decay)
        m = torch.lerp(exp_avgs[i], g, 1 - beta1)
        v = torch.addcmul(exp_avg_sqs[i] * beta2, g, g, value=1 - beta2)
        p = p - (step_size * m) / (v.sqrt() / root2 + eps)
        for old, new in ((param, p), (master, p), (exp_avgs[i], m), (exp_avg_sqs[i], v)):
            old.copy_(new if found_inf is None else torch.where(found_inf == 0, new.to(old.dtype), old))
        if nonfinite is not None:
            mark_nonfinite_(nonfinite, (param, exp_avgs[i], exp_avg_sqs[i]), found_inf)


def mark_nonfinite_(flag: Tensor, tensors: Sequence[Tensor], found_inf: Tensor | None) -> None:
    """Set `flag` to 1 where an element of `tensors` is not finite, unless `found_inf` skipped the step."""
    for tensor in tensors:
        kept = tensor.isfinite().all() if found_inf is None else tensor.isfinite().all() | (found_inf != 0)
        flag.copy_(torch.where(kept, flag, 1.0))


def grad_norm_squared(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of every element of `grads`: an fp32 scalar tensor on their device, without a host sync.

    grads: fp32, fp16 or bf16, contiguous, one device. Deterministic: the same tensors give the same bits. An inf or NaN
    anywhere gives inf or NaN, so that one `isfinite` of the result is the overflow check of the same pass.
    """
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads]).sum().float()
