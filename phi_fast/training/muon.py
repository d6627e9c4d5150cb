"""Muon's step on a flat ZeRO partition (`kernels.muon`): each matrix is orthogonalised whole, by one rank.

Momentum and update are done where the partition is. Between them a rank sends its pieces of each matrix to the matrix's
owner, in one exchange, and gets back the pieces of the orthogonalised one in another. Both are in bf16 (in fp32 if the
model is), so that a rank sends and receives twice 2 bytes per element of its partition, at most. Owners have equal
shares of the floating-point operations, to within one merged matrix. Every rank computes the same function of the same
whole matrix, so the number of ranks changes no bit of an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.muon import STEPS, momentum_, orthogonalize, update_, update_scale
from ..model.matrices import parts
from ..recipes import Recipe
from .distributed import World

CHUNK = 2**24
"""Elements that are stepped at once, which bounds the fp32 temporaries."""


def moments(group: dict[str, Any]) -> tuple[str, ...]:
    """Name the fp32 tensors, beside the masters, that the step of an optimizer's group keeps."""
    return ("momentum",) if group.get("muon") else ("exp_avg", "exp_avg_sq")


def cost(shape: Sequence[int]) -> int:
    """Count the floating-point operations of orthogonalising a (rows, columns) matrix."""
    small, large = sorted(shape)
    return STEPS * 2 * small * small * (2 * large + small)


def share_out(costs: Sequence[int], ranks: int) -> list[int]:
    """Choose an owner for each cost: the largest first, each for the rank that has the least so far."""
    loads, owners = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


class MuonStep:
    """Steps this rank's partition of a flat group of matrices.

    names: the name of each parameter in the model. weights, offsets: the group's matrices, and where each begins in
    the flat group. length: number of elements of a partition.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        weights: Sequence[nn.Parameter],
        offsets: Sequence[int],
        length: int,
        world: World,
        momentum: float,
    ) -> None:
        self._world, self._momentum = world, momentum
        self._dtype = torch.float32 if weights[0].dtype == torch.float32 else torch.bfloat16
        owners = share_out([sum(cost(p.shape) for p in parts(names[w], w)) for w in weights], world.size)
        self._owned = [(names[w], w.shape) for w, owner in zip(weights, owners, strict=True) if owner == world.rank]
        ends = [offset + weight.numel() for weight, offset in zip(weights, offsets, strict=True)]
        # pieces[rank][owner]: (begin, end) in the rank's partition, of each matrix of the owner.
        pieces = [
            [
                [
                    (max(begin - rank * length, 0), min(end - rank * length, length))
                    for begin, end, theirs in zip(offsets, ends, owners, strict=True)
                    if theirs == owner and begin < (rank + 1) * length and end > rank * length
                ]
                for owner in range(world.size)
            ]
            for rank in range(world.size)
        ]
        self._pieces = [piece for owner in pieces[world.rank] for piece in owner]
        self._sent = [_elements(owner) for owner in pieces[world.rank]]
        self._received = [_elements(rank[world.rank]) for rank in pieces]

    @staticmethod
    def of(zero: Any, model: nn.Module, world: World, recipe: Recipe) -> MuonStep | None:
        """Make the step of group 0 of DeepSpeed's optimizer `zero`; None if that is not Muon's."""
        if not zero.optimizer.param_groups[0].get("muon"):
            return None
        names = {parameter: name for name, parameter in model.named_parameters()}
        layout = zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0]
        return MuonStep(names, *layout, zero.single_partition_of_fp32_groups[0].numel(), world, recipe.muon_momentum)

    def __call__(
        self,
        grads: Sequence[tuple[int, Tensor]],
        weights: Tensor,
        master: Tensor,
        state: dict[str, Tensor],
        options: dict[str, Any],
        *,
        grad_scale: Tensor,
        found_inf: Tensor,
        nonfinite: Tensor,
    ) -> None:
        """Step the partition.

        grads: (offset in the partition, gradient). options: the optimizer's group, with lr and weight_decay. The other
        arguments are as in `kernels.muon`.
        """
        scalars: dict[str, Any] = {name: options[name] for name in ("lr", "weight_decay")}
        scalars |= {"found_inf": found_inf, "nonfinite": nonfinite}
        state["step"] += found_inf == 0
        momentum, direction = state["momentum"], torch.zeros_like(master, dtype=self._dtype)
        for at, grad in grads:
            places = (grad.reshape(-1), *(x.narrow(0, at, grad.numel()) for x in (momentum, direction)))
            for chunk in zip(*(x.split(CHUNK) for x in places), strict=True):
                momentum_(*chunk, beta=self._momentum, grad_scale=grad_scale, found_inf=found_inf)
        self._orthogonalize(direction)
        for chunk in zip(*(x.split(CHUNK) for x in (weights, direction, momentum, master)), strict=True):
            update_(*chunk, scale=1.0, **scalars)  # the owner has scaled the update

    def _orthogonalize(self, direction: Tensor) -> None:
        """Replace this rank's part of all directions by its part of the orthogonalised matrices, scaled."""
        if self._world.size == 1:
            self._orthogonalize_owned(direction)
            return
        # Pieces are in the order of the flat group, and so are the ranks that hold them: what arrives from all ranks,
        # one after the other, is the owned matrices, each whole.
        leaving = torch.cat([direction[:0], *(direction[begin:end] for begin, end in self._pieces)])
        whole = direction.new_empty(sum(self._received))
        dist.all_to_all_single(whole, leaving, self._received, self._sent)
        self._orthogonalize_owned(whole)
        dist.all_to_all_single(leaving, whole, self._sent, self._received)
        for (begin, end), update in zip(self._pieces, leaving.split([e - b for b, e in self._pieces]), strict=True):
            direction[begin:end] = update

    def _orthogonalize_owned(self, whole: Tensor) -> None:
        """Replace this rank's matrices, which lie end to end in `whole`, each by its scaled orthogonalisation."""
        at = 0
        for name, shape in self._owned:
            for part in parts(name, whole.narrow(0, at, shape.numel()).view(shape)):
                part.copy_(orthogonalize(part, dtype=self._dtype).float() * update_scale(*part.shape))
            at += shape.numel()


def _elements(pieces: Sequence[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in pieces)
