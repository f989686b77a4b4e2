"""Rows of a table as learners take them; apart from what reads tables, so that a process that fits is up sooner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray


@dataclass(frozen=True)
class TableRows:
    """Rows of a table: numbers ``(n, p)`` float64 (NaN: missing) or CSR, and codes of categories ``(n, q)``."""

    numbers: Any
    codes: NDArray[np.int64]

    @classmethod
    def of(cls, X: Any) -> TableRows:
        """Rows without categories."""
        numbers = sp.csr_matrix(X) if sp.issparse(X) else np.asarray(X, np.float64)
        return cls(numbers, np.empty((numbers.shape[0], 0), np.int64))

    def __len__(self) -> int:
        return int(self.numbers.shape[0])

    def __getitem__(self, index: NDArray) -> TableRows:
        return TableRows(self.numbers[index], self.codes[index])

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        n = self.numbers
        return int((n.data.nbytes + n.indices.nbytes if sp.issparse(n) else n.nbytes) + self.codes.nbytes)
