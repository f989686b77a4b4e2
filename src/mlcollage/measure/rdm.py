"""Representational dissimilarity matrices, and how alike two of them are."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from scipy.stats import rankdata
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import as_double

__all__ = ["rdm", "rdm_similarity"]

Metric = Literal["correlation", "euclidean", "cosine"]
_ROUNDING = 1e-12  # of distances between rows that are copies or multiples of each other, times the largest possible


def rdm(acts: Any, metric: Metric = "correlation") -> Tensor:
    r"""Dissimilarities of all pairs of samples, :math:`D_{ij} = 1 - \mathrm{corr}(a_i, a_j)`.

    Parameters
    ----------
    acts
        Activations (N, ...) of one layer; everything behind the first axis is one row.
    metric
        ``"correlation"``: 1 minus Pearson's correlation of two rows, in [0, 2]. ``"cosine"``: 1 minus their cosine.
        ``"euclidean"``: their distance.

    Returns
    -------
    Tensor
        (N, N) float64, symmetric, its diagonal 0. Rows without a correlation (constant, or zero for the cosine) are
        NaN, which a warning counts. Distances as small as rounding are 0, so that ranks are not made of noise.

    Raises
    ------
    InvalidInput
        For fewer than two rows, and values that are NaN or infinite.

    References
    ----------
    Kriegeskorte, Mur and Bandettini, "Representational similarity analysis", Frontiers in Systems Neuroscience 2008.

    Examples
    --------
    >>> rdm([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]])
    tensor([[0., 0., 2.],
            [0., 0., 2.],
            [2., 2., 0.]], dtype=torch.float64)
    """
    checks.choice("metric", metric, ("correlation", "euclidean", "cosine"))
    x = as_double(acts)
    if x.ndim < 2 or len(x) < 2:
        raise InvalidInput(f"acts has shape {tuple(x.shape)}, but at least two rows (samples, features) are needed.")
    x = x.flatten(1)  # (N, p)
    if not bool(x.isfinite().all()):
        raise InvalidInput(f"acts holds {int((~x.isfinite()).sum())} values that are NaN or infinite.")
    if metric == "euclidean":
        centered = x - x.mean(0)  # distances do not change, and large offsets cancel before they are squared
        squares = centered.square().sum(1)
        d = squares[:, None] + squares - 2 * centered @ centered.T  # (N, N)
        d = torch.where(d < _ROUNDING * squares.max().clamp(min=1e-300), 0.0, d).sqrt()
        return d.fill_diagonal_(0.0)
    rows = x - x.mean(1, keepdim=True) if metric == "correlation" else x
    norms = rows.norm(dim=1)
    flat = norms <= 1e-12 * x.abs().amax(1).clamp(min=1e-300) * x.shape[1] ** 0.5
    unit = rows / torch.where(flat, 1.0, norms)[:, None]
    d = 1 - unit @ unit.T  # one Gram matrix, (N, N)
    d = torch.where(d.abs() < _ROUNDING, 0.0, d)
    d = torch.where((d - 2).abs() < _ROUNDING, 2.0, d).fill_diagonal_(0.0)
    if bool(flat.any()):
        warnings.warn(f"{int(flat.sum())} of {len(x)} rows are constant and have no {metric}; they are NaN.")
        d[flat, :] = torch.nan
        d[:, flat] = torch.nan
    return d


def rdm_similarity(a: Any, b: Any, method: Literal["pearson", "spearman"] = "pearson") -> float:
    """Second-order similarity: the correlation of two dissimilarity matrices over their pairs of samples.

    Only the upper triangle counts, since a diagonal of zeros in both would raise the correlation. Samples that are
    NaN in either matrix are left out of both.

    Parameters
    ----------
    a, b
        Of :func:`rdm`, (N, N) each, over the same samples.
    method
        ``"pearson"``, or ``"spearman"`` for ranks.

    Returns
    -------
    float
        In [-1, 1]; NaN if all dissimilarities of one are equal.

    Raises
    ------
    InvalidInput
        If they are no square matrices of one size, or fewer than three samples are left.

    Examples
    --------
    >>> one = rdm([[1.0, 2, 3], [2, 4, 6], [3, 2, 1], [1, 0, 0]])
    >>> round(rdm_similarity(one, rdm([[1.0, 0, 2], [0, 1, 1], [2, 2, 0], [3, 0, 1]])), 6)
    0.569384
    """
    checks.choice("method", method, ("pearson", "spearman"))
    x, y = as_double(a), as_double(b)
    if x.ndim != 2 or x.shape != y.shape or x.shape[0] != x.shape[1]:
        raise InvalidInput(f"two square matrices of one size are needed, not {tuple(x.shape)} and {tuple(y.shape)}.")
    keep = ~(x.isnan().all(1) | y.isnan().all(1) | (x.isnan().sum(1) >= len(x) - 1) | (y.isnan().sum(1) >= len(y) - 1))
    if int(keep.sum()) < 3:
        raise InvalidInput(f"{int(keep.sum())} samples are left in both matrices; at least three are needed.")
    x, y = x[keep][:, keep], y[keep][:, keep]
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    u, v = x[i, j], y[i, j]  # (pairs,)
    if method == "spearman":
        u, v = (torch.from_numpy(rankdata(t.cpu().numpy())).double() for t in (u, v))
    u, v = u - u.mean(), v - v.mean()
    scale = float(u.norm() * v.norm())
    return float((u * v).sum()) / scale if scale > 0 else float("nan")
