r"""Convergence of chains and precision of their means: R-hat, effective sample size, energy.

Stored draws go to ArviZ. :class:`Streaming` computes split R-hat, effective sample size and means while draws pass
by, in memory that does not depend on their number: for parameters or predictions too large to store.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput
from mlcollage.infer.export import is_before_1

Floats = npt.NDArray[np.float64]


def _stored(draws: Tensor | npt.ArrayLike) -> Floats:
    # ArviZ computes in numpy, on the CPU
    x = np.asarray(draws.detach().cpu() if isinstance(draws, Tensor) else draws, dtype=np.float64)
    if x.ndim < 2 or x.shape[1] < 4:
        raise InvalidInput(f"draws have shape {x.shape}; (chains, draws, ...) with at least 4 draws is needed.")
    if not np.isfinite(x).all():
        raise InvalidInput("draws are not all finite; find the divergences before diagnosing the rest.")
    return x


def _by_arviz(function: str, draws: Floats, **options: Any) -> Floats:
    arviz: Any = import_module("arviz")
    if not is_before_1(arviz):  # from 1.0 its statistics take arrays
        arrays = import_module("arviz_stats.base").array_stats
        return np.asarray(getattr(arrays, function)(draws, chain_axis=0, draw_axis=1, **options))
    xarray: Any = import_module("xarray")
    dims = ("chain", "draw", *(f"dim{i}" for i in range(draws.ndim - 2)))
    data = xarray.Dataset({"x": (dims, draws)})
    return getattr(arviz, function)(data, **options)["x"].to_numpy()


def rhat(draws: Tensor | npt.ArrayLike, method: Literal["rank", "split", "folded"] = "rank") -> Floats:
    """Potential scale reduction, rank-normalized and split by default; below 1.01 where chains agree.

    A. Vehtari et al., "Rank-normalization, folding, and localization", Bayesian Analysis 2021; computed by ArviZ.

    Parameters
    ----------
    draws
        (chains, draws, ...). One chain is compared with itself, half against half, with a warning.
    method
        As in ``arviz.rhat``.

    Returns
    -------
    ndarray
        One value per quantity, the shape of ``draws`` after the first two dimensions.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(4, 500, 2)) + [[[0, 0]], [[0, 0]], [[0, 0]], [[0, 3]]]
    >>> rhat(x).round(1).tolist()
    [1.0, 1.5]
    """
    x = _stored(draws)
    if len(x) == 1:
        warnings.warn("R-hat of one chain compares only its halves; run several chains from different starts.")
        half = x.shape[1] // 2  # as two chains; of an odd number the middle draw is left out
        x = np.concatenate([x[:, :half], x[:, x.shape[1] - half :]])
    return _by_arviz("rhat", x, method=method)


def ess(draws: Tensor | npt.ArrayLike, method: Literal["bulk", "tail", "mean"] = "bulk") -> Floats:
    """Effective sample size: independent draws that would give means (``"tail"``: 5 % and 95 % quantiles) as good.

    Vehtari et al. 2021; computed by ArviZ. Want at least 100 per chain.

    Parameters
    ----------
    draws
        (chains, draws, ...).
    method
        As in ``arviz.ess``.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(4, 500))
    >>> bool(1700 < ess(x) < 2300)
    True
    """
    tails = {"prob": (0.05, 0.95)} if method == "tail" else {}
    return _by_arviz("ess", _stored(draws), method=method, **tails)


def bfmi(energy: Tensor | npt.ArrayLike) -> Floats:
    r"""Bayesian fraction of missing information of each chain, (chains,).

    .. math:: \frac{\sum_t (E_t - E_{t-1})^2}{\sum_t (E_t - \bar E)^2}

    Below .3, fresh momenta move the energy too little to reach the tails; M. Betancourt, "Diagnosing Suboptimal
    Cotangent Disintegrations", 2016.

    Parameters
    ----------
    energy
        (chains, draws), from ``Chains.energy``.

    Examples
    --------
    >>> bfmi(np.random.default_rng(0).normal(size=(1, 2000))).round(1).tolist()  # independent energies
    [2.0]
    """
    e = _stored(energy)
    if e.ndim != 2:
        raise InvalidInput(f"energy has shape {e.shape}; (chains, draws) is needed.")
    return np.asarray((np.diff(e, axis=1) ** 2).sum(axis=1) / (e.var(axis=1) * e.shape[1]))


Moments = tuple[int, Tensor, Tensor]  # count, mean, sum of squared deviations


def _combine(a: Moments, b: Moments) -> Moments:
    """Moments of two stretches of each chain (Chan's formula)."""
    n = a[0] + b[0]
    delta = b[1] - a[1]
    return n, a[1] + delta * (b[0] / n), a[2] + b[2] + delta.square() * (a[0] * b[0] / n)


class Streaming:
    r"""Means, split R-hat and effective sample size of draws that are not kept.

    Draws of each chain are summed up in batches of equal length :math:`b`; when there are ``batches`` of them,
    neighbors are merged and :math:`b` doubles. With :math:`K` whole batches of :math:`C` chains, their means
    :math:`\bar y_{ck}` and the pooled variance :math:`\widehat V` of Gelman and Rubin,

    .. math::
        \hat\sigma^2 = \frac{b}{CK - 1} \sum_{ck} (\bar y_{ck} - \bar y)^2, \qquad
        \mathrm{ESS} = \frac{C K b \, \widehat V}{\hat\sigma^2}, \qquad
        \mathrm{MCSE} = \sqrt{\hat\sigma^2 / (C K b)}.

    The batch-means estimate is good once a batch is some ten autocorrelation times long, and says something only where
    R-hat is near 1: chains that disagree still count as up to CK effective draws. R-hat is that of the first
    against the second half of the batches in every chain: exactly ArviZ's ``"split"`` as long as no draw is left over.
    J. M. Flegal and G. L. Jones, "Batch means and spectral variance estimators in MCMC", Annals of Statistics 2010.

    Parameters
    ----------
    batches
        Most batches kept of a chain, an even number of at least 8; memory is twice that many draws.

    Examples
    --------
    >>> stream, generator = Streaming(), torch.Generator().manual_seed(0)
    >>> for _ in range(1024):
    ...     stream.update(torch.randn(8, 3, dtype=torch.float64, generator=generator))  # 8 chains, 3 quantities
    >>> bool((stream.rhat() < 1.01).all()), stream.mean().shape
    (True, torch.Size([3]))
    >>> bool(((stream.ess() > 5000) & (stream.ess() < 13000)).all())
    True
    """

    def __init__(self, batches: int = 16):
        self.batches = integer("batches", batches, least=8)
        if batches % 2:
            raise InvalidInput(f"batches={batches} must be even: neighbors are merged two by two.")
        self.count = 0
        self.width = 1
        # moments (chains, ...) of whole batches, and of the one that is being filled
        self._whole: list[Moments] = []
        self._open: Moments | None = None

    def update(self, value: Tensor | npt.ArrayLike) -> None:
        """Take in one draw of every chain, (chains, ...)."""
        x = torch.as_tensor(value).detach().double()  # sums of many draws lose digits in float32
        known = self._open or (self._whole[0] if self._whole else None)
        if x.ndim < 1 or (known is not None and x.shape != known[1].shape):
            wanted = "(chains, ...)" if known is None else tuple(known[1].shape)
            raise InvalidInput(f"a draw has shape {tuple(x.shape)}; {wanted} is needed.")
        new = (1, x.clone(), torch.zeros_like(x))
        self._open = new if self._open is None else _combine(self._open, new)
        self.count += 1
        if self._open[0] == self.width:
            self._whole.append(self._open)
            self._open = None
        if len(self._whole) == self.batches:  # half as many, twice as long
            self._whole = [_combine(a, b) for a, b in zip(self._whole[::2], self._whole[1::2], strict=True)]
            self.width *= 2

    def merge(self, other: Streaming) -> Streaming:
        """The chains of both side by side, e.g. of two processes that took the same number of draws.

        Parameters
        ----------
        other
            With the same ``batches`` and number of draws.
        """
        if (self.batches, self.count) != (other.batches, other.count):
            raise InvalidInput(
                f"only chains of equal length and batches go together; here {self.count} draws in at most "
                f"{self.batches} batches, there {other.count} in at most {other.batches}."
            )

        def beside(a: Moments, b: Moments) -> Moments:
            return a[0], torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]])

        # equal counts have equal batches, so each pair of batches goes side by side
        both = Streaming(self.batches)
        both.count, both.width = self.count, self.width
        both._whole = [beside(a, b) for a, b in zip(self._whole, other._whole, strict=True)]
        both._open = None if self._open is None or other._open is None else beside(self._open, other._open)
        return both

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name, for a file; see :meth:`from_tensors`."""
        parts = self._parts()
        state = {
            "sizes": torch.tensor([self.batches, self.count, self.width, len(self._whole)]),
            "counts": torch.tensor([n for n, _, _ in parts], dtype=torch.int64),
        }
        if parts:
            state |= {"means": torch.stack([p[1] for p in parts]), "squares": torch.stack([p[2] for p in parts])}
        return state

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor]) -> Streaming:
        """The stream whose state :meth:`tensors` gave."""
        batches, count, width, whole = state["sizes"].tolist()
        made = cls(batches)
        made.count, made.width = count, width
        counts = state["counts"].tolist()
        parts = [(n, state["means"][i].clone(), state["squares"][i].clone()) for i, n in enumerate(counts)]
        made._whole, made._open = parts[:whole], parts[whole] if len(parts) > whole else None
        return made

    def mean_of_chains(self) -> Tensor:
        """Mean over the draws of each chain, (chains, ...)."""
        return self._all()[1]

    def _parts(self) -> list[Moments]:
        return [*self._whole, *([] if self._open is None else [self._open])]

    def _all(self) -> Moments:
        if not self.count:
            raise InvalidInput("no draw was taken in yet.")
        return reduce(_combine, self._parts())

    def mean(self) -> Tensor:
        """Mean over all draws of all chains: for predictions, the Bayesian model average."""
        return self._all()[1].mean(dim=0)

    def variance(self) -> Tensor:
        """Unbiased variance over all draws of all chains."""
        n, mean, m2 = self._all()  # of each chain; within chains, and between their means
        spread = n * (mean - mean.mean(dim=0)).square().sum(dim=0)
        return (m2.sum(dim=0) + spread) / (n * len(mean) - 1)

    def _halves(self) -> Moments:
        """Moments of the two halves of each chain, stacked as 2C chains."""
        half = len(self._whole) // 2  # whole batches only: what is left open counts for neither half
        if half < 2:
            raise InvalidInput(f"{self.count} draws per chain are too few; at least 4 are needed.")
        first, second = reduce(_combine, self._whole[:half]), reduce(_combine, self._whole[-half:])
        return first[0], torch.cat([first[1], second[1]]), torch.cat([first[2], second[2]])

    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Variance within half chains, and with what is between them."""
        n, mean, m2 = self._halves()
        within = (m2 / (n - 1)).mean(dim=0)
        return within, (n - 1) / n * within + mean.var(dim=0)

    def rhat(self) -> Tensor:
        """Split R-hat of each quantity; NaN where nothing varies."""
        within, pooled = self._pooled()
        return (pooled / within).sqrt()

    def _asymptotic(self) -> tuple[Tensor, int]:
        """Batch-means variance of the chain, and the draws behind it."""
        means = torch.stack([m for _, m, _ in self._whole])  # (batches, chains, ...)
        flat = means.reshape(-1, *means.shape[2:])
        return self.width * flat.var(dim=0), len(flat) * self.width

    def ess(self) -> Tensor:
        """Effective sample size for the mean of each quantity; NaN where nothing varies."""
        pooled, (asymptotic, n) = self._pooled()[1], self._asymptotic()
        # at most n log10(n), as in ArviZ, where draws are antithetic
        return (n * pooled / asymptotic).clamp(max=n * max(math.log10(n), 1.0))

    def mcse(self) -> Tensor:
        """Monte-Carlo standard error of :meth:`mean`."""
        self._halves()
        asymptotic, n = self._asymptotic()
        return (asymptotic / n).sqrt()
