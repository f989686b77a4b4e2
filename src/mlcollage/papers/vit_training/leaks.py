"""Validation rows that pre-training has seen: the trap of sections 4.5 and 5 of the paper (its minival)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.data.row_hashes import row_hashes
from mlcollage.errors import InvalidInput


@dataclass(frozen=True)
class LeakReport:
    """Validation rows that are in the training set.

    Attributes
    ----------
    exact
        Whether each validation row is in the training set number by number, (n,).
    similarity
        Largest correlation of each validation row with a training row, (n,).
    nearest
        Place of that training row, (n,).
    threshold
        From which correlation on a row counts as a near-copy.
    """

    exact: NDArray[np.bool_]
    similarity: NDArray[np.float64]
    nearest: NDArray[np.int64]
    threshold: float

    @property
    def leaked(self) -> NDArray[np.bool_]:
        """Copies and near-copies, (n,)."""
        found: NDArray[np.bool_] = self.exact | (self.similarity >= self.threshold)
        return found

    @property
    def share(self) -> float:
        """Share of the validation rows that leak."""
        return float(self.leaked.mean())

    def __str__(self) -> str:
        near = int(self.leaked.sum() - self.exact.sum())
        return (
            f"{int(self.exact.sum())} of {len(self.exact)} validation rows are in the training set, and {near} more "
            f"are near-copies (correlation of {self.threshold:g} or more)"
        )


def find_leaks(
    train: Tensor | NDArray[np.generic],
    val: Tensor | NDArray[np.generic],
    *,
    threshold: float = 0.99,
    block: int = 4096,
) -> LeakReport:
    r"""Look for validation rows that are, exactly or nearly, in the training set.

    A near-copy is a row whose correlation with a training row is at least ``threshold``: images of other brightness or
    contrast, or of slight noise. Moved or mirrored copies are not found; compare features of a network for these.

    Parameters
    ----------
    train, val
        Rows (N, ...) and (n, ...) of the same shape. Rows of a few numbers are alike by chance; a warning tells how
        many.
    threshold
        Of the correlation, above 0 and at most 1.
    block
        Training rows compared at once.

    Returns
    -------
    LeakReport

    Raises
    ------
    InvalidInput
        If the rows have other shapes, there are none, or they hold numbers that are not finite.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> train, new = torch.randn(50, 20, generator=g), torch.randn(10, 20, generator=g)
    >>> report = find_leaks(train, torch.cat([train[:2], 1.5 * train[2:3] + 3, new]))
    >>> print(report)
    2 of 13 validation rows are in the training set, and 1 more are near-copies (correlation of 0.99 or more)
    """
    threshold = checks.real("threshold", threshold, above=0, most=1)
    a, b = _rows("train", train), _rows("val", val)
    if a.shape[1:] != b.shape[1:] or a.ndim < 2 or not len(a) or not len(b):
        raise InvalidInput(
            f"train {tuple(a.shape)} and val {tuple(b.shape)} must be rows of the same shape, at least one of each."
        )
    numbers = math.prod(a.shape[1:])
    chance = _by_chance(numbers, threshold) * len(a)
    if chance > 0.05:
        warnings.warn(
            f"rows of {numbers} numbers have a correlation of {threshold:g} by chance: {min(1.0, chance):.0%} of "
            f"unrelated rows would count as near-copies among {len(a)} training rows; raise the threshold, or look at "
            "`exact` alone.",
            stacklevel=2,
        )
    exact = torch.isin(row_hashes(b), row_hashes(a)).cpu().numpy()
    x, y = _directions(a), _directions(b)
    best = torch.full((len(y),), -torch.inf, dtype=y.dtype, device=y.device)
    nearest = torch.zeros(len(y), dtype=torch.long, device=y.device)
    for start in range(0, len(x), checks.integer("block", block, least=1)):
        value, place = (y @ x[start : start + block].T).max(1)  # (n,)
        nearest = torch.where(value > best, place + start, nearest)
        best = torch.maximum(best, value)
    return LeakReport(exact, best.double().cpu().numpy(), nearest.cpu().numpy(), threshold)


def _rows(name: str, rows: Any) -> Tensor:
    try:
        found = rows if isinstance(rows, Tensor) else torch.as_tensor(np.array(rows))
    except TypeError as error:
        raise InvalidInput(f"{name} must be rows of numbers: {error}.") from error
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise InvalidInput(f"{name} holds NaN or infinite numbers, which equal nothing; fill them in first.")
    return found


def _by_chance(numbers: int, threshold: float) -> float:
    """Probability that two unrelated (normal) rows of so many numbers correlate at least so much."""
    if numbers < 3:
        return 0.5 if numbers == 2 else 0.0  # two numbers always correlate by 1 or -1, one number never
    half = (numbers - 2) / 2
    return float(special.betainc(half, half, (1 - threshold) / 2))


def _directions(rows: Tensor) -> Tensor:
    """Rows without their mean, of length 1: products are correlations. Constant rows are zero."""
    flat = rows.flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
