"""Speed of neural mechanics: what tracking adds to a step of a ResNet, the reductions alone, and detection.

``mlcollage bench neural_mechanics`` prints the table. Steps with and without the tracker take turns in one process, on
one thread, and CPU time is compared; ratios are to the row called baseline of the same comparison.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mlcollage.nn.resnet import ResNet
from mlcollage.papers.neural_mechanics import ConservationTracker, SymmetrySet, find_symmetries

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    repeats = 5 if quick else 15
    try:
        # The layout of ResNet-18 at full size; ResNet-20, the paper's CIFAR size, for the quick table.
        blocks, width = ((3, 3, 3), 16) if quick else ((2, 2, 2, 2), 64)
        torch.manual_seed(0)
        model = ResNet((3, 32, 32), 10, blocks=blocks, width=width)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(128, 3, 32, 32, generator=generator)
        y = torch.randint(10, (128,), generator=generator)
        rows, laws = _detection(model, x[:4])
        return [*rows, *_reductions(model, laws, repeats), *_tracking(model, laws, x, y, repeats)]
    finally:
        torch.set_num_threads(before)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _cpu(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _detection(model: torch.nn.Module, x: torch.Tensor) -> tuple[list[Row], SymmetrySet]:
    structural = _cpu(lambda: find_symmetries(model, x, F.cross_entropy, method="structural"))
    start = time.process_time()
    laws = find_symmetries(model, x, F.cross_entropy)
    both = time.process_time() - start
    found = f"{len(laws)} families, {laws.n_laws} laws"
    return [
        _row("structural", f"find_symmetries of a ResNet ({found})", structural, "CPU s"),
        _row("both", "the same, confirmed by numbers in float64", both, "CPU s"),
    ], laws


def _reductions(model: torch.nn.Module, laws: SymmetrySet, repeats: int) -> list[Row]:
    """One reduction of all laws against reading and writing the parameters once (a copy)."""
    theta = {name: value.detach() for name, value in model.named_parameters()}
    grads = {name: torch.randn_like(value) for name, value in theta.items()}
    target = {name: torch.empty_like(value) for name, value in theta.items()}

    def copy() -> None:
        for name, value in theta.items():
            target[name].copy_(value)

    def reduce() -> None:
        laws.bilinear(theta, grads)

    def singly() -> None:
        for law in laws:
            law.bilinear(theta, grads) if law.kind != "translation" else law.linear(grads)

    times = {run.__name__: statistics.median(_cpu(run) for _ in range(4 * repeats)) for run in (copy, reduce, singly)}
    return [
        _row("baseline", "copy of all parameters", 1e3 * times["copy"], "CPU ms", 1.0),
        _row("reduce", "all laws in one pass", 1e3 * times["reduce"], "CPU ms", times["reduce"] / times["copy"]),
        _row("singly", "all laws, family by family", 1e3 * times["singly"], "CPU ms", times["singly"] / times["copy"]),
    ]


def _tracking(model: torch.nn.Module, laws: SymmetrySet, x: torch.Tensor, y: torch.Tensor, repeats: int) -> list[Row]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    arms: dict[str, dict[str, Any] | None] = {
        "baseline": None,
        "every=1": {"every": 1},
        "every=1, no budget": {"every": 1, "budget": False},
        "every=10": {"every": 10},
    }
    step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):  # arms take turns, so that a busy machine slows all of them
        for name, settings in arms.items():
            if settings is None:
                times[name].append(_cpu(step))
                continue
            with ConservationTracker(model, optimizer, laws, **settings):
                step()  # its first step sets up
                several = settings["every"]
                times[name].append(_cpu(lambda n=several: [step() for _ in range(n)]) / several)
    middle = {name: statistics.median(values) for name, values in times.items()}
    what = "a step of SGD on 128 images"
    return [
        _row(
            name, what if name == "baseline" else f"{what}, tracked", 1e3 * value, "CPU ms", value / middle["baseline"]
        )
        for name, value in middle.items()
    ]
