"""Time and memory of the loss of Barlow Twins: its direct form, as published, against the Gram form.

``mlcollage bench barlow_twins`` prints the table. Times are CPU seconds of one thread for loss and gradients, taken in
turns; peaks are of the memory that torch allocates beyond the embeddings, as its profiler counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mlcollage.papers.barlow_twins import barlow_twins_loss
from mlcollage.train import two_view_augment

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio; ratios are over the published form."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for n, d, repeats in ((256, 2048, 3), (256, 8192, 1), (2048, 2048, 1)):
            if quick and n == d:
                continue
            rows += _compared(n, d, repeats)
        return [*rows, *_alone(128, 32_768), *_views(quick)]
    finally:
        torch.set_num_threads(before)


def published(z_a: Tensor, z_b: Tensor, lambd: float = 0.0051) -> Tensor:
    """As in the official code: a batch norm without parameters, C, and its flattened off-diagonal."""
    norm = torch.nn.BatchNorm1d(z_a.shape[1], affine=False)
    c = norm(z_a).T @ norm(z_b)
    c.div_(len(z_a))
    on = torch.diagonal(c).add(-1).pow(2).sum()
    d = len(c)
    off = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().pow(2).sum()
    return on + lambd * off


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _embeddings(n: int, d: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, d, generator=g)
    return a.requires_grad_(), (a.detach() + torch.randn(n, d, generator=g)).requires_grad_()


def _gradients(loss: Callable[[Tensor, Tensor], Tensor], views: tuple[Tensor, Tensor]) -> None:
    torch.autograd.grad(loss(*views), views)


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def peak(call: Callable[[], Any]) -> float:
    """Most bytes that torch had allocated at one time within a call, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    # Allocations and releases in the order of their time; what a call frees may be older than it.
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return float(max(np.cumsum(sizes), default=0)) / 1e6


def _compared(n: int, d: int, repeats: int) -> list[Row]:
    views = _embeddings(n, d)
    calls = {
        "published form": lambda: _gradients(published, views),
        "ours, auto": lambda: _gradients(lambda a, b: barlow_twins_loss(a, b, check=False), views),
        "ours, auto, checked": lambda: _gradients(barlow_twins_loss, views),
    }
    seconds = {name: _seconds(call, repeats if name == "published form" else 5) for name, call in calls.items()}
    peaks = {name: peak(call) for name, call in calls.items()}
    what = f"loss and gradients, N={n:,} D={d:,}"
    first, least = seconds["published form"], peaks["published form"]
    return [
        *(_row(name, what, s, "s", s / first) for name, s in seconds.items()),
        *(_row(name, f"extra peak memory, N={n:,} D={d:,}", p, "MB", p / least) for name, p in peaks.items()),
    ]


def _alone(n: int, d: int) -> list[Row]:
    """Where C would have four billion bytes: only ours."""
    views = _embeddings(n, d)
    call = lambda: _gradients(barlow_twins_loss, views)  # noqa: E731
    what = f"N={n:,} D={d:,}"
    return [
        _row("ours, auto", f"loss and gradients, {what}", _seconds(call, 3), "s"),
        _row("ours, auto", f"extra peak memory, {what}", peak(call), "MB"),
    ]


def _views(quick: bool) -> list[Row]:
    """Two views of a batch of small images, beside kornia's own pipeline where that is installed."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(256, 3, 32, 32, generator=g)
    augment = two_view_augment(32)
    ours = _seconds(lambda: augment(x, g), 3 if quick else 9)
    rows = [_row("two_view_augment", "two views of 256 images of 32 by 32", ours, "s")]
    try:
        import kornia.augmentation as K
    except ImportError:
        return rows
    shared = [K.RandomResizedCrop((32, 32), (0.08, 1.0)), K.RandomHorizontalFlip()]
    shared += [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    blurs = [K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=p) for p in (1.0, 0.1)]
    first = torch.nn.Sequential(*shared, blurs[0])
    second = torch.nn.Sequential(*shared, blurs[1], K.RandomSolarize(p=0.2))
    theirs = _seconds(lambda: (first(x), second(x)), 3 if quick else 9)
    return [_row("kornia", rows[0]["what"], theirs, "s"), rows[0] | {"ratio": ours / theirs}]
