"""Deep ensembles: optima of the log-posterior from independent starts, and one alone, the MAP estimate.

B. Lakshminarayanan, A. Pritzel and C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
Ensembles", NeurIPS 2017; in the paper's sections 4 and 8, 50 members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .method import CountFrom1, Method, Positive, Target
from .posterior import Posterior
from .training import GradientAscent, Gradients, Transform


@dataclass(frozen=True, kw_only=True, eq=False)
class MAP(Method):
    """One optimum of the log-posterior: a network trained with the prior's weight decay.

    An almost flat prior trains without decay.

    Parameters
    ----------
    steps
        Of the training; the rate falls to zero along a cosine.
    lr
        Rate at the first step: of Adam, of the order of a weight's change in a step; of SGD, it multiplies the summed
        gradient.
    optimizer
        ``"adam"``, or ``"sgd"`` with momentum .9.
    batch_size
        Data per step; None for all.
    transform
        Applied to the inputs of each minibatch: an augmentation.
    """

    name = "map"
    steps: CountFrom1 = 1000
    lr: Positive = 0.01
    optimizer: Literal["adam", "sgd"] = "adam"
    batch_size: CountFrom1 | None = None
    transform: Transform | None = None

    def run(self, target: Target) -> Posterior:
        """Train; called by ``BayesianNetwork.fit``."""
        return self._train(target, 1)

    def _train(self, target: Target, members: int) -> Posterior:
        """So many members as one batch; each is a chain of one draw."""
        start = target.starts(members)
        gradients = Gradients(target.density, self.batch_size, target.generator, self.transform)
        # each member has minibatches of its own
        q = GradientAscent(self.steps, self.lr, self.optimizer)(gradients, start, target.progress)  # (members, P)
        return target.posterior(self, q[:, None], {}, sample_stats={"lp": target.density(q)[0][:, None]})


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble(MAP):
    """Optima from independent starts, trained as one batch: a deep ensemble.

    Parameters
    ----------
    members
        How many; chains of one draw each. 50 in the paper.
    steps, lr, optimizer, batch_size, transform
        As in :class:`MAP`.
    """

    name = "ensemble"
    members: CountFrom1 = 10

    def run(self, target: Target) -> Posterior:
        """Train; called by ``BayesianNetwork.fit``."""
        return self._train(target, self.members)
