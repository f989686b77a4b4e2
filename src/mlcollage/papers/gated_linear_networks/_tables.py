"""Weight rows of one head: dense tables with a row per context, or lazy ones that make a row at its first visit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

from . import _kernels
from ._gates import writable

Array = NDArray[Any]


class RowTable:
    """Weight rows of one head: dense (every context has a row) or lazy (a row is made when its context is first seen).

    Both are the same to the learning loop, which reads the row number of each neuron's active context, the place where
    that row starts in one flat array, and its visit count. A lazy table holds at most one row per neuron and sample,
    whatever ``2**m`` is, and gives exactly the same numbers as a dense one.

    Parameters
    ----------
    sizes : ndarray of int, (layers,)
        Neurons in each layer.
    fans : ndarray of int, (layers,)
        Inputs of a neuron in each layer, with the bias.
    context_dim : int
        Hyperplanes of a neuron, ``m``.
    initial : ndarray, (layers,)
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
        self.layer = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)  # (neurons,)
        neurons = len(self.layer)
        if lazy:
            # The first rows, one per layer, stay untrained: contexts never seen are predicted with them.
            self.first = np.zeros(neurons, np.int32)
            capacity = len(sizes) + 64 * neurons
            self.keys = np.full(capacity, -1, np.int64)
            self.start = np.zeros(capacity, np.int64)
            self.start[: len(sizes)] = np.cumsum(fans) - fans
            self.counts = np.zeros(capacity, np.int64)
            self.weights = np.empty(capacity * int(fans.max()), dtype)
            self.weights[: fans.sum()] = np.repeat(self.initial, fans)
            self.used = np.array([len(sizes), fans.sum()], np.int64)
            self._hash()
        else:
            # Row of a neuron's context c: first[neuron] + c.
            rows = sizes * 2**context_dim
            self.first = (np.arange(neurons) * 2**context_dim).astype(np.int32)
            fan = np.repeat(fans, rows)  # (rows,)
            self.start = np.cumsum(fan) - fan
            self.counts = np.zeros(rows.sum(), np.int64)
            self.weights = np.repeat(self.initial, rows * fans)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    @property
    def arrays(self) -> _kernels.Rows:
        """The rows as the compiled loops read and write them."""
        return cast(_kernels.Rows, (self.start, self.weights, self.counts))  # see _kernels.plain

    def rows(self, contexts: Array, *, allocate: bool) -> Array:
        """Row numbers ``(n, neurons)`` int32; contexts never seen get their layer's untrained row unless allocating.

        ``contexts (n, neurons)`` are the active contexts, added to :attr:`first`.
        """
        if not self.lazy:
            return contexts
        rows = np.empty_like(contexts)
        done = 0
        while True:
            lazy = _kernels.LazyRows(self.slots, self.keys, self.used, self.layer, self.fans, self.initial)
            bits = self.context_dim
            done = _kernels.find_rows(contexts, done, bits, _kernels.plain(lazy), self.arrays, allocate, rows)
            if done == len(contexts):
                return rows
            self._grow()

    def _grow(self) -> None:
        """Double the capacity."""
        rows, capacity = len(self.keys), 2 * len(self.keys)
        for name, fill in (("keys", -1), ("start", 0), ("counts", 0)):
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
        _kernels.hash_rows(self.keys, len(self.sizes), int(self.used[0]), self.slots)

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
                full[neuron - begin, context] = self.weights[self.start[row] : self.start[row] + fan]
        return full

    def widen(self, extra: int) -> RowTable:
        """The same table with ``extra`` further inputs to the first layer, at their starting weights."""
        fans = self.fans.copy()
        fans[0] += extra
        wider = RowTable(self.sizes, fans, self.context_dim, self.initial, self.weights.dtype, lazy=self.lazy)
        if self.lazy:
            rows = int(self.used[0])
            # Layer of each row, (rows,)
            owner = np.concatenate([np.arange(len(fans)), self.layer[self.keys[len(fans) : rows] >> self.context_dim]])
            wider.keys, wider.start = self.keys.copy(), np.zeros_like(self.start)
            wider.start[:rows] = np.cumsum(fans[owner]) - fans[owner]
            wider.used = np.array([rows, fans[owner].sum()], np.int64)
            wider.weights = np.empty(len(self.keys) * int(fans.max()), self.weights.dtype)
            wider.weights[: wider.used[1]] = np.repeat(self.initial[owner], fans[owner])
            wider._hash()
        else:
            owner = np.repeat(np.arange(len(fans)), self.sizes * 2**self.context_dim)
        wider.counts = self.counts.copy()
        for layer in range(len(fans)):
            mine = np.flatnonzero(owner == layer)[:, None]
            columns = np.arange(self.fans[layer])
            # (rows of the layer, old fan): the weights of the inputs that were there
            wider.weights[wider.start[mine] + columns] = self.weights[self.start[mine] + columns]
        return wider

    def state(self) -> dict[str, Array]:
        """Arrays that determine the table."""
        if not self.lazy:
            return {"weights": self.weights, "counts": self.counts}
        rows, end = int(self.used[0]), int(self.used[1])
        named = {"counts": self.counts, "keys": self.keys, "start": self.start}
        return {"weights": self.weights[:end]} | {name: array[:rows] for name, array in named.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
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
        for name in ("counts", "keys", "start"):
            getattr(self, name)[:rows] = state[name]
        self._hash()
