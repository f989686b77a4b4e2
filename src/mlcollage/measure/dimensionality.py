"""How many dimensions a representation fills: components for a share of variance, and two smooth counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlcollage.measure.cca import components_for
from mlcollage.measure.representation import as_double, centered_matrix


def spectrum(acts: Any) -> Tensor:
    r"""Eigenvalues of the covariance of a representation, the largest first.

    .. math:: \lambda_i = s_i^2 / (n - 1), \qquad X - \bar X = U \,\mathrm{diag}(s)\, V^\top

    Parameters
    ----------
    acts
        (n, p) array or tensor; feature maps go through :func:`~mlcollage.measure.representation.as_samples` first.

    Returns
    -------
    Tensor
        (min(n, p),) float64, on the representation's device.

    Raises
    ------
    InvalidInput
        If it is not a matrix of finite values with two rows or more.

    Examples
    --------
    >>> spectrum([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]).round(decimals=6).tolist()
    [4.0, 0.0]
    """
    x = centered_matrix(acts, "acts")
    # X = Q R has the singular values of R, (p, p); worth it for many more samples than features.
    if x.shape[0] > 2 * x.shape[1]:
        x = torch.linalg.qr(x, mode="r")[1]
    return torch.linalg.svdvals(x).square() / (len(acts) - 1)


def dimensionality(acts: Any, variance: float = 0.95) -> int:
    r"""The fewest principal components that hold the share ``variance`` of a representation's variance.

    .. math:: \min \Big\{ k : \sum_{i \le k} \lambda_i \ge v \sum_i \lambda_i \Big\}

    Parameters
    ----------
    acts
        (n, p), as for :func:`spectrum`.
    variance
        Share v in (0, 1], 0.95 by default.

    Returns
    -------
    int
        From 1 to min(n, p); 0 for a representation that is the same for all samples.

    References
    ----------
    Leavitt and Morcos, "Linking average- and worst-case perturbation robustness via class selectivity and
    dimensionality", 2020, arXiv:2010.07693.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(500, 10, generator=g)
    >>> x[:, 2:] *= 0.01
    >>> dimensionality(x), dimensionality(x, 1.0)
    (2, 10)
    """
    return components_for(spectrum(acts).sqrt(), variance)


def participation_ratio(acts: Any) -> float:
    r"""A smooth count of dimensions, without a threshold.

    .. math:: \mathrm{PR} = \Big(\sum_i \lambda_i\Big)^2 \Big/ \sum_i \lambda_i^2

    It is p for p equal eigenvalues and 1 if one direction holds everything.

    Parameters
    ----------
    acts
        (n, p), as for :func:`spectrum`.

    Returns
    -------
    float
        From 1 to min(n, p); 0 for a representation that is the same for all samples.

    References
    ----------
    Gao, Trautmann, Yu et al., "A theory of multineuronal dimensionality, dynamics and measurement", 2017.

    Examples
    --------
    >>> participation_ratio([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    2.0
    """
    values = spectrum(acts)  # (min(n, p),)
    return float(values.sum() ** 2 / values.square().sum()) if float(values.sum()) > 0 else 0.0


def effective_rank(acts: Any, *, center: bool = True) -> float:
    r"""A smooth count of dimensions from the entropy of the singular values (RankMe).

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = s_i \Big/ \sum_j s_j

    It is p for p equal singular values. Above :func:`participation_ratio` in general, since it takes singular values
    and not their squares.

    Parameters
    ----------
    acts
        (n, p), as for :func:`spectrum`.
    center
        Take the mean of each column off first (default); RankMe does not.

    Returns
    -------
    float
        From 1 to min(n, p); 0 for a representation of zeros.

    References
    ----------
    Roy and Vetterli, "The effective rank", 2007; Garrido, Balestriero, Najman and LeCun, "RankMe", 2023,
    arXiv:2210.02885.

    Examples
    --------
    >>> round(effective_rank([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], center=False), 3)
    2.828
    """
    centered = centered_matrix(acts, "acts")  # also refuses what is no matrix
    x = centered if center else as_double(acts)
    # The smaller Gram matrix would square the condition; a triangular factor has the same singular values.
    small = torch.linalg.qr(x if x.shape[0] >= x.shape[1] else x.T, mode="r")[1]
    s = torch.linalg.svdvals(small)
    if float(s.sum()) == 0:
        return 0.0
    share = s / s.sum()
    return float(torch.special.entr(share).sum().exp())
