"""Training and rollouts of the study's models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage._random import derive, generator
from mlcollage.train import warmup_cosine

from ..baselines import VRNNIndep
from ..frames import TrackBatch
from ..macro import IntentModel
from ..macro_vrnn import MacroVRNN
from ..vrnn import AgentVRNN


@dataclass(frozen=True)
class Sequences:
    """Tracks to train or test on, with their intents."""

    x: Tensor  # (N, T, K, 2)
    seen: Tensor  # (N, T, K)
    intents: Tensor | None = None  # (N, T, K), or (N, T) where they are shared

    def batch(self, rows: Tensor | slice, frames: slice = slice(None)) -> TrackBatch:
        """Some sequences, and some frames of them."""
        g = None if self.intents is None else self.intents[rows][:, frames]
        return TrackBatch(self.x[rows][:, frames], g, self.seen[rows][:, frames])

    def scales(self) -> tuple[list[float], list[float], float]:
        """Mean and standard deviation of positions, and the standard deviation of steps."""
        x = self.x[self.seen]
        both = self.seen[:, 1:] & self.seen[:, :-1]
        step = (self.x[:, 1:] - self.x[:, :-1])[both]
        spread = x.std(0).clamp(min=1e-6)
        return x.mean(0).tolist(), spread.tolist(), float(step.std().clamp(min=1e-9))


@dataclass(frozen=True)
class Sizes:
    """Of worlds, networks and training; chosen in pilots with other seeds."""

    train: int = 2048  # sequences to train on
    test: int = 192  # sequences to compare with and to go on from
    every: int = 2  # frames of the world to one of a sequence
    burn_in: int = 5  # steps that are given before a rollout
    hidden: int = 32  # width of hidden layers
    rnn: int = 32  # width of the recurrent states
    z: int = 4  # width of the latents
    steps: int = 300  # updates
    batch: int = 24  # sequences of an update
    window: int = 10  # frames of a sequence that an update sees
    lr: float = 6e-3  # peak rate of Adam
    particles: int = 8  # of the likelihood's bound


def make(kind: str, data: Sequences, classes: int, shared: bool, s: Sizes, seed: int) -> AgentVRNN:
    """A fresh model: ``"macro"``, or ``"indep"`` without intents; tied weights, nearest others, steps as targets."""
    shift, scale, step = data.scales()
    k = data.x.shape[2]
    options: dict[str, Any] = {
        "z": s.z, "hidden": s.hidden, "rnn": s.rnn, "layers": 1, "min_std": 0.02, "agent_params": "tied",
        "context": "neighbors", "neighbors": min(k - 1, 7), "target": "step", "shift": shift, "scale": scale,
        "step_scale": step,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 1))
        if kind == "indep":
            return VRNNIndep(k, **options)
        return MacroVRNN(k, classes, shared, macro_params="separate", **options)


def macro_like(model: MacroVRNN, s: Sizes, seed: int) -> IntentModel:
    """A macro model whose agents read their own intents only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 2))
        return IntentModel(
            model.n_agents, model.n_intents, model.context_width, shared=False, groups=model.n_agents,
            hidden=s.hidden, rnn=s.rnn, layers=1, joint=False,
        )  # fmt: skip


def train(model: AgentVRNN, data: Sequences, s: Sizes, seed: int) -> list[float]:
    """Adam with a warm-up and a cosine; the losses. Batches depend on the seed only."""
    draw = generator(seed, 3)
    parts = [[p for n, p in model.named_parameters() if n.startswith("macro.") == macro] for macro in (False, True)]
    optimizer = torch.optim.Adam([p for part in parts for p in part], lr=s.lr, fused=True)
    schedule = warmup_cosine(s.steps, max(1, s.steps // 20))
    losses = []
    model.train()
    for step in range(s.steps):
        rows = torch.randint(len(data.x), (s.batch,), generator=draw)
        start = int(torch.randint(max(1, data.x.shape[1] - s.window + 1), (1,), generator=draw))
        terms = model.loss(data.batch(rows, slice(start, start + s.window)), generator=draw)
        optimizer.zero_grad()
        terms["loss"].backward()
        for part in parts:  # the two share no weights: each is clipped as if alone
            if part:
                nn.utils.clip_grad_norm_(part, 300.0)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * schedule(step)
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    return losses


def train_macro(macro: IntentModel, model: MacroVRNN, data: Sequences, s: Sizes, seed: int) -> None:
    """Train another macro model on the same batches."""
    draw, joint = generator(seed, 3), model.macro
    optimizer, schedule = (
        torch.optim.Adam(macro.parameters(), lr=s.lr, fused=True),
        warmup_cosine(s.steps, max(1, s.steps // 20)),
    )
    model.macro = macro
    for step in range(s.steps):
        rows = torch.randint(len(data.x), (s.batch,), generator=draw)
        start = int(torch.randint(max(1, data.x.shape[1] - s.window + 1), (1,), generator=draw))
        optimizer.zero_grad()
        model.intent_nll(data.batch(rows, slice(start, start + s.window))).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = s.lr * schedule(step)
        optimizer.step()
    model.macro = joint


def log_density(model: AgentVRNN, data: Sequences, particles: int, seed: int) -> float:
    """Bound of log p(x, g) in nats for each number, tracks given their first frame; without intents of log p(x).

    g is a function of x here, so that log p(x, g) is log p(x), less what the model gives to other intents.
    """
    batch = data.batch(slice(None))
    found = model.log_likelihood(batch, particles, generator=generator(seed, 4))
    if isinstance(model, MacroVRNN):
        with torch.no_grad():
            found = found - model.intent_nll(batch)
    numbers = (data.seen[:, 1:] & data.seen[:, :-1]).sum((1, 2)) * data.x.shape[-1]
    return float((found / numbers.clamp(min=1)).mean())


def to_numpy(x: Tensor) -> NDArray[np.float64]:
    """Rollouts (n, B, T, K, D) one after another, (n B, T, K, D)."""
    return x.flatten(0, 1).double().numpy()
