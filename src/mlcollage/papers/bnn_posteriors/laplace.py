r"""Laplace approximations by the package laplace-torch: a Gaussian around the mode, from the curvature there.

.. math:: q(w) = N\big(\hat w, \; T (G + S^{-1})^{-1}\big), \qquad
    G = \sum_i J_i^\top \, \nabla^2_z \big[{-\log p(y_i \mid z)}\big]_{z = f(x_i, \hat w)} \, J_i,

with the mode :math:`\hat w`, the Jacobians :math:`J_i` of the outputs, the generalized Gauss-Newton matrix G in place
of the Hessian, and the prior's covariance S. E. Daxberger et al., "Laplace Redux - Effortless Bayesian Deep Learning",
NeurIPS 2021. For linear networks with Gaussian noise it is the posterior itself.

Draws of q are meant for the network's linearization about the mode,
:func:`~mlcollage.papers.bnn_posteriors.function.linearized`, whose predictions they make well; the network itself,
given the same weights, does often worse (A. Immer, M. Korzepa and M. Bauer, "Improving predictions of Bayesian neural
nets via local linearization", AISTATS 2021).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.infer.density import Generator, torch_generator

from .layout import Layout
from .likelihoods import CategoricalLikelihood, GaussianLikelihood, Likelihood, make_likelihood
from .method import CountFrom1, Method, Positive, Target
from .posterior import Posterior
from .priors import GaussianPrior, Prior
from .training import GradientAscent, Gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class Laplace(Method):
    """A Gaussian around a mode of the posterior, from the curvature there; not in the paper.

    Parameters
    ----------
    draws
        Draws of the Gaussian, as one chain.
    steps, lr, optimizer
        Of the training that finds the mode, as in :class:`~mlcollage.papers.bnn_posteriors.ensemble.MAP`.
    batch_size
        Data per step of the training and per pass for the curvature; None for all.
    structure
        Of the curvature: ``"full"`` (P x P; only for small networks), ``"kron"`` (Kronecker-factored per layer) or
        ``"diag"``.
    only
        Name of a module or parameter, or a pattern such as ``"*.bias"``: only these parameters vary, e.g. the last
        layer's. None for all that require a gradient.
    linearized
        Whether predictions are those of the network's linearization about the mode, as they should be, or of the
        network.
    temperature
        T; multiplies the covariance.
    """

    name = "laplace"
    draws: CountFrom1 = 50
    steps: CountFrom1 = 1000
    lr: Positive = 0.01
    optimizer: Literal["adam", "sgd"] = "adam"
    batch_size: CountFrom1 | None = None
    structure: Literal["full", "kron", "diag"] = "kron"
    only: str | None = None
    linearized: bool = True
    temperature: Positive = 1.0

    def run(self, target: Target) -> Posterior:
        """Train, fit and draw; called by ``BayesianNetwork.fit``.

        Returns
        -------
        Posterior
            ``kept`` is the mode, (1, 1, P).
        """
        _package()  # before the training, which may take long
        start = target.starts(1)
        gradients = Gradients(target.density, self.batch_size, target.generator)
        mode = GradientAscent(self.steps, self.lr, self.optimizer)(gradients, start, target.progress)  # (1, P)
        network = copy.deepcopy(target.network.module)
        network.load_state_dict(target.network.layout.unflatten(mode[0]), strict=False)
        likelihood, prior = target.network.likelihood, target.network.prior
        found = self.around(network, target.density.x, target.density.y, likelihood=likelihood, prior=prior)
        params = found.sample(self.draws, target.generator)[None]
        return target.posterior(self, params, {}, kept=mode[:, None])

    def around(
        self,
        module: nn.Module,
        X: Tensor,
        y: Tensor,
        *,
        likelihood: str | Likelihood = "categorical",
        prior: Prior | None = None,
    ) -> LaplacePosterior:
        """Fit the Gaussian at a network's present weights, which should be the posterior's mode.

        Parameters
        ----------
        module
            At the mode. It is copied.
        X, y
            All training data, (n, ...) and targets.
        likelihood
            ``"categorical"``, or a ``GaussianLikelihood`` with known noise: those that laplace-torch knows.
        prior
            A ``GaussianPrior``, by default N(0, 1/5).

        Raises
        ------
        MissingDependency
            If laplace-torch is not installed.
        InvalidInput
            For likelihoods, priors and layers it cannot work with.
        """
        likelihood = make_likelihood(likelihood)
        prior = GaussianPrior() if prior is None else prior
        kind, noise = _kind(likelihood)
        if not isinstance(prior, GaussianPrior):
            raise InvalidInput(f"the prior is {type(prior).__name__}; Laplace approximations need a GaussianPrior.")
        make = _package()
        network = copy.deepcopy(module).eval()
        layout = Layout.of(network)
        picked = layout.assign(True if self.only is None else {"": False, self.only: True}, "only")
        # laplace-torch looks at what requires a gradient
        for name, p in network.named_parameters():
            p.requires_grad_(picked.get(name, False))
        if self.structure == "kron":
            _check_layers(network)
        variance = layout.assign(prior.variance, "variance")
        like = next(p for p in network.parameters() if p.requires_grad)
        # laplace-torch takes one precision per parameter tensor that varies
        precision = like.new_tensor([1 / variance[name] for name in layout.names if picked[name]])
        # (n, d) in the network's type, as its outputs are
        y = y.unsqueeze(1) if kind == "regression" and y.ndim == 1 else y
        y = y.to(like.dtype) if kind == "regression" else y
        data = torch.utils.data.TensorDataset(X, y)
        approximation = make(
            network,
            kind,
            subset_of_weights="all",
            hessian_structure=self.structure,
            sigma_noise=noise,
            prior_precision=precision if len(precision) > 1 else float(precision),
        )
        approximation.fit(
            torch.utils.data.DataLoader(data, batch_size=self.batch_size or len(X), generator=torch.Generator())
        )
        mean = layout.flatten(dict(network.named_parameters()))
        chosen = layout.vector(picked).bool().to(mean.device)  # (P,)
        return LaplacePosterior(mean, chosen, self.temperature, approximation)


@dataclass(frozen=True)
class LaplacePosterior:
    """A Gaussian over a network's sampled parameters.

    Attributes
    ----------
    mean : Tensor
        (P,), the mode, in the order of ``Layout.of(module)``.
    chosen : Tensor
        (P,) bool, which parameters vary; the others stay at the mode.
    temperature : float
        T.
    approximation : object
        What laplace-torch fitted, over the chosen parameters, at temperature 1.
    """

    mean: Tensor
    chosen: Tensor
    temperature: float
    approximation: Any

    def sample(self, n: int = 1, generator: Generator = 0) -> Tensor:
        """Draws, (n, P).

        Parameters
        ----------
        n
            Number of draws.
        generator
            A torch.Generator on the parameters' device, or a seed.
        """
        integer("n", n, least=1)
        # (n, chosen), at temperature 1
        own = self.approximation.sample(n, generator=torch_generator(generator, self.mean.device)).detach()
        center = self.mean[self.chosen]
        draws = self.mean.expand(n, -1).clone()  # (n, P)
        # a temperature multiplies the covariance
        draws[:, self.chosen] = center + math.sqrt(self.temperature) * (own - center)
        return draws


def _package() -> Any:
    try:
        from laplace import Laplace
    except ImportError as error:
        raise MissingDependency("laplace-torch is not installed; run pip install 'mlcollage[laplace]'.") from error
    return Laplace


def _kind(likelihood: Likelihood) -> tuple[str, float]:
    """The likelihood's name in laplace-torch, and its noise."""
    if isinstance(likelihood, CategoricalLikelihood):
        return "classification", 1.0
    if isinstance(likelihood, GaussianLikelihood) and likelihood.noise is not None:
        return "regression", likelihood.noise
    what = type(likelihood).__name__ + (" without noise" if isinstance(likelihood, GaussianLikelihood) else "")
    raise InvalidInput(f"the likelihood is {what}; laplace-torch knows categorical and GaussianLikelihood(noise=...).")


def _check_layers(network: nn.Module) -> None:
    """Refuse what Kronecker factors are wrong or missing for: other layers, and layers that vary in part."""
    seen: set[int] = set()  # ids of parameters, to find shared ones
    for path, layer in network.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        vary = [name for name, p in own.items() if p.requires_grad]
        if not vary:
            continue
        where = f"{path} ({type(layer).__name__})"
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise InvalidInput(f"{where} has no Kronecker factors; use 'diag' or 'full', or leave it out by only.")
        if len(vary) < len(own):
            raise InvalidInput(f"of {where} only {vary[0]} varies; Kronecker factors need weight and bias both.")
        if any(id(p) in seen for p in own.values()):
            raise InvalidInput(f"{where} shares parameters with another layer; use structure='diag' or 'full'.")
        seen |= {id(p) for p in own.values()}
