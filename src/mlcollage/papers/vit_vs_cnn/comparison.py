r"""Two networks layer by layer on the same examples: what :func:`compare` returns, and how it is read and kept.

The uniformity of a network is the mean CKA of its first quarter of layers with its last,

.. math::
    U = \frac{1}{|F||L|} \sum_{i \in F} \sum_{j \in L} \mathrm{CKA}_{ij},

layers in the order in which they ran (Raghu et al. 2021, Figure 1, in one number).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats

from mlcollage import _checks as checks
from mlcollage._npz import load_arrays, save_arrays
from mlcollage.errors import InvalidInput
from mlcollage.measure import CKAResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Which = Literal["a", "b"]


@dataclass(frozen=True)
class Interval:
    """A number with its confidence limits, which are NaN for a single batch."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ComparisonHealth:
    """What was read, and what was left out.

    Parameters
    ----------
    examples, batches
        How many were used.
    dropped
        Examples of batches with fewer than four.
    repeated
        Examples that were equal to another one of their batch, and were left out.
    classes_per_batch
        Mean number of classes in a batch, and how many there are in all; NaN and 0 without labels.
    batch_axis
        By network and layer, the axis that holds the examples, where it is not the first.
    windows
        By network and layer, rows of each example where a layer sees several, such as a Swin transformer's windows.
    skipped
        By network and layer, why it is in no map.
    constant
        Layers that do not vary, whose cells are NaN.
    negative
        Number of cells below 0, of which unbiased estimates have some.
    largest_share
        The largest share of a layer's variance that one unit or token holds, and the layer.
    precision
        Types of the features.
    """

    examples: int
    batches: int
    dropped: int = 0
    repeated: int = 0
    classes_per_batch: tuple[float, int] = (float("nan"), 0)
    batch_axis: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    negative: int = 0
    largest_share: tuple[float, str] = (0.0, "")
    precision: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.examples} examples in {self.batches} batches"]
        for count, what in (
            (self.dropped, "dropped with batches of fewer than four"),
            (self.repeated, "repeated within a batch and left out"),
            (len(self.skipped), "layers skipped"),
            (len(self.constant), "layers constant (NaN)"),
            (len(self.windows), "layers with several rows for each example, folded"),
            (self.negative, "cells below 0"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return "; ".join(parts) + "."


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """The three maps of two networks, with uncertainty; made by :func:`compare`.

    Parameters
    ----------
    cka
        All layers of both networks together, from which the three maps come.
    health
        What was read, and what was left out.
    label_a, label_b
        What the networks are called in tables and pictures.
    """

    cka: CKAResult
    health: ComparisonHealth
    label_a: str = "a"
    label_b: str = "b"

    @property
    def cross(self) -> CKAResult:
        """Layers of the first network (rows) with those of the second (columns)."""
        return self.cka

    @property
    def a(self) -> CKAResult:
        """Layers of the first network with one another."""
        return self._own("a")

    @property
    def b(self) -> CKAResult:
        """Layers of the second network with one another."""
        return self._own("b")

    def uniformity(self, which: Which) -> Interval:
        """Mean CKA of the first quarter of a network's layers with its last, with jackknife limits over batches.

        The limits speak of other examples. For other trainings, train several networks and compare their values.

        Parameters
        ----------
        which
            ``"a"`` or ``"b"``.
        """
        own = self._own(checks.choice("which", which, ("a", "b")))
        return self._interval(_ends(own.matrix), np.array([_ends(m) for m in own.without_each_batch]))

    def uniformity_difference(self) -> Interval:
        """Uniformity of the first network minus that of the second, on the same batches."""
        deleted = [np.array([_ends(m) for m in own.without_each_batch]) for own in (self.a, self.b)]
        return self._interval(_ends(self.a.matrix) - _ends(self.b.matrix), deleted[0] - deleted[1])

    def path(self) -> pd.DataFrame:
        """The layer of the first network that fits each layer of the second, in the order of both.

        Of all paths on which depth never goes down, the one with the largest sum of CKA. One line per layer of the
        second network: ``layer_b``, ``layer_a``, ``depth_b``, ``depth_a`` (from 0 to 1), ``cka``.
        """
        m = np.nan_to_num(self.cross.matrix, nan=-1.0)
        rows, columns = m.shape
        total, came = np.empty_like(m), np.zeros(m.shape, dtype=np.int64)
        total[:, 0] = m[:, 0]
        for j in range(1, columns):
            # the best of all layers up to here
            best = np.maximum.accumulate(total[:, j - 1])
            came[:, j] = np.maximum.accumulate(np.where(total[:, j - 1] >= best, np.arange(rows), 0))
            total[:, j] = m[:, j] + best
        chosen = [int(total[:, -1].argmax())]
        for j in range(columns - 1, 0, -1):
            chosen.append(int(came[chosen[-1], j]))
        chosen.reverse()
        return pd.DataFrame(
            {
                "layer_b": self.cross.names_b,
                "layer_a": [self.cross.names_a[i] for i in chosen],
                "depth_b": np.arange(columns) / max(columns - 1, 1),
                "depth_a": np.array(chosen) / max(rows - 1, 1),
                "cka": [float(self.cross.matrix[i, j]) for j, i in enumerate(chosen)],
            }
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line per cell of each map: ``map`` (``a``, ``b`` or ``cross``) and the columns of ``CKAResult``."""
        parts = {"a": self.a, "b": self.b, "cross": self.cross}
        return pd.concat([r.to_dataframe().assign(map=name) for name, r in parts.items()], ignore_index=True)

    def plot(self, figure: Figure | None = None) -> Figure:
        """Draw the three maps with one scale of colors, and the path in the last."""
        from matplotlib.figure import Figure as NewFigure  # not pyplot, which would keep the figure

        figure = NewFigure(figsize=(13, 4.2), layout="constrained") if figure is None else figure
        axes = figure.subplots(1, 3)
        parts: tuple[tuple[Which, str], ...] = (("a", self.label_a), ("b", self.label_b))
        for ax, (which, label) in zip(axes, parts, strict=False):
            self._own(which).plot(ax)
            ax.set_title(f"{label}: U = {self.uniformity(which)}", fontsize="medium")
        self.cross.plot(axes[2])
        path = self.path()
        axes[2].plot(
            np.arange(len(path)), path["depth_a"] * (len(self.cross.names_a) - 1), color="white", linewidth=1.5
        )
        axes[2].set_title(f"{self.label_a} (rows) with {self.label_b}", fontsize="medium")
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one npz file without pickled parts, in one step."""
        params, arrays = self.cka.to_arrays()
        mine = {"label_a": self.label_a, "label_b": self.label_b, "health": json.dumps(dataclasses.asdict(self.health))}
        save_arrays(path, "LayerComparison", {**params, **mine}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerComparison:
        """Read what :meth:`save` wrote.

        Raises
        ------
        MissingFile, InvalidInput
            If there is no such file, or it holds something else or is damaged.
        """
        params, arrays = load_arrays(path, "LayerComparison", {})
        labels = params.pop("label_a"), params.pop("label_b")
        health: dict[str, Any] = json.loads(params.pop("health"))
        health = {k: tuple(v) if isinstance(v, list) else v for k, v in health.items()}
        return cls(CKAResult.from_arrays(params, arrays), ComparisonHealth(**health), *labels)

    def _own(self, which: str) -> CKAResult:
        first = len(self.cka.names_a)
        part = slice(0, first) if which == "a" else slice(first, None)
        names = self.cka.names_a if which == "a" else self.cka.names_b
        return dataclasses.replace(
            self.cka, names_a=names, names_b=names, sums=self.cka.sums[:, part, part], crossed=False, null=None
        )

    def _interval(self, value: float, deleted: Floats) -> Interval:
        n = len(deleted)
        if n < 2:
            return Interval(value, float("nan"), float("nan"))
        error = float(np.sqrt((n - 1) / n * ((deleted - deleted.mean()) ** 2).sum()))
        half = float(scipy.stats.t.ppf(0.5 + self.cka.level / 2, n - 1)) * error
        return Interval(value, value - half, value + half)


def _ends(matrix: Floats) -> float:
    """Mean of the cells of the first quarter of layers with the last."""
    n = len(matrix)
    if n < 4:
        raise InvalidInput(f"uniformity compares quarters of a network, and {n} layers have none: give four at least.")
    cells = matrix[: n // 4, -(n // 4) :]
    return float(np.nanmean(cells)) if np.isfinite(cells).any() else float("nan")
