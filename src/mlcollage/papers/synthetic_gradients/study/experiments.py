"""The study's experiments: rules of credit assignment, depth, linear theory, recall, random times, processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mlcollage.data import Labeled, fashion_mnist
from mlcollage.data.fresh_networks import fresh
from mlcollage.data.problem import Problem, problem
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task
from mlcollage.measure import layer_probes, rdm, rdm_similarity
from mlcollage.nn import build, seeded

from ..context import Context
from ..linear_theory import linear_sg_convergence
from ..pipeline import run_pipeline
from ..quality import sg_quality
from ..recurrent import DNIRecurrent
from ..synthesizer import SyntheticGradient
from .models import RULES, Recall, Trained, activations, cuts_of, last_loss, network, train
from .stages import CLASSES, batches, sleeping_stage

OTHER = 10_000  # added to a seed for a network of another seed


@dataclass(frozen=True)
class Rules:
    """One network for each rule and learning rate; the rate with the best validation accuracy is tested."""

    train: int = 5000  # training samples
    val: int = 500  # validation samples, which choose the learning rate
    test: int = 2000  # test samples
    widths: tuple[int, ...] = (64, 64, 64, 64)  # hidden layers, with batch norm
    batch: int = 64  # samples of an update
    steps: int = 400  # updates
    lrs: tuple[float, ...] = (1e-3, 4e-3)  # Adam's rates of the network, tried for every rule
    sg_lr: float = 4e-3  # Adam's rate of synthesizers and critics


@dataclass(frozen=True)
class Depth:
    """Networks of several depths, by backpropagation, with a cut behind every layer, and with one cut in the middle."""

    train: int = 6000  # training samples
    test: int = 2000  # test samples
    width: int = 64  # units of each hidden layer
    depths: tuple[int, ...] = (2, 4, 8)  # hidden layers; the last is looked into
    batch: int = 64  # samples of an update
    steps: int = 300  # updates
    lr: float = 2e-3  # Adam's rate of the network
    sg_lr: float = 4e-3  # Adam's rate of synthesizers
    points: int = 200  # test samples of a dissimilarity matrix


@dataclass(frozen=True)
class Linear:
    """Linear networks with a linear synthesizer whose step is a line search."""

    n: int = 200  # samples
    dims: tuple[int, ...] = (2, 100)  # inputs
    steps: int = 2000  # updates
    lr: float = 0.05  # of the network
    deep: int = 10  # layers of the deep network, in 2 dimensions
    deep_lr: float = 0.01  # its rate
    deep_steps: int = 2500  # its updates


@dataclass(frozen=True)
class Remember:
    """Delayed recall: one bit, noisy blanks, an answer; chunks of T steps."""

    blanks: int = 13  # steps between the bit and the answer, that one included
    units: int = 24  # of the tanh network
    truncate: int = 2  # T
    rows: int = 64  # sequences of an update
    updates: int = 80  # batches of sequences
    lr: float = 3e-3  # Adam's rate of the network
    sg_lr: float = 1e-2  # Adam's rate of the synthesizer
    clip: float = 1.0  # largest norm of one row's injected gradient


@dataclass(frozen=True)
class Times:
    """Parts that are updated at random times, at equal numbers of updates."""

    train: int = 6000  # training samples
    test: int = 2000  # test samples
    widths: tuple[int, ...] = (64, 64, 64)  # hidden layers
    batch: int = 64  # samples of an update
    updates: int = 120  # updates of each part, on average
    probabilities: tuple[float, ...] = (1.0, 0.5, 0.25)  # of a part being updated in a step
    lr: float = 2e-3  # Adam's rate of the network
    sg_lr: float = 4e-3  # Adam's rate of synthesizers


@dataclass(frozen=True)
class Processes:
    """Two processes whose stages sleep 10 ms forward and 20 ms backward."""

    batches: int = 24  # per schedule
    staleness: int = 4  # how far a stage may be ahead


@cache
def _fashion() -> Labeled:
    x, y, xt, yt = fashion_mnist.load()
    return Labeled.from_arrays(x, y, xt, yt, 10)


def _problem(task: Task[Any], widths: tuple[int, ...], validation: int = 0) -> Problem:
    """A seed's data; each seed has training samples of its own."""
    s = task.settings
    return problem(
        task.workload,
        _fashion,
        rng=np.random.default_rng([task.seed, 29]),
        train=s.train,
        validation=validation,
        test=s.test,
        draw_test=False,
        standardize="sample",
        model=partial(network, widths=widths),
        device=task.device,
    )


def on_workload(s: Rules, workload: Labeled, scale: Scale) -> Rules:
    """Sizes that the user's data allow; refuses data and models that cannot be used."""
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    if workload.num_classes < 2 or size < 50 or tests < 20:
        raise InvalidInput(
            f"the study needs 2 classes, 50 training and 20 test samples at least; {workload.name} has "
            f"{workload.num_classes}, {size} and {tests}."
        )
    if workload.model is not None:
        example = torch.stack([torch.as_tensor(np.asarray(workload.train[i][0])) for i in range(4)]).float()
        cuts_of(build(fresh(workload.model), 0), example)
    val = min(s.val, size // 5)
    trained = min(s.train, size - val)
    return dataclasses.replace(s, train=trained, val=val, test=min(s.test, tests), batch=min(s.batch, trained // 2))


def rules(task: Task[Rules]) -> Measurements:
    """Test accuracy of every rule at the learning rate that validation chose."""
    s, seed, m = task.settings, task.seed, Measurements()
    p = _problem(task, s.widths, s.val)
    for rule in RULES:
        runs = [train(p, rule, seed=seed, steps=s.steps, batch=s.batch, lr=lr, sg_lr=s.sg_lr, checks=6) for lr in s.lrs]
        best = max(range(len(runs)), key=lambda i: runs[i].validation)
        m.add("test_accuracy", runs[best].test, arm=rule)
        m.add("lr", s.lrs[best], arm=rule)
        for i, value in enumerate(runs[best].curve, 1):
            m.add("accuracy_on_the_way", value, step=i * (s.steps // 6), arm=rule)
        if rule in ("cdni", "dni"):
            _quality(m, runs[best], p, rule)
    return m


def _quality(m: Measurements, run: Trained, p: Problem, arm: str) -> None:
    x, y = p.test
    found = sg_quality(run.net.train(), x[:512], y[:512], nn.CrossEntropyLoss())
    for i, of_cut in enumerate(found.values(), 1):
        for name in ("cosine", "relative_error", "sign"):
            m.add(name, of_cut[name], arm=arm, cut=i)


def depth(task: Task[Depth]) -> Measurements:
    """Accuracy by depth and cuts; representations of the deepest networks."""
    s, seed, m = task.settings, task.seed, Measurements()
    options: dict[str, Any] = {"steps": s.steps, "batch": s.batch, "lr": s.lr, "sg_lr": s.sg_lr}
    deepest: dict[str, Trained] = {}
    p = _problem(task, (s.width,) * s.depths[-1])
    for layers in s.depths:
        q = dataclasses.replace(p, make_model=partial(network, p.shape, p.num_classes, (s.width,) * layers))
        pair = {rule: train(q, rule, seed=seed, **options) for rule in ("bp", "cdni")}
        for rule, run in pair.items():
            m.add("depth_accuracy", run.test, arm=rule, depth=layers)
        m.add("shortfall", pair["bp"].test - pair["cdni"].test, arm="cdni", depth=layers)
        deepest = pair
    last = s.depths[-1]
    middle = train(p, "cdni", seed=seed, cuts=[f"hidden{last // 2}"], **options)
    m.add("depth_accuracy", middle.test, arm="one_cut", depth=last)
    deepest["other"] = train(p, "bp", seed=seed + OTHER, **options)
    _representations(m, p, deepest, [f"hidden{i + 1}" for i in range(last)], s.points, seed)
    return m


def _representations(
    m: Measurements, p: Problem, nets: dict[str, Trained], layers: list[str], points: int, seed: int
) -> None:
    """Dissimilarity matrices by layer, how alike they are between networks and between layers, and probes."""
    x, y = p.test
    order = torch.argsort(y[:points], stable=True)  # sorted by class
    shown = x[:points][order]
    matrices: dict[str, list[Any]] = {}
    half = len(x) // 2
    for arm, run in nets.items():
        acts = activations(run.net.model, layers, shown)
        matrices[arm] = [rdm(acts[name]) for name in layers]
        probed = activations(run.net.model, layers, x)
        accuracies = layer_probes(
            {k: v[:half] for k, v in probed.items()}, y[:half], {k: v[half:] for k, v in probed.items()}, y[half:]
        )
        for i, value in enumerate(accuracies.values(), 1):
            m.add("probe", value, arm=arm, layer=i)
        m.add("first_to_last", rdm_similarity(matrices[arm][0], matrices[arm][-1]), arm=arm)
        m.add(
            "steps_between_layers",
            float(np.mean([1 - rdm_similarity(a, b) for a, b in pairwise(matrices[arm])])),
            arm=arm,
        )
    for arm in ("cdni", "other"):
        for i, (a, b) in enumerate(zip(matrices["bp"], matrices[arm], strict=True), 1):
            m.add("similarity_to_bp", rdm_similarity(a, b), arm=arm, layer=i)
    if seed == 0:
        for arm in ("bp", "cdni"):
            m.array(f"rdm_{arm}", np.stack([d.numpy() for d in matrices[arm]]).astype(np.float32))


def linear(task: Task[Linear]) -> Measurements:
    """The gap to the optimum of linear networks."""
    s, m = task.settings, Measurements()
    g = torch.Generator().manual_seed(task.seed + 31)
    for d in s.dims:
        x = torch.randn(s.n, d, generator=g, dtype=torch.float64)
        clean = x @ torch.randn(d, generator=g, dtype=torch.float64) / d**0.5
        noise = torch.randn(s.n, generator=g, dtype=torch.float64)
        y, classes = clean + 0.1 * noise, (clean + 0.5 * noise > 0).double()
        runs = {
            "mse": linear_sg_convergence(x, y, steps=s.steps, lr=s.lr),
            "log": linear_sg_convergence(x, classes, loss="log", steps=s.steps, lr=s.lr),
            "blind": linear_sg_convergence(x, y, label=False, steps=s.steps // 4, lr=s.lr),
        }
        if d == s.dims[0]:
            runs["deep"] = linear_sg_convergence(x, y, depth=s.deep, steps=s.deep_steps, lr=s.deep_lr)
        for arm, run in runs.items():
            m.add("gap", abs(run.final_gap), arm=arm, dim=d)
            if arm in ("mse", "log"):
                for name, value in zip(("a", "b", "c"), run.weights, strict=True):
                    m.add(f"weight_{name}", value, arm=arm, dim=d)
                for step, gap in zip(run.steps, run.gap, strict=True):
                    m.add("gap_on_the_way", max(abs(float(gap)), 1e-17), step=int(step), arm=arm, dim=d)
    return m


def remember(task: Task[Remember]) -> Measurements:
    """Accuracy of recall over training, in chunks with and without synthetic gradients, and over the whole sequence."""
    s, seed, m = task.settings, task.seed, Measurements()
    arms = {"dni": 1.0, "dni_tenth": 0.1, "bptt": 0.0, "whole": 0.0}  # factor on what is injected
    for arm, scale in arms.items():
        truncate = s.blanks + 1 if arm == "whole" else s.truncate
        accuracies = _recall(s, seed, scale, truncate)
        m.add("recall", float(np.mean(accuracies)), arm=arm)  # over training: how soon
        m.add("recall_at_the_end", float(np.mean(accuracies[-10:])), arm=arm)
        reached = next((i for i, a in enumerate(accuracies) if a >= 0.95), s.updates)
        m.add("updates_to_95", reached, arm=arm)
        for i in range(0, len(accuracies), max(1, s.updates // 30)):
            m.add("recall_on_the_way", accuracies[i], step=i, arm=arm)
    return m


def _recall(s: Remember, seed: int, scale: float, truncate: int) -> list[float]:
    with seeded(seed):
        rnn, head, made = nn.RNN(2, s.units), nn.Linear(s.units, 2), SyntheticGradient(s.units, 2)
    net = DNIRecurrent(rnn, head, made, truncate=truncate, scale=scale, clip=s.clip, divisor=1.0 * s.rows)
    adam = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=s.lr)
    own = torch.optim.Adam(net.synthesizer.parameters(), lr=s.sg_lr)
    data = Recall(s.blanks, s.rows, seed)
    found = []
    for _ in range(s.updates):
        x, y, bit = data.draw()
        with torch.no_grad():
            found.append(float((net(x)[-1].argmax(-1) == bit).float().mean()))
        net.reset()
        for start in range(0, s.blanks + 1, truncate):  # T at least the length is plain backpropagation
            stop = min(start + truncate, s.blanks + 1)
            net.zero_grad(set_to_none=True)
            context = torch.eye(2)[bit]
            net.chunk(x[start:stop], y[start:stop], last_loss, context=context, last=stop > s.blanks)
            adam.step()
            own.step()
        net.reset()
    return found


def times(task: Task[Times]) -> Measurements:
    """Test accuracy after equal numbers of updates, however seldom a part has its turn."""
    s, m = task.settings, Measurements()
    p = _problem(task, s.widths)
    for probability in s.probabilities:
        steps = round(s.updates / probability)
        run = train(
            p, "cdni", seed=task.seed, steps=steps, batch=s.batch, lr=s.lr, sg_lr=s.sg_lr, probability=probability
        )
        m.add("times_accuracy", run.test, arm="cdni", probability=probability)
    return m


def processes(task: Task[Processes]) -> Measurements:
    """Steps per second of two processes, decoupled and one batch at a time."""
    s, m = task.settings, Measurements()
    given = batches(s.batches, task.seed)
    speeds = {}
    for arm, schedule in (("dni", "dni"), ("sequential", "sequential")):
        found = run_pipeline(
            sleeping_stage, given, stages=2, loss_fn=nn.CrossEntropyLoss(), schedule=cast(Any, schedule),
            context=Context("labels", CLASSES), max_staleness=s.staleness, timeout=120,
        )  # fmt: skip
        speeds[arm] = found.steps_per_second
        m.add("steps_per_second", speeds[arm], arm=arm)
        spans = np.concatenate([np.c_[np.full(len(st.spans), st.rank), st.spans] for st in found.stages])
        spans[:, 2:4] -= spans[:, 2].min()
        if task.seed == 0:
            m.array(f"spans_{arm}", spans)  # rank, kind, start, stop, step
        for row in found.summary():
            m.add("blocked_seconds", float(row["blocked"]), arm=arm, rank=int(row["rank"]))
    m.add("speedup", speeds["dni"] / speeds["sequential"], arm="dni")
    return m
