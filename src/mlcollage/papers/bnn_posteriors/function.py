"""A network as a function of its sampled parameters, by the backend that suits it, and its linearization."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from mlcollage._checks import choice
from mlcollage.errors import InvalidInput
from mlcollage.nn import logits_of, unwrap

from .backends import Backend, Batch, FunctionalBackend, LoopBackend, MLPBackend, VmapBackend, linear_layers
from .frozen import Split, features_of, find_split
from .layout import Layout
from .likelihoods import Likelihood, make_likelihood
from .priors import GaussianPrior, PlacedPrior, Prior
from .validation import as_inputs, check_module

BackendName = Literal["auto", "untimed", "mlp", "vmap", "compile", "loop"]
_WORK = 2**26  # numbers that the activations of one chunk may take, by default
_TRIED_CHAINS, TRIED_DATA = 4, 256  # by which backends are timed
_CLEARLY = 1.25  # how many times faster the unlikely one must be


class NetworkFunction:
    """A copy of a module whose parameters that require a gradient are an argument: positions (chains, P).

    What every posterior is of; :class:`~mlcollage.papers.bnn_posteriors.network.BayesianNetwork` documents parameters
    and attributes.
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: str | Likelihood | Callable[[Tensor, Tensor], Tensor] = "categorical",
        prior: Prior | None = None,
        *,
        backend: BackendName = "auto",
    ):
        check_module(module)
        self.module = copy.deepcopy(unwrap(module))
        self.likelihood, self.layout = make_likelihood(likelihood), Layout.of(self.module)
        self.prior = GaussianPrior() if prior is None else prior
        if not isinstance(self.prior, Prior):
            raise InvalidInput(f"prior is {type(prior).__name__}; a Prior such as GaussianPrior(0.2) is needed.")
        self.backend: BackendName = choice("backend", backend, get_args(BackendName))
        self._backends: dict[Any, Backend] = {}  # made once, since they keep buffers
        self._splits: dict[str, Split | None] = {}
        self._frozen: tuple[Tensor, int, tuple[nn.Module, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found again when it is needed, and cannot be pickled."""
        return {**self.__dict__, "_backends": {}, "_splits": {}, "_frozen": None}

    @cached_property
    def placed_prior(self) -> PlacedPrior:
        """The prior over positions of this network."""
        return self.prior.place(self.layout, self.parameters_flat)

    @property
    def parameters_flat(self) -> Tensor:
        """The module's own parameters as a position, (P,)."""
        return self.layout.flatten(dict(self.module.named_parameters()))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters_flat.device

    def inputs(self, X: Any, what: str = "X") -> Tensor:
        """Inputs (n, ...) in the network's type and on its device, checked."""
        return as_inputs(X, self.module, what)

    def outputs(self, q: Tensor, x: Tensor, batch_size: int | None = None) -> Tensor:
        """Outputs (chains, n, ...) at positions (chains, P) for inputs (n, ...)."""
        module, x = self.reduced(x)
        backend = self._for_outputs(module, x)
        parts = [backend.outputs(q, part) for part in x.split(batch_size or len(x))]  # (chains, b, ...) each
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def reduced(self, x: Tensor) -> tuple[nn.Module, Tensor]:
        """The module and inputs (n, ...) as they are; or, where a part is frozen, its features and what takes them.

        The last inputs' features are kept, since one draw after the other asks for them.
        """
        key = f"{x.dtype} {tuple(x.shape[1:])}"  # the structure may depend on the shape of one input
        if key not in self._splits:
            self._splits[key] = find_split(self.module, self.layout, self.parameters_flat, x[:4])
        if (split := self._splits[key]) is None:
            return self.module, x
        if self._frozen is None or self._frozen[0] is not x or self._frozen[1] != x._version:
            features = features_of(split, x, self.chunk_size(x[:1], len(x)) or len(x))
            self._frozen = (x, x._version, (self.module, x) if features is None else (split.head, features))
        return self._frozen[2]

    def _for_outputs(self, module: nn.Module, x: Tensor) -> Backend:
        """By hand where the network is a perceptron, else as its gradients were computed, else in a loop."""
        layers = linear_layers(module, self.layout, x[:1])
        if layers is not None:
            with torch.no_grad():
                one = logits_of(functional_call(module, self.layout.unflatten(self.parameters_flat), (x[:1],)))
            if one.ndim == 2:
                key = ("predict", id(module))
                return self._backends.setdefault(key, MLPBackend(layers, self.layout, self.likelihood))
        # a backend that works for gradients works for outputs
        known = [b for b in self._backends.values() if isinstance(b, FunctionalBackend) and b.module is module]
        return known[0] if known else LoopBackend(module, self.layout, self.likelihood)

    def for_gradients(
        self, name: BackendName | None, module: nn.Module, x: Tensor, y: Tensor, few: Tensor
    ) -> Backend:  # fmt: skip
        """The backend of that name, or by default the network's, for data like these.

        Parameters
        ----------
        name
            A backend; ``"auto"``, the fastest that works without compiling; or ``"untimed"``, which goes by rules.
        module, x
            From :meth:`reduced`: the module or its head, and some inputs or features, (m, ...).
        y
            Their targets, (m, ...), checked.
        few
            The network's outputs for the first of them.
        """
        name = self.backend if name is None else choice("backend", name, get_args(BackendName))
        key = (name, id(module), tuple(x.shape[1:]))  # structure may depend on the shape of one input
        if key not in self._backends:
            self._backends[key] = self._choose(name, module, x, y, few)
        return self._backends[key]

    def _choose(self, name: BackendName, module: nn.Module, x: Tensor, y: Tensor, few: Tensor) -> Backend:
        parts = module, self.layout, self.likelihood
        q = self.parameters_flat.expand(_TRIED_CHAINS, -1).contiguous()  # (chains, P)
        if name in ("auto", "untimed", "mlp"):
            layers = linear_layers(module, self.layout, x)
            if layers is not None and few.ndim == 2:
                by_hand = MLPBackend(layers, self.layout, self.likelihood)
                # a last look before the structure is believed
                if torch.allclose(by_hand.outputs(q[:1], x[: len(few)])[0], few, rtol=1e-3, atol=1e-5):
                    return by_hand
            if name == "mlp":
                raise InvalidInput("the module is no plain stack of linear maps; use backend='auto'.")
        loop = LoopBackend(*parts)
        # convolutions on a CPU gain nothing from vmap, as a rule
        convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
        likely_loop = x.device.type == "cpu" and convolves
        if name == "loop" or (name == "untimed" and likely_loop):
            return loop
        # whether vmap can batch a module is known only by trying
        general = VmapBackend(*parts)
        batch = Batch(x, y, self.likelihood.targets(y, few))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # that is found out here
                general.gradient(q, [batch], torch.empty_like(q), True)
        except (RuntimeError, NotImplementedError) as error:
            if name in ("vmap", "compile"):
                raise InvalidInput(f"vmap cannot batch this module ({error}); use backend='loop'.") from error
            return loop
        if name == "compile":
            return VmapBackend(*parts, compiled=True)
        if name != "auto":
            return general
        # the likely one, unless the other is clearly faster: a small difference would change from run to run
        likely, other = (loop, general) if likely_loop else (general, loop)
        return other if _CLEARLY * _seconds(other, q, batch) < _seconds(likely, q, batch) else likely

    def chunk_size(self, one: Tensor, n: int, module: nn.Module | None = None) -> int | None:
        """Data per pass so that activations of one chain stay within the work size; None if all n do.

        Parameters
        ----------
        one
            An input, (1, ...).
        n
            Number of data.
        module
            By default the network; or a head, of whose features ``one`` is.
        """
        numbers = [one.numel()]  # of the input, and of what each layer without parts gives
        module = self.module if module is None else module

        def count(_: nn.Module, __: Any, output: Any) -> None:
            numbers.append(output.numel() if isinstance(output, Tensor) else 0)

        handles = [m.register_forward_hook(count) for m in module.modules() if not list(m.children())]
        try:
            with torch.no_grad():
                module(one)
        finally:
            for handle in handles:
                handle.remove()
        most = max(1, _WORK // max(sum(numbers), 1))
        return None if most >= n else most


def _seconds(backend: Backend, q: Tensor, batch: Batch) -> float:
    """Time of one gradient, the best of a few tries after one that is not counted."""
    out, times = torch.empty_like(q), list[float]()
    while len(times) < 2 or (sum(times) < 0.1 and len(times) < 10):
        begun = time.perf_counter()
        backend.gradient(q, [batch], out, False)
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def linearized(module: nn.Module, mean: Tensor, draws: Tensor, X: Tensor, *, batch_size: int | None = None) -> Tensor:
    r"""Outputs of the network's linearization about ``mean``, for each draw.

    .. math:: f_{lin}(x, w) = f(x, \hat w) + J(x, \hat w) \, (w - \hat w)

    by one Jacobian-vector product per draw; no Jacobian is stored.

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
        Inputs per pass; by default all.

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

    def output(w: Tensor, x: Tensor) -> Tensor:
        return logits_of(functional_call(module, layout.unflatten(w), (x,)))

    def one(draw: Tensor, x: Tensor) -> Tensor:
        moved = jvp(lambda w: output(w, x), (mean,), (draw - mean,))  # value and change, (N, ...) each
        return moved[0] + moved[1]

    with torch.no_grad():
        parts = [vmap(one, in_dims=(0, None))(draws, x) for x in X.split(batch_size or len(X))]
    return torch.cat(parts, dim=1)
