"""Adam by NVIDIA's apex (github.com/NVIDIA/apex, `amp_C`'s capturable kernels), found when it is first asked for.

apex takes gradients of the parameters' dtype, and 16-bit parameters only with fp32 masters. It writes the unscaled
gradient back; so if there is a scale, it works on a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.adam import AdamLists, AdamOptions, mark_nonfinite_
from .apex_layer_norm import library

CHUNK = 2048 * 32  # elements per thread block, as in apex's own multi_tensor_applier


def step_(lists: AdamLists, options: AdamOptions) -> None:
    """Same contract as `reference.adam.step_`, with a second pass over memory for `nonfinite`.

    Raises ValueError for dtypes that apex does not combine.
    """
    params, grads, exp_avgs, exp_avg_sqs, masters = lists.tensors
    step, lr, betas, eps, weight_decay, decoupled, bias_correction, grad_scale, found_inf, nonfinite = options
    kernels = library("amp_C", "adam")
    param, grad = params[0].dtype, grads[0].dtype
    if grad != param or (masters is None and param != torch.float32):
        raise ValueError(
            f"adam: backend 'apex' got {param} parameters, {grad} gradients and {'no' if masters is None else 'fp32'} "
            f"masters; expected gradients of that dtype, and masters for 16-bit ones; or use('auto', op='adam')"
        )
    device = step.device
    rate = lr.to(torch.float32) if isinstance(lr, Tensor) else torch.full((1,), lr, device=device)
    scale = torch.ones(1, device=device) if grad_scale is None else grad_scale.reshape(1)
    skip = torch.zeros(1, device=device) if found_inf is None else found_inf.reshape(1) != 0
    grads = list(grads) if grad_scale is None else [g.clone() for g in grads]
    operands = [grads, list(params), list(exp_avgs), list(exp_avg_sqs)]
    kernel = kernels.multi_tensor_adam_capturable
    if masters is not None:
        operands.append(list(masters))
        kernel = kernels.multi_tensor_adam_capturable_master
    kernel(
        CHUNK,
        skip.to(torch.int32),
        operands,
        rate,
        *betas,
        eps,
        step.to(torch.int32),
        int(decoupled),
        int(bias_correction),
        weight_decay,
        scale,
    )
    if nonfinite is not None:
        for tensors in (params, exp_avgs, exp_avg_sqs):
            mark_nonfinite_(nonfinite, tensors, found_inf)


def grad_norm_squared(grads: Sequence[Tensor]) -> Tensor:
    """Same contract as `reference.adam.grad_norm_squared`."""
    kernels = library("amp_C", "adam")
    squares = []
    for dtype in dict.fromkeys(g.dtype for g in grads):
        flag = torch.zeros(1, dtype=torch.int32, device=grads[0].device)
        norm, _ = kernels.multi_tensor_l2norm(CHUNK, flag, [[g for g in grads if g.dtype == dtype]], False)
        squares.append(norm.double().square().sum())
    return torch.stack(squares).sum().float()
