"""Muon: momentum whose matrices are orthogonalised before the update.

Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/) with the scale of Moonlight (arXiv 2502.16982, section
2.2), which gives the update of a matrix the root mean square of AdamW's, so that AdamW's learning rate and weight decay
carry over. It is for the matrices of hidden layers; embeddings, the head, biases and norms are Adam's. `muon_step_`
steps whole matrices; a trainer that holds only a part of each uses the three parts, `momentum_`, `orthogonalize` and
`update_`. None waits for the GPU. On a GPU the symmetric products are Triton's, on a CPU momentum and update are C++'s;
the rest is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backend
from .reference import muon as reference

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic: it has the largest slope at 0, and moves singular values to about 0.7 … 1.2, not to 1."""
STEPS = 5
EPS = 1e-7
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Number formats of the iteration. fp16 is none of them: a gradient's norm may leave its range."""


def _kernels(device: torch.device) -> Any:
    """The module that runs the op; for torch.compile plain PyTorch, which it fuses."""
    return reference if torch.compiler.is_compiling() else backend.implementation("muon", device)


def update_scale(rows: int, columns: int) -> float:
    """Compute Moonlight's factor on the learning rate of a matrix, 0.2 · sqrt(max(rows, columns))."""
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalize(
    matrix: Tensor,
    *,
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Replace the singular values of a (rows, columns) matrix by about 1, by Newton-Schulz iterations in `dtype`.

    Returns a new matrix in `dtype` (bf16, fp32 or fp64). A matrix of zeros stays zero; eps is the smallest Frobenius
    norm it is divided by. Raises ValueError for another number of dimensions, or another dtype.
    """
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ValueError(f"matrix is {tuple(matrix.shape)}: expected (rows, columns), neither of them 0")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: expected one of {', '.join(map(str, DTYPES))}")
    if steps < 0:
        raise ValueError(f"steps={steps}: expected 0 or more")
    with torch.no_grad():
        return _kernels(matrix.device).orthogonalize(matrix.to(dtype), steps, coefficients, eps)


@torch.no_grad()
def momentum_(
    grad: Tensor,
    momentum: Tensor,
    direction: Tensor,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update `momentum` (fp32) by a gradient, and write into `direction` what is to be orthogonalised.

    All three have the same number of elements; grad and direction are of any float dtype. grad_scale, found_inf: as
    in `adam.adam_step_`. Raises ValueError for tensors of other sizes.
    """
    for name, tensor in (("grad", grad), ("direction", direction)):
        if tensor.numel() != momentum.numel() or tensor.device != momentum.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}, not the {momentum.numel()} elements of momentum "
                f"on {momentum.device}"
            )
    _kernels(momentum.device).momentum_(grad, momentum, direction, beta, nesterov, grad_scale, found_inf)


@torch.no_grad()
def update_(
    param: Tensor,
    update: Tensor,
    momentum: Tensor,
    master: Tensor | None = None,
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float = 0.0,
    found_inf: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Step a parameter, or a part of it, by its orthogonalised `update`, with decoupled weight decay.

    scale: factor on lr alone, see `update_scale`. momentum is read for `nonfinite`. master (fp32), found_inf and
    nonfinite: as in `adam.adam_step_`.
    """
    _kernels(param.device).update_(param, master, update, momentum, lr, scale, weight_decay, found_inf, nonfinite)


def muon_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masters: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    dtype: torch.dtype = torch.bfloat16,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """One step of Muon on lists of (rows, columns) matrices, in place.

    momenta: fp32, zeros before the first step. masters: fp32 copies that are stepped, then rounded into 16-bit params.
    beta: momentum. dtype: of the orthogonalisation. The other scalars are as in `adam.adam_step_`. It is
    torch.optim.Muon with adjust_lr_fn="match_rms_adamw". Raises ValueError for lists of other lengths or shapes.
    """
    for name, tensors in (("grads", grads), ("momenta", momenta), ("masters", masters)):
        if tensors is not None and len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}: expected as many")
    for i, param in enumerate(params):
        if param.dim() != 2 or 0 in param.shape:
            raise ValueError(f"params[{i}] is {tuple(param.shape)}: expected (rows, columns), neither of them 0")
        for name, tensors in (("grads", grads), ("momenta", momenta), ("masters", masters)):
            if tensors is not None and tensors[i].shape != param.shape:
                raise ValueError(f"{name}[{i}] is {tuple(tensors[i].shape)} and params[{i}] {tuple(param.shape)}")
    for i, param in enumerate(params):
        momentum, master = momenta[i], None if masters is None else masters[i]
        direction = torch.empty_like(param, dtype=dtype)
        momentum_(
            grads[i], momentum, direction, beta=beta, nesterov=nesterov, grad_scale=grad_scale, found_inf=found_inf
        )
        update = orthogonalize(direction, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype)
        update_(
            param,
            update,
            momentum,
            master,
            lr=lr,
            scale=update_scale(*param.shape),
            weight_decay=weight_decay,
            found_inf=found_inf,
            nonfinite=nonfinite,
        )
    increment_version([*params, *momenta, *(masters or ())])
