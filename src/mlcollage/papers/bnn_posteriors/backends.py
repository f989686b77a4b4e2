r"""Outputs and gradients of many chains at once: four backends behind one interface.

``mlp``
    Stacks of linear maps and elementwise nonlinearities, recognized by structure. The forward and backward pass of all
    chains is written by hand over preallocated buffers, with activations as (chains, units, data): the long dimension,
    the data, is contiguous, which is what matrix products and elementwise operations want. The first layer's
    gradient is one product for all chains.
``vmap``
    Any other module that :func:`torch.func.vmap` can batch over parameters; convolutions become grouped ones.
``compile``
    The same through :func:`torch.compile`, on request: for long runs, since compiling takes tens of seconds for each
    number of chains and data.
``loop``
    One chain after the other, for modules that vmap cannot batch (data-dependent control flow), and where it is faster:
    for most recurrent layers and convolutions on a CPU.

Where vmap and the loop both work, they are timed (see ``BayesianNetwork(backend=...)``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from mlcollage.nn import MLP, logits_of

from .layout import Layout
from .likelihoods import Likelihood

__all__ = ["Backend", "Batch", "LinearLayer", "LoopBackend", "MLPBackend", "VmapBackend", "linear_layers"]


@dataclass(frozen=True)
class Batch:
    """Some data: shared by all chains, or (``own``) with a leading dimension of chains.

    Attributes
    ----------
    x : Tensor
        Inputs as the module takes them, (n, ...) or (chains, n, ...).
    y : Tensor
        Checked targets, (n, ...) or (chains, n, ...).
    targets : Tensor
        The same with the data last, for :meth:`Likelihood.score`.
    own : bool
        Whether each chain has data of its own.
    """

    x: Tensor
    y: Tensor
    targets: Tensor
    own: bool = False

    @property
    def size(self) -> int:
        """Data (of each chain)."""
        return self.x.shape[1 if self.own else 0]

    @cached_property
    def columns(self) -> Tensor:
        """Flat inputs with the data last, (in, n) or (chains, in, n)."""
        flat = self.x.flatten(2) if self.own else self.x.flatten(1)
        return flat.mT.contiguous()


def exact_matmul(device: torch.device) -> AbstractContextManager[None]:
    """Products in the full precision of float32 on a GPU (no TF32): a Metropolis test sees the difference."""
    return _without_tf32() if device.type == "cuda" else _AS_IT_IS


_AS_IT_IS = nullcontext()


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Backend(ABC):
    """Outputs and likelihood gradients of a network at positions (chains, P)."""

    name: str

    @abstractmethod
    def outputs(self, q: Tensor, x: Tensor) -> Tensor:
        """Outputs of every chain for shared inputs (n, ...), (chains, n, ...)."""

    @abstractmethod
    def gradient(self, q: Tensor, batches: Sequence[Batch], out: Tensor, value: bool) -> Tensor | None:
        """Write the gradient of the log-likelihood, summed over the batches, to ``out``; return the value if asked."""


@dataclass(frozen=True)
class LinearLayer:
    """One linear map of a perceptron and the nonlinearity behind it (None for the identity)."""

    weight: str
    bias: str | None
    activation: nn.Module | None


class _Rule(NamedTuple):
    """An elementwise nonlinearity by hand.

    ``forward(z, module)`` gives the output. ``backward(g, z, module)`` multiplies what comes from above by the
    derivative; ``z`` then holds the input, or the output of those that overwrite it.
    """

    forward: Callable[[Tensor, Any], Tensor]
    backward: Callable[[Tensor, Tensor, Any], Tensor]


_aten = torch.ops.aten
_RULES: dict[type[nn.Module], _Rule] = {
    # in place, with derivatives by the output
    nn.ReLU: _Rule(lambda z, m: z.relu_(), lambda g, h, m: _aten.threshold_backward.grad_input(g, h, 0, grad_input=g)),
    nn.Tanh: _Rule(lambda z, m: z.tanh_(), lambda g, h, m: _aten.tanh_backward.grad_input(g, h, grad_input=g)),
    nn.Sigmoid: _Rule(lambda z, m: z.sigmoid_(), lambda g, h, m: _aten.sigmoid_backward.grad_input(g, h, grad_input=g)),
    # with derivatives by the input, which is kept
    nn.SiLU: _Rule(lambda z, m: F.silu(z), lambda g, z, m: _aten.silu_backward(g, z)),
    nn.GELU: _Rule(
        lambda z, m: F.gelu(z, approximate=m.approximate),
        lambda g, z, m: _aten.gelu_backward(g, z, approximate=m.approximate),
    ),
    nn.Softplus: _Rule(
        lambda z, m: F.softplus(z, m.beta, m.threshold),
        lambda g, z, m: _aten.softplus_backward(g, z, m.beta, m.threshold),
    ),
    nn.ELU: _Rule(lambda z, m: F.elu(z, m.alpha), lambda g, z, m: _aten.elu_backward(g, m.alpha, 1.0, 1.0, False, z)),
    nn.LeakyReLU: _Rule(
        lambda z, m: F.leaky_relu(z, m.negative_slope),
        lambda g, z, m: _aten.leaky_relu_backward(g, z, m.negative_slope, False),
    ),
}


def _flat_modules(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]] | None:
    """Prefix and module of a plain chain in order of execution; None if it is none."""
    if _has_hooks(module):
        return None
    found: list[tuple[str, nn.Module]] = []
    if type(module) is nn.Sequential:
        parts = list(module.named_children())
    elif type(module) is MLP:
        blocks = [(f"hidden{i}", module.get_submodule(f"hidden{i}")) for i in range(1, module.depth + 1)]
        if any(getattr(block, "norm", None) is not None or _has_hooks(block) for _, block in blocks):
            return None
        found = [(prefix, nn.Flatten())]
        parts = [(f"{name}.{key}", child) for name, block in blocks for key, child in block.named_children()]
        parts.append(("head", module.head))
    else:
        return [(prefix, module)]
    for name, child in parts:
        inner = _flat_modules(child, f"{prefix}{name}.")
        if inner is None:
            return None
        found += inner
    return found


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def linear_layers(module: nn.Module, layout: Layout, sample: Tensor) -> list[LinearLayer] | None:
    """The layers of a perceptron whose parameters are all sampled, for flat inputs; None if the module is none.

    Parameters
    ----------
    module
        Any module.
    layout
        Of its sampled parameters.
    sample
        A few of its inputs.
    """
    chain = _flat_modules(module, "")
    if chain is None:
        return None
    while chain and type(chain[0][1]) is nn.Flatten and (chain[0][1].start_dim, chain[0][1].end_dim) == (1, -1):
        chain, sample = chain[1:], sample.flatten(1)
    if sample.ndim != 2:
        return None
    layers: list[LinearLayer] = []
    for prefix, part in chain:
        kind = type(part)
        if kind is nn.Identity or (kind is nn.Dropout and (not part.training or part.p == 0)):
            continue
        if kind is nn.Linear:
            layers.append(LinearLayer(f"{prefix}weight", None if part.bias is None else f"{prefix}bias", None))
        elif kind in _RULES and layers and layers[-1].activation is None:
            layers[-1] = replace(layers[-1], activation=part)
        else:
            return None
    # every sampled parameter, once
    used = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
    # a frozen, shared or unused parameter is left to the general backends
    return layers if layers and sorted(used) == sorted(layout.names) and layers[-1].activation is None else None


class _Buffers:
    """Work buffers of a perceptron for so many chains and data, and every view of them, made once.

    A call of a small network takes some hundred microseconds; making a view takes one.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], chains: int, n: int, like: Tensor):
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=like.dtype, device=like.device)

        self.chains = chains
        # what each linear map gives, (chains, out, n), and its transpose
        self.z = [empty(chains, units, n) for units, _ in shapes]
        self.zt = [z.transpose(1, 2) for z in self.z]
        # gradients by what each linear map takes, (chains, in, n); the first one's is not needed
        self.dh = [None, *(empty(chains, width, n) for _, width in shapes[1:])]
        # gradients by the weights, (chains, out, in), and the same as (chains, out * in)
        self.by_weight = [empty(chains, *shape) for shape in shapes]
        self.by_weight_flat = [g.view(chains, -1) for g in self.by_weight]
        self.by_first = self.by_weight[0].view(-1, shapes[0][1])  # (chains * out, in)
        # what each layer gave in the last forward pass, (chains, out, n): z itself, or a new tensor
        self.h: list[Tensor] = []


Parts = dict[str, Tensor]  # gradients by name, (chains, numbers) each


class _Weights(NamedTuple):
    """Views of a position: a layer's weight (chains, out, in), its transpose, its bias (chains, out, 1)."""

    weight: Tensor
    transposed: Tensor
    column: Tensor | None


class MLPBackend(Backend):
    """Perceptrons, by hand.

    Parameters
    ----------
    layers
        From :func:`linear_layers`.
    layout
        Of the positions.
    likelihood
        Its :meth:`~mlcollage.papers.bnn_posteriors.likelihoods.Likelihood.score` is used.
    """

    name = "mlp"
    _most_buffers = 8  # a training set, its last chunk, test inputs, ...

    def __init__(self, layers: Sequence[LinearLayer], layout: Layout, likelihood: Likelihood):
        self.layers, self.layout, self.likelihood = tuple(layers), layout, likelihood
        shape = dict(zip(layout.names, layout.shapes, strict=True))
        self._shapes = [shape[layer.weight] for layer in self.layers]
        self._buffers: dict[tuple[Any, ...], _Buffers] = {}
        self._seen: tuple[Tensor, list[_Weights]] | None = None

    def _buffers_for(self, chains: int, n: int, like: Tensor) -> _Buffers:
        key = (chains, n, like.dtype, like.device)
        if key not in self._buffers:
            if len(self._buffers) == self._most_buffers:  # the oldest goes
                del self._buffers[next(iter(self._buffers))]
            self._buffers[key] = _Buffers(self._shapes, chains, n, like)
        return self._buffers[key]

    def _weights(self, q: Tensor) -> list[_Weights]:
        """Views of q for each layer; made once for a position that moves in place."""
        if self._seen is None or self._seen[0] is not q:
            at, found = self.layout.slices, []
            for layer, shape in zip(self.layers, self._shapes, strict=True):
                weight = q[:, at[layer.weight]].unflatten(1, shape)
                column = None if layer.bias is None else q[:, at[layer.bias]].unsqueeze(2)
                found.append(_Weights(weight, weight.mT, column))
            self._seen = (q, found)
        return self._seen[1]

    def _forward(self, weights: list[_Weights], x: Tensor, buffers: _Buffers) -> Tensor:
        """Outputs (chains, K, n) for inputs (in, n) or (chains, in, n)."""
        h, buffers.h = (x.expand(buffers.chains, -1, -1) if x.ndim == 2 else x), []
        for i, (layer, w) in enumerate(zip(self.layers, weights, strict=True)):
            z = buffers.z[i]
            if w.column is None:  # (chains, out, in) @ (chains, in, n)
                torch.bmm(w.weight, h, out=z)
            else:
                torch.baddbmm(w.column, w.weight, h, out=z)
            act = layer.activation
            h = z if act is None else _RULES[type(act)].forward(z, act)
            buffers.h.append(h)
        return h

    @torch.no_grad()
    def outputs(self, q: Tensor, x: Tensor) -> Tensor:
        """See :class:`Backend`."""
        with exact_matmul(q.device):
            z = self._forward(self._weights(q), x.flatten(1).T, self._buffers_for(len(q), len(x), q))
        return z.mT.clone()  # (chains, n, K), out of the buffer

    def gradient(self, q: Tensor, batches: Sequence[Batch], out: Tensor, value: bool) -> Tensor | None:
        """See :class:`Backend`; to be called without recording a graph."""
        weights, total = self._weights(q), None
        parts: Parts = {}
        with exact_matmul(q.device):
            into = self._buffers_for(len(q), batches[0].size, q)  # where the gradients of all chunks add up
            for batch in batches:
                buffers = self._buffers_for(len(q), batch.size, q)
                z = self._forward(weights, batch.columns, buffers)
                part, dz = self.likelihood.score(z, batch.targets, value)
                if part is not None:
                    total = part if total is None else total + part
                self._backward(weights, dz, batch.columns, buffers, into, parts)
        # in the order of the position, (chains, P)
        torch.cat([parts[name] for name in self.layout.names], dim=1, out=out)
        return total

    def _backward(
        self, weights: list[_Weights], dz: Tensor, x: Tensor, buffers: _Buffers, into: _Buffers, parts: Parts
    ) -> None:
        """Gradients of every parameter, (chains, numbers), written to ``parts``, or added to what is there."""
        first = not parts
        for i in reversed(range(len(self.layers))):
            layer, by_weight = self.layers[i], into.by_weight[i]
            if i == 0 and x.ndim == 2:  # all chains as one product
                flat = dz.reshape(-1, dz.shape[2])  # (chains * out, n) @ (n, in)
                if first:
                    torch.mm(flat, x.T, out=into.by_first)
                else:
                    into.by_first.addmm_(flat, x.T)
            else:
                # (chains, out, n) @ (chains, n, in)
                h = x if i == 0 else buffers.h[i - 1]
                below = buffers.zt[i - 1] if i and h is buffers.z[i - 1] else h.mT
                if first:
                    torch.bmm(dz, below, out=by_weight)
                else:
                    by_weight.baddbmm_(dz, below)
            parts[layer.weight] = into.by_weight_flat[i]
            if layer.bias is not None:
                by_bias = dz.sum(dim=2)  # (chains, out)
                parts[layer.bias] = by_bias if first else parts[layer.bias].add_(by_bias)
            if i == 0:
                return
            dh = buffers.dh[i]
            assert dh is not None
            torch.bmm(weights[i].transposed, dz, out=dh)  # (chains, in, out) @ (chains, out, n)
            before = self.layers[i - 1].activation
            dz = dh if before is None else _RULES[type(before)].backward(dh, buffers.z[i - 1], before)


class FunctionalBackend(Backend):
    """What the general backends share: the module as a function of its parameters."""

    def __init__(self, module: nn.Module, layout: Layout, likelihood: Likelihood):
        self.module, self.layout, self.likelihood = module, layout, likelihood

    def _call(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return logits_of(functional_call(self.module, parameters, (x,)))

    def _log_lik(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.log_prob(self._call(parameters, x), y).double().sum()


class VmapBackend(FunctionalBackend):
    """Any module that ``torch.func.vmap`` can batch over its parameters, compiled on request."""

    def __init__(self, module: nn.Module, layout: Layout, likelihood: Likelihood, compiled: bool = False):
        super().__init__(module, layout, likelihood)
        self.name = "compile" if compiled else "vmap"
        # for data that all chains share, and for data of each chain's own
        self._shared, self._own = self._maker(None, compiled), self._maker(0, compiled)

    def _maker(self, dims: int | None, compiled: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Positions (chains, P) and data to gradients (chains, P) and values (chains,)."""
        run = vmap(grad_and_value(self._log_lik), in_dims=(0, dims, dims), randomness="error")

        def evaluate(q: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = run(self.layout.unflatten(q), x, y)
            return torch.cat([gradient[name].reshape(len(q), -1) for name in self.layout.names], dim=1), value

        return torch.compile(evaluate) if compiled else evaluate

    @torch.no_grad()
    def outputs(self, q: Tensor, x: Tensor) -> Tensor:
        """See :class:`Backend`."""
        with exact_matmul(q.device):
            return vmap(self._call, in_dims=(0, None), randomness="error")(self.layout.unflatten(q), x)

    @torch.no_grad()
    def gradient(self, q: Tensor, batches: Sequence[Batch], out: Tensor, value: bool) -> Tensor | None:
        """See :class:`Backend`."""
        total: Tensor | None = None
        with exact_matmul(q.device):
            for number, batch in enumerate(batches):
                flat, part = (self._own if batch.own else self._shared)(q, batch.x, batch.y)
                _ = out.copy_(flat) if number == 0 else out.add_(flat)
                total = part if total is None else total + part
        return total


class LoopBackend(FunctionalBackend):
    """One chain after the other: works for every module."""

    name = "loop"

    @torch.no_grad()
    def outputs(self, q: Tensor, x: Tensor) -> Tensor:
        """See :class:`Backend`."""
        with exact_matmul(q.device):
            return torch.stack([self._call(self.layout.unflatten(one), x) for one in q])

    def gradient(self, q: Tensor, batches: Sequence[Batch], out: Tensor, value: bool) -> Tensor | None:
        """See :class:`Backend`."""
        values = []
        with exact_matmul(q.device), torch.enable_grad():
            for c, one in enumerate(q):
                # by name, so that a parameter that is shared between layers is one leaf
                leaves = {n: v.detach().requires_grad_(True) for n, v in self.layout.unflatten(one).items()}
                # gradients and value of one chain, over all batches
                sums, total = None, torch.zeros((), dtype=torch.float64, device=q.device)
                for batch in batches:
                    x, y = (batch.x[c], batch.y[c]) if batch.own else (batch.x, batch.y)
                    part, found = self._differentiated(leaves, x, y)
                    sums = found if sums is None else tuple(a + b for a, b in zip(sums, found, strict=True))
                    total = total + part.detach()
                assert sums is not None
                torch.cat([g.reshape(-1) for g in sums], out=out[c])
                values.append(total)
        return torch.stack(values) if value else None

    def _differentiated(self, leaves: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log-likelihood of some data and its gradient, while the chain's parameters are in the module."""

        # Gradient checkpointing runs layers again in the backward pass, and must find the chain's parameters there.
        class Inside(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, log_prob: Callable[..., Tensor]) -> Any:
                part = log_prob(logits_of(self.module(x)), y).double().sum()
                wanted = list(leaves.values())
                return part, torch.autograd.grad(part, wanted, allow_unused=True, materialize_grads=True)

        swapped = {f"module.{name}": p for name, p in leaves.items()}
        return functional_call(Inside(self.module), swapped, (self.likelihood.log_prob,))
