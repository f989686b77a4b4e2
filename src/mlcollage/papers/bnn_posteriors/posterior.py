r"""What a method found out about the weights, and what it predicts.

.. math:: p(y \mid x, D) = E_{w \mid D} \, p(y \mid x, w) \approx \frac{1}{M} \sum_{m=1}^M p(y \mid x, w_m)

:class:`Posterior` holds draws (chain, draw, P) and how the sampler fared; :class:`PredictionStream` the average of the
predictions that draws made while passing by, in memory that does not grow with the draws.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlcollage._checks import integer, probability
from mlcollage.errors import InvalidInput
from mlcollage.infer import Health, RunningMixture, Streaming, diagnostics, tensor_file, to_arviz
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.infer.health import split_rhat

from .function import NetworkFunction, linearized
from .identity import identity, other_network
from .layout import Layout
from .likelihoods import Likelihood
from .validation import as_tensor

_WRITTEN = ("method", "params", "sample_stats", "kept", "info", "target_shape")
_TOLD = 32  # fitted inputs at most whose predictions tell whether chains agree
_KIND = "posterior of a network (mlcollage, 2)"


class PredictionStream:
    """Predictions at fixed inputs, with R-hat and effective sample size of every predicted number.

    Parameters
    ----------
    likelihood
        Turns outputs into predictions: probabilities of classes, or mean and variance; the outputs themselves for a
        likelihood of your own.
    x
        The inputs, (n, ...), in the network's type.
    target_shape
        Of one target: () or (d,); means and variances are (n, *target_shape). None for the likelihood's own.

    Attributes
    ----------
    count : int
        Draws of each chain so far.
    diagnostics : Streaming
        Of the predicted numbers.
    """

    def __init__(self, likelihood: Likelihood, x: Tensor, target_shape: tuple[int, ...] | None = None):
        self.likelihood, self.x, self.target_shape = likelihood, x, target_shape
        self.mixture = RunningMixture() if likelihood.kind == "classification" else None
        self.diagnostics = Streaming()
        self._variance: Tensor | None = None  # (chains, n, ...), summed over draws
        self.count = 0

    def update(self, outputs: Tensor) -> None:
        """Count in the outputs of one draw of every chain, (chains, n, ...)."""
        self.count += 1
        if self.mixture is not None:
            log_p = self.likelihood.log_proba(outputs)  # (chains, n, K)
            self.mixture.update(log_p)
            self.diagnostics.update(log_p.double().exp())
        elif self.likelihood.kind == "regression":
            parts = self.likelihood.moments(outputs)
            mean, variance = (shaped(part.double(), self.target_shape) for part in parts)  # (chains, n, ...) each
            self.diagnostics.update(mean)
            self._variance = variance if self._variance is None else self._variance + variance
        else:
            self.diagnostics.update(outputs.double())

    @property
    def proba(self) -> Tensor:
        """Class probabilities averaged over draws and chains, (n, K), float64."""
        if self.mixture is None:
            self.likelihood.log_proba(torch.zeros(0))  # says why there are none
            raise InvalidInput("this likelihood has no class probabilities.")
        return self.mixture.proba.mean(dim=0)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the mixture of all draws' Gaussians, (n, ...) each."""
        if self._variance is None:
            raise InvalidInput("only a Gaussian likelihood has a predictive mean and variance; use predict_proba.")
        within = (self._variance / self.count).mean(dim=0)  # (n, ...), the noise of the targets
        n = self.count * len(self._variance)
        # the mixture's variance, without the correction for having estimated its mean
        between = self.diagnostics.variance() * ((n - 1) / n) if n > 1 else torch.zeros_like(within)
        return self.diagnostics.mean(), within + between

    def state_dict(self) -> dict[str, Any]:
        """The state, for a file."""
        return {
            "x": self.x, "count": self.count, "variance": self._variance, "diagnostics": self.diagnostics.tensors(),
            "mixture": None if self.mixture is None else self.mixture.tensors(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> PredictionStream:
        """Take on what :meth:`state_dict` gave; returns itself."""
        device = self.x.device
        state = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, dict(state))
        self.x, self.count, self._variance = state["x"], state["count"], state["variance"]
        self.diagnostics = Streaming.from_tensors(state["diagnostics"])
        self.mixture = None if self.mixture is None else RunningMixture.from_tensors(state["mixture"])
        return self


def shaped(values: Tensor, target_shape: tuple[int, ...] | None, leading: int = 2) -> Tensor:
    """Numbers for each target, (..., n, ...) with so many leading dimensions, in the shape that targets have."""
    return values if target_shape is None else values.reshape(*values.shape[:leading], *target_shape)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws of a network's weights, or what was kept of them.

    Attributes
    ----------
    layout : Layout
        Names and shapes of the sampled parameters.
    method : str
        How they were drawn.
    params : Tensor or None
        (chain, draw, P); None if draws were not stored.
    sample_stats : dict of Tensor
        (chain, draw) each: of HMC ``accept_prob``, ``energy``, ``diverging``, ``lp``, ``n_steps`` and ``step_size``.
    kept : Tensor or None
        (chain, draw, ...), what a ``store`` of your own made of each draw; of a Laplace approximation the mode, of
        mean-field inference mean and standard deviation.
    stream : PredictionStream or None
        Running predictions, with ``at=``.
    info : dict
        Settings and what was measured on the way: numbers, words, lists of them.
    network : NetworkFunction or None
        Whose weights these are; predictions need it.
    target_shape : tuple of int or None
        Shape of one target when it was fitted, () or (d,), which predictions have too; None for the likelihood's own.
    data : pair of Tensor or None
        Inputs and targets that it was fitted to; not written to files.
    continuation : callable or None
        Of a sampler: number of further draws to the posterior with them, see :meth:`extend`; not written to files.
    identity : dict or None
        Of a posterior from a file: what its network, likelihood and prior were, see
        :mod:`~mlcollage.papers.bnn_posteriors.identity`.
    """

    layout: Layout
    method: str
    params: Tensor | None = None
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    stream: PredictionStream | None = None
    info: dict[str, Any] = field(default_factory=dict)
    network: NetworkFunction | None = field(default=None, repr=False)
    target_shape: tuple[int, ...] | None = None
    data: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    continuation: Callable[[int], Posterior] | None = field(default=None, repr=False)
    identity: dict[str, Any] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the run itself, which has a random generator."""
        return {**self.__dict__, "continuation": None}

    def __post_init__(self) -> None:
        if self.params is not None and (self.params.ndim != 3 or self.params.shape[2] != self.layout.size):
            shape = tuple(self.params.shape)
            raise InvalidInput(f"params have shape {shape}; (chain, draw, {self.layout.size}) is needed.")

    @property
    def chains(self) -> int:
        """Number of chains, or of members trained on their own."""
        for value in (self.params, self.kept, *self.sample_stats.values()):
            if value is not None:
                return len(value)
        return 0 if self.stream is None else len(self.stream.diagnostics.mean_of_chains())

    @property
    def accept_rate(self) -> float:
        """Mean acceptance probability; not a number for methods without a Metropolis test."""
        value = self.sample_stats.get("accept_prob")
        return float("nan") if value is None else float(value.mean())

    def health(self, X: Any = None) -> Health:
        """Acceptance and divergences of each chain, and split-R-hat of the log-density and of predicted numbers.

        Samplers warn of what it finds when they are done; ``health().sentences()`` says it again. R-hat of weights
        would say little, since networks with permuted units predict the same.

        Parameters
        ----------
        X
            Inputs of the predictions. By default those given as ``at=``, otherwise some of those that were fitted.
        """
        stats, rhat = self.sample_stats, dict[str, Tensor]()
        if "lp" in stats:
            rhat["log-density"] = split_rhat(stats["lp"])
        x = self.data[0] if X is None and self.data is not None else X
        stream = self.stream if X is None else None
        if stream is None and x is not None and self.params is not None and self.network is not None:
            if X is None:  # evenly spaced
                x = x[:: -(-len(x) // _TOLD)]
            stream = PredictionStream(self.network.likelihood, self.network.inputs(x), self.target_shape)
            for outputs in self._outputs(stream.x, None):
                stream.update(outputs)
        if stream is not None and stream.count >= 4:
            # what never varies agrees, or is infinitely far apart
            rhat["prediction"] = stream.diagnostics.rhat().flatten().nan_to_num(nan=1.0, posinf=math.inf)
        accept, diverging = stats.get("accept_prob"), stats.get("diverging")
        told = {} if "remedy" not in self.info else {"remedy": self.info["remedy"]}
        return Health(
            accept=None if accept is None else accept.mean(dim=1),
            divergences=None if diverging is None else diverging.sum(dim=1),
            rhat=rhat,
            draws=0 if diverging is None else diverging.shape[1],
            step_size=float(stats["step_size"].mean()) if "step_size" in stats else math.nan,
            **told,
        )

    # --- draws --------------------------------------------------------------------------------------------------------

    def draws(self) -> Tensor:
        """The stored draws, (chain, draw, P), or a sentence that says there are none."""
        if self.params is None:
            raise InvalidInput("the draws were not stored; fit with store='params', or predict at the inputs of at=.")
        return self.params

    def thinned(self, every: int) -> Posterior:
        """One of every so many draws, beginning with the first."""
        # running predictions cannot be thinned afterwards, so they are left out
        step = slice(None, None, integer("every", every, least=1))
        stats = {name: value[:, step] for name, value in self.sample_stats.items()}
        kept = None if self.kept is None else self.kept[:, step]
        params = self.draws()[:, step]
        info = dict(self.info)
        return replace(self, params=params, sample_stats=stats, kept=kept, stream=None, info=info, continuation=None)

    def extend(self, draws: int) -> Posterior:
        """The posterior with so many further draws of each chain: the same as of one longer run.

        This one stays as it is. For chains of HMC, NUTS, SGLD and SGHMC, in the process that drew them; a run with
        ``checkpoint=`` is extended from its folder by fitting with more draws.

        Raises
        ------
        InvalidInput
            If it did not come from a sampler here.
        """
        if self.continuation is None:
            raise InvalidInput(
                f"this posterior ({self.method}) has no run to go on with; fit with more draws, for a sampler with the "
                "checkpoint= of the run."
            )
        return self.continuation(draws)

    def state_dict(self, chain: int, draw: int) -> dict[str, Tensor]:
        """One draw as parameters by name, for ``module.load_state_dict(..., strict=False)``."""
        return {name: value.clone() for name, value in self.layout.unflatten(self.draws()[chain, draw]).items()}

    def to_arviz(self, X: Any = None, y: Any = None, batch_size: int | None = None) -> Any:
        """The draws as ArviZ data: one variable per parameter, ``sample_stats``, and what ``az.loo`` needs.

        Parameters
        ----------
        X, y
            Data whose log-likelihoods go along, with ``y`` as observed data; by default those that were fitted. A
            posterior from a file has none; draws at another temperature than 1 are not those of leave-one-out, and a
            warning says that these are left out.
        batch_size
            Inputs per pass; by default all.
        """
        draws, (x, targets) = self.draws(), (X, y) if X is not None or self.data is None else self.data
        named: dict[str, Mapping[str, Any]] = {
            "posterior": self.layout.unflatten(draws), "sample_stats": self.sample_stats,
        }  # fmt: skip
        cold = self.info.get("temperature", 1) != 1
        if x is not None and cold:
            warnings.warn("log-likelihoods are left out, since the draws are of another temperature than 1.")
        elif x is not None:
            named["log_likelihood"] = {"y": self.log_likelihood(x, targets, batch_size)}
            named["observed_data"] = {"y": as_tensor(targets, "y")}
        return to_arviz({group: {n: v.detach().cpu().numpy() for n, v in of.items()} for group, of in named.items()})

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whose header says what it is in JSON; nothing is pickled.

        The file also tells its network, likelihood and prior from others, by what they give at made-up data. It is
        complete or not there. Returns its path.
        """
        content = {name: getattr(self, name) for name in _WRITTEN}
        content["stream"] = None if self.stream is None else self.stream.state_dict()
        content |= {"names": self.layout.names, "shapes": self.layout.shapes, "identity": self._identity()}
        return tensor_file.save(path, _KIND, content)

    def _identity(self) -> dict[str, Any] | None:
        if self.identity is not None or self.network is None:
            return self.identity
        seen = self.stream.x if self.stream is not None else None
        return identity(self.network, *((seen, None) if self.data is None else self.data))

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: NetworkFunction | None = None) -> Posterior:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path
            The file.
        network
            The network it is meant for, a ``BayesianNetwork``. Another architecture is refused, and so are another
            activation, other frozen values, another likelihood or prior. Without it the draws are there, but no
            predictions.

        Raises
        ------
        MissingFile
            If it is not there.
        InvalidInput
            If it is another kind of file, or of another network, likelihood or prior; the sentence says in what.
        """
        content = tensor_file.load(path, _KIND)
        layout = Layout(tuple(content["names"]), tuple(tuple(shape) for shape in content["shapes"]))
        if network is not None and (difference := network.layout.difference(layout)) is not None:
            raise InvalidInput(f"{path} is of another architecture: {difference} (this network, and the file).")
        written = content.get("identity")
        if network is not None and written is None:
            warnings.warn(
                f"{path} does not say of which network it is, so only names and shapes of parameters were compared.",
                stacklevel=2,
            )
        if network is not None and written and (difference := other_network(written, network)) is not None:
            raise InvalidInput(
                f"{path} is of another network than this: {difference}; load it with the network, likelihood and prior "
                "it was fitted with."
            )
        known = {name: content[name] for name in _WRITTEN}
        known["target_shape"] = shape = None if known["target_shape"] is None else tuple(known["target_shape"])
        stream = None
        if network is not None and (state := content["stream"]) is not None:
            stream = PredictionStream(network.likelihood, state["x"], shape).load_state_dict(state)
        return cls(layout, **known, stream=stream, network=network, identity=written)

    # --- predictions --------------------------------------------------------------------------------------------------

    def _network(self) -> NetworkFunction:
        if self.network is None:
            raise InvalidInput("this posterior knows no network to predict with; give one to Posterior.load.")
        return self.network

    def _outputs(self, X: Any, batch_size: int | None) -> Iterator[Tensor]:
        """Outputs of one draw of every chain after the other, (chains, N, ...)."""
        draws, network = self.draws(), self._network()
        x, here = network.inputs(X), network.parameters_flat
        size = None if batch_size is None else integer("batch_size", batch_size, least=1)
        # a Laplace approximation predicts by the linearization about the mode that it keeps
        mode = self.kept[0, 0].to(here) if self.info.get("linearized") and self.kept is not None else None
        for draw in range(draws.shape[1]):
            q = draws[:, draw].to(here)  # (chains, P)
            if mode is None:
                yield network.outputs(q, x, size)
            else:
                yield linearized(network.module, mode, q, x, batch_size=size)

    def _parts(self, X: Any, batch_size: int | None) -> tuple[Tensor, ...]:
        """Inputs (N, ...) in passes."""
        x = self._network().inputs(X)
        return x.split(len(x) if batch_size is None else integer("batch_size", batch_size, least=1))

    def _streamed(self, X: Any) -> PredictionStream | None:
        """The stream that was filled while fitting, if the draws were not stored."""
        if self.params is not None or self.stream is None:
            return None
        if X is not None:
            x = self._network().inputs(X)  # in the type in which the stream has them
            if not torch.equal(x, self.stream.x.to(x)):
                raise InvalidInput("only the predictions at the inputs given as at= were kept; ask for X=None.")
        return self.stream

    def predict_proba(self, X: Any = None, batch_size: int | None = None) -> Tensor:
        """Class probabilities averaged over all draws of all chains: the Bayesian model average.

        Parameters
        ----------
        X
            Inputs (N, ...). Where only predictions were kept, the inputs given as ``at``, or None.
        batch_size
            Inputs per pass; by default all.

        Returns
        -------
        Tensor
            (N, K), float64. Memory does not grow with the draws.
        """
        stream = self._streamed(X)
        if stream is not None:
            return stream.proba
        running = RunningMixture()  # one mixture per chain, (chains, N, K)
        for outputs in self._outputs(X, batch_size):
            running.update(self._network().likelihood.log_proba(outputs))
        return running.proba.mean(dim=0)

    def predict_moments(self, X: Any = None, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the predictive mixture of a Gaussian likelihood, in y's shape each, float64."""
        network = self._network()
        if network.likelihood.kind != "regression":
            network.likelihood.moments(torch.zeros(0))  # says why there are none
        stream = self._streamed(X)
        if stream is None:
            stream = PredictionStream(network.likelihood, network.inputs(X), self.target_shape)
            for outputs in self._outputs(X, batch_size):
                stream.update(outputs)
        return stream.moments

    def predict(self, X: Any = None, batch_size: int | None = None) -> Tensor:
        """Most probable class, or the predictive mean, in the shape that y had when it was fitted."""
        if self._network().likelihood.kind == "regression":
            return self.predict_moments(X, batch_size)[0]
        return shaped(self.predict_proba(X, batch_size).argmax(dim=-1), self.target_shape, 1)

    def predict_draws(self, X: Any, batch_size: int | None = None) -> Tensor:
        """The prediction of every draw, (chain, draw, N, ...): class probabilities, means, or outputs as they are."""
        likelihood = self._network().likelihood

        def prediction(outputs: Tensor) -> Tensor:
            if likelihood.kind == "classification":
                return likelihood.log_proba(outputs).exp()
            if likelihood.kind == "regression":
                return shaped(likelihood.moments(outputs)[0], self.target_shape)
            return outputs

        # one draw of all chains after the other, (chains, N, ...) each
        return torch.stack([prediction(outputs) for outputs in self._outputs(X, batch_size)], dim=1)

    def predict_quantiles(self, X: Any, q: float | Sequence[float], batch_size: int | None = None) -> Tensor:
        r"""Quantiles of the predictive distribution of a regression, of the mixture over all draws and their noise.

        .. math:: \frac{1}{M} \sum_m P(y \le t \mid x, w_m) = q

        is solved for t by bisection to the last bits of float64; nothing is drawn at random.

        Parameters
        ----------
        X
            Inputs (N, ...).
        q
            One probability or several, (Q,), each between 0 and 1.
        batch_size
            Inputs per pass; by default all. The outputs of all draws for one pass are held in memory.

        Returns
        -------
        Tensor
            In y's shape, for several probabilities with a leading dimension, (Q, N, ...); float64.
        """
        probability_of = np.asarray(q, dtype=np.float64)
        levels = [probability("q", level) for level in probability_of.reshape(-1).tolist()]
        likelihood, parts = self._network().likelihood, []
        for part in self._parts(X, batch_size):
            outputs = torch.stack(list(self._outputs(part, None)), dim=1)  # (chain, draw, n, ...)
            means, noise = (value.double() for value in likelihood.moments(outputs))
            mean = means.mean(dim=(0, 1))
            sd = (noise.mean(dim=(0, 1)) + means.flatten(0, 1).var(dim=0, correction=0)).sqrt()  # (n, ...)
            found = []
            for level in levels:
                # Cantelli: no distribution's quantile is farther out
                low, high = mean - sd * ((1 - level) / level) ** 0.5, mean + sd * (level / (1 - level)) ** 0.5
                for _ in range(64):
                    middle = (low + high) / 2
                    below = likelihood.cdf(outputs, middle).mean(dim=(0, 1)) < level
                    low, high = torch.where(below, middle, low), torch.where(below, high, middle)
                found.append(shaped((low + high) / 2, self.target_shape, 1))
            parts.append(torch.stack(found))  # (Q, n, ...)
        every = torch.cat(parts, dim=1)
        return every if probability_of.ndim else every[0]

    def predict_interval(self, X: Any, level: float = 0.95, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Ends of the interval that holds a new target with this probability, equal tails; in y's shape each."""
        tail = (1 - probability("level", level)) / 2
        low, high = self.predict_quantiles(X, (tail, 1 - tail), batch_size)
        return low, high

    def sample_targets(self, X: Any, *, generator: Generator = 0, batch_size: int | None = None) -> Tensor:
        """A target drawn at each draw of the weights, noise included, (chain, draw, N, ...): predictive draws.

        Parameters
        ----------
        X
            Inputs (N, ...).
        generator
            A torch.Generator on the network's device, or a seed.
        batch_size
            Inputs per pass; by default all.
        """
        likelihood, numbers = self._network().likelihood, torch_generator(generator, self._network().device)
        drawn = [likelihood.sample(outputs, numbers) for outputs in self._outputs(X, batch_size)]
        return shaped(torch.stack(drawn, dim=1), self.target_shape, 3)

    def log_likelihood(self, X: Any, y: Any, batch_size: int | None = None) -> Tensor:
        r""":math:`\log p(y_i \mid x_i, w_m)` of every datum under every draw, (chain, draw, N), in float64."""
        network, x = self._network(), self._network().inputs(X)
        targets = as_tensor(y, "y").to(x.device)
        if len(targets) != len(x):
            raise InvalidInput(f"X has {len(x)} data and y {len(targets)}; a target for each is needed.")
        found: list[Tensor] = []
        for outputs in self._outputs(x, batch_size):  # (chains, N, ...)
            if not found:
                targets = network.likelihood.check(outputs[0, :4], targets)
            each = [network.likelihood.log_prob(chain.double(), targets) for chain in outputs]
            found.append(torch.stack(each).double())
        return torch.stack(found, dim=1)

    def log_predictive(self, X: Any, y: Any, batch_size: int | None = None) -> Tensor:
        r""":math:`\log \frac{1}{M} \sum_m p(y_i \mid x_i, w_m)`, the score of each new datum, (N,), in float64."""
        each = self.log_likelihood(X, y, batch_size).flatten(0, 1)  # (draws of all chains, N)
        return each.logsumexp(dim=0) - math.log(len(each))

    def function_rhat(self, X: Any = None, method: Literal["rank", "split", "folded"] = "rank") -> np.ndarray:
        """R-hat of each predicted number, (N, K) or (N, ...): whether the chains agree where it matters."""
        stream = self._streamed(X)
        if stream is None:
            return diagnostics.rhat(self.predict_draws(X), method)
        if self.chains == 1:
            warnings.warn("R-hat of one chain compares only its halves; run several chains from different starts.")
        return stream.diagnostics.rhat().cpu().numpy()

    def function_ess(self, X: Any = None, method: Literal["bulk", "tail", "mean"] = "bulk") -> np.ndarray:
        """Effective sample size of each predicted number, (N, K) or (N, ...)."""
        stream = self._streamed(X)
        return stream.diagnostics.ess().cpu().numpy() if stream else diagnostics.ess(self.predict_draws(X), method)
