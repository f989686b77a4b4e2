"""The study's experiments: networks that differ in the penalty only, and what is measured of each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data import Labeled, fashion_mnist
from mlcollage.data.fresh_networks import fresh
from mlcollage.data.problem import Problem, problem
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task
from mlcollage.measure import dimensionality
from mlcollage.measure.cca import CCAFactor, cca, factor
from mlcollage.nn import build
from mlcollage.train import accuracy, evaluate, evaluating

from ..controller import alpha_schedule
from ..distance import representations
from ..index import SelectivityReport, measure_selectivity
from ..off_axis import off_axis_upper_bound
from .models import Trained, Training, layers_for, leaky, network, train

REFERENCE = 10_000  # added to a seed for the network that CCA distances are taken to
NOISE, FGSM = 0.5, 0.1  # sizes of the perturbations, in standard deviations of the inputs
OFF_AXIS_SAMPLES, OFF_AXIS_UNITS = 1000, 128
USER_LR = 0.05  # for networks that we do not know; gradients are clipped besides

T = TypeVar("T", bound=Training)


@dataclass(frozen=True)
class Sweep(Training):
    """A network for each alpha, some with shuffled labels as a control, and a plain one of another seed for CCA."""

    alphas: tuple[float, ...] = (-5.0, -2.0, 0.0, 1.0, 3.0)  # coefficients of the penalty
    shuffled: tuple[float, ...] = (-2.0, 3.0)  # those that are also run with the penalty's labels shuffled
    strong: float | None = None  # an alpha that leaves hardly any selectivity; also trains the arms early and late
    search: int = 50  # steps of the search for the most selective rotation


@dataclass(frozen=True)
class Controls(Training):
    """Longer training with and without the penalty, and networks whose units cannot die."""

    long: tuple[float, ...] = (-2.0, 0.0)  # alphas of the longer training
    long_epochs: float = 8.0  # its passes over the training samples
    leaky: tuple[float, ...] = (0.0, 3.0)  # alphas of the networks with leaky ReLUs


def on_workload(s: T, workload: Labeled, scale: Scale) -> T:
    """Sizes that the user's data allow; refuses data and models that the study has no use for."""
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    if workload.num_classes < 2 or size < 40 or tests < 20:
        raise InvalidInput(
            f"the study needs 2 classes, 40 training and 20 test samples at least; {workload.name} has "
            f"{workload.num_classes}, {size} and {tests}."
        )
    own: dict[str, Any] = {}
    if workload.model is not None:
        layers_for(build(fresh(workload.model), 0))
        own = {"widths": (), "lr": USER_LR}
    val = min(s.val, size // 5)
    trained = min(s.train, size - val)
    batch = max(2, min(s.batch, trained // 8))
    # Small sets get as many updates as the study's own data give.
    updates = s.epochs * s.train / s.batch
    lengthen = max(1.0, updates * batch / trained / s.epochs)
    for name in ("epochs", "long_epochs"):
        if hasattr(s, name):
            own[name] = round(getattr(s, name) * lengthen, 2)
    return dataclasses.replace(s, pool=False, train=trained, val=val, test=min(s.test, tests), batch=batch, **own)


@cache
def _fashion(pool: bool) -> Labeled:
    x, y, xt, yt = fashion_mnist.load()
    x, xt = x.reshape(-1, 1, 28, 28), xt.reshape(-1, 1, 28, 28)
    if pool:
        x, xt = (F.avg_pool2d(torch.from_numpy(a), 2).numpy() for a in (x, xt))  # (n, 1, 14, 14)
    return Labeled.from_arrays(x, y, xt, yt, 10)


def to_learn(task: Task[Any]) -> Problem:
    """A seed's data; each has training samples of its own, so that intervals are over data as well."""
    s = task.settings
    return problem(
        task.workload,
        lambda: _fashion(s.pool),
        rng=np.random.default_rng([task.seed, 17]),
        train=s.train,
        validation=s.val,
        test=s.test,
        draw_test=False,
        standardize="sample",
        model=partial(network, widths=s.widths),
        device=task.device,
    )


def sweep(task: Task[Sweep]) -> Measurements:
    """All alphas with true labels, some with shuffled ones, and a plain network of another seed for CCA."""
    s, seed, p, m = task.settings, task.seed, to_learn(task), Measurements()
    nets = {alpha: train(p, s, alpha, seed=seed) for alpha in s.alphas}  # same start, same order of the data
    for alpha, net in nets.items():
        report = _basics(m, p, net, "penalty", alpha)
        _layers(m, report, alpha)
        _robustness(m, p, net, alpha)
        _bound(m, p, net, alpha, s.search)
        if seed == 0 and alpha in (min(s.alphas), 0.0, max(s.alphas)):
            m.array(f"tuning_{alpha:g}", _tuning(report))
    for alpha in s.shuffled:
        _basics(m, p, train(p, s, alpha, seed=seed, shuffle=True), "shuffled", alpha)
    _distances(m, p, nets, train(p, s, 0.0, seed=seed + REFERENCE))
    if s.strong is not None:
        total = round(s.epochs * len(p.train.x) / s.batch)
        third, when = max(1, total // 3), min(a for a in s.alphas if a < 0)
        scheduled = (
            ("strong", s.strong, alpha_schedule(s.strong, warmup=third)),
            ("early", when, alpha_schedule(when, stop=third)),
            ("late", when, alpha_schedule(when, start=total // 3)),
        )
        for arm, alpha, schedule in scheduled:
            _basics(m, p, train(p, s, schedule, seed=seed), arm, alpha)
    return m


def controls(task: Task[Controls]) -> Measurements:
    """Longer training with and without the penalty, and networks whose units cannot die."""
    s, seed, p, m = task.settings, task.seed, to_learn(task), Measurements()
    for alpha in s.long:
        net = train(p, s, alpha, seed=seed, lengthen=s.long_epochs / s.epochs)
        _basics(m, p, net, "long", alpha)
    if leaky(build(p.make_model, seed)) is not None:  # a network without ReLUs has no such control
        for alpha in s.leaky:
            _basics(m, p, train(p, s, alpha, seed=seed, leak=True), "leaky", alpha)
    return m


def _basics(m: Measurements, p: Problem, net: Trained, arm: str, alpha: float) -> SelectivityReport:
    """Accuracies, mean selectivity on the test set and dead units."""
    for part, (x, y) in (("test", p.test), ("val", p.validation)):
        m.add(f"{part}_accuracy", evaluate(net.model, x, y, accuracy), arm=arm, alpha=alpha)
    report = measure_selectivity(
        net.model, p.test, net.layers, num_classes=p.num_classes, negative=net.negative, batch_size=1024
    )
    dead = float(report.per_layer["dead"].mean())
    m.add_all({"si": report.mean, "train_loss": net.loss, "dead": dead}, arm=arm, alpha=alpha)
    return report


def _layers(m: Measurements, report: SelectivityReport, alpha: float) -> None:
    for i, (name, row) in enumerate(report.per_layer.iterrows()):
        m.add("layer_si", float(row["si"]), arm="penalty", alpha=alpha, layer=i + 1, layer_name=str(name))


def _tuning(report: SelectivityReport) -> Any:
    """Class means (C,) of the unit of median selectivity in the last layer, as shares of the largest."""
    last = list(report.class_means)[-1]
    units = report.per_unit[report.per_unit["layer"] == last].sort_values("si")
    unit = int(units.iloc[len(units) // 2]["unit"])
    means = report.class_means[last][:, unit].cpu().numpy()
    return means / max(float(np.nanmax(means)), 1e-12)


def _robustness(m: Measurements, p: Problem, net: Trained, alpha: float) -> None:
    """Accuracy under Gaussian noise and under one signed gradient step, and how many dimensions each disturbs."""
    x, y = (t[:1000] for t in p.test)
    spread = float(p.train.x.std())  # of the inputs as the network sees them
    # The same noise for every network and seed.
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x) * NOISE * spread
    with evaluating(net.model), torch.enable_grad():
        probe = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net.model(probe), y), probe)
    # The fast gradient sign method: one step up the loss, the same size in every pixel.
    attacked = x + FGSM * spread * grad.sign()
    for name, disturbed in (("noise", x + noise), ("fgsm", attacked)):
        m.add(f"{name}_accuracy", evaluate(net.model, disturbed, y, accuracy), arm="penalty", alpha=alpha)
    first, *_ = net.layers
    plain, noisy, hostile = (_first(net.model, (part, y), first) for part in (x, x + noise, attacked))  # (1000, U)
    for name, acts in (("acts", plain), ("noise", noisy - plain), ("fgsm", hostile - plain)):
        share = dimensionality(acts) / acts.shape[1]  # components for 95 % of the variance, of U
        m.add("dimensions", share, arm="penalty", alpha=alpha, of=name)


def _first(model: nn.Module, data: tuple[Tensor, Tensor], layer: str) -> Tensor:
    return next(iter(representations(model, data, [layer]).values()))


def _bound(m: Measurements, p: Problem, net: Trained, alpha: float, search: int) -> None:
    """Most selective rotation of the layer nearest to the middle that is narrow enough to be searched."""
    x, y = (t[:OFF_AXIS_SAMPLES] for t in p.test)
    acts = representations(net.model, (x, y), net.layers)
    middle = (len(acts) - 1) / 2 + 0.25  # of two in the middle, the deeper
    narrow = [(abs(i - middle), a) for i, a in enumerate(acts.values()) if a.shape[1] <= OFF_AXIS_UNITS]
    if not narrow:
        return
    chosen = min(narrow, key=lambda pair: pair[0])[1]  # (samples, U)
    chosen = chosen.relu() if net.negative == "relu" else chosen
    result = off_axis_upper_bound(chosen, y, steps=search)
    found = {"si_axis": result.si_axis, "si_bound": result.si_bound, "variance_ratio": float(result.ratios[0])}
    m.add_all(found, arm="penalty", alpha=alpha)


def _distances(m: Measurements, p: Problem, nets: Mapping[float, Trained], reference: Trained) -> None:
    """CCA distance to a plain network of another seed, over that of the plain network of this seed; means over layers.

    Each seed has a reference of its own, so that the ratios of different seeds are independent. A layer counts where
    all networks have four samples per unit and more; a small test set is filled up with other samples, since this is
    about what networks compute and not about how they generalize.
    """
    there = _factors(reference, p)
    d = {alpha: _mean_distance(_factors(net, p), there) for alpha, net in nets.items()}
    for alpha, distance in d.items():
        if not np.isfinite(distance):  # too few samples for layers so wide: not measured
            continue
        m.add("cca_distance", distance, arm="penalty", alpha=alpha)
        if alpha != 0:
            m.add("cca_ratio", distance / d[0.0], arm="penalty", alpha=alpha)


def _factors(net: Trained, p: Problem) -> dict[str, CCAFactor]:
    found = {}
    x = torch.cat([p.test.x, p.validation.x, p.train.x])[: max(len(p.test.x), 1000)]
    for name, acts in representations(net.model, (x, torch.zeros(len(x))), net.layers).items():
        with contextlib.suppress(InvalidInput):  # a layer that has died altogether correlates with nothing
            if 4 * acts.shape[1] <= len(acts):
                found[name] = factor(acts, name=name)
    return found


def _mean_distance(mine: Mapping[str, CCAFactor], there: Mapping[str, CCAFactor]) -> float:
    common = [name for name in mine if name in there]
    return float(np.mean([cca(mine[name], there[name]).distance for name in common])) if common else float("nan")
