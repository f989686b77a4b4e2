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

from mlcollage.errors import InvalidInput

from .kernels import active

__all__ = ["DENSE_LIMIT", "MAX_CONTEXT_DIM", "Contexts", "RowTable", "draw_hyperplanes", "pack_bits", "writable"]

Array = NDArray[Any]
MAX_CONTEXT_DIM = 30
DENSE_LIMIT = 256 * 2**20  # bytes of all dense tables together above which tables="auto" allocates rows on first sight


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
    normals = rng.normal(size=(count, side_dim))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(float).tiny)
    return normals, offsets


def pack_bits(bits: Array) -> Array:
    """Pack booleans ``(..., m)`` to context indices in the smallest unsigned type that holds ``2**m - 1``.

    Examples
    --------
    >>> pack_bits(np.array([[True, False, True], [False, True, False]]))
    array([5, 2], dtype=uint8)
    """
    m = bits.shape[-1]
    return (bits @ (1 << np.arange(m, dtype=np.int64))).astype(_smallest(m))


def _smallest(m: int) -> type[np.unsignedinteger]:
    return np.uint8 if m <= 8 else np.uint16 if m <= 16 else np.uint32


def writable(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same attributes with read-only arrays copied: unpickled from a memory map, they could not be learned on."""
    return {
        name: np.array(value) if isinstance(value, np.ndarray) and not value.flags.writeable else value
        for name, value in state.items()
    }


class Contexts:
    """Context indices of many heads at once, from one matrix product a chunk.

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
        self.normals = np.empty((0, 0), self.dtype)
        self.offsets = np.empty(0, self.dtype)

    @property
    def per_head(self) -> int:
        """Hyperplanes of one head."""
        return self.neurons * self.context_dim

    def append(self, normals: Array, offsets: Array) -> None:
        """Add the hyperplanes of one or more heads, ``(neurons * context_dim, D)`` each."""
        normals = np.ascontiguousarray(normals, self.dtype)
        self.normals = np.concatenate([self.normals, normals]) if self.normals.size else normals
        self.offsets = np.concatenate([self.offsets, offsets.astype(self.dtype)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    def gates(self, side: Array, heads: Sequence[int], *, together: bool = True) -> Callable[[int, Array], Array]:
        """Project on the hyperplanes of the given heads; the function returned packs the bits of one of them.

        It takes the position in ``heads`` and the number to add to each neuron's index (``(neurons,)``, int32), and
        returns ``(n, neurons)`` int32. With ``together`` there is one matrix product for all heads, here; without, one
        a head, when the function is called (so that threads share the work).
        """
        width = self.per_head
        normals, offsets = self.normals, self.offsets
        if together and list(heads) != list(range(len(offsets) // width if width else len(heads))):
            index = np.concatenate([np.arange(h * width, (h + 1) * width) for h in heads])
            normals, offsets = normals[index], offsets[index]
        everything = side @ normals.T if together else None
        # Twice the classical bound D u |v||z| (eps = 2 u) on the error of a dot product; the v have length one.
        norms = np.sqrt(np.square(side) @ np.ones(side.shape[1], self.dtype)) + np.abs(offsets).max(initial=0)
        tolerances = (norms * ((side.shape[1] + 4) * np.finfo(self.dtype).eps)).astype(self.dtype)

        def pack(position: int, first: Array) -> Array:
            contexts = np.empty((len(side), self.neurons), np.int32)
            column, planes, thresholds, projected = position * width, normals, offsets, everything
            if projected is None:
                mine = slice(heads[position] * width, (heads[position] + 1) * width)
                column, planes, thresholds = 0, normals[mine], offsets[mine]
                projected = side @ planes.T
            active().pack(projected, column, side, tolerances, planes, thresholds, first, self.context_dim, contexts)
            return contexts

        return pack


class RowTable:
    """Weight rows of one head: dense (every context has a row) or lazy (a row is made when its context is first seen).

    Both are the same to the learning loop, which reads the row number of each neuron's active context, the place where
    that row starts in one flat array, and its visit count. A lazy table holds at most one row for each neuron and
    sample, whatever ``2**m`` is, and gives exactly the same numbers as a dense one.

    Parameters
    ----------
    sizes : sequence of int
        Neurons in each layer.
    fans : sequence of int
        Inputs of a neuron in each layer, with the bias.
    context_dim : int
        Hyperplanes of a neuron.
    initial : sequence of float
        Starting weight of each layer.
    dtype : numpy dtype
        Of the weights.
    lazy : bool, default False
        Make rows on first sight.
    """

    def __init__(
        self, sizes: Array, fans: Array, context_dim: int, initial: Array, dtype: Any, *, lazy: bool = False
    ) -> None:
        self.sizes, self.fans, self.context_dim, self.lazy = sizes, fans, context_dim, lazy
        self.initial = initial.astype(dtype)
        self.layer = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        neurons = len(self.layer)
        if lazy:
            self.first = np.zeros(neurons, np.int32)
            capacity = len(sizes) + 64 * neurons
            self.keys = np.full(capacity, -1, np.int64)
            self.row_start = np.zeros(capacity, np.int64)
            self.row_start[: len(sizes)] = np.cumsum(fans) - fans
            self.counts = np.zeros(capacity, np.int64)
            self.weights = np.empty(capacity * int(fans.max()), dtype)
            self.weights[: fans.sum()] = np.repeat(self.initial, fans)
            self.used = np.array([len(sizes), fans.sum()], np.int64)
            self._hash()
        else:
            rows = sizes * 2**context_dim
            self.first = (np.arange(neurons) * 2**context_dim).astype(np.int32)
            fan = np.repeat(fans, rows)
            self.row_start = np.cumsum(fan) - fan
            self.counts = np.zeros(rows.sum(), np.int64)
            self.weights = np.repeat(self.initial, rows * fans)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    def rows(self, contexts: Array, *, allocate: bool) -> Array:
        """Row numbers ``(n, neurons)`` int32; contexts never seen get their layer's untrained row unless allocating."""
        if not self.lazy:
            return contexts
        rows = np.empty_like(contexts)
        done = 0
        while True:
            done = active().find_rows(
                contexts,
                done,
                self.context_dim,
                self.slots,
                self.keys,
                self.row_start,
                self.used,
                self.fans,
                self.layer,
                self.weights,
                self.initial,
                allocate,
                rows,
            )
            if done == len(contexts):
                return rows
            self._grow()

    def _grow(self) -> None:
        rows, capacity = len(self.keys), 2 * len(self.keys)
        for name, fill in (("keys", -1), ("row_start", 0), ("counts", 0)):
            larger = np.full(capacity, fill, np.int64)
            larger[:rows] = getattr(self, name)
            setattr(self, name, larger)
        weights = np.empty(capacity * int(self.fans.max()), self.weights.dtype)
        weights[: self.used[1]] = self.weights[: self.used[1]]
        self.weights = weights
        self._hash()

    def _hash(self) -> None:
        """Build the open-addressing table again from the keys in order of first sight."""
        self.slots = np.full(1 << int(4 * len(self.keys) - 1).bit_length(), -1, np.int32)
        active().hash_rows(self.keys, len(self.sizes), int(self.used[0]), self.slots)

    def dense(self, layer: int) -> Array:
        """Weights of one layer as ``(K_l, 2**m, fan)``: a view of a dense table; a lazy one is filled in."""
        size, fan, contexts = int(self.sizes[layer]), int(self.fans[layer]), 2**self.context_dim
        if not self.lazy:
            start = int((self.sizes[:layer] * self.fans[:layer]).sum()) * contexts
            return self.weights[start : start + size * contexts * fan].reshape(size, contexts, fan)
        full = np.full((size, contexts, fan), self.initial[layer])
        begin = int(self.sizes[:layer].sum())
        for row in range(len(self.sizes), int(self.used[0])):
            neuron, context = divmod(int(self.keys[row]), contexts)
            if begin <= neuron < begin + size:
                full[neuron - begin, context] = self.weights[self.row_start[row] : self.row_start[row] + fan]
        return full

    def widen(self, extra: int) -> RowTable:
        """The same table with ``extra`` further inputs to the first layer, at their starting weights."""
        fans = self.fans.copy()
        fans[0] += extra
        wider = RowTable(self.sizes, fans, self.context_dim, self.initial, self.weights.dtype, lazy=self.lazy)
        if self.lazy:
            rows = int(self.used[0])
            owner = np.concatenate([np.arange(len(fans)), self.layer[self.keys[len(fans) : rows] >> self.context_dim]])
            start = np.cumsum(fans[owner]) - fans[owner]
            wider.keys, wider.counts = self.keys.copy(), self.counts.copy()
            wider.row_start = np.zeros_like(self.row_start)
            wider.row_start[:rows] = start
            wider.used = np.array([rows, fans[owner].sum()], np.int64)
            wider.weights = np.empty(len(self.keys) * int(fans.max()), self.weights.dtype)
            wider.weights[: wider.used[1]] = np.repeat(self.initial[owner], fans[owner])
            wider._hash()
        else:
            rows = len(self.row_start)
            owner = np.repeat(np.arange(len(fans)), self.sizes * 2**self.context_dim)
            wider.counts = self.counts.copy()
        for layer in range(len(fans)):
            mine = np.flatnonzero(owner == layer)
            columns = np.arange(self.fans[layer])
            wider.weights[wider.row_start[mine][:, None] + columns] = self.weights[
                self.row_start[mine][:, None] + columns
            ]
        return wider

    def state(self) -> dict[str, Array]:
        """Arrays that determine the table."""
        if not self.lazy:
            return {"weights": self.weights, "counts": self.counts}
        rows, end = int(self.used[0]), int(self.used[1])
        return {
            "weights": self.weights[:end],
            "counts": self.counts[:rows],
            "keys": self.keys[:rows],
            "row_start": self.row_start[:rows],
        }

    def restore(self, state: dict[str, Array]) -> None:
        """Set the table to a saved :meth:`state`."""
        if not self.lazy:
            for name in ("weights", "counts"):
                if state[name].shape != getattr(self, name).shape:
                    raise InvalidInput(
                        f"The saved {name} have shape {state[name].shape}, but this network needs "
                        f"{getattr(self, name).shape}: load them with the settings they were saved with."
                    )
                setattr(self, name, state[name].astype(getattr(self, name).dtype))
            return
        rows, end = len(state["keys"]), len(state["weights"])
        while len(self.keys) < rows or len(self.weights) < end:
            self._grow()
        self.used = np.array([rows, end], np.int64)
        self.weights[:end] = state["weights"]
        for name in ("counts", "keys", "row_start"):
            getattr(self, name)[:rows] = state[name]
        self._hash()
