"""How the study samples, trains and predicts: the paper's rules for HMC, and tuned rivals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage.data import Problem
from mlcollage.infer import Unhealthy
from mlcollage.infer.hmc import prior_period
from mlcollage.lab import Task
from mlcollage.measure import calibration
from mlcollage.train import shift_images

from ..density import largest_curvature
from ..ensemble import Ensemble
from ..hmc import HMC
from ..method import Method
from ..network import BayesianNetwork
from ..posterior import Posterior
from ..priors import GaussianPrior, Prior
from ..sgmcmc import SGLD, CyclicalSGHMC
from .data import Sizes, network, split

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A network and one seed's data, and how they are sampled by the study's rules."""

    sizes: Sizes
    seed: int
    network: nn.Module
    data: Problem
    foreign: Tensor  # inputs from elsewhere

    @classmethod
    def of(cls, task: Task[Sizes]) -> Case:
        """The case that a task asks for."""
        data, foreign = split(task)
        return cls(task.settings, task.seed, network(task, data), data, foreign)

    def stream(self, number: int) -> int:
        """A seed for one of the things that are random in a run."""
        return int(np.random.SeedSequence([self.seed, 23, number]).generate_state(1)[0])

    def bayesian(self, prior: Prior | float | None = None) -> BayesianNetwork:
        """The network with a prior: by default the study's."""
        prior = self.sizes.variance if prior is None else prior
        prior = prior if isinstance(prior, Prior) else GaussianPrior(prior)
        return BayesianNetwork(self.network, prior=prior, backend="untimed")  # a clock would change the last bits

    def fit(self, method: Method, prior: Prior | float | None, seed: int) -> Posterior:
        """Sample or approximate on the training samples."""
        with warnings.catch_warnings():
            # chains are short on purpose: acceptance and R-hat are among what is measured
            warnings.simplefilter("ignore", Unhealthy)
            return self._fit(method, prior, seed)

    def _fit(self, method: Method, prior: Prior | float | None, seed: int) -> Posterior:
        return self.bayesian(prior).fit(*self.data.train, method, generator=seed)

    def hmc(
        self,
        prior: Prior | float | None = None,
        *,
        stream: int = 0,
        chains: int | None = None,
        draws: int | None = None,
        temperature: float = 1.0,
        fraction: float = 1.0,
    ) -> Posterior:
        """Chains of HMC by the paper's rules: a quarter period of the prior, half of the burn-in without a test."""
        s = self.sizes
        scale = prior**0.5 if isinstance(prior, float) else s.variance**0.5
        method = HMC(
            chains=chains or s.chains,
            draws=draws or s.draws,
            burn_in=s.burn_in // 2,
            warmup=s.burn_in - s.burn_in // 2 if s.step_size else max(10, s.burn_in),
            step_size=s.step_size and s.step_size * math.sqrt(min(temperature, 1.0)),
            trajectory_length=prior_period(scale, temperature) * fraction,
            temperature=temperature,
        )
        return self.fit(method, prior, self.stream(stream))

    def optima(self, prior: float, stream: int, members: int | None = None) -> Posterior:
        """Optima from independent starts."""
        size = None if self.sizes.network == "mlp" else 100
        method = Ensemble(members=members or self.sizes.members, steps=self.sizes.epochs, batch_size=size)
        return self.fit(method, prior, self.stream(stream))

    @property
    def batch_size(self) -> int:
        """Of the stochastic-gradient samplers."""
        return min(50, self.sizes.train)

    @property
    def steps(self) -> int:
        """Of the stochastic-gradient samplers."""
        return self.sizes.sg_epochs * max(1, self.sizes.train // self.batch_size)

    def stochastic(
        self,
        kind: type[SGLD | CyclicalSGHMC],
        rate: float,
        stream: int,
        temperature: float = 1.0,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Posterior:
        """Chains of a stochastic-gradient sampler: a fifth of the steps is burn-in; at most 40 draws per chain."""
        cyclical = kind is CyclicalSGHMC
        draws = min(40, max(1, self.steps // 10))
        burn_in = 0 if cyclical else self.steps // 5
        thin = max(1, (self.steps - burn_in) // draws)
        every = {"cycle_length": max(2, thin)} if cyclical else {"thin": thin}
        method = kind(
            chains=self.sizes.chains,
            draws=draws,
            burn_in=burn_in,
            lr=rate,
            batch_size=self.batch_size,
            temperature=temperature,
            transform=transform,
            **every,  # type: ignore[arg-type]  # the kinds differ in this name
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "with augmentation", UserWarning)  # what that experiment is about
            return self.fit(method, None, self.stream(stream))

    def curvature(self, positions: Tensor) -> float:
        """The largest curvature of minus the log-posterior at positions (chains, P)."""
        density = self.bayesian().log_density(*self.data.train)
        return float(largest_curvature(density, positions.contiguous()).max())

    def predict(self, posterior: Posterior, x: Tensor) -> NDArray[np.float32]:
        """Class probabilities of every draw, (chains, draws, n, K)."""
        return posterior.predict_draws(x, batch_size=2000).float().cpu().numpy()

    def average(self, posterior: Posterior, x: Tensor) -> Probabilities:
        """Class probabilities averaged over all draws, (n, K)."""
        return self.predict(posterior, x).mean(axis=(0, 1), dtype=np.float64)

    def tested(self, posterior: Posterior) -> dict[str, float]:
        """Scores of the average on test samples."""
        return scores(self.average(posterior, self.data.test.x), self.data.test.y)

    def validated(self, posterior: Posterior) -> dict[str, float]:
        """Scores of the average on validation samples."""
        return scores(self.average(posterior, self.data.validation.x), self.data.validation.y)

    def mean_accuracy(self, posterior: Posterior, x: Tensor) -> float:
        """Accuracy on test labels of one draw alone, averaged over draws."""
        return float((self.predict(posterior, x).argmax(-1) == self.data.test.y.cpu().numpy()).mean())

    def with_inputs(self, task: Task[Sizes], change: Callable[[Tensor], Tensor]) -> Case:
        """The same samples with changed inputs, and a network for them."""
        d = self.data
        train, validation, test = (part._replace(x=change(part.x)) for part in (d.train, d.validation, d.test))
        data = replace(d, train=train, validation=validation, test=test)
        return replace(self, network=network(task, data), data=data)


def scores(p: Probabilities, y: Tensor, foreign: Probabilities | None = None) -> dict[str, float]:
    """What is recorded of class probabilities (n, K) for labels (n,), and for foreign inputs."""
    y = y.cpu()
    found = {
        "accuracy": calibration.accuracy(p, y),
        "nll": calibration.nll(np.clip(p, 1e-12, 1), y),
        "brier": calibration.brier(p, y),
        "ece": calibration.ece(p, y),
        "overconfidence": calibration.confidence_gap(p, y),
    }
    if foreign is not None:
        entropies = calibration.predictive_entropy(p), calibration.predictive_entropy(foreign)
        found["auroc_ood"] = calibration.auroc_ood(*entropies)
    return found


def distances(p: Probabilities, reference: Probabilities) -> dict[str, float]:
    """Total variation and agreement of two sets of class probabilities, (n, K) each."""
    return {"tv": calibration.total_variation(p, reference), "agreement": calibration.agreement(p, reference)}


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel each way, zeros coming in; rows of square numbers of pixels are images.

    Other rows, which have no neighborhood, get a little noise instead.
    """
    side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
    if x.ndim == 2 and side * side != x.shape[1]:
        return x + 0.1 * torch.randn(x.shape, generator=generator).to(x.device)
    images = x.reshape(len(x), -1, side, side) if side else x  # (n, channels, h, w)
    return shift_images(images, 1, generator=generator, fill=float(images.min())).reshape(x.shape)
