"""Adam and its gradient norm in C++; the contract is `reference/adam.py`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference.adam import AdamLists, AdamOptions
from ._tensors import described, maybe

_OP = "adam"


def step_(lists: AdamLists, options: AdamOptions) -> None:
    """See `reference.adam.step_`. Raises TypeError for another dtype, ValueError for tensors that do not fit."""
    params, grads, exp_avgs, exp_avg_sqs, masters = lists.tensors
    step, lr, betas, eps, weight_decay, decoupled, bias_correction, grad_scale, found_inf, nonfinite = options
    if found_inf is not None and float(found_inf) != 0:
        return
    all_masters: Sequence[Tensor | None] = masters if masters is not None else [None] * len(params)
    tensors = [
        (*(described(_OP, tensor) for tensor in together), maybe(_OP, master))
        for *together, master in zip(params, grads, exp_avgs, exp_avg_sqs, all_masters, strict=True)
    ]
    for together in (params, grads):
        _check_one_dtype(together)
    rate, t = float(lr), float(step)
    # 1 - β^t without the cancellation of the difference
    correction1, correction2 = (-math.expm1(t * math.log(beta)) if beta and bias_correction else 1.0 for beta in betas)
    finite = cpu.adam(
        tensors,
        1.0 if grad_scale is None else float(grad_scale),
        *betas,
        rate / correction1,
        1 / math.sqrt(correction2),
        eps,
        0.0 if decoupled else weight_decay,
        1 - rate * weight_decay if decoupled else 1.0,
        torch.get_num_threads(),
    )
    if nonfinite is not None and not finite:
        nonfinite.fill_(1.0)


def grad_norm_squared(grads: Sequence[Tensor]) -> Tensor:
    """See `reference.adam.grad_norm_squared`; the tensors may differ in dtype."""
    total = 0.0
    for dtype in {g.dtype: None for g in grads}:
        together = [g for g in grads if g.dtype == dtype]
        total += cpu.grad_norm_squared([described(_OP, g) for g in together], torch.get_num_threads())
    return torch.tensor(total, dtype=torch.float64).float()


def _check_one_dtype(tensors: Sequence[Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1:
        raise ValueError(f"adam: one list holds {', '.join(sorted(map(str, dtypes)))}; expected one dtype a call")
