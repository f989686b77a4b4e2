"""Nearest neighbors as a probe: do samples of one class lie beside each other?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import as_double

__all__ = ["KNNProbe", "knn_probe"]

_CHUNK = 1024  # queries at once
_SHARED = 0.05  # share of queries in the bank that is no accident


@dataclass(frozen=True)
class KNNProbe:
    """What a vote of neighbors found.

    Parameters
    ----------
    accuracy
        Share of queries whose label won.
    predictions
        The label that won, of each query.
    k, temperature
        Of the vote.
    left_out
        Whether each query was left out of its own vote, since bank and queries are the same.
    """

    accuracy: float
    predictions: NDArray[Any]
    k: int
    temperature: float
    left_out: bool


def knn_probe(
    bank: Any, y_bank: Any, queries: Any = None, y: Any = None, *, k: int = 200, temperature: float = 0.1
) -> KNNProbe:
    r"""Label each query by the k nearest rows of a bank, weighted by similarity.

    .. math:: \hat y(q) = \arg\max_c \sum_{i \in N_k(q)} [y_i = c] \exp(\cos(q, b_i) / T)

    Parameters
    ----------
    bank, y_bank
        Representations (n, p) and labels (n,) of any kind.
    queries, y
        Representations (m, p) and labels (m,); None: the bank itself. A query that is a row of the bank is then left
        out of its own vote, also if the same array is given twice.
    k, temperature
        200 and 0.1 by default, as in most comparisons; say them beside the number, for both matter.

    Returns
    -------
    KNNProbe

    Raises
    ------
    InvalidInput
        If k is larger than the bank, labels do not fit or are of classes that the bank lacks, or there are NaN, or zero
        rows, which have no direction.

    Warns
    -----
    UserWarning
        If 5 % of the queries or more are equal to rows of a bank that is not the queries.

    References
    ----------
    Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance discrimination", 2018,
    arXiv:1805.01978.

    Examples
    --------
    >>> y = torch.arange(60) % 3
    >>> x = torch.eye(3)[y] + 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    >>> knn_probe(x, y, k=10).accuracy
    1.0
    """
    k, temperature = checks.integer("k", k, least=1), checks.positive("temperature", temperature)
    b = _directions(bank, "bank")
    labels, names = labels_of(y_bank, len(b), "y_bank")
    same = queries is None or queries is bank
    if (
        same
        and y is not None
        and y is not y_bank
        and not np.array_equal(known_labels(y, len(b), names), names[labels.numpy()])
    ):
        raise InvalidInput("the queries are the bank, but their labels are others; give y=None, or other queries.")
    q = b if same else _directions(queries, "queries")
    if q.shape[1] != b.shape[1]:
        raise InvalidInput(f"queries have {q.shape[1]} features and the bank {b.shape[1]}; expected as many.")
    same = same or (q.shape == b.shape and bool(torch.equal(q, b)))
    if k > len(b) - same:
        raise InvalidInput(f"k={k} neighbors of {len(b) - same} rows of the bank cannot be taken; lower k.")
    if y is None and not same:
        raise InvalidInput("labels y of the queries are needed.")
    target = names[labels.numpy()] if y is None else known_labels(y, len(q), names)
    if not same:
        _warn_of_known_rows(bank, queries)
    won = []
    for start in range(0, len(q), _CHUNK):
        similar = q[start : start + _CHUNK] @ b.T  # (chunk, n)
        if same:
            rows = torch.arange(len(similar), device=b.device)
            similar[rows, rows + start] = -torch.inf
        value, index = similar.topk(k, dim=1)
        votes = similar.new_zeros(len(similar), len(names))
        # The largest similarity is taken off before the exponential, which changes no winner.
        votes.scatter_add_(1, labels.to(b.device)[index], ((value - value[:, :1]) / temperature).exp())
        won.append(votes.argmax(1).cpu())
    predictions = names[torch.cat(won).numpy()]
    return KNNProbe(float((predictions == target).mean()), predictions, k, temperature, same)


def labels_of(y: Any, n: int, name: str) -> tuple[Tensor, NDArray[Any]]:
    """Labels of any kind as indices (n,), and what they stand for; -1, which means unlabeled, is refused."""
    values = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if values.shape != (n,) or not n:
        raise InvalidInput(
            f"{name} has shape {values.shape}; one label for each of {n} rows is needed, of one at least."
        )
    if values.dtype.kind not in "iubUSO" and not (values.dtype.kind == "f" and (values == np.round(values)).all()):
        raise InvalidInput(f"{name} holds {values.dtype} values that are no labels; whole numbers or text are needed.")
    if values.dtype.kind in "if" and (values < 0).any():
        raise InvalidInput(f"{name} holds {int((values < 0).sum())} labels below 0 (unlabeled?); leave these rows out.")
    try:
        names, index = np.unique(values, return_inverse=True)
    except TypeError:  # such as text with None or NaN between
        kinds = ", ".join(sorted({type(v).__name__ for v in values}))
        raise InvalidInput(
            f"{name} mixes labels of the types {kinds}, missing ones perhaps; leave those rows out, or use one type."
        ) from None
    return torch.from_numpy(index.astype(np.int64)), names


def _warn_of_known_rows(bank: Any, queries: Any) -> None:
    known = {hash(row.tobytes()) for row in as_double(bank).cpu().numpy()}
    shared = float(np.mean([hash(row.tobytes()) in known for row in as_double(queries).cpu().numpy()]))
    if shared >= _SHARED:
        warnings.warn(
            f"{shared:.0%} of the queries are equal to rows of the bank and vote for themselves; take them out of the "
            "bank, or give the bank alone, of which each row is left out of its own vote.",
            stacklevel=3,
        )


def known_labels(y: Any, n: int, names: NDArray[Any]) -> NDArray[Any]:
    """Labels (n,) that are to be predicted, none of which is outside of ``names``."""
    index, own = labels_of(y, n, "y")
    known = set(names.tolist())
    if unseen := [v for v in own.tolist() if v not in known]:
        raise InvalidInput(f"the probe has not seen class {unseen[0]!r}; train it on rows of every class.")
    return own[index.numpy()]


def _directions(acts: Any, name: str) -> Tensor:
    x = as_double(acts)
    if x.ndim != 2 or not len(x):
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}; representations (rows, features) are needed.")
    norms = x.norm(dim=1, keepdim=True)
    if not bool(norms.isfinite().all()) or bool((norms == 0).any()):
        bad = int((~norms.isfinite() | (norms == 0)).sum())
        raise InvalidInput(f"{name} has {bad} rows that are zero, NaN or infinite, which have no direction.")
    return x / norms
