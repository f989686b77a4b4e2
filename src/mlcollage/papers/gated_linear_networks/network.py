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
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_expit, logit

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from . import _kernels
from ._gates import Contexts, draw_hyperplanes, index_type, writable
from ._settings import LearningRate, hidden_sizes, step_sizes
from ._tables import RowTable

__all__ = ["GatedNetwork"]

Array = NDArray[Any]
_MAX_CONTEXT_DIM = 30
_DENSE_LIMIT = 256 * 2**20  # bytes of all dense tables together above which tables="auto" allocates rows on first sight
_CHUNK_ELEMENTS = 1 << 20  # projections held at once: 4 MB in float32, so that they stay in cache
_MAX_CHUNK = 512


def normalized(raw: Array) -> Array:
    """Class probabilities: the heads' outputs ``sigmoid(raw)`` divided by their sum, ``(n, heads)`` both.

    Computed from log-probabilities, so that tiny outputs keep their order.
    """
    log_q = log_expit(raw.astype(np.float64))
    q = np.exp(log_q - log_q.max(axis=1, keepdims=True))
    return np.asarray(q / q.sum(axis=1, keepdims=True))


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
        layers = hidden_sizes(sizes)
        kind = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        choices = (
            ("weight_init", weight_init, ("mean", "zeros")),
            ("gradient", gradient, ("paper", "official")),
            ("aggregator", readout, ("last", "mean")),
            ("tables", tables, ("auto", "dense", "lazy")),
            ("dtype", kind, ("float32", "float64")),
        )
        for name, value, known in choices:
            checks.choice(name, value, known)
        if not layers or (readout == "last" and layers[-1] != 1):
            raise InvalidInput(
                f"The layer sizes {layers} must name a layer, and end with one neuron if aggregator='last'."
            )
        if checks.probability("layer_bias", layer_bias) == 0.5:
            raise InvalidInput("layer_bias must differ from 1/2, whose logit is 0.")
        self.context_dim = checks.integer("context_dim", context_dim, least=0, most=_MAX_CONTEXT_DIM)
        self.sizes, self.neurons = np.array(layers, np.int64), sum(layers)
        self.n_inputs, self.side_dim = n_inputs, side_dim
        self.context_bias_scale, self.weight_init, self.readout = context_bias_scale, weight_init, readout
        self.official, self.tables, self.nested, self.seed = gradient == "official", tables, nested, seed
        self.dtype = np.dtype(dtype)
        # Probabilities are logits throughout: clip(q, eps, 1 - eps) is clip(logit q, -limit, limit).
        self.limit = -float(logit(checks.real("eps", eps, above=0, below=0.5)))
        self.bias = float(logit(layer_bias))
        self.constants: Any = self._constants(
            _kernels.Mixing, self.bias, self.limit, checks.positive("weight_clip", weight_clip)
        )
        self.contexts = Contexts(self.neurons, self.context_dim, self.dtype)
        self.heads: list[RowTable] = []
        self.steps: list[int] = []  # samples that each head was updated on
        self._lazy: bool | None = None  # decided when the number of heads is first known

    def _constants(self, kind: Callable[..., Any], *values: float) -> Any:
        """A kernel's constants, followed by one and zero, in the network's type."""
        return kind(*(self.dtype.type(value) for value in (*values, 1, 0)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    # ------------------------------------------------------------------ heads

    def fans(self, head: int) -> Array:
        """Inputs of a neuron in each layer of a head, with the bias."""
        width = min(head, self.n_inputs) if self.nested else self.n_inputs
        # (layers,): d + 1, K_1 + 1, ..., K_{L-1} + 1
        return np.concatenate([[width + 1], self.sizes[:-1] + 1]).astype(np.int64)

    def add_heads(self, count: int) -> None:
        """Add untrained heads; each has its own step count and the hyperplanes that its number gives it."""
        if self._lazy is None:
            self._lazy = self._choose_tables(count)
        planes = []  # all heads' hyperplanes are appended at once: each append copies those that are there
        for head in range(len(self.heads), len(self.heads) + count):
            fans = self.fans(head)
            initial = 1.0 / fans if self.weight_init == "mean" else np.zeros(len(fans))
            self.heads.append(RowTable(self.sizes, fans, self.context_dim, initial, self.dtype, lazy=self._lazy))
            self.steps.append(0)
            planes.append(self._planes(head))
        if planes:
            self.contexts.append(np.concatenate([p for p, _ in planes]), np.concatenate([b for _, b in planes]))

    def _planes(self, head: int) -> tuple[Array, Array]:
        # From the head's number alone, so that a head added later equals one made at the start.
        rng = np.random.default_rng([self.seed, head])
        visible = min(head, self.side_dim) if self.nested else self.side_dim
        normals, offsets = draw_hyperplanes(rng, self.contexts.per_head, visible, bias_scale=self.context_bias_scale)
        # (neurons * m, D), with zeros for what a nested head must not see; (neurons * m,)
        return np.pad(normals, ((0, 0), (0, self.side_dim - visible))), offsets

    def dense_bytes(self, count: int) -> int:
        """Bytes that dense tables of ``count`` heads take."""
        weights = sum(int(self.sizes @ self.fans(head)) for head in range(count))
        return weights * 2**self.context_dim * self.dtype.itemsize

    def _choose_tables(self, count: int) -> bool:
        size = self.dense_bytes(count)
        if self.tables == "dense":
            available = _available_memory()
            # Row numbers are int32 in the loops.
            if size > available or self.neurons * 2**self.context_dim >= 2**31:
                raise InvalidInput(
                    f"Dense tables for context_dim={self.context_dim} would take {size / 1e9:.1f} GB, and "
                    f"{available / 1e9:.1f} GB are available: use tables='lazy', which keeps only contexts that occur, "
                    "or a smaller context_dim."
                )
            return False
        return self.tables == "lazy" or size > _DENSE_LIMIT

    def widen(self, extra: int) -> None:
        """Append ``extra`` inputs and as many side values; the gates of samples where these are 0 do not change."""
        normals = [np.empty((0, extra), self.dtype)]
        for head in range(len(self.heads)):
            # Entries of the size that those of a unit vector have, from a stream of their own for each width.
            rng = np.random.default_rng([self.seed, head, self.side_dim])
            normals.append(rng.normal(scale=1 / np.sqrt(max(self.side_dim, 1)), size=(self.contexts.per_head, extra)))
        wider = np.concatenate([self.contexts.normals, np.concatenate(normals)], axis=1)
        self.contexts.set(wider, self.contexts.offsets)
        self.heads = [table.widen(extra) for table in self.heads]
        self.n_inputs += extra
        self.side_dim += extra

    # ------------------------------------------------------------------ learning and prediction

    def chunks(self, n: int) -> list[slice]:
        """Cut ``n`` samples so that the projections of a chunk stay in cache (results do not depend on the cut)."""
        columns = max(len(self.contexts.normals), 1)  # of the projections, (chunk, heads * neurons * m)
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
        memory: int | None = None,
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
        rate, initial_rate, memory
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
        chosen = self._chosen(heads)
        base, side = self._check(base, side)
        if targets.shape != (len(base), len(chosen)):
            raise InvalidInput(f"targets must have shape ({len(base)}, {len(chosen)}); got {targets.shape}.")
        if not ((targets >= 0) & (targets <= 1)).all():
            raise InvalidInput("targets must lie from 0 to 1: they are probabilities, or 0 and 1.")
        raw = np.empty((len(base), len(chosen)), self.dtype)
        with _pool(min(n_jobs, len(chosen))) as each:
            for part in self.chunks(len(base)):
                count = part.stop - part.start
                factor = 1.0 if weight is None else weight[part]
                firsts = [self.steps[head] + 1 for head in chosen]  # heads of the same age share their rates
                rates = {
                    first: (step_sizes(rate, first, count, initial=initial_rate, memory=memory) * factor).astype(
                        self.dtype
                    )
                    for first in set(firsts)
                }
                goals = np.ascontiguousarray(targets[part].T, self.dtype)  # (heads, count)
                learned = list(zip(goals, [rates[first] for first in firsts], strict=True))
                self._run(base[part], side[part], chosen, each, self._read, raw[part], learned)
                for head in chosen:
                    self.steps[head] += count
        return raw

    def neuron_logits(self, base: Array, side: Array, *, heads: Sequence[int] | None = None, n_jobs: int = 1) -> Array:
        """Raw logit of every neuron, ``(n, heads, neurons)``, layers one after the other."""
        return self._forward(base, side, heads, n_jobs, lambda logits: logits, (self.neurons,))

    def predict(self, base: Array, side: Array, *, heads: Sequence[int] | None = None, n_jobs: int = 1) -> Array:
        """Logits of the heads, ``(n, heads)``."""
        return self._forward(base, side, heads, n_jobs, self._read, ())

    def _forward(
        self,
        base: Array,
        side: Array,
        heads: Sequence[int] | None,
        n_jobs: int,
        read: Callable[[Array], Array],
        width: tuple[int, ...],
    ) -> Array:
        """What ``read`` makes of each head's neurons, ``(n, heads, *width)``."""
        chosen = self._chosen(heads)
        base, side = self._check(base, side)
        out = np.empty((len(base), len(chosen), *width), self.dtype)
        with _pool(min(n_jobs, len(chosen))) as each:
            for part in self.chunks(len(base)):
                self._run(base[part], side[part], chosen, each, read, out[part])
        return out

    def _chosen(self, heads: Sequence[int] | None) -> list[int]:
        return list(range(len(self.heads))) if heads is None else list(heads)

    def _check(self, base: Array | None, side: Array) -> tuple[Array, Array]:
        """Arrays as the compiled loops need them: their widths are trusted there."""
        if side.ndim != 2 or side.shape[1] != self.side_dim:
            raise InvalidInput(f"Side information must have shape (n, {self.side_dim}); got {side.shape}.")
        side = self._finite("Side information", side)
        if base is None:
            return side, side
        width = self.base_width
        if base.shape != (len(side), width):
            raise InvalidInput(
                f"Base logits must have shape ({len(side)}, {width}), the bias first, as the side information has "
                f"{len(side)} samples; got {base.shape}."
            )
        return self._finite("Base logits", base), side

    def _finite(self, name: str, values: Array) -> Array:
        """In the network's type; refused where NaN or infinity would stay in the weights for good."""
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, self.dtype)
        if not np.isfinite(values).all():
            raise InvalidInput(f"{name} must be finite {self.dtype.name} numbers; impute or leave out such samples.")
        return values

    @property
    def base_width(self) -> int:
        """Columns of ``base``: the constant inputs and the base predictions."""
        return self.n_inputs + 1

    def _read(self, logits: Array) -> Array:
        """Read-out of a head from its neurons' logits, ``(n, neurons)`` to ``(n,)``."""
        return logits[:, -1] if self.readout == "last" else logits[:, -int(self.sizes[-1]) :].mean(axis=1)

    def _run(
        self,
        base: Array,
        side: Array,
        chosen: Sequence[int],
        each: Callable[..., Any],
        read: Callable[[Array], Array],
        out: Array,
        learned: Sequence[tuple[Array, Array]] | None = None,
    ) -> None:
        """One chunk through the chosen heads, into ``out (n, heads, ...)``; ``learned``: targets and rates of each."""
        pack = self.contexts.gates(side, chosen, together=each is map)
        learn = learned is not None
        nothing, constants = np.empty(0, self.dtype), _kernels.plain(self.constants)

        def one(column: int) -> None:
            table = self.heads[chosen[column]]
            rows = table.rows(pack(column, table.first), allocate=learn)
            targets, rates = (nothing, nothing) if learned is None else learned[column]
            logits = np.empty((len(base), self.neurons), self.dtype)
            samples = cast(_kernels.Samples, (base, targets, rates, rows))
            fan = int(table.fans[0])
            _kernels.run_bernoulli(samples, table.arrays, self.sizes, fan, constants, self.official, learn, logits)
            out[:, column] = read(logits)  # each thread writes a column of its own

        for _ in each(one, range(len(chosen))):  # threads raise what they met when their result is asked for
            pass

    # ------------------------------------------------------------------ looking inside

    def context_indices(self, side: Array) -> Array:
        """Active context of every neuron, ``(n, heads, neurons)``, in the smallest unsigned type that holds it."""
        out = np.empty((len(side), len(self.heads), self.neurons), index_type(self.context_dim))
        _, side = self._check(None, side)
        zero = np.zeros(self.neurons, np.int32)
        for part in self.chunks(len(side)):
            pack = self.contexts.gates(side[part], range(len(self.heads)))
            for head in range(len(self.heads)):
                out[part, head] = pack(head, zero)
        return out

    def visit_counts(self, side: Array, *, heads: Sequence[int] | None = None) -> Array:
        """How often each neuron's active context was learned from, ``(n, heads, neurons)`` int64."""
        chosen = self._chosen(heads)
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
        # Chunk by chunk and head by head: the selected matrices of all samples would not fit in memory.
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
        share = np.full((n, top), 1.0 if self.readout == "last" else 1.0 / top, self.dtype)  # d output / d neuron
        bias = np.zeros(n, self.dtype)  # what the constant inputs above the first layer add, in units of the bias
        end = self.neurons
        for layer in range(len(self.sizes) - 1, -1, -1):
            size, fan = int(self.sizes[layer]), int(table.fans[layer])
            if raw is not None and layer < len(self.sizes) - 1:
                a = raw[:, end - size : end]  # (n, size), logits before the clip
                over = np.abs(a) > self.constants.limit
                constant = np.sign(a) * (self.constants.limit / self.constants.bias)
                bias += (share * np.where(over, constant, 0)).sum(axis=1)
                share = np.where(over, 0, share)
            through = np.zeros((n, fan), self.dtype)  # d output / d input of this layer, the bias first
            for k in range(size):  # one neuron at a time: never (n, neurons, d) at once
                selected = table.start[rows[:, end - size + k]]  # (n,)
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
        self.contexts.set(arrays["normals"], arrays["offsets"])
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


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
