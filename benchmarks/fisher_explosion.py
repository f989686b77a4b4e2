"""Cost of the trace of the Fisher matrix, side by side with BackPACK, Opacus, curvlinops and a plain SGD step.

``mlcollage bench fisher_explosion`` prints the table. All times are CPU time on one thread, the best of several
repetitions that take turns. Estimators differ in how much one draw tells, so they are compared at equal standard
error: the time of a draw, times the draws that bring the standard error to 1% of the trace. Ratios are to the row
called baseline of the same comparison; below 1 is faster. A fraction of a draw counts as one.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.measure.fisher import fisher_trace
from mlcollage.measure.grad_norms import per_example_grad_sqnorm
from mlcollage.nn.init import seeded
from mlcollage.nn.resnet import ResNet
from mlcollage.papers.fisher_explosion import FisherPenalty
from mlcollage.train.replicas import Replicas
from mlcollage.train.sam import SAM

Row = dict[str, Any]
Draw = Callable[[torch.Generator], float]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a run of a study has it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own deprecations
            return [*_steps(quick), *_traces(quick), *_exact(quick), *_penalties(quick), *_stacked(quick)]
    finally:
        torch.set_num_threads(before)


# What is measured on ------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A network trained for a few steps, so that its probabilities are no longer alike, and a batch."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    def step(self, model: nn.Module | None = None) -> Callable[[], None]:
        """A plain SGD step, at a learning rate that changes nothing."""
        model = self.model if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(self.x), self.y).backward()
            optimizer.step()

        return run


def _mlp(inputs: int = 784, hidden: int = 256) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def _task(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], steps: int = 30) -> Task:
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (shape[0],), generator=rng)
    x = torch.randn(10, *shape[1:], generator=rng)[y] * 0.3 + torch.randn(*shape, generator=rng)
    with seeded(0):
        model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Task(name, model.eval(), x, y)


def _resnet(norm: str) -> nn.Module:
    return ResNet((3, 32, 32), 10, blocks=(1, 1, 1), width=16, norm=norm)


def _tasks() -> list[Task]:
    return [
        _task("MLP 784-256-256-10, batch 128", _mlp, (128, 784)),
        _task("MLP 784-1024-1024-10, batch 128", lambda: _mlp(hidden=1024), (128, 784)),
        _task("ResNet-8 GroupNorm, batch 64", lambda: _resnet("group"), (64, 3, 32, 32), 5),
        _task("ResNet-8 BatchNorm (eval), batch 64", lambda: _resnet("batch"), (64, 3, 32, 32), 5),
    ]


# How time is taken --------------------------------------------------------------------------------------------------


def take_turns(functions: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Seconds of CPU time of the fastest call of each; they take turns, so that all see the same machine."""
    best = []
    for f in functions:
        f()
        start = time.process_time()
        f()
        best.append(time.process_time() - start)
    inner = [max(1, math.ceil(0.02 / b)) for b in best]
    end = time.process_time() + seconds
    while time.process_time() < end:
        for i, f in enumerate(functions):
            start = time.process_time()
            for _ in range(inner[i]):
                f()
            best[i] = min(best[i], (time.process_time() - start) / inner[i])
    return best


def row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    """One line of the table."""
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


# One draw against one SGD step ----------------------------------------------------------------------------------------


def _steps(quick: bool) -> list[Row]:
    rows = []
    for task in _tasks():
        rng = torch.Generator().manual_seed(1)
        step, drawn, norms = take_turns(
            [
                task.step(),
                lambda t=task, g=rng: fisher_trace(t.model, t.x, method="mc", generator=g),
                lambda t=task: per_example_grad_sqnorm(t.model, F.cross_entropy, t.x, t.y),
            ],
            4 if quick else 20,
        )
        rows += [
            row("SGD step (baseline)", task.name, 1e3 * step, "ms", 1.0),
            row("Monte-Carlo Tr(F), one draw", task.name, 1e3 * drawn, "ms", drawn / step),
            row("per-example gradient norms", task.name, 1e3 * norms, "ms", norms / step),
        ]
    return rows


# Estimators of the trace at equal standard error ----------------------------------------------------------------------


def _ours(task: Task) -> Draw:
    return lambda g: fisher_trace(task.model, task.x, method="mc", generator=g).value


def _ours_minibatch(task: Task) -> Draw:
    return lambda g: fisher_trace(task.model, task.x, method="minibatch", generator=g).value


def _sampled(model: nn.Module, x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = model(x)
    return logits, torch.multinomial(logits.detach().softmax(1), 1, generator=g)[:, 0]


def _backpack_norms(task: Task) -> Draw:
    """Squared norms for labels drawn from the model."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, loss_fn = extend(copy.deepcopy(task.model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def draw(g: torch.Generator) -> float:
        model.zero_grad()
        logits, y = _sampled(model, task.x, g)
        with backpack(BatchL2Grad()):
            loss_fn(logits, y).backward()
        return float(sum(p.batch_l2 for p in model.parameters()).mean())

    return draw


def _backpack_diagonal(task: Task) -> Draw:
    """The diagonal of the Monte-Carlo GGN, summed."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNMC

    model, loss_fn = extend(copy.deepcopy(task.model)), extend(nn.CrossEntropyLoss())

    def draw(g: torch.Generator) -> float:
        model.zero_grad()
        seed = int(torch.randint(2**31, (1,), generator=g))
        with seeded(seed), backpack(DiagGGNMC(mc_samples=1)):
            loss_fn(model(task.x), task.y).backward()
        return float(sum(p.diag_ggn_mc.sum() for p in model.parameters()))

    return draw


def _opacus_ghost(task: Task) -> Draw:
    """Ghost norms, as of its ghost clipping, for labels drawn from the model."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(task.model).train(), loss_reduction="sum", use_ghost_clipping=True
    )

    def draw(g: torch.Generator) -> float:
        model.zero_grad()
        logits, y = _sampled(model, task.x, g)
        F.cross_entropy(logits, y, reduction="sum").backward()
        return float(model.get_norm_sample().square().mean())

    return draw


def _opacus_gradients(task: Task) -> Draw:
    """Gradients of all examples."""
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(copy.deepcopy(task.model).train(), loss_reduction="sum")

    def draw(g: torch.Generator) -> float:
        model.zero_grad()
        logits, y = _sampled(model, task.x, g)
        F.cross_entropy(logits, y, reduction="sum").backward()
        return float(sum(p.grad_sample.flatten(1).square().sum(1) for p in model.parameters()).mean())

    return draw


def _curvlinops(task: Task) -> Draw:
    """Hutchinson's estimate with one vector on the exact GGN, which is the Fisher matrix here."""
    from curvlinops import GGNLinearOperator, hutchinson_trace

    params = list(task.model.parameters())
    ggn = GGNLinearOperator(task.model, nn.CrossEntropyLoss(), params, [(task.x, task.y)], check_deterministic=False)

    def draw(g: torch.Generator) -> float:
        with seeded(int(torch.randint(2**31, (1,), generator=g))):
            return float(hutchinson_trace(ggn, 1))

    return draw


PEERS: dict[str, Callable[[Task], Draw]] = {
    "ours, Monte Carlo (baseline)": _ours,
    "ours, mini-batch identity": _ours_minibatch,
    "BackPACK, BatchL2Grad": _backpack_norms,
    "BackPACK, DiagGGNMC": _backpack_diagonal,
    "Opacus, ghost norms": _opacus_ghost,
    "Opacus, GradSampleModule": _opacus_gradients,
    "curvlinops, GGN and Hutchinson": _curvlinops,
}
# BackPACK has no GroupNorm and no second-order rule for a network that is no Sequential; Opacus refuses BatchNorm.
LEFT_OUT = {"GroupNorm": ("BackPACK",), "BatchNorm": ("Opacus", "BackPACK, DiagGGNMC")}


def _traces(quick: bool) -> list[Row]:
    """Milliseconds to a standard error of 1% of the trace."""
    rows = []
    for task in _tasks():
        left_out = next((names for kind, names in LEFT_OUT.items() if kind in task.name), ())
        draws = {name: make(task) for name, make in PEERS.items() if not name.startswith(left_out or ("none",))}
        truth = fisher_trace(task.model, task.x).value
        rng = torch.Generator().manual_seed(2)
        costs = take_turns([lambda d=d, g=rng: d(g) for d in draws.values()], 6 if quick else 40)
        # Labels drawn one by one have one standard error, whoever draws them; ours is measured with many draws.
        many = fisher_trace(task.model, task.x, method="mc", draws=100, generator=rng)
        values = {}
        for (name, draw), seconds in zip(draws.items(), costs, strict=True):
            per_label = "Hutchinson" not in name and "mini-batch" not in name
            count = 30 if quick else 100
            spread = 10 * many.stderr if per_label else float(torch.tensor([draw(rng) for _ in range(count)]).std())
            values[name] = 1e3 * seconds * max(1.0, (spread / (0.01 * truth)) ** 2)
        base = values["ours, Monte Carlo (baseline)"]
        what = f"Tr(F) to a standard error of 1%, {task.name}"
        rows += [row(name, what, v, "ms", v / base) for name, v in values.items()]
    return rows


def _exact(quick: bool) -> list[Row]:
    """The exact trace for ten classes."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    task = _tasks()[0]
    model, loss_fn = extend(copy.deepcopy(task.model)), extend(nn.CrossEntropyLoss())

    def theirs() -> None:
        model.zero_grad()
        with backpack(DiagGGNExact()):
            loss_fn(model(task.x), task.y).backward()

    step, ours, diagonal = take_turns(
        [task.step(), lambda: fisher_trace(task.model, task.x), theirs], 3 if quick else 15
    )
    what = f"exact Tr(F), {task.name}"
    return [
        row("SGD step (baseline)", what, 1e3 * step, "ms", 1.0),
        row("ours, exact", what, 1e3 * ours, "ms", ours / step),
        row("BackPACK, DiagGGNExact", what, 1e3 * diagonal, "ms", diagonal / step),
    ]


# The penalty ----------------------------------------------------------------------------------------------------------


WAYS: dict[str, dict[str, Any] | None] = {
    "plain SGD (baseline)": None,
    "FP, interval 10": {"interval": 10},
    "FP every step, double backprop": {"interval": 1},
    "FP every step, jvp": {"interval": 1, "mode": "jvp"},
    "FP every step, finite difference": {"interval": 1, "mode": "finite_difference"},
    "Tr(F) per example every step": {"interval": 1, "estimator": "per_example"},
    "SAM": {},
}


def _penalties(quick: bool) -> list[Row]:
    """Training steps with a penalty, beside a plain one; ten at a time, so that interval 10 is active once."""
    rows = []
    for task in (_tasks()[0], _tasks()[3]):
        costs = take_turns([_ten_steps(task, way, options) for way, options in WAYS.items()], 8 if quick else 40)
        what = f"a training step, {task.name}"
        rows += [
            row(way, what, 1e2 * seconds, "ms", seconds / costs[0]) for way, seconds in zip(WAYS, costs, strict=True)
        ]
    return rows


def _ten_steps(task: Task, way: str, options: dict[str, Any] | None) -> Callable[[], None]:
    model = copy.deepcopy(task.model)
    sam = SAM(model.parameters(), torch.optim.SGD, lr=0.0) if way == "SAM" else None
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty = FisherPenalty(model, 0.1, **options) if options else None

    def closure() -> Tensor:
        loss = F.cross_entropy(model(task.x), task.y)
        loss.backward()
        return loss

    def step() -> None:
        if sam is not None:
            sam.step(closure)
            return
        sgd.zero_grad()
        logits = model(task.x)
        loss = F.cross_entropy(logits, task.y)
        if penalty is not None and penalty.mode == "double_backprop":
            loss = loss + penalty(logits, task.x)
        loss.backward()
        if penalty is not None and penalty.mode != "double_backprop":
            penalty.add_gradient_(lambda: model(task.x))
        sgd.step()

    def run() -> None:
        for _ in range(10):
            step()

    return run


def _stacked(quick: bool, size: int = 8) -> list[Row]:
    """Training steps of eight small networks with FP, as one stack and one after the other."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 64, generator=rng), torch.randint(0, 10, (64,), generator=rng)

    def stack(stacked: bool) -> Callable[[], None]:
        replicas = Replicas(lambda: _mlp(64, 64), range(size), lr=0.0, stacked=stacked)
        penalty = FisherPenalty(replicas, 0.1, interval=10)

        def objective() -> Tensor:
            logits = replicas(x)
            return torch.stack([F.cross_entropy(z, y) for z in logits]) + penalty(logits)

        def run() -> None:
            for _ in range(10):
                replicas.update(objective)

        return run

    alone = [_ten_steps(Task("", _mlp(64, 64), x, y), "FP", {"interval": 10}) for _ in range(size)]

    def one_by_one() -> None:
        for run in alone:
            run()

    single, stacked, looped = take_turns([one_by_one, stack(True), stack(False)], 4 if quick else 20)
    what = f"a training step of {size} networks with FP, interval 10, MLP 64-64-64-10, batch 64"
    return [
        row("networks trained one after the other (baseline)", what, 1e2 * single, "ms", 1.0),
        row("Replicas, stacked", what, 1e2 * stacked, "ms", stacked / single),
        row("Replicas, called one after the other", what, 1e2 * looped, "ms", looped / single),
    ]


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench()))
