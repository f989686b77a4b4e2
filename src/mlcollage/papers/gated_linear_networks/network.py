r"""The Bernoulli gated linear network on arrays: independent heads, learned one sample at a time.

Each neuron mixes the probabilities :math:`p` of the layer below with the weights :math:`w` that its context selects:

.. math::
    q = \sigma(w_{c(z)} \cdot \operatorname{logit}(p)), \qquad
    w_{c(z)} \leftarrow \operatorname{clip}\big(w_{c(z)} - \eta_t \, (q - x) \operatorname{logit}(p), -b, b\big),

and passes on :math:`\operatorname{clip}(q, \epsilon, 1-\epsilon)`. All forward passes of a step use the weights from
before it (Veness et al., AAAI 2021, Section 2). Probabilities are kept as logits throughout, where the clip of a
probability is the clip of its logit to :math:`\pm\operatorname{logit}(1-\epsilon)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

from .context import DENSE_LIMIT, MAX_CONTEXT_DIM, Contexts, RowTable, draw_hyperplanes, pack_bits, writable
from .kernels import active

__all__ = ["GatedNetwork", "LearningRate", "hidden_sizes", "logit", "sigmoid", "step_sizes"]

Array = NDArray[Any]
LearningRate = float | Literal["paper", "official", "sqrt"] | Callable[[int], float]
_CHUNK_ELEMENTS = 1 << 20  # projections held at once: 4 MB in float32, so that they stay in cache
_MAX_CHUNK = 512


def logit(p: Any) -> Any:
    """``log(p / (1 - p))``."""
    return np.log(p) - np.log1p(-p)


def sigmoid(a: Array) -> Array:
    """``1 / (1 + exp(-a))`` without overflow."""
    return np.where(a >= 0, 1, np.exp(-np.abs(a))) / (1 + np.exp(-np.abs(a)))


def hidden_sizes(value: Any) -> tuple[int, ...]:
    """Hidden layer sizes as integers.

    Raises
    ------
    InvalidInput
        What is given is not a sequence of integers >= 1.

    Examples
    --------
    >>> hidden_sizes([16, 8])
    (16, 8)
    """
    try:
        sizes = tuple(value)
    except TypeError:
        sizes = (value, None)
    if not all(_whole(k) and k >= 1 for k in sizes):
        raise InvalidInput(f"Layer sizes must be a sequence of integers >= 1, such as (50, 25); got {value!r}.")
    return tuple(int(k) for k in sizes)


def step_sizes(rate: LearningRate, first: int, count: int, *, initial: float = 0.01) -> Array:
    """Learning rates of steps ``first .. first + count - 1`` (the first step of all is 1).

    Parameters
    ----------
    rate : "paper", "official", "sqrt", float or callable
        ``"paper"``: ``min(initial, 100 / t)``; ``"official"``: ``min(initial, 1 / (1 + 0.1 t))``; ``"sqrt"``:
        ``initial / sqrt(t)``, the decay of the regret bound; a constant; or a function of the step ``t = 1, 2, ...``.
    first, count : int
        The steps.
    initial : float, default 0.01
        Largest rate of the named schedules.

    Examples
    --------
    >>> step_sizes("paper", 10_000, 3)
    array([0.01    , 0.009999, 0.009998])
    """
    t = np.arange(first, first + count, dtype=np.float64)
    if rate == "paper":
        return np.minimum(initial, 100.0 / t)
    if rate == "official":
        return np.minimum(initial, 1.0 / (1.0 + 0.1 * t))
    if rate == "sqrt":
        return initial / np.sqrt(t)
    if callable(rate):
        sizes = np.array([float(rate(int(step))) for step in t], np.float64)
        if not np.isfinite(sizes).all() or (sizes < 0).any():
            raise InvalidInput(
                "learning_rate returned a negative or non-finite step size; it must return a float >= 0."
            )
        return sizes
    return np.full(count, float(rate))


class GatedNetwork:
    r"""Heads of gated linear neurons that share inputs and side information and nothing else.

    Parameters
    ----------
    sizes : sequence of int
        Neurons in each layer; with ``readout="last"`` the last must be 1.
    n_inputs : int
        Base predictions ``d``.
    side_dim : int
        Width ``D`` of the side information.
    context_dim : int, default 4
        Hyperplanes of a neuron ``m``; 0 is plain online logistic mixing.
    eps : float, default 0.01
        Probabilities are clipped to ``[eps, 1 - eps]`` between layers.
    weight_clip : float, default 200
        Box ``b`` of the weights.
    layer_bias : float, default 0.731
        Probability of the constant input of every layer (not 1/2).
    context_bias_scale : float, default 0.05
        Standard deviation of the hyperplanes' offsets.
    weight_init : {"mean", "zeros"}, default "mean"
        Start at 1/fan-in (the geometric mean) or at 0.
    gradient : {"paper", "official"}, default "paper"
        The closed form, or the official code's gradient through the output's clip, which is zero where the raw output
        lies outside ``[eps, 1 - eps]``.
    readout : {"last", "mean"}, default "last"
        The last neuron, or the geometric mean (mean logit) of the last layer.
    tables : {"auto", "dense", "lazy"}, default "auto"
        Whether a row exists for every context or from its first visit on; results are the same.
    nested : bool, default False
        Head ``h`` sees only the first ``h`` inputs and side values (the chain rule of a density model).
    dtype : {"float32", "float64"}, default "float32"
        Of all arithmetic.
    seed : int, default 0
        Head ``h`` draws its hyperplanes from ``(seed, h)``, whenever it is added.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        n_inputs: int,
        side_dim: int,
        *,
        context_dim: int = 4,
        eps: float = 0.01,
        weight_clip: float = 200.0,
        layer_bias: float = 0.731,
        context_bias_scale: float = 0.05,
        weight_init: str = "mean",
        gradient: str = "paper",
        readout: str = "last",
        tables: str = "auto",
        nested: bool = False,
        dtype: Any = "float32",
        seed: int = 0,
    ) -> None:
        _check_settings(sizes, context_dim, eps, weight_clip, layer_bias, weight_init, gradient, readout, tables, dtype)
        self.sizes = np.array(sizes, np.int64)
        self.n_inputs, self.side_dim, self.context_dim = n_inputs, side_dim, context_dim
        self.context_bias_scale, self.weight_init, self.readout = context_bias_scale, weight_init, readout
        self.official, self.tables, self.nested, self.seed = gradient == "official", tables, nested, seed
        self.dtype = np.dtype(dtype)
        self.limit, self.bias = float(logit(1 - eps)), float(logit(layer_bias))
        self.constants = np.array([self.bias, self.limit, weight_clip, 1, 0], self.dtype)
        self.neurons = int(self.sizes.sum())
        self.contexts = Contexts(self.neurons, context_dim, self.dtype)
        self.heads: list[RowTable] = []
        self.steps: list[int] = []
        self._lazy: bool | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    # ------------------------------------------------------------------ heads

    def fans(self, head: int) -> Array:
        """Inputs of a neuron in each layer of a head, with the bias."""
        width = min(head, self.n_inputs) if self.nested else self.n_inputs
        return np.concatenate([[width + 1], self.sizes[:-1] + 1]).astype(np.int64)

    def add_heads(self, count: int) -> None:
        """Add untrained heads; each has its own step count and the hyperplanes that its number gives it."""
        if self._lazy is None:
            self._lazy = self._choose_tables(count)
        planes = []
        for head in range(len(self.heads), len(self.heads) + count):
            fans = self.fans(head)
            initial = 1.0 / fans if self.weight_init == "mean" else np.zeros(len(fans))
            self.heads.append(RowTable(self.sizes, fans, self.context_dim, initial, self.dtype, lazy=self._lazy))
            self.steps.append(0)
            planes.append(self._planes(head))
        if planes:
            self.contexts.append(np.concatenate([p for p, _ in planes]), np.concatenate([b for _, b in planes]))

    def _planes(self, head: int) -> tuple[Array, Array]:
        rng = np.random.default_rng([self.seed, head])
        visible = min(head, self.side_dim) if self.nested else self.side_dim
        normals, offsets = draw_hyperplanes(rng, self.contexts.per_head, visible, bias_scale=self.context_bias_scale)
        return np.pad(normals, ((0, 0), (0, self.side_dim - visible))), offsets

    def dense_bytes(self, count: int) -> int:
        """Bytes that dense tables of ``count`` heads take."""
        rows = sum(int(self.sizes @ self.fans(head)) for head in range(count))
        return rows * 2**self.context_dim * self.dtype.itemsize

    def _choose_tables(self, count: int) -> bool:
        size = self.dense_bytes(count)
        if self.tables == "dense":
            available = _available_memory()
            if size > available or self.neurons * 2**self.context_dim >= 2**31:
                raise InvalidInput(
                    f"Dense tables for context_dim={self.context_dim} would take {size / 1e9:.1f} GB, and "
                    f"{available / 1e9:.1f} GB are available: use tables='lazy', which keeps only contexts that occur, "
                    "or a smaller context_dim."
                )
            return False
        return self.tables == "lazy" or size > DENSE_LIMIT

    def widen(self, extra: int) -> None:
        """Append ``extra`` inputs and as many side values; the gates of samples where these are 0 do not change."""
        normals = [np.empty((0, extra), self.dtype)]
        for head in range(len(self.heads)):
            rng = np.random.default_rng([self.seed, head, self.side_dim])
            normals.append(rng.normal(scale=1 / np.sqrt(max(self.side_dim, 1)), size=(self.contexts.per_head, extra)))
        self.contexts.normals = np.ascontiguousarray(
            np.concatenate([self.contexts.normals, np.concatenate(normals).astype(self.dtype)], axis=1)
        )
        self.heads = [table.widen(extra) for table in self.heads]
        self.n_inputs += extra
        self.side_dim += extra

    # ------------------------------------------------------------------ learning and prediction

    def chunks(self, n: int) -> list[slice]:
        """Cut ``n`` samples so that the projections of a chunk stay in cache (results do not depend on the cut)."""
        columns = max(len(self.contexts.normals), 1)
        size = int(min(_MAX_CHUNK, max(16, _CHUNK_ELEMENTS // columns)))
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def learn(
        self,
        base: Array,
        side: Array,
        targets: Array,
        *,
        rate: LearningRate = "paper",
        initial_rate: float = 0.01,
        weight: Array | None = None,
        heads: Sequence[int] | None = None,
        n_jobs: int = 1,
    ) -> Array:
        """Learn from the samples one after the other.

        Parameters
        ----------
        base : ndarray of shape (n, 1 + d)
            The bias logit, then the clipped logits of the base predictions; in the network's dtype, C-contiguous.
        side : ndarray of shape (n, D)
            Side information.
        targets : ndarray of shape (n, len(heads))
            0 or 1 for each head.
        rate, initial_rate
            See :func:`step_sizes`; each head counts its own steps.
        weight : ndarray of shape (n,), optional
            Factors on the step sizes.
        heads : sequence of int, optional
            Which heads learn; all by default.
        n_jobs : int, default 1
            Threads; heads share nothing, so the result does not depend on their number.

        Returns
        -------
        ndarray of shape (n, len(heads))
            Logits predicted before each sample was learned.
        """
        chosen = list(range(len(self.heads))) if heads is None else list(heads)
        base, side = self._check(base, side)
        if targets.shape != (len(base), len(chosen)):
            raise InvalidInput(f"targets must have shape ({len(base)}, {len(chosen)}); got {targets.shape}.")
        raw = np.empty((len(base), len(chosen)), self.dtype)
        with _pool(min(n_jobs, len(chosen))) as each:
            for part in self.chunks(len(base)):
                sizes: dict[int, Array] = {}
                count = part.stop - part.start
                for head in chosen:
                    first = self.steps[head] + 1
                    if first not in sizes:
                        factor = 1.0 if weight is None else weight[part]
                        sizes[first] = (step_sizes(rate, first, count, initial=initial_rate) * factor).astype(
                            self.dtype
                        )
                rates = [sizes[self.steps[head] + 1] for head in chosen]
                goals = np.ascontiguousarray(targets[part].T, self.dtype)
                outputs = self._run(base[part], side[part], chosen, each, goals, rates)
                for column, neurons in enumerate(outputs):
                    raw[part, column] = self._read(neurons)
                for head in chosen:
                    self.steps[head] += count
        return raw

    def neuron_logits(self, base: Array, side: Array, *, heads: Sequence[int] | None = None, n_jobs: int = 1) -> Array:
        """Raw logit of every neuron, ``(n, heads, neurons)``, layers one after the other."""
        chosen = list(range(len(self.heads))) if heads is None else list(heads)
        base, side = self._check(base, side)
        out = np.empty((len(base), len(chosen), self.neurons), self.dtype)
        with _pool(min(n_jobs, len(chosen))) as each:
            for part in self.chunks(len(base)):
                for column, neurons in enumerate(self._run(base[part], side[part], chosen, each)):
                    out[part, column] = neurons
        return out

    def predict(self, base: Array, side: Array, *, heads: Sequence[int] | None = None, n_jobs: int = 1) -> Array:
        """Logits of the heads, ``(n, heads)``."""
        chosen = list(range(len(self.heads))) if heads is None else list(heads)
        base, side = self._check(base, side)
        out = np.empty((len(base), len(chosen)), self.dtype)
        with _pool(min(n_jobs, len(chosen))) as each:
            for part in self.chunks(len(base)):
                for column, neurons in enumerate(self._run(base[part], side[part], chosen, each)):
                    out[part, column] = self._read(neurons)
        return out

    def _check(self, base: Array | None, side: Array) -> tuple[Array, Array]:
        """Arrays as the compiled loops need them: their widths are trusted there."""
        if side.ndim != 2 or side.shape[1] != self.side_dim:
            raise InvalidInput(f"Side information must have shape (n, {self.side_dim}); got {side.shape}.")
        side = np.ascontiguousarray(side, self.dtype)
        if base is None:
            return side, side
        width = self.base_width
        if base.shape != (len(side), width):
            raise InvalidInput(
                f"Base logits must have shape ({len(side)}, {width}), the bias first, as the side information has "
                f"{len(side)} samples; got {base.shape}."
            )
        return np.ascontiguousarray(base, self.dtype), side

    @property
    def base_width(self) -> int:
        """Columns of ``base``: the constant inputs and the base predictions."""
        return self.n_inputs + 1

    def _read(self, neurons: Array) -> Array:
        return neurons[:, -1] if self.readout == "last" else neurons[:, -int(self.sizes[-1]) :].mean(axis=1)

    def _run(
        self,
        base: Array,
        side: Array,
        chosen: Sequence[int],
        each: Callable[..., Any],
        goals: Array | None = None,
        rates: Sequence[Array] | None = None,
    ) -> list[Array]:
        kernels = active()
        pack = self.contexts.gates(side, chosen, together=each is map)
        nothing = np.empty(0, self.dtype)
        widest = int(self.sizes.max()) + 1

        def one(column: int) -> Array:
            head = chosen[column]
            table = self.heads[head]
            rows = table.rows(pack(column, table.first), allocate=goals is not None)
            logits = np.empty((len(base), self.neurons), self.dtype)
            kernels.run_bernoulli(
                base,
                int(table.fans[0]),
                nothing if goals is None else goals[column],
                nothing if rates is None else rates[column],
                rows,
                table.row_start,
                table.weights,
                table.counts,
                self.sizes,
                self.constants,
                self.official,
                goals is not None,
                np.empty((2, widest), self.dtype),
                logits,
            )
            return logits

        return list(each(one, range(len(chosen))))

    # ------------------------------------------------------------------ looking inside

    def context_indices(self, side: Array) -> Array:
        """Active context of every neuron, ``(n, heads, neurons)``, in the smallest unsigned type that holds it."""
        out = np.empty(
            (len(side), len(self.heads), self.neurons), pack_bits(np.empty((0, self.context_dim), bool)).dtype
        )
        _, side = self._check(None, side)
        zero = np.zeros(self.neurons, np.int32)
        for part in self.chunks(len(side)):
            pack = self.contexts.gates(side[part], range(len(self.heads)))
            for head in range(len(self.heads)):
                out[part, head] = pack(head, zero)
        return out

    def visit_counts(self, side: Array, *, heads: Sequence[int] | None = None) -> Array:
        """How often each neuron's active context was learned from, ``(n, heads, neurons)`` int64."""
        chosen = list(range(len(self.heads))) if heads is None else list(heads)
        _, side = self._check(None, side)
        out = np.empty((len(side), len(chosen), self.neurons), np.int64)
        for part in self.chunks(len(side)):
            pack = self.contexts.gates(side[part], chosen)
            for column, head in enumerate(chosen):
                table = self.heads[head]
                out[part, column] = table.counts[table.rows(pack(column, table.first), allocate=False)]
        return out

    def saliency(self, base: Array, side: Array, *, clipped: str = "product") -> Array:
        r"""Linear map from the base logits to each head's output logit, ``(n, heads, 1 + d)``, the bias first.

        With ``clipped="product"`` it is the product of the selected weight matrices
        :math:`W_L(z) \cdots W_1(z)`, which reproduces the output exactly where no neuron's output is clipped. With
        ``clipped="constant"`` a clipped neuron counts as the constant that it is, which reproduces the output
        everywhere. The bias has the same logit in every layer, so all its paths are summed in the first column.
        """
        base, side = self._check(base, side)
        out = np.empty((len(base), len(self.heads), self.n_inputs + 1), self.dtype)
        for part in self.chunks(len(base)):
            pack = self.contexts.gates(side[part], range(len(self.heads)))
            raw = self.neuron_logits(base[part], side[part]) if clipped == "constant" else None
            for head, table in enumerate(self.heads):
                rows = table.rows(pack(head, table.first), allocate=False)
                out[part, head] = self._backward(table, rows, None if raw is None else raw[:, head])
        return out

    def _backward(self, table: RowTable, rows: Array, raw: Array | None) -> Array:
        """Multiply the selected rows from the output down; ``raw`` makes clipped neurons constants."""
        n, top = len(rows), int(self.sizes[-1])
        share = np.full((n, top), 1.0 if self.readout == "last" else 1.0 / top, self.dtype)
        bias = np.zeros(n, self.dtype)
        end = self.neurons
        for layer in range(len(self.sizes) - 1, -1, -1):
            size, fan = int(self.sizes[layer]), int(table.fans[layer])
            if raw is not None and layer < len(self.sizes) - 1:
                a = raw[:, end - size : end]
                over = np.abs(a) > self.constants[1]
                bias += (share * np.where(over, np.sign(a) * (self.constants[1] / self.constants[0]), 0)).sum(axis=1)
                share = np.where(over, 0, share)
            through = np.zeros((n, fan), self.dtype)
            for k in range(size):  # one neuron at a time: never (n, neurons, d) at once
                selected = table.row_start[rows[:, end - size + k]]
                through += share[:, k, None] * table.weights[selected[:, None] + np.arange(fan)]
            end -= size
            if layer:
                bias += through[:, 0]
                share = through[:, 1:]
        through[:, 0] += bias
        return through

    # ------------------------------------------------------------------ state

    def layer_weights(self, layer: int) -> Array:
        """Weights ``(heads, K_l, 2**m, K_{l-1} + 1)`` of a layer, the bias weight first (a copy)."""
        return np.stack([table.dense(layer) for table in self.heads])

    def state(self) -> dict[str, Array]:
        """All that learning changes, as named arrays; hyperplanes of added inputs included."""
        arrays: dict[str, Array] = {
            "steps": np.array(self.steps, np.int64),
            "normals": self.contexts.normals,
            "offsets": self.contexts.offsets,
            "lazy": np.array(bool(self._lazy)),
        }
        for head, table in enumerate(self.heads):
            arrays |= {f"head{head}.{name}": value for name, value in table.state().items()}
        return arrays

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Set an untrained network of the same settings to a saved :meth:`state`."""
        self._lazy = bool(arrays["lazy"])
        self.add_heads(len(arrays["steps"]) - len(self.heads))
        self.steps = [int(step) for step in arrays["steps"]]
        self.contexts.normals = np.ascontiguousarray(arrays["normals"], self.dtype)
        self.contexts.offsets = np.ascontiguousarray(arrays["offsets"], self.dtype)
        for head, table in enumerate(self.heads):
            prefix = f"head{head}."
            table.restore({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})


@contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Any]]:
    """``map`` over heads: on threads (the loops release the interpreter lock), or plain for one worker."""
    if workers <= 1:
        yield map
        return
    with ThreadPoolExecutor(workers) as pool:
        yield pool.map


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _check_settings(
    sizes: Sequence[int],
    context_dim: int,
    eps: float,
    weight_clip: float,
    layer_bias: float,
    weight_init: str,
    gradient: str,
    readout: str,
    tables: str,
    dtype: Any,
) -> None:
    if not hidden_sizes(sizes):
        raise InvalidInput("Layer sizes must name at least one layer; got none.")
    if not _whole(context_dim) or not 0 <= context_dim <= MAX_CONTEXT_DIM:
        raise InvalidInput(
            f"context_dim must be an integer from 0 to {MAX_CONTEXT_DIM} (hyperplanes a neuron); got {context_dim!r}."
        )
    if not 0 < eps < 0.5:
        raise InvalidInput(f"eps must lie strictly between 0 and 0.5; got {eps!r}.")
    if not weight_clip > 0:
        raise InvalidInput(f"weight_clip must be > 0 (the box of the weights); got {weight_clip!r}.")
    if not 0 < layer_bias < 1 or layer_bias == 0.5:
        raise InvalidInput(f"layer_bias must be a probability other than 0, 1/2 and 1; got {layer_bias!r}.")
    for name, value, allowed in (
        ("weight_init", weight_init, ("mean", "zeros")),
        ("gradient", gradient, ("paper", "official")),
        ("aggregator", readout, ("last", "mean")),
        ("tables", tables, ("auto", "dense", "lazy")),
        ("dtype", str(dtype) if isinstance(dtype, str) else np.dtype(dtype).name, ("float32", "float64")),
    ):
        if value not in allowed:
            raise InvalidInput(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")
    if readout == "last" and sizes[-1] != 1:
        raise InvalidInput(f"The last layer must have one neuron with aggregator='last'; got {sizes[-1]}.")
