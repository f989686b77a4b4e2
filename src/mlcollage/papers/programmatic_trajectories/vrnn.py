r"""Recurrent latent-variable models of several agents in one core: the official variants are rows of a table.

Given the frames, decoder and prior do not feed the recurrence, so only encoder and GRU run in the loop over time:

.. math::

    q(z_t \mid x_{t+1}, h_{t-1}) \to z_t, \qquad h_t = \mathrm{GRU}([x_{t+1}, z_t], h_{t-1}),

and prior, decoder and all products with inputs are computed for all frames at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._nets import GaussianNet, GroupedGRU, kl_normal, log_normal
from ._recurrence import recurrence
from .frames import TrackBatch, carried, centered, neighbor_features, steps_before, vector
from .macro import IntentModel, intent_code
from .rollout import Draws, plan_intents, roll_out

__all__ = ["AgentVRNN", "Wiring"]


@dataclass(frozen=True)
class Wiring:
    """Which inputs each network reads: x target, y context of the frame, g intent, z latent, h state.

    Parameters
    ----------
    encoder, prior, decoder, recurrent
        Names of inputs, in the order of the official weights' columns; ``"Z"`` is the latents of all agents.
    shared_rnn
        One recurrent network for all agents, which reads the context.
    """

    encoder: str = "xyh"
    prior: str = "yh"
    decoder: str = "yzh"
    recurrent: str = "xz"
    shared_rnn: bool = False


@dataclass(frozen=True)
class _Rows:
    """A batch in the layout of the networks, (G, T - 1, N, F); N is B, or K B where weights are tied."""

    known: dict[str, Tensor]  # x, y, and g for models with intents
    counts: Tensor  # 1 for entries of the target that count, as x
    unit: Tensor  # whether a unit is there, (G, T - 1, N, 1)
    batch: int
    jacobian: Tensor  # of each sequence, (B,): to be added to a log density of the scaled targets


class AgentVRNN(nn.Module):
    """A variational recurrent network for each agent, without macro-intents; base of the models of this paper.

    Parameters
    ----------
    n_agents
        K.
    wiring
        Which inputs each network reads.
    dim
        Coordinates of a position.
    z, hidden, rnn, layers
        Widths of the latent, of hidden layers and of the recurrent state, and number of recurrent layers.
    min_std
        Floor of standard deviations, in units of the scaled target; 0 is the official code, which can end in NaN on
        agents that stand still.
    agent_params
        ``"separate"``: each agent has weights of its own, as in the paper. ``"tied"``: all share them.
    context
        ``"joint"``: all agents' positions in their order, as in the paper. ``"neighbors"``: own position and last step,
        and the nearest others relative to it, so that agents may change places, come and go.
    neighbors
        How many others ``"neighbors"`` reads.
    target
        ``"position"``: the next position, as in the paper, or ``"step"``, the displacement to it. Both are densities of
        the next position, so their likelihoods compare.
    shift, scale
        Positions are scaled to (x - shift) / scale before anything reads them, (D,) or one number. Where positions are
        far from their origin, give them in double precision: the center is taken off before they are rounded.
    step_scale
        Displacements are divided by it; by default by ``scale``.
    """

    n_intents = 0
    shared_intent = False
    macro: IntentModel  # of models with intents
    shift: Tensor
    scale: Tensor
    step_scale: Tensor

    def __init__(
        self,
        n_agents: int,
        wiring: Wiring | None = None,
        *,
        dim: int = 2,
        z: int = 16,
        hidden: int = 200,
        rnn: int = 200,
        layers: int = 2,
        min_std: float = 1e-3,
        agent_params: str = "separate",
        context: str = "joint",
        neighbors: int | None = None,
        target: str = "position",
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        step_scale: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"n_agents": n_agents, "dim": dim, "z": z, "hidden": hidden, "rnn": rnn, "layers": layers}
        n_agents, dim, z, hidden, rnn, layers = (checks.integer(name, v, least=1) for name, v in sizes.items())
        self.n_agents, self.dim, self.z, self.rnn_width = n_agents, dim, z, rnn
        self.min_std = checks.real("min_std", min_std, least=0)
        self.agent_params = checks.choice("agent_params", agent_params, ("separate", "tied"))
        self.context = checks.choice("context", context, ("joint", "neighbors"))
        self.target = checks.choice("target", target, ("position", "step"))
        self.neighbors = min(
            n_agents - 1, n_agents if neighbors is None else checks.integer("neighbors", neighbors, least=0)
        )
        self.wiring = _wired(Wiring() if wiring is None else wiring, bool(self.n_intents))
        for name, value in (
            ("shift", shift),
            ("scale", scale),
            ("step_scale", scale if step_scale is None else step_scale),
        ):
            self.register_buffer(name, vector(name, value, dim, positive=name != "shift"))
        self.groups = n_agents if agent_params == "separate" else 1
        whole = n_agents * dim
        self.context_width = whole if context == "joint" else 2 * dim + self.neighbors * (2 * dim + 1)
        width = {"x": dim, "y": self.context_width, "g": self.n_intents, "z": z, "h": rnn, "Z": n_agents * z}
        parts = lambda names: {name: width[name] for name in names}  # noqa: E731
        self.encoder = GaussianNet(self.groups, parts(self.wiring.encoder), hidden, z, min_std)
        self.prior = GaussianNet(self.groups, parts(self.wiring.prior), hidden, z, min_std)
        self.decoder = GaussianNet(self.groups, parts(self.wiring.decoder), hidden, dim, min_std)
        shared = self.wiring.shared_rnn
        if shared and (agent_params == "tied" or context != "joint"):
            raise InvalidInput("one recurrent network for all agents needs separate weights and the joint context.")
        self.rnn = GroupedGRU(1 if shared else self.groups, parts(self.wiring.recurrent), rnn, layers)

    # --- from the user's layout (B, T, K, F) to that of the networks (G, T, N, F), and back

    def _by_group(self, v: Tensor) -> Tensor:
        b, t, k, _ = v.shape
        if self.groups == k:
            return v.permute(2, 1, 0, 3)
        return v.permute(1, 2, 0, 3).reshape(1, t, k * b, -1)

    def _by_agent(self, v: Tensor, batch: int) -> Tensor:
        """(G, T, N, F) to (B, T, K, F)."""
        g, t, n, f = v.shape
        if g == 1 and n != batch:
            return v.view(t, n // batch, batch, f).permute(2, 0, 1, 3)
        return v.permute(2, 1, 0, 3)

    def _context(self, x: Tensor, seen: Tensor, previous: Tensor | None = None) -> Tensor:
        """What is read of each frame, (B, T, K, C), from filled positions less the center."""
        u = x / self.scale
        if self.context == "joint":
            return u.flatten(2)[:, :, None].expand(-1, -1, self.n_agents, -1)
        return neighbor_features(u, steps_before(x, previous) / self.step_scale, seen, self.neighbors)

    def _target(self, x: Tensor, following: Tensor) -> Tensor:
        """What the decoder's density is of, in the model's own scale."""
        return following / self.scale if self.target == "position" else (following - x) / self.step_scale

    def _position(self, x: Tensor, target: Tensor) -> Tensor:
        """The next position less the center, in the user's unit."""
        return target * self.scale if self.target == "position" else x + target * self.step_scale

    def _check(self, x: Tensor) -> None:
        if x.shape[2:] != (self.n_agents, self.dim):
            raise InvalidInput(
                f"the model has {self.n_agents} agents with {self.dim} coordinates; got tracks {tuple(x.shape)}, "
                "expected (B, T, K, D)."
            )

    def _rows(self, batch: TrackBatch) -> _Rows:
        self._check(batch.x)
        seen = batch.seen()
        x = centered(batch.x, self.shift)
        return self._arranged(batch, carried(x, seen), seen, (seen[:, 1:] & seen[:, :-1])[..., None])

    def _arranged(self, batch: TrackBatch, x: Tensor, seen: Tensor, counts: Tensor) -> _Rows:
        """Filled centered positions (B, T, K, D), entries that count (B, T - 1, K, 1 or D), in the networks' layout."""
        known = {
            "x": self._by_group(self._target(x[:, :-1], x[:, 1:])),
            "y": self._by_group(self._context(x[:, :-1], seen[:, :-1])),
        }
        if self.n_intents:
            labels = self.labels(batch)[:, :-1]
            code = intent_code(labels, self.n_intents).to(x.dtype)
            known["g"] = self._by_group(code.expand(-1, -1, self.n_agents, -1))
        scale = self.scale if self.target == "position" else self.step_scale
        jacobian = -(counts * scale.log()).sum((1, 2, 3))
        unit = self._by_group(counts.any(-1, keepdim=True))
        return _Rows(known, self._by_group(counts), unit, len(x), jacobian)

    def labels(self, batch: TrackBatch) -> Tensor:
        """The batch's intents as (B, T, K), or (B, T, 1) where they are shared.

        Raises
        ------
        InvalidInput
            If there are none, or shape, type or classes do not fit.
        """
        g, (b, t, k, _) = batch.intents, batch.x.shape
        if g is None:
            raise InvalidInput("this model is conditioned on macro-intents: give them with the batch.")
        if g.is_floating_point() or g.dtype == torch.bool:
            raise InvalidInput(f"macro-intents must be whole numbers, -1 for none; got {g.dtype}.")
        if self.shared_intent and g.shape == (b, t, k):
            if not bool((g == g[..., :1]).all()):
                raise InvalidInput("the model's intents are shared; got intents that differ between agents.")
            g = g[..., 0]
        want = (b, t) if self.shared_intent else (b, t, k)
        if g.shape != want:
            raise InvalidInput(f"macro-intents must be {want}; got {tuple(g.shape)}.")
        g = g.long()
        if g.numel() and (int(g.min()) < -1 or int(g.max()) >= self.n_intents):
            raise InvalidInput(
                f"macro-intents run from {int(g.min())} to {int(g.max())}; the model knows 0 to {self.n_intents - 1}, "
                "and -1 for none."
            )
        return g[..., None] if self.shared_intent else g

    # --- training

    def forward(self, batch: Any, **options: Any) -> dict[str, Tensor]:
        """The same as :meth:`loss`, so that wrappers such as DistributedDataParallel see it."""
        return self.loss(batch, **options)

    def loss(
        self, batch: Any, *, generator: torch.Generator | None = None, eps: Tensor | None = None
    ) -> dict[str, Tensor]:
        r"""The negative evidence lower bound, averaged over sequences, in nats and in the user's unit.

        .. math::

            -\sum_{t, k} \mathbb{E}_q \log p(x_{t+1}^k \mid z_t^k, \cdot)
            + \sum_{t, k} \mathrm{KL}(q(z_t^k \mid x_{t+1}^k, \cdot) \,\|\, p(z_t^k \mid \cdot))

        Parameters
        ----------
        batch
            :class:`TrackBatch`, or a tensor, tuple or mapping that it can be made of.
        generator
            For the latents; by default torch's own.
        eps
            Standard normal numbers (B, T - 1, K, z) in the place of draws.

        Returns
        -------
        terms
            ``loss`` (to be minimized), ``nll``, ``kl``, and ``steps``: the mean number of steps that counted in a
            sequence. Steps with an end that was not seen count nothing and leave an agent's state as it is.
        """
        rows = self._rows(TrackBatch.of(batch))
        h, z, mean, std = self._filter(rows, eps, generator, 1)
        nll, kl = self._terms(rows, h, z, mean, std)
        b = rows.batch
        nll, kl = nll.sum() / b - rows.jacobian.mean(), kl.sum() / b
        return {"loss": nll + kl, "nll": nll, "kl": kl, "steps": rows.unit.sum() / b}

    def _terms(self, rows: _Rows, h: Tensor, z: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log density of the target and KL divergence, entry by entry, (G, T - 1, N, .)."""
        inputs = rows.known | {"h": h, "z": z}
        kl = kl_normal(mean, std, *self.prior(inputs)) * rows.unit
        return -log_normal(rows.known["x"], *self.decoder(inputs)) * rows.counts, kl

    def _draws(self, rows: _Rows, eps: Tensor | None, generator: torch.Generator | None, particles: int) -> Tensor:
        x = rows.known["x"]
        g, t, n, _ = x.shape
        if eps is None:
            return torch.randn(g, t, particles * n, self.z, generator=generator, dtype=x.dtype, device=x.device)
        return self._by_group(eps.to(x))

    def macro_context(self, context: Tensor, seen: Tensor) -> Tensor:
        """What the macro model reads of contexts (B, T, K, C): each agent's, or one where intents are shared."""
        if not self.shared_intent:
            return context
        if self.context == "joint":
            return context[:, :, :1]
        there = seen[..., None].to(context.dtype)
        return (context * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)

    def _h(self, states: Sequence[Tensor]) -> Tensor:
        """The last layer's state, for each group."""
        return states[-1].expand(self.groups, -1, -1)

    def _late(self, z: Tensor) -> dict[str, Tensor]:
        return {"z": z, "Z": z.permute(1, 0, 2).flatten(1)[None]} if self.wiring.shared_rnn else {"z": z}

    def _lifted(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """First products of encoder and recurrent network for all frames."""
        known = rows.known
        into = {name: v[:1] for name, v in known.items()} if self.wiring.shared_rnn else known
        return self.encoder.lift(known), self.rnn.lift(into)

    def _cut(self) -> tuple[Tensor, Tensor]:
        """The columns of encoder and recurrent network that the loop multiplies."""
        return self.encoder.late_weight("h"), self.rnn.late_weight("zZ")

    def _advance(
        self, pre: Tensor, z: Tensor, states: list[Tensor], there: Tensor | None, weight: Tensor | None = None
    ) -> list[Tensor]:
        """The next states; those of agents that are not there stay."""
        new = self.rnn.step(pre, self._late(z), states, weight)
        if there is None or self.wiring.shared_rnn:
            return new
        return [torch.where(there, a, b) for a, b in zip(new, states, strict=True)]

    def _filter(
        self, rows: _Rows, eps: Tensor | None, generator: torch.Generator | None, particles: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States before each frame, latents, means and deviations of the posterior, all (G, T - 1, N, .)."""
        draws = self._draws(rows, eps, generator, particles)
        encoder, recurrent = self._lifted(rows)
        there = None if bool(rows.unit.all()) else _tile(rows.unit, particles)
        if particles == 1 and (fused := recurrence(self.encoder, self.rnn, encoder, recurrent, draws, there)):
            return fused
        read, write = self._cut()
        states = self.rnn.initial(draws.shape[2], draws)
        kept: list[tuple[Tensor, ...]] = []
        for t in range(draws.shape[1]):
            h = self._h(states)
            mean, std = self.encoder.late(_tile(encoder[:, t], particles), {"h": h}, read)
            z = mean + std * draws[:, t]
            kept.append((h, z, mean, std))
            still = None if there is None else there[:, t]
            states = self._advance(_tile(recurrent[:, t], particles), z, states, still, write)
        h, z, mean, std = (torch.stack(part, 1) for part in zip(*kept, strict=True))
        return h, z, mean, std

    @torch.no_grad()
    def latent_use(
        self, batch: Any, *, active: float = 0.01, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """What the latents carry; a bound can look fine although they carry nothing.

        Parameters
        ----------
        batch
            As :meth:`loss` takes it.
        active
            A dimension is active if its mean KL divergence is above this, in nats a step of an agent.
        generator
            For the latents; by default torch's own.

        Returns
        -------
        use
            ``kl``, in nats a step of an agent; ``active``, the number of active dimensions; ``gain``, by how many nats
            a step the decoder does worse with latents from the prior. Steps that do not count are left out.

        Examples
        --------
        >>> sorted(AgentVRNN(3, z=2, hidden=8, rnn=8).latent_use(torch.randn(4, 9, 3, 2)))
        ['active', 'gain', 'kl']
        """
        active, was = checks.positive("active", active), self.training
        self.eval()
        try:
            rows = self._rows(TrackBatch.of(batch))
            h, z, mean, std = self._filter(rows, None, generator, 1)
            inputs = rows.known | {"h": h}
            mean_p, std_p = self.prior(inputs)
            steps = rows.unit.sum().clamp(min=1)
            kl = (kl_normal(mean, std, mean_p, std_p) * rows.unit).sum((0, 1, 2)) / steps  # of each dimension
            blind = mean_p + std_p * torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            fits = [
                (log_normal(rows.known["x"], *self.decoder(inputs | {"z": v})) * rows.counts).sum() / steps
                for v in (z, blind)
            ]
        finally:
            self.train(was)
        return {"kl": float(kl.sum()), "active": float((kl > active).sum()), "gain": float(fits[0] - fits[1])}

    @torch.no_grad()
    def at_floor(self, batch: Any, *, generator: torch.Generator | None = None) -> float:
        """Share of numbers whose standard deviation is near the floor, below twice ``min_std``.

        Each such number earns nearly the highest density there can be: a few agents that stand still can decide a
        comparison of likelihoods. 0 where there is no floor.

        Parameters
        ----------
        batch
            As :meth:`loss` takes it.
        generator
            For the latents; by default torch's own.

        Examples
        --------
        >>> AgentVRNN(3, z=2, hidden=8, rnn=8).at_floor(torch.randn(4, 9, 3, 2))
        0.0
        """
        was = self.training
        self.eval()
        try:
            rows = self._rows(TrackBatch.of(batch))
            h, z, _, _ = self._filter(rows, None, generator, 1)
            std = self.decoder(rows.known | {"h": h, "z": z})[1]
        finally:
            self.train(was)
        counts = rows.counts.expand_as(std)
        low = (std < 2 * self.min_std) & counts
        return float(low.sum() / counts.sum().clamp(min=1))

    # --- bounds

    @torch.no_grad()
    def log_likelihood(
        self,
        batch: Any,
        n_particles: int = 64,
        bound: str = "iwae",
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""A lower bound of each sequence's log-likelihood given its first frame, in nats and in the user's unit.

        Parameters
        ----------
        batch
            As :meth:`loss` takes it. Models with intents are conditioned on those of the batch.
        n_particles
            S, draws of the latents.
        bound
            ``"elbo"``: mean over draws of the evidence lower bound. ``"iwae"``: :math:`\log \frac1S \sum_s w_s`, with
            weights of whole sequences, all agents together. ``"fivo"``: the same by a particle filter, which draws
            particles anew by their weights when these become uneven; much tighter for long sequences.
        generator
            For the latents; by default torch's own.

        Returns
        -------
        bound
            (B,). All bounds rise to the log-likelihood with S, the last two exactly.
        """
        checks.integer("n_particles", n_particles, least=1)
        checks.choice("bound", bound, ("elbo", "iwae", "fivo"))
        was = self.training
        self.eval()
        try:
            rows = self._rows(TrackBatch.of(batch))
            find = self._particle_filter if bound == "fivo" else self._importance
            return find(rows, n_particles, bound, generator) + rows.jacobian
        finally:
            self.train(was)

    def _importance(self, rows: _Rows, s: int, bound: str, generator: torch.Generator | None) -> Tensor:
        h, z, mean, std = self._filter(rows, None, generator, s)
        many = _Rows(
            {k: _tile(v, s) for k, v in rows.known.items()},
            _tile(rows.counts, s),
            _tile(rows.unit, s),
            s * rows.batch,
            rows.jacobian,
        )
        if bound == "elbo":
            nll, kl = self._terms(many, h, z, mean, std)
            return self._by_sequence(-nll.sum(-1) - kl.sum(-1), s, rows.batch).mean(0)
        return _log_mean(self._by_sequence(self._log_weights(many, h, z, mean, std), s, rows.batch))

    def _log_weights(self, rows: _Rows, h: Tensor, z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log p(x, z) / q(z) of each unit and frame, (G, T - 1, N)."""
        inputs = rows.known | {"h": h, "z": z}
        latent = log_normal(z, *self.prior(inputs)) - log_normal(z, mean, std)
        seen = log_normal(rows.known["x"], *self.decoder(inputs)) * rows.counts
        return (latent * rows.unit).sum(-1) + seen.sum(-1)

    def _by_sequence(self, v: Tensor, s: int, batch: int) -> Tensor:
        """Sums over frames and agents of (G, T - 1, N), by particle and sequence: (S, B)."""
        total = v.sum(1)  # (G, N), N = s, (agent,) sequence
        return total.reshape(total.shape[0], s, -1, batch).sum((0, 2))

    def _particle_filter(self, rows: _Rows, s: int, bound: str, generator: torch.Generator | None) -> Tensor:
        draws = self._draws(rows, None, generator, s)
        encoder, recurrent = self._lifted(rows)
        states = self.rnn.initial(draws.shape[2], draws)
        b = rows.batch
        logw = draws.new_zeros(s, b)
        total = draws.new_zeros(b)
        for t in range(draws.shape[1]):
            h = self._h(states)
            mean, std = self.encoder.late(_tile(encoder[:, t], s), {"h": h})
            z = mean + std * draws[:, t]
            frame = _Rows(
                {k: _tile(v[:, t : t + 1], s) for k, v in rows.known.items()},
                _tile(rows.counts[:, t : t + 1], s),
                _tile(rows.unit[:, t : t + 1], s),
                s * b,
                rows.jacobian,
            )
            step = self._log_weights(frame, h[:, None], z[:, None], mean[:, None], std[:, None])
            logw = logw + self._by_sequence(step, s, b)
            there = frame.unit[:, 0]
            states = self._advance(_tile(recurrent[:, t], s), z, states, there)
            share = logw.softmax(0)
            # Drawing anew when the effective number falls below half keeps it a bound: the rule reads the past only.
            uneven = 1 / (share**2).sum(0) < s / 2
            if bool(uneven.any()) and t < draws.shape[1] - 1:
                total = total + torch.where(uneven, _log_mean(logw), 0.0)
                chosen = _systematic(share, generator)  # (S, B)
                chosen = torch.where(uneven, chosen, torch.arange(s, device=chosen.device)[:, None])
                logw = torch.where(uneven, 0.0, logw)
                states = [self._pick(v, chosen, s, b) for v in states]
        return total + _log_mean(logw)

    def _pick(self, v: Tensor, chosen: Tensor, s: int, b: int) -> Tensor:
        """States (G, S N, F) of the chosen particles (S, B)."""
        g, _, f = v.shape
        parts = v.view(g, s, -1, b, f)
        index = chosen[None, :, None, :, None].expand(g, s, parts.shape[2], b, f)
        return parts.gather(1, index).view_as(v)

    # --- rollouts

    @torch.no_grad()
    def sample(
        self,
        burn_in: Tensor,
        steps: int,
        intents: Any = None,
        n: int = 1,
        *,
        history: Any = None,
        latent: str = "posterior",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Continue tracks freely.

        Parameters
        ----------
        burn_in
            What was seen, (B, T, K, D) or one sequence (T, K, D); frames that are not finite were not seen.
        steps
            Frames to generate.
        intents
            Macro-intents of the steps, for models that have them: whole numbers (steps, K) or (B, steps, K), without K
            where they are shared, -1 where the model is free; or ``intents(t, x, probabilities)``, called at each step
            with the positions so far (n B, t, K, D) and the model's probabilities (n B, K, M), which returns (n B, K).
            None leaves all to the model.
        n
            Rollouts of each sequence.
        history
            Intents of the burn-in's frames, (B, T, K), or a labeling function, which is applied to the burn-in alone;
            None or -1 lets the model draw them.
        latent
            Of the burn-in: ``"posterior"`` given what was seen, or ``"prior"``, as the official code draws.
        generator
            For all draws; by default torch's own.

        Returns
        -------
        x
            (n, B, T + steps, K, D), in the wider floating type of burn-in and model; agents that were not seen in the
            burn-in's last frame are NaN in the steps.
        g
            The intents of all frames but the last, (n, B, T + steps - 1, K) or without K; None for models without.

        Raises
        ------
        InvalidInput
            If shapes or classes do not fit; the sentence names both sizes.
        """
        checks.integer("steps", steps, least=1)
        checks.integer("n", n, least=1)
        checks.choice("latent", latent, ("posterior", "prior"))
        if (
            not isinstance(burn_in, Tensor)
            or burn_in.ndim not in (3, 4)
            or burn_in.shape[-2:] != (self.n_agents, self.dim)
        ):
            got = f"{type(burn_in).__name__} {tuple(getattr(burn_in, 'shape', ()))}"
            raise InvalidInput(
                f"burn_in must be a tensor (B, T, {self.n_agents}, {self.dim}), or without B; got {got}."
            )
        seen = burn_in[None] if burn_in.ndim == 3 else burn_in
        if not seen.is_floating_point() or 0 in seen.shape:
            raise InvalidInput(
                f"burn_in must be a float tensor with a frame at least; got {seen.dtype} {tuple(seen.shape)}."
            )
        plan = plan_intents(self, seen, steps, intents, history, n)
        was = self.training
        self.eval()
        try:
            x, g = roll_out(self, seen.repeat(n, 1, 1, 1), steps, plan, Draws(generator), latent)
        finally:
            self.train(was)
        x = x.view(n, len(seen), *x.shape[1:])
        return x, None if g is None else g.view(n, len(seen), *g.shape[1:])


def _wired(wiring: Wiring, intents: bool) -> Wiring:
    """The table, if each network reads something that there is where it stands."""
    known = {"encoder": "xyh", "prior": "yh", "decoder": "yzh", "recurrent": "xyZ" if wiring.shared_rnn else "xyz"}
    for name, may in known.items():
        letters, may = getattr(wiring, name), may + ("g" if intents else "")
        wrong = [v for v in letters if v not in may]
        if not letters or wrong or len(set(letters)) != len(letters):
            raise InvalidInput(f"{name} of a Wiring reads some of {', '.join(may)}, each once; got {letters!r}.")
    return wiring


def _tile(v: Tensor, s: int) -> Tensor:
    """Rows (..., N, F) s times after one another."""
    return v if s == 1 else torch.cat([v] * s, -2)


def _log_mean(v: Tensor) -> Tensor:
    return v.logsumexp(0) - math.log(len(v))


def _systematic(share: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices (S, B) of particles drawn by their shares (S, B), with one uniform number a column."""
    s, b = share.shape
    u = torch.rand(b, 1, generator=generator, dtype=share.dtype, device=share.device)
    points = (torch.arange(s, device=share.device, dtype=share.dtype) + u) / s
    return torch.searchsorted(share.T.cumsum(1).contiguous(), points.contiguous()).clamp(max=s - 1).T
