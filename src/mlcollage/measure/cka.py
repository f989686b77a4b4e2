r"""Centered kernel alignment (CKA) of representations: maps of all pairs of layers, with their uncertainty.

For n examples with features :math:`X` (n, p) and :math:`Y` (n, q) and kernels :math:`K = XX^\top`, :math:`L = YY^\top`,

.. math::
    \mathrm{CKA}(K, L) = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}

(Kornblith et al. 2019). The unbiased :math:`\mathrm{HSIC}_1` (Song et al. 2012) is an inner product,
:math:`\langle U(K), U(L) \rangle / (n(n-3))`, of U-centered kernels (Székely and Rizzo 2014):

.. math::
    U(K)_{ij} = K_{ij} - \frac{r_i + r_j}{n-2} + \frac{t}{(n-1)(n-2)} \quad (i \ne j), \qquad U(K)_{ii} = 0,

with row sums :math:`r_i` and total :math:`t` of :math:`K` without its diagonal. Each layer's half matrix becomes one
row of a matrix :math:`V`, already in the hook, so that no features are kept, and one product :math:`V V^\top` gives all
pairs of a batch. A hook passes over the features three times only (mean, difference, Gram matrix): whether they are
finite and vary at all, and in which unit, is told by the trace of the Gram matrix, and only in doubt by another look.
Over batches, CKA is the ratio of the sums (Nguyen et al. 2020), never the mean of ratios.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._npz import load_arrays, save_arrays
from mlcollage._random import generator
from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import centered_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RBF", "CKADifference", "CKAResult", "MinibatchCKA", "cka"]

Floats = npt.NDArray[np.float64]
Estimator = Literal["unbiased", "biased"]
Weighting = Literal["pairs", "batches"]

_SMALL, _LARGE = 1e-12, 1e18  # between them the kernel's trace, and products of two kernels are numbers of float32
_CHUNK = 2**18  # entries of kernels that are centered at once


@dataclass(frozen=True)
class RBF:
    r"""Gaussian kernel :math:`\exp(-d^2 / (2 f^2\, \mathrm{median}(d^2)))`, whose width follows the data.

    Parameters
    ----------
    fraction
        :math:`f`. The median is that of all n² squared distances, the zeros of the diagonal included, as in the
        official code; in minibatches it is that of each batch.
    """

    fraction: float = 0.8

    def __post_init__(self) -> None:
        checks.positive("fraction", self.fraction)


Kernel = Literal["linear"] | RBF


def cka(X: Any, Y: Any, *, kernel: Kernel = "linear", estimator: Estimator = "unbiased") -> float:
    r"""CKA of two representations of the same n examples, in float64.

    Parameters
    ----------
    X, Y
        (n, p) and (n, q): arrays or tensors, one row per example. Constant offsets of the columns do not matter.
    kernel
        ``"linear"``, or :class:`RBF`.
    estimator
        ``"unbiased"`` uses :math:`\mathrm{HSIC}_1`, also in the norms ("debiased CKA"): near 0 for independent
        representations whatever n, p and q are, and at times below 0. ``"biased"`` is the textbook value, which is
        close to 1 for any two representations with many more features than examples.

    Returns
    -------
    float
        At most 1, and NaN, with a warning, where a representation is constant.

    Raises
    ------
    InvalidInput
        For fewer than four examples (unbiased), or two representations of unequal length, or values that are NaN.

    Notes
    -----
    With the linear kernel and more examples than features, :math:`\lVert Y^\top X\rVert_F^2` takes the place of the
    n × n kernels, so that the cost is O(npq).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(50, 200))
    >>> round(cka(x, 3 * x + 7), 6)
    1.0
    >>> y = rng.normal(size=(50, 200))  # independent of x
    >>> round(cka(x, y), 2), round(cka(x, y, estimator="biased"), 2)
    (0.08, 0.82)
    """
    checks.choice("estimator", estimator, ("unbiased", "biased"))
    _check_kernel(kernel)
    x, y = centered_matrix(X, "X"), centered_matrix(Y, "Y")
    y = y.to(x.device)
    if len(x) != len(y):
        raise InvalidInput(
            f"X has {len(x)} examples and Y has {len(y)}; both must represent the same examples, in one order."
        )
    _check_size(len(x), estimator)
    # CKA does not depend on scale, and products of four features may leave the range of numbers. Constant columns are
    # tested before they are centered, so that rounding is not taken for signal.
    scales = [float(z.abs().max()) if _resolved(torch.as_tensor(raw), z) else 0.0 for raw, z in ((X, x), (Y, y))]
    if not all(scales):
        warnings.warn(
            f"{'X' if not scales[0] else 'Y'} is constant over the examples, so its CKA is not defined (NaN).",
            UserWarning,
            stacklevel=2,
        )
        return float("nan")
    x, y = x / scales[0], y / scales[1]
    if kernel == "linear" and len(x) > max(x.shape[1], y.shape[1]):
        joint, own_x, own_y = (_by_features(a, b, estimator) for a, b in ((x, y), (x, x), (y, y)))
    else:
        v = _halves(torch.stack([_kernel(z @ z.T, kernel) for z in (x, y)]), estimator)  # (2, pairs)
        products = v @ v.T
        joint, own_x, own_y = (float(products[i, j]) for i, j in ((0, 1), (0, 0), (1, 1)))
    return float(joint / np.sqrt(own_x * own_y)) if own_x > 0 and own_y > 0 else float("nan")


class MinibatchCKA:
    r"""CKA of all layers of one network with each other, or with those of a second one, batch by batch.

    Parameters
    ----------
    estimator
        ``"unbiased"``: the expectation does not depend on the batch size. ``"biased"`` depends on it strongly.
    kernel
        ``"linear"``, or :class:`RBF`.
    weighting
        How batches of unequal size count: ``"pairs"``, each pair of examples the same, weight :math:`n(n-3)`, as in
        the official code; ``"batches"``, each batch the same, the mean of :math:`\mathrm{HSIC}_1`. With batches of one
        size there is no difference.
    permutations
        Random pairings of the examples of the second network with those of the first (one for all layers), from which
        :attr:`CKAResult.p_value` tells whether two layers are related at all. 0 for none; 199 are plenty.
    seed
        Of these permutations.

    Notes
    -----
    Kernels are made in the features' precision, float32 at least, after the columns were centered, so that offsets do
    not cost digits; sums over batches are in float64. A layer's features can be freed as soon as it was seen; what is
    kept of a batch are n(n-1)/2 numbers a layer, and the whole kernels of the few layers that were seen last.

    The first axis must count the examples in every layer. A layer whose first axis has another length is refused; where
    lengths happen to be equal (as many tokens as images), only you can know.

    Examples
    --------
    >>> from torch import nn
    >>> from mlcollage.measure import LayerTap
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> maps = MinibatchCKA()
    >>> with torch.no_grad(), LayerTap(model, consume=maps.consume):
    ...     for _ in range(4):
    ...         logits = model(torch.randn(32, 8))
    ...         maps.end_batch()
    >>> result = maps.compute()
    >>> result.names_a, result.matrix.shape
    (('0', '1', '2'), (3, 3))
    """

    def __init__(
        self,
        *,
        estimator: Estimator = "unbiased",
        kernel: Kernel = "linear",
        weighting: Weighting = "pairs",
        permutations: int = 0,
        seed: int = 0,
    ) -> None:
        self.estimator = checks.choice("estimator", estimator, ("unbiased", "biased"))
        self.weighting = checks.choice("weighting", weighting, ("pairs", "batches"))
        self.kernel: Kernel = _check_kernel(kernel)
        self.permutations = checks.integer("permutations", permutations, least=0)
        self.seed = checks.integer("seed", seed, least=0)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._names: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._scales: dict[tuple[int, str], float] = {}  # by network and layer: the unit of its features
        self._dtypes: dict[tuple[int, str], torch.dtype] = {}
        self._shares: dict[tuple[int, str], _Share] = {}
        self._skipped: dict[tuple[int, str], str] = {}
        self._rows: dict[tuple[int, str], Tensor] = {}  # of the batch that is being read
        self._whole: dict[tuple[int, str], Tensor] = {}  # kernels (n, n), not yet rows
        self._factors: dict[tuple[int, str], float] = {}  # what brings a row to its layer's unit
        self._examples: int | None = None
        self._by_numpy = False  # whether Gram matrices of this batch are numpy's
        self._sums: list[Floats] = []  # (L, L) of each batch, L layers of both networks together
        self._sizes: list[int] = []
        self._null: Floats | None = None  # (permutations, La, Lb)

    def update(self, acts_a: Mapping[str, Tensor], acts_b: Mapping[str, Tensor] | None = None) -> None:
        """Take one batch of activations (n, ...) by name, of one network or of two on the same examples.

        Raises
        ------
        InvalidInput
            For too few examples, activations that are not of the same examples or not numbers of floating point, NaN,
            or other layers than in the batch before. The batch is then left out whole.
        """
        try:
            for network, acts in enumerate((acts_a, acts_b or {})):
                for name, value in acts.items():
                    self._take(network, name, value)
                    if reason := self._skipped.pop((network, name), None):
                        raise InvalidInput(f"layer {name!r} {reason}; leave it out, or convert it.")
            self.end_batch()
        except BaseException:
            self._rows, self._whole, self._factors, self._examples = {}, {}, {}, None
            raise

    def consume(self, name: str, value: Tensor) -> None:
        """Take a layer of the first network, in the hook of a :class:`~mlcollage.measure.LayerTap`.

        Outputs that have no kernel (whole numbers, masks, empty tensors) are left out, and :class:`CKAResult` says so.
        """
        self._take(0, name, value)

    def consume_other(self, name: str, value: Tensor) -> None:
        """Take a layer of the second network, which is given the same examples."""
        self._take(1, name, value)

    def end_batch(self) -> None:
        """Add the batch whose layers were taken one by one."""
        self._halve()
        rows, factors, n = self._rows, self._factors, self._examples
        self._rows, self._factors, self._examples = {}, {}, None
        if not rows or n is None:
            raise InvalidInput("no layer put out anything since the last batch: run the model first.")
        sides = tuple(tuple(name for side, name in rows if side == k) for k in (0, 1))
        if not sides[0]:
            raise InvalidInput("only the second network was run: take the first with consume, the other with update.")
        names = (sides[0], sides[1])
        if self._names is None:
            self._names = names
        elif names != self._names:
            changed = sorted({*names[0], *names[1]} ^ {*self._names[0], *self._names[1]}) or ["another order"]
            raise InvalidInput(
                f"this batch ran other layers than the ones before ({', '.join(changed[:4])}): every batch must go "
                "through the same layers in the same order."
            )
        order = [(k, name) for k in (0, 1) for name in names[k]]
        home = rows[order[0]]
        dtype = max((rows[key].dtype for key in order), key=lambda d: torch.finfo(d).bits)
        v = torch.stack([rows[key].to(home.device, dtype) for key in order])  # (L, pairs)
        norm = _pairs(n, self.estimator) if self.weighting == "batches" or self.estimator == "biased" else 1.0
        scaled = np.array([factors.get(key, 1.0) for key in order])
        self._sums.append(_gram(v, self._by_numpy).cpu().double().numpy() * np.outer(scaled, scaled) / norm)
        self._sizes.append(n)
        if self.permutations:
            self._permute(v, len(names[0]), n, scaled, norm)

    def compute(self, level: float = 0.95) -> CKAResult:
        """The map so far.

        Parameters
        ----------
        level
            Of the intervals.

        Warns
        -----
        UserWarning
            For layers that are constant over the examples (their cells are NaN), and for layers in which one unit or
            one token holds more than half of the variance, so that linear CKA speaks of it alone.
        """
        checks.probability("level", level)
        if self._names is None:
            raise InvalidInput("no batch was taken yet; call update(), or consume() and end_batch(), first.")
        names_a, names_b = self._names
        sums = np.stack(self._sums)
        order = [(0, name) for name in names_a] + [(1, name) for name in names_b]
        constant = tuple(self._label(key) for key, own in zip(order, np.diagonal(sums.sum(0)), strict=True) if own <= 0)
        if constant:
            coarse = sorted({str(self._dtypes[k]).removeprefix("torch.") for k in order if self._label(k) in constant})
            warnings.warn(
                f"{len(constant)} layers do not vary over the examples, or not within the precision of "
                f"{' and '.join(coarse)}, and have no CKA (NaN): {', '.join(constant[:5])}.",
                UserWarning,
                stacklevel=2,
            )
        shares = {self._label(k): s.share for k, s in self._shares.items() if k not in self._skipped}
        ruled = [f"{self._label(k)} ({s})" for k, s in self._shares.items() if s.share > 0.5]
        if ruled and self.kernel == "linear":
            warnings.warn(
                f"in {len(ruled)} layers a single unit or token holds more than half of the variance, so that linear "
                f"CKA speaks of it alone: {', '.join(ruled[:3])}; standardize the features, or use kernel=RBF().",
                UserWarning,
                stacklevel=2,
            )
        return CKAResult(
            names_a=names_a,
            names_b=names_b or names_a,
            sums=sums,
            sizes=tuple(self._sizes),
            crossed=bool(names_b),
            null=None if self._null is None else self._null,
            level=level,
            estimator=self.estimator,
            kernel=_kernel_name(self.kernel),
            weighting=self.weighting,
            constant=constant,
            skipped={self._label(key): reason for key, reason in self._skipped.items()},
            largest_share=shares,
        )

    def merge(self, other: MinibatchCKA) -> MinibatchCKA:
        """Add the batches of another collection, such as that of another process; returns self.

        Raises
        ------
        InvalidInput
            If it was made with other settings, or of other layers, or in another order.
        """
        for name in ("estimator", "kernel", "weighting", "permutations", "seed", "_names"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and not (name == "_names" and mine is None):
                what = "layers" if name == "_names" else name
                raise InvalidInput(f"the two collections differ in {what}: {mine!r} and {theirs!r}.")
        if self._names is None:
            self._names = other._names
        if self._names is None:
            return self
        order = [(k, name) for k in (0, 1) for name in self._names[k]]
        # A layer's kernel is divided by the square of its scale, so that others' sums are brought to our scales.
        factor = np.ones(len(order))
        for i, key in enumerate(order):
            if key in other._scales:  # none with RBF, which has no unit
                factor[i] = (other._scales[key] / self._scales.setdefault(key, other._scales[key])) ** 2
        self._sums += [s * np.outer(factor, factor) for s in other._sums]
        self._sizes += other._sizes
        if other._null is not None:
            a = len(self._names[0])
            b = slice(a, None) if self._names[1] else slice(0, a)
            scaled = other._null * np.outer(factor[:a], factor[b])
            self._null = scaled if self._null is None else self._null + scaled
        self._dtypes = other._dtypes | self._dtypes
        self._shares = other._shares | self._shares
        self._skipped = other._skipped | self._skipped
        return self

    def _take(self, network: int, name: str, value: Tensor) -> None:
        key = (network, name)
        if reason := _unfit(value):
            self._skipped[key] = reason
            return
        n, device = value.shape[0], value.device.type
        if self._examples is None:
            _check_size(n, self.estimator)
            self._examples, self._by_numpy = n, _numpy_fits()
        if n != self._examples:
            raise InvalidInput(
                f"layer {name!r} put out {tuple(value.shape)}, but {self._examples} examples were given: its first "
                "axis must count the examples. Sequence-first layers (T, n, ...) need "
                "reduce=lambda h: h.transpose(0, 1), windows (n * w, ...) reduce=lambda h: h.reshape(n, -1)."
            )
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            k = self._gram_of(key, value.detach())
        if self._whole and next(iter(self._whole.values())).dtype != k.dtype:
            self._halve()
        self._whole[key] = k
        if len(self._whole) * n * n >= _CHUNK:
            self._halve()

    def _gram_of(self, key: tuple[int, str], value: Tensor) -> Tensor:
        """The kernel (n, n) before it is centered."""
        n = value.shape[0]
        x = _raised(value).reshape(n, -1)  # (n, p)
        mean = x.mean(dim=0)
        centered = x - mean
        self._dtypes[key] = value.dtype
        k = _gram(centered, self._by_numpy)
        own, level = float(k.trace()), float(mean.dot(mean))
        # NaN and infinity are in the trace. A column that is rounding alone has at most n (bound |mean|)^2 of it.
        bound = 1.01 * _rounding(value.dtype)
        if _SMALL < own < _LARGE and own > n * bound**2 * level:
            unit = 1.0
        else:
            if not bool(x.isfinite().all()):
                raise InvalidInput(
                    f"layer {key[1]!r} put out {int((~x.isfinite()).sum())} values that are NaN or infinite, in batch "
                    f"{len(self._sums)}."
                )
            if not _resolved(value.reshape(n, -1), centered):
                return torch.zeros_like(k)
            unit = float(centered.abs().max())
            k = _gram(centered.div_(unit), self._by_numpy)
        if self.kernel == "linear":  # all batches in the unit of the first
            self._factors[key] = (unit / self._scales.setdefault(key, unit)) ** 2
        if key not in self._shares:
            self._shares[key] = _largest_share(centered.square_().sum(dim=0).view(value.shape[1:]))
        return _kernel(k, self.kernel)

    def _halve(self) -> None:
        """Center the kernels that wait, several at once, and keep their halves alone."""
        if not self._whole:
            return
        kernels = [*self._whole.values()]
        half = _halves(torch.stack([k.to(kernels[0].device) for k in kernels]), self.estimator)  # (layers, pairs)
        self._rows |= dict(zip(self._whole, half.unbind(), strict=True))
        self._whole = {}

    def _permute(self, v: Tensor, first: int, n: int, scaled: Floats, norm: float) -> None:
        """Sums under random pairings: the kernels of the second network with their examples in another order."""
        other = v[first:] if v.shape[0] > first else v
        rng = generator(self.seed, len(self._sums) - 1)  # one stream a batch
        null = np.empty((self.permutations, first, other.shape[0]))
        where = _positions(n, self.estimator)
        for k in range(self.permutations):
            order = torch.randperm(n, generator=rng)
            null[k] = _product(v[:first], other[:, where[order][:, order][_kept(n, self.estimator)].to(v.device)])
        null *= np.outer(scaled[:first], scaled[first:] if len(scaled) > first else scaled) / norm
        self._null = null if self._null is None else self._null + null

    def _label(self, key: tuple[int, str]) -> str:
        if self._names is None or not self._names[1]:
            return key[1]
        return f"{'ab'[key[0]]}:{key[1]}"


@dataclass(frozen=True, eq=False)
class CKAResult:
    r"""CKA of all pairs of layers, from the sums of all batches; made by :meth:`MinibatchCKA.compute`.

    Parameters
    ----------
    names_a, names_b
        Layers of the rows and of the columns, in the order in which they ran.
    sums
        (B, L, L): inner products of the centered kernels of each batch, of the layers of both networks one after the
        other, each in units of its own. Everything else is computed from them.
    sizes
        Examples of each batch.
    crossed
        Whether the columns are those of a second network.
    null
        (permutations, rows, columns): the same sums over all batches with examples paired at random, or None.
    level
        Of the intervals.
    estimator, kernel, weighting
        As they were chosen.
    constant
        Layers that do not vary, whose cells are NaN.
    skipped
        Outputs that were left out, with the reason.
    largest_share
        By layer, the largest share of the variance that a single unit or token holds.
    """

    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    sums: Floats
    sizes: tuple[int, ...]
    crossed: bool
    null: Floats | None = None
    level: float = 0.95
    estimator: str = "unbiased"
    kernel: str = "linear"
    weighting: str = "pairs"
    constant: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    largest_share: Mapping[str, float] = field(default_factory=dict)

    @property
    def matrix(self) -> Floats:
        """(rows, columns) CKA, at most 1; unbiased estimates may lie below 0."""
        return self._ratio(self.sums.sum(0))

    @property
    def without_each_batch(self) -> Floats:
        """(B, rows, columns) CKA with each batch left out in turn, for a jackknife of your own statistic."""
        return np.stack([self._ratio(self.sums.sum(0) - batch) for batch in self.sums])

    @property
    def examples(self) -> int:
        """Examples of all batches."""
        return sum(self.sizes)

    @property
    def ci(self) -> Floats:
        r"""(2, rows, columns) confidence limits, NaN with a single batch.

        A jackknife over batches on the scale :math:`\operatorname{artanh}`, which keeps the limits within [-1, 1], with
        a t quantile of B - 1 degrees of freedom. It speaks of other examples of the same kind, not of other networks:
        for these, train several.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            center, deleted = np.arctanh(self.matrix), np.arctanh(self.without_each_batch)
            half = _t_quantile(self.level, len(self.sizes)) * _jackknife_error(deleted)
            limits = np.tanh(np.stack([center - half, center + half]))
        # A layer with itself: CKA is 1 in every batch.
        return np.where(np.isclose(self.matrix, 1.0, rtol=0, atol=1e-12), self.matrix, limits)

    @property
    def p_value(self) -> Floats:
        """(rows, columns): how often pairings at random give as much alignment, (1 + count) / (1 + permutations)."""
        null, observed = self._null_and_observed()
        p = (1 + (null >= observed).sum(0)) / (1 + len(null))
        return np.where(np.isnan(self.matrix), np.nan, p)

    @property
    def p_value_any(self) -> Floats:
        """(rows, columns) p-values that hold for all cells together: against the largest cell of each pairing."""
        null, _ = self._null_and_observed()
        own = self._own(self.sums.sum(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            largest = np.nanmax(null / np.sqrt(np.outer(*own)), axis=(1, 2))  # (permutations,)
        p = (1 + (largest[:, None, None] >= self.matrix).sum(0)) / (1 + len(null))
        return np.where(np.isnan(self.matrix), np.nan, p)

    def difference(self, other: CKAResult, *, paired: bool = True) -> CKADifference:
        """Subtract another map of the same layers, with intervals and p-values.

        Parameters
        ----------
        other
            Such as the map after a change to the network.
        paired
            Whether both maps were made from the same batches, as they should be. Their common noise then cancels.

        Raises
        ------
        InvalidInput
            If the layers differ, or batches said to be the same have other sizes, or there is a single batch.
        """
        if (self.names_a, self.names_b) != (other.names_a, other.names_b):
            raise InvalidInput("the two maps are of other layers, so that their cells cannot be subtracted.")
        if paired and self.sizes != other.sizes:
            raise InvalidInput(
                f"the maps have batches of {self.sizes[:4]} and {other.sizes[:4]} examples, so they are not of the "
                "same batches; give paired=False if they are of other examples."
            )
        if min(len(self.sizes), len(other.sizes)) < 2:
            raise InvalidInput("a difference needs two batches at least; use smaller batches, or more examples.")
        if paired:
            se = _jackknife_error(self.without_each_batch - other.without_each_batch)
            freedom = np.full(se.shape, len(self.sizes) - 1.0)
        else:  # Welch
            parts = [(_jackknife_error(r.without_each_batch) ** 2, len(r.sizes) - 1) for r in (self, other)]
            se = np.sqrt(parts[0][0] + parts[1][0])
            with np.errstate(divide="ignore", invalid="ignore"):
                freedom = se**4 / sum(variance**2 / df for variance, df in parts)
        matrix = self.matrix - other.matrix
        with np.errstate(divide="ignore", invalid="ignore"):
            half = scipy.stats.t.ppf(0.5 + self.level / 2, freedom) * se
            p = 2 * scipy.stats.t.sf(np.abs(matrix) / se, freedom)
        same = (se == 0) & (matrix == 0)  # a layer with itself in both maps
        half, p = np.where(same, 0.0, half), np.where(same, 1.0, p)
        ci = np.clip(np.stack([matrix - half, matrix + half]), -2.0, 2.0)
        return CKADifference(self.names_a, self.names_b, matrix, ci, p)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per cell: ``layer_a``, ``layer_b``, ``cka``, ``low``, ``high`` and, with a null, ``p_value``."""
        rows, columns = len(self.names_a), len(self.names_b)
        low, high = self.ci
        table = {
            "layer_a": np.repeat(self.names_a, columns),
            "layer_b": np.tile(self.names_b, rows),
            "cka": self.matrix.ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
        }
        return pd.DataFrame(table if self.null is None else {**table, "p_value": self.p_value.ravel()})

    def plot(self, ax: Axes | None = None, *, cmap: str = "magma", ticks: int = 8) -> Axes:
        """Draw the map, first layers at the lower left as in the papers, with its color scale from 0 to 1.

        Parameters
        ----------
        ax
            Where to draw; a new figure by default.
        cmap
            Matplotlib's name of the colors.
        ticks
            Layers named on each axis at most.
        """
        from matplotlib.figure import Figure  # not pyplot, which would keep the figure

        ax = Figure(layout="constrained").subplots() if ax is None else ax
        image = ax.imshow(self.matrix, origin="lower", vmin=0.0, vmax=1.0, cmap=cmap, aspect="equal")
        for axis, names in ((ax.yaxis, self.names_a), (ax.xaxis, self.names_b)):
            places = np.unique(np.linspace(0, len(names) - 1, min(checks.integer("ticks", ticks, least=1), len(names))))
            axis.set_ticks(places.round(), [names[round(p)] for p in places])
        ax.tick_params(axis="x", rotation=90)
        ax.figure.colorbar(image, ax=ax, label="CKA")
        return ax

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one npz file without pickled parts, in one step."""
        save_arrays(path, "CKAResult", *self.to_arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CKAResult:
        """Read what :meth:`save` wrote.

        Raises
        ------
        MissingFile, InvalidInput
            If there is no such file, or it holds something else or is damaged.
        """
        return cls.from_arrays(*load_arrays(path, "CKAResult", {}))

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Plain values, and arrays without objects, for files of your own."""
        arrays: dict[str, Any] = {
            "names_a": np.array(self.names_a, dtype=str),
            "names_b": np.array(self.names_b, dtype=str),
            "sums": self.sums,
            "sizes": np.array(self.sizes, dtype=np.int64),
            "constant": np.array(self.constant, dtype=str),
            "skipped": np.array([*self.skipped.items()], dtype=str).reshape(-1, 2),
            "shared": np.array([*self.largest_share], dtype=str),
            "shares": np.array([*self.largest_share.values()], dtype=np.float64),
        }
        if self.null is not None:
            arrays["null"] = self.null
        plain = ("crossed", "level", "estimator", "kernel", "weighting")
        return {name: getattr(self, name) for name in plain}, arrays

    @classmethod
    def from_arrays(cls, params: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> CKAResult:
        """The map that :meth:`to_arrays` took apart."""
        return cls(
            names_a=tuple(map(str, arrays["names_a"])),
            names_b=tuple(map(str, arrays["names_b"])),
            constant=tuple(map(str, arrays["constant"])),
            sums=arrays["sums"],
            sizes=tuple(map(int, arrays["sizes"])),
            null=arrays.get("null"),
            skipped={str(key): str(reason) for key, reason in arrays["skipped"]},
            largest_share={str(k): float(s) for k, s in zip(arrays["shared"], arrays["shares"], strict=True)},
            **params,
        )

    def _own(self, sums: Floats) -> tuple[Floats, Floats]:
        """Sums of each layer with itself, of the rows and of the columns."""
        own = np.diagonal(sums, axis1=-2, axis2=-1)
        first = len(self.names_a)
        return own[:first], own[first:] if self.crossed else own

    def _ratio(self, sums: Floats) -> Floats:
        first = len(self.names_a)
        joint = sums[:first, first:] if self.crossed else sums
        own_a, own_b = self._own(sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Two roots, since the product of two small sums may not be a number. Rounding alone can pass 1.
            ratio = joint / np.sqrt(own_a)[:, None] / np.sqrt(own_b)
        return np.where((own_a > 0)[:, None] & (own_b > 0), np.clip(ratio, -1.0, 1.0), np.nan)

    def _null_and_observed(self) -> tuple[Floats, Floats]:
        if self.null is None:
            raise InvalidInput("no pairings at random were drawn: use MinibatchCKA(permutations=199).")
        first = len(self.names_a)
        sums = self.sums.sum(0)
        return self.null, sums[:first, first:] if self.crossed else sums


@dataclass(frozen=True, eq=False)
class CKADifference:
    """The difference of two maps of CKA; made by :meth:`CKAResult.difference`.

    Parameters
    ----------
    names_a, names_b
        Layers of the rows and columns.
    matrix
        (rows, columns), the first map minus the second.
    ci
        (2, rows, columns) confidence limits.
    p_value
        (rows, columns), two-sided, of each cell by itself; correct them for their number, e.g. by
        :func:`mlcollage.stats.holm`.
    """

    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    matrix: Floats
    ci: Floats
    p_value: Floats


@dataclass(frozen=True)
class _Share:
    share: float
    axis: int
    index: int

    def __str__(self) -> str:
        return f"{self.share:.0%} at index {self.index} of axis {self.axis}"


def _check_kernel(kernel: Any) -> Kernel:
    if isinstance(kernel, RBF):
        return kernel
    return "linear" if checks.choice("kernel", kernel, ("linear",)) else RBF()


def _kernel_name(kernel: Kernel) -> str:
    return kernel if isinstance(kernel, str) else f"RBF({kernel.fraction:g})"


def _check_size(n: int, estimator: Estimator) -> None:
    least = 4 if estimator == "unbiased" else 2
    if n < least:
        raise InvalidInput(
            f"{estimator} HSIC needs at least {least} examples in a batch, but this one has {n}: drop the last batch "
            "(drop_last=True of a loader), or merge it with the one before."
        )


def _unfit(value: Tensor) -> str:
    """Why a layer's output has no kernel, or nothing."""
    if value.is_nested:
        return "is a nested tensor, whose examples have different lengths"
    if value.is_complex():
        return "is complex: whether its absolute value or its two parts are meant is yours to say"
    if value.is_quantized or not value.is_floating_point():
        return f"is of type {str(value.dtype).removeprefix('torch.')}, not of floating point"
    if value.ndim == 0 or value.numel() == 0:
        return f"has the shape {tuple(value.shape)}, so no values of each example"
    return ""


def _raised(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _resolved(raw: Tensor, centered: Tensor) -> bool:
    """Whether any column varies by more than rounding: a sum of many terms leaves several units in the last place."""
    if not raw.is_floating_point():
        return bool(centered.any())
    spread, size = centered.abs().amax(0), _raised(raw.detach()).flatten(1).abs().amax(0)
    return bool((spread > _rounding(raw.dtype) * size.to(spread)).any())


def _rounding(dtype: torch.dtype) -> float:
    """By how much of its size a constant may vary. Half precision is computed in float32; only the storing rounds."""
    return (16 if dtype in (torch.float32, torch.float64) else 2) * torch.finfo(dtype).eps


def _largest_share(power: Tensor) -> _Share:
    """The unit or token, an index along any axis of the features, that holds most of the variance."""
    total = float(power.sum())
    best = _Share(0.0, 0, 0)
    for axis in range(power.ndim):
        if power.shape[axis] < 8:  # of two units one always holds half
            continue
        along = power.sum(dim=[d for d in range(power.ndim) if d != axis]) if power.ndim > 1 else power
        top = int(along.argmax())
        if float(along[top]) / total > best.share:
            best = _Share(float(along[top]) / total, axis + 1, top)
    return best


def _pairs(n: int, estimator: Estimator) -> float:
    """What turns the inner product of two centered kernels into HSIC."""
    return float(n * (n - 3)) if estimator == "unbiased" else float((n - 1) ** 2)


@lru_cache(maxsize=8)
def _kept(n: int, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Rows and columns of the half matrix that is kept; the unbiased one has no diagonal."""
    rows, columns = torch.triu_indices(n, n, offset=1 if estimator == "unbiased" else 0)
    return rows, columns


@lru_cache(maxsize=8)
def _kept_flat(n: int, estimator: Estimator) -> Tensor:
    """The same as indices into the flattened matrix."""
    rows, columns = _kept(n, estimator)
    return rows * n + columns


def _positions(n: int, estimator: Estimator) -> Tensor:
    """(n, n): where the entry (i, j) of a symmetric matrix lies in its half."""
    rows, columns = _kept(n, estimator)
    where = torch.zeros(n, n, dtype=torch.long)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows))
    return where


def _gram(x: Tensor, by_numpy: bool) -> Tensor:
    """Inner products of rows; on the CPU by numpy, which computes half of a symmetric product and copies it (syrk)."""
    if by_numpy and x.device.type == "cpu":
        a = x.numpy()
        with np.errstate(all="ignore"):  # as torch; what is not finite is told by the trace
            return torch.from_numpy(a @ a.T)
    return x @ x.T


def _numpy_fits() -> bool:
    """Whether numpy's products use no more threads than torch is allowed, whose setting they do not follow."""
    return max((pool.num_threads for pool in _blas()), default=1) <= torch.get_num_threads()


@lru_cache(maxsize=1)
def _blas() -> list[Any]:
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _kernel(k: Tensor, kernel: Kernel) -> Tensor:
    """The kernel matrix of examples with inner products k."""
    if not isinstance(kernel, RBF):
        return k
    norms = k.diagonal()
    d2 = (norms[:, None] + norms[None, :] - 2 * k).clamp(min=0)
    d2.fill_diagonal_(0)
    return torch.exp(d2 / (-2 * kernel.fraction**2 * _median(d2)))


def _halves(k: Tensor, estimator: Estimator) -> Tensor:
    """Halves (L, pairs) of kernels (L, n, n), centered in place, so weighted that products are those of the wholes."""
    n = k.shape[1]
    if estimator == "unbiased":
        k.diagonal(dim1=1, dim2=2).zero_()
        sums = k.sum(1) / (n - 2)  # (L, n)
        shift = sums.sum(1, keepdim=True) / (n - 1)
    else:
        sums = k.mean(1)
        shift = sums.mean(1, keepdim=True)
    k -= sums[:, None, :]
    k -= (sums - shift)[:, :, None]
    half = k.flatten(1).index_select(1, _kept_flat(n, estimator).to(k.device))
    half *= 2**0.5
    if estimator == "biased":
        half[:, _kept_flat(n, estimator) % (n + 1) == 0] *= 0.5**0.5  # the diagonal
    return half


def _median(values: Tensor) -> Tensor:
    """The median as numpy has it, the mean of the two middle values; torch's own is the lower of them."""
    ordered = values.flatten().sort().values
    m = len(ordered)
    return (ordered[(m - 1) // 2] + ordered[m // 2]) / 2


def _by_features(x: Tensor, y: Tensor, estimator: Estimator) -> float:
    """Inner product of two centered linear kernels of centered features, without the kernels."""
    n = len(x)
    cross = float((y.T @ x).square().sum())
    if estimator == "biased":
        return cross
    r, s = x.square().sum(1), y.square().sum(1)
    return float(cross - n / (n - 2) * float(r @ s) + float(r.sum()) * float(s.sum()) / ((n - 1) * (n - 2)))


def _product(a: Tensor, b: Tensor) -> Floats:
    product: Floats = (a @ b.T).cpu().double().numpy()
    return product


def _t_quantile(level: float, batches: int) -> float:
    return float(scipy.stats.t.ppf(0.5 + level / 2, batches - 1)) if batches > 1 else float("nan")


def _jackknife_error(deleted: Floats) -> Floats:
    """Standard error from the estimates with each batch left out, (B, ...) to (...); NaN for a single batch."""
    batches = len(deleted)
    if batches < 2:
        return np.full(deleted.shape[1:], np.nan)
    error: Floats = np.sqrt((batches - 1) / batches * ((deleted - deleted.mean(0)) ** 2).sum(0))
    return error
