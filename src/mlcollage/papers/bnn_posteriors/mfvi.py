"""Mean-field Gaussian variational inference over the weights; the optimization is :mod:`mlcollage.infer.vi`.

C. Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015; compared with HMC in the paper's section 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlcollage.infer import vi

from .method import CountFrom1, Method, Positive, Target
from .posterior import Posterior
from .training import GradientAscent, Gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class MFVI(Method):
    """The closest Gaussian with independent weights, started at an optimum.

    Parameters
    ----------
    draws
        Draws of the fitted Gaussian, as one chain; 50 in the paper.
    steps
        Of Adam on the evidence lower bound.
    elbo_draws
        Positions per estimate of the bound, an even number: they come in mirrored pairs.
    lr
        Rate of Adam, about the share of a standard deviation that a mean may move in a step; :math:`10^{-4}` in the
        paper.
    init_sd
        First standard deviation of every weight; 0.01 in the paper.
    map_steps, map_lr
        Of the training of the first mean.
    temperature
        T; divides the whole log-density.
    """

    name = "mfvi"
    draws: CountFrom1 = 50
    steps: CountFrom1 = 2000
    elbo_draws: CountFrom1 = 8
    lr: Positive = 0.01
    init_sd: Positive = 0.01
    map_steps: CountFrom1 = 500
    map_lr: Positive = 0.01
    temperature: Positive = 1.0

    def run(self, target: Target) -> Posterior:
        """Train, fit and draw; called by ``BayesianNetwork.fit``.

        Returns
        -------
        Posterior
            ``kept`` is mean and standard deviation, (1, 2, P).
        """
        start = target.starts(1)  # (1, P)
        gradients = Gradients(target.density, None, target.generator)
        mode = GradientAscent(self.map_steps, self.map_lr)(gradients, start, target.progress)
        q = vi.fit(
            target.density, mode[0], init_sd=self.init_sd, steps=self.steps, draws=self.elbo_draws,
            learning_rate=self.lr, temperature=self.temperature, generator=target.generator,
        )  # fmt: skip
        params = q.sample(self.draws, generator=target.generator)[None]  # (1, draws, P)
        # single estimates are noisy, so the bound is the mean over the last twentieth
        info = {"elbo": float(q.trace[-max(1, self.steps // 20) :].mean())}
        return target.posterior(self, params, info, kept=torch.stack([q.mean, q.sd])[None])
