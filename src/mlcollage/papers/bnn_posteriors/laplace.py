r"""Laplace approximations by the package laplace-torch: a Gaussian around the mode, from the curvature there.

.. math:: q(w) = N\big(\hat w, \; T (G + S^{-1})^{-1}\big), \qquad
    G = \sum_i J_i^\top \, \nabla^2_z \big[{-\log p(y_i \mid z)}\big]_{z = f(x_i, \hat w)} \, J_i,

with the mode :math:`\hat w`, the Jacobians :math:`J_i` of the outputs, the generalized Gauss-Newton matrix G in place
of the Hessian, and the prior's covariance S. E. Daxberger et al., "Laplace Redux - Effortless Bayesian Deep Learning",
NeurIPS 2021. For linear networks with Gaussian noise it is the posterior itself.

Draws of q are meant for the network's linearization about the mode, :func:`linearized`, whose predictions they make
well; the network itself, given the same weights, does often worse (A. Immer, M. Korzepa and M. Bauer, "Improving
predictions of Bayesian neural nets via local linearization", AISTATS 2021).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.infer.density import Generator, torch_generator

from ._keep import Init, Progress, whole
from .layout import Layout
from .likelihoods import CategoricalLikelihood, GaussianLikelihood, Likelihood, make_likelihood
from .posterior import Posterior
from .priors import GaussianPrior, Prior
from .training import optimum

if TYPE_CHECKING:
    from .module import BayesianModule

__all__ = ["LaplacePosterior", "laplace", "laplace_posterior", "linearized"]

Structure = Literal["full", "kron", "diag"]


def laplace(
    model: BayesianModule,
    X: Any,
    y: Any,
    *,
    samples: int = 50,
    steps: int = 1000,
    lr: float = 0.01,
    optimizer: str = "adam",
    structure: Structure = "kron",
    only: str | None = None,
    linear: bool = True,
    temperature: float = 1.0,
    batch_size: int | None = None,
    init: Init = "reset",
    chunk_size: int | None = None,
    seed: Generator = 0,
    progress: Progress | None = None,
) -> Posterior:
    """Find a mode of the posterior and fit a Gaussian there: ``BayesianModule.fit(X, y, method="laplace")``.

    Parameters
    ----------
    model, X, y
        What is approximated.
    samples
        Draws of the Gaussian, as one chain.
    steps, lr, optimizer, batch_size
        Of the training that finds the mode; ``batch_size`` also of the passes for the curvature.
    structure, only, temperature
        As in :func:`laplace_posterior`.
    linear
        Whether predictions are those of the network's linearization about the mode, as they should be, or of the
        network.
    init, chunk_size, seed, progress
        As in :func:`mlcollage.papers.bnn_posteriors.fitting.hmc`.

    Returns
    -------
    Posterior
        ``kept`` is the mode, (1, 1, P).
    """
    whole(samples, "samples")
    _package()  # before the training, which may take long
    density = model.log_density(X, y, chunk_size=chunk_size)
    rng = torch_generator(seed, model.parameters_flat.device)
    start = model.initial(1, init, generator=rng)
    mode = optimum(
        density,
        start,
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        batch_size=batch_size,
        rng=rng,
        progress=progress,
    )
    network = copy.deepcopy(model.module)
    with torch.no_grad():
        own = dict(network.named_parameters())
        for name, value in model.unflatten(mode[0]).items():
            own[name].copy_(value)
    found = laplace_posterior(
        network,
        density._x,
        density._y,
        likelihood=model.likelihood,
        prior=model.prior,
        structure=structure,
        only=only,
        temperature=temperature,
        batch_size=batch_size,
    )
    info = {"steps": steps, "lr": lr, "structure": structure, "only": only, "temperature": temperature}
    return Posterior(
        model.layout,
        "laplace",
        found.sample(samples, rng)[None],
        info={**info, "linearized": linear, "path": density.path},
        kept=mode[:, None],
    )


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
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidInput(f"n={n!r} must be a positive number of draws.")
        own = self.approximation.sample(n, generator=torch_generator(generator, self.mean.device)).detach()
        center = self.mean[self.chosen]
        draws = self.mean.expand(n, -1).clone()
        draws[:, self.chosen] = center + math.sqrt(self.temperature) * (own - center)
        return draws


def laplace_posterior(
    module: nn.Module,
    X: Tensor,
    y: Tensor,
    *,
    likelihood: str | Likelihood = "categorical",
    prior: Prior | None = None,
    structure: Structure = "kron",
    only: str | None = None,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> LaplacePosterior:
    """Fit a Laplace approximation at a network's present weights, which should be the posterior's mode.

    ``BayesianModule.fit(X, y, method="laplace")`` finds the mode and calls this.

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
    structure
        Of the curvature: ``"full"`` (P x P; only for small networks), ``"kron"`` (Kronecker-factored a layer) or
        ``"diag"``.
    only
        Name of a module or parameter, or a pattern such as ``"*.bias"``: only these parameters vary, e.g. the last
        layer's. By default all that require a gradient.
    temperature
        T > 0.
    batch_size
        Data a pass; by default all at once.

    Returns
    -------
    LaplacePosterior

    Raises
    ------
    MissingDependency
        If laplace-torch is not installed.
    InvalidInput
        For likelihoods, priors and settings it cannot work with.
    """
    likelihood = make_likelihood(likelihood)
    prior = GaussianPrior() if prior is None else prior
    kind, noise = _kind(likelihood)
    if not isinstance(prior, GaussianPrior):
        raise InvalidInput(
            f"the prior is {type(prior).__name__}; the Laplace approximation here needs a GaussianPrior."
        )
    if structure not in ("full", "kron", "diag"):
        raise InvalidInput(f"structure={structure!r} is unknown; use 'full', 'kron' or 'diag'.")
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InvalidInput(f"temperature={temperature!r} must be a positive number.")
    make = _package()
    network = copy.deepcopy(module).eval()
    layout = Layout.of(network)
    picked = dict.fromkeys(layout.names, True) if only is None else _only(layout, only)
    for name, p in network.named_parameters():
        p.requires_grad_(picked.get(name, False))
    if structure == "kron":
        _check_layers(network)
    scale = prior.variance
    variance = layout.assign({"": scale} if isinstance(scale, int | float) else scale, "variance")
    like = next(p for p in network.parameters() if p.requires_grad)
    precision = like.new_tensor([1 / variance[name] for name in layout.names if picked[name]])
    y = y.unsqueeze(1) if kind == "regression" and y.ndim == 1 else y
    y = y.to(like.dtype) if kind == "regression" else y
    data = torch.utils.data.TensorDataset(X, y)
    approximation = make(
        network,
        kind,
        subset_of_weights="all",
        hessian_structure=structure,
        sigma_noise=noise,
        prior_precision=precision if len(precision) > 1 else float(precision),
    )
    approximation.fit(torch.utils.data.DataLoader(data, batch_size=batch_size or len(X)))
    own = dict(network.named_parameters())
    mean = layout.flatten({name: own[name] for name in layout.names})
    sizes = zip(layout.names, layout.sizes, strict=True)
    chosen = torch.cat([torch.full((size,), picked[name]) for name, size in sizes]).to(mean.device)
    return LaplacePosterior(mean, chosen, float(temperature), approximation)


def _package() -> Any:
    try:
        from laplace import Laplace
    except ImportError as error:
        raise MissingDependency(
            "Laplace approximations need the package laplace-torch; run pip install 'mlcollage[laplace]'."
        ) from error
    return Laplace


def _kind(likelihood: Likelihood) -> tuple[str, float]:
    """The likelihood's name in laplace-torch, and its noise."""
    if isinstance(likelihood, CategoricalLikelihood):
        return "classification", 1.0
    if isinstance(likelihood, GaussianLikelihood) and likelihood.noise is not None:
        return "regression", likelihood.noise
    what = type(likelihood).__name__ + (" without noise" if isinstance(likelihood, GaussianLikelihood) else "")
    raise InvalidInput(
        f"the likelihood is {what}; laplace-torch knows the categorical one and GaussianLikelihood(noise=...)."
    )


def _check_layers(network: nn.Module) -> None:
    """Refuse what Kronecker factors are wrong or missing for: other layers, and layers that vary in part."""
    seen: set[int] = set()
    for path, layer in network.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        vary = [name for name, p in own.items() if p.requires_grad]
        if not vary:
            continue
        where = f"{path} ({type(layer).__name__})"
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise InvalidInput(
                f"{where} has no Kronecker factors; use structure='diag' or 'full', or leave it out by only."
            )
        if len(vary) < len(own):
            raise InvalidInput(
                f"of {where} only {vary[0]} varies; Kronecker factors need a layer's weight and bias both."
            )
        if any(id(p) in seen for p in own.values()):
            raise InvalidInput(f"{where} shares parameters with another layer; use structure='diag' or 'full'.")
        seen |= {id(p) for p in own.values()}


def _only(layout: Layout, only: str) -> dict[str, bool]:
    return layout.assign({"": False, only: True}, "only")


def linearized(module: nn.Module, mean: Tensor, draws: Tensor, X: Tensor, *, batch_size: int | None = None) -> Tensor:
    r"""Outputs of the network's linearization about ``mean``, for each draw.

    .. math:: f_{lin}(x, w) = f(x, \hat w) + J(x, \hat w) \, (w - \hat w)

    by one Jacobian-vector product a draw; no Jacobian is stored.

    Parameters
    ----------
    module
        The network, in evaluation mode.
    mean
        :math:`\hat w`, (P,).
    draws
        (n, P).
    X
        Inputs (N, ...).
    batch_size
        Inputs a pass; by default all.

    Returns
    -------
    Tensor
        (n, N, ...).

    Examples
    --------
    A linear map is its own linearization:

    >>> net = nn.Linear(2, 1)
    >>> mean = torch.zeros(3)
    >>> linearized(net, mean, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1.0]])).tolist()
    [[[6.0]]]
    """
    layout = Layout.of(module)

    def one(draw: Tensor, x: Tensor) -> Tensor:
        moved = jvp(lambda w: functional_call(module, layout.unflatten(w), (x,)), (mean,), (draw - mean,))
        return moved[0] + moved[1]

    with torch.no_grad():
        parts = [vmap(one, in_dims=(0, None))(draws, x) for x in X.split(batch_size or len(X))]
    return torch.cat(parts, dim=1)
