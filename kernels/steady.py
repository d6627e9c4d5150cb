"""What FusedAdam stepped last, and whether it is the same now: to check 196 tensors in five lists is 2 ms of Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference.adam import AdamLists

_PLAIN = Tensor.__torch_dispatch__


class Work(NamedTuple):
    """One launch of a step."""

    lists: AdamLists
    params: list[Tensor]
    states: list[list[Tensor]]
    """The optimizer's own tensors: `lists` holds their local parts, or views of them."""

    def now(self) -> AdamLists:
        """Return `lists`; where `Steady` left its gradients out, with those that the parameters have now."""
        return self.lists if self.lists.grads else replace(self.lists, grads=[p.grad for p in self.params])  # type: ignore[misc]


class Steady:
    """The launches of a group's step, by the step tensor that they share. It keeps no gradient alive."""

    def __init__(
        self, group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]], steps: list[tuple[Tensor, list[Work]]]
    ) -> None:
        self.steps = [
            (step, [work._replace(lists=replace(work.lists, grads=())) for work in works]) for step, works in steps
        ]
        self._seen = _signature(group, state)

    def holds(self, group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether a step would work on the same memory as when this was made."""
        return self._seen is not None and self._seen == _signature(group, state)


def _signature(group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> list[Any] | None:
    """All that the launches follow from. None where they must be made anew each time: for tensors with other strides,
    whose gradients may be copied, and for DTensors, whose local parts may be new tensors.

    Tensors are compared by identity (`Steady` holds them, so that no other takes it over) and by address.
    """
    seen: list[Any] = [group["master_weights"]]
    for p in group["params"]:
        grad, entry = p.grad, state.get(p)
        if grad is None:
            continue
        plain = type(grad) is Tensor and grad.layout is torch.strided and type(p).__torch_dispatch__ is _PLAIN
        if entry is None or not (plain and grad.is_contiguous() and p.is_contiguous()):
            return None
        seen += (id(p), p.data_ptr(), p.dtype, grad.data_ptr(), grad.dtype)
        for value in entry.values():
            seen += (id(value), value.data_ptr())
    return seen
