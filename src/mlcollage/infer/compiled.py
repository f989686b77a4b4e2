r"""An iteration of HMC as compiled kernels: density, gradient, leapfrog steps and Metropolis test, fused.

Small densities spend their time between operations: an iteration of five steps on the eight schools is 150 calls of
torch, each some microseconds for a few hundred numbers. Here the log-density and its gradient are traced once into a
flat graph (``make_fx``) and four pieces are compiled by torch's Inductor: the beginning of an iteration with its first
step, one more step, four more steps, and the Metropolis test. An iteration of L steps calls a few of them.

Inside, chains are the last dimension, (dim, chains), so that loops over chains read neighboring numbers: the kernels
are some four times as fast as with chains first. Random numbers are drawn outside, in the order of the uncompiled run:
the draws are those, up to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mlcollage._users import described
from mlcollage.infer._run import DIVERGENCE
from mlcollage.infer.chains import Info
from mlcollage.infer.density import LogDensity, State, normal
from mlcollage.infer.health import outside
from mlcollage.infer.metric import Metric
from mlcollage.infer.warmup import MOST_DENSE

Graph = Callable[..., tuple[Tensor, ...]]

_UNROLLED = (4, 1)  # leapfrog steps of a kernel
_OPTIONS = {"size_asserts": False}  # of each call, microseconds that a small density feels; shapes are checked here
_FAR = 1e-6  # relative distance of a compiled log-density or gradient from the uncompiled one that is not rounding


class NotCompiled(Exception):
    """Why a density cannot be compiled."""


@dataclass
class _Kernels:
    """What an iteration calls, for positions of one shape and one kind of mass."""

    begin: Graph
    more: dict[int, Graph]  # by the number of steps, largest first
    end: Graph
    turned: Tensor  # (chains,), none


# kernels of functions that are still there, so that a second run with one of them does not wait for the compiler; each
# run verifies what it takes from here
_made: WeakKeyDictionary[Callable[..., Any], dict[tuple[Any, ...], _Kernels]] = WeakKeyDictionary()


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
        self._kernels: dict[tuple[Any, ...], _Kernels] = {}
        # what the last call was given, and what kernels take in its place
        self._metric: tuple[Metric | None, str, Tensor, Tensor] = (None, "", torch.empty(0), torch.empty(0))
        self._step: tuple[Tensor | None, Tensor] = (None, torch.empty(0))
        self._counts: dict[int, Tensor] = {}

    def __call__(
        self, state: State, step: Tensor, steps: int, metric: Metric, metropolis: bool, generator: torch.Generator
    ) -> tuple[State, Info, Tensor] | None:
        """The next state, how it went, and which trajectories turned (chains,); None if it cannot be compiled.

        Parameters are those of :func:`mlcollage.infer.hmc.update`. Where it returns None it has warned, once, and left
        the generator as it was.
        """
        if self.failed:
            return None
        if self._metric[0] is not metric:
            dense = self.dense and state.position.shape[1] <= MOST_DENSE
            self._metric = (metric, *_chains_last(metric, state.position, dense))
        _, kind, inverse, root = self._metric
        x = state.position
        key = (kind, *x.shape, x.dtype, x.device, self.density.temperature, torch.get_num_threads())
        before = None if key in self._kernels else generator.get_state()
        try:
            if before is not None:
                self._kernels[key] = self._find(key, state, kind, inverse)
            return self._run(state, step, steps, (inverse, root), metropolis, generator, self._kernels[key], before)
        except NotCompiled as why:
            if before is not None:
                generator.set_state(before)
            self.failed = True
            warnings.warn(
                f"compile=True has no effect: log_prob cannot be compiled ({why}). The run goes on without, to the "
                "same draws.",
                UserWarning,
                stacklevel=outside(),
            )
        return None

    def _find(self, key: tuple[Any, ...], state: State, kind: str, inverse: Tensor) -> _Kernels:
        """Kernels from an earlier run, if they still give the density's values, or new ones."""
        try:
            made = _made.setdefault(self.density.log_prob, {})
        except TypeError:  # not hashable, or no weak references to it
            made = {}
        if key in made:
            q, zero = state.position.T.contiguous(), torch.zeros_like(state.position)
            eps = zero.new_full((1, len(zero)), 1e-3)
            with suppress(NotCompiled):
                _, q, _, value, gradient = made[key].begin(
                    q, state.gradient.T.contiguous(), zero, eps, inverse, inverse
                )
                self._verify(q, value, gradient)
                return made[key]
        made[key] = _compiled(self.density, state, kind, inverse)
        return made[key]

    def _run(
        self,
        state: State,
        step: Tensor,
        steps: int,
        mass: tuple[Tensor, Tensor],
        metropolis: bool,
        generator: torch.Generator,
        kernels: _Kernels,
        first: Tensor | None,
    ) -> tuple[State, Info, Tensor]:
        position, (inverse, root) = state.position, mass
        if self._step[0] is not step:  # as (1, chains)
            eps = torch.as_tensor(step, dtype=position.dtype, device=position.device).reshape(1, -1)
            self._step = (step, eps.expand(1, len(position)).contiguous())
        eps = self._step[1]
        # (dim, chains): transposes of what the last call returned are contiguous, and no copies
        q0, g0 = position.T.contiguous(), state.gradient.T.contiguous()
        noise = normal(position.shape, position, generator)
        p0, q, p, value, gradient = kernels.begin(q0, g0, noise, eps, inverse, root)
        if first is not None:
            self._verify(q, value, gradient)
        turned, left = kernels.turned, steps - 1
        for n, kernel in kernels.more.items():
            while left >= n:
                q, p, value, gradient, turned = kernel(q, p, q0, turned, eps, inverse)
                left -= n
        chance = torch.rand(len(position), dtype=torch.float64, device=q.device, generator=generator)
        if not metropolis:
            chance = chance - 2  # below any probability
        found = kernels.end(q0, state.log_prob, g0, p0, q, value, gradient, p, chance, eps, inverse)
        q, value, gradient, accept, accepted, energy, error, diverging = found
        if steps not in self._counts:
            self._counts[steps] = torch.full_like(accepted, steps, dtype=torch.int64)
        info = Info(accept, accepted, energy, error, diverging, self._counts[steps])
        return State(q.T, value, gradient.T), info, turned

    def _verify(self, q: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Compare with what is not compiled, at a position that the graph was not traced at."""
        for ours, theirs in zip((value, gradient.T), self.density(q.T.contiguous()), strict=True):
            near = (ours - theirs).abs() <= _FAR * (1 + theirs.abs()) * (1 if q.dtype == torch.float64 else 1e4)
            if not bool((near | ~theirs.isfinite()).all()):
                raise NotCompiled("compiled, it gives other values: it may draw random numbers or change its own data")


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
    if kind == "matrices":
        return (matrix * p).sum(dim=1)  # (dim, dim, chains) * (dim, chains)
    return matrix * p if kind == "diagonal" else matrix @ p


def _compiled(density: LogDensity, state: State, kind: str, inverse: Tensor) -> _Kernels:
    """The kernels for chains as many as in ``state``."""
    if hasattr(density.log_prob, "gradient"):
        raise NotCompiled("it brings a method for its gradient, which is used as it is")

    def begin(q: Tensor, g: Tensor, noise: Tensor, eps: Tensor, inverse: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        p0 = _times(kind, root, noise.T.contiguous())
        p = p0 + 0.5 * eps * g
        q = q + eps * _times(kind, inverse, p)
        value, gradient = density(q.T)
        return p0, q, p + eps * gradient.T, value.contiguous(), gradient.T.contiguous()

    def more(steps: int) -> Graph:
        def run(q: Tensor, p: Tensor, q0: Tensor, turned: Tensor, eps: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
            for _ in range(steps):
                q = q + eps * _times(kind, inverse, p)
                turned = turned | (((q - q0) * p).sum(dim=0) < 0)
                value, gradient = density(q.T)
                p = p + eps * gradient.T
            return q, p, value.contiguous(), gradient.T.contiguous(), turned

        return run

    def end(
        q0: Tensor,
        value0: Tensor,
        g0: Tensor,
        p0: Tensor,
        q: Tensor,
        value: Tensor,
        g: Tensor,
        p: Tensor,
        chance: Tensor,
        eps: Tensor,
        inverse: Tensor,
    ) -> tuple[Tensor, ...]:
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
        )

    q, value = state.position.T.contiguous(), state.log_prob.contiguous()
    eps, noise = q.new_full((1, q.shape[1]), 0.1), torch.ones_like(state.position)
    chance = torch.zeros(len(noise), dtype=torch.float64, device=q.device)
    turned = torch.zeros_like(chance, dtype=torch.bool)
    return _Kernels(
        begin=_kernel(begin, q, q, noise, eps, inverse, inverse),
        more={n: _kernel(more(n), q, q, q, turned, eps, inverse) for n in _UNROLLED},
        end=_kernel(end, q, value, q, q, q, value, q, q, chance, eps, inverse),
        turned=turned,
    )


def _kernel(function: Graph, *example: Tensor) -> Graph:
    """A function of tensors, traced and compiled for the shapes of an example."""
    example = tuple(x.clone() for x in example)  # or tracing would take arguments that are one tensor for one argument
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # fake tensors have no values: whoever branches on one, or leaves torch, is refused here
            graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
            kernel: Graph = torch._inductor.compile(graph, list(example), options=_OPTIONS)
            kernel(*example)  # builds what is built late
    except Exception as error:  # of the user's function, of torch's compiler or of the system's
        raise NotCompiled(described(error)) from error
    return kernel
