r"""The trace of the Fisher information matrix: exact, by Monte Carlo, and from mini-batch gradients.

.. math::

    F(\theta) = E_x\, E_{\hat y \sim p_\theta(\cdot | x)} [g g^\top], \qquad
    \mathrm{Tr}\, F = E_x\, E_{\hat y} \|g(x, \hat y)\|^2, \qquad g(x, y) = \nabla_\theta (-\log p_\theta(y | x))

Labels come from the *model*. With the data's own labels it would be the empirical Fisher matrix, another object.

S. Jastrzębski et al., "Catastrophic Fisher Explosion: Early Phase Fisher Matrix Impacts Generalization", ICML 2021,
arXiv:2012.14193, sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlcollage import _checks as checks
from mlcollage.data.batches import DataBatch, Parts, batches_of, fit_mask
from mlcollage.errors import InvalidInput
from mlcollage.measure._examples import remembered
from mlcollage.measure._likelihood import as_generator, check_outputs, columns, count_columns, draw, draw_scores, score
from mlcollage.measure._uses import wide
from mlcollage.measure.grad_norms import GhostNorms, call, layer_name
from mlcollage.measure.trace import TraceResult
from mlcollage.measure.units import UnitAxes
from mlcollage.nn.wrapped import logits_of

_METHODS = ("exact", "mc", "minibatch")
_IGNORED = -100  # as in torch.nn.CrossEntropyLoss
_NUMBERS = 2**25  # numbers in the gradients of all layers' outputs, for all classes at once


def fisher_trace(
    model: nn.Module,
    data: Any,
    *,
    method: str = "exact",
    draws: int = 1,
    per_layer: bool = False,
    per_example: bool = False,
    likelihood: str = "categorical",
    generator: torch.Generator | int | None = None,
    params: Iterable[nn.Parameter] | None = None,
    batch_size: int = 256,
    class_dim: int | None = None,
    batch_dim: int = 0,
    parts: Parts = None,
    ignore_index: int | None = None,
) -> TraceResult:
    r"""Mean over the data of the trace of each example's Fisher matrix.

    With C classes, J the Jacobian of the logits and p the model's probabilities,

    .. math:: \mathrm{Tr}\, F(x) = \sum_k p_k \|g(x, k)\|^2 = \mathrm{Tr}[(\mathrm{diag}(p) - p p^\top) J J^\top]

    ``"exact"`` takes C - 1 backward passes, batched, through a square root of the middle matrix. ``"mc"`` draws labels:
    one backward pass each. ``"minibatch"`` uses :math:`E \|\frac1B \sum_i g(x_i, \hat y_i)\|^2 = \frac1B
    \mathrm{mean}_i \mathrm{Tr}\, F(x_i)` for independent labels: B times the squared norm of a mini-batch's mean
    gradient. It needs nothing but a gradient, and its standard error is far larger.

    Parameters
    ----------
    model
        Any module that returns logits (or an object or dict with ``logits``), in evaluation mode if it has batch
        normalization.
    data
        Inputs (N, ...); a pair (x, y); a dict of named parts; or an iterable of batches of these, such as a DataLoader,
        as for :func:`~mlcollage.data.batches.read_batch`. Targets are not used. Positions that a mask leaves out, such
        as padding, have no label and no part in an example's likelihood.
    method
        ``"exact"``, ``"mc"`` or ``"minibatch"``.
    draws
        Draws of all labels; not for ``"exact"``.
    per_layer
        Give the parts of the modules as well.
    per_example
        Give the trace of each example as well; not with ``"minibatch"``.
    likelihood
        ``"categorical"`` (logits of classes), ``"bernoulli"`` (each output the logit of a yes or no), or
        ``"gaussian"`` (each output a mean, with variance 1).
    generator
        Source of the labels, on any device, or a seed; required unless ``"exact"``.
    params
        Parameters to count; by default all that require a gradient.
    batch_size
        Examples at once, for data given as one tensor; for ``"minibatch"`` the B above.
    class_dim
        Dimension of the classes, with the examples in front; by default that on which the model's last layer puts its
        units, so 1 for convolutions and -1 for linear maps. Where this cannot be followed it is the last of (B, C) and
        (B, T, C), the second of (B, C, H, W).
    batch_dim
        Dimension of the examples in the model's inputs and outputs; 1 for sequence-first models called as (T, B, ...).
    parts
        What the parts of a batch are, where there are more than inputs and targets.
    ignore_index
        Leave out the positions (or examples) whose target is this, such as 255 for void pixels; default None, none.

    Returns
    -------
    TraceResult
        Its ``stderr`` is 0 for ``"exact"``. With one draw an example it is taken from the spread over examples, or
        batches, and so is too large rather than too small. A model with tokens or pixels has the log-likelihood of
        all of them as an example's: for a mean over T positions divide by :math:`T^2`.

    Raises
    ------
    InvalidInput
        For batch normalization in training mode, outputs that are not finite, probabilities in the place of logits,
        one class, drawing without generator, no data, counts below 1.
    UnknownName
        For an unknown method or likelihood.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> for p in model.parameters():
    ...     _ = nn.init.zeros_(p)
    >>> round(fisher_trace(model, torch.ones(4, 3)).value, 5)  # p = 1/2: (1/4 + 1/4) (3 + 1)
    2.0
    >>> round(fisher_trace(model, torch.ones(4, 3), method="mc", generator=0).value, 5)
    2.0
    """
    _check(method, draws, batch_size, per_example)
    if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise InvalidInput(
            "batch normalization in training mode couples the examples, so that the trace is not a mean over them: "
            "call model.eval() first (or only its BatchNorm layers'), or use GroupNorm or LayerNorm."
        )
    ghost = GhostNorms(model, params, batch_dim=batch_dim)
    device = next(ghost.model.parameters()).device
    source = None if method == "exact" else as_generator(generator)
    totals = _Totals(method, draws)
    for batch in batches_of(data, parts, batch_size=batch_size, dim=ghost.batch_dim, targets=False):
        batch = batch.to(device).check(ghost.model)
        x, mask = batch.x, _mask_of(batch, ignore_index)
        if method == "minibatch":
            totals.add(*_minibatch(ghost, x, draws, likelihood, class_dim, _needed(source), mask))
            continue
        if method == "exact":
            traces = _exact(ghost, x, likelihood, class_dim, mask)
            norms = {layer: v.unsqueeze(0) for layer, v in traces.items()}
        else:
            norms = _norms(ghost, x, "model", draws, likelihood, class_dim, source, False, mask=mask)
        if mask is not None:  # examples of which nothing counts are none
            counted = fit_mask(mask, ())  # (B,)
            norms = {layer: v[:, counted] for layer, v in norms.items()}
        totals.add(norms, len(next(iter(norms.values()))[0]))
    return totals.result(per_layer, per_example)


def fisher_sqnorm(
    model: nn.Module | GhostNorms,
    x: Any = None,
    *,
    labels: str | Tensor = "model",
    method: str = "mc",
    draws: int = 1,
    score_term: bool = False,
    per_layer: bool = False,
    likelihood: str = "categorical",
    generator: torch.Generator | int | None = None,
    params: Iterable[nn.Parameter] | None = None,
    class_dim: int | None = None,
    batch_dim: int = 0,
    mask: Tensor | None = None,
    retain_graph: bool = True,
) -> Tensor | dict[str, Tensor]:
    r"""Squared gradient norms of examples under drawn labels, or their expectation, as part of the graph: a penalty.

    ``"mc"``: the mean over draws of :math:`\|g(x_i, \hat y_i)\|^2`. ``"exact"``: :math:`\sum_k p_k \|g(x_i, k)\|^2`. In
    the first, labels are constants, so its gradient leaves out :math:`\sum_k \|g_k\|^2 \nabla p_k`; in the second this
    score term can be kept.

    Parameters
    ----------
    model
        Any module; or a :class:`~mlcollage.measure.grad_norms.GhostNorms` that was run with ``differentiable=True``, so
        that one forward pass serves the loss and the penalty.
    x
        Inputs, unless a GhostNorms is given.
    labels
        ``"model"``, ``"uniform"`` (over classes), or labels (B, ...), of which -100 is left out.
    method
        ``"mc"`` or ``"exact"``.
    draws
        Draws of all labels, for ``"mc"``.
    score_term
        Let gradients go through the probabilities, for ``"exact"``.
    per_layer
        Give a dict of parts, by module.
    likelihood, generator, params, class_dim, batch_dim
        As for :func:`fisher_trace` (a GhostNorms has its own ``params`` and ``batch_dim``); ``"exact"`` is for
        ``"categorical"`` and ``"bernoulli"`` and one output an example.
    mask
        (B, T), (B, H, W) or (B,), true for positions that count, such as ``attention_mask``; others have no label.
    retain_graph
        Keep what is needed to read norms from the GhostNorms again.

    Returns
    -------
    Tensor
        (B,), with a graph; or a dict of such.

    Raises
    ------
    InvalidInput
        As for :func:`fisher_trace`; and for a score term of drawn labels.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> penalty = fisher_sqnorm(model, torch.ones(4, 3), generator=0).mean()
    >>> penalty.backward()
    >>> model.weight.grad.shape
    torch.Size([2, 3])
    """
    if score_term and method != "exact":
        raise InvalidInput(
            "drawn labels are constants and have no score term: use method='exact', or score_term=False."
        )
    checks.choice("method", method, ("mc", "exact"))
    ghost = model if isinstance(model, GhostNorms) else GhostNorms(model, params, batch_dim=batch_dim)
    if method == "exact":
        norms = _expected(ghost, x, likelihood, class_dim, score_term, retain_graph)
        if mask is not None:  # one label for each example
            norms = {layer: v * fit_mask(mask.to(v.device), ()) for layer, v in norms.items()}
    else:
        drawn = isinstance(labels, str)
        source = as_generator(generator) if drawn else None
        if not isinstance(labels, Tensor):
            checks.choice("labels", labels, ("model", "uniform"))
        elif likelihood == "categorical":
            counted = labels != _IGNORED
            mask = counted if mask is None else counted & fit_mask(mask.to(labels.device), labels.shape[1:])
            labels = labels.clamp(min=0)
        norms = _norms(ghost, x, labels, draws, likelihood, class_dim, source, True, retain_graph, mask)
        norms = {layer: v.mean(0) for layer, v in norms.items()}
    return norms if per_layer else torch.stack(list(norms.values())).sum(0)


def sample_labels(
    outputs: Tensor,
    *,
    likelihood: str = "categorical",
    draws: int = 1,
    generator: torch.Generator | int | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Labels drawn from the model's own distribution; the same on every device for the same generator.

    Parameters
    ----------
    outputs
        Logits or means, (B, ...).
    likelihood, generator, class_dim
        As for :func:`fisher_trace`.
    draws
        Labels for each example.

    Returns
    -------
    Tensor
        (draws, B, ...): class numbers, zeros and ones, or values.

    Examples
    --------
    >>> sample_labels(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), generator=0)
    tensor([[0, 1]])
    """
    where = check_outputs(outputs, likelihood, class_dim)
    draws = checks.integer("draws", draws, least=1)
    return draw(outputs, likelihood, where, draws, as_generator(generator))


# One batch -----------------------------------------------------------------------------------------------------------


def _run(
    ghost: GhostNorms, x: Any, differentiable: bool, likelihood: str, class_dim: int | None
) -> tuple[Tensor, int, int]:
    """Run the model if x is given; its logits (B, ...), the dimension of the classes, the place among the outputs."""
    if x is not None:
        ghost.run(x, differentiable=differentiable)
    z = logits_of(ghost.output)
    places = [i for i, o in enumerate(ghost.outputs) if o is z]  # among the tensors that depend on parameters
    if not places:
        raise InvalidInput("the model's logits do not depend on the parameters that are to be counted.")
    z = _in_front(z, ghost)
    return z, check_outputs(z.detach(), likelihood, _classes(ghost, x, z, class_dim)), places[0]


def _in_front(z: Tensor, ghost: GhostNorms) -> Tensor:
    if z.ndim <= ghost.batch_dim:
        raise InvalidInput(f"the model's logits {tuple(z.shape)} have no dimension {ghost.batch_dim} of examples.")
    return z.movedim(ghost.batch_dim, 0)


def _classes(ghost: GhostNorms, x: Any, z: Tensor, class_dim: int | None) -> int | None:
    """The dimension of the classes of z, (B, ...): that on which the last layer puts its units, if that is known."""
    if class_dim is not None or z.ndim < 3 or x is None:
        return class_dim
    known = remembered(ghost.model)
    if ("classes", z.ndim) not in known:
        # One example is enough; taken before anything is drawn, so that the pass draws for itself.
        devices = [z.device] if z.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), UnitAxes() as axes:
            axis = axes.of(logits_of(call(ghost.model, _first(x, ghost.batch_dim))))
        if axis is not None:  # the examples go to the front
            axis = None if axis == ghost.batch_dim else axis + (axis < ghost.batch_dim)
        known["classes", z.ndim] = axis
    return known["classes", z.ndim]


def _first(x: Any, dim: int) -> Any:
    if isinstance(x, Mapping):
        return {name: _first(v, dim) for name, v in x.items()}
    if isinstance(x, tuple | list):
        return tuple(_first(v, dim) for v in x)
    return x.narrow(dim, 0, 1) if isinstance(x, Tensor) and x.ndim > dim else x


def _needed(source: torch.Generator | None) -> torch.Generator:
    assert source is not None
    return source


def _cotangents(ghost: GhostNorms, place: int, c: Tensor) -> list[Tensor]:
    """C for the logits, and zeros for the model's other outputs."""
    many = len(c)  # (K, B, ...): K gradients at once
    c = c.movedim(1, 1 + ghost.batch_dim)
    zeros = (torch.zeros((), dtype=o.dtype, device=o.device).expand(many, *o.shape) for o in ghost.outputs)
    return [c.to(o.dtype) if i == place else z for i, (o, z) in enumerate(zip(ghost.outputs, zeros, strict=True))]


def _norms(
    ghost: GhostNorms,
    x: Any,
    labels: str | Tensor,
    draws: int,
    likelihood: str,
    class_dim: int | None,
    source: torch.Generator | None,
    differentiable: bool,
    retain_graph: bool = False,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Squared norms (draws, B) for drawn or given labels, by layer."""
    z, where, place = _run(ghost, x, differentiable, likelihood, class_dim)
    if isinstance(labels, str) and labels == "model" and not differentiable:
        c = draw_scores(z, likelihood, where, draws, _needed(source))
    else:
        if isinstance(labels, Tensor):
            y = labels.unsqueeze(0)  # one draw, (1, B, ...)
        else:
            y = draw(torch.zeros_like(z) if labels == "uniform" else z, likelihood, where, draws, _needed(source))
        with torch.set_grad_enabled(differentiable):
            c = score(z, y, likelihood, where)  # (draws, B, ...), with z's graph if the norms are to have one
    c = _masked(c, mask, likelihood, where)
    if len(c) == 1:  # without torch.vmap, which costs small models more than the pass itself
        one = [v[0] for v in _cotangents(ghost, place, c)]
        norms = ghost.sqnorm(one, differentiable=differentiable, retain_graph=retain_graph)
        return {layer: v.unsqueeze(0) for layer, v in norms.items()}
    given = _cotangents(ghost, place, c)
    return ghost.sqnorm(given, batched=True, differentiable=differentiable, retain_graph=retain_graph)


def _exact(ghost: GhostNorms, x: Any, likelihood: str, class_dim: int | None, mask: Tensor | None) -> dict[str, Tensor]:
    """The trace of each example (B,), by layer."""
    z, where, place = _run(ghost, x, True, likelihood, class_dim)
    size = max(1, _NUMBERS // max(1, ghost.activations))  # columns at a time, for the memory of their gradients
    sums: dict[str, Tensor] = {}
    total = count_columns(z, likelihood, where)
    for done, c in enumerate(columns(z, likelihood, where, size), 1):
        last = done * size >= total
        c = _masked(c, mask, likelihood, where)
        norms = ghost.sqnorm(_cotangents(ghost, place, c), batched=True, retain_graph=not last)
        for layer, v in norms.items():  # (columns, B): the trace is the sum over all columns
            sums[layer] = sums[layer] + v.sum(0) if layer in sums else v.sum(0)
    return sums


def _expected(
    ghost: GhostNorms, x: Any, likelihood: str, class_dim: int | None, score_term: bool, retain_graph: bool
) -> dict[str, Tensor]:
    """Sums of p_k |g_k|^2 over the classes k, (B,), by layer, with their graph."""
    z, where, place = _run(ghost, x, True, likelihood, class_dim)
    if likelihood == "gaussian" or z.ndim > 2 or (likelihood == "bernoulli" and z[0].numel() > 1):
        raise InvalidInput(
            f"the exact expectation goes over the classes of one label for each example, not over outputs of shape "
            f"{tuple(z.shape)} under a {likelihood} likelihood: use method='mc'."
        )
    if likelihood == "categorical":
        p = wide(z).softmax(1).T  # (C, B)
        y = torch.arange(len(p), device=z.device).unsqueeze(1).expand(p.shape)
    else:
        p = wide(z).reshape(1, -1)
        p = torch.cat([(-p).sigmoid(), p.sigmoid()])  # (2, B): no, yes
        y = torch.stack([torch.zeros_like(z), torch.ones_like(z)])
    p = p if score_term else p.detach()
    given = _cotangents(ghost, place, score(z, y, likelihood, where))
    norms = ghost.sqnorm(given, batched=True, differentiable=True, retain_graph=retain_graph)
    return {layer: (p * v).sum(0) for layer, v in norms.items()}


def _minibatch(
    ghost: GhostNorms,
    x: Any,
    draws: int,
    likelihood: str,
    class_dim: int | None,
    source: torch.Generator,
    mask: Tensor | None,
) -> tuple[dict[str, Tensor], int]:
    """B times the squared norm of the mean gradient (draws,), by layer; and B."""
    with torch.inference_mode(False), torch.enable_grad():
        z = _in_front(logits_of(call(ghost.model, x)), ghost)
        batch = len(z) if mask is None else int(fit_mask(mask, ()).sum())  # examples that count
        where = check_outputs(z.detach(), likelihood, _classes(ghost, x, z, class_dim))
        scores = _masked(draw_scores(z, likelihood, where, draws, source), mask, likelihood, where)  # (draws, B, ...)
        params = {name: ghost.model.get_parameter(name) for name in ghost.names.values()}
        sums: dict[str, list[Tensor]] = {}
        for k, c in enumerate(scores):
            keep = k < draws - 1
            found = torch.autograd.grad(
                z,
                list(params.values()),
                (c / max(batch, 1)).to(z.dtype),
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )
            layers: dict[str, Tensor] = {}
            for name, g in zip(params, found, strict=True):
                layer = layer_name(ghost.model, name)
                # B |mean gradient|^2: an unbiased estimate of the mean trace
                layers[layer] = layers.get(layer, 0) + batch * wide(g).square().sum()
            for layer, v in layers.items():
                sums.setdefault(layer, []).append(v)
    return {layer: torch.stack(v) for layer, v in sums.items()}, batch


# All batches ---------------------------------------------------------------------------------------------------------


class _Totals:
    """Adds up batches: examples' traces with their draws, or whole batches' draws."""

    def __init__(self, method: str, draws: int) -> None:
        self.method, self.draws = method, draws
        self.layers: list[str] = []
        self.parts: list[Tensor] = []  # (layers, draws, B), or (layers, draws, 1) for a whole batch
        self.sizes: list[int] = []

    def add(self, norms: dict[str, Tensor], batch: int) -> None:
        """One batch, its parts (draws, B) or, for whole batches, (draws,)."""
        self.layers = list(norms)
        values = list(norms.values())
        # Layers may differ in precision under autocast.
        if any(v.dtype != values[0].dtype for v in values):
            values = [v.double() for v in values]
        parts = torch.stack(values).detach()
        self.parts.append(parts.unsqueeze(2) if self.method == "minibatch" else parts)
        self.sizes.append(batch)

    def result(self, per_layer: bool, per_example: bool) -> TraceResult:
        """The mean over all examples."""
        if not self.sizes:
            raise InvalidInput("there are no data: at least one batch is needed.")
        parts = np.concatenate([p.cpu().numpy() for p in self.parts], 2, dtype=np.float64)
        draws, columns = parts.shape[1:]
        totals = parts.sum(0)  # (draws, columns)
        each = totals.sum(0) / draws  # (columns,): an example, or a batch
        # Batches weigh by their size, examples alike.
        share = np.asarray(self.sizes) / sum(self.sizes) if self.method == "minibatch" else 1 / columns
        value = float((each * share).sum())
        layers = None
        if per_layer:
            layers = {n: float((p.mean(0) * share).sum()) for n, p in zip(self.layers, parts, strict=True)}
        if self.method == "exact":
            stderr = 0.0
        elif draws > 1:  # the spread of draws within each column, the columns' variances added up
            stderr = math.sqrt((((totals - each) * share) ** 2).sum() / (draws - 1) / draws)
        elif columns > 1:  # one draw: the spread over columns holds that of the draws, and more
            stderr = math.sqrt((((each - value) * share) ** 2).sum() * columns / (columns - 1))
        else:
            stderr = math.nan
        own = torch.cat([p.double().sum(0).mean(0) for p in self.parts]) if per_example else None
        return TraceResult(value, stderr, layers, own, draws=0 if self.method == "exact" else self.draws)


def _mask_of(batch: DataBatch, ignore_index: int | None) -> Tensor | None:
    """Positions (B, ...) or examples (B,) that count."""
    if ignore_index is None or not isinstance(batch.y, Tensor):
        return batch.mask
    counted = batch.y != ignore_index
    return counted if batch.mask is None else counted & fit_mask(batch.mask, counted.shape[1:])


def _masked(c: Tensor, mask: Tensor | None, likelihood: str, class_dim: int) -> Tensor:
    """Scores (K, B, ...) without those of positions that do not count."""
    if mask is None:
        return c
    axis = class_dim + 1 if likelihood == "categorical" else c.ndim - 1  # of the classes, or the last of the outputs
    if likelihood != "categorical" and mask.ndim == c.ndim - 1:  # an output for each position
        return c * fit_mask(mask, c.shape[2:], "the model's output").to(c.dtype)
    grid = [n for k, n in enumerate(c.shape) if k > 1 and k != axis]
    keep = fit_mask(mask, grid, "the model's output").to(c.dtype)  # (B, *positions)
    return c * (keep.unsqueeze(axis - 1) if c.ndim > 2 else keep)


def _check(method: str, draws: int, batch_size: int, per_example: bool) -> None:
    checks.choice("method", method, _METHODS)
    checks.integer("draws", draws, least=1)
    checks.integer("batch_size", batch_size, least=1)
    if method == "exact" and draws != 1:
        raise InvalidInput("method='exact' draws nothing: leave draws out, or use method='mc'.")
    if method == "minibatch" and per_example:
        raise InvalidInput("method='minibatch' has no value for a single example: use method='mc' or 'exact'.")
