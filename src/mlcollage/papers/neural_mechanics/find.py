"""One call that finds the symmetries of a model: from its graph, confirmed by numbers, or by numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlcollage._checks import choice, integer, probability
from mlcollage.errors import InvalidInput

from ._analysis.confirm import confirm
from ._analysis.detect import dead_biases, detect
from ._analysis.names import unique_names
from ._analysis.probe import Probe
from ._analysis.structure import structural_symmetries
from ._analysis.tracing import TracingFailed, trace
from .symmetry import Symmetry, SymmetrySet
from .term import check_parameter

__all__ = ["TracingFailed", "find_symmetries"]

Method = Literal["both", "structural", "numerical"]


def find_symmetries(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    targets: Any = None,
    method: Method = "both",
    tol: float = 1e-6,
    batches: int = 3,
    seed: int = 0,
) -> SymmetrySet:
    r"""Symmetries of any model: translation, scale, rescale and matrix laws, each with a certificate.

    The graph of the model (``torch.export``) gives the translations, the symmetries that multiply each weight by a
    power of one number, and the matrix symmetries of attention heads and linear chains; random batches in float64 then
    confirm or reject each one, by its gradient constraint and by its finite action. A model that cannot be traced is
    searched by numbers alone; ``.unhandled`` then says why.

    Parameters
    ----------
    model
        Any module, in the mode in which it will be trained: batch norm has its scale law in training mode only. It is
        copied, never run or changed. Frozen parameters count as constants.
    example_inputs
        A tensor, a tuple of positional inputs, or a mapping of keyword inputs; a batch of at least two examples.
    loss_fn
        ``loss_fn(outputs, targets)`` giving one number. None: the symmetries that leave the outputs themselves
        unchanged, which are those of every loss; the translation of the last layer needs a loss to be seen.
    targets
        Example targets for the loss. None: class numbers are tried in the shapes of ``cross_entropy``, then floats
        like the outputs.
    method
        ``"both"``: graph, confirmed by numbers. ``"structural"``: graph only (no forward pass at all).
        ``"numerical"``: numbers only.
    tol
        Largest residual (a cosine) of an exact law. A law that only an epsilon breaks is kept, its ``broken_by`` says
        so and its ``residual`` by how much.
    batches
        Random batches for the confirmation.
    seed
        Of everything random; the global generator is not touched.

    Returns
    -------
    SymmetrySet
        Families of laws; ``.unhandled`` names what was not decided or was rejected, and why: operators without a
        rule, laws that scale about a point other than 0, laws that numbers refute.

    Raises
    ------
    InvalidInput
        Lazy, complex, quantized or sparse parameters, no trainable ones, one example only with batch norm, a loss that
        is not one finite number.

    References
    ----------
    Kunin et al. 2021, section 3. Marcotte et al. 2023 count the laws of small networks by a Lie algebra's rank.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = find_symmetries(model, torch.randn(16, 4), nn.functional.cross_entropy)
    >>> for law in found:
    ...     print(law.name, law.n_laws, law.residual < 1e-12)
    translation:2 9 True
    rescale:0->2 8 True
    """
    args, kwargs = _inputs(example_inputs)
    choice("method", method, ("both", "structural", "numerical"))
    tol, batches = probability("tol", tol), integer("batches", batches, least=1)
    _check(model, args, kwargs, loss_fn)
    if loss_fn is not None and targets is None:
        targets = _guess_targets(model, args, kwargs, loss_fn, seed)
    found, notes = SymmetrySet(), list[str]()
    if method != "numerical":
        try:
            found = structural_symmetries(trace(model, args, kwargs, loss_fn, targets))
        except TracingFailed as problem:
            if method == "structural":
                raise
            method, notes = "numerical", [f"{problem}; searched by numbers alone"]
    if method == "structural":
        return found
    probe = _probe(model, args, kwargs, loss_fn, targets, seed)
    if method == "numerical":
        candidates, limits = detect(probe, tol)
        candidates += dead_biases(probe, _shifted(candidates), batches)
        kept, refused = confirm(unique_names(candidates), probe, tol, batches, found_by="numbers")
        kept.sort(key=lambda law: law.kind != "translation")
        return SymmetrySet(tuple(kept), (*notes, *limits, *refused))
    kept, refused = confirm(list(found), probe, tol, batches)
    if any(note.startswith("operator ") for note in found.unhandled):
        kept += _unseen(probe, kept, tol, batches)
    return SymmetrySet(unique_names(kept), (*found.unhandled, *refused))


def _shifted(symmetries: list[Symmetry]) -> set[str]:
    """The parameters that translations act on."""
    return {name for law in symmetries if law.kind == "translation" for name in law.parameters}


def _unseen(probe: Probe, known: list[Symmetry], tol: float, batches: int) -> list[Symmetry]:
    """Laws that only numbers find, where the graph holds an operator without a rule."""

    def signature(law: Symmetry) -> frozenset[tuple[str, float]]:
        return frozenset((term.parameter, term.sign) for term in law.terms)

    covered, moved = {signature(law) for law in known}, _shifted(known)
    candidates = [
        law
        for law in detect(probe, tol)[0]
        if signature(law) not in covered and not (law.kind == "translation" and moved & set(law.parameters))
    ]
    return confirm(unique_names(candidates), probe, tol, batches, found_by="numbers")[0]


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(example, Mapping | Tensor | tuple | list):
        raise InvalidInput(
            f"example_inputs must be a tensor, a tuple of inputs or a mapping of keyword inputs, not a "
            f"{type(example).__name__}."
        )
    named = dict(example) if isinstance(example, Mapping) else {}
    args = () if named else (example,) if isinstance(example, Tensor) else tuple(example)
    for value in (*args, *named.values()):
        if isinstance(value, Tensor) and value.numel() == 0:
            raise InvalidInput(f"example_inputs are empty, {tuple(value.shape)}; give at least one example.")
    return args, named


def _check(model: Any, args: Any, kwargs: Any, loss_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be a torch.nn.Module, not a {type(model).__name__}.")
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidInput(
            f"loss_fn must be called as loss_fn(outputs, targets); a {type(loss_fn).__name__} cannot be."
        )
    for name, value in model.named_parameters():
        check_parameter(name, value)
    if not any(value.requires_grad for value in model.parameters()):
        raise InvalidInput("the model has no trainable parameters; unfreeze some, or pass the module that has them.")
    sizes = [x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    for name, module in model.named_modules():
        takes_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if takes_statistics and sizes and max(sizes) < 2:
            raise InvalidInput(
                f"{name or 'the model'} takes batch statistics, for which example_inputs must hold at least 2 examples."
            )


def _probe(model: nn.Module, args: Any, kwargs: Any, loss_fn: Any, targets: Any, seed: int) -> Probe:
    try:
        return Probe(model, args, kwargs, loss_fn, targets, seed)
    except InvalidInput:
        raise
    except Exception as problem:  # whatever the user's own forward raises
        text = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise InvalidInput(
            f"the model does not run on random inputs like example_inputs ({text}); pass a batch as in training."
        ) from problem


def _guess_targets(model: nn.Module, args: Any, kwargs: Any, loss_fn: Any, seed: int) -> Any:
    """Targets in the usual shapes, the first with which the loss runs."""
    probe = _probe(model, args, kwargs, None, None, seed)
    out = probe.value(0)[0].detach()
    generator = torch.Generator().manual_seed(seed + 1)
    device = out.device
    # class numbers with the classes on axis 1, and with the classes last
    shapes = [(out.shape[1], (out.shape[0], *out.shape[2:])), (out.shape[-1], out.shape[:-1])] if out.dim() > 1 else []
    options = [torch.randint(classes, shape, generator=generator) for classes, shape in shapes]
    options.append(torch.rand(out.shape, generator=generator).to(torch.get_default_dtype()))
    for option in options:
        try:
            value = Probe(model, args, kwargs, loss_fn, option.to(device), seed).value(0)[0]
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        if value.numel() == 1:
            return option.to(device)
    raise InvalidInput("loss_fn runs with none of the usual targets; pass example targets=... as in training.")
