r"""Any network with a posterior over its weights.

.. math:: p(w \mid D) \propto \prod_{i=1}^N p(y_i \mid x_i, w) \; p(w), \qquad
    p(y \mid x, D) = E_{w \mid D} \, p(y \mid x, w)

P. Izmailov, S. Vikram, M. D. Hoffman and A. G. Wilson, "What Are Bayesian Neural Network Posteriors Really Like?",
ICML 2021, section 2.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer import diagnostics
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.infer.ensemble import RunningMixture
from mlcollage.nn.init import build, seeded

from ._checks import as_data, as_inputs, as_tensor, check_behavior, check_module
from .density import PosteriorDensity
from .kernels import Batch, Kernel, LoopKernel, MLPKernel, VmapKernel, dense_layers
from .layout import Layout
from .likelihoods import Likelihood, make_likelihood
from .posterior import Posterior, PredictionStream
from .priors import GaussianPrior, PlacedPrior, Prior

__all__ = ["BayesianModule"]

Path = Literal["auto", "mlp", "vmap", "compile", "loop"]
_WORK = 2**26  # numbers that the activations of one chunk may take, by default


class BayesianModule:
    r"""A network, a likelihood and a prior: everything a posterior needs but data.

    The module is copied and never changed. Its parameters that require a gradient are sampled; frozen ones and buffers
    stay as they are; one that is shared between layers is one parameter.

    Parameters
    ----------
    module
        Any ``torch.nn.Module`` from inputs (n, ...) to outputs (n, ...), in float32 or float64, on any device. Use it
        in the mode it has: batch normalization must be in evaluation mode, and so must dropout.
    likelihood
        ``"categorical"`` (outputs are logits), ``"gaussian"`` (outputs are mean and spread), ``"bernoulli"``, a
        :class:`~mlcollage.papers.bnn_posteriors.likelihoods.Likelihood`, or a function of outputs and targets that
        returns the log-likelihood of each datum.
    prior
        A :class:`~mlcollage.papers.bnn_posteriors.priors.Prior`; by default :math:`N(0, 1/5)` on every parameter.
    path
        How gradients are computed, where :meth:`log_density` is not told otherwise.

    Attributes
    ----------
    layout : Layout
        Names, shapes and places of the sampled parameters.
    posterior : Posterior or None
        After :meth:`fit`.

    Raises
    ------
    InvalidInput
        For modules whose likelihood is random or couples data, half precision, parameters of several types.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(60, 2, generator=g)
    >>> y = (x[:, 0] > 0).long()
    >>> net = build(lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), seed=0)
    >>> model = BayesianModule(net, prior=GaussianPrior(1.0))
    >>> model.fit(x, y, "hmc", chains=4, samples=20, warmup=20, burn_in=5).posterior.params.shape
    torch.Size([4, 20, 42])
    >>> proba = model.predict_proba(x)
    >>> proba.shape, float((proba.argmax(1) == y).double().mean()) > 0.9
    (torch.Size([60, 2]), True)
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: str | Likelihood | Callable[[Tensor, Tensor], Tensor] = "categorical",
        prior: Prior | None = None,
        *,
        path: Path = "auto",
    ):
        check_module(module)
        self.likelihood = make_likelihood(likelihood)
        self.prior = GaussianPrior() if prior is None else prior
        if not isinstance(self.prior, Prior):
            raise InvalidInput(f"prior is {type(prior).__name__}; a Prior such as GaussianPrior(0.2) is needed.")
        self.module = copy.deepcopy(module)
        self.layout = Layout.of(self.module)
        self.path = path
        self.posterior: Posterior | None = None
        self._placed: PlacedPrior | None = None
        self._kernels: dict[str, Kernel] = {}

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sampled parameters."""
        return self.layout.names

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each of them."""
        return self.layout.sizes

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.layout.size

    @property
    def parameters_flat(self) -> Tensor:
        """The module's own parameters as a position, (P,)."""
        return self.flatten(dict(self.module.named_parameters()))

    def flatten(self, parameters: dict[str, Tensor]) -> Tensor:
        """Parameters by name, (..., *shape) each, as positions (..., P)."""
        return self.layout.flatten(parameters)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Positions (..., P) as parameters by name, views."""
        return self.layout.unflatten(flat)

    @property
    def placed_prior(self) -> PlacedPrior:
        """The prior over positions of this network."""
        if self._placed is None:
            self._placed = self.prior.place(self.layout, self.parameters_flat)
        return self._placed

    def initial(
        self,
        chains: int,
        init: Tensor | str | Callable[[], nn.Module] = "reset",
        *,
        generator: Generator = 0,
    ) -> Tensor:
        """Where chains start, (chains, P).

        Parameters
        ----------
        chains
            Number of rows.
        init
            ``"reset"``: the layers' own ``reset_parameters``, afresh for each chain (parameters of modules without it
            stay); ``"prior"``: draws of the prior; ``"module"``: all at the module's weights; a function that makes a
            network; or positions (chains, P).
        generator
            A torch.Generator or a seed.
        """
        if isinstance(chains, bool) or not isinstance(chains, int) or chains < 1:
            raise InvalidInput(f"chains={chains!r} must be a positive number.")
        here = self.parameters_flat
        rng = torch_generator(generator, here.device)
        if isinstance(init, Tensor):
            if init.shape != (chains, self.layout.size):
                raise InvalidInput(f"init has shape {tuple(init.shape)}; {(chains, self.layout.size)} is needed.")
            return init.detach().to(here, copy=True)
        if init == "prior":
            return self.placed_prior.sample(chains, rng)
        if init == "module":
            return here.expand(chains, -1).clone()
        if init != "reset" and not callable(init):
            raise UnknownName(
                f"init={init!r} is not known; choose 'reset', 'prior', 'module', positions or a function."
            )
        seeds = torch.randint(2**62, (chains,), generator=rng, device=rng.device).tolist()
        rows = []
        for seed in seeds:
            fresh = build(init, seed) if callable(init) else self._reset(seed)
            made = Layout.of(fresh)
            if (difference := self.layout.difference(made)) is not None:
                raise InvalidInput(f"init makes another network: {difference} (this network, and the new one).")
            rows.append(self.flatten(dict(fresh.named_parameters())).to(here))
        return torch.stack(rows)

    def _reset(self, seed: int) -> nn.Module:
        fresh = copy.deepcopy(self.module)
        with seeded(seed):
            for part in fresh.modules():
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
        return fresh

    # --- density ------------------------------------------------------------------------------------------------------

    def log_density(
        self,
        X: Any,
        y: Any = None,
        temperature: float = 1.0,
        *,
        chunk_size: int | None = None,
        path: Path | None = None,
    ) -> PosteriorDensity:
        """The log-posterior of positions (chains, P), and its gradient, for the samplers of :mod:`mlcollage.infer`.

        Parameters
        ----------
        X, y
            Data, (n, ...) each: tensors or arrays; or a ``torch.utils.data.Dataset`` of pairs, and None.
        temperature
            T > 0 that divides the whole log-density; leave it at 1 for samplers that take one themselves.
        chunk_size
            Data a pass, to bound memory; the sum over chunks is exact. By default as many as take at most 2^26 numbers
            of activations in one chain.
        path
            How: ``"mlp"`` (by hand), ``"vmap"``, ``"compile"``, ``"loop"``; ``"auto"`` takes the best that works
            without compiling. By default the model's; see :mod:`~mlcollage.papers.bnn_posteriors.kernels`.

        Returns
        -------
        PosteriorDensity

        Raises
        ------
        InvalidInput
            For data that do not fit, and networks whose output is random or couples data.
        """
        here = self.parameters_flat
        X, y = as_data(X, y)
        x = as_inputs(X, self.module, here)
        y = as_tensor(y, "y").to(here.device)
        if len(x) != len(y):
            raise InvalidInput(f"X has {len(x)} data and y {len(y)}; a target for each is needed.")
        parameters = self.unflatten(here)
        few = check_behavior(self.module, parameters, x)
        y = self.likelihood.check(few, y)
        kernel = self._kernel(self.path if path is None else path, x[:4], y[:4], few)
        chunk = chunk_size if chunk_size is not None else self._chunk(x[:1], len(x))
        return PosteriorDensity(
            kernel,
            self.placed_prior,
            self.likelihood,
            self.layout,
            x,
            y,
            self.likelihood.targets(y, few),
            dtype=here.dtype,
            temperature=temperature,
            chunk_size=chunk,
        )

    def _chunk(self, one: Tensor, n: int) -> int | None:
        """Data a pass so that activations of one chain stay within the work size."""
        numbers = [one.numel()]

        def count(_: nn.Module, __: Any, output: Any) -> None:
            numbers.append(output.numel() if isinstance(output, Tensor) else 0)

        handles = [m.register_forward_hook(count) for m in self.module.modules() if not list(m.children())]
        try:
            with torch.no_grad():
                self.module(one)
        finally:
            for handle in handles:
                handle.remove()
        most = max(1, _WORK // max(sum(numbers), 1))
        return None if most >= n else most

    def _kernel(self, path: str, x: Tensor, y: Tensor, few: Tensor) -> Kernel:
        if path not in (known := get_args(Path)):
            raise UnknownName(f"path={path!r} is not known; choose {', '.join(known)}.")
        key = f"{path} {tuple(x.shape[1:])}"
        if key not in self._kernels:
            self._kernels[key] = self._choose(path, x, y, few)
        return self._kernels[key]

    def _choose(self, path: str, x: Tensor, y: Tensor, few: Tensor) -> Kernel:
        general = VmapKernel(self.module, self.layout, self.likelihood)
        loop = LoopKernel(self.module, self.layout, self.likelihood)
        if path in ("auto", "mlp"):
            layers = dense_layers(self.module, self.layout, x)
            if layers is not None and few.ndim == 2:
                kernel = MLPKernel(layers, self.layout, self.likelihood)
                # a last look before the structure is believed
                if torch.allclose(kernel.outputs(self.parameters_flat[None], x)[0], few, rtol=1e-3, atol=1e-5):
                    return kernel
            if path == "mlp":
                raise InvalidInput("the module is no plain stack of linear maps; use path='auto'.")
        on_cpu = x.device.type == "cpu"
        if path == "loop" or (path == "auto" and on_cpu and _convolves(self.module)):
            return loop
        q = self.parameters_flat.expand(2, -1).contiguous()
        try:
            batch = Batch(x, y, self.likelihood.targets(y, few))
            general.gradient(q, [batch], torch.empty_like(q), True)
        except (RuntimeError, NotImplementedError) as error:
            if path in ("vmap", "compile"):
                raise InvalidInput(f"torch.func.vmap cannot batch this module ({error}); use path='loop'.") from error
            return loop
        return VmapKernel(self.module, self.layout, self.likelihood, compiled=True) if path == "compile" else general

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, method: str = "hmc", **settings: Any) -> BayesianModule:
        """Sample or approximate the posterior.

        Parameters
        ----------
        X, y
            Training data, (n, ...) each; or a ``torch.utils.data.Dataset`` of pairs, and None.
        method
            ``"hmc"``, ``"nuts"``, ``"sgld"``, ``"sghmc"``, ``"csghmc"``, ``"mfvi"``, ``"ensemble"``, ``"swag"``,
            ``"laplace"`` or ``"map"``.
        settings
            Of the method: the keywords of the function of that name in
            :mod:`mlcollage.papers.bnn_posteriors.fitting`; among them, of all, ``seed`` and ``progress``.

        Returns
        -------
        BayesianModule
            Itself; the result is :attr:`posterior`.
        """
        from .fitting import fit

        self.posterior = fit(self, X, y, method, **settings)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior; see :meth:`Posterior.save`."""
        self._fitted().save(path)

    def load(self, path: str | os.PathLike[str]) -> BayesianModule:
        """Read a posterior of this architecture; see :meth:`Posterior.load`."""
        read = Posterior.load(path, self.layout, self.likelihood)
        here = self.parameters_flat
        self.posterior = read if read.params is None else _moved(read, here)
        return self

    def _fitted(self) -> Posterior:
        if self.posterior is None:
            raise InvalidInput("the model was not fitted yet; call fit(X, y) or load(path).")
        return self.posterior

    # --- predictions --------------------------------------------------------------------------------------------------

    def _outputs(self, X: Any, batch_size: int | None) -> Iterator[Tensor]:
        """Outputs of one draw of every chain after the other, (chains, N, ...)."""
        draws = self._fitted().draws()
        here = self.parameters_flat
        x = as_inputs(X, self.module, here)
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise InvalidInput(f"batch_size={batch_size!r} must be a positive number of inputs.")
        posterior = self._fitted()
        if posterior.info.get("linearized"):  # a Laplace approximation, about the mode that it keeps
            from .laplace import linearized

            assert posterior.kept is not None
            mode = posterior.kept[0, 0].to(here)
            for draw in range(draws.shape[1]):
                yield linearized(self.module, mode, draws[:, draw].to(here), x, batch_size=batch_size)
            return
        with torch.no_grad():
            few = functional_call(self.module, self.unflatten(here), (x[:1],))
        layers = dense_layers(self.module, self.layout, x[:1])
        kernel: Kernel
        if layers is not None and few.ndim == 2:
            kernel = self._kernels.setdefault("predict", MLPKernel(layers, self.layout, self.likelihood))
        else:
            known = [k for k in self._kernels.values() if not isinstance(k, MLPKernel)]
            kernel = known[0] if known else LoopKernel(self.module, self.layout, self.likelihood)
        for draw in range(draws.shape[1]):
            q = draws[:, draw].to(here)
            parts = [kernel.outputs(q, part) for part in x.split(batch_size or len(x))]
            yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _streamed(self, X: Any) -> PredictionStream | None:
        """The stream that was filled while fitting, if the draws were not stored."""
        posterior = self._fitted()
        if posterior.params is not None or posterior.stream is None:
            return None
        if X is not None:
            x = as_inputs(X, self.module, self.parameters_flat)
            if not torch.equal(x, posterior.stream.x.to(x)):
                raise InvalidInput(
                    "only the predictions at the inputs given as at= were kept; ask for those (X=None), or fit with "
                    "store='params'."
                )
        return posterior.stream

    def predict_proba(self, X: Any = None, batch_size: int | None = None) -> Tensor:
        """Class probabilities averaged over all draws of all chains: the Bayesian model average.

        Parameters
        ----------
        X
            Inputs (N, ...). Where only predictions were kept, the inputs given as ``at``, or None.
        batch_size
            Inputs a pass; by default all.

        Returns
        -------
        Tensor
            (N, K), float64. Memory does not grow with the draws.
        """
        if self.likelihood.kind != "classification":
            self.likelihood.log_proba(torch.zeros(0))
        stream = self._streamed(X)
        if stream is not None:
            return stream.proba
        running = RunningMixture()
        for outputs in self._outputs(X, batch_size):
            running.update(self.likelihood.log_proba(outputs))
        return running.proba.mean(dim=0)

    def predict_moments(self, X: Any = None, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the predictive mixture of a Gaussian likelihood, (N, ...) each, float64."""
        if self.likelihood.kind != "regression":
            self.likelihood.moments(torch.zeros(0))
        stream = self._streamed(X)
        if stream is None:
            stream = PredictionStream(self.likelihood, as_inputs(X, self.module, self.parameters_flat))
            for outputs in self._outputs(X, batch_size):
                stream.update(outputs)
        return stream.moments

    def predict(self, X: Any = None, batch_size: int | None = None) -> Tensor:
        """Most probable class, (N,), or the predictive mean."""
        if self.likelihood.kind == "regression":
            return self.predict_moments(X, batch_size)[0]
        return self.predict_proba(X, batch_size).argmax(dim=-1)

    def predict_samples(self, X: Any, batch_size: int | None = None) -> Tensor:
        """The prediction of every draw, (chain, draw, N, ...): class probabilities, means, or outputs as they are."""
        return torch.stack([self._prediction(out) for out in self._outputs(X, batch_size)], dim=1)

    def _prediction(self, outputs: Tensor) -> Tensor:
        if self.likelihood.kind == "classification":
            return self.likelihood.log_proba(outputs).exp()
        return self.likelihood.moments(outputs)[0] if self.likelihood.kind == "regression" else outputs

    def function_rhat(self, X: Any = None, method: Literal["rank", "split", "folded"] = "rank") -> np.ndarray:
        """R-hat of each predicted number, (N, K) or (N, ...): whether the chains agree where it matters."""
        stream = self._streamed(X)
        if stream is not None:
            self._warn_of_one(len(stream.diagnostics.mean_of_chains()))
            return stream.diagnostics.rhat().cpu().numpy()
        return diagnostics.rhat(self.predict_samples(X), method)

    def function_ess(self, X: Any = None, method: Literal["bulk", "tail", "mean"] = "bulk") -> np.ndarray:
        """Effective sample size of each predicted number, (N, K) or (N, ...)."""
        stream = self._streamed(X)
        return stream.diagnostics.ess().cpu().numpy() if stream else diagnostics.ess(self.predict_samples(X), method)

    @staticmethod
    def _warn_of_one(chains: int) -> None:
        if chains == 1:
            warnings.warn("R-hat of one chain compares only its halves; run several chains from different starts.")


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())


def _moved(posterior: Posterior, like: Tensor) -> Posterior:
    assert posterior.params is not None
    return dataclasses.replace(posterior, params=posterior.params.to(like))
