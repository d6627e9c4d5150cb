"""Groups of documents that are linked by pairs, each known by its first document: 8 bytes for each document."""

from __future__ import annotations

from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]


class Clusters:
    """A union-find over the numbers below `count`, joined by arrays of pairs; a cluster's root is its least number."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)

    def roots(self, numbers: _Array) -> _Array:
        """Find the least number of each number's cluster."""
        roots = self._parents[numbers]
        while np.any((above := self._parents[roots]) != roots):
            roots = above
        self._parents[numbers] = roots
        return roots

    def joined(self, left: _Array, right: _Array) -> _Array:
        """Tell which pairs are in one cluster already."""
        same: _Array = self.roots(left) == self.roots(right)
        return same

    def join(self, left: _Array, right: _Array) -> None:
        """Join the clusters of each pair: the greater root gets the lesser as its parent, until all pairs agree."""
        while len(left):
            a, b = self.roots(left), self.roots(right)
            apart = a != b
            left, right = left[apart], right[apart]
            low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            np.minimum.at(self._parents, high, low)  # of several parents, the least; the other pairs are tried again

    def duplicates(self) -> tuple[_Array, _Array]:
        """List the numbers that are not the first of their cluster, ascending, and the first of each one's cluster."""
        roots = self.roots(np.arange(len(self._parents)))
        others = np.flatnonzero(roots != np.arange(len(roots)))
        return others, roots[others]
