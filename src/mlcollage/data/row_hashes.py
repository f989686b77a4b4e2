"""Rows recognized by their content: one number for each, equal for equal rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_AT_ONCE = 2**18  # numbers mixed at once: what a cache holds


def row_hashes(x: Tensor | NDArray[Any]) -> Tensor:
    r"""Hash every row of an array: equal rows have equal hashes, others different ones but for chance.

    With the row's bytes as 64-bit words :math:`w_k`, random words :math:`a_k` (odd) and :math:`b_k`, and all sums and
    products modulo :math:`2^{64}`, the hash is :math:`\sum_k a_k \, m(a_k (w_k + b_k))` with
    :math:`m(v) = v \oplus (v \gg 31)`. Two of a million different rows share one with a probability of about 1e-7.

    Parameters
    ----------
    x
        ``(n, ...)``, on any device; types of less than 32 bits are compared as float32, and 0.0 and -0.0 are one.

    Returns
    -------
    Tensor
        ``(n,)`` int64, where x is.

    Examples
    --------
    >>> a, b, c = row_hashes(torch.tensor([[0.0, 1.0], [2.0, 3.0], [-0.0, 1.0]])).tolist()
    >>> a == c, a == b
    (True, False)
    """
    rows = torch.as_tensor(x).detach()
    rows = rows[:, None].flatten(1)  # (n, numbers), also of no row and of a vector
    if rows.element_size() < 4:
        rows = rows.float()
    if rows.shape[1] * rows.element_size() % 8:
        rows = F.pad(rows, (0, 1))
    words = rows.shape[1] * rows.element_size() // 8
    # The same words in every process: hashes of one data set can be kept and compared.
    a, b = torch.randint(-(2**62), 2**62, (2, words), generator=torch.Generator().manual_seed(0)).to(rows.device)
    a = 2 * a + 1
    out = [rows.new_empty(0, dtype=torch.int64)]
    for part in rows.split(max(1, _AT_ONCE // max(1, words))):
        v = ((part + 0).contiguous().view(torch.int64) + b) * a  # (rows, words)
        v.bitwise_xor_(v >> 31).mul_(a)
        out.append(v.sum(1))
    return torch.cat(out)
