r"""Stochastic-gradient Markov chain Monte Carlo: SGLD, SGHMC and cyclical SGHMC, with all chains as one batch.

Each chain has minibatches of its own. The gradient is

.. math:: g = \frac{N}{B} \sum_{i \in \mathrm{batch}} \nabla \log p(y_i \mid x_i, w) + \nabla \log p(w)

so neither B nor the number of devices changes the temperature. The steps are those of :mod:`mlcollage.infer.sgld` and
:mod:`mlcollage.infer.sghmc`; the paper compares them with HMC in its section 8.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor
from torch.optim import Optimizer

from mlcollage._checks import probability
from mlcollage.errors import InvalidInput
from mlcollage.infer import sghmc, sgld

from .density import largest_curvature
from .keeping import Keeper
from .method import CountFrom0, CountFrom1, NotNegative, Positive, Share, Target
from .sampler import Sampler, Save, State
from .training import Gradients, Transform

_Decay = Annotated[float, lambda name, value: probability(name, value, inside=False)]


@dataclass(frozen=True, kw_only=True, eq=False)
class SGLD(Sampler):
    r"""Stochastic-gradient Langevin dynamics: gradient steps with noise.

    Parameters
    ----------
    chains, draws, store, at, checkpoint, checkpoint_every
        As in :class:`~mlcollage.papers.bnn_posteriors.sampler.Sampler`; 5 chains of 900 draws in the paper's table of
        hyper-parameters.
    thin
        Steps per kept draw.
    burn_in
        Steps before the first.
    lr
        Step size h of the summed loss, :math:`10^{-6}` for CIFAR-10 in the paper; None takes 0.2 over the largest
        curvature at the start. Smaller is less biased.
    batch_size
        B, 80 in the paper; None for all data.
    rmsprop
        Decay, in [0, 1], of RMSprop's preconditioner; None for none.
    temperature
        T >= 0; multiplies the noise. 0 is gradient descent.
    transform
        Applied to the inputs of each minibatch: an augmentation. The likelihood is then no longer a product over the
        data, and a warning says so. With ``checkpoint`` it must not draw from random numbers of its own.
    """

    name = "sgld"
    thin: CountFrom1 = 10
    burn_in: CountFrom0 = 500
    lr: Positive | None = None
    batch_size: CountFrom1 | None = None
    rmsprop: _Decay | None = None
    temperature: NotNegative = 1.0
    transform: Transform | None = None

    def _sample(
        self, target: Target, keeper: Keeper, state: State | None, save: Save, every: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.transform is not None:
            warnings.warn(
                "with augmentation the likelihood is no longer a product over the data: no temperature makes the draws "
                "those of the posterior.",
                stacklevel=5,
            )
        state = copy.deepcopy(state)  # everything is moved in place
        q: Tensor = target.starts(self.chains) if state is None else state["position"]  # (chains, P)
        h = state["lr"] if state else self.lr
        h = h or 0.2 / float(largest_curvature(target.density, q).max().clamp(min=1e-12))
        # gradients are of the sum over all data with the prior, so num_data=1 and no weight decay
        common = {"lr": h, "num_data": 1, "temperature": self.temperature, "generator": target.generator}
        optimizer = self._optimizer(q, {**common, "rmsprop": self.rmsprop})
        schedule = self._schedule(optimizer)
        gradients = Gradients(target.density, self.batch_size, target.generator, self.transform)
        steps, begin = self.burn_in + self.draws * self._every(), 0
        if state:
            begin, gradients.waiting = state["step"], state["waiting"]
            of_one = {int(number): value for number, value in state["optimizer"]["state"].items()}  # words in a file
            optimizer.load_state_dict({**state["optimizer"], "state": of_one, "generator": state["generator"]})
            if schedule:
                schedule.load_state_dict(state["schedule"])
        for step in range(begin, steps):
            q.grad = gradients(q).neg()  # of minus the log-posterior, (chains, P)
            optimizer.step()
            if schedule:
                schedule.step()
            # looked at where a draw is kept: a chain that left does not come back
            if step >= self.burn_in and self._due(step):
                if not bool(q.isfinite().all()):
                    raise InvalidInput(
                        f"the chains ceased to be finite by step {step}; give a smaller lr than {h:.3g}."
                    )
                keeper(q.detach())
            if target.progress:
                target.progress(step + 1, steps)
            if step + 1 == steps or (step + 1) % (every * self._every()) == 0:
                now: State = {"position": q.detach(), "waiting": gradients.waiting, "optimizer": optimizer.state_dict()}
                now |= {"schedule": schedule.state_dict()} if schedule else {}
                now |= {"generator": target.generator.get_state(), "drawn": keeper.count, "step": step + 1, "lr": h}
                save(copy.deepcopy(now))
        return {}, {"lr": h, "steps": steps}

    def _optimizer(self, q: Tensor, common: dict[str, Any]) -> Optimizer:
        """Whose steps move positions (chains, P)."""
        return sgld.SGLD([q], **common)

    def _schedule(self, optimizer: Optimizer) -> sghmc.Cyclical | None:
        return None

    def _every(self) -> int:
        """Steps per kept draw."""
        return self.thin

    def _due(self, step: int) -> bool:
        """Whether a draw is kept after this step, from 0."""
        return (step + 1 - self.burn_in) % self._every() == 0


@dataclass(frozen=True, kw_only=True, eq=False)
class SGHMC(SGLD):
    r"""Stochastic-gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum.

    Parameters
    ----------
    momentum
        :math:`\beta` in [0, 1): what is left of the momentum after a step; 0.9 in the paper. One step moves about as
        far as one of SGLD with :math:`h / (1 - \beta)`.
    chains, draws, thin, burn_in, lr, batch_size, rmsprop, temperature, transform
        As in :class:`SGLD`, and so are the others; the paper's step size for CIFAR-10 is :math:`3 \cdot 10^{-7}`.
    """

    name = "sghmc"
    momentum: Share = 0.9

    def _optimizer(self, q: Tensor, common: dict[str, Any]) -> Optimizer:
        return sghmc.SGHMC([q], momentum=self.momentum, **common)


@dataclass(frozen=True, kw_only=True, eq=False)
class CyclicalSGHMC(SGHMC):
    r"""SGHMC with cyclical step sizes: large steps find a mode, small ones sample it; again and again.

    Draws are kept at ends of cycles. R. Zhang et al., "Cyclical Stochastic Gradient MCMC for Bayesian Deep
    Learning", ICLR 2020; the paper's SGHMC-CLR, and with ``rmsprop=0.99`` its SGHMC-CLR-Prec.

    Parameters
    ----------
    cycle_length
        Steps of a cycle, in which the step size falls along half a cosine; 50 epochs in the paper.
    exploration
        Share of a cycle without noise, in [0, 1).
    thin
        Cycles per kept draw.
    burn_in
        Steps before draws are kept.
    momentum
        :math:`\beta` in [0, 1); 0.95 in the paper.
    chains, draws, lr, batch_size, rmsprop, temperature, transform
        As in :class:`SGLD`, and so are the others; ``lr`` is the largest step size.
    """

    name = "csghmc"
    thin: CountFrom1 = 1
    burn_in: CountFrom0 = 0
    cycle_length: CountFrom1 = 200
    exploration: Share = 0.5

    def _schedule(self, optimizer: Optimizer) -> sghmc.Cyclical:
        return sghmc.Cyclical(optimizer, self.cycle_length, exploration=self.exploration)

    def _every(self) -> int:
        return self.thin * self.cycle_length

    def _due(self, step: int) -> bool:
        return (step + 1) % self._every() == 0  # at the end of a cycle, whatever the burn-in
