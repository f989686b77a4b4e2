"""Does a regularizer only rotate a representation? Ratio of CCA distances, with a bootstrap over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage.data.batches import Parts
from mlcollage.errors import InvalidInput
from mlcollage.measure import LayerUnits, as_samples
from mlcollage.measure.cca import factor, pairwise
from mlcollage.measure.layer_tap import Layers, LayerTap
from mlcollage.train import evaluating

from .index import read

Floats = npt.NDArray[np.float64]
Method = Literal["cca", "svcca", "pwcca"]


def representations(
    model: nn.Module,
    data: Any,
    layers: Layers = "relu",
    *,
    space: Literal["mean", "positions"] = "mean",
    unit_axis: int | Mapping[str, int] | None = None,
    batch_dim: int = 0,
    parts: Parts = None,
) -> dict[str, Tensor]:
    """Responses (N, U) of each layer to all samples, in evaluation mode; layers in the order of execution.

    Parameters
    ----------
    model, data, layers, unit_axis, batch_dim, parts
        As for :func:`~mlcollage.papers.class_selectivity.index.measure_selectivity`; targets are not needed.
    space
        As for :func:`~mlcollage.measure.representation.as_samples`; positions that a mask leaves out have no part.

    Examples
    --------
    >>> x, y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)
    >>> {k: tuple(v.shape) for k, v in representations(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (x, y)).items()}
    {'1': (6, 3)}
    """
    found: dict[str, list[Tensor]] = {}
    masks: list[Tensor | None] = []
    units = LayerUnits(model, layers, unit_axis=unit_axis, batch_dim=batch_dim)

    def keep(name: str, h: Tensor) -> None:
        rows = units(name, h, places=masks[-1] is not None)  # (N, U, *positions)
        if rows is not None:
            found.setdefault(name, []).append(as_samples(rows, space, unit_axis=1, mask=masks[-1]))

    with LayerTap(model, layers, consume=keep) as tap, evaluating(tap.model), torch.no_grad():
        for batch in read(model, data, units, parts=parts, targets=False):
            masks[:] = [batch.mask]
            model(*batch.args, **batch.kwargs)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def cca_distance_ratio(
    models_reg: Sequence[nn.Module],
    models_base: Sequence[nn.Module],
    data: Any,
    layers: Layers = "relu",
    *,
    method: Method = "cca",
    space: Literal["mean", "positions"] = "mean",
    unit_axis: int | Mapping[str, int] | None = None,
    batch_dim: int = 0,
    parts: Parts = None,
    paired: bool = True,
    n_boot: int = 2000,
    rng: np.random.Generator | int = 0,
) -> pd.DataFrame:
    r"""How far regularized networks lie from plain ones, against how far plain ones lie from each other.

    .. math:: \frac{d(\alpha, 0)}{d(0, 0)}, \qquad d = 1 - \bar\rho \text{ averaged over pairs of seeds}

    CCA does not see affine maps. Had a regularizer only rotated selectivity away from the units, the ratio would be 1.

    Parameters
    ----------
    models_reg, models_base
        Networks trained with and without the regularizer, one per seed, at least two plain ones.
    data, layers, unit_axis, batch_dim, parts
        As for :func:`~mlcollage.papers.class_selectivity.index.measure_selectivity`; both kinds must have the layers.
    method
        ``"cca"``, ``"svcca"`` (99 % of the variance) or ``"pwcca"`` (weighted by the first network of a pair).
    space
        How feature maps become rows.
    paired
        The i-th networks of both lists share seed and initialization: such pairs are left out, and seeds are drawn
        together.
    n_boot
        Draws of the block bootstrap. Pairs that share a seed are not independent, so seeds are drawn, with all pairs
        they are in.
    rng
        Draws them; an int seeds a fresh one, so that all layers get the same draws.

    Returns
    -------
    DataFrame
        By layer: ``ratio``, ``lo``, ``hi`` (95 %; NaN with fewer than three plain seeds), ``d_reg``, ``d_base``.

    Raises
    ------
    InvalidInput
        For fewer than two plain networks, lists of different lengths with ``paired``, or too few samples for CCA.

    References
    ----------
    Leavitt and Morcos, ICLR 2021, arXiv:2003.01262, section on off-axis selectivity.

    Examples
    --------
    >>> nets = [nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(6)]
    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> table = cca_distance_ratio(nets[:3], nets[3:], (x, torch.zeros(100)), n_boot=100)
    >>> list(table.columns), list(table.index)
    (['ratio', 'lo', 'hi', 'd_reg', 'd_base'], ['1'])
    """
    how: dict[str, Any] = {"space": space, "unit_axis": unit_axis, "batch_dim": batch_dim, "parts": parts}
    found = [[representations(m, data, layers, **how) for m in models] for models in (models_reg, models_base)]
    return distance_ratio(*found, method=method, paired=paired, n_boot=n_boot, rng=rng)


def distance_ratio(
    reg: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]],
    *,
    method: Method = "cca",
    paired: bool = True,
    n_boot: int = 2000,
    rng: np.random.Generator | int = 0,
) -> pd.DataFrame:
    """:func:`cca_distance_ratio` of representations (N, U) by layer that were computed before, one mapping per seed.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> base = [{"a": rng.normal(size=(50, 3))} for _ in range(3)]
    >>> rotated = [{"a": b["a"] @ rng.normal(size=(3, 3))} for b in base]
    >>> round(float(distance_ratio(rotated, base).loc["a", "ratio"]), 6)
    1.0
    """
    if len(base) < 2 or not reg:
        raise InvalidInput(f"the ratio needs at least 2 plain networks and 1 regularized; got {len(base)}, {len(reg)}.")
    if paired and len(reg) != len(base):
        raise InvalidInput(
            f"paired=True needs as many regularized as plain networks, seed by seed; got {len(reg)} and {len(base)}."
        )
    names = list(base[0])
    for who in (*reg, *base):
        if list(who) != names:
            raise InvalidInput(f"all networks must have the same layers; got {list(who)} and {names}.")
    rows = {}
    for name in names:
        # One factorization per network and layer, used in all pairs.
        plain = {str(i): factor(b[name], name=name) for i, b in enumerate(base)}
        others = {str(i): factor(r[name], name=name) for i, r in enumerate(reg)}
        d_reg, d_base = (1 - pairwise(who, plain, method=method).to_numpy() for who in (others, plain))
        rows[name] = _ratio_with_interval(d_reg, d_base, paired, n_boot, np.random.default_rng(rng))
    return pd.DataFrame.from_dict(rows, orient="index")


def _ratio_with_interval(
    d_reg: Floats, d_base: Floats, paired: bool, n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """From distances (R, S) of regularized to plain networks and (S, S) of plain ones to each other."""
    # A network is not compared with itself, nor (paired) with the one that had its seed and start.
    allowed_base = ~np.eye(len(d_base), dtype=bool)
    allowed_reg = allowed_base if paired else np.ones_like(d_reg, dtype=bool)

    def mean(d: Floats, allowed: npt.NDArray[np.bool_], left: Floats, right: Floats) -> Floats:
        """Mean over allowed pairs, weighed by how often each seed (B, R), (B, S) was drawn; for each draw (B,)."""
        weight = np.einsum("bi,ij,bj->b", left, allowed, right)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.einsum("bi,ij,bj->b", left, d * allowed, right) / weight

    def draw(seeds: int) -> Floats:
        return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=n_boot).astype(float)

    once = (np.ones((1, len(d_reg))), np.ones((1, len(d_base))))
    d_r, d_b = mean(d_reg, allowed_reg, *once)[0], mean(d_base, allowed_base, once[1], once[1])[0]
    lo = hi = np.nan
    if len(d_base) >= 3:  # of two seeds only the draw of both has a pair
        b = draw(len(d_base))
        r = b if paired else draw(len(d_reg))
        draws = mean(d_reg, allowed_reg, r, b) / mean(d_base, allowed_base, b, b)
        lo, hi = np.quantile(draws[np.isfinite(draws)], [0.025, 0.975])
    return {"ratio": d_r / d_b, "lo": float(lo), "hi": float(hi), "d_reg": d_r, "d_base": d_b}
