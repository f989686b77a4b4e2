r"""Squared gradient norms of single examples, without the gradients of single examples ("ghost norms").

One forward pass and one backward pass to the outputs of the layers, never to their weights, give
:math:`\|\nabla_\theta \ell_i\|^2` for all examples i of a batch: see :mod:`mlcollage.measure._uses` for the algebra.
With ``differentiable=True`` the norms are part of the graph, so that they can be penalized.

I. Goodfellow, "Efficient Per-Example Gradient Computations", arXiv:1510.01799 (linear layers); Z. Bu, J. Mao and S. Xu,
"Scalable and Efficient Training of Large Convolutional Neural Networks with Differential Privacy", arXiv:2205.10683
(mixed ghost norms); X. Li, F. Tramèr, P. Liang and T. Hashimoto, arXiv:2110.05679 (sequences, embeddings).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure import _fallback
from mlcollage.measure._tape import Tape
from mlcollage.measure._uses import Use, sqnorm, wide
from mlcollage.measure.layer_tap import hookable

__all__ = ["GhostNorms", "per_example_grad_sqnorm"]


@overload
def per_example_grad_sqnorm(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    x: Any,
    y: Any,
    *,
    differentiable: bool = ...,
    params: Iterable[nn.Parameter] | None = ...,
    per_layer: Literal[False] = ...,
    reduction: str = ...,
    verify: bool = ...,
) -> Tensor: ...
@overload
def per_example_grad_sqnorm(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    x: Any,
    y: Any,
    *,
    differentiable: bool = ...,
    params: Iterable[nn.Parameter] | None = ...,
    per_layer: Literal[True],
    reduction: str = ...,
    verify: bool = ...,
) -> dict[str, Tensor]: ...
def per_example_grad_sqnorm(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    x: Any,
    y: Any,
    *,
    differentiable: bool = False,
    params: Iterable[nn.Parameter] | None = None,
    per_layer: bool = False,
    reduction: str = "auto",
    verify: bool = False,
) -> Tensor | dict[str, Tensor]:
    r"""Squared norm of the gradient of each example's own loss.

    .. math:: s_i = \|\nabla_\theta\, \ell(f_\theta(x_i), y_i)\|^2

    Exact, for any model whose examples do not influence each other. Linear maps, convolutions and transposed
    convolutions of 1 to 3 dimensions, embeddings, attention's packed projections, the scales and biases of
    normalization layers, parametric ReLUs, and parameters that are added, multiplied or copied to all examples cost
    about one backward pass without weight gradients; tied and reused weights too. Parameters used in another way, and
    layers whose input does not have the examples in front, cost one more pass, through ``torch.vmap``; in models that
    do not allow it, such as recurrent ones, one backward pass for each example, with a warning.

    Parameters
    ----------
    model
        Any module; called as ``model(x)``.
    loss_fn
        ``loss_fn(output, y)``: one loss for each example, shape (B,), or their mean or sum.
    x
        Tensor with the B examples in front; or a tuple of arguments, or a dict of named ones.
    y
        Passed to ``loss_fn``.
    differentiable
        Keep the graph, so that the norms can be part of a loss. The forward pass then uses kernels of attention
        and recurrence that have second derivatives.
    params
        Parameters to count; by default all that require a gradient. Frozen ones never count.
    per_layer
        Give a dict from the path of each module to the part of its own parameters; the parts sum to the whole. A
        weight shared by several modules counts for the first of them, cross terms included.
    reduction
        ``"none"``, ``"mean"`` or ``"sum"``: what ``loss_fn`` does over the batch. The norms are those of each
        example's own loss in every case: a mean is multiplied by B. ``"auto"`` reads it from the shape of
        the loss, from ``loss_fn.reduction``, or from the default of an argument of that name.
    verify
        Check, with one more backward pass, that the first example's loss depends on nothing that belongs to
        the others. Worth doing once for a model that was not seen before.

    Returns
    -------
    Tensor
        (B,), at least in float32; or a dict of such.

    Raises
    ------
    InvalidInput
        For batch normalization in training mode, compiled or scripted models, nothing to count, a loss that is neither
        one number nor one for each example, one number of unknown reduction, weighted or masked means, inputs
        overwritten in place, reentrant checkpointing, and examples that influence each other (with ``verify``).

    Notes
    -----
    Under autocast the sums are in float32, of gradients in the type that autocast chose. Loss terms that do not
    go through the model's output, such as weight decay, are not seen.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.ones(5, 3), torch.tensor([0, 1, 1, 0, 1])
    >>> s = per_example_grad_sqnorm(model, nn.functional.cross_entropy, x, y)
    >>> loss = nn.functional.cross_entropy(model(x[:1]), y[:1])
    >>> one = sum(g.square().sum() for g in torch.autograd.grad(loss, model.parameters()))
    >>> torch.allclose(s[0], one)
    True
    """
    ghost = GhostNorms(model, params)
    output = ghost.run(x, differentiable=differentiable)
    with torch.inference_mode(False), torch.enable_grad():
        loss = _own_losses(loss_fn, output, y, ghost.batch, reduction)
        # Row i is the gradient of example i's own loss, since row i of the output is in no other.
        found = torch.autograd.grad(
            loss, ghost.outputs, create_graph=differentiable, retain_graph=True, materialize_grads=True
        )
    norms = ghost.sqnorm(found, differentiable=differentiable, verify=verify)
    return norms if per_layer else _total(norms)


class GhostNorms:
    """The forward pass of a model, from which squared gradient norms of single examples are read.

    :func:`per_example_grad_sqnorm` in two steps, for losses that are made of the output in between. First
    ``output = ghost.run(x)``, then ``ghost.sqnorm(cotangents)``, where the cotangents are the gradients of the losses
    with respect to the output: each example's own loss with respect to its own row.

    Parameters
    ----------
    model
        Any module.
    params
        Parameters to count; by default all that require a gradient.

    Attributes
    ----------
    batch : int
        B, examples of the last pass.
    output : object
        What the model returned in the last pass.
    outputs : list of Tensor
        The differentiable tensors of the last output; cotangents are given in this order.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> ghost = GhostNorms(model)
    >>> logits = ghost.run(torch.ones(4, 3))
    >>> norms = ghost.sqnorm([logits.softmax(1).detach()])  # the gradient of logsumexp
    >>> {layer: tuple(s.shape) for layer, s in norms.items()}
    {'': (4,)}
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter] | None = None) -> None:
        self.model = hookable(model, "a gradient norm")
        # By id, since tensors compare elementwise; a weight that several modules share is there once.
        named = {id(p): (name, p) for name, p in self.model.named_parameters() if p.requires_grad}
        if params is not None:
            wanted = {id(p) for p in params}
            if not wanted <= named.keys():
                raise InvalidInput("params must be parameters of the model that require a gradient.")
            named = {key: pair for key, pair in named.items() if key in wanted}
        if not named:
            raise InvalidInput("there is no parameter that requires a gradient, so there is no gradient norm to take.")
        self.names = {key: name for key, (name, _) in named.items()}
        self._layers = {key: layer_name(self.model, name) for key, name in self.names.items()}
        self._params = [p for _, p in named.values()]
        self._tape: Tape | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # kept for the general method's own pass
        self.output: Any = None
        self.outputs: list[Tensor] = []
        self.batch = 0
        self._custom = False  # are there custom autograd functions in the graph?

    def run(self, x: Any, *, differentiable: bool = False) -> Any:
        """The model's output for x: a tensor, a tuple of arguments or a dict of named ones."""
        args, kwargs = _arguments(x)
        self.batch = count_examples(x)
        self._tape = Tape(self.model, self._params, self.batch)
        with torch.inference_mode(False):
            self._inputs = tuple(_ordinary(a) for a in args), {key: _ordinary(v) for key, v in kwargs.items()}
            output = self._tape.run(*self._inputs, differentiable)
        self.output, self.outputs = output, _differentiable(output)
        if not self.outputs:
            raise InvalidInput("the model's output does not depend on the parameters that are to be counted.")
        customs = list(self._customs())
        self._custom = bool(customs)
        for node in customs:  # parameters that a custom function takes go to the general method
            for edge, _ in node.next_functions:
                self._tape.give_up(getattr(edge, "variable", None))
        return output

    @property
    def activations(self) -> int:
        """Numbers in the outputs of all layers in the last pass, which gradients of K losses have K times."""
        return self._tape.activations if self._tape is not None else 0

    @torch.inference_mode(False)
    def sqnorm(
        self,
        cotangents: Tensor | Sequence[Tensor],
        *,
        batched: bool = False,
        differentiable: bool = False,
        retain_graph: bool = False,
        verify: bool = False,
    ) -> dict[str, Tensor]:
        """Squared norms by layer, for the gradients of the losses with respect to the output.

        Parameters
        ----------
        cotangents
            One for each of ``outputs``, in its shape (B, ...); with ``batched``, (K, B, ...) for K losses at once.
        batched
            See ``cotangents``; the norms then have shape (K, B).
        differentiable
            Keep the graph, through the cotangents too if they have one.
        retain_graph
            Keep the forward pass, to call this once more.
        verify
            Check that examples do not influence each other.

        Returns
        -------
        dict of str to Tensor
            (B,) or (K, B) for each module with parameters of its own, by path. Parameters that belong to the model
            itself go by their own name, or by ``""`` if the model is a single layer.
        """
        tape = self._tape
        if tape is None:
            raise InvalidInput("run the model first, with ghost.run(x); norms can be read once unless retain_graph.")
        given = [cotangents] if isinstance(cotangents, Tensor) else list(cotangents)
        shapes = [tuple(o.shape) for o in self.outputs]
        if [tuple(c.shape[1:] if batched else c.shape) for c in given] != shapes:
            raise InvalidInput(f"cotangents must have the shapes of the outputs, {shapes}.")
        for use in tape.uses:
            use.check(self.names[id(use.owner)])
        # Only the shapes said where the examples are; one more backward pass tells.
        unsure = [u for u in tape.uses if verify or u.unsure]
        if unsure and self.batch > 1:
            self._check(tape, unsure, [c[0] if batched else c for c in given], verify)
        uses = [u for u in tape.uses if id(u.owner) not in tape.other]
        # Weight and bias of a layer have one output, whose gradient is asked for once.
        edges = {u.edge[:2]: u.edge for u in uses}
        retain = retain_graph or bool(tape.other)  # one pass per example still needs the graph
        gradients = self._backward(list(edges.values()), given, batched, differentiable, retain)
        if differentiable and self._custom:
            refuse_once_differentiable(g for g in gradients if g is not None)
        # (K, *shape of the layer's output) by place in the graph; K = 1 if not batched.
        found = zip(edges, gradients, strict=True)
        at = {place: wide(g if batched else g.unsqueeze(0)) for place, g in found if g is not None}
        pairs = [(u, at[place]) for u in uses if (place := u.edge[:2]) in at]
        by_param = self._contract(pairs, differentiable)
        if tape.other:
            stacked = [c if batched else c.unsqueeze(0) for c in given]
            by_param |= self._fall_back(tape, stacked, differentiable)
        if not retain_graph:  # frees the inputs of all layers
            self._tape = None
        many = len(given[0]) if batched else 1
        norms: dict[str, Tensor] = {}
        for param in self._params:
            layer, value = self._layers[id(param)], by_param.get(id(param))
            if value is None and layer not in norms:  # the output does not depend on it
                dtype = torch.promote_types(param.dtype, torch.float32)
                value = given[0].new_zeros((many, self.batch), dtype=dtype)
            if value is not None:
                norms[layer] = norms[layer] + value if layer in norms else value
        return norms if batched else {layer: value[0] for layer, value in norms.items()}

    def _backward(
        self, edges: list[GradientEdge], given: list[Tensor], batched: bool, differentiable: bool, retain: bool
    ) -> Sequence[Tensor | None]:
        """Gradients with respect to the layers' outputs at ``edges``; None where the output does not depend on one."""
        if not edges:
            return ()
        grad: Callable[..., Any] = functools.partial(
            torch.autograd.grad, self.outputs, edges, create_graph=differentiable, allow_unused=True
        )
        if not batched:
            return grad(given, retain_graph=retain or differentiable)
        try:
            return grad(given, retain_graph=True, is_grads_batched=True)
        except RuntimeError:  # an operation whose backward pass torch.vmap cannot run
            rows = [grad([c[k] for c in given], retain_graph=True) for k in range(len(given[0]))]
            # None for the same places in all rows: it is the graph that does not lead there.
            return [None if g[0] is None else torch.stack(g) for g in zip(*rows, strict=True)]

    def _contract(self, pairs: list[tuple[Use, Tensor]], differentiable: bool) -> dict[int, Tensor]:
        """Squared norms (K, batch) by the id of the parameter, from its uses and their outputs' gradients."""
        # All uses of one parameter together, for the products between them; thirds of a packed weight are apart.
        groups: dict[tuple[int, int | None], list[tuple[Use, Tensor]]] = {}
        for use, g in pairs:
            groups.setdefault((id(use.owner), use.part), []).append((use, g))
        found: dict[int, Tensor] = {}
        squares: dict[int, Tensor] = {}  # of output gradients, which a layer's weight and bias both need
        device = self.outputs[0].device.type
        # Autocast would make half-precision products of what was widened.
        wide_only = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with torch.set_grad_enabled(differentiable), wide_only:
            for (key, _), own in groups.items():
                norms = sqnorm(own, self.batch, squares)
                found[key] = found[key] + norms if key in found else norms
        return found

    def _fall_back(self, tape: Tape, cotangents: list[Tensor], differentiable: bool) -> dict[int, Tensor]:
        chosen = {self.names[key]: p for key, p in tape.other.items()}
        try:
            norms = _fallback.sqnorms(self.model, chosen, self._inputs, _differentiable, cotangents, differentiable)
        except RuntimeError as error:
            names = ", ".join(list(chosen)[:4]) + (", ..." if len(chosen) > 4 else "")
            why = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the parameters {names} are used in a way that needs torch.vmap, which this model does not allow "
                f"({why}); their norms take {cotangents[0].shape[:2].numel()} backward passes, one for each example.",
                stacklevel=4,
            )
            norms = _fallback.one_by_one(chosen, self.outputs, cotangents, differentiable)
        return {id(p): norms[name] for name, p in chosen.items()}

    def _check(self, tape: Tape, uses: list[Use], cotangents: list[Tensor], refuse: bool) -> None:
        """Do the first example's gradients lie in the first rows only?"""
        # The first example's own loss: its cotangents, zeros for the others.
        first = [torch.cat([c[:1].detach(), torch.zeros_like(c[1:])]) for c in cotangents]
        edges = [u.edge for u in uses]
        found = torch.autograd.grad(self.outputs, edges, first, retain_graph=True, allow_unused=True)
        for use, g in zip(uses, found, strict=True):
            if g is None or not g.reshape(self.batch, -1)[1:].any():  # (batch, everything else)
                continue
            if refuse and not use.unsure:  # else it is the batch that is not in front, which the general method can do
                raise InvalidInput(
                    f"the loss of one example depends on other examples of the batch, through the layer of parameter "
                    f"{self.names[id(use.owner)]!r}: no example has a gradient of its own."
                )
            tape.give_up(use.owner)

    def _customs(self) -> Iterable[Any]:
        """Custom autograd functions in the graph: the tape does not see what they use."""
        for node in graph_nodes(self.outputs):
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                # Its layers ran without gradients and will run again in the backward pass, both unseen by the tape.
                if type(node).__name__ == "CheckpointFunctionBackward":
                    raise InvalidInput(
                        "reentrant checkpointing hides the layers inside it: checkpoint with use_reentrant=False."
                    )
                yield node


def refuse_once_differentiable(gradients: Iterable[Tensor]) -> None:
    """Raise InvalidInput if autograd would take what a function hides from a second derivative for a constant."""
    # Such a function leaves a node in the graph that raises an error when it is differentiated.
    if any("Error" in type(node).__name__ for node in graph_nodes(gradients)):
        raise InvalidInput(
            "the model uses a custom function without second derivative (once_differentiable): put one that has it in "
            "its place."
        )


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of autograd's graph behind some tensors."""
    seen = {t.grad_fn for t in tensors if t.grad_fn is not None}
    todo: list[Any] = list(seen)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:  # a graph, not a tree
                seen.add(following)
                todo.append(following)


def _arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, tuple | list) else (x,)), {}


def count_examples(x: Any) -> int:
    """How many examples a tensor, a tuple of arguments or a dict of named ones holds."""
    args, kwargs = _arguments(x)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not tensors or any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors) or not len(tensors[0]):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
        raise InvalidInput(f"inputs must be tensors with the same number of examples in front, not {shapes}.")
    return len(tensors[0])


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of named ones."""
    args, kwargs = _arguments(x)
    return model(*args, **kwargs)


def _ordinary(value: Any) -> Any:
    """A copy of what inference mode made, which autograd does not accept."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _total(norms: Mapping[str, Tensor]) -> Tensor:
    # Layers may have different types, as parameters in half and in double precision have.
    values = list(norms.values())
    dtype = functools.reduce(torch.promote_types, (v.dtype for v in values))
    return values[0] if len(values) == 1 else torch.stack([v.to(dtype) for v in values]).sum(0)


def layer_name(model: nn.Module, name: str) -> str:
    """The path of the module that a parameter belongs to; one of the model's own goes by its own name."""
    return name.rpartition(".")[0] or ("" if next(model.children(), None) is None else name)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that have a gradient, in order."""
    if isinstance(output, Tensor):
        # Inside torch.func transforms, which the general method uses, tensors do not say that they require gradients.
        wanted = output.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(output)
        return [output] if output.is_floating_point() and wanted else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for value in output for t in _differentiable(value)]
    return []


def _own_losses(loss_fn: Callable[..., Tensor], output: Any, y: Any, batch: int, reduction: str) -> Tensor:
    """The sum of all examples' own losses."""
    checks.choice("reduction", reduction, ("auto", "none", "mean", "sum"))
    loss = loss_of(loss_fn, output, y, batch)
    if loss.ndim and reduction in ("auto", "none"):
        return loss.sum()
    if loss.ndim or reduction == "none":
        raise InvalidInput(
            f"reduction={reduction!r} does not fit a loss of shape {tuple(loss.shape)}: 'none' is for one loss per "
            "example, 'mean' and 'sum' are for one number."
        )
    if reduction == "auto":
        reduction = _reduction_of(loss_fn)
    if reduction == "sum":
        return loss
    # Such a mean divides by a sum of weights or a number of targets that all examples have a share in.
    ignored = getattr(loss_fn, "ignore_index", -100)
    masked = isinstance(y, Tensor) and not y.is_floating_point() and bool((y == ignored).any())
    if masked or getattr(loss_fn, "weight", None) is not None:
        raise InvalidInput(
            "a mean over weighted or ignored targets does not say what one example's own loss is: return one loss for "
            "each example (reduction='none'), averaged over its own positions."
        )
    return loss * batch  # the mean of the examples' own losses, as a sum


def loss_of(loss_fn: Callable[..., Tensor], output: Any, y: Any, batch: int) -> Tensor:
    """What ``loss_fn`` returns, with a graph: one loss for each example, (batch,), or one number."""
    loss = loss_fn(output, y)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise InvalidInput("loss_fn must return a tensor that depends on the model's output.")
    if loss.ndim and tuple(loss.shape) != (batch,):
        raise InvalidInput(
            f"loss_fn must return one loss for each of the {batch} examples, or one number, but it returned shape "
            f"{tuple(loss.shape)}: sum or average over everything but the examples."
        )
    return loss


def _reduction_of(loss_fn: Callable[..., Tensor]) -> str:
    found = getattr(loss_fn, "reduction", None)
    if found is None:
        try:  # also that of a functools.partial has the value that was bound
            parameter = inspect.signature(loss_fn).parameters.get("reduction")
        except (TypeError, ValueError):
            parameter = None
        found = None if parameter is None else parameter.default
    if found not in ("mean", "sum"):
        raise InvalidInput(
            "loss_fn returned one number, and nothing says whether it is a mean or a sum over the examples: pass "
            "reduction='mean' or 'sum', or return one loss for each example."
        )
    return found
