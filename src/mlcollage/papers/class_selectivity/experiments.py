"""The study's arms: networks that differ in the penalty only, and what is measured of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data import fashion_mnist
from mlcollage.data.workload import Workload, arrays
from mlcollage.errors import InvalidInput
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.run import Run
from mlcollage.measure.cca import CCAFactor, cca, factor
from mlcollage.measure.dimensionality import dimensionality
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.train.loop import accuracy, epochs, evaluate, evaluating, steps
from mlcollage.train.schedules import cosine

from .controller import alpha_schedule
from .distance import representations
from .index import Negative, SelectivityReport, measure_selectivity
from .off_axis import off_axis_upper_bound
from .regularizer import Alpha, SelectivityRegularizer

__all__ = ["check_model", "layers_for", "leaky", "rest", "sweep"]

CLIP, WARMUP = 5.0, 0.3
REFERENCE = 10_000  # added to a seed for the network that CCA distances are taken to
NOISE, FGSM = 0.5, 0.1  # sizes of the perturbations, in standard deviations of the inputs
OFF_AXIS_SAMPLES, OFF_AXIS_UNITS = 1000, 128
_RECTIFIED = (nn.ReLU, nn.ReLU6)
_OTHERS = (
    *("GELU", "SiLU", "Swish", "Mish", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU", "Softplus", "Tanh", "Hardswish"),
    *(
        "QuickGELU",
        "GELUActivation",
        "NewGELUActivation",
        "FastGELUActivation",
        "QuickGELUActivation",
        "SiLUActivation",
    ),
)


@dataclass(frozen=True)
class Problem:
    """Data on their device, and the network that learns them."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    make: Callable[[], nn.Module]

    @property
    def scale(self) -> float:
        """Standard deviation of the inputs as the network sees them."""
        return float(self.train[0].std())


def layers_for(model: nn.Module) -> tuple[tuple[str, ...], Negative]:
    """Paths of the layers whose selectivity is measured, and the sign policy they need.

    ReLUs if there are any, as in the paper; else every other activation module, with negative responses cut off.

    Raises
    ------
    InvalidInput
        If the model has no activation module.
    """
    relus = tuple(name for name, m in model.named_modules() if isinstance(m, _RECTIFIED))
    if relus:
        return relus, "error"
    others = tuple(name for name, m in model.named_modules() if type(m).__name__ in _OTHERS)
    if not others:
        raise InvalidInput(
            f"the workload's {type(model).__name__} has no activation module (nn.ReLU, nn.GELU, ...) whose units could "
            "be measured; functions such as F.relu cannot be read, so use modules."
        )
    return others, "relu"


def check_model(workload: Workload) -> None:
    """Refuse a user's model without activation modules before anything is run."""
    if workload.model is not None:
        layers_for(build(workload.model, 0))


def leaky(model: nn.Module) -> nn.Module | None:
    """The model with leaky ReLUs (slope 0.01) in place of its ReLUs; None if it has none."""
    found = [name for name, m in model.named_modules() if isinstance(m, _RECTIFIED) and name]
    if not found:
        return None
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.LeakyReLU(0.01))
    return model


def problem(run: Run, workload: Workload | None) -> Problem:
    """Training, validation and test data; the last part of the training data is the validation set."""
    size, val, test = (run.integer(k) for k in ("train", "val", "test"))
    if workload is None:
        x, y, xt, yt = fashion_mnist.load()
        # A seed has training samples of its own, so that intervals are over data as well as over initializations.
        order = np.random.default_rng([run.seed, 17]).permutation(len(x))[: size + val]
        x, y, classes = x[order].reshape(-1, 1, 28, 28), y[order], 10
        xt = xt.reshape(-1, 1, 28, 28)
    else:
        (x, y), (xt, yt), classes = arrays(workload.train), arrays(workload.test), workload.num_classes
        order = np.random.default_rng([run.seed, 17]).permutation(len(x))[: size + val]
        x, y = x[order], y[order]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    tests = torch.from_numpy(xt[:test]), torch.from_numpy(yt[:test])
    if run.settings.get("pool"):
        inputs, tests = F.avg_pool2d(inputs, 2), (F.avg_pool2d(tests[0], 2), tests[1])
    own = workload is not None and workload.model is not None
    if not own:
        mean, std = inputs[:size].mean(), inputs[:size].std().clamp(min=1e-6)
        inputs, tests = (inputs - mean) / std, ((tests[0] - mean) / std, tests[1])
    parts = [(inputs[:size], labels[:size]), (inputs[size:], labels[size:]), tests]
    train, held, tested = ((a.to(device), b.to(device)) for a, b in parts)
    make = _maker(run, workload, tuple(inputs.shape[1:]), classes)
    return Problem(train, held, tested, classes, make)


def _maker(run: Run, workload: Workload | None, shape: tuple[int, ...], classes: int) -> Callable[[], nn.Module]:
    if workload is not None and workload.model is not None:
        return workload.model
    if len(shape) == 3 and min(shape[1:]) >= 8:
        widths = [int(w) for w in run.text("widths").split(",")]
        strides = [1 + i % 2 for i in range(len(widths))]
        return lambda: ConvNet((shape[0], shape[1], shape[2]), classes, widths, strides=strides)
    return lambda: MLP(shape, classes, widths=(64, 64, 64), norm="batch")


@dataclass(frozen=True)
class Trained:
    """A trained network, how to read it, and its training loss at the end."""

    model: nn.Module
    layers: tuple[str, ...]
    negative: Negative
    loss: float


def train(
    p: Problem, run: Run, alpha: Alpha, *, seed: int, lengthen: float = 1.0, shuffle: bool = False, leak: bool = False
) -> Trained | None:
    """One network: SGD with momentum 0.9, a warm-up of 30 % and a cosine to 0, and the penalty.

    Initialization and order of the data depend on the seed only, so that all penalties are compared on pairs.
    """
    model = build(p.make, seed)
    layers, negative = layers_for(model)
    if leak:
        swapped = leaky(model)
        if swapped is None:
            return None
        model, negative = swapped, "relu"
    model = model.to(p.train[0].device)
    x, y = p.train
    batch = min(run.integer("batch"), len(x))
    total = round(run.real("epochs") * lengthen * len(x) / batch)
    options: dict[str, Any] = {"num_classes": p.classes, "negative": negative}
    if batch < 4 * p.classes:
        options["memory"] = "ema"
    if shuffle:
        options["shuffle_targets"] = seed
    optimizer = torch.optim.SGD(model.parameters(), lr=run.real("lr"), momentum=0.9)
    last: list[Tensor] = []
    with SelectivityRegularizer(model, alpha, layers, **options) as penalty:
        plain = alpha == 0 and not callable(alpha)
        if plain:
            penalty.remove()

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            value = F.cross_entropy(logits, labels)
            last[:] = [*last[-9:], value.detach()]
            return value if plain else value + penalty(labels)

        schedule = cosine(total, warmup=max(1, round(WARMUP * total)) if total > 1 else 0)
        batches = epochs(x, y, batch, generator=seed)
        for _ in steps(
            model, batches, optimizer, loss=loss, schedule=schedule, max_steps=total, clip_norm=CLIP, seed=seed
        ):
            pass
    return Trained(model, layers, negative, float(torch.stack(last).mean()))


def sweep(run: Run, workload: Workload | None) -> Measurements:
    """All alphas with true labels, some with shuffled ones, and a plain network of another seed for CCA."""
    p, m = problem(run, workload), Measurements()
    alphas = [float(a) for a in run.text("alphas").split(",")]
    nets = {alpha: _trained(p, run, alpha, seed=run.seed) for alpha in alphas}
    for alpha, net in nets.items():
        report = _basics(m, p, net, "penalty", alpha)
        _layers(m, report, "penalty", alpha)
        _robustness(m, p, net, alpha)
        _bound(m, p, net, alpha, run)
        if run.seed == 0 and alpha in (min(alphas), 0.0, max(alphas)):
            m.array(f"tuning_{alpha:g}", _tuning(report))
    for alpha in (float(a) for a in run.text("shuffled").split(",")):
        _basics(m, p, _trained(p, run, alpha, seed=run.seed, shuffle=True), "shuffled", alpha)
    _distances(m, p, nets, _trained(p, run, 0.0, seed=run.seed + REFERENCE))
    if run.settings.get("strong"):  # nearly no selectivity, with a warm-up of the penalty over a third of the training
        total = round(run.real("epochs") * len(p.train[0]) / run.integer("batch"))
        strong = run.real("strong")
        ramp = alpha_schedule(strong, warmup=max(1, total // 3))
        _basics(m, p, _trained(p, run, ramp, seed=run.seed), "strong", strong)
        when = min(a for a in alphas if a < 0)
        early = alpha_schedule(when, stop=max(1, total // 3))
        late = alpha_schedule(when, start=total // 3)
        for arm, schedule in (("early", early), ("late", late)):
            _basics(m, p, _trained(p, run, schedule, seed=run.seed), arm, when)
    return m


def rest(run: Run, workload: Workload | None) -> Measurements:
    """Longer training with and without the penalty, and networks whose units cannot die."""
    p, m = problem(run, workload), Measurements()
    ratio = run.real("long_epochs") / run.real("epochs")
    for alpha in (float(a) for a in run.text("long").split(",")):
        _basics(m, p, _trained(p, run, alpha, seed=run.seed, lengthen=ratio), "long", alpha)
    for alpha in (float(a) for a in run.text("leaky").split(",")):
        net = train(p, run, alpha, seed=run.seed, leak=True)
        if net is not None:
            _basics(m, p, net, "leaky", alpha)
    return m


def _trained(p: Problem, run: Run, alpha: Alpha, **options: Any) -> Trained:
    return cast(Trained, train(p, run, alpha, **options))


def _basics(m: Measurements, p: Problem, net: Trained, arm: str, alpha: float) -> SelectivityReport:
    """Accuracies, mean selectivity on the test set and dead units."""
    for part, (x, y) in (("test", p.test), ("val", p.val)):
        m.add(f"{part}_accuracy", evaluate(net.model, x, y, accuracy), arm=arm, alpha=alpha)
    report = measure_selectivity(
        net.model, p.test, net.layers, num_classes=p.classes, negative=net.negative, batch_size=1024
    )
    m.add_all({"si": report.mean, "train_loss": net.loss}, arm=arm, alpha=alpha)
    m.add("dead", float(report.per_layer["dead"].mean()), arm=arm, alpha=alpha)
    return report


def _layers(m: Measurements, report: SelectivityReport, arm: str, alpha: float) -> None:
    for i, (name, row) in enumerate(report.per_layer.iterrows()):
        m.add("layer_si", float(row["si"]), arm=arm, alpha=alpha, layer=i + 1, layer_name=str(name))


def _tuning(report: SelectivityReport) -> Any:
    """Class means of the unit of median selectivity in the last layer, as shares of the largest."""
    last = list(report.class_means)[-1]
    units = report.per_unit[report.per_unit["layer"] == last].sort_values("si")
    unit = int(units.iloc[len(units) // 2]["unit"])
    means = report.class_means[last][:, unit].cpu().numpy()
    return means / max(float(np.nanmax(means)), 1e-12)


def _robustness(m: Measurements, p: Problem, net: Trained, alpha: float) -> None:
    """Accuracy under Gaussian noise and under one signed gradient step, and how many dimensions each disturbs."""
    x, y = (t[:1000] for t in p.test)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x) * NOISE * p.scale
    with evaluating(net.model), torch.enable_grad():
        probe = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net.model(probe), y), probe)
    attacked = x + FGSM * p.scale * grad.sign()
    for name, disturbed in (("noise", x + noise), ("fgsm", attacked)):
        m.add(f"{name}_accuracy", evaluate(net.model, disturbed, y, accuracy), arm="penalty", alpha=alpha)
    first, *_ = net.layers
    plain, noisy, hostile = (_first(net.model, (part, y), first) for part in (x, x + noise, attacked))
    for name, acts in (("acts", plain), ("noise", noisy - plain), ("fgsm", hostile - plain)):
        share = dimensionality(acts) / acts.shape[1]
        m.add("dimensions", share, arm="penalty", alpha=alpha, of=name)


def _first(model: nn.Module, data: tuple[Tensor, Tensor], layer: str) -> Tensor:
    return next(iter(representations(model, data, [layer]).values()))


def _bound(m: Measurements, p: Problem, net: Trained, alpha: float, run: Run) -> None:
    """Most selective rotation of the layer nearest to the middle that is narrow enough to be searched."""
    x, y = (t[:OFF_AXIS_SAMPLES] for t in p.test)
    acts = representations(net.model, (x, y), net.layers)
    middle = (len(acts) - 1) / 2 + 0.25  # of two in the middle, the deeper
    narrow = [(abs(i - middle), a) for i, a in enumerate(acts.values()) if a.shape[1] <= OFF_AXIS_UNITS]
    if not narrow:
        return
    chosen = min(narrow, key=lambda pair: pair[0])[1]
    chosen = chosen.relu() if net.negative == "relu" else chosen
    result = off_axis_upper_bound(chosen, y, steps=run.integer("search"))
    m.add_all({"si_axis": result.si_axis, "si_bound": result.si_bound}, arm="penalty", alpha=alpha)
    m.add("variance_ratio", float(result.ratios[0]), arm="penalty", alpha=alpha)


def _distances(m: Measurements, p: Problem, nets: Mapping[float, Trained], reference: Trained) -> None:
    """CCA distance to a plain network of another seed, over that of the plain network of this seed; means over layers.

    Each seed has a reference of its own, so that the ratios of different seeds are independent. A layer counts where
    all networks have four samples a unit and more; a small test set is filled up with other samples, since this is
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
    x = torch.cat([p.test[0], p.val[0], p.train[0]])[: max(len(p.test[0]), 1000)]
    for name, acts in representations(net.model, (x, torch.zeros(len(x))), net.layers).items():
        with contextlib.suppress(InvalidInput):  # a layer that has died altogether correlates with nothing
            if 4 * acts.shape[1] <= len(acts):
                found[name] = factor(acts, name=name)
    return found


def _mean_distance(mine: Mapping[str, CCAFactor], there: Mapping[str, CCAFactor]) -> float:
    common = [name for name in mine if name in there]
    return float(np.mean([cca(mine[name], there[name]).distance for name in common])) if common else float("nan")
