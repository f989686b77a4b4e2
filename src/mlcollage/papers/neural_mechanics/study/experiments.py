"""The study's runs: networks trained under the tracker, and the laws tested batch by batch."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.errors import InvalidInput
from mlcollage.lab.experiment import Task
from mlcollage.lab.measurements import Measurements
from mlcollage.nn.init import build, seeded
from mlcollage.train.loop import epochs, steps
from mlcollage.train.schedules import cosine

from ..checks import check_gradient, check_hessian
from ..closed_form import predict
from ..find import find_symmetries
from ..symmetry import SymmetrySet
from ..tracker import ConservationTracker
from .models import Common, Setup, make_setup, row_transformer

__all__ = ["KINDS", "Laws", "Training", "check_laws", "train_networks"]

KINDS = ("translation", "scale", "rescale", "matrix")
Floats = npt.NDArray[np.float64]
_RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)  # of the wanted learning rate, tried in turn on a user's model


Job = Task[Any]  # of either experiment: what both settings have in common


@dataclass(frozen=True)
class Training(Common):
    """Networks trained under the tracker: what the theory predicts and what happens."""

    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-3)  # of plain SGD


@dataclass(frozen=True)
class Laws(Common):
    """The laws tested batch by batch, under small steps, in float64, and on a transformer."""

    warm_steps: int = 20  # before a gradient is looked at: biases begin at zero
    batches: int = 5  # whose gradients are tested
    flow_lr: float = 0.2  # largest learning rate of full-batch descent; five halvings follow
    flow_time: float = 1.0  # learning rate times steps of each descent
    flow_samples: int = 64  # of the full batch
    ledger_steps: int = 60  # in float64


class _Net(NamedTuple):
    """A network of the study, ready to be made again and again from the same start."""

    name: str
    make: Callable[[], nn.Module]
    symmetries: SymmetrySet
    rate: float  # factor of all learning rates


def train_networks(task: Task[Training]) -> Measurements:
    """SGD at three weight decays, two momenta, AdamW: what the theory predicts and what happens, for one seed."""
    m, setup = Measurements(), make_setup(task)
    for net in _networks(task, setup, m):
        for decay in task.settings.weight_decays:
            _plain_sgd(task, setup, net, decay, m)
        if net.name != "plain":  # the normed network has laws of every kind
            for spec in task.settings.momenta:
                _momentum(task, setup, net, spec, m)
            _adamw(task, setup, net, m)
    return m


def check_laws(task: Task[Laws]) -> Measurements:
    """Gradient and Hessian constraints, drift under flow, the ledger in float64, attention; for one seed."""
    m, setup = Measurements(), make_setup(task)
    for net in _networks(task, setup, m):
        _constraints(task, setup, net, m)
        double = _double(net, setup)
        m.add("runs_in_float64", float(double is not None), arm=net.name)
        if double is not None:
            _flow(task, setup, double, m)
            _ledger(task, setup, double, m)
            if net.name == "user" and len(net.symmetries.of_kind("matrix")):
                _attention(task, setup, double, m)
    if setup.own:
        x = setup.x if setup.x.dim() > 2 else setup.x.unsqueeze(-1)
        shape, rows = tuple(x.shape[1:]), setup._replace(x=x)
        make = functools.partial(_build, lambda: row_transformer(shape, setup.classes).double(), task.seed, task.device)
        _attention(task, rows, _found("attention", make, rows._replace(x=x.double()), 1.0, m), m)
    return m


# --- networks ---------------------------------------------------------------------------------------------------------


def _build(factory: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    return build(factory, seed).to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _networks(task: Job, setup: Setup, m: Measurements) -> Iterable[_Net]:
    """Each network with the laws that are found on it."""
    for name, factory in setup.networks.items():
        make = functools.partial(_build, factory, task.seed, task.device)
        rate = 1.0 if setup.own else _rate(task, setup, make)
        yield _found(name, make, setup, rate, m)


def _found(name: str, make: Callable[[], nn.Module], setup: Setup, rate: float, m: Measurements) -> _Net:
    model = make()
    with seeded(0):
        symmetries = find_symmetries(model, setup.x[:16].to(_device(model), _type(model)), F.cross_entropy)
    for kind in KINDS:
        families = symmetries.of_kind(kind)  # type: ignore[arg-type]
        m.add("laws", families.n_laws, arm=name, kind=kind)
        m.add("families", len(families), arm=name, kind=kind)
    m.add("not_handled", len(symmetries.unhandled), arm=name)
    m.add("rate", rate, arm=name)
    rows = [(s.kind, s.name, str(s.n_laws), s.broken_by or "", f"{s.residual or 0:.1e}") for s in symmetries]
    m.array(f"laws_{name}", np.array(rows if rows else [("", "", "", "", "")], dtype=str))
    m.array(f"not_handled_{name}", np.array(list(symmetries.unhandled) or [""], dtype=str))
    return _Net(name, make, symmetries, rate)


def _rate(task: Job, setup: Setup, make: Callable[[], nn.Module]) -> float:
    """The largest factor of the study's learning rates at which a user's model trains for a few steps."""
    momentum, lr, _ = task.settings.momenta[0]
    for factor in _RATES:
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr * factor, momentum=momentum)
        try:
            losses = [float(s.loss) for s in _steps(task, setup, model, optimizer, min(40, task.settings.steps))]
        except InvalidInput:
            continue
        if losses[-1] < 3 * losses[0]:
            return factor
    raise InvalidInput(
        f"the workload's model diverges at every learning rate down to {lr * _RATES[-1]:g}; check its initialization."
    )


def _type(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _double(net: _Net, setup: Setup) -> _Net | None:
    """The network in float64; None if its code insists on float32."""
    make: Callable[[], nn.Module] = lambda: net.make().double()  # noqa: E731
    try:
        with torch.no_grad(), seeded(0):
            model = make()
            model(setup.x[:2].to(_device(model), torch.float64))
    except (RuntimeError, TypeError):
        return None
    return net._replace(make=make)


def _batch(task: Job, setup: Setup) -> int:
    return min(task.settings.batch_size, max(2, len(setup.x) // 4))


def _steps(task: Job, setup: Setup, model: nn.Module, optimizer: Any, count: int, **more: Any) -> Any:
    x = setup.x.to(_type(model))
    batches = epochs(x, setup.y, _batch(task, setup), generator=1_000_003 * task.seed + 17)
    return steps(model, batches, optimizer, max_steps=count, seed=task.seed, **more)


def _loss(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        with seeded(0):  # dropout draws the same mask at every call
            return F.cross_entropy(model(x.to(_device(model), _type(model))), y.to(_device(model)))

    return loss


# --- training under the tracker ---------------------------------------------------------------------------------------


def _track(
    task: Job,
    setup: Setup,
    net: _Net,
    optimizer_of: Callable[..., Any],
    count: int,
    *,
    mode: Any = "ledger",
    **more: Any,
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Train, and return the tracker's arrays and, by weight matrix, row norms and single weights over time."""
    model = net.make()
    optimizer = optimizer_of(model.parameters())
    watch = _Watch(model) if more.pop("watch", False) else None
    with ConservationTracker(model, optimizer, net.symmetries, task.settings.every, mode) as tracker:
        for _ in _steps(task, setup, model, optimizer, count, **more):
            if watch is not None:
                watch.look()
    return tracker.arrays(), watch.paths() if watch is not None else {}


class _Watch:
    """Squared norms of the rows of each weight matrix, and a sample of its entries, step by step."""

    def __init__(self, model: nn.Module, entries: int = 64) -> None:
        self.weights = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and p.numel() > 1}
        g = torch.Generator().manual_seed(0)
        self.chosen = {n: torch.randperm(p.numel(), generator=g)[:entries] for n, p in self.weights.items()}
        self.seen: dict[str, list[Tensor]] = {f"{n}|{k}": [] for n in self.weights for k in ("norm", "entry")}
        self.look()

    def look(self) -> None:
        for name, p in self.weights.items():
            flat = p.detach().reshape(-1).double()
            self.seen[f"{name}|norm"].append(p.detach().double().flatten(1).square().sum(1).sqrt())
            self.seen[f"{name}|entry"].append(flat[self.chosen[name]])

    def paths(self) -> dict[str, Floats]:
        return {name: torch.stack(path).cpu().numpy() for name, path in self.seen.items()}


def _plain_sgd(task: Job, setup: Setup, net: _Net, decay: float, m: Measurements) -> None:
    if not len(net.symmetries):
        return
    count, lr = task.settings.steps, task.settings.lr * net.rate
    watch = decay == task.settings.weight_decays[1]
    arrays, paths = _track(
        task, setup, net, lambda p: torch.optim.SGD(p, lr=lr, weight_decay=decay), count, mode="both", watch=watch
    )
    where: dict[str, Any] = {"arm": net.name, "weight_decay": decay, "momentum": 0.0}
    for kind in _kinds(arrays):
        own = _of_kind(arrays, kind)
        if kind == "translation" and decay == 0:  # nothing moves: there is no change to compare with
            m.add("still", _relative(own["measured"][-1] - own["measured"][0], own["measured"][0]), kind=kind, **where)
        else:
            _errors(own, "closed_form", m, kind=kind, **where)
        _curves(own, m, kind=kind, **where)
        _errors(own, "predicted", m, kind=kind, **where)
        if kind in ("scale", "rescale"):
            m.add("sign_agreement", _signs(own), kind=kind, **where)
            m.add("growing", float((np.diff(own["measured"], axis=0) > 0).mean()), kind=kind, **where)
        if decay > 0:
            _budget(own, m, kind=kind, optimizer="SGD", **where)
    if paths:
        _roughness(paths, m, arm=net.name)


def _momentum(task: Job, setup: Setup, net: _Net, spec: tuple[float, float, float], m: Measurements) -> None:
    if not len(net.symmetries):
        return
    momentum, lr, decay = spec[0], spec[1] * net.rate, spec[2]
    count = task.settings.steps
    arrays, _ = _track(
        task, setup, net, lambda p: torch.optim.SGD(p, lr=lr, weight_decay=decay, momentum=momentum), count, mode="both"
    )
    where: dict[str, Any] = {"arm": net.name, "weight_decay": decay, "momentum": momentum}
    settled = min(math.ceil(1 / (1 - momentum)), count // 2)
    for kind in _kinds(arrays):
        own = _of_kind(arrays, kind)
        _errors(own, "closed_form", m, kind=kind, **where)
        _curves(own, m, kind=kind, **where)
        own["first_order"] = _first_order(own, kind, lr, decay, momentum)
        _errors(own, "first_order", m, kind=kind, **where)
        _curves(own, m, kind=kind, column="first_order", **where)
        for name in ("closed_form", "first_order"):
            errors = [_relative(a - b, b - own["measured"][0]) for a, b in zip(own[name], own["measured"], strict=True)]
            m.add(f"{name}_mean_rc", float(np.mean(np.array(errors)[own["step"] >= settled])), kind=kind, **where)


def _first_order(own: Mapping[str, Any], kind: Any, lr: float, decay: float, momentum: float) -> Floats:
    """The flow without inertia, driven by the same forces as the oscillator."""
    gaps = np.diff(own["step"])
    forcing = None
    if kind != "translation":
        forcing = np.repeat(own["discretization"][1:] / (lr**2 * gaps[:, None]), gaps, axis=0)
    path = predict(own["measured"][0], lr, decay, momentum, 0.0, int(gaps.sum()), forcing, kind=kind, order=1)
    return path[own["step"]]


def _adamw(task: Job, setup: Setup, net: _Net, m: Measurements) -> None:
    if not len(net.symmetries):
        return
    count = task.settings.steps // 2
    make = lambda p: torch.optim.AdamW(p, lr=2e-3 * net.rate, weight_decay=0.1)  # noqa: E731
    arrays, _ = _track(task, setup, net, make, count)
    for kind in _kinds(arrays):
        own = _of_kind(arrays, kind)
        _budget(own, m, kind=kind, optimizer="AdamW", arm=net.name)


def _kinds(arrays: Mapping[str, Any]) -> list[str]:
    return [kind for kind in KINDS if (arrays["kind"] == kind).any()]


def _of_kind(arrays: Mapping[str, Any], kind: str) -> dict[str, Any]:
    chosen = arrays["kind"] == kind
    return {n: v[:, chosen] for n, v in arrays.items() if n not in ("step", "law", "kind")} | {"step": arrays["step"]}


def _relative(a: Floats, b: Floats) -> float:
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a)) / size if size else math.nan


def _errors(own: Mapping[str, Floats], column: str, m: Measurements, **where: Any) -> None:
    """At the end: relative error, the same relative to the change, and what "nothing moves" would give."""
    start, end, guess = own["measured"][0], own["measured"][-1], own[column][-1]
    m.add(f"{column}_rel", _relative(guess - end, end), **where)
    m.add(f"{column}_rc", _relative(guess - end, end - start), **where)
    m.add("null_rel", _relative(start - end, end), **where)


def _grid(own: Mapping[str, Any], points: int = 24) -> list[tuple[int, int]]:
    """Some of the measured rows, with their steps."""
    count = len(own["step"])
    return [(k, int(own["step"][k])) for k in sorted({round(k) for k in np.linspace(0, count - 1, points)})]


def _curves(own: Mapping[str, Any], m: Measurements, column: str = "closed_form", **where: Any) -> None:
    """The vector of quantities along its start, ⟨Q, Q(0)⟩/‖Q(0)‖², over steps: measured and predicted."""
    start = own["measured"][0]
    size = float(start @ start) or 1.0
    name = "predicted" if column == "closed_form" else column
    for k, step in _grid(own):
        if column == "closed_form":
            m.add("measured_along", float(own["measured"][k] @ start) / size, step=step, **where)
        m.add(f"{name}_along", float(own[column][k] @ start) / size, step=step, **where)


def _signs(own: Mapping[str, Floats]) -> float:
    """Share of steps and laws in which dQ has the sign of centrifugal minus centripetal force."""
    moved = np.diff(own["measured"], axis=0)
    force = own["discretization"][1:] + own["weight_decay"][1:]
    return float((np.sign(moved) == np.sign(force)).mean())


def _budget(own: Mapping[str, Any], m: Measurements, **where: Any) -> None:
    """Mean over laws of each part, added up over the steps, relative to the mean size at the start."""
    size = float(np.abs(own["measured"][0]).mean()) or 1.0
    parts = [n for n in ("symmetry", "weight_decay", "momentum", "preconditioner", "discretization") if n in own]
    total: Floats = own["measured"] - own["measured"][0]
    explained = sum(np.cumsum(own[n], axis=0) for n in parts)
    for k, step in _grid(own):
        for n in parts:
            m.add("budget", float(own[n][: k + 1].sum(axis=0).mean()) / size, step=step, part=n, **where)
        m.add("budget", float(total[k].mean()) / size, step=step, part="change", **where)
    m.add("budget_gap", float(np.abs(explained - total).max()) / size, **where)


def _roughness(paths: Mapping[str, Floats], m: Measurements, arm: str) -> None:
    """Total variation over net change, median over the rows' norms and over the entries of each weight matrix."""
    for layer in sorted({name.split("|")[0] for name in paths}):
        for what in ("norm", "entry"):
            path = paths[f"{layer}|{what}"]
            variation, net = np.abs(np.diff(path, axis=0)).sum(axis=0), np.abs(path[-1] - path[0])
            m.add("roughness", float(np.median(variation / np.maximum(net, 1e-300))), arm=arm, layer=layer, what=what)


# --- the laws, batch by batch -----------------------------------------------------------------------------------------


def _exact(symmetries: SymmetrySet) -> SymmetrySet:
    """Without the laws that a known epsilon breaks."""
    return SymmetrySet(tuple(s for s in symmetries if s.broken_by is None))


def _idle_biases(model: nn.Module, symmetries: SymmetrySet) -> set[str]:
    """Translations of biases alone: what follows takes any shift away, so that their gradient is zero to rounding."""
    named = dict(model.named_parameters())
    shifts = symmetries.of_kind("translation")
    return {s.name for s in shifts if all(named[n].dim() == 1 for n in s.parameters)}


def _warm(task: Job, setup: Setup, net: _Net) -> nn.Module:
    """The network after a few steps: not at its initialization, where biases are zero."""
    model = net.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.settings.lr * net.rate)
    for _ in _steps(task, setup, model, optimizer, task.settings.warm_steps):
        pass
    return model


def _constraints(task: Job, setup: Setup, net: _Net, m: Measurements) -> None:
    if not len(net.symmetries):
        return
    models = {"float32": _warm(task, setup, net)}
    if _double(net, setup) is not None:
        models["float64"] = copy.deepcopy(models["float32"]).double()
    draw = torch.Generator().manual_seed(task.seed)
    for precision, model in models.items():
        reports = []
        for _ in range(task.settings.batches):
            chosen = torch.randint(len(setup.x), (_batch(task, setup),), generator=draw)
            loss = _loss(setup.x[chosen], setup.y[chosen])
            reports.append(check_gradient(model, net.symmetries, loss, controls=1, generator=draw))
        few = torch.randint(len(setup.x), (min(64, _batch(task, setup)),), generator=draw)
        curved = check_hessian(model, net.symmetries, _loss(setup.x[few], setup.y[few]), most=4, generator=draw)
        broken = {s.name for s in net.symmetries if s.broken_by is not None}
        idle = _idle_biases(model, net.symmetries)
        for kind in (*KINDS, "bias"):
            for epsilon in (False, True):
                keep = [
                    r[(r["kind"].mask(r["name"].isin(idle), "bias") == kind) & (r["name"].isin(broken) == epsilon)]
                    for r in (*reports, curved)
                ]
                if keep[-1].empty:
                    continue
                where: dict[str, Any] = {"arm": net.name, "kind": kind, "epsilon": epsilon, "precision": precision}
                *slopes, bent = keep
                m.add("gradient_residual", max(r["residual"].max() for r in slopes), **where)
                m.add("gradient_control", float(np.median([r["control"].median() for r in slopes])), **where)
                m.add("gradient_median", float(np.median([r["median"].median() for r in slopes])), **where)
                m.add("hessian_residual", float(bent["residual"].max()), **where)
                m.add("hessian_control", float(bent["control"].median()), **where)


def _flow(task: Job, setup: Setup, net: _Net, m: Measurements) -> None:
    """Full-batch descent to one and the same time at rates that halve: how far the laws drift."""
    symmetries = _exact(net.symmetries)
    if not len(symmetries):
        return
    few = slice(0, min(task.settings.flow_samples, len(setup.x)))
    loss = _loss(setup.x[few].double(), setup.y[few])
    for halving in range(6):
        rate = task.settings.flow_lr * net.rate / 2**halving
        count = round(task.settings.flow_time / task.settings.flow_lr * 2**halving)
        model = net.make().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        before = symmetries.quantities(model)
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss(model).backward()
            optimizer.step()
        after = symmetries.quantities(model)
        for kind in KINDS:
            names = [s.name for s in symmetries if s.kind == kind]
            if names:
                moved = torch.cat([(after[n] - before[n]).reshape(-1) for n in names])
                size = torch.cat([before[n].reshape(-1) for n in names]).norm().clamp(min=1e-300)
                m.add("drift", float(moved.norm() / size), arm=net.name, kind=kind, step=halving, eta=rate)


def _ledger(task: Job, setup: Setup, net: _Net, m: Measurements) -> None:
    """SGD with momentum, dampening, weight decay and a schedule in float64, then AdamW: what the ledger leaves open."""
    if not len(net.symmetries):
        return
    count = task.settings.ledger_steps
    lr = task.settings.lr * net.rate
    broken = {s.name for s in net.symmetries if s.broken_by is not None}
    runs: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "SGD": (
            lambda p: torch.optim.SGD(p, lr=lr / 2, momentum=0.9, dampening=0.1, weight_decay=1e-3),
            {"schedule": cosine(count)},
        ),
        "AdamW": (lambda p: torch.optim.AdamW(p, lr=2e-3 * net.rate, weight_decay=0.1), {}),
    }
    for name, (optimizer_of, more) in runs.items():
        arrays, _ = _track(task, setup, net, optimizer_of, count, **more)
        epsilon = np.isin(arrays["law"], list(broken))
        for kind in _kinds(arrays):
            for flag in (False, True):
                chosen = (arrays["kind"] == kind) & (epsilon == flag)
                if not chosen.any():
                    continue
                end = arrays["measured"][-1][chosen]
                where: dict[str, Any] = {"arm": net.name, "kind": kind, "epsilon": flag, "optimizer": name}
                m.add("ledger_rel", _relative(arrays["predicted"][-1][chosen] - end, end), **where)
                m.add("accounted_rel", _relative(arrays["accounted"][-1][chosen] - end, end), **where)
                m.add("ledger_null", _relative(arrays["measured"][0][chosen] - end, end), **where)


def _attention(task: Job, setup: Setup, net: _Net, m: Measurements) -> None:
    """The laws of a transformer in float64: constraints on its gradients, and the ledger while it trains."""
    symmetries = _exact(net.symmetries)
    setup = setup._replace(x=setup.x.double())
    if not len(symmetries):
        return
    few = slice(0, _batch(task, setup))
    model = _warm(task, setup, net)
    report = check_gradient(model, symmetries, _loss(setup.x[few], setup.y[few]), controls=2, generator=task.seed)
    for kind in KINDS:
        rows = report[report["kind"] == kind]
        if len(rows):
            m.add("attention_residual", float(rows["residual"].max()), arm="attention", kind=kind)
            m.add("attention_control", float(rows["control"].median()), arm="attention", kind=kind)
    make = lambda p: torch.optim.SGD(p, lr=0.05 * net.rate, momentum=0.9, weight_decay=1e-3)  # noqa: E731
    arrays, _ = _track(task, setup, net._replace(symmetries=symmetries), make, task.settings.ledger_steps)
    for kind in _kinds(arrays):
        own = _of_kind(arrays, kind)
        start, end = own["measured"][0], own["measured"][-1]
        m.add("attention_ledger", _relative(own["predicted"][-1] - end, end), arm="attention", kind=kind)
        m.add("attention_null", _relative(start - end, end), arm="attention", kind=kind)
