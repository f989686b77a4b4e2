"""What a network loses with its units: ablation in the order of their selectivity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.data.batches import DataBatch, Parts
from mlcollage.errors import InvalidInput
from mlcollage.measure import LayerUnits
from mlcollage.measure.layer_tap import Layers, layers_of
from mlcollage.nn import logits_of
from mlcollage.train import evaluating

from .index import SelectivityReport, measure_selectivity, read

Order = Literal["si", "si_desc", "random"]
Mode = Literal["zero", "mean", "class_mean"]


def ablate_units(
    model: nn.Module,
    data: Any,
    layers: Layers = "relu",
    *,
    order: Order = "si_desc",
    mode: Mode = "zero",
    fractions: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9),
    scope: Literal["layer", "network"] = "layer",
    unit_axis: int | Mapping[str, int] | None = None,
    batch_dim: int = 0,
    parts: Parts = None,
    ignore_index: int = -100,
    report: SelectivityReport | None = None,
    rng: np.random.Generator | int = 0,
) -> pd.DataFrame:
    """Accuracy with a growing share of units ablated.

    Units themselves are taken out, at every position, not their inputs. Least-selective-first against
    most-selective-first against random shows whether selective units matter more.

    Parameters
    ----------
    model
        Maps a batch to logits; evaluation mode is used, and nothing of it is changed.
    data
        Labeled samples, as for :func:`~mlcollage.papers.class_selectivity.index.measure_selectivity`.
    layers
        Whose units; as for :class:`~mlcollage.measure.layer_tap.LayerTap`.
    order
        ``"si"`` ablates the least selective first, ``"si_desc"`` (default) the most selective, ``"random"`` any.
    mode
        ``"zero"`` (default) sets a unit to 0, ``"mean"`` to its mean over the data, which removes its information
        without moving the next layer far from what it knows; ``"class_mean"`` to the mean of the sample's own class,
        which leaves what the unit says of classes and removes the rest (it uses the labels).
    fractions
        Shares of the units to ablate, each in [0, 1].
    scope
        ``"layer"``: each layer by itself; ``"network"``: units of all layers in one order.
    unit_axis, batch_dim, parts, ignore_index
        As for :func:`~mlcollage.papers.class_selectivity.index.measure_selectivity`.
    report
        Where indices and means come from; by default measured on ``data``.
    rng
        Draws the random order; an int seeds a fresh one.

    Returns
    -------
    DataFrame
        Columns ``layer`` (``"all"`` for the network), ``fraction``, ``units`` (ablated), ``accuracy``.

    Raises
    ------
    InvalidInput
        For settings that do not exist, fractions out of range, or a report without the layers.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(100, 4, generator=g), torch.arange(100) % 2
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ablate_units(model, (x, y), fractions=(0, 0.5))["units"].tolist()
    [0, 4]
    """
    checks.choice("order", order, ("si", "si_desc", "random"))
    checks.choice("mode", mode, ("zero", "mean", "class_mean"))
    checks.choice("scope", scope, ("layer", "network"))
    shares = [checks.probability("a share in fractions", f, inside=False) for f in fractions]
    if report is None:
        how: dict[str, Any] = {"unit_axis": unit_axis, "batch_dim": batch_dim, "parts": parts}
        report = measure_selectivity(model, data, layers, ignore_index=ignore_index, **how)
    axes = LayerUnits(model, layers, unit_axis=unit_axis, batch_dim=batch_dim)
    modules = layers_of(model, layers)
    units = report.per_unit[report.per_unit["layer"].map(lambda name: name.split("#")[0] in modules)]
    if units.empty:
        raise InvalidInput(f"the report has no units of these layers; it has {', '.join(report.class_means)}.")
    rng = np.random.default_rng(rng)
    groups = units.groupby("layer", sort=False) if scope == "layer" else [("all", units)]
    rows = []
    for name, table in groups:
        table = table.iloc[rng.permutation(len(table))]  # so that ties are in random order too
        if order != "random":
            table = table.sort_values("si", ascending=order == "si", kind="stable")
        for fraction in shares:
            chosen = table.iloc[: round(fraction * len(table))]
            out = {str(k): torch.tensor(v["unit"].to_numpy()) for k, v in chosen.groupby("layer")}
            with _ablated(model, modules, axes, out, mode, report) as labels:
                score = _accuracy(model, read(model, data, axes, parts=parts), labels, ignore_index)
            rows.append({"layer": name, "fraction": fraction, "units": len(chosen), "accuracy": score})
    return pd.DataFrame(rows)


class _Labels:
    """The labels of the batch that is being run, for hooks."""

    y: Tensor


@contextmanager
def _ablated(
    model: nn.Module,
    modules: dict[str, nn.Module],
    axes: LayerUnits,
    out: dict[str, Tensor],
    mode: Mode,
    report: SelectivityReport,
) -> Iterator[_Labels]:
    """Within it the units ``out`` of each call of each module are replaced."""
    labels, calls = _Labels(), dict.fromkeys(modules, 0)

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def replace(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            call = calls[name]
            calls[name] = call + 1
            layer = f"{name}#{call}" if call else name  # as LayerTap names the calls of a shared module
            if layer not in out:
                return h
            index = out[layer].to(h.device)
            h = h.clone()
            rows = axes(layer, h)  # (N, U, ...), a view
            assert rows is not None  # a report has units of such layers only
            rows[:, index] = _replacement(layer, index, rows, mode, report, labels)
            return h

        return replace

    def start(module: nn.Module, args: Any) -> None:
        calls.update(dict.fromkeys(calls, 0))

    handles = [m.register_forward_hook(hook(name)) for name, m in modules.items()]
    handles.append(model.register_forward_pre_hook(start))  # counts the calls of a pass from 0 again
    try:
        yield labels
    finally:
        for handle in handles:
            handle.remove()


def _replacement(
    layer: str, index: Tensor, h: Tensor, mode: Mode, report: SelectivityReport, labels: _Labels
) -> Tensor | float:
    """What units ``index`` (K,) of responses (N, U, ...) become: 0, or (N, K, ...)."""
    if mode == "zero":
        return 0.0
    means = report.class_means[layer].to(h)[:, index]  # (C, K), NaN where a class was not seen
    counts = report.counts.to(h)  # (C,)
    if mode == "mean":
        value = (means.nan_to_num() * counts[:, None]).sum(dim=0)[None] / counts.sum()  # (1, K)
    else:
        value = means[labels.y]  # (N, K)
    return value.reshape(*value.shape, *(1,) * (h.ndim - 2)).expand(len(h), -1, *h.shape[2:])


def _accuracy(model: nn.Module, batches: Iterator[DataBatch], labels: _Labels, ignore_index: int) -> float:
    right = seen = 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            # Hooks see no labels, so they look them up here.
            y, counted = batch.y, batch.y != ignore_index
            labels.y = torch.where(counted, y, 0)
            logits = logits_of(model(*batch.args, **batch.kwargs))
            if logits.ndim != 2 or y.shape != logits.shape[:1]:
                raise InvalidInput(f"accuracy needs logits (N, C) and labels (N,), not {tuple(logits.shape)}.")
            right += int((logits.argmax(dim=1) == y)[counted].sum())
            seen += int(counted.sum())
    if not seen:
        raise InvalidInput("no sample of the data has a label that counts, so there is no accuracy.")
    return right / seen
