r"""Squared gradient norms of single examples, without the gradients of single examples ("ghost norms").

One forward pass and one backward pass to the outputs of the layers, never to their weights, give
:math:`\|\nabla_\theta \ell_i\|^2` for all examples i of a batch.
With ``differentiable=True`` the norms are part of the graph, so that they can be penalized.

I. Goodfellow, "Efficient Per-Example Gradient Computations", arXiv:1510.01799 (linear layers); Z. Bu, J. Mao and S. Xu,
"Scalable and Efficient Training of Large Convolutional Neural Networks with Differential Privacy", arXiv:2205.10683
(mixed ghost norms); X. Li, F. Tramèr, P. Liang and T. Hashimoto, arXiv:2110.05679 (sequences, embeddings).
"""

from __future__ import annotations

import copy
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
from mlcollage import _random
from mlcollage.data.batches import in_type_of
from mlcollage.errors import InvalidInput
from mlcollage.measure import _fallback
from mlcollage.measure._examples import Layout, belongs, moves_rows, remembered, weights
from mlcollage.measure._tape import REENTRANT, Tape, second_derivatives
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
    batch_dim: int = ...,
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
    batch_dim: int = ...,
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
    batch_dim: int = 0,
) -> Tensor | dict[str, Tensor]:
    r"""Squared norm of the gradient of each example's own loss.

    .. math:: s_i = \|\nabla_\theta\, \ell(f_\theta(x_i), y_i)\|^2

    Exact, for any model whose examples do not influence each other. Linear maps, convolutions and transposed
    convolutions of 1 to 3 dimensions, embeddings, attention's packed projections, the scales and biases of
    normalization layers, parametric ReLUs, and parameters that are added, multiplied or copied to all examples cost
    about one backward pass without weight gradients; tied and reused weights too. Parameters used in another way cost
    one more pass, through ``torch.vmap``; in models that do not allow it, such as recurrent ones, one backward pass for
    each example, with a warning.

    Where a layer's input has the examples is proved, not guessed from sizes: two backward passes to the layers'
    outputs, at the first batch of these shapes, with a random weight for each example in the second. A layer's row i
    must follow the weight of example i. Of a model that moves rows by what is in the data, such as ``h[mask]`` or
    experts for tokens, every batch is proved. Layers without such rows go the ways of other parameters.

    Parameters
    ----------
    model
        Any module; called as ``model(x)``.
    loss_fn
        ``loss_fn(output, y)``: one loss for each example, shape (B,), or their mean or sum.
    x
        Tensor with the B examples along ``batch_dim``; or a tuple of arguments, or a dict of named ones.
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
        Compare three examples with their own backward passes, and with what the model makes of them alone. Worth doing
        once for a model that was not seen before.
    batch_dim
        Dimension of the examples in the model's inputs and outputs; 1 for sequence-first models called as (T, B, ...).
        Losses are (B,) in any case.

    Returns
    -------
    Tensor
        (B,), at least in float32; or a dict of such.

    Raises
    ------
    InvalidInput
        For batch normalization in training mode, compiled or scripted models, nothing to count, a loss that is neither
        one number nor one for each example, one number of unknown reduction, weighted or masked means, losses that
        read the outputs of other examples, outputs without examples, inputs overwritten in place, reentrant
        checkpointing, and examples that influence each other (where parameters need a pass for single examples; in any
        case with ``verify``).

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
    ghost = GhostNorms(model, params, batch_dim=batch_dim)
    ghost.run(x, differentiable=differentiable)
    cotangents = ghost.cotangents(loss_fn, y, reduction=reduction, create_graph=differentiable)
    norms = ghost.sqnorm(cotangents, differentiable=differentiable, verify=verify)
    return norms if per_layer else _total(norms)


class GhostNorms:
    """The forward pass of a model, from which squared gradient norms of single examples are read.

    :func:`per_example_grad_sqnorm` in two steps, for losses that are made of the output in between. First
    ``output = ghost.run(x)``, then ``ghost.sqnorm(cotangents)``, where the cotangents are the gradients of the losses
    with respect to the output: each example's own loss with respect to its own row. Of several outputs they are the
    partial gradients, as the loss alone has them: a loss of the logits has none with respect to hidden states that the
    model returns as well, though the logits are made of these. :meth:`cotangents` takes them from a loss.

    Parameters
    ----------
    model
        Any module.
    params
        Parameters to count; by default all that require a gradient.
    batch_dim
        Dimension of the examples in inputs and outputs.

    Attributes
    ----------
    batch : int
        B, examples of the last pass.
    output : object
        What the model returned in the last pass.
    outputs : list of Tensor
        The differentiable tensors of the last output, each once; cotangents are given in this order.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> ghost = GhostNorms(model)
    >>> logits = ghost.run(torch.ones(4, 3))
    >>> norms = ghost.sqnorm([logits.softmax(1).detach()])  # the gradient of logsumexp
    >>> {layer: tuple(s.shape) for layer, s in norms.items()}
    {'': (4,)}
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter] | None = None, *, batch_dim: int = 0) -> None:
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
        self.batch_dim = checks.integer("batch_dim", batch_dim, least=0)
        self._tape: Tape | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # kept for the general method's own pass
        self.output: Any = None
        self.outputs: list[Tensor] = []
        self.batch = 0
        self._nodes: list[Any] = []  # of the graph behind the outputs
        self._custom = False  # are there custom autograd functions among them?

    def run(self, x: Any, *, differentiable: bool = False) -> Any:
        """The model's output for x: a tensor, a tuple of arguments or a dict of named ones."""
        args, kwargs = arguments(x)
        self.batch = count_examples(x, self.batch_dim)
        self._tape = Tape(self.model, self._params, self.batch)
        with torch.inference_mode(False):
            self._inputs = tuple(map(self._ordinary, args)), {key: self._ordinary(v) for key, v in kwargs.items()}
            output = self._tape.run(*self._inputs, differentiable)
        self.output, self.outputs = output, _differentiable(output)
        if not self.outputs:
            raise InvalidInput("the model's output does not depend on the parameters that are to be counted.")
        self._nodes = list(graph_nodes(self.outputs))
        customs = list(self._customs())
        self._custom = bool(customs)
        for node in customs:  # parameters that a custom function takes go to the general method
            for edge, _ in node.next_functions:
                self._tape.give_up(getattr(edge, "variable", None))
        return output

    def _ordinary(self, value: Any) -> Any:
        """In the model's type; a copy of what inference mode made, which autograd does not accept."""
        value = in_type_of(self.model, value)
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    @property
    def activations(self) -> int:
        """Numbers in the outputs of all layers in the last pass, which gradients of K losses have K times."""
        return self._tape.activations if self._tape is not None else 0

    @torch.inference_mode(False)
    def cotangents(
        self, loss_fn: Callable[..., Tensor], y: Any, *, reduction: str = "auto", create_graph: bool = False
    ) -> list[Tensor]:
        """Gradients of the examples' own losses with respect to the outputs, as :meth:`sqnorm` takes them.

        Parameters
        ----------
        loss_fn, y, reduction
            As in :func:`per_example_grad_sqnorm`.
        create_graph
            Give the cotangents a graph.
        """
        with torch.enable_grad():
            # Outputs may be made of one another. Views of them, which are not, have the loss's own gradients only.
            own, output = self.outputs, self.output
            if len(own) > 1:
                own = [o.view_as(o) for o in own]
                output = _replaced(output, {id(o): v for o, v in zip(self.outputs, own, strict=True)})
            loss = loss_of(loss_fn, output, y, self.batch)
            total = _own_losses(loss, loss_fn, y, self.batch, reduction)
            # Row i is the gradient of example i's own loss, since row i of the output is in no other.
            found = torch.autograd.grad(
                total, own, create_graph=create_graph, retain_graph=True, materialize_grads=True
            )
            if loss.ndim and self.batch > 1:
                self._check_losses(loss, own, found)
        if not loss.ndim:
            self._check_mean(found)
        return list(found)

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
            Compare with the backward passes of single examples, and check that these do not influence each other.

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
        if not batched:
            given = self._of_examples(given, differentiable)
        if self.batch > 1:  # else there is no other example to which anything could belong
            self._prove(tape, [c[0] if batched else c for c in given])
        uses = [u for u in tape.uses if id(u.owner) not in tape.other]
        # Weight and bias of a layer have one output, whose gradient is asked for once.
        edges = {u.edge[:2]: u.edge for u in uses}
        retain = retain_graph or verify or bool(tape.other)  # one pass per example still needs the graph
        gradients = self._backward(list(edges.values()), given, batched, differentiable, retain)
        if differentiable and self._custom:
            refuse_once_differentiable(g for g in gradients if g is not None)
        # (K, *shape of the layer's output) by place in the graph; K = 1 if not batched.
        found = zip(edges, gradients, strict=True)
        at = {place: wide(g if batched else g.unsqueeze(0)) for place, g in found if g is not None}
        # The examples in front; weight and bias of a layer share what they are made of.
        laid: dict[Any, Tensor] = {}
        for u in uses:
            if (key := (u.edge[:2], u.layout)) not in laid and u.edge[:2] in at:
                laid[key] = u.layout(at[u.edge[:2]], 1)  # (K, batch, ...)
        pairs = [(u, laid[key]) for u in uses if (key := (u.edge[:2], u.layout)) in laid]
        by_param = self._contract(pairs, differentiable)
        if tape.other:
            stacked = [c if batched else c.unsqueeze(0) for c in given]
            by_param |= self._fall_back(tape, stacked, differentiable, verify)
        if verify:
            self._verify(by_param, [c[:1] if batched else c.unsqueeze(0) for c in given])
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

    def _fall_back(self, tape: Tape, cotangents: list[Tensor], differentiable: bool, verify: bool) -> dict[int, Tensor]:
        chosen = {self.names[key]: p for key, p in tape.other.items()}
        places = self._by_example(cotangents)
        outputs = [self.outputs[i].movedim(self.batch_dim, 0) for i in places]  # (batch, ...)
        cotangents = [cotangents[i].movedim(self.batch_dim + 1, 1) for i in places]  # (K, batch, ...)
        pick = self._picker(places)
        try:
            with second_derivatives(self.model) if differentiable else nullcontext():
                norms, alone = _fallback.sqnorms(
                    self.model, chosen, self._inputs, self.batch_dim, pick, cotangents, differentiable
                )
            same = all(_alike(a, o) for a, o in zip(alone, outputs, strict=True))
            why = "the model makes something else of an example in a batch than of one alone"
        except RuntimeError as error:
            norms, same, why = {}, False, str(error).strip().splitlines()[0]
        if not same:
            self._check_coupled(places)
            names = ", ".join(list(chosen)[:4]) + (", ..." if len(chosen) > 4 else "")
            warnings.warn(
                f"the parameters {names} are used in a way that needs torch.vmap, which this model does not allow "
                f"({why}); their norms take {cotangents[0].shape[:2].numel()} backward passes, one for each example.",
                stacklevel=4,
            )
            norms = _fallback.one_by_one(chosen, outputs, cotangents, range(self.batch), differentiable)
        return {id(p): norms[name] for name, p in chosen.items()}

    def _of_examples(self, given: list[Tensor], create_graph: bool) -> list[Tensor]:
        """Cotangents of an output without examples, as a loss inside the model, moved to the output it is made of."""
        whole = [i for i in self._read(given) if not self._has_examples(self.outputs[i])]
        if not whole or len(given) == 1:
            return given
        edges = list({u.edge[:2]: u.edge for u in self._tape.uses}.values()) if self._tape is not None else []
        grad: Callable[..., Any] = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
        truth = grad(self.outputs, edges, [c.detach() for c in given])
        for place, output in enumerate(self.outputs):
            if not self._has_examples(output):
                continue
            (c,) = grad([self.outputs[i] for i in whole], output, [given[i] for i in whole], create_graph=create_graph)
            if c is None or not bool(c.any()):
                continue
            # It may also read what this output is not made from: then the gradients differ.
            moved = [torch.zeros_like(g) if i in whole else g for i, g in enumerate(given)]
            moved[place] = moved[place] + c
            found = grad(self.outputs, edges, [m.detach() for m in moved])
            if all(_close(a, b) for a, b in zip(truth, found, strict=True)):
                return moved
        return given

    @staticmethod
    def _read(cotangents: Sequence[Tensor]) -> list[int]:
        """The places of the outputs that the losses read."""
        return [i for i, c in enumerate(cotangents) if len(cotangents) == 1 or bool(c.detach().any())]

    def _by_example(self, cotangents: Sequence[Tensor]) -> list[int]:
        """The same, if these outputs have examples."""
        read = self._read(cotangents)
        whole = [i for i in read if not self._has_examples(self.outputs[i])]
        if whole:
            raise InvalidInput(
                f"the loss reads an output of the model of shape {tuple(self.outputs[whole[0]].shape)}, which has no "
                "dimension of examples, and there is no other that it is made of: compute the loss in loss_fn, from "
                "the model's logits, one for each example."
            )
        return read

    def _picker(self, places: list[int]) -> Callable[[Any], list[Tensor]]:
        """Picks, of what the model returns, the tensors that are ``outputs`` at these places."""
        every = _tensors_of(self.output)
        at = [next(k for k, t in enumerate(every) if t is self.outputs[i]) for i in places]

        def pick(output: Any) -> list[Tensor]:
            found = _tensors_of(output)
            return [found[k] for k in at]

        return pick

    def _has_examples(self, output: Tensor) -> bool:
        return output.ndim > self.batch_dim and output.shape[self.batch_dim] == self.batch

    def _prove(self, tape: Tape, cotangents: list[Tensor]) -> None:
        """Find where each layer has its examples; leave parameters to the general method where it has none."""
        places = [i for i, o in enumerate(self.outputs) if self._has_examples(o)]
        read = self._read(cotangents)
        if read and all(i in places for i in read):  # others may have another dimension of the examples' size
            places = read
        if not places:
            shapes = ", ".join(str(tuple(o.shape)) for o in self.outputs)
            raise InvalidInput(
                f"no output of the model has its {self.batch} examples along dimension {self.batch_dim} (shapes "
                f"{shapes}): return logits as well, or give batch_dim."
            )
        uses = tape.uses
        key = (
            self.batch,
            tuple(places),
            tuple((self.names[id(u.owner)], type(u), u.part, u.options, u.shape) for u in uses),
            tuple(type(n).__name__ for n in self._nodes),
        )
        known = remembered(self.model)
        found: tuple[Layout | None, ...] | None = known.get(key)
        if found is None:
            found, lasting = self._layouts(uses, [self.outputs[i] for i in places])
            if lasting and not moves_rows(self._nodes):
                known[key] = found
        for use, layout in zip(uses, found, strict=True):
            if layout is None:
                tape.give_up(use.owner)
            else:
                use.layout = layout

    def _layouts(self, uses: list[Use], outputs: list[Tensor]) -> tuple[tuple[Layout | None, ...], bool]:
        """The true layout of each use, or None; and whether gradients of several examples spoke for all of them."""
        if not uses:
            return (), True
        generator = _random.generator(self.batch)
        narrow = torch.float16 in {*(o.dtype for o in outputs), *(u.dtype for u in uses)}
        w = weights(self.batch, narrow=narrow).to(outputs[0].device)
        # Random cotangents, since those of a loss may be zero for examples that are learned already.
        plain = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        shaped = [w.reshape(-1, *(1,) * (o.ndim - self.batch_dim - 1)).to(o.dtype) for o in outputs]
        edges = {u.edge[:2]: u.edge for u in uses}
        grad: Callable[..., Any] = functools.partial(
            torch.autograd.grad, outputs, list(edges.values()), retain_graph=True, allow_unused=True
        )
        first = dict(zip(edges, grad(plain), strict=True))
        second = dict(zip(edges, grad([c * v for c, v in zip(plain, shaped, strict=True)]), strict=True))
        judged: dict[Any, tuple[Layout | None, int]] = {}
        for use in uses:
            place = use.edge[:2]
            g, weighted = first[place], second[place]
            if (place, use.options) in judged:
                continue
            judged[place, use.options] = None, 2  # no output of an example depends on it
            for layout in use.options if g is not None and weighted is not None else ():
                ok, rows = belongs(layout(g), layout(weighted), w)
                if ok:
                    judged[place, use.options] = layout, rows
                    break
        found = [judged[u.edge[:2], u.options] for u in uses]
        return tuple(layout for layout, _ in found), all(rows > 1 for _, rows in found)

    def _check_losses(self, loss: Tensor, outputs: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
        """Refuse losses (batch,) that read the outputs of other examples; ``plain`` are the gradients of their sum."""
        w = weights(self.batch, narrow=any(o.dtype is torch.float16 for o in outputs)).to(loss)
        weighted: Sequence[Tensor | None] = torch.autograd.grad(loss, outputs, w, retain_graph=True, allow_unused=True)
        for o, g, gw in zip(outputs, plain, weighted, strict=True):
            if gw is None:
                continue
            if (
                not self._has_examples(o)
                or not belongs(g.detach().movedim(self.batch_dim, 0), gw.movedim(self.batch_dim, 0), w)[0]
            ):
                raise InvalidInput(
                    "the loss of one example reads the outputs of others, as contrastive losses and normalizations "
                    "over the batch do, so no example has a gradient of its own: compute each loss from its own output."
                )

    def _check_mean(self, cotangents: Sequence[Tensor]) -> None:
        """Refuse a mean inside the model over targets that do not count alike."""
        whole = any(not self._has_examples(o) and bool(c.any()) for o, c in zip(self.outputs, cotangents, strict=True))
        named = self._inputs[1].get("labels")
        if whole and isinstance(named, Tensor) and bool((named == -100).any()):
            raise InvalidInput(_WEIGHTED)

    def _verify(self, by_param: dict[int, Tensor], cotangents: list[Tensor]) -> None:
        """Do three examples have the norms of their own backward passes, and the outputs that they have alone?"""
        some = self._some()
        places = self._by_example(cotangents)
        outputs = [self.outputs[i].movedim(self.batch_dim, 0) for i in places]
        given = [cotangents[i].detach().movedim(self.batch_dim + 1, 1) for i in places]
        params = {self.names[id(p)]: p for p in self._params}
        truth = _fallback.one_by_one(params, outputs, given, some, False)
        for name, p in params.items():
            norms = by_param.get(id(p))
            norms = torch.zeros_like(truth[name]) if norms is None else norms[:1, some].detach()
            loose = 1e-2 if p.dtype in (torch.float16, torch.bfloat16) or outputs[0].dtype != p.dtype else 1e-3
            if not torch.allclose(norms.double(), truth[name].double(), loose, 1e-12, equal_nan=True):
                raise InvalidInput(
                    f"the gradient norms by parameter {name!r} are not those of the examples' own backward passes, "
                    "which happens when the loss of one example depends on other examples of the batch: no example has "
                    "a gradient of its own."
                )
        self._check_coupled(places)

    @torch.no_grad()
    def _check_coupled(self, places: list[int]) -> None:
        """Refuse a model that, given an example alone, returns other numbers than in the batch."""
        pick = self._picker(places)

        def rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
            with torch.random.fork_rng(devices=[d for d in {o.device for o in self.outputs} if d.type == "cuda"]):
                found = pick(self.model(*args, **kwargs))
            return [o.movedim(self.batch_dim, 0) for o in found]

        def one(value: Any, i: int) -> Any:
            return value.narrow(self.batch_dim, i, 1) if isinstance(value, Tensor) else value

        whole = [self.outputs[i].movedim(self.batch_dim, 0) for i in places]
        args, kwargs = self._inputs
        if not all(_alike(a, b) for a, b in zip(rows(args, kwargs), whole, strict=True)):
            return  # noise, such as dropout: two passes cannot be compared
        for i in self._some() if self.batch > 1 else ():
            try:
                alone = rows(tuple(one(a, i) for a in args), {name: one(v, i) for name, v in kwargs.items()})
            except Exception:  # whatever a model does on a batch of one, such as squeeze it
                return
            pairs = [(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True)]
            if any(a.shape == b.shape and not _alike(a, b) for a, b in pairs):
                raise InvalidInput(
                    "the model's output for one example depends on other examples of the batch, so that no example has "
                    "a gradient of its own: take out what mixes them, or give batch_dim if the examples are along "
                    f"another dimension than {self.batch_dim}."
                )

    def _some(self) -> list[int]:
        """The examples that are looked at."""
        return sorted({0, self.batch // 2, self.batch - 1})

    def _customs(self) -> Iterable[Any]:
        """Custom autograd functions in the graph: the tape does not see what they use."""
        for node in self._nodes:
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                # Its layers ran without gradients and will run again in the backward pass, both unseen by the tape.
                if type(node).__name__ == "CheckpointFunctionBackward":
                    raise InvalidInput(REENTRANT)
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


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments from a tensor, a tuple of arguments or a dict of named ones."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, tuple | list) else (x,)), {}


def count_examples(x: Any, batch_dim: int = 0) -> int:
    """How many examples a tensor, a tuple of arguments or a dict of named ones holds."""
    args, kwargs = arguments(x)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    sizes = {t.shape[batch_dim] if t.ndim > batch_dim else 0 for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
        where = f"along dimension {batch_dim}" if batch_dim else "in front"
        raise InvalidInput(f"inputs must be tensors with the same number of examples {where}, not {shapes}.")
    return sizes.pop()


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of named ones."""
    args, kwargs = arguments(x)
    return model(*args, **kwargs)


def _total(norms: Mapping[str, Tensor]) -> Tensor:
    # Layers may have different types, as parameters in half and in double precision have.
    values = list(norms.values())
    dtype = functools.reduce(torch.promote_types, (v.dtype for v in values))
    return values[0] if len(values) == 1 else torch.stack([v.to(dtype) for v in values]).sum(0)


def layer_name(model: nn.Module, name: str) -> str:
    """The path of the module that a parameter belongs to; one of the model's own goes by its own name."""
    return name.rpartition(".")[0] or ("" if next(model.children(), None) is None else name)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that have a gradient, in order, each once."""
    # Inside torch.func transforms, which the general method uses, tensors do not say that they require gradients.
    return [
        t
        for t in _tensors_of(output)
        if t.is_floating_point() and (t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t))
    ]


def _tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order, each once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                visit(item)

    visit(output)
    return list(found.values())


def _replaced(output: Any, by: dict[int, Tensor]) -> Any:
    """A copy of a nested output with other tensors, by the ids of those in it."""
    if isinstance(output, Tensor):
        return by.get(id(output), output)
    if isinstance(output, Mapping):
        made = copy.copy(output)
        for key, value in output.items():
            made[key] = _replaced(value, by)  # type: ignore[index]
        return made
    if isinstance(output, list | tuple):
        items = [_replaced(value, by) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Are two gradients the same but for rounding?"""
    if a is None or b is None:
        return a is b or not bool((b if a is None else a).any())  # type: ignore[union-attr]
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * a.abs().max())


def _alike(a: Tensor, b: Tensor) -> bool:
    """Are two outputs the same but for rounding?"""
    eps = torch.finfo(a.dtype).eps ** 0.5
    return a.shape == b.shape and torch.allclose(a.detach(), b.detach().to(a.dtype), eps, eps, equal_nan=True)


_WEIGHTED = (
    "a mean over weighted or ignored targets does not say what one example's own loss is: return one loss for "
    "each example (reduction='none'), averaged over its own positions."
)


def _own_losses(loss: Tensor, loss_fn: Callable[..., Tensor], y: Any, batch: int, reduction: str) -> Tensor:
    """The sum of all examples' own losses."""
    checks.choice("reduction", reduction, ("auto", "none", "mean", "sum"))
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
    ignored = setting_of(loss_fn, "ignore_index", -100)
    masked = isinstance(y, Tensor) and not y.is_floating_point() and bool((y == ignored).any())
    if masked or setting_of(loss_fn, "weight") is not None:
        raise InvalidInput(_WEIGHTED)
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


def setting_of(loss_fn: Callable[..., Tensor], name: str, default: Any = None) -> Any:
    """A setting of a loss: an attribute, or the default of an argument, which may be bound by a functools.partial."""
    if hasattr(loss_fn, name):
        return getattr(loss_fn, name)
    try:
        parameter = inspect.signature(loss_fn).parameters.get(name)
    except (TypeError, ValueError):
        return default
    return default if parameter is None or parameter.default is parameter.empty else parameter.default


def _reduction_of(loss_fn: Callable[..., Tensor]) -> str:
    found = setting_of(loss_fn, "reduction")
    if found not in ("mean", "sum"):
        raise InvalidInput(
            "loss_fn returned one number, and nothing says whether it is a mean or a sum over the examples: pass "
            "reduction='mean' or 'sum', or return one loss for each example."
        )
    return found
