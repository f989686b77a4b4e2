"""SWAG: a Gaussian around the path of SGD at a constant rate; its moments are :mod:`mlcollage.infer.swag`.

W. Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from mlcollage._checks import integer
from mlcollage.infer import swag as gaussian

from .density import largest_curvature
from .method import CountFrom0, CountFrom1, Method, Positive, Target
from .posterior import Posterior
from .training import GradientAscent, Gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class SWAG(Method):
    """A Gaussian around the path of SGD, of one or more runs; not in the paper.

    Parameters
    ----------
    members
        Runs; more than one is MultiSWAG.
    draws
        Draws of each.
    steps
        Of the training before; the rate falls to half along a cosine and stays there.
    collect, every
        Weights counted in, at least 2, and steps between them.
    rank
        Columns of the low-rank part of the covariance.
    lr
        Rate of SGD on the summed loss; None takes a tenth of one over the curvature at the start.
    batch_size
        Data per step; None for all.
    """

    name = "swag"
    members: CountFrom1 = 1
    draws: CountFrom1 = 30
    steps: CountFrom0 = 1000
    collect: Annotated[int, partial(integer, least=2)] = 40
    every: CountFrom1 = 10
    rank: CountFrom0 = 20
    lr: Positive | None = None
    batch_size: CountFrom1 | None = None

    def run(self, target: Target) -> Posterior:
        """Train, count in and draw; called by ``BayesianNetwork.fit``."""
        start = target.starts(self.members)  # (members, P)
        lr = self.lr or 0.1 / float(largest_curvature(target.density, start).max().clamp(min=1e-12))
        # a module whose one parameter is the position, since SWAG's moments are of modules
        holders = [nn.ParameterDict({"w": nn.Parameter(row.clone(), requires_grad=False)}) for row in start]
        gaussians = [gaussian.SWAG(holder, rank=self.rank) for holder in holders]

        def count(step: int, q: Tensor) -> None:
            # every so many steps after the training
            if step < self.steps or (step - self.steps + 1) % self.every:
                return
            for row, holder, moments in zip(q, holders, gaussians, strict=True):
                holder["w"].copy_(row)
                moments.update(holder)

        total = self.steps + self.collect * self.every
        gradients = Gradients(target.density, self.batch_size, target.generator)
        GradientAscent(total, lr, "sgd", constant_from=0.5)(gradients, start, target.progress, count)
        # run by run, (P,) each
        drawn = [g.sample(target.generator)["w"] for g in gaussians for _ in range(self.draws)]
        params = torch.stack(drawn).unflatten(0, (self.members, self.draws))  # (members, draws, P)
        return target.posterior(self, params, {"lr": lr, "steps": total})
