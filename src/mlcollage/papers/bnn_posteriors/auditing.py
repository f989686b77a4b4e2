r"""The posterior audit: how far the predictions of a cheap method are from those of the posterior itself.

A reference is sampled by Hamiltonian Monte Carlo, in two or more independent runs. Every cheap method, and any given
predictions, are then compared with the reference's model average: agreement, total variation, and what the difference
means for accuracy, log-likelihood and calibration. All numbers carry their Monte-Carlo error; how far two runs of the
reference are apart says which differences mean nothing; and R-hat of the predictions says whether the reference itself
can be trusted. P. Izmailov, S. Vikram, M. D. Hoffman and A. G. Wilson, "What Are Bayesian Neural Network Posteriors
Really Like?", ICML 2021, sections 4 and 7.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage._checks import integer
from mlcollage._random import derive
from mlcollage.data import Labeled, arrays
from mlcollage.errors import InvalidInput
from mlcollage.infer import Streaming
from mlcollage.measure import calibration

from .ensemble import MAP, Ensemble
from .hmc import HMC
from .method import Method, check_method
from .mfvi import MFVI
from .network import BayesianNetwork
from .priors import Prior
from .sgmcmc import SGHMC
from .swag import SWAG

Floats = NDArray[np.float64]
METRICS = ("agreement", "total_variation", "accuracy", "nll", "ece", "brier")
_PARTS = ("", "_se", "_difference", "_difference_se")
REFERENCE, FLOOR = "hmc", "hmc (another run)"
_RHAT, _MOST_ABOVE = 1.1, 0.1  # predictions with a larger R-hat have not converged; the share that is let pass


def audit(
    model: nn.Module | BayesianNetwork,
    data: Labeled | Sequence[Any],
    methods: Sequence[Method] | Mapping[str, Method] = (MAP(), Ensemble(), SWAG(), MFVI(), SGHMC()),
    *,
    predictions: Mapping[str, Any] | None = None,
    prior: Prior | None = None,
    likelihood: Any = "categorical",
    reference: HMC | None = None,
    groups: int = 2,
    n_bins: int = 20,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    """Compare cheap approximations of a network's posterior with an HMC reference.

    Parameters
    ----------
    model
        A network, or a :class:`~mlcollage.papers.bnn_posteriors.BayesianNetwork` (whose likelihood and prior then
        count). It is not changed.
    data
        ``(X, y, X_test, y_test)``, or a workload of classes.
    methods
        What ``BayesianNetwork.fit`` takes; a mapping gives the rows names of your own.
    predictions
        More rows: name to class probabilities at the test inputs, (N, K), or by draw, (chains, draws, N, K).
    prior, likelihood
        As in BayesianNetwork, for a plain network. The likelihood must be one of classes.
    reference
        How the reference is sampled; ``chains`` counts for each group. By default ``HMC(jitter=0.3)``: a trajectory of
        fixed length may come back to where it began, and never mix in that direction.
    groups
        Independent runs of the reference, at least 2.
    n_bins
        Bins of the calibration error.
    seed
        Of everything.
    progress
        Called with the name of what is about to be fitted.

    Returns
    -------
    AuditReport

    Raises
    ------
    InvalidInput
        For data, predictions or settings that do not fit.

    Examples
    --------
    >>> import torch
    >>> from mlcollage.nn.init import build
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(120, 2, generator=g)
    >>> y = (x[:, 0] + 0.5 * torch.randn(120, generator=g) > 0).long()
    >>> net = build(lambda: nn.Linear(2, 2), seed=0)
    >>> report = audit(net, (x[:60], y[:60], x[60:], y[60:]), methods=[MAP()],
    ...                predictions={"coin": torch.full((60, 2), 0.5)},
    ...                reference=HMC(chains=4, draws=50, warmup=50, jitter=0.3))
    >>> report.converged, bool(report.table.loc["map", "agreement"] > 0.95)
    (True, True)
    >>> bool(report.table.loc["coin", "total_variation"] > 0.2)
    True
    """
    integer("groups", groups, least=2)  # their distance is the error of the reference
    network = model if isinstance(model, BayesianNetwork) else BayesianNetwork(model, likelihood, prior)
    if network.likelihood.kind != "classification":
        what = type(network.likelihood).__name__
        raise InvalidInput(
            f"the likelihood is {what}; one of classes is needed, since an audit compares probabilities."
        )
    rivals = list(methods.items()) if isinstance(methods, Mapping) else [(check_method(m).name, m) for m in methods]
    names = [REFERENCE, FLOOR, *(name for name, _ in rivals), *(predictions or {})]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(f"two rows would be called {name!r}; name methods by a mapping, and predictions anew.")
    X, y, X_test, y_test = _split(data)
    tell = progress or (lambda name: None)
    how = HMC(jitter=0.3) if reference is None else reference

    def fitted(method: Method, stream: int) -> Tensor:
        return network.fit(X, y, method, generator=derive(seed, stream)).predict_draws(X_test)

    runs = []
    for group in range(groups):
        tell(f"{REFERENCE}, run {group + 1} of {groups}")
        runs.append(fitted(how, group))
    rows: dict[str, Any] = {}
    for number, (name, method) in enumerate(rivals):
        tell(name)
        rows[name] = fitted(method, 1000 + number)  # streams that no group has
    return compare(runs, {**rows, **(predictions or {})}, y_test, n_bins=n_bins)


def compare(
    reference: Sequence[Tensor | NDArray], rivals: Mapping[str, Any], y: Any, *, n_bins: int = 20
) -> AuditReport:
    """The report of :func:`audit` for predictions that are there already.

    Parameters
    ----------
    reference
        Class probabilities of each independent run, (chains, draws, N, K); two runs at least, of equal shape.
    rivals
        Name to probabilities, (N, K) or (chains, draws, N, K).
    y
        Labels of the test inputs, (N,).
    n_bins
        Bins of the calibration error.

    Returns
    -------
    AuditReport
        With a warning if the reference has not converged.
    """
    runs = [_array(run, "the reference") for run in reference]
    if len(runs) < 2 or len({run.shape for run in runs}) > 1 or runs[0].ndim != 4:
        shapes = ", ".join(str(run.shape) for run in runs) or "none"
        raise InvalidInput(f"the reference has runs of shape {shapes}; two of (chains, draws, N, K) are needed.")
    whole = np.concatenate(runs)  # (chains of all runs, draws, N, K)
    labels = _array(y, "y")
    arms: dict[str, Floats] = {name: _array(p, name) for name, p in rivals.items()}
    for name, p in arms.items():
        if p.ndim not in (2, 4) or p.shape[-2:] != whole.shape[-2:]:
            raise InvalidInput(
                f"predictions of {name} have shape {p.shape}; (N, K) or (chains, draws, N, K) is needed, with the "
                f"reference's (N, K), {whole.shape[-2:]}."
            )
    rows = {REFERENCE: _scores(whole, labels, n_bins), FLOOR: _floor(runs)}
    for name, p in arms.items():
        rows[name] = {**_scores(p, labels, n_bins, whole), **_distances(whole, p)}
    table = pd.DataFrame.from_dict(rows, orient="index")
    columns = [f"{m}{part}" for m in METRICS for part in _PARTS if m not in METRICS[:2] or "difference" not in part]
    table = table.reindex(columns=columns).rename_axis("method")
    report = AuditReport(table, _rhat(whole), len(runs), *runs[0].shape[:3])
    if report.doubt:
        warnings.warn(report.doubt, stacklevel=2)
    return report


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes
    ----------
    table : DataFrame
        One row per method; ``"hmc"`` is the reference and ``"hmc (another run)"`` the distance of two of its runs.
        Columns ``agreement``, ``total_variation`` (to the reference), ``accuracy``, ``nll``, ``ece``, ``brier``, each
        with its Monte-Carlo error ``..._se``; for the last four also ``..._difference`` to the reference, with its
        error.
    rhat : ndarray
        (N, K), split R-hat of the reference's predictions over all its chains; NaN where nothing varies.
    runs, chains, draws, inputs : int
        Runs of the reference, chains of each, draws of each chain, test inputs N.
    """

    table: pd.DataFrame
    rhat: Floats
    runs: int
    chains: int
    draws: int
    inputs: int

    @property
    def median_rhat(self) -> float:
        """Median R-hat of the reference's predictions."""
        known = self.rhat[np.isfinite(self.rhat)]
        return float(np.median(known)) if known.size else math.nan

    @property
    def share_converged(self) -> float:
        """Share of the reference's predictions with an R-hat below 1.1."""
        known = self.rhat[np.isfinite(self.rhat)]
        return float((known < _RHAT).mean()) if known.size else math.nan

    @property
    def converged(self) -> bool:
        """Whether at least 90 % of the reference's predictions have an R-hat below 1.1."""
        return self.share_converged >= 1 - _MOST_ABOVE

    @property
    def doubt(self) -> str:
        """What is wrong with the reference, or an empty string."""
        if self.converged:
            return ""
        return (
            f"the HMC reference has not converged: R-hat is below {_RHAT} for {self.share_converged:.0%} of the "
            "predictions only, so the audit compares with something that is not the posterior; give it more draws, a "
            "longer warmup or smaller steps."
        )

    def to_frame(self) -> pd.DataFrame:
        """The table, a copy."""
        return self.table.copy()

    def __str__(self) -> str:
        lines = [
            f"Posterior audit at {self.inputs} inputs; reference: HMC, {self.runs} runs of {self.chains} chains of "
            f"{self.draws} draws.",
            f"R-hat of its predictions: median {self.median_rhat:.3f}, {self.share_converged:.0%} below {_RHAT}.",
        ]
        if self.doubt:
            lines.append(f"WARNING: {self.doubt}")
        cells = {m.replace("_", " "): [_cell(row, m) for _, row in self.table.iterrows()] for m in METRICS}
        floor = self.table.loc[FLOOR]
        lines += [
            "",
            pd.DataFrame(cells, index=list(self.table.index)).to_string(),
            "",
            f"Two runs of the reference agree in {floor['agreement']:.3f} and are {floor['total_variation']:.3f} "
            "apart; what is nearer is noise.",
        ]
        return "\n".join(lines)

    def plot(self, ax: Axes) -> Axes:
        """Draw agreement against total variation, with Monte-Carlo errors, and the noise of the reference as a band.

        Parameters
        ----------
        ax
            Where to.

        Returns
        -------
        Axes
            The same.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from mlcollage.collage import theme

        agree, apart = (float(self.table[column][FLOOR]) for column in ("agreement", "total_variation"))
        rivals = self.table.drop([REFERENCE, FLOOR])
        ax.axvspan(0, apart, color=theme.GRID, zorder=0)
        ax.axhspan(agree, 1, color=theme.GRID, zorder=0)
        x, y, xerr, yerr = (rivals[f"{m}{part}"] for part in ("", "_se") for m in ("total_variation", "agreement"))
        blue = theme.PALETTE["blue"]
        ax.errorbar(x, y, xerr=2 * xerr, yerr=2 * yerr, fmt="o", color=blue, ecolor=theme.tint(blue, 0.5))
        ax.set(xlabel="total variation to the HMC reference", ylabel="agreement with the HMC reference")
        ax.set_xlim(0, 1.25 * max(ax.get_xlim()[1], apart))  # room for names
        ax.set_ylim(top=1)
        theme.tidy(ax)
        for name in rivals.index:
            theme.label_line_end(ax, x[name], y[name], str(name), theme.INK, weight="normal")
        ax.annotate("gray: as near as two runs of HMC", (1, 1), (0, 4), "axes fraction", "offset points", ha="right")
        if not hasattr(ax.figure.canvas, "get_renderer"):
            FigureCanvasAgg(ax.get_figure(root=True))  # names can be kept apart only where their size is known
        theme.spread_labels(ax)
        return ax


def _cell(row: pd.Series, metric: str) -> str:
    """A number as text: value, error, and the difference to the reference in brackets."""
    if math.isnan(row.get(metric, math.nan)):
        return ""
    text, difference = f"{row[metric]:.3f} ±{row[f'{metric}_se']:.3f}", row.get(f"{metric}_difference", math.nan)
    return text if math.isnan(difference) else f"{text} ({difference:+.3f})"


def _array(values: Any, name: str) -> Any:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.dtype == object:
        raise InvalidInput(f"{name} is {type(values).__name__}; an array or tensor is needed.")
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _split(data: Labeled | Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    if isinstance(data, Labeled):
        return (*arrays(data.train), *arrays(data.test))
    if not isinstance(data, tuple | list) or len(data) != 4:
        raise InvalidInput(f"data is {type(data).__name__}; (X, y, X_test, y_test) or a Workload is needed.")
    return data[0], data[1], data[2], data[3]


def _mean(p: Floats) -> Floats:
    return p if p.ndim == 2 else p.mean(axis=(0, 1))


def _value(name: str, metric: Callable[..., float], *draws: Floats) -> dict[str, float]:
    """A metric of the averages of one or more sets of draws, with the Monte-Carlo error of all of them."""
    means = [_mean(p) for p in draws]  # (N, K) each
    variance = 0.0  # the sets are independent, so their variances add up
    for i, p in enumerate(draws):
        if p.ndim == 4 and p.shape[0] * p.shape[1] > 1:  # one network has no error of its own
            before, after = means[:i], means[i + 1 :]
            one = calibration.jackknife(lambda q, b=before, a=after: metric(*b, q, *a), p)  # type: ignore[misc]
            variance += one.se**2
    return {name: float(metric(*means)), f"{name}_se": math.sqrt(variance)}


def _scores(p: Floats, y: NDArray, n_bins: int, reference: Floats | None = None) -> dict[str, float]:
    """Scores by labels, and their differences to those of the reference."""
    metrics: dict[str, Callable[[Floats], float]] = {
        "accuracy": lambda p: calibration.accuracy(p, y),
        "nll": lambda p: calibration.nll(p, y),
        "ece": lambda p: calibration.ece(p, y, n_bins),
        "brier": lambda p: calibration.brier(p, y),
    }
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        found |= _value(name, metric, p)
        if reference is not None:
            found |= _value(f"{name}_difference", lambda a, b, m=metric: m(b) - m(a), reference, p)
    return found


def _distances(reference: Floats, p: Floats) -> dict[str, float]:
    agree = _value("agreement", calibration.agreement, reference, p)
    return agree | _value("total_variation", calibration.total_variation, reference, p)


def _floor(runs: Sequence[Floats]) -> dict[str, float]:
    """Agreement and distance of two runs of the reference, averaged over all pairs."""
    # of one run each, so a little farther apart than from the reference of all runs
    pairs = [_distances(a, b) for a, b in combinations(runs, 2)]
    return {key: float(np.mean([pair[key] for pair in pairs])) for key in pairs[0]}


def _rhat(p: Floats) -> Floats:
    stream = Streaming()
    for draw in range(p.shape[1]):  # (chains, N, K) each
        stream.update(p[:, draw])
    return stream.rhat().numpy() if p.shape[1] >= 4 else np.full(p.shape[2:], np.nan)
