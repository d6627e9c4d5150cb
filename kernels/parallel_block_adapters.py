"""Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) of the parts of `parallel_block`'s merged weights.

A part with weight W (outputs, inputs) computes x Wᵀ + scale · (x Aᵀ) Bᵀ, with A (r, inputs) and B (outputs, r). There
are two ways, for T tokens and the 12 d² weights of a block of width d with an MLP of 4d:

- W + scale · B A as one matrix per step. The forward stays as it is, but the gradients of A and B come from that of the
  whole matrix: the backward keeps its 24 d² T FLOPs of weight gradients, a third of training, and another copy of the
  block's weights and one of their gradients exist for a time.
- The products with A and B beside the merged ones. For all six parts each costs 2r times the sum of their inputs and
  outputs, 18 d: 36 d r T FLOPs in the forward, 90 d r T in the backward (x Aᵀ is computed again, not kept), no weight
  gradient, and T r numbers of memory. At d = 2048 and r = 16 this is 2% of the 48 d² T that the merged products cost.

Here it is the second. The merged products stay one each way; adapters add to the columns of their part in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

IN = ("q_proj", "k_proj", "v_proj", "fc1")
"""Parts of the product into the packed buffer [q | k | v | u]: rows of in_weight."""
OUT = ("dense", "fc2")
"""Parts of the product out of [o | g]: columns of out_weight."""
PARTS = (*IN, *OUT)


class Adapters(NamedTuple):
    """Adapters of some parts of a block; `a` and `b` have one tensor for each of `parts`."""

    parts: tuple[str, ...]
    """Names from `PARTS`, each at most once."""
    scale: float
    a: tuple[Tensor, ...]
    """A of each part: (rank, inputs), in the block's dtype."""
    b: tuple[Tensor, ...]
    """B of each part: (outputs, rank), in the block's dtype."""

    @staticmethod
    def of(parts: tuple[str, ...], scale: float, tensors: Sequence[Tensor]) -> Adapters:
        """Make adapters from all A, followed by all B."""
        return Adapters(parts, scale, tuple(tensors[: len(parts)]), tuple(tensors[len(parts) :]))

    def has(self, names: Sequence[str]) -> bool:
        """Whether there are adapters of any of the parts in `names`."""
        return any(part in names for part in self.parts)

    def add_to_packed_(self, packed: Tensor, h: Tensor) -> None:
        """packed (T, 3d + m) += what the adapters make of h (T, d)."""
        for part, a, b in self._of(IN):
            _columns(part, packed, h.shape[1]).addmm_(h @ a.T, b.T, alpha=self.scale)

    def add_to_output_(self, out: Tensor, mixed: Tensor) -> None:
        """out (T, d) += what the adapters make of mixed (T, d + m)."""
        for part, a, b in self._of(OUT):
            out.addmm_(_columns(part, mixed, out.shape[1]) @ a.T, b.T, alpha=self.scale)

    def narrowed(self, names: Sequence[str], gradient: Tensor, d: int) -> dict[str, Tensor]:
        """The gradients of x Aᵀ of the parts in `names`, (T, rank) each; gradient: of packed, or of the output."""
        of = {name: _columns(name, gradient, d) if name in IN else gradient for name in names}
        return {part: (of[part] @ b).mul_(self.scale) for part, _, b in self._of(names)}

    def add_to_gradients_(self, names: Sequence[str], gradient: Tensor, narrowed: dict[str, Tensor], d: int) -> None:
        """Add the share of the parts in `names` to the gradient of h (T, d), or of mixed (T, d + m)."""
        for part, a, _ in self._of(names):
            target = gradient if part in IN else _columns(part, gradient, d)
            target.addmm_(narrowed[part], a)

    def gradients(
        self,
        h: Tensor | None,
        mixed: Tensor,
        dpacked: Tensor,
        dy: Tensor,
        narrowed: dict[str, Tensor],
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        """The gradients of all A, then of all B. product: `weight_gradient.product`. h may be None without parts in
        `IN`."""
        of_a, of_b = [], []
        for part, a, _ in self._of(PARTS):
            d = dy.shape[1]
            x = h if part in IN else _columns(part, mixed, d)
            assert x is not None
            gradient = _columns(part, dpacked, d) if part in IN else dy
            of_a.append(product(narrowed[part], x))
            of_b.append(product(gradient, (x @ a.T).mul_(self.scale)))
        return [*of_a, *of_b]

    def _of(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
        return ((part, a, b) for part, a, b in zip(self.parts, self.a, self.b, strict=True) if part in names)


NONE = Adapters((), 1.0, (), ())
"""Adapters of no part."""


def _columns(part: str, buffer: Tensor, d: int) -> Tensor:
    """The columns of `part` in packed (T, 3d + m) = [q | k | v | u], or in mixed (T, d + m) = [o | g]."""
    if part == "fc1":
        return buffer[:, 3 * d :]
    if part == "fc2":
        return buffer[:, d:]
    return buffer.narrow(1, ("q_proj", "k_proj", "v_proj").index(part) * d if part in IN else 0, d)


def check(adapters: Adapters, x: Tensor, width: int) -> None:
    """Raise ValueError or TypeError for adapters that do not fit a block of input x (batch, sequence, d) whose packed
    buffer has `width` columns."""
    parts, d = adapters.parts, x.shape[2]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or len(set(parts)) < len(parts):
        raise ValueError(f"adapters of the parts {parts}: expected each at most once, from {', '.join(PARTS)}")
    if not len(parts) == len(adapters.a) == len(adapters.b):
        raise ValueError(
            f"adapters: {len(parts)} parts, {len(adapters.a)} A and {len(adapters.b)} B; expected one each"
        )
    m = width - 3 * d
    inputs, outputs = {**dict.fromkeys(PARTS, d), "fc2": m}, {**dict.fromkeys(PARTS, d), "fc1": m}
    for part, a, b in zip(parts, adapters.a, adapters.b, strict=True):
        rank = a.shape[0] if a.dim() == 2 else 0
        for name, tensor, shape in (("a", a, (rank, inputs[part])), ("b", b, (outputs[part], rank))):
            if tensor.shape != shape or rank < 1:
                raise ValueError(
                    f"adapters.{name} of {part} has shape {tuple(tensor.shape)}; expected "
                    f"{'(rank, ' + str(inputs[part]) + ')' if name == 'a' else shape}, with a rank of at least 1"
                )
            if tensor.dtype != x.dtype:
                raise TypeError(f"adapters.{name} of {part} is {tensor.dtype} and x is {x.dtype}; cast to one dtype")
            if tensor.device != x.device:
                raise ValueError(f"adapters.{name} of {part} is on {tensor.device} and x is on {x.device}")
