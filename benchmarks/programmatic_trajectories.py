"""Labeling functions against a Python loop, the fused VRNN against a loop over time and agents, and the worlds.

``mlcollage bench programmatic_trajectories`` prints the table. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcollage.papers.programmatic_trajectories import BoidsWorld, HalfCourtWorld, Stationary, VRNNIndep

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio; ratios are over the loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_labels(quick), *_steps(quick), *_worlds()]
    finally:
        torch.set_num_threads(before)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def loop_labels(track: np.ndarray, threshold: float = 0.5) -> list[int]:
    """One track's labels frame by frame, from the last to the first."""

    def cell(p: np.ndarray) -> int:
        inside = np.clip(p, 0, [45 - 1e-4, 50 - 1e-4])
        return int(inside[0] // 5) * 10 + int(inside[1] // 5)

    still = [np.linalg.norm(track[t + 1] - track[t]) < threshold for t in range(len(track) - 1)] + [True]
    out = [cell(track[-1])]
    for t in range(len(track) - 2, -1, -1):
        out.append(cell(track[t]) if still[t] and not still[t + 1] else out[-1])
    return out[::-1]


def _labels(quick: bool) -> list[Row]:
    n, some = 10_000, 20 if quick else 100
    x = np.random.default_rng(0).normal(0, 0.4, (n, 50, 11, 2)).cumsum(1) + 25
    label = Stationary(threshold=0.5, per_frame=True)
    ours = _seconds(lambda: label(x), 2)
    label(x[:1])  # compiles
    loop = _seconds(lambda: [loop_labels(x[i, :, k]) for i in range(some) for k in range(11)], 1) * n / some
    what = "stationary labels of (10,000, 50, 11)"
    return [_row(f"Python loop (from {some})", what, loop, "s", 1.0), _row("ours", what, ours, "s", ours / loop)]


def loop_loss(model: VRNNIndep, x: Tensor, draws: Tensor) -> Tensor:
    """The same loss by a loop over time and agents, all networks inside, as the official code computes it."""

    def net(net: Any, k: int, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        a = torch.cat(inputs, -1)
        for layer in (net.first, net.second):
            a = F.relu(F.linear(a, layer.weight[k], layer.bias[k]))
        mean, raw = F.linear(a, net.heads.weight[k], net.heads.bias[k]).chunk(2, -1)
        return mean, F.softplus(raw) + net.min_std

    b, t, agents, _ = x.shape
    rnn = model.rnn
    states = [[x.new_zeros(b, rnn.hidden) for _ in rnn.into] for _ in range(agents)]
    total = x.new_zeros(())
    for s in range(t - 1):
        y = x[:, s].flatten(1)
        for k in range(agents):
            h, target = states[k][-1], x[:, s + 1, k]
            mean, std = net(model.encoder, k, [target, y, h])
            mean_p, std_p = net(model.prior, k, [y, h])
            z = mean + std * draws[:, s, k]
            mean_d, std_d = net(model.decoder, k, [y, z, h])
            total = total + (std_p.log() - std.log() + (std**2 + (mean - mean_p) ** 2) / (2 * std_p**2) - 0.5).sum()
            total = total - torch.distributions.Normal(mean_d, std_d).log_prob(target).sum()
            a = torch.cat([target, z], -1)
            for layer in range(len(rnn.into)):
                into, back = rnn.into[layer], rnn.back[layer]
                weights = (into.weight[k], back.weight[k], into.bias[k], back.bias[k])
                a = torch._VF.gru_cell(a, states[k][layer], *weights)  # type: ignore[attr-defined]
                states[k][layer] = a
    return total / b


def _steps(quick: bool) -> list[Row]:
    rows = []
    for b, k in ((16, 5), (16, 10)) if quick else ((16, 5), (16, 10), (128, 5)):
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = VRNNIndep(k, z=16, hidden=64, rnn=64)
        x = torch.randn(b, 50, k, 2, generator=draw).cumsum(1)
        draws = torch.randn(b, 49, k, 16, generator=draw)

        def fused(x: Tensor = x, draws: Tensor = draws, model: VRNNIndep = model) -> Tensor:
            return model.loss(x, eps=draws)["loss"]

        def looped(x: Tensor = x, draws: Tensor = draws, model: VRNNIndep = model) -> Tensor:
            return loop_loss(model, x, draws)

        assert torch.allclose(fused(), looped(), rtol=1e-4)
        times = [_seconds(lambda call=call: call().backward(), 3) for call in (looped, fused)]
        what = f"loss and gradients of {k} VRNNs, batch {b}, 50 frames"
        rows += [_row("loop over time and agents", what, times[0], "s", 1.0)]
        rows += [_row("ours", what, times[1], "s", times[1] / times[0])]
    return rows


def _worlds() -> list[Row]:
    flocks = _seconds(lambda: BoidsWorld.draw(4096, seed=0), 2)
    plays = _seconds(lambda: HalfCourtWorld.draw(4096, seed=0), 2)
    return [
        _row("BoidsWorld", "4,096 sequences of 50 frames", flocks, "s"),
        _row("HalfCourtWorld", "4,096 plays of 50 frames", plays, "s"),
    ]
