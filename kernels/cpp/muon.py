"""Muon on a CPU: momentum and update in C++, each in one pass; the contract is `reference/muon.py`'s.

The iterations are torch's matrix products, which reach what the machine's matrix units give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference.muon import orthogonalize  # noqa: F401
from ._tensors import described, maybe

_OP = "muon"


def momentum_(
    grad: Tensor,
    momentum: Tensor,
    direction: Tensor,
    beta: float,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See `reference.muon.momentum_`. Raises TypeError for another dtype than fp32 of the momentum, or fp64."""
    if found_inf is not None and float(found_inf) != 0:
        return
    flat = _flat(grad), _flat(momentum), _flat(direction)
    cpu.muon_momentum(
        *(described(_OP, x) for x in flat),
        1.0 if grad_scale is None else float(grad_scale),
        beta,
        nesterov,
        torch.get_num_threads(),
    )
    _write_back((momentum, flat[1]), (direction, flat[2]))


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
    """See `reference.muon.update_`. Raises TypeError for fp64."""
    if found_inf is not None and float(found_inf) != 0:
        return
    rate, old = float(lr), param if master is None else master
    flat, whole = _flat(param), None if master is None else _flat(master)
    # Matrices are paired by their indices, so that operands of other strides than the parameter's may be given.
    step = _flat(update.reshape(old.shape))
    finite = cpu.muon_update(
        described(_OP, flat),
        described(_OP, step),
        described(_OP, _flat(momentum)),
        maybe(_OP, whole),
        rate * scale,
        1 - rate * weight_decay,
        torch.get_num_threads(),
    )
    _write_back((param, flat), *(() if master is None or whole is None else ((master, whole),)))
    if nonfinite is not None and not finite:
        nonfinite.fill_(1.0)


def _flat(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy of it."""
    return x.detach().reshape(-1)


def _write_back(*pairs: tuple[Tensor, Tensor]) -> None:
    for tensor, flat in pairs:
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
