r"""Predictive distributions of several networks: deep ensembles, and posterior draws of any sampler.

Members are averaged as a mixture, in probabilities and not in logits,

.. math:: p(y \mid x) = \frac{1}{M} \sum_{m=1}^M p(y \mid x, w_m),

whether :math:`w_m` were trained from independent starts (B. Lakshminarayanan, A. Pritzel and C. Blundell, "Simple and
Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS 2017, section 2.4) or drawn from a posterior
(Bayesian model averaging). This module trains nothing: members come ready.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput
from mlcollage.nn.signature import other_layer, signature


def mix_logits(logits: Tensor) -> Tensor:
    """Log-probabilities of the mixture of members' softmax distributions, in float64.

    Parameters
    ----------
    logits
        (members, ..., classes), or log-probabilities.

    Returns
    -------
    Tensor
        (..., classes). Computed by logsumexp, so that tiny probabilities keep their logarithm.

    Raises
    ------
    InvalidInput
        If there is no member, fewer than two classes, or a value is not finite.

    Examples
    --------
    >>> mix_logits(torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]])).exp()
    tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    if logits.ndim < 2 or len(logits) == 0:
        raise InvalidInput(f"logits have shape {tuple(logits.shape)}; (members, ..., classes) is needed.")
    running = RunningMixture()  # one member at a time, so that memory does not double
    for member in logits:
        running.update(member)
    return running.log_proba


def mix_gaussians(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of the mixture of members' Gaussian predictions.

    .. math:: \bar\mu = \frac{1}{M} \sum_m \mu_m, \qquad
        \bar\sigma^2 = \frac{1}{M} \sum_m \sigma_m^2 + \frac{1}{M} \sum_m (\mu_m - \bar\mu)^2

    Parameters
    ----------
    mean, variance
        (members, ...), of the same shape; variances not negative.

    Returns
    -------
    Tensor, Tensor
        (...) each.

    Raises
    ------
    InvalidInput
        For shapes that differ, no member, or a negative variance.

    Examples
    --------
    >>> mix_gaussians(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.5], [1.5]]))
    (tensor([1.]), tensor([2.]))
    """
    if mean.shape != variance.shape or mean.ndim < 1 or len(mean) == 0:
        raise InvalidInput(
            f"mean has shape {tuple(mean.shape)} and variance {tuple(variance.shape)}; both must be (members, ...)."
        )
    if not bool((variance >= 0).all()):
        raise InvalidInput(
            "variance is negative or not a number somewhere; the members' standard deviations squared are needed."
        )
    # over members: what each is unsure of, and what they disagree on
    return mean.mean(dim=0), variance.mean(dim=0) + mean.var(dim=0, correction=0)


class RunningMixture:
    """Mixture of members' class probabilities while they pass by: memory of one prediction, however many members.

    Examples
    --------
    >>> running = RunningMixture()
    >>> for logits in (torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]])):
    ...     running.update(logits)
    >>> running.count, running.proba
    (2, tensor([[0.7500, 0.2500]], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self._log_sum: Tensor | None = None

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Count one member's logits or log-probabilities in, (..., classes).

        Raises
        ------
        InvalidInput
            For fewer than two classes, a shape other than before, or logits that are not finite (minus infinity, a
            probability of zero, is fine).
        """
        if logits.ndim < 1 or logits.shape[-1] < 2 or not logits.dtype.is_floating_point:
            raise InvalidInput(
                f"logits are {logits.dtype} of shape {tuple(logits.shape)}; floating (..., classes) with at least two "
                "classes is needed: give a binary output as the pair (0, logit)."
            )
        log_p = logits.detach().double().log_softmax(dim=-1)
        if bool(log_p.isnan().any()):
            raise InvalidInput(f"logits of member {self.count} are not finite; leave that member out.")
        if self._log_sum is not None and self._log_sum.shape != log_p.shape:
            raise InvalidInput(
                f"logits have shape {tuple(log_p.shape)} and {tuple(self._log_sum.shape)} before; all members must "
                "predict the same inputs."
            )
        # the logarithm of a sum of probabilities, (..., classes): tiny ones keep their digits
        self._log_sum = log_p if self._log_sum is None else torch.logaddexp(self._log_sum, log_p)
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name, for a file; see :meth:`from_tensors`."""
        state = {"count": torch.tensor(self.count)}
        return state if self._log_sum is None else {**state, "log_sum": self._log_sum}

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor]) -> RunningMixture:
        """The mixture whose state :meth:`tensors` gave."""
        made = cls()
        made.count, made._log_sum = int(state["count"]), state.get("log_sum")
        return made

    @property
    def log_proba(self) -> Tensor:
        """Log-probabilities of the mixture, (..., classes), float64."""
        if self._log_sum is None:
            raise InvalidInput("no member was counted in yet; call update with its logits.")
        return self._log_sum - math.log(self.count)

    @property
    def proba(self) -> Tensor:
        """Probabilities of the mixture, (..., classes), float64."""
        return self.log_proba.exp()


class Ensemble:
    """Networks of one architecture that predict together, in evaluation mode.

    Parameters
    ----------
    module
        The architecture. It is copied; its own parameters are no member.
    members
        Trained modules of it, or their state dicts: of independent runs, of an SGHMC chain, from
        :meth:`mlcollage.infer.swag.SWAG.sample`.

    Raises
    ------
    InvalidInput
        For members of another architecture, or the same module twice.

    Examples
    --------
    >>> def net(seed):
    ...     with torch.random.fork_rng(devices=[]):
    ...         torch.manual_seed(seed)
    ...         return nn.Linear(4, 3)
    >>> ensemble = Ensemble(net(0), [net(seed) for seed in range(5)])
    >>> proba = ensemble.predict_proba(torch.ones(2, 4))
    >>> len(ensemble), proba.shape, bool(torch.allclose(proba.sum(1), torch.ones(2, dtype=torch.float64)))
    (5, torch.Size([2, 3]), True)
    """

    def __init__(self, module: nn.Module, members: Iterable[nn.Module | Mapping[str, Tensor]] = ()):
        self._module = copy.deepcopy(module).eval()  # one network, loaded with each member's state in turn
        self._states: list[dict[str, Tensor]] = []
        if isinstance(members, Sequence):
            modules = {id(member) for member in members if isinstance(member, nn.Module)}
            if len(modules) < sum(isinstance(member, nn.Module) for member in members):
                raise InvalidInput(
                    "the members hold the same module more than once, so they would all predict alike; train a new "
                    "network for each, or add(...) copies the states of one as it moves on."
                )
        for member in members:
            self.add(member)

    def __len__(self) -> int:
        return len(self._states)

    def add(self, member: nn.Module | Mapping[str, Tensor]) -> None:
        """Add a member, a copy of its parameters and buffers as they are now."""
        state = member.state_dict() if isinstance(member, nn.Module) else member
        if not isinstance(state, Mapping):
            raise InvalidInput(f"a member is {type(member).__name__}; a module or its state dict is needed.")
        # buffers count too: a member without its batch statistics would predict with another's
        own = {name: value.shape for name, value in self._module.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != own:
            odd = sorted(set(own) ^ set(state)) or [name for name in own if own[name] != state[name].shape]
            raise InvalidInput(f"a member is of another architecture: it differs in {odd[0]} ({len(odd)} in all).")
        if isinstance(member, nn.Module) and (layer := other_layer(signature(member), signature(self._module))):
            raise InvalidInput(
                f"a member (there) is of another architecture than the ensemble (here): {layer}; give modules of one."
            )
        self._states.append({name: value.detach().clone() for name, value in state.items()})

    @torch.no_grad()
    def outputs(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """What each member returns for ``x``, (members, N, ...); ``batch_size`` inputs at a time, by default all."""
        return torch.stack([self._output(state, x, batch_size) for state in self._needed()])

    @torch.no_grad()
    def predict_log_proba(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Log-probabilities of the mixture, (N, classes), of members that return logits; float64.

        Memory does not grow with the members.
        """
        running = RunningMixture()
        for state in self._needed():
            running.update(self._output(state, x, batch_size))
        return running.log_proba

    def predict_proba(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Probabilities of the mixture, (N, classes); float64."""
        return self.predict_log_proba(x, batch_size).exp()

    def _needed(self) -> list[dict[str, Tensor]]:
        if not self._states:
            raise InvalidInput("the ensemble has no members yet; add trained modules or state dicts.")
        return self._states

    def _output(self, state: dict[str, Tensor], x: Tensor, batch_size: int | None) -> Tensor:
        if x.ndim < 1 or len(x) == 0:
            raise InvalidInput(f"x has shape {tuple(x.shape)}; at least one input, (N, ...), is needed.")
        size = len(x) if batch_size is None else integer("batch_size", batch_size, least=1)
        self._module.load_state_dict(state)
        return torch.cat([self._module(part) for part in x.split(size)])
