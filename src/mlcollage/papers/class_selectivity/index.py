"""The class selectivity index of single units, from class means, and of a whole network over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure import ClassMeans, LayerUnits, as_samples
from mlcollage.measure.layer_tap import Layers, LayerTap
from mlcollage.train import evaluating

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SelectivityReport", "measure_selectivity", "selectivity_index"]

Negative = Literal["error", "shift", "abs", "relu"]
NEGATIVE = ("error", "shift", "abs", "relu")
_GROUPS = {None: 1, "split": 2, "jackknife": 10}  # random parts of the data that each way to debias needs


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


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer is; None for a model without any."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)


def negative_response(layer: str, least: float) -> InvalidInput:
    """The sentence for responses that the index cannot use."""
    return InvalidInput(
        f"{layer} has min {least:.3g}; the selectivity index needs non-negative responses: attach after the ReLU, or "
        "set negative='shift', 'abs' or 'relu'."
    )


def _present(means: Tensor, counts: Tensor | None) -> Tensor:
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
        One row per unit: ``layer, unit, si, best_class, mu_max, mu_rest, dead, lo, hi``. ``dead``: no class has a
        response; ``lo, hi``: ends of the 95 % interval, NaN unless asked for.
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
    eps: float = 1e-6,
    device: torch.device | str | None = None,
    debias: Literal["split", "jackknife"] | None = None,
    ci: Literal["bootstrap"] | None = None,
    n_boot: int = 500,
    batch_size: int = 512,
    generator: torch.Generator | int = 0,
) -> SelectivityReport:
    r"""Selectivity of all units of chosen layers over a data set: streaming, exact, in evaluation mode.

    The largest of C noisy means lies above the largest true mean, so the plain index is biased upwards, the more so
    the fewer samples a class has. ``debias="split"`` chooses :math:`c^*` on one random half and evaluates the index on
    the other, both ways; units without preference then scatter around 0 (a little below it with a handful of samples
    per class, since the index is concave in the preferred mean). ``"jackknife"`` takes off the bias
    estimated from tenths left out, :math:`G\,\mathrm{SI} - (G - 1) \overline{\mathrm{SI}_{(-g)}}`.

    Parameters
    ----------
    model
        Any module that is called with one input; its mode is put back afterwards. BatchNorm uses its running statistics
        here and those of the batch in training: right after large steps the two may differ.
    data
        Batches ``(x, targets)`` (a ``DataLoader``), a pair of tensors, or a map-style dataset. Targets as for
        :meth:`ClassMeans.update <mlcollage.measure.class_means.ClassMeans.update>`.
    layers
        ``"relu"`` (default), or what :class:`~mlcollage.measure.layer_tap.LayerTap` takes: paths, patterns, types.
        A module that is called several times counts as a layer each time.
    num_classes
        C; default the largest label and one (soft targets: their width).
    reduce
        ``"spatial_mean"`` (default, the paper's), or ``"positions"``: labels of samples are given to each position.
        Labels of pixels need neither: each layer's grid gets them by nearest neighbor.
    negative
        As in :func:`selectivity_index`; ``"abs"`` and ``"relu"`` transform single responses, before they are averaged.
    unit_axis, batch_dim
        Where a layer's output has its units, and the model's inputs their examples, as for
        :class:`~mlcollage.measure.units.LayerUnits`, which finds out the former.
    device
        Where batches go; default where the model is.
    debias, ci
        See above. ``ci="bootstrap"`` redraws class means from normal laws with their own standard errors and gives
        reverse percentile intervals; near an index of 0, where the preferred class is a toss-up, they are rough.
    n_boot, batch_size
        Bootstrap draws; samples at once where ``data`` is not batched.
    generator
        Draws the halves or tenths and the bootstrap, on the CPU; an int seeds a fresh one.

    Returns
    -------
    SelectivityReport

    Raises
    ------
    InvalidInput
        For layers with negative responses and ``negative="error"``, values that are not finite (the layer is named),
        targets that do not fit, fewer than two classes, layers that match nothing.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(200, 5, generator=g), torch.arange(200) % 2
    >>> model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = measure_selectivity(model, (x, y))
    >>> report.per_layer["units"].to_dict(), 0 <= report.mean <= 1
    ({'1': 8}, True)
    """
    check_policy(negative, eps)
    for name, value, known in (("debias", debias, ("split", "jackknife")), ("ci", ci, ("bootstrap",))):
        if value is not None:
            checks.choice(name, value, known)
    checks.choice("reduce", reduce, ("spatial_mean", "positions"))
    batches = list(data) if num_classes is None and isinstance(data, Iterator) else data  # it is read twice
    classes = _count_classes(batches, batch_size) if num_classes is None else num_classes
    units = LayerUnits(model, layers, unit_axis=unit_axis, batch_dim=batch_dim)
    states = _Collector(units, classes, reduce, negative, _GROUPS[debias], ci is not None, generator)
    device = device_of(model) if device is None else device
    with LayerTap(model, layers, consume=states.keep) as tap, evaluating(tap.model), torch.no_grad():
        for x, y in as_batches(batches, batch_size):
            x = x.to(device)
            units.look(x)
            states.start(y.to(device))
            model(x)
    return states.report(eps, debias, n_boot)


def as_batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (inputs, targets) from batches, a pair of tensors or a map-style dataset."""
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(d, Tensor) for d in data):
        if len(data[0]) != len(data[1]):
            raise InvalidInput(f"there are {len(data[0])} inputs and {len(data[1])} targets; expected as many.")
        yield from zip(data[0].split(batch_size), data[1].split(batch_size), strict=True)
        return
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    for batch in cast(Iterable[Any], data):
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
            raise InvalidInput(f"a batch must be a pair of tensors (inputs, targets), not a {type(batch).__name__}.")
        yield batch[0], batch[1]


def _count_classes(data: Any, batch_size: int) -> int:
    most = 0
    for _, y in as_batches(data, batch_size):
        most = max(most, y.shape[1] if y.is_floating_point() and y.ndim > 1 else int(y.max()) + 1 if y.numel() else 0)
    if most < 2:
        raise InvalidInput(f"selectivity needs at least 2 classes; the data hold {most}.")
    return most


class _Collector:
    """Class means of every layer, and of random groups of the samples where they are needed."""

    def __init__(
        self,
        units: LayerUnits,
        classes: int,
        reduce: str,
        negative: Negative,
        groups: int,
        squares: bool,
        generator: torch.Generator | int,
    ) -> None:
        self.units, self.classes, self.reduce, self.negative, self.groups = units, classes, reduce, negative, groups
        self.squares: dict[str, ClassMeans] | None = {} if squares else None
        self.means: dict[str, list[ClassMeans]] = {}
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator().manual_seed(generator)
        self.generator = generator

    def start(self, targets: Tensor) -> None:
        self.targets = targets
        # (N,) the group of each sample; all layers share it.
        self.group = torch.randint(self.groups, (len(targets),), generator=self.generator).to(targets.device)

    def keep(self, name: str, h: Tensor) -> None:
        rows = self.units(name, h)  # (N, U, *positions)
        if rows is None:
            return
        h = rows
        if len(h) != len(self.targets):
            raise InvalidInput(f"layer {name!r} gives {len(h)} rows for {len(self.targets)} targets; expected as many.")
        h, targets = fit_targets(transform(h, self.negative), self.targets, self.reduce == "positions")
        if self.negative == "error" and float(h.min()) < 0:
            raise negative_response(f"layer {name!r}", float(h.min()))
        states = self.means.setdefault(name, [ClassMeans(self.classes) for _ in range(self.groups)])
        try:
            for g, state in enumerate(states):
                mine = self.group == g
                if self.groups == 1:
                    state.update(h, targets, unit_axis=1)
                elif bool(mine.any()):
                    state.update(h[mine], targets[mine], unit_axis=1)
            if self.squares is not None:
                self.squares.setdefault(name, ClassMeans(self.classes)).update(h.double() ** 2, targets, unit_axis=1)
        except InvalidInput as error:
            raise InvalidInput(f"layer {name!r}: {error}") from error

    def report(self, eps: float, debias: str | None, n_boot: int) -> SelectivityReport:
        if not self.means:
            raise InvalidInput("the data hold no batch, so there is nothing to measure.")
        rows, means = [], {}
        for name, states in self.means.items():
            total = _merged(states)
            present = total.counts > 0  # (C,)
            if int(present.sum()) < 2:
                raise InvalidInput("selectivity needs at least 2 classes with samples in the data.")
            si, best, top, rest = index_parts(_shift(total.compute()[present], self.negative), eps)  # each (U,)
            value = si if debias is None else _debiased(states, si, eps, debias, self.negative)
            lo = hi = torch.full_like(si, torch.nan)
            if self.squares is not None:
                squares = self.squares[name]
                lo, hi = _interval(total, squares, si, value, eps, n_boot, self.generator, self.negative)
            columns = {"si": value, "best_class": present.nonzero().squeeze(1)[best], "mu_max": top, "mu_rest": rest}
            table = {k: v.cpu().numpy() for k, v in {**columns, "dead": top <= 0, "lo": lo, "hi": hi}.items()}
            rows.append(pd.DataFrame({"layer": name, "unit": np.arange(len(si)), **table}))
            means[name], counts = total.compute(), total.counts
        return SelectivityReport(pd.concat(rows, ignore_index=True), means, counts, debias)


def is_dense(targets: Tensor) -> bool:
    """Whether there is a target for each position: (N, H, W) integers, or (N, C, H, W) soft ones."""
    return targets.ndim > (2 if targets.is_floating_point() else 1)


def fit_targets(h: Tensor, targets: Tensor, positions: bool = False) -> tuple[Tensor, Tensor]:
    """Responses (N, U, *positions) and targets of one layer, ready for class means.

    Targets of pixels go to the layer's own grid by nearest neighbor. With ``positions`` the label of a sample is
    given to each of its positions; otherwise responses are averaged over positions.
    """
    grid = list(h.shape[2:])  # (H, W) of maps, (T,) of tokens, none of dense layers
    soft = targets.is_floating_point()
    if is_dense(targets):
        first = 2 if soft else 1  # axis of the targets' grid: (N, C, H, W) has its classes before it
        there = list(targets.shape[first:])
        if not grid or len(there) != len(grid):
            raise InvalidInput(
                f"targets of positions {tuple(targets.shape)} cannot be given to a layer of {len(h)} samples, "
                f"{h.shape[1]} units and positions {tuple(grid)}; choose layers with feature maps."
            )
        for axis, (new, old) in enumerate(zip(grid, there, strict=True), start=first):
            if new != old:
                targets = targets.index_select(axis, torch.arange(new, device=h.device) * old // new)
        return h, targets
    if positions and grid and not soft:
        return h, targets.reshape(-1, *(1,) * len(grid)).expand(-1, *grid)  # (N,) -> (N, *grid)
    return as_samples(h, unit_axis=1), targets


def _shift(means: Tensor, negative: Negative) -> Tensor:
    """Means (C, ...) of classes that are present, a unit with a negative one raised until its smallest is 0."""
    return means - means.amin(dim=0).clamp(max=0) if negative == "shift" else means


def _merged(states: list[ClassMeans]) -> ClassMeans:
    total = ClassMeans(states[0].num_classes)
    for state in states:
        total.merge(state)
    return total


def _debiased(states: list[ClassMeans], si: Tensor, eps: float, debias: str, negative: Negative) -> Tensor:
    """Indices (U,) by halves or by tenths that are left out."""
    if debias == "split":
        both = torch.stack([s.counts > 0 for s in states]).all(dim=0)  # (C,) classes that are in both halves
        if int(both.sum()) < 2:
            raise InvalidInput("debias='split' needs 2 classes with samples in both halves; take more data.")
        first, second = (_shift(s.compute()[both], negative) for s in states)  # each (C, U)
        values = [index_parts(b, eps, a.argmax(dim=0))[0] for a, b in ((first, second), (second, first))]
        return (values[0] + values[1]) / 2
    groups = [s for s in states if float(s.counts.sum()) > 0]
    left_out = []
    for g in range(len(groups)):
        others = _merged(groups[:g] + groups[g + 1 :])
        present = others.counts > 0
        if int(present.sum()) < 2:
            raise InvalidInput("debias='jackknife' needs 2 classes with samples outside of each tenth; take more data.")
        left_out.append(index_parts(_shift(others.compute()[present], negative), eps)[0])
    size = len(groups)
    # The bias falls as 1 / N; of the whole and of parts left out it can be extrapolated away.
    return size * si - (size - 1) * torch.stack(left_out).mean(dim=0)


def _interval(
    total: ClassMeans,
    squares: ClassMeans,
    si: Tensor,
    value: Tensor,
    eps: float,
    n_boot: int,
    generator: torch.Generator,
    negative: Negative,
) -> tuple[Tensor, Tensor]:
    """Reverse percentile interval (U,), (U,) from normal draws of the class means, a block of units at a time."""
    present = total.counts > 0
    means = total.compute()[present]  # (C, U)
    n = total.counts[present, None]  # (C, 1)
    spread = ((squares.compute()[present] - means**2).clamp(min=0) / (n - 1).clamp(min=1)).sqrt()  # standard errors
    ends = []
    block = max(1, 2_000_000 // (n_boot * len(means)))  # 16 MB of draws at once
    for mean, sd in zip(means.split(block, 1), spread.split(block, 1), strict=True):
        noise = torch.randn(n_boot, *mean.shape, generator=generator, dtype=torch.float64).to(mean.device)
        drawn = (mean + sd * noise).transpose(0, 1)  # (C, draws, units of the block)
        drawn = _shift(drawn, negative) if negative == "shift" else drawn.clamp(min=0)
        levels = torch.tensor([0.025, 0.975], dtype=torch.float64, device=mean.device)
        ends.append(torch.quantile(index_parts(drawn, eps)[0], levels, dim=0))
    low, high = torch.cat(ends, dim=1)
    # The debiased value moves the interval with it.
    return ((value + si) - high).clamp(0, 1), ((value + si) - low).clamp(0, 1)
