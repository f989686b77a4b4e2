r"""Any network with a posterior over its weights.

.. math:: p(w \mid D) \propto \prod_{i=1}^N p(y_i \mid x_i, w) \; p(w), \qquad
    p(y \mid x, D) = E_{w \mid D} \, p(y \mid x, w)

P. Izmailov, S. Vikram, M. D. Hoffman and A. G. Wilson, "What Are Bayesian Neural Network Posteriors Really Like?",
ICML 2021, section 2.
"""

from __future__ import annotations

import copy
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage._checks import integer
from mlcollage.data.fresh_networks import fresh
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer.density import Generator, torch_generator
from mlcollage.nn import build, seeded

from .density import PosteriorDensity
from .fingerprint import fingerprint
from .function import TRIED_DATA, BackendName, NetworkFunction
from .layout import Layout
from .method import Init, Method, Progress, Target, check_method
from .posterior import Posterior
from .validation import as_data, as_tensor, check_behavior


class BayesianNetwork(NetworkFunction):
    r"""A network, a likelihood and a prior: everything a posterior needs but data.

    The module is copied and never changed. Its parameters that require a gradient are sampled; frozen ones and buffers
    stay as they are; one that is shared between layers is one parameter. Frozen first layers, such as a backbone, are
    run once per input: see :mod:`~mlcollage.papers.bnn_posteriors.frozen`.

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
        A :class:`~mlcollage.papers.bnn_posteriors.priors.Prior`; by default :math:`N(0, 1/5)` on every parameter, as in
        the paper's section 3.
    backend
        How gradients are computed: ``"mlp"`` (by hand), ``"vmap"``, ``"compile"`` or ``"loop"``; ``"auto"``, the
        fastest that works without compiling, by the clock; or ``"untimed"``, one by rules. The paths round differently,
        so a run that must repeat to the last bit elsewhere takes the one in ``posterior.info["backend"]``. See
        :mod:`~mlcollage.papers.bnn_posteriors.backends`.

    Attributes
    ----------
    module : Module
        The copy.
    layout : Layout
        Names, shapes and places of the sampled parameters; ``layout.size`` is P.

    Raises
    ------
    InvalidInput
        For modules whose likelihood is random or couples data, half precision, parameters of several types.

    Examples
    --------
    >>> from mlcollage.papers.bnn_posteriors import HMC, GaussianPrior
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(60, 2, generator=g)
    >>> y = (x[:, 0] > 0).long()
    >>> net = build(lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), seed=0)
    >>> bnn = BayesianNetwork(net, prior=GaussianPrior(1.0))
    >>> posterior = bnn.fit(x, y, HMC(chains=4, draws=20, warmup=20, burn_in=5))
    >>> posterior.params.shape
    torch.Size([4, 20, 42])
    >>> proba = posterior.predict_proba(x)
    >>> proba.shape, float((proba.argmax(1) == y).double().mean()) > 0.9
    (torch.Size([60, 2]), True)
    """

    def fit(
        self,
        X: Any,
        y: Any,
        method: Method,
        *,
        init: Init = "reset",
        chunk_size: int | None = None,
        generator: Generator = 0,
        progress: Progress | None = None,
    ) -> Posterior:
        """Sample or approximate the posterior.

        Parameters
        ----------
        X, y
            Training data, (n, ...) each; or a ``torch.utils.data.Dataset`` of pairs, and None.
        method
            How: ``HMC(...)``, ``NUTS(...)``, ``SGLD(...)``, ``SGHMC(...)``, ``CyclicalSGHMC(...)``, ``MFVI(...)``,
            ``SWAG(...)``, ``Laplace(...)``, ``Ensemble(...)``, ``MAP(...)``, or a :class:`Method` of your own.
        init
            Where chains or training start: see :meth:`initial`.
        chunk_size
            Data per pass, to bound memory: see :meth:`log_density`.
        generator
            A torch.Generator on the network's device, or a seed.
        progress
            Called as ``progress(steps done, steps in all)``.

        Returns
        -------
        Posterior
            Draws and predictions. The network itself is not changed.

        Raises
        ------
        InvalidInput
            For data that do not fit, and settings that do not work out.
        """
        check_method(method)
        density = self.log_density(X, y, chunk_size=chunk_size)
        # starts are drawn first, then what the method needs, all from one generator
        numbers = torch_generator(generator, self.parameters_flat.device)
        starts = partial(self.initial, init=init, generator=numbers)
        marks = partial(self._marks, density, init, chunk_size, numbers.get_state())
        return method.run(Target(self, density, starts, numbers, progress, numbers.initial_seed(), marks))

    def _marks(
        self, density: PosteriorDensity, init: Init, chunk_size: int | None, numbers: Tensor
    ) -> dict[str, str]:  # fmt: skip
        """A fingerprint of everything that defines density and run, but for the method."""
        here = self.parameters_flat
        start = here if isinstance(init, str) and init == "module" else None  # else its own parameters do not matter
        parts = {
            "data": (density.x, density.y), "network": self._module_mark, "likelihood": self.likelihood,
            "prior": self.prior, "backend": self.backend, "init": (init, start), "chunk_size": chunk_size,
            "seed": numbers, "type": (here.device.type, here.dtype),
        }  # fmt: skip
        return {name: fingerprint(part) for name, part in parts.items()}

    @cached_property
    def _module_mark(self) -> str:
        # once, since a module may count its calls
        return fingerprint(self.module)

    def log_density(
        self,
        X: Any,
        y: Any = None,
        temperature: float = 1.0,
        *,
        chunk_size: int | None = None,
        backend: BackendName | None = None,
    ) -> PosteriorDensity:
        """The log-posterior of positions (chains, P), and its gradient, for the samplers of :mod:`mlcollage.infer`.

        Parameters
        ----------
        X, y
            Data, (n, ...) each: tensors or arrays; or a ``torch.utils.data.Dataset`` of pairs, and None.
        temperature
            T > 0 that divides the whole log-density; leave it at 1 for samplers that take one themselves.
        chunk_size
            Data per pass, to bound memory; the sum over chunks is exact. By default as many as take at most 2^26
            numbers of activations in one chain.
        backend
            By default the network's.

        Returns
        -------
        PosteriorDensity

        Raises
        ------
        InvalidInput
            For data that do not fit, and networks whose output is random or couples data.
        """
        here = self.parameters_flat  # (P,); its type and device are those of the chains
        X, y = as_data(X, y)
        x = self.inputs(X)
        y = as_tensor(y, "y").to(here.device)
        if len(x) != len(y):
            raise InvalidInput(f"X has {len(x)} data and y {len(y)}; a target for each is needed.")
        # outputs for the first data, (m, ...): what kind they are, and that they do not change
        few = check_behavior(self.module, self.layout.unflatten(here), x)
        target_shape, y = tuple(y.shape[1:]), self.likelihood.check(few, y)
        module, features = self.reduced(x)
        chunk_size = self.chunk_size(features[:1], len(x), module) if chunk_size is None else chunk_size
        tried = slice(min(max(chunk_size or TRIED_DATA, len(few)), TRIED_DATA))
        how = self.for_gradients(backend, module, features[tried], y[tried], few)
        targets = self.likelihood.targets(y, few)
        return PosteriorDensity(
            self, self.placed_prior, how, x, y, targets, features,
            target_shape=target_shape, temperature=temperature, chunk_size=chunk_size,
        )  # fmt: skip

    def initial(self, chains: int, init: Init = "reset", *, generator: Generator = 0) -> Tensor:
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
        integer("chains", chains, least=1)
        here = self.parameters_flat
        numbers = torch_generator(generator, here.device)
        if isinstance(init, Tensor):
            if init.shape != (chains, self.layout.size):
                raise InvalidInput(f"init has shape {tuple(init.shape)}; {(chains, self.layout.size)} is needed.")
            return init.detach().to(here, copy=True)
        if init == "prior":
            return self.placed_prior.sample(chains, numbers)
        if init == "module":
            return here.expand(chains, -1).clone()  # (chains, P), all alike
        if init != "reset" and not callable(init):
            raise UnknownName(f"init must be 'reset', 'prior', 'module', positions or a function, not {init!r}.")
        # layers draw from the global generators, so each chain is built under a seed of its own
        seeds = torch.randint(2**62, (chains,), generator=numbers, device=numbers.device).tolist()
        if callable(init) and chains > 1:
            fresh(init, "init")
        rows = []
        for seed in seeds:
            made = build(init, seed) if callable(init) else self._reset(seed)
            if (difference := self.layout.difference(Layout.of(made))) is not None:
                raise InvalidInput(f"init makes another network: {difference} (this network, and the new one).")
            # (P,) each, in this network's order and type
            rows.append(self.layout.flatten(dict(made.named_parameters())).to(here))
        return torch.stack(rows)

    def _reset(self, seed: int) -> nn.Module:
        """A copy of the module whose layers draw their initialization anew."""
        fresh = copy.deepcopy(self.module)
        with seeded(seed):
            for part in fresh.modules():
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
        return fresh
