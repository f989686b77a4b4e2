"""The paper's rivals: VRNNs without macro-intents, a recurrent Gaussian, and a recurrent autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._nets import GaussianNet, kl_normal, log_normal
from .frames import TrackBatch, carried, centered, placed, vector
from .vrnn import AgentVRNN, Wiring, _Rows

__all__ = ["VRAEMI", "RNNGauss", "VRNNIndep", "VRNNMixed", "VRNNSingle"]


class VRNNIndep(AgentVRNN):
    """A VRNN with a state of its own for each agent; every net reads all positions.

    Parameters
    ----------
    n_agents
        K.
    options
        As :class:`AgentVRNN` has them.

    Examples
    --------
    >>> VRNNIndep(3, z=2, hidden=8, rnn=8).log_likelihood(torch.randn(4, 9, 3, 2), n_particles=2).shape
    torch.Size([4])
    """

    def __init__(self, n_agents: int, **options: Any) -> None:
        super().__init__(n_agents, Wiring("xyh", "yh", "yzh", "xz"), **options)


class VRNNMixed(AgentVRNN):
    """A latent for each agent, and one recurrent network for all of them.

    Parameters
    ----------
    n_agents
        K.
    options
        As :class:`AgentVRNN` has them.

    Examples
    --------
    >>> VRNNMixed(3, z=2, hidden=8, rnn=8).sample(torch.randn(4, 3, 2), steps=5)[0].shape
    torch.Size([1, 1, 9, 3, 2])
    """

    def __init__(self, n_agents: int, **options: Any) -> None:
        super().__init__(n_agents, Wiring("xyh", "yh", "yzh", "yZ", shared_rnn=True), **options)


class VRNNSingle(AgentVRNN):
    """One VRNN whose unit is the whole scene.

    Parameters
    ----------
    n_agents
        K.
    dim
        Coordinates of a position.
    options
        As :class:`AgentVRNN` has them.

    Examples
    --------
    >>> VRNNSingle(3, z=2, hidden=8, rnn=8).sample(torch.randn(4, 3, 2), steps=5)[0].shape
    torch.Size([1, 1, 9, 3, 2])
    """

    def __init__(self, n_agents: int, *, dim: int = 2, **options: Any) -> None:
        n_agents, dim = checks.integer("n_agents", n_agents, least=1), checks.integer("dim", dim, least=1)
        if options.get("context", "joint") != "joint":
            raise InvalidInput("a single network reads the joint context.")
        for name in ("shift", "scale", "step_scale"):
            if options.get(name) is not None:
                options[name] = vector(name, options[name], dim, positive=name != "shift").repeat(n_agents)
        super().__init__(1, Wiring("xyh", "yh", "yzh", "xz"), dim=n_agents * dim, **options)
        self.players = (n_agents, dim)

    def _check(self, x: Tensor) -> None:
        if x.shape[2:] != self.players:
            raise InvalidInput(f"the model has {self.players} agents and coordinates; got tracks {tuple(x.shape)}.")

    def _rows(self, batch: TrackBatch) -> _Rows:
        self._check(batch.x)
        seen = batch.seen()
        x = carried(centered(batch.x, self.shift.view(self.players)), seen).flatten(2)[:, :, None]
        counts = (seen[:, 1:] & seen[:, :-1])[..., None].expand(-1, -1, -1, self.players[1])
        return self._arranged(batch, x, seen.any(-1, keepdim=True), counts.flatten(2)[:, :, None])

    @torch.no_grad()
    def sample(self, burn_in: Tensor, steps: int, intents: Any = None, n: int = 1, **options: Any) -> Any:
        """As :meth:`AgentVRNN.sample`; agents that were not seen last stay where they were seen."""
        if not isinstance(burn_in, Tensor) or burn_in.ndim not in (3, 4):
            got = f"{type(burn_in).__name__} {tuple(getattr(burn_in, 'shape', ()))}"
            raise InvalidInput(f"burn_in must be a tensor (B, T, K, D), or without B; got {got}.")
        seen = burn_in[None] if burn_in.ndim == 3 else burn_in
        self._check(seen)
        shift = self.shift.view(self.players)
        filled = placed(carried(centered(seen, shift), seen.isfinite().all(-1)), shift, seen)
        x, g = super().sample(filled.flatten(2)[:, :, None], steps, intents, n, **options)
        return x.unflatten(-1, self.players).squeeze(3), g


class _Gauss(nn.Module):
    """What the two models that are no VRNN share: scales, one GRU over all positions, and checks."""

    shift: Tensor
    scale: Tensor

    def __init__(self, n_agents: int, dim: int, rnn: int, layers: int, shift: Any, scale: Any) -> None:
        super().__init__()
        self.n_agents, self.dim = checks.integer("n_agents", n_agents, least=1), checks.integer("dim", dim, least=1)
        self.register_buffer("shift", vector("shift", shift, self.dim, positive=False))
        self.register_buffer("scale", vector("scale", scale, self.dim, positive=True))
        rnn, layers = checks.integer("rnn", rnn, least=1), checks.integer("layers", layers, least=1)
        self.rnn = nn.GRU(self.n_agents * self.dim, rnn, layers, batch_first=True)

    def _read(self, batch: Any) -> tuple[Tensor, Tensor, TrackBatch]:
        """Scaled positions (B, T, K, D), which steps count (B, T - 1, K), and the batch."""
        made = TrackBatch.of(batch)
        if made.x.shape[2:] != (self.n_agents, self.dim):
            raise InvalidInput(
                f"the model has {self.n_agents} agents with {self.dim} coordinates; got {tuple(made.x.shape)}."
            )
        seen = made.seen()
        u = carried(centered(made.x, self.shift), seen) / self.scale
        return u, seen[:, 1:] & seen[:, :-1], made

    def forward(self, batch: Any, **options: Any) -> dict[str, Tensor]:
        """The same as ``loss``, so that wrappers such as DistributedDataParallel see it."""
        return self.loss(batch, **options)

    def loss(self, batch: Any, **options: Any) -> dict[str, Tensor]:
        """Of each model."""
        raise NotImplementedError

    def _start(self, burn_in: Tensor, steps: int, n: int) -> tuple[Tensor, int]:
        checks.integer("steps", steps, least=1)
        checks.integer("n", n, least=1)
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
        u = carried(centered(seen, self.shift), seen.isfinite().all(-1)) / self.scale
        return u.repeat(n, 1, 1, 1), len(seen)


class RNNGauss(_Gauss):
    """A recurrent network over all positions and one Gaussian for the next; no latent, so its likelihood is exact.

    Parameters
    ----------
    n_agents, dim
        K and D.
    hidden, rnn, layers
        Widths and number of recurrent layers.
    min_std, shift, scale
        As :class:`AgentVRNN` has them.
    first_frame
        Score the first frame too, from a state of zeros, as the official code does. By default it is given, as it is to
        all other models.

    Examples
    --------
    >>> sorted(RNNGauss(3, hidden=8, rnn=8).loss(torch.randn(4, 9, 3, 2)))
    ['loss', 'nll', 'steps']
    """

    def __init__(
        self,
        n_agents: int,
        *,
        dim: int = 2,
        hidden: int = 250,
        rnn: int = 900,
        layers: int = 2,
        min_std: float = 1e-3,
        shift: Any = 0.0,
        scale: Any = 1.0,
        first_frame: bool = False,
    ) -> None:
        super().__init__(n_agents, dim, rnn, layers, shift, scale)
        hidden, min_std = checks.integer("hidden", hidden, least=1), checks.real("min_std", min_std, least=0)
        self.decoder = GaussianNet(1, {"h": self.rnn.hidden_size}, hidden, self.n_agents * self.dim, min_std)
        self.first_frame = first_frame

    def loss(self, batch: Any, **options: Any) -> dict[str, Tensor]:
        """``loss`` and ``nll``: mean over sequences of the negative log-likelihood, in the user's unit; ``steps``."""
        nll, counts = self._nll(batch)
        return {"loss": nll.mean(), "nll": nll.mean(), "steps": counts.sum() / len(nll)}

    def _nll(self, batch: Any) -> tuple[Tensor, Tensor]:
        u, counts, made = self._read(batch)
        if self.first_frame:
            counts = torch.cat([made.seen()[:, :1], counts], 1)
        out, _ = self.rnn(u.flatten(2)[:, :-1])
        if self.first_frame:
            out = torch.cat([torch.zeros_like(out[:, :1]), out], 1)
        mean, std = self.decoder({"h": out[None]})
        target = u if self.first_frame else u[:, 1:]
        found = log_normal(target.flatten(2), mean[0], std[0]).unflatten(-1, (self.n_agents, self.dim))
        return ((self.scale.log() - found) * counts[..., None]).sum((1, 2, 3)), counts

    @torch.no_grad()
    def log_likelihood(self, batch: Any, n_particles: int = 1, bound: str = "exact", **options: Any) -> Tensor:
        """Log-likelihood of each sequence, (B,), in the user's unit; exact, whatever is asked for."""
        return -self._nll(batch)[0]

    @torch.no_grad()
    def sample(
        self,
        burn_in: Tensor,
        steps: int,
        intents: Any = None,
        n: int = 1,
        *,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Continue tracks freely: (n, B, T + steps, K, D) and None; ``eps`` (steps, n B, K D) stands for draws."""
        if intents is not None:
            raise InvalidInput("RNNGauss has no macro-intents.")
        first, b = self._start(burn_in, steps, n)
        u = list(first.flatten(2).unbind(1))
        out, state = self.rnn(torch.stack(u, 1))
        for t in range(steps):
            mean, std = (v[0] for v in self.decoder({"h": out[None, :, -1]}))
            draw = (
                torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
                if eps is None
                else eps[t]
            )
            u.append(mean + std * draw)
            out, state = self.rnn(u[-1][:, None], state)
        made = torch.stack(u, 1).unflatten(-1, (self.n_agents, self.dim)) * self.scale
        made = placed(made, self.shift, burn_in)
        return made.view(n, b, *made.shape[1:]), None


class VRAEMI(_Gauss):
    r"""A recurrent autoencoder with one latent for a whole sequence, and a term that keeps z readable from x.

    Its loss is that of a variational autoencoder with a standard normal prior, plus the entropy :math:`H(q(z \mid x))`
    and the negative log density of z under a discriminator that reads the sequence.

    Parameters
    ----------
    n_agents, dim
        K and D.
    z, hidden, rnn, layers
        Widths and number of recurrent layers.
    min_std, shift, scale
        As :class:`AgentVRNN` has them.
    entropy
        ``"exact"``, or ``"official"``, which has the standard deviation in the place of the variance.

    Examples
    --------
    >>> sorted(VRAEMI(3, z=2, hidden=8, rnn=8).loss(torch.randn(4, 9, 3, 2)))
    ['discriminator', 'entropy', 'kl', 'loss', 'nll', 'steps']
    """

    def __init__(
        self,
        n_agents: int,
        *,
        dim: int = 2,
        z: int = 16,
        hidden: int = 200,
        rnn: int = 200,
        layers: int = 2,
        min_std: float = 1e-3,
        shift: Any = 0.0,
        scale: Any = 1.0,
        entropy: str = "exact",
    ) -> None:
        super().__init__(n_agents, dim, rnn, layers, shift, scale)
        self.entropy = checks.choice("entropy", entropy, ("exact", "official"))
        self.z, rnn = checks.integer("z", z, least=1), self.rnn.hidden_size
        hidden, min_std = checks.integer("hidden", hidden, least=1), checks.real("min_std", min_std, least=0)
        self.encoder = GaussianNet(1, {"h": rnn}, hidden, self.z, min_std)
        self.discriminator = GaussianNet(1, {"h": rnn}, hidden, self.z, min_std)
        self.decoder = GaussianNet(self.n_agents, {"z": self.z, "h": rnn}, hidden, self.dim, min_std)

    def loss(
        self, batch: Any, *, generator: torch.Generator | None = None, eps: Tensor | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Means over sequences: ``loss``, the sum of ``nll``, ``kl``, ``entropy`` and ``discriminator``; ``steps``.

        ``eps`` (B, z) stands for draws.
        """
        u, counts, _ = self._read(batch)
        b = len(u)
        out, _ = self.rnn(u.flatten(2))
        mean, std = (v[0] for v in self.encoder({"h": out[None, :, -1]}))
        draw = torch.randn(mean.shape, generator=generator, dtype=u.dtype, device=u.device) if eps is None else eps
        z = mean + std * draw
        nll = -self._log_density(u, out[:, :-1], z, counts).sum() / b
        kl = kl_normal(mean, std, torch.zeros_like(mean), torch.ones_like(std)).sum() / b
        inside = std if self.entropy == "official" else std**2
        # The official sign: minus the entropy, which is added to the loss.
        entropy = -0.5 * (2 * math.pi * math.e * inside).log().sum() / b
        read = self.discriminator({"h": out[None, :, -2]})
        discriminator = -log_normal(z, read[0][0], read[1][0]).sum() / b
        total = nll + kl + entropy + discriminator
        terms = {"nll": nll, "kl": kl, "entropy": entropy, "discriminator": discriminator}
        return {"loss": total, **terms, "steps": counts.sum() / b}

    def _log_density(self, u: Tensor, h: Tensor, z: Tensor, counts: Tensor) -> Tensor:
        """Log p(x | z) of sequences (B,), in the user's unit; h (B, T - 1, rnn), z (B, z)."""
        k = self.n_agents
        inputs: Mapping[str, Tensor] = {
            "z": z[None, :, None].expand(k, -1, h.shape[1], -1),
            "h": h[None].expand(k, -1, -1, -1),
        }
        mean, std = self.decoder(inputs)  # (K, B, T - 1, D)
        found = log_normal(u[:, 1:].permute(2, 0, 1, 3), mean, std) - self.scale.log()
        return (found * counts.permute(2, 0, 1)[..., None]).sum((0, 2, 3))

    @torch.no_grad()
    def log_likelihood(
        self, batch: Any, n_particles: int = 64, bound: str = "iwae", *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Lower bound of each sequence's log-likelihood, (B,), in the user's unit: ``"elbo"`` or ``"iwae"``."""
        checks.choice("bound", bound, ("elbo", "iwae"))
        u, counts, _ = self._read(batch)
        out, _ = self.rnn(u.flatten(2))
        mean, std = (v[0] for v in self.encoder({"h": out[None, :, -1]}))
        zero, one = torch.zeros_like(mean), torch.ones_like(std)
        logw = []
        for _ in range(checks.integer("n_particles", n_particles, least=1)):
            z = mean + std * torch.randn(mean.shape, generator=generator, dtype=u.dtype, device=u.device)
            latent = (log_normal(z, zero, one) - log_normal(z, mean, std)).sum(-1)
            logw.append(self._log_density(u, out[:, :-1], z, counts) + latent)
        w = torch.stack(logw)
        return w.mean(0) if bound == "elbo" else w.logsumexp(0) - math.log(len(w))

    @torch.no_grad()
    def sample(
        self,
        burn_in: Tensor,
        steps: int,
        intents: Any = None,
        n: int = 1,
        *,
        generator: torch.Generator | None = None,
        eps: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, None]:
        """Continue tracks freely with one latent from the prior: (n, B, T + steps, K, D) and None.

        ``eps``, (n B, z) and (steps, K, n B, D), stands for draws.
        """
        if intents is not None:
            raise InvalidInput("VRAEMI has no macro-intents.")
        first, b = self._start(burn_in, steps, n)
        u = list(first.unbind(1))
        rows, dtype, device = len(first), first.dtype, first.device
        z = torch.randn(rows, self.z, generator=generator, dtype=dtype, device=device) if eps is None else eps[0]
        out, state = self.rnn(torch.stack(u, 1).flatten(2))
        for t in range(steps):
            inputs = {"z": z.expand(self.n_agents, -1, -1), "h": out[None, :, -1].expand(self.n_agents, -1, -1)}
            mean, std = self.decoder(inputs)
            draw = (
                torch.randn(mean.shape, generator=generator, dtype=dtype, device=device) if eps is None else eps[1][t]
            )
            u.append((mean + std * draw).transpose(0, 1))
            out, state = self.rnn(u[-1].flatten(1)[:, None], state)
        made = placed(torch.stack(u, 1) * self.scale, self.shift, burn_in)
        return made.view(n, b, *made.shape[1:]), None
