"""Muon's three parts in plain PyTorch: momentum, Newton-Schulz orthogonalisation, update.

The contracts of `orthogonalize`, `momentum_` and `update_`, which every back end keeps, are their docstrings. The
checks are the public op's (`kernels/muon.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adam import mark_nonfinite_


def polynomial(x: Tensor, b: float, c: float) -> Tensor:
    """b·XXᵀ + c·(XXᵀ)² of a (rows, columns) matrix, in its own dtype."""
    gram = x @ x.mT
    return torch.addmm(gram, gram, gram, beta=b, alpha=c)


def orthogonalize(
    matrix: Tensor,
    steps: int,
    coefficients: tuple[float, float, float],
    eps: float,
    polynomial: Callable[[Tensor, float, float], Tensor] = polynomial,
) -> Tensor:
    """Newton-Schulz iteration of a (rows, columns) matrix in its own dtype; returns a new matrix.

    X = M / max(|M|, eps) in the Frobenius norm, then `steps` times X = a·X + (b·XXᵀ + c·(XXᵀ)²)·X, on the transpose if
    there are more rows than columns, so that XXᵀ is the smaller of the two Gram matrices. polynomial: computes the
    matrix in parentheses.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x / torch.linalg.vector_norm(x, dtype=wide).clamp(min=eps)
    for _ in range(steps):
        x = torch.addmm(x, polynomial(x, b, c), x, beta=a)
    return x.mT if tall else x


def momentum_(
    grad: Tensor,
    momentum: Tensor,
    direction: Tensor,
    beta: float,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Add a gradient to the momentum, and write the direction to orthogonalise, in fp32 for every element:

        g = grad · grad_scale;   m = beta·m + (1-beta)·g;   direction = (1-beta)·g + beta·m (nesterov), or m

    Where found_inf is not 0, `momentum` keeps its value, and `direction` has no meaning.
    """
    g = grad.to(momentum.dtype).reshape(momentum.shape)
    if grad_scale is not None:
        g = g * grad_scale
    m = torch.lerp(momentum, g, 1 - beta)
    direction.copy_(torch.lerp(g, m, beta) if nesterov else m)
    momentum.copy_(m if found_inf is None else torch.where(found_inf == 0, m, momentum))


def update_(
    param: Tensor,
    master: Tensor | None,
    update: Tensor,
    momentum: Tensor,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    found_inf: Tensor | None,
    nonfinite: Tensor | None,
) -> None:
    """p = p·(1 - lr·weight_decay) - lr·scale·update, in fp32: in the master if there is one, then rounded into param.

    Where found_inf is not 0 nothing is written; where a param or `momentum` is not finite afterwards, nonfinite is 1.
    """
    old = param if master is None else master
    wide = torch.promote_types(old.dtype, torch.float32)
    p = old.to(wide) * (1 - lr * weight_decay) - update.to(wide).reshape(old.shape) * (lr * scale)
    for target in (param,) if master is None else (param, master):
        target.copy_(p if found_inf is None else torch.where(found_inf == 0, p.to(target.dtype), target))
    if nonfinite is not None:
        mark_nonfinite_(nonfinite, (param, momentum), found_inf)
