r"""Canonical correlation analysis of two representations: CCA, SVCCA and PWCCA, one factorization per representation.

For centered representations :math:`X` (n, p) and :math:`Y` (n, q) of the same n samples, with orthonormal bases
:math:`B_x, B_y` of their column spaces, the canonical correlations are the singular values of :math:`B_x^\top B_y`
(Björck and Golub 1973). :func:`factor` computes a basis once; every pair then costs one matrix product and one small
SVD, and the covariance matrices, whose condition is the square of the data's, are never formed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import as_double, centered_matrix

__all__ = ["CCAFactor", "CCAResult", "cca", "factor", "pairwise", "pwcca", "svcca"]

Floats = npt.NDArray[np.float64]
Weights = Literal["x", "y", "min"]
Method = Literal["cca", "svcca", "pwcca"]


@dataclass(frozen=True, eq=False)
class CCAFactor:
    r"""A centered representation as :math:`X = B C`, with orthonormal :math:`B`; made by :func:`factor`.

    Parameters
    ----------
    basis
        :math:`B` (n, r), float64, on the representation's device.
    coordinates
        :math:`C` (r, p'), of the p' features that are not constant.
    whitener
        (p', r): :math:`X W = B`.
    kept
        Indices of these features among all p.
    features
        p, constant features included.
    """

    basis: Tensor
    coordinates: Tensor
    whitener: Tensor
    kept: npt.NDArray[np.int64]
    features: int
    _principal: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        """Rows n of the representation."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Numerical rank r of the centered representation."""
        return self.basis.shape[1]

    @property
    def dropped(self) -> int:
        """Constant features, which carry no correlation and were left out."""
        return self.features - len(self.kept)

    def principal(self) -> tuple[Tensor, Tensor]:
        """Singular values (r,) of the centered representation and their directions in the basis (r, r); cached."""
        if "svd" not in self._principal:
            u, s, _ = _svd(self.coordinates)
            self._principal["svd"] = (s, u)
        return self._principal["svd"]

    def truncate(self, variance: float) -> CCAFactor:
        """The fewest principal components that hold this share of the variance, as a factor of their own.

        Parameters
        ----------
        variance
            Share of the total variance in (0, 1].
        """
        k = components_for(self.principal()[0], variance)
        u = self.principal()[1][:, :k]
        # The basis turned to the principal directions, (n, k); X = B C keeps its k largest terms.
        return CCAFactor(self.basis @ u, u.T @ self.coordinates, self.whitener @ u, self.kept, self.features)


@dataclass(frozen=True, eq=False)
class CCAResult:
    """Canonical correlations of two representations, and what they are correlations of.

    Parameters
    ----------
    coefs
        (k,) canonical correlations in [0, 1], falling; k is the smaller of the two ranks.
    x_dirs, y_dirs
        (p, k) and (q, k): centered ``X @ x_dirs`` has orthonormal columns whose i-th correlates with that of
        ``Y @ y_dirs`` by ``coefs[i]`` and with no other. Rows of constant features are zero.
    similarity
        Mean of the coefficients (CCA, SVCCA), or their weighted mean (PWCCA).
    weights
        (k,) weights of that mean; they sum to 1.
    ranks
        Ranks of the two representations (SVCCA: components kept).
    dropped
        Constant features left out of X and of Y.
    samples
        n.
    """

    coefs: Floats
    x_dirs: Floats
    y_dirs: Floats
    similarity: float
    weights: Floats
    ranks: tuple[int, int]
    dropped: tuple[int, int]
    samples: int

    @property
    def distance(self) -> float:
        """One minus the similarity."""
        return 1.0 - self.similarity


def factor(X: Any, *, rtol: float | None = None, name: str = "X") -> CCAFactor:
    r"""Factorize a representation once, for any number of comparisons.

    The columns are centered and scaled to length 1, so that the decision on the rank does not depend on the features'
    units; then :math:`QR` and the SVD of :math:`R = U S V^\top`. Directions with :math:`s_i \le \mathrm{rtol}\, s_1`
    are left out.

    Parameters
    ----------
    X
        (n, p) array or tensor of any type and device; computed in float64.
    rtol
        Relative cut of the singular values; default ``10 sqrt(n)`` times the spacing of the representation's own
        type (float32 activations have float32 noise), at most 1e-3.
    name
        How errors call it.

    Returns
    -------
    CCAFactor

    Raises
    ------
    InvalidInput
        If there are no more samples than (not constant) features, all features are constant, or values are not finite.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(50, 4))
    >>> X[:, 3] = X[:, 0] + X[:, 1]
    >>> f = factor(np.c_[X, np.ones(50)])
    >>> f.rank, f.dropped
    (3, 1)
    """
    precision = _precision(X)
    x = centered_matrix(X, name)
    n, p = x.shape
    scale = x.abs().amax(dim=0)  # (p,)
    wobble = max(8 * precision, n * _precision(None))  # a constant column, less its mean, is zero only up to rounding
    kept = (scale > as_double(X).abs().amax(dim=0) * wobble).nonzero().squeeze(1)
    if len(kept) == 0:
        raise InvalidInput(f"all {p} features of {name} are constant, so that nothing correlates; look at the layer.")
    if n <= len(kept):
        raise InvalidInput(
            f"need more samples than features (n={n}, p={len(kept)} of {name}); pool or reduce the features, or take "
            "more samples (ten times as many as features is a good rule)."
        )
    x = x[:, kept] / scale[kept]  # first by the largest entry, so that the length neither over- nor underflows
    length = x.norm(dim=0)
    # X = Q R diag(length), and R = U S V^T is small: (p', p') whatever n is.
    q, r = torch.linalg.qr(x / length)
    u, s, vt = _svd(r)
    # Directions as small as the rounding of n numbers in the representation's own type are noise.
    cut = min(10 * n**0.5 * precision, 1e-3) if rtol is None else rtol
    rank = int((s > cut * s[0]).sum())
    u, s, vt, length = u[:, :rank], s[:rank], vt[:rank], length * scale[kept]
    # X = B C with B = Q U (n, r) and C = S V^T diag(length) (r, p'); the whitener diag(1 / length) V / S inverts C.
    return CCAFactor(q @ u, s[:, None] * vt * length, vt.T / s / length[:, None], kept.cpu().numpy(), p)


def cca(X: Any, Y: Any) -> CCAResult:
    r"""Canonical correlations :math:`\rho_i` of two representations of the same samples.

    .. math:: \rho_i = \sigma_i(B_x^\top B_y), \qquad \bar\rho = \frac1k \sum_{i=1}^{k} \rho_i,
              \quad k = \min(\mathrm{rank}\,X, \mathrm{rank}\,Y)

    Invariant under invertible affine maps of either side: the distance :math:`1 - \bar\rho` of two networks that
    differ by a rotation of their units is 0.

    Parameters
    ----------
    X, Y
        (n, p) and (n, q) arrays or tensors, or the results of :func:`factor`. Constant features are left out and
        counted in ``dropped``.

    Returns
    -------
    CCAResult

    Raises
    ------
    InvalidInput
        If the numbers of samples differ or there are no more samples than features.

    Warns
    -----
    UserWarning
        If the two ranks add up to n or more: some correlations are then exactly 1 whatever the data.

    References
    ----------
    Hotelling, "Relations between two sets of variates", Biometrika 1936; Björck and Golub, "Numerical methods for
    computing angles between linear subspaces", Math. Comp. 1973.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 3))
    >>> result = cca(X, X @ rng.normal(size=(3, 3)) + 7)
    >>> result.coefs.round(6).tolist(), round(result.distance, 6) == 0
    ([1.0, 1.0, 1.0], True)
    """
    fx, fy = _factors(X, Y)
    return _correlate(fx, fy)


def svcca(X: Any, Y: Any, variance: float = 0.99) -> CCAResult:
    """CCA of the principal components that hold ``variance`` of each representation (Raghu et al. 2017).

    Parameters
    ----------
    X, Y
        As for :func:`cca`.
    variance
        Share of the variance to keep, in (0, 1]; 1 is CCA itself.

    Returns
    -------
    CCAResult
        ``ranks`` are the numbers of components kept.

    References
    ----------
    Raghu, Gilmer, Yosinski, Sohl-Dickstein, "SVCCA", NeurIPS 2017, arXiv:1706.05806, section 2.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 2))
    >>> noisy = np.c_[X, 1e-3 * rng.normal(size=(200, 5))]
    >>> svcca(X, noisy).ranks
    (2, 2)
    """
    fx, fy = _factors(X, Y)
    return _correlate(fx.truncate(variance), fy.truncate(variance))


def pwcca(X: Any, Y: Any, weights: Weights = "x") -> CCAResult:
    r"""Projection-weighted CCA: directions count by how much of a representation they account for.

    .. math:: \rho_{\mathrm{pw}} = \frac{\sum_i \alpha_i \rho_i}{\sum_i \alpha_i}, \qquad
              \alpha_i = \sum_j |\langle h_i, x_j \rangle|

    with :math:`h_i` the i-th canonical variate in X (an orthonormal set) and :math:`x_j` its centered features.

    Parameters
    ----------
    X, Y
        As for :func:`cca`.
    weights
        Which representation weighs: ``"x"`` (default; the measure is then asymmetric), ``"y"``, or ``"min"``, the one
        of smaller rank (X if they are equal), as the official code means to.

    Returns
    -------
    CCAResult
        With ``weights`` and their mean as ``similarity``.

    References
    ----------
    Morcos, Raghu, Bengio, "Insights on representational similarity in neural networks with canonical correlation",
    NeurIPS 2018, arXiv:1806.05759, section 3.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> signal, noise = rng.normal(size=(500, 2)), rng.normal(size=(500, 2))
    >>> other = np.c_[signal, rng.normal(size=(500, 2))]
    >>> mostly_signal = np.c_[10 * signal, noise]
    >>> pwcca(mostly_signal, other).similarity > cca(mostly_signal, other).similarity
    True
    """
    checks.choice("weights", weights, ("x", "y", "min"))
    fx, fy = _factors(X, Y)
    side = weights if weights != "min" else ("x" if fx.rank <= fy.rank else "y")
    return _correlate(fx, fy, side)


def pairwise(
    layers: Mapping[str, Any],
    others: Mapping[str, Any] | None = None,
    *,
    method: Method = "cca",
    variance: float = 0.99,
    weights: Weights = "x",
) -> pd.DataFrame:
    """Similarity of every layer with every other (or with every layer of another network), one factorization per layer.

    Parameters
    ----------
    layers
        Representations (n, p) by name, or factors.
    others
        A second set, for the columns; by default the first again.
    method
        ``"cca"``, ``"svcca"`` (with ``variance``) or ``"pwcca"`` (with ``weights``).

    Returns
    -------
    DataFrame
        Rows ``layers``, columns ``others``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a = rng.normal(size=(100, 3))
    >>> pairwise({"a": a, "b": a @ rng.normal(size=(3, 3))}).round(6).to_numpy().tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    checks.choice("method", method, ("cca", "svcca", "pwcca"))
    rows = _ready(layers, method, variance)
    columns = rows if others is None else _ready(others, method, variance)
    table = np.ones((len(rows), len(columns)))
    symmetric = others is None and method != "pwcca"  # PWCCA weighs by one side
    for i, fx in enumerate(rows.values()):
        for j, fy in enumerate(columns.values()):
            if symmetric and j < i:
                table[i, j] = table[j, i]
            elif method == "pwcca":
                table[i, j] = pwcca(fx, fy, weights).similarity
            else:
                table[i, j] = _correlate(*_factors(fx, fy), directions=False).similarity
    return pd.DataFrame(table, index=list(rows), columns=list(columns))


def components_for(singular_values: Tensor, variance: float) -> int:
    """The fewest leading components whose squared singular values make up the share ``variance`` of the total.

    0 if the total is 0.
    """
    variance = checks.real("variance", variance, above=0, most=1)
    power = singular_values.double().square()
    if not float(power.sum()) > 0:
        return 0
    # Less a little, so that rounding in the sum does not ask for one component more.
    share = power.cumsum(0) / power.sum()
    return int((share < variance - 1e-12).sum().clamp(max=len(power) - 1)) + 1


def _ready(layers: Mapping[str, Any], method: Method, variance: float) -> dict[str, CCAFactor]:
    if not layers:
        raise InvalidInput("there are no layers to compare; give a mapping of name to activations (n, p).")
    made = {k: v if isinstance(v, CCAFactor) else factor(v, name=str(k)) for k, v in layers.items()}
    return {k: f.truncate(variance) for k, f in made.items()} if method == "svcca" else made


def _factors(X: Any, Y: Any) -> tuple[CCAFactor, CCAFactor]:
    fx = X if isinstance(X, CCAFactor) else factor(X, name="X")
    fy = Y if isinstance(Y, CCAFactor) else factor(Y, name="Y")
    if fx.samples != fy.samples:
        raise InvalidInput(
            f"X has {fx.samples} samples and Y has {fy.samples}; both must represent the same samples, in one order."
        )
    return fx, fy


def _correlate(fx: CCAFactor, fy: CCAFactor, weigh: str = "", *, directions: bool = True) -> CCAResult:
    if fx.rank + fy.rank >= fx.samples:
        warnings.warn(
            f"ranks {fx.rank} and {fy.rank} add up to n={fx.samples} or more: some canonical correlations are 1 "
            "whatever the data; take more samples, or pool or reduce the features.",
            UserWarning,
            stacklevel=3,
        )
    k = min(fx.rank, fy.rank)
    overlap = fx.basis.T @ fy.basis.to(fx.basis)  # (r_x, r_y): cosines between the two bases
    x_dirs = y_dirs = np.zeros((0, 0))
    share = np.full(k, 1.0 / k)
    if directions or weigh:
        u, s, vt = _svd(overlap)
        # Canonical variates in each side's own basis, (r_x, k) and (r_y, k).
        sides = {"x": (fx, u[:, :k]), "y": (fy, vt[:k].T)}
        x_dirs, y_dirs = (_directions(f, side) for f, side in sides.values())
        if weigh:
            f, side = sides[weigh]
            # alpha_i = sum_j |<h_i, x_j>|, with h_i = B side_i and x_j = B c_j: inner products of coordinates, (k, p').
            alpha = (side.to(f.coordinates).T @ f.coordinates).abs().sum(dim=1)
            share = (alpha / alpha.sum()).cpu().numpy()
    else:
        s = torch.linalg.svdvals(overlap)
    coefs = s[:k].clamp(0.0, 1.0).cpu().numpy()  # cosines, up to rounding
    similarity = float(share @ coefs)
    return CCAResult(coefs, x_dirs, y_dirs, similarity, share, (fx.rank, fy.rank), (fx.dropped, fy.dropped), fx.samples)


def _directions(f: CCAFactor, rotation: Tensor) -> Floats:
    """Weights (p, k) of the features that give the canonical variates; zero for constant features."""
    out = np.zeros((f.features, rotation.shape[1]))
    out[f.kept] = (f.whitener @ rotation.to(f.whitener)).cpu().numpy()
    return out


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD; where the divide-and-conquer driver fails to converge, the slower one that does not."""
    try:
        u, s, vt = torch.linalg.svd(a, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        from scipy.linalg import svd

        parts = svd(a.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        u, s, vt = (torch.from_numpy(np.ascontiguousarray(part)).to(a) for part in parts)
    return u, s, vt


def _precision(X: Any) -> float:
    """Spacing of the type that the values were computed in; float64's for what is no array of floats."""
    if isinstance(X, Tensor):
        return torch.finfo(X.dtype if X.dtype.is_floating_point else torch.float64).eps
    dtype = getattr(X, "dtype", np.dtype(np.float64))
    return float(np.finfo(dtype if np.issubdtype(dtype, np.floating) else np.float64).eps)
