r"""An iteration of HMC as compiled kernels: density, gradient, leapfrog steps and Metropolis test, fused.

Small densities spend their time between operations: an iteration of five steps on the eight schools is 150 calls of
torch, each some microseconds for a few hundred numbers. Here the log-density and its gradient are traced once into a
flat graph (``make_fx``) and the parts of an iteration are compiled by torch's Inductor, each when it is first needed:
the beginning with the first leapfrog step; four more steps; and the end, which is the Metropolis test after 0, 1, 2 or
3 more steps. An iteration of up to 4 steps is two calls, one of 5 to 8 steps three.

Inside, chains are the last dimension, (dim, chains), so that loops over chains read neighboring numbers: the kernels
are some four times as fast as with chains first. Random numbers are drawn outside, in the order of the uncompiled run:
the draws are those, up to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlcollage._users import described
from mlcollage.infer._run import DIVERGENCE
from mlcollage.infer.chains import Info
from mlcollage.infer.density import LogDensity, State, normal
from mlcollage.infer.health import outside
from mlcollage.infer.metric import Metric
from mlcollage.infer.warmup import MOST_DENSE

Graph = Callable[..., tuple[Tensor, ...]]

_UNROLLED = 4  # leapfrog steps of a kernel
_OPTIONS = {"size_asserts": False}  # of each call, microseconds that a small density feels; shapes are checked here
_FUSED = 32  # dimensions up to which a matrix is applied within a kernel, not by a call of BLAS
_FAR = 1e-6  # relative distance of a compiled log-density or gradient from the uncompiled one that is not rounding


class NotCompiled(Exception):
    """Why a density cannot be compiled."""


# kernels of functions that are still there, so that a second run with one of them does not wait for the compiler; each
# run verifies what it takes from here
_made: WeakKeyDictionary[Callable[..., Any], dict[tuple[Any, ...], _Parts]] = WeakKeyDictionary()


class CompiledIteration:
    """Iterations of all chains for one density, compiled when they are first called.

    Parameters
    ----------
    density
        A function of the position alone, in torch operations without a branch on values: what it reads otherwise is
        frozen at the first call.
    dense
        Whether a dense mass may come: then a diagonal one is taken for a matrix too, in up to 100 dimensions, so that
        kernels are compiled once.
    """

    def __init__(self, density: LogDensity, dense: bool = False):
        self.density, self.dense = density, dense
        self.failed = False
        # what the last call was given, and what kernels take in its place
        self._parts: dict[tuple[Any, ...], _Parts] = {}
        self._mass: Metric | None = None
        self._now: _Parts | None = None  # for it
        self._metric = ("", torch.empty(0), torch.empty(0))  # kind, inverse and root
        self._step: tuple[Tensor | None, Tensor] = (None, torch.empty(0))
        self._counts: dict[int, Tensor] = {}

    def __call__(
        self, state: State, step: Tensor, steps: int, metric: Metric, metropolis: bool, generator: torch.Generator
    ) -> tuple[State, Info, Tensor] | None:
        """The next state, how it went, and which trajectories turned (chains,); None if it cannot be compiled.

        Parameters are those of :func:`mlcollage.infer.hmc.update`. Where it returns None it has warned, once, and left
        the generator as it was.
        """
        more, last = divmod(steps - 1, _UNROLLED)
        begin, four, end = self._kernels(state, metric, last, more > 0)
        if begin is None:
            return None
        position, (inverse, root) = state.position, self._metric[1:]
        if self._step[0] is not step:
            self._step = (step, _as_row(step, position))
        eps = self._step[1]
        # (dim, chains): transposes of what the last call returned are contiguous, and no copies
        q0, g0 = position.T.contiguous(), state.gradient.T.contiguous()
        noise = normal(position.shape, position, generator).T.contiguous()
        p0, q, p, value, gradient, turned = begin(q0, g0, noise, eps, inverse, root)
        for _ in range(more):
            q, p, value, gradient, turned = four(q, p, q0, turned, eps, inverse)
        chance = torch.rand(len(position), dtype=torch.float64, device=q.device, generator=generator)
        if not metropolis:
            chance = chance - 2  # below any probability
        found = end(q0, state.log_prob, g0, p0, q, value, gradient, p, turned, chance, eps, inverse)
        q, value, gradient, accept, accepted, energy, error, diverging, turned = found
        if steps not in self._counts:
            self._counts[steps] = torch.full_like(accepted, steps, dtype=torch.int64)
        info = Info(accept, accepted, energy, error, diverging, self._counts[steps])
        return State(q.T, value, gradient.T), info, turned

    def one_step(self, state: State, metric: Metric, generator: torch.Generator) -> Callable[[Tensor], Tensor] | None:
        """As :func:`mlcollage.infer.adaptation.one_step`; None where it cannot be compiled, as in a call."""
        begin, _, end = self._kernels(state, metric, 0, False)
        if begin is None:
            return None
        inverse, root = self._metric[1:]
        q0, g0 = state.position.T.contiguous(), state.gradient.T.contiguous()
        noise = normal(state.position.shape, state.position, generator).T.contiguous()
        chance = torch.zeros_like(state.log_prob, dtype=torch.float64)

        def accept(step: Tensor) -> Tensor:
            eps = _as_row(step, state.position)
            p0, q, p, value, gradient, turned = begin(q0, g0, noise, eps, inverse, root)
            return end(q0, state.log_prob, g0, p0, q, value, gradient, p, turned, chance, eps, inverse)[3]

        return accept

    def _kernels(self, state: State, metric: Metric, last: int, more: bool) -> tuple[Any, Any, Any]:
        """Beginning, four steps and end of an iteration; ``_metric`` then has the mass as they take it.

        All None if one of them cannot be compiled, with a warning at the first time.
        """
        try:
            if self._mass is not metric and not self.failed:
                x, self._mass = state.position, metric
                self._metric = _chains_last(metric, x, self.dense and x.shape[1] <= MOST_DENSE)
                key = (self._metric[0], *x.shape, x.dtype, x.device, self.density.temperature, torch.get_num_threads())
                if key not in self._parts:
                    self._parts[key] = self._find(key, state)
                self._now = self._parts[key]
            if self._now is not None:
                return self._now["begin"], self._now["more"] if more else None, self._now[last]
        except NotCompiled as why:
            self.failed, self._now = True, None
            warnings.warn(
                f"compile=True has no effect: log_prob cannot be compiled ({why}). The run goes on without, to the "
                "same draws.",
                UserWarning,
                stacklevel=outside(),
            )
        return None, None, None

    def _find(self, key: tuple[Any, ...], state: State) -> _Parts:
        """Kernels from an earlier run, if they still give the density's values, or new ones."""
        try:
            made = _made.setdefault(self.density.log_prob, {})
        except TypeError:  # not hashable, or no weak references to it
            made = {}
        if key in made:
            with suppress(NotCompiled):
                self._verify(made[key], state)
                return made[key]
        parts = _Parts(self.density, state, *self._metric[:2])
        self._verify(parts, state)
        made[key] = parts
        return parts

    def _verify(self, parts: _Parts, state: State) -> None:
        """Compare with what is not compiled, a small step away from where the graph was traced."""
        q, g = state.position.T.contiguous(), state.gradient.T.contiguous()
        _, q, _, value, gradient, _ = parts["begin"](
            q, g, torch.ones_like(q), q.new_full((1, q.shape[1]), 1e-3), *self._metric[1:]
        )
        for ours, theirs in zip((value, gradient.T), self.density(q.T.contiguous()), strict=True):
            near = (ours - theirs).abs() <= _FAR * (1 + theirs.abs()) * (1 if q.dtype == torch.float64 else 1e4)
            if not bool((near | ~theirs.isfinite()).all()):
                raise NotCompiled("compiled, it gives other values: it may draw random numbers or change its own data")


def _as_row(step: Tensor, position: Tensor) -> Tensor:
    """Step sizes (groups,) as (1, chains)."""
    eps = step.to(dtype=position.dtype, device=position.device).reshape(1, -1)
    return eps.expand(1, len(position)).contiguous()


def _chains_last(metric: Metric, position: Tensor, dense: bool) -> tuple[str, Tensor, Tensor]:
    """Kind of product, and the inverse mass and its root in the form that it takes."""
    inverse, root = metric.inverse, metric.root
    if inverse is None or root is None:
        inverse = root = position.new_ones(1, position.shape[1])
    if not metric.dense and dense:
        inverse, root = torch.diag_embed(inverse), torch.diag_embed(root)
    if inverse.ndim == 2:
        inverse, root = (m.T.expand(-1, len(position)).contiguous() for m in (inverse, root))
        return "diagonal", inverse, root
    if len(inverse) == 1:
        return "matrix", inverse[0].contiguous(), root[0].contiguous()
    return "matrices", inverse.permute(1, 2, 0).contiguous(), root.permute(1, 2, 0).contiguous()


def _times(kind: str, matrix: Tensor, p: Tensor) -> Tensor:
    """A matrix times momenta (dim, chains)."""
    if kind == "diagonal":
        return matrix * p
    if kind == "matrix" and len(p) > _FUSED:
        return matrix @ p
    matrix = matrix[:, :, None] if kind == "matrix" else matrix
    return (matrix * p).sum(dim=1)  # (dim, dim, chains or 1) * (dim, chains), which becomes part of the kernel


class _Parts:
    """The kernels of an iteration, by name, for positions of one shape and one kind of mass.

    ``"begin"``, ``"more"``, and the end after 0, 1, 2 or 3 more steps. None of them holds on to ``density``.
    """

    def __init__(self, density: LogDensity, state: State, kind: str, inverse: Tensor):
        if hasattr(density.log_prob, "gradient"):
            raise NotCompiled("it brings a method for its gradient, which is used as it is")
        # all positions, momenta and gradients are (dim, chains); eps is (1, chains), other quantities (chains,)
        q0, value = state.position.T.contiguous(), state.log_prob.contiguous()
        traced = _traced(lambda q: tuple(x.T.contiguous() for x in density(q.T)), q0)

        def begin(
            q: Tensor, g: Tensor, noise: Tensor, eps: Tensor, inverse: Tensor, root: Tensor
        ) -> tuple[Tensor, ...]:
            p0 = _times(kind, root, noise)
            p = p0 + 0.5 * eps * g
            q = q + eps * _times(kind, inverse, p)
            value, g = traced(q)
            return p0, q, p + eps * g, value, g, torch.zeros_like(value, dtype=torch.bool)

        def advance(
            steps: int, q: Tensor, p: Tensor, q0: Tensor, turned: Tensor, eps: Tensor, inverse: Tensor
        ) -> tuple[Tensor, ...]:
            value = g = q  # there is a step at least
            for _ in range(steps):
                q = q + eps * _times(kind, inverse, p)
                turned = turned | (((q - q0) * p).sum(dim=0) < 0)
                value, g = traced(q)
                p = p + eps * g
            return q, p, value, g, turned

        def end(
            steps: int,
            q0: Tensor,
            value0: Tensor,
            g0: Tensor,
            p0: Tensor,
            q: Tensor,
            value: Tensor,
            g: Tensor,
            p: Tensor,
            turned: Tensor,
            chance: Tensor,
            eps: Tensor,
            inverse: Tensor,
        ) -> tuple[Tensor, ...]:
            if steps:
                q, p, value, g, turned = advance(steps, q, p, q0, turned, eps, inverse)
            # as in hmc._accept, with (dim, chains) in place of (chains, dim); the last kick was half a kick too long
            p1, p0, inverse = (p - 0.5 * eps * g).double(), p0.double(), inverse.double()
            change = 0.5 * ((p1 - p0) * _times(kind, inverse, p1 + p0)).sum(dim=0)
            rise = change - (value.double() - value0.double())
            error = torch.where(rise.isfinite(), rise, torch.inf)
            accept = (-error).clamp(max=0).exp()
            accepted = (chance < accept) & error.isfinite()
            before = 0.5 * (p0 * _times(kind, inverse, p0)).sum(dim=0) - value0.double()
            return (
                torch.where(accepted, q, q0),
                torch.where(accepted, value, value0),
                torch.where(accepted, g, g0),
                accept,
                accepted,
                torch.where(accepted, before + error, before),
                error,
                error > DIVERGENCE,
                turned.clone(),
            )

        eps, chance = q0.new_full((1, q0.shape[1]), 0.1), torch.zeros_like(value, dtype=torch.float64)
        turned = torch.zeros_like(chance, dtype=torch.bool)
        # the functions, and what they are called with
        self._functions: dict[str | int, tuple[Graph, tuple[Tensor, ...]]] = {
            "begin": (begin, (q0, q0, q0, eps, inverse, inverse)),
            "more": (partial(advance, _UNROLLED), (q0, q0, q0, turned, eps, inverse)),
        }
        given = (q0, value, q0, q0, q0, value, q0, q0, turned, chance, eps, inverse)
        self._functions |= {n: (partial(end, n), given) for n in range(_UNROLLED)}
        self._kernels: dict[str | int, Graph] = {}

    def __getitem__(self, part: str | int) -> Graph:
        if part not in self._kernels:
            function, example = self._functions[part]
            self._kernels[part] = _kernel(function, *example)
        return self._kernels[part]


def _traced(function: Graph, *example: Tensor) -> GraphModule:
    """A function of tensors as a graph of torch operations on such tensors.

    The tensors of ``example`` must be different ones, or arguments that are one tensor would become one argument.
    """
    try:
        # fake tensors have no values: whoever branches on one, or leaves torch, is refused here
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
    except Exception as error:  # of the user's function, or of torch
        raise NotCompiled(described(error)) from error


def _kernel(function: Graph, *example: Tensor) -> Graph:
    """A function of tensors, compiled for the shapes of an example."""
    example = tuple(x.clone() for x in example)
    graph = _traced(function, *example)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel: Graph = torch._inductor.compile(graph, list(example), options=_OPTIONS)
            kernel(*example)  # builds what is built late
    except Exception as error:  # of torch's compiler or of the system's
        raise NotCompiled(described(error)) from error
    return kernel
