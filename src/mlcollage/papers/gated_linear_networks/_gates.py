r"""Half-space gating: which row of a neuron's weight table a sample selects.

A neuron owns :math:`m` hyperplanes :math:`(v_j, b_j)`, drawn once and never trained. Side information
:math:`z \in \mathbb{R}^D` falls on one side of each, and the bits make the context

.. math:: c(z) = \sum_j 2^j \, [\, v_j \cdot z > b_j \,] \in \{0, \dots, 2^m - 1\},

with :math:`v_j` uniform on the unit sphere and :math:`b_j \sim N(0, s^2)` (paper, Section 2, "Half-space gating").
Gates do not depend on weights, so all contexts of a chunk of the stream come from one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _kernels

Array = NDArray[Any]


def draw_hyperplanes(
    rng: np.random.Generator, count: int, side_dim: int, *, bias_scale: float = 0.05
) -> tuple[Array, Array]:
    """Hyperplanes with normals uniform on the unit sphere and offsets ``N(0, bias_scale**2)``.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    count : int
        How many hyperplanes.
    side_dim : int
        Width ``D`` of the side information.
    bias_scale : float, default 0.05
        Standard deviation of the offsets (the official code's 0.05).

    Returns
    -------
    normals : ndarray of shape (count, side_dim), float64
    offsets : ndarray of shape (count,), float64

    Examples
    --------
    >>> normals, offsets = draw_hyperplanes(np.random.default_rng(0), 6, 3)
    >>> bool(np.allclose(np.linalg.norm(normals, axis=1), 1))
    True
    """
    offsets = rng.normal(scale=bias_scale, size=count) if bias_scale else np.zeros(count)
    # Normalized Gaussian vectors are uniform on the sphere; a vector of no entries stays as it is.
    normals = rng.normal(size=(count, side_dim))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(float).tiny)
    return normals, offsets


def index_type(context_dim: int) -> type[np.unsignedinteger]:
    """Smallest unsigned type that holds ``2**context_dim - 1``."""
    return np.uint8 if context_dim <= 8 else np.uint16 if context_dim <= 16 else np.uint32


def writable(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same attributes with read-only arrays copied: unpickled from a memory map, they could not be learned on."""
    return {
        name: np.array(value) if isinstance(value, np.ndarray) and not value.flags.writeable else value
        for name, value in state.items()
    }


class Contexts:
    """Context indices of many heads at once, from one matrix product per chunk.

    Parameters
    ----------
    neurons : int
        Neurons of a head.
    context_dim : int
        Hyperplanes of a neuron, ``m``.
    dtype : numpy dtype
        float32 or float64.

    Notes
    -----
    A matrix product rounds differently for different chunk sizes and numbers of threads. Projections so close to
    their threshold that rounding could decide are computed again in a fixed order, hence a bit depends on the sample
    and the hyperplane alone. That makes learning in chunks equal to learning in one go, bit for bit.
    """

    def __init__(self, neurons: int, context_dim: int, dtype: Any) -> None:
        self.neurons, self.context_dim, self.dtype = neurons, context_dim, np.dtype(dtype)
        self.set(np.empty((0, 0)), np.empty(0))

    def set(self, normals: Array, offsets: Array) -> None:
        """Replace all hyperplanes, ``(heads * neurons * m, D)`` and ``(heads * neurons * m,)``."""
        self.normals = np.ascontiguousarray(normals, self.dtype)
        self.offsets = np.ascontiguousarray(offsets, self.dtype)
        self._largest = np.abs(self.offsets).max(initial=0)

    @property
    def per_head(self) -> int:
        """Hyperplanes of one head."""
        return self.neurons * self.context_dim

    def append(self, normals: Array, offsets: Array) -> None:
        """Add the hyperplanes of one or more heads, ``(neurons * context_dim, D)`` each."""
        together = np.concatenate([self.normals, normals]) if len(self.normals) else normals
        self.set(together, np.concatenate([self.offsets, offsets]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    def gates(self, side: Array, heads: Sequence[int], *, together: bool = True) -> Callable[[int, Array], Array]:
        """Project on the hyperplanes of the given heads; the function returned packs the bits of one of them.

        It takes the position in ``heads`` and the number to add to each neuron's index (``(neurons,)``, int32), and
        returns ``(n, neurons)`` int32. With ``together`` there is one matrix product for all heads, here; without, one
        per head, when the function is called (so that threads share the work).
        """
        width = self.per_head
        normals, offsets = self.normals, self.offsets
        # The common case, all heads in their order, needs no copy of the hyperplanes.
        if together and list(heads) != list(range(len(offsets) // width if width else len(heads))):
            index = np.concatenate([np.arange(h * width, (h + 1) * width) for h in heads])
            normals, offsets = normals[index], offsets[index]
        everything = side @ normals.T if together else None  # (n, heads * neurons * m)
        # Twice the classical bound D u |v||z| (eps = 2 u) on the error of a dot product; the v have length one.
        # (n,) both; summed by a product, which is faster than sum(axis=1) for few samples.
        norms = np.sqrt(np.square(side) @ np.ones(side.shape[1], self.dtype)) + self._largest
        tolerances = (norms * ((side.shape[1] + 4) * np.finfo(self.dtype).eps)).astype(self.dtype)

        def pack(position: int, first: Array) -> Array:
            contexts = np.empty((len(side), self.neurons), np.int32)
            column, planes, thresholds, projected = position * width, normals, offsets, everything
            if projected is None:  # (n, neurons * m), of this head alone
                mine = slice(heads[position] * width, (heads[position] + 1) * width)
                column, planes, thresholds = 0, normals[mine], offsets[mine]
                projected = side @ planes.T
            _kernels.pack(projected, column, side, tolerances, planes, thresholds, first, self.context_dim, contexts)
            return contexts

        return pack
