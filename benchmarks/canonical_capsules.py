"""Time and memory of attentive context normalization and of the Chamfer distance, beside the forms of published code.

``mlcollage bench canonical_capsules`` prints the table. Times are CPU seconds of one thread, taken in turns; peaks are
of the memory that torch allocates in a forward and backward pass, as its profiler counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mlcollage.data import procedural_shapes
from mlcollage.measure import chamfer_distance
from mlcollage.papers.canonical_capsules import attentive_context_norm

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio; ratios are over the published form."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_norms(8 if quick else 32), *_distances(2 if quick else 8), *_shapes(2000 if quick else 10_000)]
    finally:
        torch.set_num_threads(before)


def four_axes(x: Tensor, attention: Tensor) -> Tensor:
    """The norm with a tensor of clouds, capsules, channels and points, as published code has it."""
    share = attention / attention.sum(1, keepdim=True).clamp_min(1e-3)  # (B, N, K)
    values, weight = x.mT[:, :, None], share.mT[:, None]  # (B, C, 1, N), (B, 1, K, N)
    mean = (values * weight).sum(-1, keepdim=True)
    gap = values - mean  # (B, C, K, N)
    deviation = ((gap**2 * weight).sum(-1, keepdim=True) + 1e-3).sqrt()
    return (gap / deviation * attention.mT[:, None]).sum(2).mT


def expanded(x: Tensor, y: Tensor) -> Tensor:
    """The distance from expanded squares, all pairs at once."""
    d = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None] - 2 * x @ y.mT
    return d.amin(2).mean() + d.amin(1).mean()


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _seconds(functions: list[Callable[[], object]], repeats: int = 3) -> list[float]:
    best = [float("inf")] * len(functions)
    for function in functions:
        function()
    for _ in range(repeats):  # in turns, so that a busy machine hurts all alike
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - start)
    return best


def _peak(function: Callable[[], object]) -> float:
    """Largest sum of what is allocated at one time, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    total = most = 0
    for event in found.profiler.kineto_results.events() if found.profiler else []:
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most / 1e6


def _norms(clouds: int) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(clouds, 1024, 128, generator=draw).requires_grad_()
    attention = torch.randn(clouds, 1024, 10, generator=draw).softmax(-1)

    def backward(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(x, attention).square().sum(), x)

    both = [backward(attentive_context_norm), backward(four_axes)]
    ours, theirs = _seconds(both)
    small, large = (_peak(f) for f in both)
    what = f"context norm, {clouds} clouds of 1,024 points, 128 channels, 10 capsules, with gradient"
    return [
        _row("ours", what, ours, "s", ours / theirs),
        _row("four axes", what, theirs, "s", 1.0),
        _row("ours", "its peak memory", small, "MB", small / large),
        _row("four axes", "its peak memory", large, "MB", 1.0),
    ]


def _distances(clouds: int) -> list[Row]:
    rows = []
    for n in (256, 1024, 2048):
        shapes = torch.from_numpy(procedural_shapes("chair", 2 * clouds, n).points)
        x, y = shapes[:clouds].clone().requires_grad_(), shapes[clouds:]
        ours, theirs = _seconds(
            [
                lambda x=x, y=y: torch.autograd.grad(chamfer_distance(x, y), x),
                lambda x=x, y=y: torch.autograd.grad(expanded(x, y), x),
            ]
        )
        what = f"Chamfer distance, {clouds} pairs of {n:,} points, with gradient"
        rows += [_row("ours", what, ours, "s", ours / theirs), _row("expanded", what, theirs, "s", 1.0)]
    return rows


def _shapes(count: int) -> list[Row]:
    (seconds,) = _seconds([lambda: procedural_shapes(("plane", "chair"), count, 128)], 2)
    return [_row("ours", "procedural shapes of 128 points", count / seconds, "shapes/s")]
