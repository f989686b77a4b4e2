"""The class selectivity index of single units, from class means, and of a whole network over a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.stats
import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.data.batches import DataBatch, Parts, batches_of, count_classes
from mlcollage.errors import InvalidInput
from mlcollage.measure import ClassMeans, LayerUnits, as_samples
from mlcollage.measure.class_means import rows_and_weights
from mlcollage.measure.layer_tap import Layers, LayerTap
from mlcollage.train import evaluating

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SelectivityReport", "measure_selectivity", "selectivity_index"]

Negative = Literal["error", "shift", "abs", "relu"]
NEGATIVE = ("error", "shift", "abs", "relu")
_UNTOLD = (
    "such samples hardly tell which class a unit prefers, so that true preferences are debiased to too little: take "
    "more samples, or ci=True to see how little is known."
)
_FOLDS = 5  # the preferred class is chosen on four and judged on the fifth


def selectivity_index(
    means: Tensor, counts: Tensor | None = None, *, eps: float = 1e-6, negative: Negative = "error"
) -> Tensor:
    r"""Class selectivity index of each unit.

    .. math:: \mathrm{SI}_u = \frac{\mu_{\max} - \mu_{-\max}}{\mu_{\max} + \mu_{-\max} + \varepsilon}, \qquad
              \mu_{-\max} = \frac{1}{C - 1} \sum_{c \ne c^*} \mu_c

    with :math:`c^*` the class of the largest mean response :math:`\mu_{\max}`. 0: the same mean for all classes; 1:
    a response to one class only; a dead unit has 0. It is unchanged by scaling a unit, not by shifting it.

    Parameters
    ----------
    means
        (C, U) mean responses, as :class:`~mlcollage.measure.class_means.ClassMeans` computes. Differentiable.
    counts
        (C,) samples per class; classes with none, or with a NaN mean, are left out of both terms.
    eps
        :math:`\varepsilon`, 1e-6 as in the authors' later code.
    negative
        What to do with negative means, for which the index has no meaning: ``"error"`` (default), ``"shift"`` raises a
        unit with one until its smallest mean is 0, ``"abs"`` and ``"relu"`` transform the means.

    Returns
    -------
    Tensor
        (U,), from 0 to 1.

    Raises
    ------
    InvalidInput
        For negative means with ``negative="error"``, fewer than two classes, or shapes that do not fit.

    References
    ----------
    Leavitt and Morcos, "Selectivity considered harmful", ICLR 2021, arXiv:2003.01262, section on the class selectivity
    index; Morcos, Barrett, Rabinowitz, Botvinick, ICLR 2018, arXiv:1803.06959.

    Examples
    --------
    >>> selectivity_index(torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 2.0], [1.0, 1.0, 0.0]])).round(decimals=3)
    tensor([0.0000, 0.5000, 1.0000])
    """
    return index_parts(_non_negative(_present(means, counts), negative), eps)[0]


def index_parts(means: Tensor, eps: float, best: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index, preferred class, its mean and the mean over the others, each (...), of classes that are all present.

    Parameters
    ----------
    means
        (C, ...), usually (C, U).
    eps
        Of the index.
    best
        (...), the preferred class where it was chosen on other data; default the one of the largest mean.
    """
    if best is None:
        top, best = means.max(dim=0)
    else:
        top = means.gather(0, best[None])[0]
    # Summed without the preferred: taking it off the sum would leave its rounding behind.
    rest = means.scatter(0, best[None], 0.0).sum(dim=0) / (len(means) - 1)
    return (top - rest) / (top + rest + eps), best, top, rest


def transform(h: Tensor, negative: Negative) -> Tensor:
    """What the sign policy makes of single responses; shifting is done to the means."""
    if negative == "abs":
        return h.abs()
    return h.relu() if negative == "relu" else h


def check_policy(negative: str, eps: float) -> None:
    """Refuse policies that do not exist and an eps that is not positive."""
    checks.choice("negative", negative, NEGATIVE)
    checks.positive("eps", eps)


def read(
    model: nn.Module,
    data: Any,
    units: LayerUnits,
    *,
    parts: Parts,
    batch_size: int = 512,
    device: torch.device | str | None = None,
    targets: bool = True,
) -> Iterator[DataBatch]:
    """Batches on the model's device, of parts that it takes; of the first one the units' axes are found."""
    if device is None:  # None for a model without any tensor
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    for batch in batches_of(data, parts, batch_size=batch_size, dim=units.batch_dim, targets=targets):
        batch = batch.to(device).check(units.model)
        units.look(*batch.args, **batch.kwargs)
        yield batch


def negative_response(layer: str, least: float) -> InvalidInput:
    """The sentence for responses that the index cannot use."""
    return InvalidInput(
        f"{layer} has min {least:.3g}; the selectivity index needs non-negative responses: attach after the ReLU, or "
        "set negative='shift', 'abs' or 'relu'."
    )


def _present(means: Tensor, counts: Tensor | None) -> Tensor:
    if not isinstance(means, Tensor):
        raise InvalidInput(f"means must be a tensor (classes, units), not a {type(means).__name__}.")
    if means.ndim != 2 or not means.is_floating_point():
        raise InvalidInput(f"means must be floats of shape (classes, units), not {means.dtype} {tuple(means.shape)}.")
    seen = ~means.isnan().all(dim=1)  # (C,)
    if counts is not None:
        if counts.shape != means.shape[:1]:
            raise InvalidInput(f"counts {tuple(counts.shape)} must hold one number for each of {len(means)} classes.")
        seen &= counts.to(seen.device) > 0
    if int(seen.sum()) < 2:
        raise InvalidInput(f"selectivity needs at least 2 classes with samples; there are {int(seen.sum())}.")
    if not bool(means[seen].isfinite().all()):
        raise InvalidInput("means hold NaN or infinite values; look at the layer's activations.")
    return means[seen]


def _non_negative(means: Tensor, negative: Negative) -> Tensor:
    check_policy(negative, 1.0)
    means = _shift(transform(means, negative), negative)
    if bool((means < 0).any()):
        raise negative_response("a unit", float(means.min()))
    return means


@dataclass(frozen=True, eq=False)
class SelectivityReport:
    """Selectivity of every unit of a network; made by :func:`measure_selectivity`.

    Parameters
    ----------
    per_unit
        One row per unit: ``layer, unit, si, best_class, mu_max, mu_rest, dead, floor, lo, hi``. ``dead``: no class has
        a response; ``floor``: the plain index that a unit of this mean and spread is expected to have without any
        preference; ``lo, hi``: ends of the 95 % interval, NaN unless asked for.
    class_means
        (C, U) float64 by layer, in the order of execution.
    counts
        (C,) samples of each class.
    debias
        How ``si`` was corrected, or None.
    """

    per_unit: pd.DataFrame
    class_means: dict[str, Tensor]
    counts: Tensor
    debias: str | None

    @property
    def per_layer(self) -> pd.DataFrame:
        """By layer, in the order of execution: ``si`` (mean over units), ``median``, ``units``, ``dead`` (share)."""
        groups = self.per_unit.groupby("layer", sort=False)
        return pd.DataFrame(
            {
                "si": groups["si"].mean(),
                "median": groups["si"].median(),
                "units": groups["si"].size(),
                "dead": groups["dead"].mean(),
            }
        )

    @property
    def mean(self) -> float:
        r"""Mean over layers of the mean over a layer's units, :math:`\mu_{SI}` of the paper."""
        return float(self.per_layer["si"].mean())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Units as dots over layers, with each layer's mean; draws into ``ax`` or a new figure's."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 3.5), layout="constrained").add_subplot()
        layers = self.per_layer
        place = {name: i for i, name in enumerate(layers.index)}  # position on the axis
        x = self.per_unit["layer"].map(place).to_numpy(dtype=float)
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(x))
        ax.plot(x + spread, self.per_unit["si"], ".", alpha=0.4, markeredgewidth=0)
        ax.plot(range(len(layers)), layers["si"], "o-", color="black")
        ax.set_xticks(range(len(layers)), [str(name) for name in layers.index], rotation=30, ha="right")
        ax.set_ylabel("class selectivity index")
        return ax

    def __repr__(self) -> str:
        return f"SelectivityReport(mean {self.mean:.3f}, {len(self.per_unit)} units, {len(self.class_means)} layers)"


def measure_selectivity(
    model: nn.Module,
    data: Any,
    layers: Layers = "relu",
    *,
    num_classes: int | None = None,
    reduce: Literal["spatial_mean", "positions"] = "spatial_mean",
    negative: Negative = "error",
    unit_axis: int | Mapping[str, int] | None = None,
    batch_dim: int = 0,
    ignore_index: int = -100,
    parts: Parts = None,
    eps: float = 1e-6,
    device: torch.device | str | None = None,
    debias: Literal["cross_fit"] | None = None,
    ci: bool = False,
    batch_size: int = 512,
    generator: torch.Generator | int = 0,
) -> SelectivityReport:
    r"""Selectivity of all units of chosen layers over a data set: streaming, exact, in evaluation mode.

    The largest of C noisy means lies above the largest true mean, so the plain index is biased upwards, the more so
    the fewer samples a class has; where that is a quarter of what was measured, a warning says so. With
    ``debias="cross_fit"`` the samples of each class are dealt to five folds,

    .. math:: \widehat{\mathrm{SI}} = \frac15 \sum_k \frac{\mu^{(k)}_{c_k} - \mu^{(k)}_{-c_k}}
              {(1 + v_k)\,(\mu^{(-k)}_{c_k} + \mu^{(-k)}_{-c_k} + \varepsilon)}

    where the class :math:`c_k` and the denominator come from the other four, so that neither knows the noise of the
    numerator: a unit without preference has mean 0, whatever C and the number of samples (single values scatter
    around it, of few samples beyond 1 and far below 0). :math:`v_k`, the squared relative error of the denominator,
    also from the other four, takes off the bias of its inverse. Where the samples do not tell which class is preferred
    the estimate is too low rather than too high, and a warning says so.

    Parameters
    ----------
    model
        Any module; its mode is put back afterwards. BatchNorm uses its running statistics here and those of the batch
        in training: right after large steps the two may differ.
    data
        Batches of inputs and targets (a ``DataLoader``), a pair of tensors, a dict, or a map-style dataset, as for
        :func:`~mlcollage.data.batches.read_batch`. Targets as for
        :meth:`ClassMeans.update <mlcollage.measure.class_means.ClassMeans.update>`, soft ones of positions with
        classes on axis 1.
    layers
        ``"relu"`` (default), or what :class:`~mlcollage.measure.layer_tap.LayerTap` takes: paths, patterns, types.
        A module that is called several times counts as a layer each time.
    num_classes
        C; default the largest label and one (soft targets: their width).
    reduce
        ``"spatial_mean"`` (default, the paper's), or ``"positions"``: labels of samples are given to each position.
        Labels of pixels need neither: each layer's grid gets them by nearest neighbor.
    negative
        As in :func:`selectivity_index`, but looked at and applied in single responses, before they are averaged.
    unit_axis, batch_dim
        Where a layer's output has its units, and the model's inputs their examples, as for
        :class:`~mlcollage.measure.units.LayerUnits`, which finds out the former.
    ignore_index
        Label of samples and positions to leave out; 255 where that means void.
    parts
        What the parts of a batch are, where there are more than inputs and targets, as for
        :func:`~mlcollage.data.batches.read_batch`. Positions that a mask leaves out, such as padding, are not counted.
    device
        Where batches go; default where the model is.
    debias
        See above; None (default) is the paper's index.
    ci
        Also give 95 % intervals: by Fieller's method for the ratio, with quantiles of Student's law, at the lower end
        for as many classes as may be the preferred one. Classes with a handful of samples get wide ones.
    batch_size
        Samples at once where ``data`` is not batched.
    generator
        Deals the samples to folds, on the CPU; an int seeds a fresh one.

    Returns
    -------
    SelectivityReport

    Raises
    ------
    InvalidInput
        For layers with negative responses and ``negative="error"``, values that are not finite (the layer is named),
        targets that do not fit, fewer than two classes, layers that match nothing or whose units are not known, and
        corrections or intervals of units that ``negative="shift"`` has shifted.

    References
    ----------
    Leavitt and Morcos, ICLR 2021, arXiv:2003.01262. E. C. Fieller, "Some problems in interval estimation", J. Royal
    Statistical Society B 16, 1954.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> y = torch.arange(2000) % 2
    >>> x = torch.randn(2000, 5, generator=g) + 2.0 * y[:, None]
    >>> model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = measure_selectivity(model, (x, y))
    >>> report.per_layer["units"].to_dict(), 0 <= report.mean <= 1
    ({'1': 8}, True)
    """
    check_policy(negative, eps)
    if debias is not None:
        checks.choice("debias", debias, ("cross_fit",))
    checks.choice("reduce", reduce, ("spatial_mean", "positions"))
    batches = list(data) if num_classes is None and isinstance(data, Iterator) else data  # it is read twice
    units = LayerUnits(model, layers, unit_axis=unit_axis, batch_dim=batch_dim)
    if num_classes is None:
        num_classes = _count_classes(batches, batch_size, parts, ignore_index, units.batch_dim)
    states = _Collector(
        units, num_classes, reduce == "positions", negative, ignore_index, 1 if debias is None else _FOLDS, generator
    )
    with LayerTap(model, layers, consume=states.keep) as tap, evaluating(tap.model), torch.no_grad():
        for batch in read(model, batches, units, parts=parts, batch_size=batch_size, device=device):
            states.start(batch)
            model(*batch.args, **batch.kwargs)
    report = states.report(eps, debias, ci)
    floor = float(report.per_unit.groupby("layer", sort=False)["floor"].mean().mean())
    if floor > (0.25 * report.mean if debias is None else 0.25):
        typical = float(report.counts[report.counts > 0].median())
        plain = f"the mean measured is {report.mean:.2g}: take more samples, or debias='cross_fit'."
        warnings.warn(
            f"with {typical:g} samples per class the plain index of a unit without any preference is expected to be "
            f"{floor:.2g}, and {plain if debias is None else _UNTOLD}",
            UserWarning,
            stacklevel=2,
        )
    return report


def _count_classes(data: Any, batch_size: int, parts: Parts, ignore_index: int, dim: int) -> int:
    soft = 0
    hard = []
    for batch in batches_of(data, parts, batch_size=batch_size, dim=dim):
        if batch.y.is_floating_point() and batch.y.ndim > 1:
            soft = max(soft, batch.y.shape[1])
        elif batch.y.numel():
            hard.append(batch.y.unique())
    most = max(soft, count_classes(hard, ignore_index))
    if most < 2:
        raise InvalidInput(f"selectivity needs at least 2 classes; the data hold {most}.")
    return most


class _Collector:
    """Class means of every layer, by fold, and those of squares."""

    def __init__(
        self,
        units: LayerUnits,
        classes: int,
        positions: bool,
        negative: Negative,
        ignore_index: int,
        folds: int,
        generator: torch.Generator | int,
    ) -> None:
        self.units, self.classes, self.positions, self.negative = units, classes, positions, negative
        self.ignore_index, self.folds = ignore_index, folds
        self.means: dict[str, list[ClassMeans]] = {}
        self.squares: dict[str, list[ClassMeans]] = {}
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator().manual_seed(generator)
        self.next = torch.randint(folds, (classes,), generator=generator)  # the fold of each class's next sample

    def start(self, batch: DataBatch) -> None:
        self.targets, self.mask = batch.y, batch.mask
        labels = torch.zeros(len(batch.y), dtype=torch.long)  # of pixels or soft: all samples are dealt alike
        if batch.y.ndim == 1 and not batch.y.is_floating_point():
            labels = batch.y.cpu().long().clamp(0, self.classes - 1)
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=self.classes)
        rank = torch.empty_like(labels)  # (N,) how many of its class come before a sample
        rank[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
        # One after the other, so that folds have as many samples of each class.
        self.fold = ((self.next[labels] + rank) % self.folds).to(batch.y.device)
        self.next = (self.next + counts) % self.folds

    def keep(self, name: str, h: Tensor) -> None:
        rows = self.units(name, h, places=self.mask is not None or is_dense(self.targets))  # (N, U, *positions)
        if rows is None:
            return
        if len(rows) != len(self.targets):
            raise InvalidInput(
                f"layer {name!r} gives {len(rows)} rows for {len(self.targets)} targets; expected as many."
            )
        try:
            # Where some positions do not count, only the others are looked at.
            counted = rows if self.mask is None else as_samples(rows, "positions", unit_axis=1, mask=self.mask)
            targets = targets_for(rows, self.targets, self.positions)
            flat, weights = rows_and_weights(
                transform(rows, self.negative),
                targets,
                self.classes,
                unit_axis=1,
                mask=self.mask,
                ignore_index=self.ignore_index,
            )  # (M, U), and (M,) or (M, C), of M samples or positions
            fold = self.fold.repeat_interleave(len(flat) // len(rows))  # (M,)
            states = self.means.setdefault(name, [self._state() for _ in range(self.folds)])
            squares = self.squares.setdefault(name, [self._state() for _ in range(self.folds)])
            for k, (state, square) in enumerate(zip(states, squares, strict=True)):
                mine = fold == k
                if bool(mine.any()):
                    own, labels = (flat[mine], weights[mine]) if self.folds > 1 else (flat, weights)
                    state.update(own, labels)
                    square.update(own.double() ** 2, labels)
        except InvalidInput as error:
            raise InvalidInput(f"layer {name!r}: {error}") from error
        if self.negative == "error" and bool((counted < 0).any()):
            raise negative_response(f"layer {name!r}", float(counted.min()))

    def _state(self) -> ClassMeans:
        return ClassMeans(self.classes, ignore_index=self.ignore_index)

    def report(self, eps: float, debias: str | None, ci: bool) -> SelectivityReport:
        if not self.means:
            raise InvalidInput("the data hold no batch, so there is nothing to measure.")
        rows, means = [], {}
        for name, states in self.means.items():
            total, square = self._state(), self._state()
            for state, own in zip(states, self.squares[name], strict=True):
                total.merge(state)
                square.merge(own)
            present = total.counts > 0  # (C,)
            if int(present.sum()) < 2:
                raise InvalidInput("selectivity needs at least 2 classes with samples in the data.")
            mean, n = total.compute()[present], total.counts[present, None]  # (C, U) and (C, 1)
            # Variances (C, U) of single responses in each class; of a class with one sample there is none.
            variance = (square.compute()[present] - mean**2).clamp(min=0) * n / (n - 1).clamp(min=0)
            if (debias or ci) and self.negative == "shift" and bool((mean < 0).any()):
                raise InvalidInput(
                    f"layer {name!r}: a unit without preference whose means are negative has no index once it is "
                    "shifted (0 / 0), so that there is nothing to correct or to bound: use negative='relu' or 'abs'."
                )
            si, best, top, rest = index_parts(_shift(mean, self.negative), eps)  # each (U,)
            value = si if debias is None else cross_fitted(states, self.squares[name], present, eps)
            lo, hi = fieller(mean, variance, n) if ci else (torch.full_like(si, torch.nan),) * 2
            columns = {
                "si": value,
                "best_class": present.nonzero().squeeze(1)[best],
                "mu_max": top,
                "mu_rest": rest,
                "dead": top <= 0,
                "floor": noise_floor(mean, variance, n),
                "lo": lo,
                "hi": hi,
            }
            table = {k: v.cpu().numpy() for k, v in columns.items()}
            rows.append(pd.DataFrame({"layer": name, "unit": np.arange(len(si)), **table}))
            means[name], counts = total.compute(), total.counts
        return SelectivityReport(pd.concat(rows, ignore_index=True), means, counts, debias)


def is_dense(targets: Tensor) -> bool:
    """Whether there is a target for each position: (N, H, W) integers, or (N, C, H, W) soft ones."""
    return targets.ndim > (2 if targets.is_floating_point() else 1)


def targets_for(h: Tensor, targets: Tensor, positions: bool = False) -> Tensor:
    """Targets for the responses (N, U, *positions) of one layer.

    Targets of pixels go to the layer's own grid by nearest neighbor. With ``positions`` the label of a sample is
    given to each of its positions.
    """
    grid = list(h.shape[2:])  # (H, W) of maps, (T,) of tokens, none of dense layers
    soft = targets.is_floating_point()
    if not is_dense(targets):
        # (N,) -> (N, *grid)
        return targets.reshape(-1, *(1,) * len(grid)).expand(-1, *grid) if positions and grid and not soft else targets
    first = 2 if soft else 1  # axis of the targets' grid: (N, C, H, W) has its classes before it
    there = list(targets.shape[first:])
    uneven = len(there) == 1 == len(grid) and max(there + grid) % min(there + grid)  # a token more than labels, say
    if not grid or len(there) != len(grid) or uneven:
        raise InvalidInput(
            f"targets of positions {tuple(targets.shape)} cannot be given to positions {tuple(grid)}; choose layers "
            "with feature maps that fit."
        )
    for axis, (new, old) in enumerate(zip(grid, there, strict=True), start=first):
        if new != old:
            targets = targets.index_select(axis, torch.arange(new, device=h.device) * old // new)
    return targets


def _shift(means: Tensor, negative: Negative) -> Tensor:
    """Means (C, ...) of classes that are present, a unit with a negative one raised until its smallest is 0."""
    return means - means.amin(dim=0).clamp(max=0) if negative == "shift" else means


def cross_fitted(folds: Sequence[ClassMeans], squares: Sequence[ClassMeans], present: Tensor, eps: float) -> Tensor:
    """Indices (U,) whose class and denominator are those of the other folds; classes ``present`` (C,)."""
    sums = torch.stack([s.sums[present] for s in folds if s.sums is not None])  # (K, C, U)
    squared = torch.stack([s.sums[present] for s in squares if s.sums is not None])  # of squared responses
    counts = torch.stack([s.counts[present] for s in folds if s.sums is not None])  # (K, C)
    values = []
    for k in range(len(sums)):
        n = counts.sum(0) - counts[k]  # (C,), of the other folds
        both = (counts[k] > 0) & (n > 0)
        if int(both.sum()) < 2:
            continue
        others = ((sums.sum(0) - sums[k])[both] / n[both, None]).clamp(min=0)  # (C, U); a difference may be -1e-17
        held = sums[k][both] / counts[k][both, None]
        _, best, top, rest = index_parts(others, eps)
        _, _, own, own_rest = index_parts(held, eps, best)
        # Of the other folds too: the variance of all samples is large where the held-out response is.
        spread = ((squared.sum(0) - squared[k])[both] / n[both, None] - others**2).clamp(min=0)  # (C, U)
        error = (spread / (n[both, None] - 1).clamp(min=0)).nan_to_num(posinf=0.0).gather(0, best[None])[0]  # (U,)
        size = top + rest + eps
        value = (own - own_rest) / size / (1 + error / size**2)
        values.append(torch.where(top > 0, value, 0.0))  # nothing is known of a unit that was silent
    if not values:
        raise InvalidInput("debias='cross_fit' needs 2 classes with samples in several folds; take more data.")
    return torch.stack(values).mean(dim=0)  # cut off at 1 it would be too low on average


def noise_floor(means: Tensor, variance: Tensor, n: Tensor) -> Tensor:
    r"""The plain index that units (U,) are expected to have without preference, from means and variances (C, U).

    The largest of C normal means lies :math:`x = E_C\, \sigma / (\mu \sqrt n)` above the others, relative to them, or
    an index of :math:`x / (2 + x)`; :math:`E_C` by Blom's formula.
    """
    classes = len(means)
    largest = float(scipy.stats.norm.ppf((classes - 0.375) / (classes + 0.25)))
    error = (variance / n).nan_to_num(posinf=0.0).mean(0).sqrt()  # (U,), of the mean of a class
    x = largest * error / means.abs().mean(0).clamp(min=1e-300)
    return torch.where(error > 0, x / (2 + x), 0.0)


def fieller(means: Tensor, variance: Tensor, n: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Intervals (U,), (U,) of the index, from means and variances (C, U) of classes of n (C, 1) samples.

    The index is the largest of all classes' :math:`s_c = (\mu_c - \mu_{-c}) / (\mu_c + \mu_{-c})`, and :math:`s_c = s`
    means :math:`(1 - s) \mu_c - (1 + s) \mu_{-c} = 0`, a linear contrast, whose test is inverted. The upper end is the
    largest of all classes' upper ends. The lower end is the largest of the lower ends at a level that is shared among
    the classes that could be the preferred one.
    """
    classes, tail = len(means), (1 - level) / 2
    error = variance / n  # (C, U)
    rest = (means.sum(0) - means) / (classes - 1)
    rest_error = (error.sum(0) - error) / (classes - 1) ** 2
    freedom = (n - 1).clamp(min=1).flatten().cpu().numpy()  # (C,)

    def ends(share: Tensor) -> tuple[Tensor, Tensor]:
        """Of all classes (C, U), at the level ``tail / share`` for each unit (U,)."""
        several, which = share.unique(return_inverse=True)
        quantiles = scipy.stats.t.ppf(1 - tail / several.cpu().numpy(), freedom[:, None])  # (C, several)
        z2 = torch.as_tensor(quantiles, device=means.device)[:, which] ** 2  # (C, U)
        # [d - s t]^2 = z^2 [(1 - s)^2 V + (1 + s)^2 W], a quadratic equation in s
        d, t, both = means - rest, means + rest, error + rest_error
        a, b, c = t**2 - z2 * both, -2 * d * t + 2 * z2 * (error - rest_error), d**2 - z2 * both
        root = (b**2 - 4 * a * c).clamp(min=0).sqrt()
        bounded = a > 0  # else the responses do not differ from 0, and any index may be
        a = torch.where(bounded, 2 * a, 1.0)
        return torch.where(bounded, (-b - root) / a, -1.0), torch.where(bounded, (-b + root) / a, 1.0)

    ones = means.new_ones(means.shape[1])
    low, high = ends(10 * classes * ones)  # so strict that the preferred class is hardly ever missed
    able = (high >= low.amax(0)).sum(0)  # (U,)
    low, high = ends(able.to(means.dtype))[0].amax(0), ends(ones)[1].amax(0)
    dead = (means.amax(0) <= 0) & (error.amax(0) <= 0)
    return torch.where(dead, 0.0, low.clamp(0, 1)), torch.where(dead, 0.0, high.clamp(0, 1))
