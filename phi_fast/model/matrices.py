"""The matrices of hidden layers, which Muon orthogonalises, and the optimizer's groups that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..recipes import decays
from .merged import SHARES, parts_of

NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight")
"""Matrices that map from or to tokens: they are Adam's, as Muon's author advises."""


def is_hidden_matrix(name: str, dims: int) -> bool:
    """Return whether a parameter of phi, merged or split, is the matrix of a hidden layer."""
    return dims == 2 and not name.endswith(NOT_HIDDEN)


def parts(name: str, weight: Tensor) -> Sequence[Tensor]:
    """Split a hidden matrix into views of those that are matrices of their own: q, k, v and fc1; dense and fc2.

    A merged matrix is one only for speed: orthogonalised as a whole, its parts would depend on each other. A matrix
    that is not merged is its own part.
    """
    for ours in SHARES:
        if name.endswith(ours):
            return parts_of(ours, weight)
    return [weight]


def parameter_group(name: str, dims: int, *, optimizer: str, decay: str) -> int:
    """Return the place of a parameter's group among the optimizer's groups, of which empty ones are left out.

    0: Muon's matrices; 1: Adam's parameters with weight decay; 2: those without. optimizer, decay: the recipe's.
    """
    if optimizer == "muon" and is_hidden_matrix(name, dims):
        return 0
    return 1 if decays(decay, dims) else 2
