"""The study's experiments: networks trained under the tracker, and the laws tested batch by batch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim import SGD, AdamW

from mlcollage.lab import Measurements, Task
from mlcollage.train import cosine

from ..checks import check_gradient, check_hessian
from ..closed_form import predict
from ..ledger import TERMS
from ..term import KINDS, Kind
from .bench import Arrays, Bench, Common, Net, Watch

Floats = npt.NDArray[np.float64]


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


def train_networks(task: Task[Training]) -> Measurements:
    """SGD at three weight decays, two momenta, AdamW: what the theory predicts and what happens, for one seed."""
    bench = Bench(task)
    for net in bench.networks():
        if not len(net.symmetries):
            continue
        for decay in task.settings.weight_decays:
            _plain_sgd(bench, net, decay)
        if net.name != "plain":  # the normed network has laws of every kind
            for momentum, lr, decay in task.settings.momenta:
                _momentum(bench, net, momentum, lr * net.rate, decay)
            make = functools.partial(AdamW, lr=2e-3 * net.rate, weight_decay=0.1)
            for kind, own in _by_kind(bench.track(net, make, bench.s.steps // 2)):
                _budget(own, bench.m, kind=kind, optimizer="AdamW", arm=net.name)
    return bench.m


def check_laws(task: Task[Laws]) -> Measurements:
    """Gradient and Hessian constraints, drift under flow, the ledger in float64, attention; for one seed."""
    bench = Bench(task)
    for net in bench.networks():
        double = net.double(bench.x)
        if len(net.symmetries):
            _constraints(bench, net, double is not None)
        bench.m.add("runs_in_float64", float(double is not None), arm=net.name)
        if double is not None and len(net.symmetries):
            _flow(bench, double)
            _ledger(bench, double)
            if net.name == "user" and len(net.symmetries.of_kind("matrix")):
                _attention(bench, double)
    if not bench.problem.users_model:
        _attention(bench, bench.transformer())
    return bench.m


# --- training under the tracker ---------------------------------------------------------------------------------------


def _plain_sgd(bench: Bench, net: Net, decay: float) -> None:
    m, watch = bench.m, Watch() if decay == bench.s.weight_decays[1] else None
    make = functools.partial(SGD, lr=bench.s.lr * net.rate, weight_decay=decay)
    for kind, own in _by_kind(bench.track(net, make, bench.s.steps, "both", watch)):
        where: dict[str, Any] = {"arm": net.name, "kind": kind, "weight_decay": decay, "momentum": 0.0}
        if kind == "translation" and decay == 0:  # nothing moves: there is no change to compare with
            m.add("still", _relative(own["measured"][-1] - own["measured"][0], own["measured"][0]), **where)
        else:
            _errors(own, "closed_form", m, **where)
        _curves(own, m, {"measured": "measured", "predicted": "closed_form"}, **where)
        _errors(own, "predicted", m, **where)
        if kind in ("scale", "rescale"):
            moved = np.diff(own["measured"], axis=0)  # (steps, laws)
            force = own["discretization"][1:] + own["weight_decay"][1:]  # centrifugal minus centripetal
            m.add("sign_agreement", float((np.sign(moved) == np.sign(force)).mean()), **where)
            m.add("growing", float((moved > 0).mean()), **where)
        if decay > 0:
            _budget(own, m, optimizer="SGD", **where)
    if watch is not None:
        watch.roughness(m, net.name)


def _momentum(bench: Bench, net: Net, momentum: float, lr: float, decay: float) -> None:
    m, count = bench.m, bench.s.steps
    make = functools.partial(SGD, lr=lr, weight_decay=decay, momentum=momentum)
    settled = min(math.ceil(1 / (1 - momentum)), count // 2)
    for kind, own in _by_kind(bench.track(net, make, count, "both")):
        where: dict[str, Any] = {"arm": net.name, "kind": kind, "weight_decay": decay, "momentum": momentum}
        own["first_order"] = _first_order(own, kind, lr, decay, momentum)
        _curves(own, m, {"measured": "measured", "predicted": "closed_form", "first_order": "first_order"}, **where)
        for name in ("closed_form", "first_order"):
            _errors(own, name, m, **where)
            errors = [_relative(a - b, b - own["measured"][0]) for a, b in zip(own[name], own["measured"], strict=True)]
            m.add(f"{name}_mean_rc", float(np.mean(np.array(errors)[own["step"] >= settled])), **where)


def _first_order(own: Arrays, kind: Kind, lr: float, decay: float, momentum: float) -> Floats:
    """The flow without inertia, driven by the same forces as the oscillator."""
    gaps = np.diff(own["step"])
    forcing = None
    if kind != "translation":
        forcing = np.repeat(own["discretization"][1:] / (lr**2 * gaps[:, None]), gaps, axis=0)  # (steps, laws)
    path = predict(own["measured"][0], lr, decay, momentum, 0.0, int(gaps.sum()), forcing, kind=kind, order=1)
    return path[own["step"]]


def _by_kind(arrays: Arrays) -> Iterator[tuple[Kind, Arrays]]:
    """A tracker's arrays for the laws of each kind."""
    for kind in KINDS:
        chosen = arrays["kind"] == kind
        if chosen.any():
            wide = {n: v[:, chosen] for n, v in arrays.items() if n not in ("step", "law", "kind")}
            yield kind, {**wide, "step": arrays["step"]}


def _relative(a: Floats, b: Floats) -> float:
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a)) / size if size else math.nan


def _errors(own: Mapping[str, Floats], column: str, m: Measurements, **where: Any) -> None:
    """At the end: relative error, the same relative to the change, and what "nothing moves" would give."""
    start, end, guess = own["measured"][0], own["measured"][-1], own[column][-1]
    m.add(f"{column}_rel", _relative(guess - end, end), **where)
    m.add(f"{column}_rc", _relative(guess - end, end - start), **where)
    m.add("null_rel", _relative(start - end, end), **where)


def _grid(own: Arrays, points: int = 24) -> list[tuple[int, int]]:
    """Some of the measured rows, with their steps."""
    count = len(own["step"])
    return [(k, int(own["step"][k])) for k in sorted({round(k) for k in np.linspace(0, count - 1, points)})]


def _curves(own: Arrays, m: Measurements, columns: Mapping[str, str], **where: Any) -> None:
    """The vector of quantities along its start, ⟨Q, Q(0)⟩/‖Q(0)‖², over steps, for some columns by new name."""
    start = own["measured"][0]
    size = float(start @ start) or 1.0
    for k, step in _grid(own):
        for name, column in columns.items():
            m.add(f"{name}_along", float(own[column][k] @ start) / size, step=step, **where)


def _budget(own: Arrays, m: Measurements, **where: Any) -> None:
    """Mean over laws of each part, added up over the steps, relative to the mean size at the start."""
    size = float(np.abs(own["measured"][0]).mean()) or 1.0
    parts = {n: np.cumsum(own[n], axis=0) for n in TERMS if n in own}  # each (steps, laws)
    total: Floats = own["measured"] - own["measured"][0]
    for k, step in _grid(own):
        for n, part in {**parts, "change": total}.items():
            m.add("budget", float(part[k].mean()) / size, step=step, part=n, **where)
    m.add("budget_gap", float(np.abs(sum(parts.values()) - total).max()) / size, **where)


# --- the laws, batch by batch -----------------------------------------------------------------------------------------


def _constraints(bench: Bench, net: Net, in_double: bool) -> None:
    """Residuals of the constraints by precision, by kind, and for laws with and without an epsilon."""
    models = {"float32": bench.warm(net)}
    if in_double:
        models["float64"] = copy.deepcopy(models["float32"]).double()
    named = dict(models["float32"].named_parameters())
    idle = [  # translations of biases alone: what follows takes any shift away, so that the gradient is rounding
        law.name for law in net.symmetries.of_kind("translation") if all(named[n].dim() == 1 for n in law.parameters)
    ]
    draw = torch.Generator().manual_seed(bench.seed)
    for precision, model in models.items():
        reports = []
        for _ in range(bench.s.batches):
            loss = bench.loss(torch.randint(len(bench.x), (bench.batch_size,), generator=draw))
            reports.append(check_gradient(model, net.symmetries, loss, controls=1, generator=draw))
        few = torch.randint(len(bench.x), (min(64, bench.batch_size),), generator=draw)
        curved = check_hessian(model, net.symmetries, bench.loss(few), most=4, generator=draw)
        kinds, broken = curved["kind"].mask(curved["name"].isin(idle), "bias"), curved["name"].isin(net.broken)
        groups: Mapping[Any, Any] = curved.groupby([kinds, broken], sort=False).groups
        for (kind, epsilon), rows in groups.items():
            where: dict[str, Any] = {"arm": net.name, "kind": kind, "epsilon": bool(epsilon), "precision": precision}
            slopes, bent = [report.loc[rows] for report in reports], curved.loc[rows]
            found = {
                "gradient_residual": max(r["residual"].max() for r in slopes),
                "gradient_control": float(np.median([r["control"].median() for r in slopes])),
                "gradient_median": float(np.median([r["median"].median() for r in slopes])),
                "hessian_residual": float(bent["residual"].max()),
                "hessian_control": float(bent["control"].median()),
            }
            bench.m.add_all(found, **where)


def _flow(bench: Bench, net: Net) -> None:
    """Full-batch descent to one and the same time at rates that halve: how far the laws drift."""
    symmetries = net.exact
    if not len(symmetries):
        return
    loss = bench.loss(slice(0, bench.s.flow_samples))
    for halving in range(6):
        rate = bench.s.flow_lr * net.rate / 2**halving
        model = net.make().train()
        optimizer = SGD(model.parameters(), lr=rate)
        before = symmetries.quantities(model)
        for _ in range(round(bench.s.flow_time / bench.s.flow_lr * 2**halving)):
            optimizer.zero_grad(set_to_none=True)
            loss(model).backward()
            optimizer.step()
        after = symmetries.quantities(model)
        for kind in KINDS:
            names = [law.name for law in symmetries.of_kind(kind)]
            if names:
                moved = torch.cat([(after[n] - before[n]).reshape(-1) for n in names])
                size = torch.cat([before[n].reshape(-1) for n in names]).norm().clamp(min=1e-300)
                bench.m.add("drift", float(moved.norm() / size), arm=net.name, kind=kind, step=halving, eta=rate)


def _ledger(bench: Bench, net: Net) -> None:
    """SGD with momentum, dampening, weight decay and a schedule in float64, then AdamW: what the ledger leaves open."""
    count, lr = bench.s.ledger_steps, bench.s.lr * net.rate
    sgd = functools.partial(SGD, lr=lr / 2, momentum=0.9, dampening=0.1, weight_decay=1e-3)
    adam = functools.partial(AdamW, lr=2e-3 * net.rate, weight_decay=0.1)
    runs: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "SGD": (sgd, {"schedule": cosine(count)}),
        "AdamW": (adam, {}),
    }
    for name, (make, more) in runs.items():
        arrays = bench.track(net, make, count, **more)
        epsilon = np.isin(arrays["law"], net.broken)
        for kind in KINDS:
            for flag in (False, True):
                chosen = (arrays["kind"] == kind) & (epsilon == flag)
                if chosen.any():
                    where: dict[str, Any] = {"arm": net.name, "kind": kind, "epsilon": flag, "optimizer": name}
                    start, end = arrays["measured"][0][chosen], arrays["measured"][-1][chosen]
                    guesses = {"ledger_rel": arrays["predicted"], "accounted_rel": arrays["accounted"]}
                    found = {metric: _relative(a[-1][chosen] - end, end) for metric, a in guesses.items()}
                    bench.m.add_all({**found, "ledger_null": _relative(start - end, end)}, **where)


def _attention(bench: Bench, net: Net) -> None:
    """The laws of a transformer in float64: constraints on its gradients, and the ledger while it trains."""
    net = dataclasses.replace(net, symmetries=net.exact)
    if not len(net.symmetries):
        return
    loss = bench.loss(slice(0, bench.batch_size))
    report = check_gradient(bench.warm(net), net.symmetries, loss, controls=2, generator=bench.seed)
    for kind, rows in report.groupby("kind"):
        found = {"attention_residual": rows["residual"].max(), "attention_control": rows["control"].median()}
        bench.m.add_all(found, arm="attention", kind=str(kind))
    make = functools.partial(SGD, lr=0.05 * net.rate, momentum=0.9, weight_decay=1e-3)
    for kind, own in _by_kind(bench.track(net, make, bench.s.ledger_steps)):
        start, end = own["measured"][0], own["measured"][-1]
        bench.m.add("attention_ledger", _relative(own["predicted"][-1] - end, end), arm="attention", kind=kind)
        bench.m.add("attention_null", _relative(start - end, end), arm="attention", kind=kind)
