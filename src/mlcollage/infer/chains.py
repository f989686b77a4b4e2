"""What a sampler returns: the draws, and how the sampler fared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.infer.density import State
from mlcollage.infer.export import to_arviz
from mlcollage.infer.health import Health, split_rhat

Part = int | slice | Sequence[int] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Info:
    """How one iteration went, a value per chain.

    Attributes
    ----------
    accept : Tensor
        (chains,), acceptance probability; for NUTS its mean over the trajectory. Zero where the energy was not finite.
    accepted : Tensor
        (chains,) bool, whether the chain moved.
    energy : Tensor
        (chains,), Hamiltonian of the state that was kept.
    error : Tensor
        (chains,), energy error of the trajectory, proposed minus starting Hamiltonian; for NUTS the largest.
    diverging : Tensor
        (chains,) bool, whether the error passed 1000 or was not finite.
    steps : Tensor
        (chains,), leapfrog steps taken.
    """

    accept: Tensor
    accepted: Tensor
    energy: Tensor
    error: Tensor
    diverging: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Chains:
    """Draws of several chains, with what diagnostics need.

    Attributes
    ----------
    draws : Tensor
        (chains, draws, dim), or (chains, draws, ...) of what ``store`` made of each position; (chains, 0) if it kept
        nothing.
    log_prob : Tensor
        (chains, draws), log-density at each draw, untempered.
    accept : Tensor
        (chains, draws), acceptance probability of the iteration.
    energy : Tensor
        (chains, draws), Hamiltonian, of the tempered density.
    diverging : Tensor
        (chains, draws) bool; with thinning, whether any iteration since the draw before diverged.
    steps : Tensor
        (chains, draws), leapfrog steps since the draw before.
    step_size : Tensor
        (groups,): one, or one per chain.
    mass : Tensor or None
        (groups, dim), the diagonal, or (groups, dim, dim); None for the identity.
    state : State
        Where the chains stand at the end; ``state.position`` continues them as ``init``.
    pooled : bool
        Whether all chains sample the same density, and are to agree.
    moved : Tensor or None
        (chains,) bool, which chains warm-up found in a region without mass, and set to where another one was.
    nonfinite : Tensor or None
        (chains, draws) bool, whether the energy at the end of a trajectory was infinite or not a number; these diverged
        too.
    mean_steps : float or None
        Leapfrog steps of an iteration, on average, where the sampler chose how many; None where they were given.
    """

    draws: Tensor
    log_prob: Tensor
    accept: Tensor
    energy: Tensor
    diverging: Tensor
    steps: Tensor
    step_size: Tensor
    mass: Tensor | None
    state: State
    pooled: bool = True
    moved: Tensor | None = None
    nonfinite: Tensor | None = None
    mean_steps: float | None = None

    @property
    def divergences(self) -> int:
        """Number of draws with a divergence, over all chains."""
        return int(self.diverging.sum())

    @property
    def accept_rate(self) -> Tensor:
        """Mean acceptance probability of each chain, (chains,)."""
        return self.accept.mean(dim=1)

    def health(self) -> Health:
        """Acceptance and divergences of each chain, and R-hat of each dimension (of ``log_prob`` if no draw was kept).

        Samplers warn of what it finds; ``health().sentences()`` says it again.

        Examples
        --------
        >>> import torch
        >>> from mlcollage.infer import hmc
        >>> chains = hmc.sample(lambda x: -0.5 * x.square().sum(1), torch.zeros(4, 2), draws=500, warmup=100)
        >>> chains.health().sentences(), chains.health().rhat["dimension"].shape
        ([], torch.Size([2]))
        """
        kept, what = (self.draws, "dimension") if self.draws.shape[1] else (self.log_prob, "log-density")
        agree = self.pooled and kept.is_floating_point()
        return Health(
            accept=self.accept_rate,
            divergences=self.diverging.sum(dim=1),
            rhat={what: split_rhat(kept)} if agree else {},
            draws=self.accept.shape[1],
            step_size=float(self.step_size.mean()),
            nonfinite=0 if self.nonfinite is None else int(self.nonfinite.sum()),
            steps=float("nan") if self.mean_steps is None else self.mean_steps,
        )

    def to_arviz(self, names: Sequence[str] | Mapping[str, Part] | None = None) -> Any:
        """The draws as ArviZ data, with ``sample_stats``.

        Parameters
        ----------
        names
            A name for each dimension; or for each variable its dimensions (an index, a slice, a list of them) or a
            function of ``draws`` (for transformed parameters); or None for one variable ``x``.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            See :func:`mlcollage.infer.export.to_arviz`.

        Examples
        --------
        >>> import torch
        >>> from mlcollage.infer import hmc
        >>> chains = hmc.sample(lambda x: -0.5 * x.square().sum(1), torch.zeros(4, 2), draws=50, warmup=50)
        >>> data = chains.to_arviz({"mu": 0, "tau": lambda draws: draws[..., 1].exp()})
        >>> sorted(data.posterior.data_vars)
        ['mu', 'tau']
        """
        # names as ArviZ and Stan have them, each (chains, draws)
        stats = {
            "lp": self.log_prob,
            "acceptance_rate": self.accept,
            "energy": self.energy,
            "diverging": self.diverging,
            "n_steps": self.steps,
            "step_size": self.step_size[:, None].expand(self.accept.shape),
        }
        return to_arviz(
            {
                "posterior": {name: _array(part) for name, part in self._parts(names).items()},
                "sample_stats": {name: _array(value) for name, value in stats.items()},
            }
        )

    def _parts(self, names: Sequence[str] | Mapping[str, Part] | None) -> dict[str, Tensor]:
        # variables (chains, draws, ...) by name
        if names is None:
            return {"x": self.draws}
        if isinstance(names, Mapping):
            return {name: part(self.draws) if callable(part) else self.draws[..., part] for name, part in names.items()}
        if self.draws.ndim != 3 or len(names) != self.draws.shape[2] or isinstance(names, str):
            raise InvalidInput(
                f"{len(names)} names for draws of shape {tuple(self.draws.shape)}; give one per dimension, or a "
                "mapping from name to dimensions."
            )
        return {name: self.draws[..., i] for i, name in enumerate(names)}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
