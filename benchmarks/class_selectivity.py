"""Speed of the selectivity regularizer in a training step, and of CCA between all pairs of layers.

``mlcollage bench class_selectivity`` prints the table. Times are CPU seconds of one thread, taken in
turns, so that other load on the machine falls on all alike; ratios are times over that of the row called baseline.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.measure.cca import cca, pairwise
from mlcollage.measure.layer_tap import LayerTap
from mlcollage.nn.init import build
from mlcollage.nn.resnet import ResNet
from mlcollage.papers.class_selectivity import SelectivityRegularizer

Row = dict[str, Any]
CLASSES = 10


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a run of a study has it
    try:
        return [*_steps(quick), *_terms(quick), *_all_pairs(quick)]
    finally:
        torch.set_num_threads(before)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """CPU seconds of each, the first's being its least and the others' by the median ratio to the first of their turn.

    A few per cent cannot be told from minima on a machine that others use; neighbors in time see the same load.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        order = list(runs) if turn % 2 else list(runs)[::-1]
        for name in order:
            start = time.process_time()
            runs[name]()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    first = np.array(next(iter(seconds.values())))
    return {name: float(first.min() * np.median(np.array(values) / first)) for name, values in seconds.items()}


def _pooled(h: Tensor) -> Tensor:
    return h.mean((2, 3)) if h.ndim == 4 else h


def one_hot_term(layers: list[Tensor], y: Tensor, classes: int = CLASSES) -> Tensor:
    """The formula as it is usually written: a one-hot product for each layer, gradients by autograd."""
    members = F.one_hot(y, classes).float()
    total = torch.zeros(())
    for h in layers:
        means = (members.T @ h) / members.sum(0)[:, None].clamp(min=1)
        top = means.max(0).values
        rest = (means.sum(0) - top) / (classes - 1)
        total = total + ((top - rest) / (top + rest + 1e-6)).mean()
    return total / len(layers)


def per_sample_term(layers: list[Tensor], y: Tensor) -> Tensor:
    """As in public code of a follow-up: sums gathered in a dictionary, sample by sample."""
    total = torch.zeros(())
    for h in layers:
        sums: dict[int, Any] = defaultdict(float)
        counts: dict[int, int] = defaultdict(int)
        for i, label in enumerate(y.tolist()):
            sums[label] = sums[label] + h[i]
            counts[label] += 1
        means = torch.stack([sums[c] / counts[c] for c in sums])
        top = means.max(0).values
        rest = (means.sum(0) - top) / (len(means) - 1)
        total = total + ((top - rest) / (top + rest + 1e-6)).mean()
    return total / len(layers)


def _steps(quick: bool) -> list[Row]:
    batch, repeats = (32, 7) if quick else (128, 15)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32, generator=g), torch.arange(batch) % 8  # four samples per class
    model = build(lambda: ResNet((3, 32, 32), CLASSES, blocks=(2, 2, 2, 2), width=64), 0)
    what = f"forward and backward, ResNet-18 shapes at 32x32, batch {batch}, 17 layers"

    def step(term: Callable[[], Tensor] | None = None) -> None:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        (loss if term is None else loss + term()).backward()

    def plain() -> None:
        step()

    def empty_hooks() -> None:
        with LayerTap(model, "relu", consume=lambda name, h: None, detach=False):
            step()

    def ours() -> None:
        with SelectivityRegularizer(model, -1.0, num_classes=CLASSES) as penalty:
            step(lambda: penalty(y))

    def other(term: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with LayerTap(model, "relu", reduce=_pooled, detach=False) as tap:
                step(lambda: term(list(tap.values()), y))

        return run

    runs = {
        "hooks that do nothing (baseline)": empty_hooks,
        "SelectivityRegularizer": ours,
        "no hooks": plain,
        "one-hot product for each layer": other(one_hot_term),
        "loop over samples": other(per_sample_term),
    }
    best = _in_turns(runs, repeats)
    base = best["hooks that do nothing (baseline)"]
    return [_row(name, what, seconds, "s", seconds / base) for name, seconds in best.items()]


def _terms(quick: bool) -> list[Row]:
    """The term alone, of responses that are averaged over space already."""
    rows = []
    for n, widths, classes in ((256, (64,) * 19, 10), (1024, (512,) * 17, 200)):
        g = torch.Generator().manual_seed(0)
        layers = [torch.rand(n, u, generator=g).requires_grad_() for u in widths]
        y = torch.randint(classes, (n,), generator=g)
        model = _Replay(layers)
        penalty = SelectivityRegularizer(model, -1.0, num_classes=classes, exclude_output=False)
        penalty.remove()

        def nothing(model: _Replay = model) -> None:
            with LayerTap(model, "relu", detach=False):
                model(None).backward()

        def ours(model: _Replay = model, y: Tensor = y, penalty: SelectivityRegularizer = penalty) -> None:
            with penalty:
                (model(None) + penalty(y)).backward()

        def one_hot(model: _Replay = model, y: Tensor = y, classes: int = classes) -> None:
            with LayerTap(model, "relu", detach=False) as tap:
                (model(None) + one_hot_term(list(tap.values()), y, classes)).backward()

        best = _in_turns({"nothing": nothing, "one-hot": one_hot, "ours": ours}, 8)
        base, mine = (best[name] - best["nothing"] for name in ("one-hot", "ours"))
        what = f"the term and its gradient alone, {n} samples, {len(widths)} layers of {widths[0]}, {classes} classes"
        rows += [
            _row("one-hot product for each layer (baseline)", what, 1e3 * base, "ms", 1.0),
            _row("SelectivityRegularizer", what, 1e3 * mine, "ms", mine / base),
        ]
    return rows


class _Replay(nn.Module):
    """Layers that give what they were made with, so that only the term is timed."""

    def __init__(self, layers: list[Tensor]) -> None:
        super().__init__()
        self.given = layers
        self.relus = nn.ModuleList(nn.ReLU() for _ in layers)

    def forward(self, x: Any) -> Tensor:
        return torch.stack([relu(h).sum() for relu, h in zip(self.relus, self.given, strict=True)]).sum()


def by_covariances(x: np.ndarray, y: np.ndarray, eps: float = 1e-6) -> float:
    """Mean canonical correlation as public CCA code has it: covariances and inverse square roots for each pair."""
    x, y = x - x.mean(0), y - y.mean(0)
    n = len(x)

    def root(s: np.ndarray) -> np.ndarray:
        values, vectors = scipy.linalg.eigh(s + eps * np.eye(len(s)))
        return (vectors / np.sqrt(values)) @ vectors.T

    middle = root(x.T @ x / n) @ (x.T @ y / n) @ root(y.T @ y / n)
    return float(np.linalg.svd(middle, compute_uv=False).mean())


def _all_pairs(quick: bool) -> list[Row]:
    widths = (64, 64, 64, 64, 64, 128, 128, 128) if quick else (64,) * 5 + (128,) * 4 + (256,) * 4 + (512,) * 4
    n = 3000 if quick else 10_000
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(n, 64))
    layers = {
        f"layer{i}": signal @ rng.normal(size=(64, p)) / 8 + rng.normal(size=(n, p)) for i, p in enumerate(widths)
    }
    names = list(layers)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]

    def ours() -> np.ndarray:
        return pairwise(layers).to_numpy()

    def again_for_each() -> list[float]:
        return [cca(layers[a], layers[b]).similarity for a, b in pairs]

    def covariances() -> list[float]:
        return [by_covariances(layers[a], layers[b]) for a, b in pairs]

    table = pairwise(layers)
    worst = max(abs(table.loc[a, b] - by_covariances(layers[a], layers[b])) for a, b in pairs[:5])
    assert worst < 1e-3, "both must compute the same"
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        best = _in_turns(
            {
                "covariances of each pair (baseline)": covariances,
                "factorized again for each pair": again_for_each,
                "one factorization per layer": ours,
            },
            2 if quick else 3,
        )
    base = best["covariances of each pair (baseline)"]
    what = f"CCA of all {len(pairs)} pairs of {len(widths)} layers of {min(widths)} to {max(widths)} units, {n} samples"
    return [_row(name, what, seconds, "s", seconds / base) for name, seconds in best.items()]


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench()))
